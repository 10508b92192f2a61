"""Planted duplicates, leaks, loops and mixed languages are found; their look-alikes are left."""

import importlib.util
from pathlib import Path

import pytest

import curation_table as cases
from kd.traces import DropCounts, Evaluations, Lint, OneLanguage, Trace, near_duplicates
from kd.traces.words import carried, tokens, words

pytest.importorskip("rensa")
README = Path(__file__).parents[1] / "kd" / "traces" / "README.md"


def test_the_table_finds_nine_of_ten_and_takes_next_to_nothing_falsely(monkeypatch, capsys):
    rows = cases.table()
    monkeypatch.setattr(cases, "table", lambda: rows)
    cases.main()
    printed = capsys.readouterr().out
    readme = README.read_text(encoding="utf-8")
    assert printed.strip() in readme or importlib.util.find_spec("reasoning_gym") is None
    assert {row.what for row in rows} == {"near duplicates", "decontamination", "loops", "language"}
    for row in rows:
        assert f"| {row.what} | {row.kind} | {row.planted:,} |" in printed
        if row.bad:
            assert row.taken >= 0.9 * row.planted > 0, row
        else:
            # gsm_symbolic has a few that differ in a profession alone
            assert row.taken <= 0.003 * row.planted, row


@pytest.mark.parametrize("name", cases.LOOPS)
def test_a_loop_is_found(name):
    assert Lint(fences=False)(Trace("q", cases.LOOPS[name], "a")) == "repetition loop"
    assert Lint(fences=False)(Trace("q", "t", cases.LOOPS[name])) == "repetition loop"


@pytest.mark.parametrize("name", cases.HONEST)
def test_equal_rows_and_digits_are_no_loop(name):
    assert Lint(fences=False)(Trace("q", cases.HONEST[name], cases.HONEST[name])) is None


@pytest.mark.parametrize("name", cases.MIXED)
def test_mixed_languages_are_found(name):
    assert OneLanguage()(Trace(*cases.MIXED[name]))


@pytest.mark.parametrize("name", cases.PURE)
def test_translations_and_comments_are_no_mixture(name):
    assert OneLanguage()(Trace(*cases.PURE[name])) is None


def test_problems_that_differ_in_two_numbers_of_a_hundred_words_are_all_kept():
    text = " ".join(["Anna counts the stones of the wall"] * 14)
    traces = [Trace(f"{text} {i} and {i * i + 7} are left.", "t", "a") for i in range(57)]
    report = DropCounts()
    assert list(near_duplicates(traces, report=report)) == traces
    again = [trace.replace(prompt=f"Now {trace.prompt}") for trace in traces]
    assert list(near_duplicates(traces + again, report=report)) == traces


@pytest.mark.parametrize(
    "one, other, same",
    [
        ("What is 17 + 25?", "What is 17 - 25?", False),
        ("What is 17 + 25?", "What is 25 + 17?", False),
        ("The capital of France?", "The capital of Germany?", False),
        ("Alice has a cow.", "Bob has a cow.", False),
        ("Find the largest prime.", "Find the smallest prime.", False),
        ("Is it even?", "Is it not even?", False),
        ("Compute \\sin x.", "Compute \\cos x.", False),
        ("Let x > 0.", "Let y > 0.", False),
        ("两个数的和", "两个数的差", False),
        ("三个苹果", "五个苹果", False),
        ("It is 5 km long.", "It is 5 miles long.", False),
        ("It costs \u20ac180.", "It costs $180.", False),
        ("Sort:\nfig plum", "Sort:\nplum fig", False),
        ("The tokens are\n#A B#", "The tokens are\n#B A#", False),
        (
            "Quel est le plus grand nombre premier dans la liste?",
            "Quel est le plus petit nombre premier dans la liste?",
            False,
        ),
        ("**Add** $2$ and $3$.", "Add 2 and 3.", True),
        ("### Question\nAdd 2.", "Question\nAdd 2.", True),
        ("It costs $1,000.", "It costs $1000.", True),
        ("$2 \\times 3$", "\\(2 \u00d7 3\\)", True),
        ("$\\dfrac12$", "$\\frac{1}{2}$", True),
        ("Problem 7: Add 2 and 3.", "12. Add 2 and 3.", True),
        ("\uff12\uff0b\uff13\uff1f", "2+3?", True),
        ("Please add 2 and 3.", "Add 2 and 3", True),
        ("A well-known sum", "A well known sum", True),
        ("苹果一共有多少个", "苹果一共有多少个呢", True),
    ],
)
def test_what_makes_a_problem(one, other, same):
    assert (carried(one) == carried(other)) is same


def test_words_are_the_same_in_any_width_case_and_latex():
    assert words("What IS $2x + \\frac{1}{2}\\,y$?") == words("what is \uff12 x + \\dfrac12 \\; y")
    assert words("x_1 = 10") == ["x", "1", "1", "0"]
    assert words("na\u00efve pri\u00admes\u200b") == words("naive primes")
    assert words("\\left( 1\\cdot x \\right)") == ["1", "x"]
    assert words("我有3只cat") == ["我", "有", "3", "只", "cat"]
    assert tokens("well-known: 7 - 2 \\times x") == ["well", "known", "7", "-", "2", "*", "x"]


BOILER = "Put your final answer within \\boxed{} and explain each step."
CHINESE = "请把最终答案写在方框里，并说明每一步的理由。"


