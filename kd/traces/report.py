"""What every stage kept and dropped as one page: reasons, lengths, readable samples."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

from kd.page import Page, subplots
from kd.traces.counts import DropCounts, agreed
from kd.traces.trace import Trace
from kd.traces.verifiers.verdict import STATUSES

KEPT, DROPPED = "#3465a4", "#d9776f"
SAMPLES = 8
SHOWN = 3  # reasons named beside a bar of the stages


def write_report(
    path: str | Path,
    report: DropCounts,
    traces: Iterable[Trace] = (),
    *,
    title: str = "Traces",
) -> Path:
    """Write the page.

    Args:
        path: of the HTML file.
        report: the counts.
        traces: the final set, for the lengths and the samples; consumed one at a time.
        title: the heading.

    Returns:
        The path. Every text of a record is escaped; the page loads nothing from anywhere.
    """
    lengths: list[tuple[int, int]] = []
    samples: list[Trace] = []
    for i, trace in enumerate(traces):
        lengths.append((len(trace.think), len(trace.answer)))
        if len(samples) < SAMPLES:
            samples.append(trace)
        elif i % 997 == 0:  # a few from further on
            samples[i // 997 % SAMPLES] = trace
    page = Page(title)
    share = f" ({100 * report.kept / report.seen:.1f} %)" if report.seen else ""
    page.verdict(f"{report.kept:,} of {report.seen:,} records reached the end{share}.")
    if report.stages:
        page.figure(_stages_figure(report), "Kept and dropped records of each stage.")
    page.table(
        ["stage", "in", "kept", "dropped", "per s", "reasons"],
        [_stage_row(name, counted) for name, counted in report.stages.items()],
    )
    if lengths:
        page.heading("Lengths of the final set, in characters")
        for what, values in zip(("thought", "answer"), zip(*lengths, strict=True), strict=True):
            page.figure(_lengths_figure(values), _lengths_words(what, values))
    _add_agreement(page, report)
    _add_dropped(page, report)
    if samples:
        page.heading("Samples of what was kept")
    for trace in samples:
        texts = [_shortened(text) for text in (trace.prompt, trace.think, trace.answer) if text]
        page.details(" ".join(trace.prompt.split())[:80], texts, opened=True)
    return page.save(path)


def _stages_figure(report: DropCounts) -> Any:
    """A bar for each stage: what went on, what did not, and beside it the commonest reasons."""
    figure, axes = subplots(9, 0.5 + 0.6 * len(report.stages))
    for i, (name, counted) in enumerate(report.stages.items()):
        gone = counted.seen - counted.kept
        axes.barh(i, counted.kept, 0.4, color=KEPT)
        axes.barh(i, gone, 0.4, left=counted.kept, color=DROPPED)
        lost = list(counted.to_dict()["dropped"].items())[:SHOWN]
        reasons = "; ".join(f"{count:,} {reason}" for reason, count in lost)[:90]
        label = f"{name}: {counted.kept:,} kept" + (f", {reasons}" if lost else "")
        # neither mathematics between dollars nor half a character is drawn
        label = label.encode("utf-8", "replace").decode()
        axes.text(0, i - 0.28, label, fontsize=8, parse_math=False)
    axes.set_ylim(len(report.stages) - 0.6, -0.7)
    axes.set_axis_off()
    return figure


def _stage_row(name: str, counted: Any) -> list[str]:
    rate = f"{counted.seen / counted.seconds:,.0f}" if counted.seconds else ""
    counts = (f"{count:,}" for count in (counted.seen, counted.kept, counted.seen - counted.kept))
    dropped = counted.to_dict()["dropped"].items()
    return [name, *counts, rate, ", ".join(f"{count:,} {reason}" for reason, count in dropped)]


def _lengths_figure(values: Sequence[int], bins: int = 24) -> Any:
    """Counts over a logarithmic scale."""
    figure, axes = subplots(8, 1.6)
    top = max(2, *values)
    edges = [top ** (i / bins) for i in range(bins + 1)]
    axes.hist([max(value, 1) for value in values], edges, color=KEPT)
    axes.set_xscale("log")
    axes.set_xlim(1, top)
    axes.xaxis.set_major_formatter("{x:,.0f}")
    axes.xaxis.set_minor_formatter("")
    return figure


def _lengths_words(what: str, values: Sequence[int]) -> str:
    ordered = sorted(values)
    middle, high = ordered[len(ordered) // 2], ordered[int(0.95 * (len(ordered) - 1))]
    return f"{what}: median {middle:,}, 95 % below {high:,}, longest {ordered[-1]:,}"


def _add_agreement(page: Page, report: DropCounts) -> None:
    """How several verifiers judged the same traces, and some that they judged differently."""
    for name, counted in report.stages.items():
        if not counted.notes.get("agreement"):
            continue
        page.heading(f"Verifiers compared: {name}")
        for pair, counts in counted.notes["agreement"].items():
            share, total = 100 * agreed(counts), sum(counts.values())
            page.text(f"They agree on {share:.1f} % of {total:,} traces.")
            page.table(*_agreement_table(pair, counts))
        shown = [_lines(row) for row in counted.notes["disagreements"]]
        if shown:
            page.details("traces that one calls correct and another wrong", shown, opened=True)


def _agreement_table(pair: str, counts: Mapping[str, int]) -> tuple[list[str], list[list[str]]]:
    """One pair's statuses against each other: header and rows."""
    left, _, right = pair.partition(" / ")
    cells: dict[tuple[str, str], int] = {}
    for statuses, count in counts.items():
        mine, _, other = statuses.partition(" / ")
        cells[mine, other] = count
    columns = [status for status in STATUSES if any(key[1] == status for key in cells)]
    rows = [status for status in STATUSES if any(key[0] == status for key in cells)]
    body = [[row, *(f"{cells.get((row, column), 0):,}" for column in columns)] for row in rows]
    return [f"{left} \\ {right}", *columns], body


def _add_dropped(page: Page, report: DropCounts) -> None:
    named = [
        (f"{name}: {reason} ({counted.dropped.get(reason, 0):,})", examples)
        for name, counted in report.stages.items()
        for reason, examples in counted.examples.items()
    ]
    if named:
        page.heading("Examples of what was dropped")
    for summary, examples in named:
        page.details(summary, [_lines(row) for row in examples])


def _lines(row: Mapping[str, Any]) -> str:
    return "\n".join(f"{key}: {value}" for key, value in row.items() if value)


def _shortened(text: str) -> str:
    return text if len(text) < 3000 else f"{text[:2000]}\n[...]\n{text[-800:]}"
