"""A cgroup for one run, where version 2 is there and may be written: it limits memory and tasks
as a whole, whatever they are held by, and kills what is left over."""

from __future__ import annotations

import itertools
import os
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from kd.sandbox.runs import Limits

NEEDED = {"memory", "pids"}
_numbers = itertools.count()


class Cgroups:
    """The place where cgroups for runs can be made.

    Args:
        mounts: the kernel's list of mounts.
        own: the kernel's file that names the cgroup of this process.

    Attributes:
        parent: the folder they are made in: the nearest one above this process that hands memory
            and pids on to its children and may be written; None where there is none.
        reason: why there is none.
    """

    def __init__(
        self, mounts: str = "/proc/self/mountinfo", own: str = "/proc/self/cgroup"
    ) -> None:
        self.parent: Path | None = None
        self.reason = "no cgroup v2 is mounted"
        root = _mounted(Path(mounts))
        if root is None:
            return
        lines = _text(Path(own)).splitlines()
        name = next((line[3:] for line in lines if line.startswith("0::/")), "/")
        self.reason = "no cgroup v2 above this process hands on memory and pids"
        folder = root / name.lstrip("/")
        for candidate in (folder, *folder.parents):
            if candidate != root and root not in candidate.parents:
                break
            if set(_text(candidate / "cgroup.subtree_control").split()) >= NEEDED:
                if all(os.access(p, os.W_OK) for p in (candidate, candidate / "cgroup.procs")):
                    self.parent, self.reason = candidate, ""
                    return
                self.reason = f"{candidate} may not be written"

    def __str__(self) -> str:
        return f"cgroup v2 in {self.parent}" if self.parent else f"no cgroup ({self.reason})"

    @contextmanager
    def one(self, limits: Limits) -> Iterator[Path]:
        """A fresh cgroup; whatever still runs in it at the end is killed, and it is removed."""
        assert self.parent is not None
        folder = self.parent / f"kd-sandbox-{os.getpid()}-{next(_numbers)}"
        folder.mkdir()
        try:
            # the tmpfs counts as memory too
            (folder / "memory.max").write_text(str(limits.memory + limits.disk))
            (folder / "pids.max").write_text(str(limits.processes + 4))  # and bwrap's own
            for name, value in (("memory.swap.max", "0"), ("memory.oom.group", "1")):
                if (folder / name).exists():  # without swap there is no limit of it
                    (folder / name).write_text(value)
            yield folder
        finally:
            _remove(folder)


def ran_out_of_memory(folder: Path) -> bool:
    """Whether the kernel killed something of this cgroup for its memory."""
    events = dict(line.split() for line in _text(folder / "memory.events").splitlines())
    return int(events.get("oom_kill", 0)) > 0


def _remove(folder: Path) -> None:
    if (folder / "cgroup.kill").exists():
        (folder / "cgroup.kill").write_text("1")
    for attempt in range(100):  # the killed leave it a moment later
        try:
            folder.rmdir()
            return
        except OSError:
            if attempt == 99:
                raise
            time.sleep(0.01)


def _mounted(mounts: Path) -> Path | None:
    for line in _text(mounts).splitlines():
        before, _, after = line.partition(" - ")
        if after.startswith("cgroup2 "):
            return Path(before.split()[4])
    return None


def _text(path: Path) -> str:
    try:
        return path.read_text()
    except OSError:
        return ""
