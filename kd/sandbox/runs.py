"""What a run may use, what came of it, and the supervisor that both backends share."""

from __future__ import annotations

import os
import selectors
import signal
import subprocess
import time
from dataclasses import dataclass
from pathlib import Path
from typing import IO, Any

LOOK = 0.1  # seconds between two looks at what a run holds
PATIENCE = 3  # on a busy machine a run may take so many times its seconds longer
GONE = 2.0  # seconds that killed processes may take to go
HELD = ("RssAnon", "RssShmem", "VmSwap", "VmPTE")


@dataclass(frozen=True)
class Limits:
    """What one run may use.

    Attributes:
        seconds: of wall clock, without the time that it was ready and waited for a processor that
            others used (of that, at most ``PATIENCE`` times as much is granted); the processor gets
            one second more.
        memory: bytes of the program: its address space and, where there is a cgroup, all that it
            makes the kernel hold.
        disk: bytes of one file, and of the whole tmpfs.
        output: bytes of stdout and stderr together.
        processes: tasks, threads included; the program cannot start a second process anyway.
        files: files, folders and links of the tmpfs together.
    """

    seconds: float = 5.0
    memory: int = 2**30
    disk: int = 16 * 2**20
    output: int = 2**20
    processes: int = 64
    files: int = 1024

    def __post_init__(self) -> None:
        for name in ("seconds", "memory", "disk", "output", "processes", "files"):
            value = getattr(self, name)
            if not value > 0:
                raise ValueError(f"Limits: {name} must be above 0, got {value!r}.")


@dataclass(frozen=True)
class Run:
    """What came of a run.

    Attributes:
        status: "done", "time limit", "output limit", "memory limit" (an allocation that is merely
            refused ends as the program takes it), or "sandbox error" (says nothing about the
            program).
        code: its exit status, negative for a signal; None where it was killed by us.
        stdout: what it wrote, as text with replacement characters.
        stderr: likewise.
        seconds: wall clock.
    """

    status: str
    code: int | None = None
    stdout: str = ""
    stderr: str = ""
    seconds: float = 0.0


class SandboxClosed(OSError):
    """The sandbox does not run anything here; the message says why."""


def supervise(
    process: subprocess.Popen[bytes], stdin: bytes, limits: Limits, *, watch: bool = False
) -> Run:
    """Feed a process, read what it writes up to the cap, and kill its whole group at the end.

    Args:
        watch: end it too when it and its descendants hold more memory than it may (``held``).
    """
    started = time.monotonic()
    parts: dict[str, bytearray] = {"stdout": bytearray(), "stderr": bytearray()}
    status = _converse(process, stdin, limits, parts, watch)
    _kill(process)
    for handle in (process.stdin, process.stdout, process.stderr):
        try:
            handle.close()  # type: ignore[union-attr]
        except OSError:  # what is left of the input cannot be flushed to the dead
            continue
    texts = {k: bytes(v[: limits.output]).decode("utf-8", "replace") for k, v in parts.items()}
    code = process.returncode if status == "done" else None
    return Run(status, code, texts["stdout"], texts["stderr"], time.monotonic() - started)


def _converse(
    process: subprocess.Popen[bytes],
    stdin: bytes,
    limits: Limits,
    parts: dict[str, bytearray],
    watch: bool,
) -> str:
    """Talk until it has ended or must end; the status. What it wrote is added to the parts."""
    until = until_quiet = time.monotonic() + limits.seconds
    pipes: dict[str, IO[bytes]] = {"stdout": process.stdout, "stderr": process.stderr}  # type: ignore[dict-item]
    feed = memoryview(stdin)
    next_look = time.monotonic() + LOOK
    with selectors.DefaultSelector() as selector:
        for name, pipe in pipes.items():
            selector.register(pipe, selectors.EVENT_READ, name)
        assert process.stdin is not None
        os.set_blocking(process.stdin.fileno(), False)
        selector.register(process.stdin, selectors.EVENT_WRITE, "stdin")
        while selector.get_map() or process.poll() is None:
            now = time.monotonic()
            if now >= until:
                waited = starved(process.pid)
                granted = until_quiet + min(waited, PATIENCE * limits.seconds)
                if now >= granted:
                    return "time limit"
                until = granted
            if watch and now >= next_look:
                next_look = now + LOOK
                if held(process.pid) > limits.memory + limits.disk:
                    return "memory limit"
            if not selector.get_map():  # it closed its output and goes on, or is about to end
                _wait(process, min(until - now, LOOK))
                continue
            for key, _ in selector.select(min(until - now, LOOK) if watch else until - now):
                if key.data == "stdin":
                    feed = _feed(key.fileobj, feed, selector)
                    continue
                data = os.read(key.fd, 65536)
                if not data:
                    selector.unregister(key.fileobj)
                parts[key.data] += data
                if sum(map(len, parts.values())) > limits.output:
                    return "output limit"
    return "done"


def _wait(process: subprocess.Popen[bytes], seconds: float) -> None:
    try:
        process.wait(seconds)
    except subprocess.TimeoutExpired:
        return


def can_be_watched() -> bool:
    """Whether the kernel tells a process's children (CONFIG_PROC_CHILDREN)."""
    return os.path.exists(f"/proc/self/task/{os.getpid()}/children")


def held(pid: int) -> int:
    """Bytes that a process and its descendants hold, the page tables included, which no rlimit
    bounds: a program that spreads its pages makes them twice as large as its pages."""
    total = 0
    for member in _family(pid):
        try:
            fields = dict(line.split(":", 1) for line in Path(f"/proc/{member}/status").open())
        except (OSError, ValueError):  # it has ended
            continue
        total += sum(int(fields.get(name, "0").split()[0]) for name in HELD) * 1024
    return total


def starved(pid: int) -> float:
    """Seconds that a process and its descendants were ready to run and did not; 0 where the
    kernel does not count them."""
    total = 0
    for member in _family(pid):
        try:
            total += int(Path(f"/proc/{member}/schedstat").read_text().split()[1])
        except (OSError, IndexError):  # it has ended, or nothing is counted
            continue
    return total / 1e9


def _family(pid: int) -> list[int]:
    """A process and its descendants."""
    found = [pid]
    for member in found:
        for path in Path(f"/proc/{member}/task").glob("*/children"):
            try:
                found += map(int, path.read_text().split())
            except OSError:  # it has ended
                continue
    return found


def _kill(process: subprocess.Popen[bytes]) -> None:
    """Kill its group, and wait for its descendants too: a pid namespace dies with its first
    process, but a moment later."""
    family = _family(process.pid)
    try:
        os.killpg(process.pid, signal.SIGKILL)
    except (ProcessLookupError, PermissionError):
        process.kill()
    process.wait()
    until = time.monotonic() + GONE
    while time.monotonic() < until and any(map(_alive, family)):
        time.sleep(0.002)


def _alive(pid: int) -> bool:
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] != "Z"
    except OSError:
        return False


def _feed(pipe: Any, feed: memoryview, selector: selectors.BaseSelector) -> memoryview:
    try:
        feed = feed[os.write(pipe.fileno(), feed[:65536]) :] if feed else feed
    except BlockingIOError:
        return feed
    except OSError:  # it does not read its input
        feed = feed[:0]
    if not feed:
        selector.unregister(pipe)
        pipe.close()
    return feed
