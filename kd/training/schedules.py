"""Weights and temperatures that change over a run: a number, ``linear`` or ``cosine``."""

from __future__ import annotations

import math
from dataclasses import dataclass

SHAPES = ("linear", "cosine")


@dataclass(frozen=True)
class Schedule:
    """A value by optimiser step: ``start``, then towards ``end``, which it keeps.

    Attributes:
        start: the value up to step ``delay``.
        end: the value from step ``delay + steps`` on.
        shape: "linear", or "cosine" (half a period: slow, fast, slow).
        steps: how long the change takes; None: until the run's last step.
        delay: optimiser steps before it begins.
    """

    start: float
    end: float
    shape: str = "linear"
    steps: int | None = None
    delay: int = 0

    def __post_init__(self) -> None:
        if self.shape not in SHAPES:
            raise ValueError(
                f"Schedule: shape must be one of {', '.join(SHAPES)}, got {self.shape!r}. "
                "A constant is a plain number."
            )
        if not (math.isfinite(self.start) and math.isfinite(self.end)):
            raise ValueError(
                f"Schedule: start and end must be finite, got {self.start} and {self.end}."
            )
        if self.delay < 0 or (self.steps is not None and self.steps < 1):
            raise ValueError(
                "Schedule: steps must be at least 1 and delay at least 0, got "
                f"{self.steps} and {self.delay}."
            )

    def at(self, step: int, total: int) -> float:
        """The value in a step, counted from 0, of a run of ``total`` steps."""
        steps = self.steps if self.steps is not None else max(total - 1 - self.delay, 1)
        share = min(max((step - self.delay) / steps, 0.0), 1.0)
        if self.shape == "cosine":
            share = 0.5 - 0.5 * math.cos(math.pi * share)
        return self.start + (self.end - self.start) * share


def linear(start: float, end: float, steps: int | None = None, delay: int = 0) -> Schedule:
    """From ``start`` to ``end`` in a straight line; by the run's last step if ``steps`` is None."""
    return Schedule(start, end, "linear", steps, delay)


def cosine(start: float, end: float, steps: int | None = None, delay: int = 0) -> Schedule:
    """From ``start`` to ``end`` on half a cosine; by the run's last step if ``steps`` is None."""
    return Schedule(start, end, "cosine", steps, delay)


def ends(value: float | Schedule) -> tuple[float, ...]:
    """The least and largest that a number or a schedule comes to, in its order."""
    return (value.start, value.end) if isinstance(value, Schedule) else (value,)
