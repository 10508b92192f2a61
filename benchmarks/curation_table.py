"""What curation finds of planted cases, and what it takes for one that is none.

    python benchmarks/curation_table.py

plants near duplicates, leaked evaluation questions, loops and mixed languages among records that
only look like them, and prints for each kind how many were found and how many were falsely taken.
"""

# A case is one line of the tables below, however long.
# ruff: noqa: E501

from __future__ import annotations

import contextlib
import io
from collections.abc import Callable, Iterable
from typing import NamedTuple

from kd.traces import (
    DropCounts,
    Evaluations,
    Lint,
    OneLanguage,
    Trace,
    decontaminate,
    near_duplicates,
)
from kd_bench import tables


class Row(NamedTuple):
    """Of one kind of case: how many were planted, and how many of them were taken."""

    what: str
    kind: str
    bad: bool  # whether these are to be found; the others are to be left alone
    planted: int
    taken: int


PROSE = (
    "We read the question once more and write down what is known before anything is computed. The "
    "first step is to name the unknown and to say how the parts depend on it, because then the "
    "whole can be put together from the parts. After that the equation is solved in the usual way, "
    "and the result is checked by putting it back into the text of the question. Nothing else is "
    "needed here, so the answer can be given at once, with its unit and in the form that was asked "
    "for, and a short word on why no other value would do."
)
CHINESE = (
    "我们先把题目再读一遍，写下已知的条件，然后设未知数并说明各个部分怎样依赖于它，因为整体可以由部分拼起来。"
    "接着按照通常的方法解方程，并把结果代回题目的文字中检验。这里不需要别的东西，所以可以马上给出答案，"
    "带上单位，写成题目要求的形式，再用一句话说明为什么其它的值都行不通。"
)
JAPANESE = (
    "まず問題をもう一度読み、わかっていることを書き出してから計算を始めます。最初に未知数に名前を付け、"
    "各部分がそれにどのように依存しているかを述べます。そうすれば全体を部分から組み立てることができます。"
    "そのあとで方程式をいつもの方法で解き、結果を問題文に戻して確かめます。"
)
THAI = (
    "เราอ่านโจทย์อีกครั้งแล้วเขียนสิ่งที่ทราบก่อนเริ่มคำนวณ ขั้นแรกคือตั้งชื่อตัวแปรที่ไม่ทราบค่าและบอกว่าส่วนต่างๆ"
    "ขึ้นอยู่กับมันอย่างไร เพราะจากนั้นเราจะนำส่วนต่างๆมารวมกันได้ แล้วจึงแก้สมการตามวิธีปกติและตรวจสอบผลลัพธ์"
)
TRAIN = (
    "A train leaves the station of {a} at noon and travels {d} at {n} kilometres per hour, while a "
    "second train leaves {b} two hours later on the same line. How many hours after noon do they "
    "meet if the stations are {m} kilometres apart? Give the {x} whole number that is {s} enough."
)
FILLED = {"a": "Oslo", "b": "Bergen", "d": "west", "n": 90, "m": 480, "x": "smallest", "s": "large"}


def _train(**changed: object) -> Trace:
    return Trace(TRAIN.format(**{**FILLED, **changed}), PROSE, "It is done.")


def _swapped(text: str, at: int, new: str) -> str:
    return text[:at] + new + text[at + 1 :]


