"""Filters, duplicates, contamination, selection and mixing; every drop has its reason."""

import random
import time

import pytest
from traces_cases import CHATML_QWEN, byte_tokenizer

from kd.traces import (
    DropCounts,
    Evaluations,
    JsonlTraces,
    Lint,
    OneLanguage,
    Source,
    Tokens,
    Trace,
    best_of_n,
    by_difficulty,
    decontaminate,
    diverse,
    exact_duplicates,
    filter_stream,
    mix,
    near_duplicates,
    write_traces,
)

GOOD = Trace("q", "First this.\nThen that, because of this.", "It is 4.")


@pytest.mark.parametrize(
    "trace, reason",
    [
        (GOOD, None),
        (GOOD.replace(answer=" "), "empty answer"),
        (GOOD.note(finish="length"), "truncated"),
        (GOOD.replace(think="a <think> b"), "nested or second think tag"),
        (GOOD.replace(answer="a</think>b"), "nested or second think tag"),
        (GOOD.replace(answer="x <|end_of_solution|>"), "nested or second think tag"),
        (GOOD.replace(answer="```python\nprint(1)"), "unterminated code fence"),
        (GOOD.replace(answer="```python\nprint(1)\n```\ndone"), None),
        (GOOD.replace(think="Wait, no.\n" * 20), "repetition loop"),
        (GOOD.replace(think="so " + "and then it goes on " * 40), "repetition loop"),
        (GOOD.replace(think="x" * 5_000_000), "longer than 1000000 characters"),
        (GOOD.replace(think=""), None),
    ],
)
def test_lint_names_what_is_wrong(trace, reason):
    assert Lint()(trace) == reason


def test_lint_can_demand_a_thought_and_lets_long_honest_work_pass():
    assert Lint(need_think=True)(GOOD.replace(think="")) == "empty think"
    steps = "\n".join(f"{i} * {i + 3} = {i * (i + 3)}" for i in range(2000))
    assert Lint()(GOOD.replace(think=steps)) is None


def test_lengths_are_in_the_students_tokens():
    tokenizer = byte_tokenizer(CHATML_QWEN)
    limits = Tokens(tokenizer, least=10, most=40)
    assert limits(Trace("q", "a", "b")) == "shorter than 10 tokens"
    assert limits(Trace("q", "a" * 20, "b")) is None
    assert limits(Trace("q", "\u00e9" * 20, "b" * 5)) == "longer than 40 tokens"
    assert limits(Trace("q", "a" * 10_000, "b")) == "longer than 40 tokens"


def test_language_mixing_is_found_but_asked_for_languages_are_not():
    check = OneLanguage()
    mixed = "First we add. \u7136\u540e\u6211\u4eec\u518d\u4e58\u4ee5\u4e8c. Done."
    assert check(Trace("Add 1 and 2", mixed, "3")) == "language mixing"
    assert check(Trace("Translate \u7136\u540e", mixed, "then")) is None
    assert (
        check(Trace("Add", "The angle \u03b1 is \u00bd \u2264 1, na\u00efve caf\u00e9", "1"))
        is None
    )
    assert check(Trace("Add", "One stray \u7136 in " + "many words " * 30, "1")) is None
    english = "the whole thought is in English although nobody asked for that at all"
    asked = "\u4e00\u52a0\u4e00\u7b49\u4e8e\u51e0"
    assert check(Trace(asked, english, "2")) == "other language than the prompt"


def test_filters_run_in_order_and_count():
    report = DropCounts()
    traces = [GOOD, GOOD.replace(answer=""), GOOD.note(finish="length")]
    assert list(filter_stream(traces, [Lint(), OneLanguage()], report=report)) == [GOOD]
    assert report["filter"].dropped == {"empty answer": 1, "truncated": 1}


def prose(seed, length=120):
    rng = random.Random(seed)
    return " ".join(rng.choice(WORDS) for _ in range(length))


WORDS = [a + b for a in "ba de fi go hu ja ke li mo nu".split() for b in "n r s t x".split()]


def test_exact_duplicates_ignore_case_and_spaces():
    report = DropCounts()
    traces = [Trace("a  b"), Trace("A b\n"), Trace("a c")]
    assert [t.prompt for t in exact_duplicates(traces, report=report)] == ["a  b", "a c"]
    assert report["dedupe exact"].dropped == {"exact duplicate": 1}


def test_near_duplicates_are_found_and_different_texts_are_kept():
    pytest.importorskip("rensa")
    originals = [Trace(f"q{i}", prose(i), "a") for i in range(150)]
    changed = []
    for trace in originals[:50]:
        words = trace.think.split()
        words[60] = "changed"
        changed.append(trace.replace(think=" ".join(words)))
    report = DropCounts()
    kept = list(near_duplicates(originals + changed, report=report))
    assert kept[:150] == originals  # nothing different was thrown away
    assert len(kept) - 150 <= 5, "of 50 near duplicates at most 5 may slip through"
    example = report["dedupe near"].examples["near duplicate"][0]
    assert example["detail"].startswith("of record 0, similarity 0.")


