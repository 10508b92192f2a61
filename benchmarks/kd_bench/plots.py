"""Plots of the results and one self-contained HTML page."""

from __future__ import annotations

import base64
import html
import io
import math
import re
from pathlib import Path
from typing import Any

from kd.files import write_whole
from kd_bench import gate
from kd_bench.machine import line_of
from kd_bench.report import all_rows, best_possible, command_of, group_table, times_floor
from kd_bench.runner import floor_rounds
from kd_bench.steps import is_floor

Rows = list[dict[str, Any]]
OURS, OTHER = "#1f6feb", "#9aa4ae"
AXES = {"V": ("vocab", "vocabulary"), "N": ("tokens", "tokens"), "K": ("top_k", "stored tokens")}


def timed(groups: list[dict[str, Any]]) -> list[tuple[dict[str, Any], dict[str, Any]]]:
    return [(group, row) for group in groups for row in group["rows"] if row["seconds"]]


def median_of(row: dict[str, Any]) -> float:
    ordered = sorted(row["seconds"])
    return ordered[len(ordered) // 2]


def series_of(group: dict[str, Any]) -> str:
    """Which scaling series a group belongs to: V, N, K, or "" for none."""
    base, _, changed = group["rows"][0]["shape"]["name"].partition(":")
    return changed.partition("=")[0] if base == "scaling" else ""


def exponent(sizes: list[float], seconds: list[float]) -> float:
    """Slope of log time over log size, by least squares."""
    x, y = [math.log(v) for v in sizes], [math.log(v) for v in seconds]
    mx, my = sum(x) / len(x), sum(y) / len(y)
    spread = sum((a - mx) ** 2 for a in x)
    return sum((a - mx) * (b - my) for a, b in zip(x, y, strict=True)) / spread if spread else 0.0


def _figure(**options: Any) -> Any:
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib.figure import Figure

    return Figure(layout="constrained", **options)


def bars(group: dict[str, Any]) -> Any:
    """Time of every implementation, over the bare matmuls where the suite has them."""
    floor = floor_rounds(group["rows"])
    rows = [r for r in group["rows"] if r["seconds"] and not is_floor(r["implementation"])]
    rows.sort(key=median_of, reverse=True)
    values = [
        times_floor(r["seconds"], r["floor_seconds"]) if floor else median_of(r) for r in rows
    ]
    figure = _figure(figsize=(7, 0.9 + 0.35 * len(rows)))
    axes = figure.add_subplot()
    colours = [OURS if r["implementation"].startswith("kd") else OTHER for r in rows]
    drawn = axes.barh([r["implementation"] for r in rows], values, color=colours)
    axes.bar_label(drawn, fmt="%.3g", padding=3)
    if floor:
        axes.axvline(1.0, color="black", linewidth=0.8)
    bare = "forward" if group["rows"][0]["suite"] == "capture" else "matmuls"
    axes.set_xlabel(f"times the bare {bare}" if floor else "median seconds")
    axes.set_title(group["group"], fontsize=9)
    return figure


def scaling(groups: list[dict[str, Any]], letter: str, key: str) -> Any:
    """Time or memory against one size, with the fitted exponent in the legend."""
    field, label = AXES[letter]
    lines: dict[str, list[tuple[float, float]]] = {}
    for group, row in timed(groups):
        if series_of(group) == letter and not is_floor(row["implementation"]):
            value = median_of(row) if key == "seconds" else row.get("extra_memory", 0) / 2**20
            name = f"{row['suite']}, {row['implementation']}"
            lines.setdefault(name, []).append((row["shape"][field], value))
    lines = {name: sorted(points) for name, points in lines.items() if len(points) > 1}
    if not lines:
        return None
    figure = _figure(figsize=(7, 4.2))
    axes = figure.add_subplot()
    for name, points in lines.items():
        x, y = [p[0] for p in points], [max(p[1], 1e-9) for p in points]
        suffix = f" (grows as {letter}^{exponent(x, y):.2f})" if key == "seconds" else ""
        width = 2.2 if name.endswith(", kd") else 1.2
        axes.plot(x, y, marker="o", linewidth=width, label=name + suffix)
    axes.set_xscale("log", base=2)
    axes.set_yscale("log")
    axes.set_xlabel(label)
    axes.set_ylabel("median seconds" if key == "seconds" else "extra MiB at the peak")
    axes.legend(fontsize=7)
    axes.grid(alpha=0.3)
    return figure


def roofline(groups: list[dict[str, Any]]) -> Any:
    """Achieved over possible: each row's floor work per second against the measured ceilings."""
    figure = _figure(figsize=(7, 4.2))
    axes = figure.add_subplot()
    for group, row in timed(groups):
        if is_floor(row["implementation"]) or not row["floor_bytes"]:
            continue
        intensity = max(row["floor_flops"], 1) / row["floor_bytes"]
        share = best_possible(row, group["ceilings"]) / median_of(row)
        ours = row["implementation"].startswith("kd")
        axes.scatter(
            max(intensity, 0.01),
            100 * share,
            s=36 if ours else 14,
            color=OURS if ours else OTHER,
            zorder=3 if ours else 2,
        )
    axes.axhline(100, color="black", linewidth=0.8)
    axes.set_xscale("log")
    axes.set_ylim(0, 110)
    axes.set_xlabel("FLOPs per byte of the floor (no matmul: left edge)")
    axes.set_ylabel("% of the measured ceiling (copy or matmul)")
    axes.set_title("blue: kd, grey: others", fontsize=9)
    axes.grid(alpha=0.3)
    return figure


def figures(groups: list[dict[str, Any]]) -> dict[str, Any]:
    """{file name without suffix: figure}."""
    made = {"roofline": roofline(groups)}
    for group in groups:
        if not series_of(group) and any(row["seconds"] for row in group["rows"]):
            made["time-" + re.sub(r"[^\w.-]+", "_", group["group"])] = bars(group)
    for letter in AXES:
        for key in ("seconds", "memory"):
            figure = scaling(groups, letter, key)
            if figure is not None:
                made[f"scaling-{letter}-{key}"] = figure
    return made


def write_plots(folder: Path, groups: list[dict[str, Any]]) -> list[Path]:
    """plots/*.png and report.html, which holds them."""
    (folder / "plots").mkdir(exist_ok=True)
    images: dict[str, bytes] = {}
    paths: list[Path] = []
    for name, figure in figures(groups).items():
        buffer = io.BytesIO()
        figure.savefig(buffer, format="png", dpi=110)
        images[name] = buffer.getvalue()
        paths.append(folder / "plots" / f"{name}.png")
        paths[-1].write_bytes(images[name])
    for stale in set((folder / "plots").glob("*.png")) - set(paths):
        stale.unlink()
    write_whole(folder / "report.html", page(groups, images, folder).encode())
    return [*paths, folder / "report.html"]


STYLE = """body{font:15px/1.5 system-ui,sans-serif;max-width:1300px;margin:2em auto;padding:0 1em;
color:#1c2024}table{border-collapse:collapse;font-size:13px;display:block;overflow-x:auto}
td,th{border:1px solid #d5dae0;padding:3px 8px;text-align:right}
td:first-child,td:last-child{text-align:left}
td{white-space:nowrap}td:last-child{white-space:normal;min-width:15em}
tr.ours{background:#eaf2ff;font-weight:600}img{max-width:100%}code{background:#f2f4f6}"""


def page(groups: list[dict[str, Any]], images: dict[str, bytes], folder: Path) -> str:
    """The whole report as one HTML file that loads nothing; its links lead to files beside it."""
    body = [f"<h1>kd benchmarks</h1><p>{html.escape(line_of(groups[-1]['machine']))}</p>"]
    measured = [row for row in all_rows(groups) if row.get("median_s")]
    body.append(
        f"<p>{len(groups)} groups, {len(measured)} implementations measured. Times are medians; "
        "errors are relative to the float64 oracle on the same inputs; extra memory is above the "
        "inputs and the returned gradients. Rows that could not be measured say why.</p>"
    )
    for group in groups:
        body.append(f"<h2>{html.escape(group['group'])}</h2>")
        said = f"{group['measured_at']}. {command_of(group)}".replace("`", "")
        body.append(f"<p>{html.escape(said)}</p>{_as_html(group_table(group))}")
    for name, image in images.items():
        source = base64.b64encode(image).decode()
        title = html.escape(name)
        body.append(f'<h3>{title}</h3><img alt="{title}" src="data:image/png;base64,{source}">')
    body += _gate(folder)
    head = (
        f'<!doctype html><meta charset="utf-8"><title>kd benchmarks</title><style>{STYLE}</style>'
    )
    return head + "\n".join(body) + "\n"


def _gate(folder: Path) -> list[str]:
    """What the ahead-of-time gate has counted, where it lies beside the results."""
    parts = gate.section(folder)
    if not parts:
        return []
    said = html.escape(gate.INTRODUCTION).replace("`make aot`", "<code>make aot</code>")
    links = ", ".join(
        f'<a href="../aot/{name}">{title}</a>'
        for title, name in (
            ("summary", "README.md"),
            ("every variant", "table.md"),
            ("peers", "peers.md"),
            ("table.csv", "table.csv"),
            ("peers.csv", "peers.csv"),
        )
    )
    made = [
        f'<h2 id="gate">Machine code of the kernels</h2><p>{said}</p><p>All of it: {links}.</p>'
    ]
    return made + [f"<h3>{html.escape(title)}</h3>{_as_html(table)}" for title, table in parts]


def _as_html(table: str) -> str:
    """A Markdown table as HTML."""
    head, _, *rows = [
        [cell.strip() for cell in line.strip("|").split("|")] for line in table.split("\n")
    ]
    lines = ["<tr>" + "".join(f"<th>{html.escape(cell)}</th>" for cell in head) + "</tr>"]
    for row in rows:
        ours = (
            ' class="ours"'
            if row[0] == "kd" or row[0].startswith("kd ") or row[1].startswith("ours")
            else ""
        )
        lines.append(
            f"<tr{ours}>" + "".join(f"<td>{html.escape(cell)}</td>" for cell in row) + "</tr>"
        )
    return "<table>" + "\n".join(lines) + "</table>"
