"""Progress: a line that redraws itself on a terminal, and one every ten seconds in a log."""

from __future__ import annotations

import os
import sys
import time
from types import TracebackType

REDRAW_EVERY_S = 0.2
LOG_EVERY_S = 10.0
BAR = 30


class Progress:
    """Shows on standard error what is done and the time left; silent on ranks other than 0.

    Args:
        description: what is being done.
        total: how many steps there are; None where that is unknown.
        unit: what the steps are, such as "tokens", to show their number and rate.
        show: print nothing when False.
    """

    def __init__(
        self, description: str, total: float | None = None, *, unit: str = "", show: bool = True
    ) -> None:
        self.description, self.total, self.unit = description, total, unit
        self.done = self.fresh = 0.0
        self._show = show and int(os.environ.get("RANK", "0")) == 0
        self._terminal = sys.stderr.isatty()
        self._start = self._shown = time.perf_counter()

    def __enter__(self) -> Progress:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        if self._show and self._terminal:
            self._write(self.line() + "\n" if self.unit else "")

    def advance(self, steps: float = 1, note: str = "", *, fresh: bool = True) -> None:
        """Move on by some steps.

        Args:
            steps: how many.
            note: shown behind the description.
            fresh: False for steps that cost nothing, such as those found in a cache: they are done
                and have no part in the rate.
        """
        self.done += steps
        self.fresh += steps if fresh else 0
        now = time.perf_counter()
        if self._show and now - self._shown >= (REDRAW_EVERY_S if self._terminal else LOG_EVERY_S):
            self._shown = now
            self._write(self.line(note) + ("" if self._terminal else "\n"))

    def to(self, done: float, note: str = "") -> None:
        """Move to an absolute position."""
        self.advance(done - self.done, note)

    def rate(self) -> float:
        """Fresh steps a second since the start."""
        return self.fresh / max(time.perf_counter() - self._start, 1e-9)

    def line(self, note: str = "") -> str:
        """What is shown now."""
        text = f"{self.description} {note}".rstrip() + ":"
        if self.unit:
            of = f" of {self.total:,.0f}" if self.total else ""
            text += f" {self.done:,.0f}{of} {self.unit}, {self.rate():,.0f} {self.unit}/s"
        elif self.total:
            share = min(self.done / self.total, 1.0)
            full = round(BAR * share)
            bar = f" {'━' * full}{'─' * (BAR - full)}" if self._terminal else ""
            text += f"{bar} {100 * share:.0f} %"
        if self.total and self.fresh > 0:
            text += f", {clock((self.total - self.done) / self.rate())} left"
        return text

    def _write(self, text: str) -> None:
        print(("\r\033[K" if self._terminal else "") + text, end="", file=sys.stderr, flush=True)


def clock(seconds: float) -> str:
    """Seconds as 1:02 or 3:04:05."""
    minutes, rest = divmod(int(max(seconds, 0)), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours}:{minutes:02d}:{rest:02d}" if hours else f"{minutes}:{rest:02d}"


def say(text: str) -> None:
    """Print a line (rich markup allowed), on rank 0 only."""
    if int(os.environ.get("RANK", "0")) == 0:
        from rich.console import Console

        Console(highlight=False, soft_wrap=True).print(text)
