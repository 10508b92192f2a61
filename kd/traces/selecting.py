"""Choosing among answered traces: best of n, by difficulty, and for diversity."""

from __future__ import annotations

import random
from collections.abc import Iterable, Sequence

from kd.traces.counts import DropCounts
from kd.traces.trace import Trace


def by_prompt(traces: Iterable[Trace]) -> dict[tuple[str, str], list[Trace]]:
    """Traces of the same system message and prompt, in order of appearance."""
    groups: dict[tuple[str, str], list[Trace]] = {}
    for trace in traces:
        groups.setdefault((trace.system, trace.prompt), []).append(trace)
    return groups


def pass_rate(samples: Sequence[Trace]) -> float:
    """The share of samples that the verifier found correct, among those it could decide."""
    verdicts = [trace.metadata.get("verdict", {}).get("status") for trace in samples]
    decided = [status for status in verdicts if status in ("correct", "wrong")]
    return decided.count("correct") / len(decided) if decided else float("nan")


def best_of_n(
    traces: Iterable[Trace],
    *,
    keep: int = 1,
    prefer: str = "shortest",
    seed: int = 0,
    report: DropCounts,
    stage: str = "best of n",
) -> list[Trace]:
    """Of the samples of each prompt keep a few, correct ones first.

    Args:
        traces: with verdicts, if there are any.
        keep: samples kept a prompt.
        prefer: among equals: "shortest", "longest" or "random".
        seed: for "random".
        report: takes the counts.
        stage: the stage's name in the report.
    """
    if prefer not in ("shortest", "longest", "random"):
        raise ValueError(
            f'best_of_n: prefer must be "shortest", "longest" or "random", got {prefer!r}.'
        )
    counted = report.stage(stage)
    rng = random.Random(seed)
    chosen: list[Trace] = []
    for samples in by_prompt(traces).values():

        def rank(trace: Trace) -> tuple[int, float]:
            status = trace.metadata.get("verdict", {}).get("status", "unknown")
            order = {"correct": 0, "unknown": 1, "error": 1}.get(status, 2)
            size = float(len(trace.think) + len(trace.answer))
            tie = {"shortest": size, "longest": -size, "random": rng.random()}[prefer]
            return order, tie

        ranked = sorted(samples, key=rank)
        chosen.extend(ranked[:keep])
        counted.keep(len(ranked[:keep]))
        for trace in ranked[keep:]:
            counted.drop("another sample was better", trace)
    return chosen


def by_difficulty(
    traces: Iterable[Trace],
    *,
    least: float = 0.0,
    most: float = 1.0,
    report: DropCounts,
    stage: str = "difficulty",
) -> list[Trace]:
    """Keep the prompts whose pass rate lies in [least, most]; each trace notes its rate."""
    if not 0 <= least <= most <= 1:
        raise ValueError(
            f"by_difficulty: least and most must satisfy 0 <= least <= most <= 1, got {least}, "
            f"{most}."
        )
    counted = report.stage(stage)
    chosen: list[Trace] = []
    for samples in by_prompt(traces).values():
        rate = pass_rate(samples)
        for trace in samples:
            if rate != rate:
                counted.drop("no verdict", trace)
            elif least <= rate <= most:
                counted.keep()
                chosen.append(trace.note(pass_rate=round(rate, 4)))
            else:
                counted.drop("too hard" if rate < least else "too easy", trace, f"rate {rate:.2f}")
    return chosen


def diverse(
    traces: Iterable[Trace],
    count: int,
    *,
    by: str = "domain",
    seed: int = 0,
    report: DropCounts,
    stage: str = "diverse",
) -> list[Trace]:
    """Sample ``count`` traces evenly over domains (or sources), longer thoughts more often.

    As s1 did: draw a domain, then a trace of it with weight 2**(-rank) by length within tenths.
    """
    if by not in ("domain", "source"):
        raise ValueError(f'diverse: by must be "domain" or "source", got {by!r}.')
    if count < 0:
        raise ValueError(f"diverse: count must be at least 0, got {count}.")
    counted = report.stage(stage)
    rng = random.Random(seed)
    groups: dict[str, list[Trace]] = {}
    for trace in traces:
        groups.setdefault(getattr(trace, by), []).append(trace)
    for group in groups.values():
        group.sort(key=lambda trace: (-len(trace.think), trace.id))
    chosen: list[Trace] = []
    while len(chosen) < count and groups:
        name = rng.choice(sorted(groups))
        group = groups[name]
        step = max(1, len(group) // 10)
        start = 0
        while start + step < len(group) and rng.random() < 0.5:
            start += step
        chosen.append(group.pop(rng.randrange(start, min(len(group), start + step))))
        if not group:
            del groups[name]
    counted.keep(len(chosen))
    for group in groups.values():
        for trace in group:
            counted.drop("not sampled", trace)
    return chosen
