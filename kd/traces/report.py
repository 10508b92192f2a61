"""The yield as one self-contained HTML page: a funnel, reasons, lengths, readable samples."""

from __future__ import annotations

import html
import math
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

from kd.files import write_whole
from kd.traces.trace import Trace
from kd.traces.verifiers.verdict import STATUSES
from kd.traces.yields import Yield, agreed

STYLE = """
body { font: 16px/1.55 system-ui, sans-serif; color: #1d2433; max-width: 54rem;
       margin: 2rem auto; padding: 0 1rem; }
h1 { font-size: 1.6rem; } h2 { font-size: 1.15rem; margin-top: 2.2rem; }
table { border-collapse: collapse; margin: 1rem 0; }
th, td { padding: .25rem .9rem .25rem 0; border-bottom: 1px solid #dde3ec; text-align: left; }
td.n { text-align: right; font-variant-numeric: tabular-nums; }
pre { font: 13px/1.45 ui-monospace, monospace; background: #f6f7f9; padding: .6rem;
      white-space: pre-wrap; overflow-wrap: anywhere; }
svg text { font: 12px system-ui, sans-serif; fill: #1d2433; }
details { margin: .4rem 0; } summary { cursor: pointer; }
.q { border-left: 3px solid #3465a4; } .t { border-left: 3px solid #c4a000; }
.a { border-left: 3px solid #2e7d32; } .d { border-left: 3px solid #b3261e; }
"""
KEPT, DROPPED = "#3465a4", "#d9776f"
DROPPED_TEXT = "#a33a31"
SAMPLES = 8
SHOWN = 3  # reasons named beside a bar of the funnel


