"""Verifiers compared on the same traces, selection on the command line, time per stage."""

import json

import pytest

from kd.cli.main import main
from kd.traces import (
    DropCounts,
    Exact,
    Numeric,
    Trace,
    Verdict,
    compare,
    counts,
    load,
    write_traces,
)
from kd.traces.agreement import DECIDE, decision
from kd.traces.counts import metered
from kd.traces.report import write_report

TRACES = [
    Trace("same", "t", "5", reference="5"),
    Trace("another spelling", "t", "5.0", reference="5"),
    Trace("wrong for both", "t", "6", reference="5"),
    Trace("no reference", "t", "6"),
    Trace("words", "t", "plum", reference="plum"),
]


def literal(trace):
    if not trace.reference:
        return Verdict("unknown", "no reference")
    same = trace.answer == trace.reference
    return Verdict("correct" if same else "wrong", "" if same else "different answer")


BOTH = {"literal": literal, "numeric": Numeric()}


def test_every_pair_is_counted_and_examples_of_disagreement_are_kept():
    report = DropCounts()
    kept = list(compare(TRACES, BOTH, workers=2, report=report))
    assert [trace.prompt for trace in kept] == ["same", "words"]
    counted = report["verify"]
    assert counted.notes["verdicts"] == {
        "literal": {"correct": 2, "wrong": 2, "unknown": 1},
        "numeric": {"correct": 2, "wrong": 1, "unknown": 2},
    }
    assert counted.notes["agreement"] == {
        "literal / numeric": {
            "correct / correct": 1,
            "wrong / correct": 1,
            "wrong / wrong": 1,
            "unknown / unknown": 1,
            "correct / unknown": 1,
        }
    }
    (example,) = counted.notes["disagreements"]  # unknown is no disagreement
    assert example["prompt"] == "another spelling" and example["numeric says"] == "correct"
    assert counted.dropped == {"wrong: different answer": 2, "unknown: no reference": 1}
    assert set(kept[0].metadata["verdicts"]) == {"literal", "numeric"}
    assert "literal / numeric agree, %" in report.table() and "60.0" in report.table()


@pytest.mark.parametrize(
    ("decide", "kept"),
    [
        ("first", ["same", "words"]),
        ("all", ["same"]),
        ("any", ["same", "another spelling", "words"]),
        ("majority", ["same", "words"]),
    ],
)
def test_whose_verdict_counts(decide, kept):
    found = compare(TRACES, BOTH, decide=decide, report=DropCounts())
    assert [trace.prompt for trace in found] == kept


def test_a_tie_is_unknown_and_a_crash_is_no_vote():
    right, no, crash = Verdict("correct"), Verdict("wrong", "x"), Verdict("error", "crashed")
    assert decision({"a": right, "b": no}, "majority").label() == "unknown: verifiers disagree"
    assert decision({"a": crash, "b": right}, "majority").correct
    for decide in DECIDE:
        assert decision({"a": crash, "b": crash}, decide).status == "error"
    assert decision({"a": crash, "b": right}, "all").status == "error"


def test_nonsense_is_refused():
    with pytest.raises(ValueError, match="verifiers must be at least two, got .'a'"):
        compare([], {"a": Exact()}, report=DropCounts())
    with pytest.raises(ValueError, match="decide must be one of first, all, any, majority, got"):
        compare([], BOTH, decide="mine", report=DropCounts())


def test_the_page_shows_who_disagrees_and_escapes_it(tmp_path):
    report = DropCounts()
    evil = Trace("<script>", "t", "5.0", reference="5")
    list(compare([*TRACES, evil], BOTH, report=report))
    report = DropCounts.from_dict(json.loads(json.dumps(report.to_dict())))
    text = write_report(tmp_path / "r.html", report).read_text()
    assert "They agree on 50.0 % of 6 traces." in text and "literal \\ numeric" in text
    assert "another spelling" in text and "&lt;script&gt;" in text and "<script" not in text


def test_a_stage_counts_its_own_time_and_not_that_of_the_stages_it_reads(monkeypatch):
    clock = [0.0]
    monkeypatch.setattr(counts.time, "perf_counter", lambda: clock[0])
    report = DropCounts()
    first, middle, last = (report.stage(name) for name in ("first", "middle", "last"))

    def made():
        for i in range(5):
            clock[0] += 20
            yield i

    def passed(stream):
        for i in stream:
            with middle.timed():
                clock[0] += 4
            yield i

    def finished(stream):
        for i in stream:
            clock[0] += 1
            yield i

    for _ in metered(last, finished(passed(metered(first, made())))):
        clock[0] += 30  # the consumer's own time is nobody's
    assert (first.seconds, middle.seconds, last.seconds) == (100, 20, 5)


def test_select_on_the_command_line(tmp_path, capsys):
    rows = [
        Trace(f"q{i % 4}", "t" * (i + 1), "a", domain="maths" if i % 4 else "code")
        .note(verdict={"status": "correct" if i % 4 < 2 or i > 8 else "wrong"})
        .note(sample=i)
        for i in range(12)
    ]
    write_traces(tmp_path / "in.jsonl", rows)
    counts, out = tmp_path / "n.json", tmp_path / "out.jsonl"

    def select(*options):
        line = ["traces", "select", str(tmp_path / "in.jsonl"), "-o", str(out), *options]
        assert main([*line, "--report", str(counts)]) == 0, capsys.readouterr().err
        return list(load(out))

    assert {t.prompt for t in select("--difficulty", "0", "0.5")} == {"q2", "q3"}
    best = select("--best", "1")
    assert [t.think for t in best] == ["t", "tt", "t" * 11, "t" * 12]
    assert (
        len(select("--best", "2", "--prefer", "longest", "--diverse", "3", "--by", "domain")) == 3
    )
    stages = json.loads(counts.read_text())
    assert stages["difficulty"]["dropped"] == {"too easy": 6}
    assert main(["traces", "select", str(tmp_path / "in.jsonl")]) == 1
    assert "--difficulty, --best, --diverse must be given" in capsys.readouterr().err


def test_two_verifiers_on_the_command_line(tmp_path, capsys):
    write_traces(tmp_path / "in.jsonl", TRACES)
    line = ["traces", "verify", str(tmp_path / "in.jsonl"), "-o", str(tmp_path / "out.jsonl")]
    assert main([*line, "--verifier", "exact", "numeric", "--decide", "any"]) == 0
    assert "exact / numeric agree" in capsys.readouterr().out
    assert len(list(load(tmp_path / "out.jsonl"))) == 3
