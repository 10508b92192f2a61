"""Arms side by side: the table, the plot and the plain words of a comparison over seeds."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from kd.evaluation.scores import Comparison, compare, spread
from kd.page import COLOURS, Page, subplots


def percent(share: float, digits: int = 1) -> str:
    """0.4567 as ``45.7 %``; NaN as a dash."""
    return "-" if math.isnan(share) else f"{100 * share:.{digits}f} %"


def plain(value: float) -> str:
    """A number with three digits or so; NaN as a dash."""
    return "-" if math.isnan(value) else f"{value:.2f}" if value < 100 else f"{value:,.0f}"


@dataclass(frozen=True)
class Metric:
    """What the arms are measured by.

    Attributes:
        label: of the plot's axis.
        show: a value as text.
        gap: a difference as text.
        higher_is_better: or lower, as for perplexity.
    """

    label: str = "exact answers on held-out problems"
    show: Callable[[float], str] = percent
    gap: Callable[[float], str] = lambda value: f"{100 * value:.1f} points"
    higher_is_better: bool = True


ACCURACY = Metric()
NATS = Metric("nats per token", plain, lambda value: f"{value:.3f} nats", higher_is_better=False)
PERPLEXITY = Metric("perplexity", plain, lambda value: f"{value:.2f}", higher_is_better=False)


def arms_rows(
    arms: Mapping[str, Sequence[float]],
    seeds: Sequence[int],
    references: Mapping[str, float] | None = None,
    metric: Metric = ACCURACY,
) -> tuple[list[str], list[list[str]]]:
    """Header and rows of a table: one arm a row, its seeds, mean and standard deviation.

    Args:
        arms: values of each arm, one a seed.
        seeds: names of the columns.
        references: values with no seeds of their own, such as the teacher's.
        metric: what the values are.
    """
    header = ["", *(f"seed {seed}" for seed in seeds), "mean", "std"]
    rows = []
    for label, accuracies in arms.items():
        mean, deviation = spread(accuracies)
        cells = [metric.show(value) for value in (*accuracies, mean, deviation)]
        rows.append([label, *cells])
    for label, value in (references or {}).items():
        rows.append([label, *[""] * len(seeds), metric.show(value), ""])
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


def verdict(baseline: str, other: str, difference: Comparison, metric: Metric = ACCURACY) -> str:
    """One sentence on whether an arm beats the other beyond its standard error over seeds."""
    gain = difference.difference if metric.higher_is_better else -difference.difference
    size = metric.gap(abs(gain))
    pairs = len(difference.differences)
    if math.isnan(difference.error):
        direction = "better" if gain > 0 else "worse"
        return (
            f"{other} is {size} {direction} than {baseline} on the only seed: "
            "no spread, so nothing can be said. Run at least 3 seeds."
        )
    error = f"standard error {metric.gap(difference.error)} over {pairs} seeds"
    if difference.verdict == "unclear":
        sign = "+" if difference.difference >= 0 else "-"
        return (
            f"{other} does NOT beat {baseline}: the difference of {sign}{size} is within the "
            f"noise ({error})."
        )
    return f"{other} {'beats' if gain > 0 else 'LOSES to'} {baseline} by {size} ({error})."


def compare_runs(
    baseline: str,
    other: str,
    first: Sequence[float],
    second: Sequence[float],
    metric: Metric = ACCURACY,
    unit: str = "problems",
) -> str:
    """One sentence on two single runs, from their scores on each of the same problems or texts.

    The standard error is over those: it says what other problems would change, not what another
    seed of the training would.
    """
    found = compare(first, second)
    gain = found.difference if metric.higher_is_better else -found.difference
    size, error = metric.gap(abs(gain)), metric.gap(found.error)
    if found.verdict == "unclear":
        return (
            f"{other} and {baseline} do NOT differ beyond the noise of {len(first)} {unit}: "
            f"{size} (standard error {error})."
        )
    word = "better" if gain > 0 else "WORSE"
    return (
        f"{other} is {word} than {baseline} by {size} (standard error {error} over {len(first)} "
        f"{unit}; one seed: another training may differ by more)."
    )


def compare_arms(
    arms: Mapping[str, Sequence[float]], baseline: str, other: str, metric: Metric = ACCURACY
) -> str:
    """``verdict`` of two arms whose runs share seeds."""
    return verdict(baseline, other, compare(arms[baseline], arms[other]), metric)


def show_arms(
    page: Page,
    sentence: str,
    arms: Mapping[str, Sequence[float]],
    seeds: Sequence[int],
    references: Mapping[str, float] | None = None,
    metric: Metric = ACCURACY,
    name: str = "accuracy",
    drawn: Sequence[str] | None = None,
) -> str:
    """Put a comparison on a page: what it says, its table and its plot.

    Args:
        page: gets them, the plot also as a file of that ``name``.
        sentence: of ``compare_arms`` or ``compare_runs``.
        arms: values of each arm, one a seed.
        seeds: names of the columns.
        references: values with no seeds of their own, such as the teacher's.
        metric: what the values are.
        name: of the plot.
        drawn: the references that the plot shows; all when None.

    Returns:
        Table and sentence as text for the terminal.
    """
    header, rows = arms_rows(arms, seeds, references, metric)
    caption = "Mean over seeds with its standard deviation; dots are seeds, lines join equal seeds."
    page.verdict(sentence).table(header, rows)
    levels = {key: v for key, v in (references or {}).items() if drawn is None or key in drawn}
    page.figure(arms_figure(arms, levels, metric), caption, name)
    return f"{text_table(header, rows)}\n\n{sentence}"


def arms_figure(
    arms: Mapping[str, Sequence[float]],
    references: Mapping[str, float] | None = None,
    metric: Metric = ACCURACY,
) -> Any:
    """Bars of the means with every seed as a dot, seeds joined by lines, references as levels."""
    figure, axes = subplots()
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
            f"{label}: {metric.show(value)}",
            (1, value),
            (0, -12),
            xycoords=("axes fraction", "data"),
            textcoords="offset points",
            ha="right",
            bbox={"facecolor": "white", "alpha": 0.7, "lw": 0, "pad": 1},
        )
    means = [metric.show(spread(values)[0]) for values in arms.values()]
    ticks = [f"{label}\n{mean}" for label, mean in zip(labels, means, strict=True)]
    axes.set_xticks(range(len(labels)), ticks)
    axes.set_ylim(0, 1.02 * max([*(max(v) for v in arms.values()), *(references or {}).values()]))
    if metric.show is percent:
        axes.yaxis.set_major_formatter(lambda value, _: f"{100 * value:.0f} %")
    axes.set_ylabel(metric.label)
    return figure


def intervals_figure(found: Mapping[str, tuple[float, float, float]]) -> Any:
    """Models beside each other: value, and the ends of its interval."""
    figure, axes = subplots(height=0.8 + 0.5 * len(found))
    for i, (label, (value, low, high)) in enumerate(found.items()):
        axes.plot([low, high], [i, i], lw=2, color=COLOURS[i % len(COLOURS)])
        axes.plot([value], [i], "o", color=COLOURS[i % len(COLOURS)])
        axes.annotate(f"{label}: {percent(value)}", (value, i), (0, 8), textcoords="offset points")
    axes.set_ylim(len(found) - 0.5, -0.7)
    axes.set_yticks([])
    axes.xaxis.set_major_formatter(lambda value, _: f"{100 * value:.0f} %")
    axes.spines[["left"]].set_visible(False)
    return figure
