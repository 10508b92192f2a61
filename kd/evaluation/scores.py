"""Accuracy with an interval, spread over seeds, and paired comparisons with a standard error."""

from __future__ import annotations

import math
import statistics
from collections.abc import Callable, Sequence
from dataclasses import dataclass

from kd.traces import Exact, Trace, split_completion

Z_95 = 1.959964


@dataclass(frozen=True)
class Score:
    """How many problems were answered right.

    Attributes:
        correct: one entry per problem.
    """

    correct: tuple[bool, ...]

    @property
    def accuracy(self) -> float:
        """The share answered right."""
        return sum(self.correct) / len(self.correct)

    @property
    def interval(self) -> tuple[float, float]:
        """Wilson's 95 % interval for the accuracy over problems like these."""
        n, p = len(self.correct), self.accuracy
        middle = (p + Z_95**2 / (2 * n)) / (1 + Z_95**2 / n)
        half = Z_95 / (1 + Z_95**2 / n) * math.sqrt(p * (1 - p) / n + Z_95**2 / (4 * n * n))
        return max(0.0, middle - half), min(1.0, middle + half)


@dataclass(frozen=True)
class Comparison:
    """Arm B minus arm A over paired runs (the same seeds).

    Attributes:
        difference: mean of the differences.
        error: its standard error over the pairs; NaN for fewer than two.
        differences: one per pair.
    """

    difference: float
    error: float
    differences: tuple[float, ...]

    @property
    def verdict(self) -> str:
        """ "higher", "lower" or "unclear": is the difference beyond two standard errors?"""
        if not self.error < abs(self.difference) / 2:
            return "unclear"
        return "higher" if self.difference > 0 else "lower"


def is_right(completion: str, reference: str) -> bool:
    """Whether the answer behind the thought is the reference, as the verifier ``exact`` says."""
    think, answer = split_completion(completion)
    return Exact()(Trace("", think, answer, reference=reference)).correct


def score(
    completions: Sequence[str],
    references: Sequence[str],
    is_correct: Callable[[str, str], bool] = is_right,
) -> Score:
    """Score completions against references.

    Args:
        completions: what the model wrote.
        references: the right answers, in the same order.
        is_correct: (completion, reference) to right or wrong; by default ``is_right``.

    Returns:
        The score; every problem counts, an unfinished completion is wrong.
    """
    if len(completions) != len(references):
        raise ValueError(
            "score: completions and references must have the same length, got "
            f"{len(completions)} and {len(references)}. Generate one completion per problem."
        )
    if not completions:
        raise ValueError("score: completions must not be empty, got 0 of them.")
    pairs = zip(completions, references, strict=True)
    return Score(tuple(bool(is_correct(completion, reference)) for completion, reference in pairs))


def spread(values: Sequence[float]) -> tuple[float, float]:
    """Mean and sample standard deviation (NaN for a single value)."""
    deviation = statistics.stdev(values) if len(values) > 1 else math.nan
    return statistics.fmean(values), deviation


def compare(baseline: Sequence[float], other: Sequence[float]) -> Comparison:
    """Other minus baseline, run by run; run i of both arms must share seed and data order."""
    if len(baseline) != len(other) or not baseline:
        raise ValueError(
            "compare: baseline and other must have the same length of at least 1, got "
            f"{len(baseline)} and {len(other)}. Run both arms on the same seeds."
        )
    differences = tuple(b - a for a, b in zip(baseline, other, strict=True))
    mean, deviation = spread(differences)
    return Comparison(mean, deviation / math.sqrt(len(differences)), differences)