def duplicates() -> dict[str, tuple[list[Trace], list[Trace]]]:
    """Kind: (near duplicates of a first trace, which comes first; traces that are none)."""
    base, words = _train(), PROSE.split()
    english = [
        base.replace(think=" ".join([*words[:i], "changed", *words[i + 1 :]]))
        for i in range(0, len(words), 9)
    ]
    english += [
        base.replace(think=PROSE + " And so it is."),
        base.replace(think=PROSE.replace(". ", ".\n\n")),
        base.replace(answer="It is done, as we have seen."),
        base.replace(prompt="Please solve the following problem. " + base.prompt),
        base.replace(prompt=base.prompt + " Put your final answer within \\boxed{}."),
        base.replace(prompt="12. " + base.prompt),
        base.replace(prompt="Problem 7: " + base.prompt),
        base.replace(prompt=base.prompt.replace("travels", "travles")),
        base.replace(prompt=base.prompt.replace("second train", "further train")),
        base.replace(prompt=base.prompt.replace("90", "$90$")),
        base.replace(prompt=base.prompt.replace(", while", " while")),
    ]
    others = [_train(n=n) for n in range(91, 120)]
    others += [_train(n=n, m=m) for n, m in zip(range(60, 89), range(500, 529), strict=True)]
    others += [_train(a=name) for name in ("Rome", "Paris", "Lima", "Cairo")]
    others += [_train(d=side) for side in ("east", "north", "south")]
    others += [_train(x="largest"), _train(s="not large"), _train(n="ninety"), _train(m="4,800")]
    sums = [f"Let x and y be real with x {a} y = 7 and x {b} y = 3. Find x." for a in "+-*/" for b in "+-*/"]  # fmt: skip
    shown: dict[str, tuple[list[Trace], list[Trace]]] = {
        "one of about 200 words, or the form": ([base, *english], []),
        "another number, name, side or condition": ([base], others),
        "other operators": ([], [Trace(text, PROSE, "It is done.") for text in sums]),
    }
    for name, text in (("Chinese", CHINESE), ("Japanese", JAPANESE), ("Thai", THAI)):
        letters = [i for i in range(5, len(text), 13) if text[i].isalpha()]
        changed = [Trace("一加一？", _swapped(text, i, text[i - 3]), "二") for i in letters]
        changed = [trace for trace in changed if trace.think != text]
        numbers = [Trace(f"{n}加一？", text, "二") for n in "二三四五六七八九"]
        shown[f"{name}: one letter of about {len(text) // 10 * 10}"] = (
            [Trace("一加一？", text, "二"), *changed],
            [],
        )
        shown[f"{name}: another number"] = ([Trace("一加一？", text, "二")], numbers)
    return shown


def near_rows() -> Iterable[Row]:
    for kind, (same, others) in duplicates().items():
        report = DropCounts()
        kept = list(near_duplicates([*same, *others], report=report))
        found = sum(trace not in kept for trace in same[1:])
        if len(same) > 1:
            yield Row("near duplicates", kind, True, len(same) - 1, found)
        if others:
            yield Row(
                "near duplicates", kind, False, len(others), sum(t not in kept for t in others)
            )
    yield from _templates()


PUZZLES = (
    "ab",
    "acre",
    "bf",
    "emoji_mystery",
    "figlet_font",
    "isomorphic_strings",
    "modulo_grid",
    "n_queens",
    "ransom_note",
    "rectangle_count",
    "string_insertion",
    "word_ladder",
)


def _templates() -> Iterable[Row]:
    """Real problems of one template each, whose questions all differ."""
    try:
        import reasoning_gym
    except ModuleNotFoundError:
        return
    sets = {"gsm_symbolic, all different": [("gsm_symbolic", 1500)]}
    sets["twelve families of puzzles, all different"] = [(name, 40) for name in PUZZLES]
    for kind, families in sets.items():
        asked: dict[str, str] = {}
        for name, size in families:
            with contextlib.redirect_stdout(io.StringIO()):  # one of them prints dots
                items = list(reasoning_gym.create_dataset(name, size=size, seed=1))
            asked |= {x["question"]: x["metadata"].get("answer_cot", PROSE) for x in items}
        traces = [Trace(question, thought, "Done.") for question, thought in asked.items()]
        kept = sum(1 for _ in near_duplicates(traces, report=DropCounts()))
        yield Row("near duplicates", kind, False, len(traces), len(traces) - kept)


