"""Capture progress: a line that redraws itself on a terminal, one every ten seconds in a log."""

from __future__ import annotations

import sys
import time

LOG_EVERY_S = 10.0


class Meter:
    """Shows tokens done, tokens per second and the time left, on standard error.

    Args:
        total: tokens to do in all, or None when unknown.
        show: print nothing when False.
    """

    def __init__(self, total: int | None, show: bool) -> None:
        self.total, self.show = total, show
        self.done = self.fresh = 0
        self._terminal = sys.stderr.isatty()
        self._start = self._shown = time.perf_counter()

    def advance(self, tokens: int, fresh: bool) -> None:
        """Count tokens; ``fresh`` ones were computed now and not found in the cache."""
        self.done += tokens
        self.fresh += tokens if fresh else 0
        now = time.perf_counter()
        if self.show and now - self._shown >= (0.2 if self._terminal else LOG_EVERY_S):
            self._shown = now
            self._write(self.line(), end="" if self._terminal else "\n")

    def rate(self) -> float:
        """Fresh tokens a second since the start."""
        return self.fresh / max(time.perf_counter() - self._start, 1e-9)

    def line(self) -> str:
        text = f"teacher: {self.done:,}"
        if self.total:
            text += f" of {self.total:,}"
        text += f" tokens, {self.rate():,.0f} tokens/s"
        if self.total and self.fresh:
            text += f", {clock((self.total - self.done) / self.rate())} left"
        return text

    def close(self) -> None:
        if self.show and self._terminal:
            self._write(self.line(), end="\n")

    def _write(self, text: str, end: str) -> None:
        start = "\r\033[K" if self._terminal else ""
        print(start + text, end=end, file=sys.stderr, flush=True)


def clock(seconds: float) -> str:
    minutes, rest = divmod(int(max(seconds, 0)), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours}:{minutes:02d}:{rest:02d}" if hours else f"{minutes}:{rest:02d}"
