"""Arms side by side: the table, the plot and the plain words of a comparison over seeds."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any

from kd.evaluation.scores import Comparison, compare, spread

COLOURS = ("#888f9c", "#3465a4", "#2e7d32", "#b3261e", "#8e44ad")


def percent(share: float, digits: int = 1) -> str:
    """0.4567 as ``45.7 %``; NaN as a dash."""
    return "-" if math.isnan(share) else f"{100 * share:.{digits}f} %"


def arms_rows(
    arms: Mapping[str, Sequence[float]],
    seeds: Sequence[int],
    references: Mapping[str, float] | None = None,
) -> tuple[list[str], list[list[str]]]:
    """Header and rows of a table: one arm a row, its seeds, mean and standard deviation.

    Args:
        arms: accuracies of each arm, one a seed.
        seeds: names of the columns.
        references: accuracies with no seeds of their own, such as the teacher's.
    """
    header = ["", *(f"seed {seed}" for seed in seeds), "mean", "std"]
    rows = []
    for label, accuracies in arms.items():
        mean, deviation = spread(accuracies)
        cells = [percent(value) for value in (*accuracies, mean, deviation)]
        rows.append([label, *cells])
    for label, value in (references or {}).items():
        rows.append([label, *[""] * len(seeds), percent(value), ""])
    return header, rows


def text_table(header: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    """A table for the terminal: the first column to the left, the others to the right."""
    widths = [max(len(row[i]) for row in (header, *rows)) for i in range(len(header))]
    lines = []
    for row in (header, *rows):
        cells = [row[0].ljust(widths[0])]
        cells += [cell.rjust(width) for cell, width in zip(row[1:], widths[1:], strict=True)]
        lines.append("  ".join(cells).rstrip())
    return "\n".join(lines)


def verdict(baseline: str, other: str, difference: Comparison) -> str:
    """One sentence on whether an arm beats the other beyond its standard error over seeds."""
    points = f"{100 * abs(difference.difference):.1f} points"
    pairs = len(difference.differences)
    if math.isnan(difference.error):
        direction = "above" if difference.difference > 0 else "below"
        return (
            f"{other} is {points} {direction} {baseline} on the only seed: "
            "no spread, so nothing can be said. Run at least 3 seeds."
        )
    error = f"standard error {100 * difference.error:.1f} over {pairs} seeds"
    if difference.verdict == "higher":
        return f"{other} beats {baseline} by {points} ({error})."
    if difference.verdict == "lower":
        return f"{other} LOSES to {baseline} by {points} ({error})."
    return (
        f"{other} does NOT beat {baseline}: the difference of "
        f"{100 * difference.difference:+.1f} points is within the noise ({error})."
    )


def compare_arms(arms: Mapping[str, Sequence[float]], baseline: str, other: str) -> str:
    """``verdict`` of two arms whose runs share seeds."""
    return verdict(baseline, other, compare(arms[baseline], arms[other]))


def arms_figure(
    arms: Mapping[str, Sequence[float]],
    references: Mapping[str, float] | None = None,
    ylabel: str = "exact answers on held-out problems",
) -> Any:
    """Bars of the means with every seed as a dot, seeds joined by lines, references as levels."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(6.4, 3.8))
    axes = figure.subplots()
    labels = list(arms)
    for i, accuracies in enumerate(arms.values()):
        mean, deviation = spread(accuracies)
        error = None if math.isnan(deviation) else deviation
        axes.bar(i, mean, 0.55, yerr=error, capsize=5, color=COLOURS[i % len(COLOURS)], alpha=0.75)
        axes.plot([i] * len(accuracies), accuracies, "o", color="black", ms=4, zorder=3)
    if len({len(values) for values in arms.values()}) == 1:
        for run in zip(*arms.values(), strict=True):
            axes.plot(range(len(labels)), run, "-", color="black", lw=0.7, alpha=0.5)
    for label, value in (references or {}).items():
        axes.axhline(value, ls="--", lw=1, color="#444")
        axes.annotate(
            f"{label}: {percent(value)}",
            (1, value),
            (0, -12),
            xycoords=("axes fraction", "data"),
            textcoords="offset points",
            ha="right",
        )
    means = [percent(spread(values)[0]) for values in arms.values()]
    ticks = [f"{label}\n{mean}" for label, mean in zip(labels, means, strict=True)]
    axes.set_xticks(range(len(labels)), ticks)
    axes.set_ylim(0, 1.02 * max([*(max(v) for v in arms.values()), *(references or {}).values()]))
    axes.yaxis.set_major_formatter(lambda value, _: f"{100 * value:.0f} %")
    axes.set_ylabel(ylabel)
    axes.spines[["top", "right"]].set_visible(False)
    return figure