BOILER = " Put your final answer within \\boxed{}. Think step by step before you answer."
ASKED = [
    "Let $S$ be the set of positive integers $n$ such that $n^2 + 19n + 92$ is a perfect square.",
    "Every morning Aya goes for a $9$-kilometre walk and stops at a coffee shop afterwards.",
    "What is $\\frac{1}{2}x + 3y - 7$ when $x = 4$ and $y = 11$ in the field of 13 elements?",
    "Is 91 prime?",
    "Evaluate $3^4 - 17$.",
    "What is 2 + 2?",
    "How many vowels are in the word onomatopoeia?",
    "Which enzyme unwinds the double helix of DNA ahead of the replication fork in bacteria?",
    "In triangle $ABC$ the bisector of angle $A$ meets $BC$ at $D$ with $BD = 5$ and $DC = 8$.",
    "Write a function that returns the longest palindromic substring of a string in linear time.",
    "设函数$f(x)=x^2-4x+3$，求它在区间$[0,5]$上的最大值与最小值之和。",
    "一个袋子里有3个红球和5个白球，任取两个，求两个都是红球的概率。",
]


def _wide(text: str) -> str:
    return "".join(chr(ord(c) + 0xFEE0) if "!" <= c <= "~" else c for c in text)


VARIANTS: dict[str, Callable[[str], str]] = {
    "verbatim": lambda q: q,
    "behind a prefix": lambda q: f"Solve this for me, please: {q}",
    "before a request": lambda q: f"{q}\nExplain every step as if to a child.",
    "with the boiler-plate of the set": lambda q: q + BOILER,
    "in capitals": str.upper,
    "full-width": _wide,
    "other spaces and LaTeX spacing": lambda q: (
        q.replace(" ", "  ")
        .replace("$", "\\;$")
        .replace(" + ", "+\\,")
        .replace("\\frac", "\\dfrac")
    ),
}


def _trace(prompt: str = "Tell me a story.", think: str = PROSE, answer: str = "Once.") -> Trace:
    return Trace(prompt, think, answer)


CLEAN = [
    "What is 2 - 2?",
    "What is 2 + 2 + 5?",
    "What is 2 + 3?",
    "Is 93 prime?",
    "Is 911 prime?",
    "Evaluate $3^4 + 17$.",
    "How many vowels are in the word parallelogram?",
    "Let $S$ be the set of odd integers $n$ such that $n^3 - 8$ is a prime.",
    "In triangle $ABC$ the median from $A$ meets $BC$ at $M$.",
    "Write a function that returns the number of words of a string.",
    "Which enzyme joins the fragments of the lagging strand?",
    "求函数$g(x)=x^3-3x$的极值。",
    "一个袋子里有4个黑球，任取一个，求它是黑球的概率。",
]


def leak_rows() -> Iterable[Row]:
    evaluations = Evaluations().add("bench", [question + BOILER for question in ASKED])
    cases: dict[str, list[Trace]] = {
        kind: [_trace(change(question)) for question in ASKED] for kind, change in VARIANTS.items()
    }
    long = [q for q in ASKED if len(q) > 60 or not q.isascii()]
    cases["quoted in the thought"] = [_trace(think=f"{PROSE} So: {q} {PROSE}") for q in long]
    cases["quoted in the answer"] = [_trace(answer=f"{PROSE} The question was: {q}") for q in long]
    for kind, traces in cases.items():
        yield Row("decontamination", kind, True, len(traces), _leaks(evaluations, traces))
    clean = [_trace(prompt) for prompt in CLEAN]
    yield Row("decontamination", "other questions", False, len(clean), _leaks(evaluations, clean))
    clean = [_trace(prompt + BOILER) for prompt in CLEAN]
    kind = "other questions, the same boiler-plate"
    yield Row("decontamination", kind, False, len(clean), _leaks(evaluations, clean))


def _leaks(evaluations: Evaluations, traces: list[Trace]) -> int:
    kept = list(decontaminate(traces, evaluations, report=DropCounts()))
    return len(traces) - len(kept)


def _table(row: str, count: int) -> str:
    return f"The values are:\n\n{row}\n" + f"{row}\n" * (count - 1) + "\nand that is all of them."