def write_report(
    path: str | Path,
    report: Yield,
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
    parts = [f"<h1>{html.escape(title)}</h1>", _headline(report), _funnel(report), _table(report)]
    if lengths:
        parts.append("<h2>Lengths of the final set, in characters</h2>")
        parts.append(_histogram("thought", [think for think, _ in lengths]))
        parts.append(_histogram("answer", [answer for _, answer in lengths]))
    parts += [_disagreement(report), _dropped(report), _samples(samples)]
    page = (
        '<!doctype html><html lang="en"><head><meta charset="utf-8">'
        f"<title>{html.escape(title)}</title><style>{STYLE}</style></head>"
        f"<body>{''.join(parts)}</body></html>\n"
    )
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    write_whole(path, page.encode(errors="replace"))
    return path


def _headline(report: Yield) -> str:
    share = f" ({100 * report.kept / report.seen:.1f} %)" if report.seen else ""
    return f"<p><b>{report.kept:,}</b> of {report.seen:,} records reached the end{share}.</p>"


def _funnel(report: Yield) -> str:
    """A bar per stage: what went on, and beside it each reason's share of what did not."""
    stages = list(report.stages.items())
    widest = max((tally.seen for _, tally in stages), default=0) or 1
    parts, y = [], 0
    for name, tally in stages:
        kept = 640 * tally.kept / widest
        lost = sorted(tally.dropped.items(), key=lambda item: -item[1])[:SHOWN]
        gone = "; ".join(f"{count:,} {reason}" for reason, count in lost)
        gone = f'<tspan fill="{DROPPED_TEXT}" dx="14">{html.escape(gone[:90])}</tspan>'
        label = f"{html.escape(name)}: {tally.kept:,} kept"
        parts.append(f'<text x="0" y="{y + 12}">{label}{gone}</text>')
        parts.append(
            f'<rect x="0" y="{y + 17}" width="{kept:.1f}" height="16" fill="{KEPT}">'
            f"<title>{tally.kept:,} kept</title></rect>"
        )
        x = kept
        for reason, count in sorted(tally.dropped.items(), key=lambda item: -item[1]):
            width = 640 * count / widest
            label = f"{html.escape(reason)}: {count:,}"
            parts.append(
                f'<rect x="{x:.1f}" y="{y + 17}" width="{max(0.5, width - 1):.1f}" height="16" '
                f'fill="{DROPPED}"><title>{label}</title></rect>'
            )
            x += width
        y += 46
    alt = "kept and dropped records of each stage"
    return f'<svg role="img" aria-label="{alt}" viewBox="0 0 680 {y}">{"".join(parts)}</svg>'


def _table(report: Yield) -> str:
    rows = []
    for name, tally in report.stages.items():
        rate = f"{tally.seen / tally.seconds:,.0f}" if tally.seconds else ""
        cells = (f"{tally.seen:,}", f"{tally.kept:,}", f"{tally.seen - tally.kept:,}", rate)
        numbers = "".join(f'<td class="n">{cell}</td>' for cell in cells)
        reasons = ", ".join(
            f"{count:,} {reason}" for reason, count in tally.to_dict()["dropped"].items()
        )
        rows.append(
            f"<tr><td>{html.escape(name)}</td>{numbers}<td>{html.escape(reasons)}</td></tr>"
        )
    head = "".join(f"<th>{h}</th>" for h in ("stage", "in", "kept", "dropped", "per s", "reasons"))
    return f"<table><thead><tr>{head}</tr></thead><tbody>{''.join(rows)}</tbody></table>"


def _histogram(name: str, values: Sequence[int], bins: int = 24) -> str:
    """Counts over a logarithmic scale."""
    top = max(max(values), 1)
    edges = [top ** (i / bins) for i in range(bins + 1)]
    counts = [0] * bins
    for value in values:
        at = int(math.log(max(value, 1)) / math.log(top) * bins) if top > 1 else 0
        counts[min(bins - 1, at)] += 1
    tallest = max(counts) or 1
    bars = "".join(
        f'<rect x="{28 * i}" y="{110 - 100 * count / tallest:.1f}" width="26" '
        f'height="{100 * count / tallest:.1f}" fill="{KEPT}">'
        f"<title>{edges[i]:,.0f} to {edges[i + 1]:,.0f}: {count:,}</title></rect>"
        for i, count in enumerate(counts)
    )
    ordered = sorted(values)
    middle, high = ordered[len(ordered) // 2], ordered[int(0.95 * (len(ordered) - 1))]
    caption = f"{name}: median {middle:,}, 95 % below {high:,}, longest {top:,}"
    return (
        f'<svg role="img" aria-label="{caption}" viewBox="0 0 680 132">{bars}'
        f'<text x="0" y="127">1</text><text x="672" y="127" text-anchor="end">{top:,}</text>'
        f"</svg><p>{caption}</p>"
    )


def _disagreement(report: Yield) -> str:
    """How several verifiers judged the same traces, and some that they judged differently."""
    parts = []
    for name, tally in report.stages.items():
        notes = tally.notes
        if not notes.get("agreement"):
            continue
        parts.append(f"<h2>Verifiers compared: {html.escape(name)}</h2>")
        for pair, counts in notes["agreement"].items():
            parts.append(_agreement(pair, counts))
        shown = "".join(f"<pre class=d>{_lines(row)}</pre>" for row in notes["disagreements"])
        if shown:
            summary = "traces that one calls correct and another wrong"
            parts.append(f"<details open><summary>{summary}</summary>{shown}</details>")
    return "".join(parts)


def _agreement(pair: str, counts: Mapping[str, int]) -> str:
    """One pair's statuses against each other, as a table."""
    left, _, right = pair.partition(" / ")
    cells: dict[tuple[str, str], int] = {}
    for statuses, count in counts.items():
        mine, _, other = statuses.partition(" / ")
        cells[mine, other] = count
    columns = [status for status in STATUSES if any(key[1] == status for key in cells)]
    rows = [status for status in STATUSES if any(key[0] == status for key in cells)]
    head = f"<th>{html.escape(left)} \\ {html.escape(right)}</th>"
    head += "".join(f"<th>{status}</th>" for status in columns)
    body = ""
    for status in rows:
        numbers = (f'<td class="n">{cells.get((status, other), 0):,}</td>' for other in columns)
        body += f"<tr><td>{status}</td>{''.join(numbers)}</tr>"
    table = f"<table><thead><tr>{head}</tr></thead><tbody>{body}</tbody></table>"
    total = sum(counts.values())
    return f"<p>They agree on {100 * agreed(counts):.1f} % of {total:,} traces.</p>{table}"


def _lines(row: Mapping[str, Any]) -> str:
    return html.escape("\n".join(f"{key}: {value}" for key, value in row.items() if value))


def _dropped(report: Yield) -> str:
    parts = ["<h2>Examples of what was dropped</h2>"]
    for name, tally in report.stages.items():
        for reason, examples in tally.examples.items():
            count = tally.dropped.get(reason, 0)
            label = html.escape(f"{name}: {reason} ({count:,})")
            rows = "".join(f"<pre class=d>{_lines(row)}</pre>" for row in examples)
            parts.append(f"<details><summary>{label}</summary>{rows}</details>")
    return "".join(parts) if len(parts) > 1 else ""


def _samples(samples: Sequence[Trace]) -> str:
    parts = ["<h2>Samples of what was kept</h2>"] if samples else []
    for trace in samples:
        texts = (("q", trace.prompt), ("t", trace.think), ("a", trace.answer))
        parts.append("<hr>")
        for mark, text in texts:
            if text:
                shown = text if len(text) < 3000 else f"{text[:2000]}\n[...]\n{text[-800:]}"
                parts.append(f"<pre class={mark}>{html.escape(shown)}</pre>")
    return "".join(parts)
