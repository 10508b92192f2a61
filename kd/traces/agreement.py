"""Several verifiers on the same traces: who says what, and where they disagree.

Which verifier is used decides how much of a data set survives, so that the difference has to be
seen before one is trusted.
"""

from __future__ import annotations

from collections.abc import Collection, Iterable, Iterator, Mapping
from itertools import combinations
from pathlib import Path
from typing import Any

from kd.traces.counts import DropCounts, excerpt, metered
from kd.traces.trace import Trace
from kd.traces.verification import judge_all
from kd.traces.verifiers.verdict import CORRECT, UNKNOWN, WRONG, Verdict, Verifier

DECIDE = ("first", "all", "any", "majority")
EXAMPLES = 12


def compare(
    traces: Iterable[Trace],
    verifiers: Mapping[str, Verifier],
    *,
    decide: str = "first",
    keep: Collection[str] = (CORRECT,),
    workers: int = 1,
    journal: str | Path | None = None,
    report: DropCounts,
    stage: str = "verify",
) -> Iterator[Trace]:
    """Check every trace with every verifier, count how they agree, and keep by their decision.

    Args:
        traces: what to check.
        verifiers: by name, at least two; each sees every trace.
        decide: whose verdict counts: the "first" verifier's; "all" must say correct; "any" may;
            or the "majority" of those that decided (a tie is "unknown").
        keep: statuses that pass.
        workers: threads for each verifier.
        journal: a JSON-lines file of verdicts; a rerun continues from it.
        report: takes the counts. ``notes["verdicts"]`` counts each verifier's statuses,
            ``notes["agreement"]`` each pair's, ``notes["disagreements"]`` holds a few traces.
        stage: the stage's name in the report.

    Returns:
        An iterator over the kept traces, with ``metadata["verdict"]`` (what was decided) and
        ``metadata["verdicts"]`` (what each said).
    """
    if len(verifiers) < 2:
        raise ValueError(
            f"compare: verifiers must be at least two, got {sorted(verifiers)}. "
            "Use kd.traces.verify for one."
        )
    if decide not in DECIDE:
        raise ValueError(f"compare: decide must be one of {', '.join(DECIDE)}, got {decide!r}.")
    counted = report.stage(stage)
    stream: Iterator[Trace] = iter(traces)
    for name, verifier in verifiers.items():
        stream = _asked(stream, name, verifier, workers, journal)
    return metered(counted, _decided(stream, list(verifiers), decide, keep, counted))


def _asked(
    traces: Iterator[Trace], name: str, verifier: Verifier, workers: int, journal: Any
) -> Iterator[Trace]:
    for trace, verdict in judge_all(traces, verifier, workers=workers, journal=journal):
        said = {**trace.metadata.get("verdicts", {}), name: verdict.to_dict()}
        yield trace.note(verdicts=said)


def _decided(
    traces: Iterator[Trace], names: list[str], decide: str, keep: Collection[str], counted: Any
) -> Iterator[Trace]:
    verdicts: dict[str, dict[str, int]] = counted.notes.setdefault("verdicts", {})
    agreement: dict[str, dict[str, int]] = counted.notes.setdefault("agreement", {})
    examples: list[dict[str, Any]] = counted.notes.setdefault("disagreements", [])
    for trace in traces:
        said = {name: Verdict.from_dict(trace.metadata["verdicts"][name]) for name in names}
        for name, verdict in said.items():
            _count(verdicts, name, verdict.status)
        for left, right in combinations(names, 2):
            _count(agreement, f"{left} / {right}", f"{said[left].status} / {said[right].status}")
        statuses = {verdict.status for verdict in said.values()}
        if {CORRECT, WRONG} <= statuses and len(examples) < EXAMPLES:
            labels = {f"{name} says": verdict.label() for name, verdict in said.items()}
            examples.append({**labels, **excerpt(trace)})
        verdict = decision(said, decide)
        if verdict.status in keep:
            counted.keep()
            yield trace.note(verdict=verdict.to_dict())
        else:
            counted.drop(verdict.label(), trace, verdict.detail)


def decision(said: Mapping[str, Verdict], decide: str) -> Verdict:
    """One verdict out of several."""
    verdicts = list(said.values())
    if decide == "first":
        return verdicts[0]
    correct = [verdict for verdict in verdicts if verdict.status == CORRECT]
    wrong = [verdict for verdict in verdicts if verdict.status == WRONG]
    others = [verdict for verdict in verdicts if verdict.status not in (CORRECT, WRONG)]
    if decide == "any" and correct:
        return correct[0]
    if decide == "all":
        return (wrong or others or correct)[0]
    if decide == "majority" and len(correct) != len(wrong):
        return (correct if len(correct) > len(wrong) else wrong)[0]
    if decide == "majority" and correct:
        return Verdict(UNKNOWN, "verifiers disagree")
    return (wrong or others)[0]


def _count(table: dict[str, dict[str, int]], row: str, column: str) -> None:
    counts = table.setdefault(row, {})
    counts[column] = counts.get(column, 0) + 1