@pytest.mark.parametrize(
    "questions",
    [
        [f"{q} {BOILER}" for q in ("What is 2+2?", "Name a prime above ten.")],
        [f"{BOILER} {q}" for q in ("What is 2+2?", "Name a prime.", "Draw a red circle.")],
        [f"Task {i}: describe {word}. {BOILER}" for i, word in enumerate(cases.PROSE.split())],
        [f"{q}{CHINESE}" for q in ("一加一？", "二加三？", "五乘七？")],
    ],
)
def test_what_many_evaluation_questions_share_is_no_leak(questions):
    evaluations = Evaluations().add("bench", questions)
    fresh = f"Why is the sky blue in summer? {BOILER}"
    for text in (fresh, f"天空为什么是蓝色的？{CHINESE}", BOILER):
        assert evaluations.match(text) is None, text
        assert evaluations.match(text, asked=False) is None
    for question in questions:
        assert evaluations.match(question)["kind"] == "exact"
        assert evaluations.match(f"Please: {question}")


def test_short_questions_are_found_whole_with_their_signs_and_not_in_thoughts():
    evaluations = Evaluations().add("bench", ["What is 2 + 2?", "Is 91 prime?", "Why?"])
    for text in (
        "So, what is 2+2? Hurry.",
        "q: WHAT IS 2 + 2 =",
        "is 91 prime",
        "a\nIs 91 prime\nb",
    ):
        assert evaluations.match(text)["kind"] in ("question", "exact"), text
    for text in (
        "What is 2 - 2?",
        "What is 2 + 2 * 3?",
        "What is 12 + 2?",
        "Is 91 primeval?",
        "Why me?",
    ):
        assert evaluations.match(text) is None, text
    assert evaluations.match("Well. Is 91 prime? No.", asked=False) is None


RECTANGLE = "A rectangle is 12 cm long and 5 cm narrower. What is its area in square centimetres?"
ROOTS = "Find all real $x$ such that $\\frac{x^2-1}{x+1}=\\sqrt{x+5}$."
ASKED = [
    RECTANGLE,
    ROOTS,
    "What is the capital of Mongolia?",
    "Simplify $\\sqrt{50}+\\sqrt{18}$.",
    "若$a+b=7$且$ab=12$，求$a^2+b^2$的值。",
    "Compute $\\sum_{k=1}^{10} k^2$.",
    "Сколько будет семь умножить на восемь?",
    "If $2x + 3y = 12$ and $x - y = 1$, find $x$.",
    "What is 6/2 in base ten?",
]


@pytest.mark.parametrize(
    "text, leak",
    [
        (RECTANGLE.replace(" ", "\n"), True),
        (RECTANGLE.replace(" ", "\u00a0"), True),
        (RECTANGLE.replace("area", "ar\u200bea"), True),
        (f"**Problem 3.** {RECTANGLE.replace('12 cm', '*12 cm*')}", True),
        (RECTANGLE.replace("narrower", "smaller"), True),
        (ROOTS.replace("\\frac", "\\dfrac").replace("x^2", "x^{2}").replace("=", "\\;=\\;"), True),
        (ROOTS.replace("$", "$$"), True),
        ("Tell me: what is the capital of mongolia", True),
        ("\u201cWhat is the capital of Mongolia?\u201d", True),
        ("Simplify \\(\\sqrt{50} + \\sqrt{18}\\) and explain.", True),
        ("请解答：若$a+b=7$且$ab=12$，求$a^2+b^2$的值。写出过程。", True),
        ("若 $a+b=7$ 且 $ab=12$ , 求 $a^2+b^2$ 的值。", True),
        ("Compute $\\sum\\limits_{k = 1}^{10} k^{2}$.", True),
        ("Скажи: сколько будет семь умножить на восемь? Спасибо", True),
        ("If $2 x + 3 \\, y = 12$ and $x - y = 1$, find $x$.", True),
        ("Well, what is \\frac{6}{2} in base ten?", True),
        ("What is 62 in base ten?", False),
        ("What is the capital of Mongolia's neighbour?", False),
        ("What is the capital of France?", False),
        ("Simplify $\\sqrt{50}-\\sqrt{18}$.", False),
        ("Simplify $\\sqrt{50}+\\sqrt{18}+\\sqrt{2}$.", False),
        ("若$a+b=8$且$ab=15$，求$a^2+b^2$的值。", False),
        ("Compute $\\sum_{k=1}^{20} k^2$.", False),
        ("If $2x + 3y = 13$ and $x - y = 1$, find $y$.", False),
        ("A rectangle is 9 m long and 4 m wide. What is its perimeter?", False),
        ("Find all real $x$ such that $x^2=4$.", False),
    ],
)
def test_a_question_in_another_dress_is_found_and_another_question_is_not(text, leak):
    evaluations = Evaluations().add("bench", ASKED)
    assert (evaluations.match(text) is not None) is leak
    if not leak:
        quoted = f"Let me think about this one. {text} That is what I have to find."
        assert evaluations.match(quoted, asked=False) is None


@pytest.mark.parametrize("text", [RECTANGLE, ROOTS.replace("$", "$$"), ASKED[4], ASKED[7]])
def test_a_question_of_eight_words_is_found_in_a_thought(text):
    evaluations = Evaluations().add("bench", ASKED)
    for start in range(9):  # wherever it begins
        quoted = f"{'Well. ' * start}The question: {text}\nThat is what I have to find."
        assert evaluations.match(quoted, asked=False)["question"] in ASKED