QUESTIONS = [
    "Let x be the smallest positive integer such that x squared plus one is divisible by ten.",
    "What is 2 + 2?",
    "A train leaves the north station at noon and travels south at ninety kilometres per hour.",
]


@pytest.mark.parametrize(
    "prompt, kind",
    [
        ("What is 2+2", "exact"),
        ("Solve: let X be the smallest positive integer such that x squared is 4", "8-gram"),
        (
            "A train leaves the south station at noon and travels south at ninety "
            "kilometres per hour",
            "fuzzy",
        ),
        ("What is 2 + 3?", None),
        ("The smallest positive integer", None),
        ("", None),
    ],
)
def test_contamination_is_found_with_its_evidence(prompt, kind):
    evaluations = Evaluations(n=8 if kind != "fuzzy" else 40, fuzzy=0.7).add("bench", QUESTIONS)
    report, evidence = DropCounts(), []
    traces = [Trace("harmless", "t", "a"), Trace(prompt, "t", "a")]
    kept = list(decontaminate(traces, evaluations, report=report, evidence=evidence))
    if kind is None:
        assert len(kept) == 2 and not evidence
        return
    assert kept == traces[:1]
    row = evidence[0]
    assert (row["kind"], row["set"], row["record"]) == (kind, "bench", 1)
    assert row["id"] == traces[1].id and row["question"] in QUESTIONS and row["shared"]
    assert report["decontaminate"].dropped == {f"in bench ({kind})": 1}


def test_a_question_quoted_in_a_thought_or_an_answer_is_found():
    evaluations = Evaluations().add("bench", QUESTIONS)
    for name in ("think", "answer"):
        trace = Trace("mine", "t", "a").replace(**{name: f"This reminds me: {QUESTIONS[0]}"})
        evidence = []
        assert not list(decontaminate([trace], evaluations, report=DropCounts(), evidence=evidence))
        assert evidence[0]["field"] == name and evidence[0]["kind"] == "13-gram"
        fields = ("prompt",)
        assert list(decontaminate([trace], evaluations, report=DropCounts(), fields=fields)) == [
            trace
        ]


def judged(prompt, answer, status, think="t"):
    return Trace(prompt, think, answer).note(verdict={"status": status})


def test_the_best_of_n_is_correct_first_then_short():
    traces = [
        judged("a", "long but right", "correct"),
        judged("a", "short", "wrong"),
        judged("a", "right", "correct"),
        judged("b", "only wrong", "wrong"),
    ]
    report = DropCounts()
    assert [t.answer for t in best_of_n(traces, report=report)] == ["right", "only wrong"]
    assert report["best of n"].dropped == {"another sample was better": 2}


def test_difficulty_is_the_pass_rate():
    traces = [judged("easy", str(i), "correct") for i in range(4)]
    traces += [judged("hard", str(i), "wrong") for i in range(4)]
    traces += [judged("fit", "1", "correct"), judged("fit", "2", "wrong"), Trace("none", "", "x")]
    report = DropCounts()
    kept = by_difficulty(traces, least=0.2, most=0.8, report=report)
    assert [t.prompt for t in kept] == ["fit", "fit"] and kept[0].metadata["pass_rate"] == 0.5
    assert report["difficulty"].dropped == {"too easy": 4, "too hard": 4, "no verdict": 1}


def test_diverse_sampling_is_even_over_domains_and_repeats_under_its_seed():
    traces = [Trace(str(i), "t" * i, "a", domain="math" if i < 90 else "art") for i in range(100)]
    chosen = diverse(traces, 20, report=DropCounts(), seed=3)
    assert chosen == diverse(traces, 20, report=DropCounts(), seed=3)
    assert len({t.prompt for t in chosen}) == 20
    assert 5 <= sum(t.domain == "art" for t in chosen) <= 10
    assert len(diverse(traces, 500, report=DropCounts())) == 100


def sources(epochs=1.0):
    think = [Trace(f"r{i}", "t", "a") for i in range(100)]
    plain = [Trace(f"p{i}", "", "a") for i in range(60)]
    return [Source("r", think, weight=3, epochs=epochs), Source("p", plain, weight=1)]


def test_mixing_is_by_weight_or_epochs_and_repeats_under_its_seed():
    report = DropCounts()
    mixed = list(mix(sources(), total=40, seed=1, report=report, count_tokens=lambda t: 7))
    assert sum(bool(t.think) for t in mixed) == 30 and len(mixed) == 40
    assert report["mix"].notes["sources"]["r"]["tokens"] == 210
    assert mixed == list(mix(sources(), total=40, seed=1, report=DropCounts()))
    assert mixed != list(mix(sources(), total=40, seed=2, report=DropCounts()))
    twice = [t.prompt for t in mix(sources(epochs=2.5), report=DropCounts())]
    counts = sorted(twice.count(f"r{i}") for i in range(100))
    assert counts == [2] * 50 + [3] * 50 and len(twice) == 310