LOOPS = {
    "a sentence": PROSE + "\n" + "Wait, let me check that again. " * 30,
    "a line": PROSE + "\n" + "So the answer would be four.\n" * 20 + PROSE,
    "a short line": "Wait.\n" * 60,
    "two lines in turn": "Yes, it must be so.\nNo, it cannot be.\n" * 15 + PROSE,
    "a paragraph of three lines": "First we add.\nThen we divide.\nIt does not fit.\n" * 14,
    "a paragraph": (PROSE[:300] + "\n\n") * 14,
    "an equation": "so we get\n" + "x = 2x + 1 - x - 1\n" * 25,
    "half a word": PROSE + " " + "and the and the " * 40,
    "Chinese": CHINESE + "所以我们再检查一遍。" * 30,
    "code": "```python\n" + "    result = compute(result)\n" * 30 + "```",
    "digits without end": "The value is 0." + "142857" * 2500,
    "a row of a table without end": "| a | b |\n|---|---|\n" + "| yes | no |\n" * 400,
    "one word": PROSE + " " + "hmm " * 400,
    "a sentence, left again": f"{PROSE} {'I will count again. ' * 25}{PROSE}",
    "an item under new numbers": "".join(f"{i}. check the sum again\n" for i in range(40)),
    "a formula on a line": PROSE + r"\[ x = \frac{1}{2} + \frac{1}{2} \]" * 30,
    "a boxed answer": PROSE + "\\boxed{4} " * 40,
    "three lines in turn": "Let me see.\nHmm.\nNo.\n" * 14,
    "Russian": PROSE + " " + "Проверим ещё раз. " * 20,
    "two letters": PROSE + " " + "ab" * 400,
    "a long tail": "a fine beginning. " + "I think that this is right, but is it? " * 200,
}
HONEST = {
    "a table of 14 equal rows": _table("| 0 | 1 | yes |", 14),
    "a table of 40 equal rows at the end": "| a | b |\n|---|---|\n" + "| none | none |\n" * 40,
    "rows between tabs": _table("none\tnone\t0", 20),
    "a matrix of zeros": "[" + ",\n ".join(["[0, 0, 0, 0, 0, 0, 0, 0]"] * 24) + "]",
    "a matrix of zeros in LaTeX": "\\begin{pmatrix}\n" + "0 & 0 & 0 & 0 \\\\\n" * 16 + "\\end{pmatrix}",
    "a matrix of zeros on one line": "The sum is " + "0 0 0 0 0 0 0 0; " * 30,
    "a large matrix of zeros": f"{PROSE}\n" + ("0 " * 60 + "\n") * 60 + PROSE,
    "a repeating decimal": "1/7 = 0." + "142857" * 60,
    "thirds": "1/3 = 0." + "3" * 500,
    "outputs that are equal": "The program prints\n" + "YES\n" * 30,
    "an enumeration": "\n".join(f"{i} * {i + 3} = {i * (i + 3)}" for i in range(900)),
    "cases": "\n".join(f"Case n = {i}: the remainder is {i % 7}, which is no square." for i in range(200)),
    "a list of unlike lines": "\n".join(f"- the {w} is read once" for w in set(PROSE.split())),
    "a refrain": ("Row, row, row your boat\nGently down the stream\n" * 3 + PROSE + "\n") * 2,
    "a rule under every heading": "\n\n".join(f"Part {i}\n-------\n{PROSE[i:90 + i]}" for i in range(15)),
    "rows of HTML": "<table>\n" + "<tr><td>0</td><td>0</td></tr>\n" * 20 + "</table>",
    "rows with rules between": "\\begin{tabular}\n" + "yes & no \\\\\n\\hline\n" * 15 + "\\end{tabular}",
    "comma-separated values": "name,ok,none\n" + "a,yes,no\n" * 30,
    "a truth table": "p q r\n" + "T F T\n" * 20,
    "powers that repeat": "The last digits are 3, 9, 7, 1, " + "3, 9, 7, 1, " * 30,
    "a drawing": "*" * 40 + "\n" + ("*" + " " * 38 + "*\n") * 20,
    "closing brackets": "{" * 14 + "x" + "\n}" * 14,
    "hard wrapped prose": PROSE.replace(" ", "\n"),
}  # fmt: skip


def loop_rows() -> Iterable[Row]:
    for kind, bad, texts in (
        ("thoughts that go round in circles", True, LOOPS),
        ("tables, matrices, decimals, lists", False, HONEST),
    ):
        taken = [name for name, text in texts.items() if Lint(fences=False)(_trace(think=text))]
        yield Row("loops", kind, bad, len(texts), len(taken))


