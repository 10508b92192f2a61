"""Plots of a device's results: time beside the peers, scaling, roofline."""

from __future__ import annotations

import math
import statistics
from pathlib import Path
from typing import Any

import matplotlib
from matplotlib.figure import Figure

from kd_bench.results import best_possible, table_row

matplotlib.use("Agg")
OURS, OTHER = "#1f6feb", "#9aa4ae"
AXES = {"V": ("vocab", "vocabulary"), "N": ("tokens", "tokens"), "K": ("top_k", "stored tokens")}
Rows = list[dict[str, Any]]


def colour(row: dict[str, Any]) -> str:
    return OURS if row["extra_info"]["implementation"].startswith("kd") else OTHER


def series_of(row: dict[str, Any]) -> str:
    """Which scaling series a row belongs to: V, N, K, or "" for none."""
    base, _, changed = row["extra_info"]["shape"]["name"].partition(":")
    return changed.rpartition(",")[2].partition("=")[0] if base == "scaling" else ""


def exponent(sizes: list[float], values: list[float]) -> float:
    """Slope of log value over log size, by least squares."""
    return statistics.linear_regression(
        [math.log(v) for v in sizes], [math.log(v) for v in values]
    ).slope


def times(rows: Rows) -> Figure | None:
    """Each group's implementations, their time over the fastest of the group."""
    groups: dict[str, Rows] = {}
    for row in rows:
        if not series_of(row) and not row["extra_info"]["bare"]:
            groups.setdefault(row["group"], []).append(row)
    if not groups:
        return None
    figure = Figure(figsize=(8, 0.6 * len(groups) + 0.22 * sum(map(len, groups.values()))))
    figure.set_layout_engine("constrained")
    heights = [len(found) + 1 for found in groups.values()]
    grid = figure.subplots(len(groups), squeeze=False, gridspec_kw={"height_ratios": heights})
    for (name, found), (axes,) in zip(groups.items(), grid, strict=True):
        found = sorted(found, key=lambda row: -row["stats"]["median"])
        names = [row["extra_info"]["implementation"] for row in found]
        values = [row["stats"]["median"] for row in found]
        drawn = axes.barh(names, values, color=[colour(row) for row in found])
        axes.bar_label(drawn, fmt="%.3g s", padding=3, fontsize=7)
        axes.set_title(name, fontsize=8, loc="left")
        axes.tick_params(labelsize=7)
        axes.set_xticks([])
        axes.margins(x=0.15)
    return figure


def scaling(rows: Rows, letter: str, key: str) -> Figure | None:
    """``median_s`` or ``extra_mib`` against one size, with the fitted exponent of the time."""
    field, label = AXES[letter]
    lines: dict[str, list[tuple[float, float]]] = {}
    for row in rows:
        value = table_row(row)[key]
        if series_of(row) == letter and not row["extra_info"]["bare"] and value is not None:
            name = f"{row['extra_info']['suite']}, {row['extra_info']['implementation']}"
            lines.setdefault(name, []).append((row["extra_info"]["shape"][field], value))
    lines = {name: sorted(points) for name, points in lines.items() if len(points) > 1}
    if not lines:
        return None
    figure = Figure(figsize=(7, 4.2), layout="constrained")
    axes = figure.add_subplot()
    for name, points in lines.items():
        x, y = [p[0] for p in points], [max(p[1], 1e-9) for p in points]
        grows = f" (grows as {letter}^{exponent(x, y):.2f})" if key == "median_s" else ""
        width = 2.2 if name.endswith(", kd") else 1.2
        axes.plot(x, y, marker="o", linewidth=width, label=name + grows)
    axes.set_xscale("log", base=2)
    axes.set_yscale("log" if key == "median_s" else "linear")
    axes.set_xlabel(label)
    axes.set_ylabel("median seconds" if key == "median_s" else "extra MiB at the peak")
    axes.legend(fontsize=7)
    axes.grid(alpha=0.3)
    return figure


def roofline(rows: Rows) -> Figure | None:
    """Achieved over possible: the least work a second against the measured ceilings."""
    found = [r for r in rows if r["extra_info"]["least_bytes"] and not r["extra_info"]["bare"]]
    if not found:
        return None
    figure = Figure(figsize=(7, 4.2), layout="constrained")
    axes = figure.add_subplot()
    for row in found:
        extra, ours = row["extra_info"], colour(row) == OURS
        intensity = max(extra["least_flops"] / extra["least_bytes"], 0.01)
        share = 100 * best_possible(extra) / row["stats"]["median"]
        size, order = (36, 3) if ours else (14, 2)
        axes.scatter(intensity, share, s=size, color=colour(row), zorder=order)
    axes.axhline(100, color="black", linewidth=0.8)
    axes.set_xscale("log")
    axes.set_ylim(0, 110)
    axes.set_xlabel("least FLOPs per least byte (no GEMM: left edge)")
    axes.set_ylabel("% of the measured ceiling (copy or GEMM)")
    axes.set_title("blue: kd, grey: others", fontsize=9)
    axes.grid(alpha=0.3)
    return figure


def write_plots(folder: Path, rows: Rows) -> list[Path]:
    """time.png, scaling-*.png and roofline.png in ``folder``; plots of before are removed."""
    figures = {"time": times(rows), "roofline": roofline(rows)}
    for letter in AXES:
        figures[f"scaling-{letter}-time"] = scaling(rows, letter, "median_s")
        figures[f"scaling-{letter}-memory"] = scaling(rows, letter, "extra_mib")
    folder.mkdir(exist_ok=True)
    for stale in folder.glob("*.png"):
        stale.unlink()
    paths = []
    for name, figure in figures.items():
        if figure is not None:
            paths.append(folder / f"{name}.png")
            figure.savefig(paths[-1], dpi=110)
    return paths
