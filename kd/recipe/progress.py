"""One progress bar for terminals and logs alike."""

from __future__ import annotations

import os
import sys
import time
from types import TracebackType
from typing import Any

LOG_EVERY_S = 10.0


def console() -> Any:
    from rich.console import Console

    return Console(highlight=False, soft_wrap=True)


def say(text: str) -> None:
    """Print a line (rich markup allowed), on rank 0 only."""
    if int(os.environ.get("RANK", "0")) == 0:
        console().print(text)


class Progress:
    """A bar on a terminal, a line every ten seconds in a log; silent on ranks other than 0.

    Args:
        description: what is being done.
        total: how many steps there are.
    """

    def __init__(self, description: str, total: float) -> None:
        self.description, self.total = description, max(total, 1)
        self.done = 0.0
        self.quiet = int(os.environ.get("RANK", "0")) != 0
        self._bar: Any = None
        self._started = self._logged = time.perf_counter()

    def __enter__(self) -> Progress:
        if not self.quiet and sys.stdout.isatty():
            from rich import progress

            self._bar = progress.Progress(
                progress.TextColumn("{task.description}"),
                progress.BarColumn(),
                progress.TaskProgressColumn(),
                progress.TimeElapsedColumn(),
                progress.TimeRemainingColumn(),
                console=console(),
                transient=True,
            )
            self._bar.start()
            self._task = self._bar.add_task(self.description, total=self.total)
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        if self._bar is not None:
            self._bar.stop()

    def advance(self, steps: float = 1, note: str = "") -> None:
        """Move on by some steps; ``note`` is shown behind the description."""
        self.to(self.done + steps, note)

    def to(self, done: float, note: str = "") -> None:
        """Move to an absolute position."""
        self.done = done
        text = f"{self.description} {note}".rstrip()
        if self._bar is not None:
            self._bar.update(self._task, completed=done, description=text)
            return
        now = time.perf_counter()
        if not self.quiet and now - self._logged >= LOG_EVERY_S:
            self._logged = now
            share = min(done / self.total, 1.0)
            left = (now - self._started) * (1 - share) / max(share, 1e-6)
            print(f"{text}: {100 * share:.0f} %, about {left:.0f} s left", flush=True)