def test_the_share_of_reasoning_is_met_and_the_rest_is_counted():
    report = DropCounts()
    mixed = list(mix(sources(), reasoning_share=0.5, report=report))
    assert sum(bool(t.think) for t in mixed) == 60 == len(mixed) - 60
    assert report["mix"].dropped == {"too much reasoning": 40}
    assert all(t.think for t in mix(sources(), reasoning_share=1, report=DropCounts()))
    with pytest.raises(ValueError, match=r"mix: reasoning_share must lie in \[0, 1\], got 2"):
        list(mix(sources(), reasoning_share=2, report=DropCounts()))


THINK = [Trace(f"r{i}", "t", "a") for i in range(100)]
NONE = [Trace(f"p{i}", "", "a") for i in range(100)]


@pytest.mark.parametrize(
    "held, total, share, words",
    [
        ([THINK], None, 0.75, "0.75 of 100 with a thought and 0 without"),
        ([NONE], None, 0.75, "0.75 of 0 with a thought and 100 without"),
        ([THINK], 50, 0.75, r"0.75 of 100 with a thought and 0 without \(that makes 38 and 12\)"),
        ([NONE], None, 1.0, "1.0 of 0 with a thought"),
        ([THINK, THINK], 10, 0.0, "0.0 of 200 with a thought and 0 without"),
        ([THINK[:1], NONE], None, 0.75, r"\(that makes 1 and 0\)"),
        ([THINK, NONE], 1, 0.5, r"\(that makes 0 and 1\)"),
        ([THINK, []], 10, None, "every source must hold traces, got none in s1"),
        ([[]], None, None, "every source must hold traces, got none in s0"),
        ([THINK], 0, None, "total must be at least 1, got 0"),
    ],
)
def test_a_mixture_that_cannot_be_had_is_refused_with_the_numbers(held, total, share, words):
    made = [Source(f"s{i}", traces) for i, traces in enumerate(held)]
    with pytest.raises(ValueError, match=f"mix: .*{words}"):
        mix(made, total=total, reasoning_share=share, report=DropCounts())


@pytest.mark.parametrize("total", [4, 7, 100, 333, 1000])
@pytest.mark.parametrize("share", [0.0, 0.25, 0.5, 0.75, 1.0])
@pytest.mark.parametrize("weights", [(1, 1, 1), (5, 1, 2), (0, 1, 3)])
def test_total_and_share_are_both_met_and_weights_within_each_side(total, share, weights):
    held = [THINK, NONE[:20], THINK[:30] + NONE[20:50]]
    made = [Source(f"s{i}", held[i], weight=weights[i]) for i in range(3)]
    report = DropCounts()
    mixed = list(mix(made, total=total, reasoning_share=share, report=report))
    assert len(mixed) == total == report["mix"].seen and not report["mix"].dropped
    assert sum(bool(trace.think) for trace in mixed) == round(total * share)
    notes = report["mix"].notes["sources"]
    first = sum(entry["reasoning"] for name, entry in notes.items() if name == "s0")
    assert abs(first - round(total * share) * weights[0] / (weights[0] + weights[2])) < 1
    for name, entry in notes.items():
        assert entry["times"] == pytest.approx(entry["traces"] / len(held[int(name[1])]), abs=1e-3)


def test_what_is_repeated_is_said_in_the_table():
    report = DropCounts()
    list(mix([Source("small", THINK[:10]), Source("large", NONE)], total=100, report=report))
    assert "small repeated, times" in report.table() and "5.00" in report.table()
    assert "large" not in report.table()


def test_files_are_mixed_without_being_held(tmp_path):
    traces = [Trace(f"q{i}", "t", "a\u2028b") for i in range(50)]
    write_traces(tmp_path / "x.jsonl", traces)
    held = JsonlTraces(tmp_path / "x.jsonl")
    assert len(held) == 50 and held[17] == traces[17] and held[-1] == traces[-1]
    assert {t.id for t in mix([Source("x", held)], report=DropCounts())} == {t.id for t in traces}


HOSTILE = [
    "/*",
    "<a_",
    "<think",
    "\\frac{",
    "```\n",
    "| ",
    "a,",
    "{[",
    "ab ",
    "\ud83d",
    "我",
    "(",
    "0 ",
]


@pytest.mark.parametrize("text", HOSTILE)
def test_a_megabyte_of_anything_is_filtered_at_once(text):
    started = time.process_time()
    long = text * (900_000 // len(text))
    trace = Trace(f"一 {text}", long, long[:1000])
    Lint()(trace), OneLanguage()(trace)
    list(decontaminate([trace], Evaluations().add("b", ["What is 2 + 2?"]), report=DropCounts()))
    list(exact_duplicates([trace], report=DropCounts()))
    assert time.process_time() - started < 10