MIXED = {
    "Chinese in the middle": ("Add 1 and 2.", f"First we add. {CHINESE[:20]} Done. {PROSE}", "3"),
    "a Chinese thought": ("Add 1 and 2.", CHINESE, "3"),
    "a Chinese answer": ("Add 1 and 2.", PROSE, CHINESE),
    "Russian": ("Add 1 and 2.", "Let me see. Сначала сложим числа, потом проверим. Done.", "3"),
    "Japanese": ("Add 1 and 2.", f"Well. {JAPANESE} Done.", "3"),
    "Thai": ("Add 1 and 2.", f"Well. {THAI} Done.", "3"),
    "an English thought on a Chinese question": ("一加二等于几？", PROSE, "3"),
    "moving a triangle": ("Translate the triangle by 3 units.", CHINESE, "Done."),
    "beside code": ("Add.", f"```python\nx = 1  # 一\n```\n{CHINESE[:40]}", "3"),
}
PURE = {
    "a translation": ("Translate 'good morning, dear friends' into Chinese.", PROSE, "早上好，亲爱的朋友们。"),
    "a translation named by its language": ("How do you say 'thank you very much' in Japanese?", PROSE, "どうもありがとうございます。"),
    "a translation from Chinese": ("把下面这句话翻译成英文：今天天气很好。", PROSE, "The weather is fine today."),
    "a Russian lesson": ("Give me five common Russian greetings.", PROSE, "Привет, здравствуйте, добрый день, доброе утро, пока."),
    "English asked for in Korean": ("다음을 영어로 써 주세요: 안녕하세요", PROSE, "Hello."),
    "comments in code": ("Sort a list.", PROSE, "```python\nx = sorted(x)  # 先把列表从小到大排序，然后返回\n# 这里不需要别的东西\n```"),
    "comments behind statements": ("Sort a list.", "x = sorted(x)  # 先把列表从小到大排序\ny = x[0]  // 取第一个元素作为结果\n" + PROSE, "ok"),
    "a query": ("Write SQL.", PROSE, "```sql\nSELECT 1; -- 查询所有的用户和订单\n```"),
    "comments in C": ("Write C.", PROSE, "int x = 0; // 计数器初始化为零\n/* 这里是主循环的开始 */"),
    "code without a fence": ("Sort.", f"def f(x):\n    # 先把列表从小到大排序\n    return sorted(x)\n{PROSE}", "ok"),
    "several languages": ("Greet me in three different languages.", PROSE, "Hello, 你好，こんにちは、안녕하세요"),
    "letters of another script": ("Transliterate Namaste to Devanagari.", PROSE, "नमस्ते दोस्तों आप कैसे हैं"),
    "a string in code": ("Print.", PROSE, "Use `print('你好，世界，早上好')`."),
    "a Chinese question": ("一加二等于几？", CHINESE, "三"),
    "Greek letters": ("Find the angle.", "α + β = π, so γ = 0. " * 5, "γ = 0"),
    "one stray letter": ("Add.", "One stray 然 in " + PROSE, "3"),
    "a Chinese text in the prompt": (f"Summarise: {CHINESE}", CHINESE + PROSE, "Done."),
    "accents": ("Where?", "naïve café, Zürich, São Paulo " * 5, "Zürich"),
}  # fmt: skip


def language_rows() -> Iterable[Row]:
    for kind, bad, cases in (
        ("another language than the question's", True, MIXED),
        ("translations, lessons, comments in code", False, PURE),
    ):
        taken = [name for name, case in cases.items() if OneLanguage()(_trace(*case))]
        yield Row("language", kind, bad, len(cases), len(taken))


def table() -> list[Row]:
    """All rows, in order."""
    return [*near_rows(), *leak_rows(), *loop_rows(), *language_rows()]


def main() -> None:
    columns = ["filter", "planted", "cases", "found", "falsely taken"]
    rows = [
        [row.what, row.kind, f"{row.planted:,}", *((row.taken, "") if row.bad else ("", row.taken))]
        for row in table()
    ]
    print(tables.markdown(columns, rows, text=columns))


if __name__ == "__main__":
    main()
