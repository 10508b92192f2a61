"""Runs groups of implementations on the same inputs, interleaved, and keeps what was measured.

A group is one suite, shape, dtype and divergence. Each of its implementations is a process of its
own; they share the inputs, are checked against the oracle before they are timed, and take turns
round by round, so that a slow minute of the machine falls on all of them. A group's result is one
file that appears whole or not at all, and a rerun continues with the groups that are missing.
"""

from __future__ import annotations

import contextlib
import dataclasses
import functools
import json
import shutil
import statistics
import tempfile
import time
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

from kd.files import write_json
from kd_bench import machine, pipelines
from kd_bench.implementations import IMPLEMENTATIONS
from kd_bench.inputs import DTYPES, exact_answer, first_rows, make_inputs, save, save_truth
from kd_bench.peers import add_peers_to_path, version_of
from kd_bench.process import Process
from kd_bench.shapes import PIPELINE_SUITES, Shape, floor_bytes, floor_flops
from kd_bench.steps import Implementation, is_floor

MEMORY_SHARE = 0.7
FLOOR_MEMORY = 300 << 20
"""Extra bytes that an arrangement of the bare matmuls may take to count as the floor."""
SLOW = 2.5
"""Times the fastest of a group: what is slower gets fewer rounds when time is short."""
FUSED = ("linear", "linear-sparse", "cross-entropy")


@dataclasses.dataclass(frozen=True)
class Group:
    """Implementations that are compared with one another."""

    suite: str
    shape: Shape
    dtype: str
    divergence: str = "forward_kl"

    @property
    def name(self) -> str:
        return "/".join((self.suite, self.shape.name, self.dtype, self.divergence))

    @property
    def file_name(self) -> str:
        safe = "".join(c if c.isalnum() or c in ".-_()" else "_" for c in self.name)
        return f"{safe}.json"

    def entrants(self, against: tuple[str, ...] | None = None) -> list[Implementation]:
        """kd, and the implementations whose names hold one of ``against`` (all when None)."""
        chosen = [i for i in IMPLEMENTATIONS.values() if i.takes(self.suite, self.divergence)]
        chosen = [i for i in chosen if self._differs(i)]
        if against is None and self.shape.name.startswith("scaling"):
            against = ("pytorch", "chunk 128")  # what a fitted exponent needs, in minutes
            chosen = [i for i in chosen if "compiled" not in i.name]
        if against is None:
            return chosen
        return [i for i in chosen if i.name == "kd" or any(part in i.name for part in against)]

    def _differs(self, implementation: Implementation) -> bool:
        """False for bare matmuls whose chunk holds all tokens, as a smaller one does already."""
        _, is_chunk, rows = implementation.name.partition("matmuls alone, chunk ")
        return not is_chunk or int(rows) == 128 or int(rows) < 2 * self.shape.tokens

    def input_bytes(self) -> int:
        s, itemsize = self.shape, DTYPES[self.dtype].itemsize
        elements = {"dense": 2, "sparse": 1, "selection": 1}.get(self.suite, 0) * s.tokens * s.vocab
        if self.suite in FUSED:
            elements += (s.vocab + s.tokens) * s.student_hidden
        if self.suite == "linear":
            elements += (s.vocab + s.tokens) * s.teacher_hidden
        return elements * itemsize

    def needs(self, implementation: Implementation) -> int:
        """Rough peak of one implementation in bytes: inputs, gradients, [N, V] temporaries."""
        if self.suite in PIPELINE_SUITES:
            return pipelines.memory_needed(self.suite, self.shape, DTYPES[self.dtype].itemsize)
        s, wide = self.shape, implementation.copies * self.shape.tokens * self.shape.vocab * 4
        gradients = 0
        if self.suite in FUSED:
            gradients = s.vocab * s.student_hidden * 4
            if implementation.name.startswith(("kd", "matmuls")):
                wide = min(wide, 512 << 20)
        return int(self.input_bytes() + gradients + wide)


@contextlib.contextmanager
def prepared_inputs(group: Group, scratch: Path | None) -> Iterator[Path]:
    """A folder with the group's inputs and the oracle's answer."""
    with tempfile.TemporaryDirectory(prefix="kd-bench-", dir=scratch) as name:
        folder = Path(name)
        inputs = make_inputs(group.suite, group.shape, DTYPES[group.dtype])
        save(inputs, folder)
        truth = exact_answer(group.suite, group.divergence, first_rows(inputs))
        save_truth(truth, folder / "truth.pt")
        del inputs
        yield folder


def run_group(
    group: Group,
    *,
    device: str = "cpu",
    against: tuple[str, ...] | None = None,
    rounds: int = 5,
    seconds: float = 60.0,
    scratch: Path | None = None,
    say: Any = print,
) -> dict[str, Any]:
    """Measure one group.

    Args:
        group: what to measure.
        device: "cpu" or "cuda".
        against: parts of implementations' names; kd itself always takes part.
        rounds: how often each implementation is timed, at least; more while time is left.
        seconds: time for the timed rounds of the group; rounds are cut to three when it runs out.
        scratch: where the shared inputs are written; the system's temporary folder by default.
        say: receives a line of progress.

    Returns:
        {"group": ..., "rows": [...], "ceilings": {...}, "machine": {...}}.
    """
    add_peers_to_path()
    rows: dict[str, dict[str, Any]] = {}
    reason = _inputs_do_not_fit(group, scratch)
    if reason:
        say(f"  {reason}")
        for implementation in group.entrants(against):
            rows[implementation.name] = _new_row(group, implementation, device) | {
                "skipped": reason
            }
        return _result(group, rows, device)
    with prepared_inputs(group, scratch) as folder, contextlib.ExitStack() as stack:
        running: dict[str, Process] = {}
        for implementation in group.entrants(against):
            row = _new_row(group, implementation, device)
            rows[implementation.name] = row
            if "skipped" in row:
                say(f"  {implementation.name}: {row['skipped']}")
                continue
            process = Process(folder, group, device, implementation)  # all import at once
            stack.callback(process.close)
            running[implementation.name] = process
        for name, process in list(running.items()):
            if not _prepare(process, rows[name], say):
                process.close()
                del running[name]
            elif device != "cpu":  # a card's memory is not shared: one at a time
                _time({name: process}, rows, rounds, seconds / 4)
                process.close()
        if device == "cpu":
            _time(running, rows, rounds, seconds)
    floor = floor_rounds(rows.values())
    for row in rows.values():
        row["floor_seconds"] = floor[: len(row["seconds"])]
        if row["seconds"]:
            say(f"  {row['implementation']}: median {statistics.median(row['seconds']):.4g} s")
    return _result(group, rows, device)


def _result(group: Group, rows: dict[str, dict[str, Any]], device: str) -> dict[str, Any]:
    for row in rows.values():
        row.setdefault("floor_seconds", [])
    return {
        "group": group.name,
        "rows": list(rows.values()),
        "ceilings": _ceilings(device, group.dtype),
        "machine": machine.machine_info(device),
        "command": machine.command_line(),
        "measured_at": time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime()),
    }


@functools.cache
def _ceilings(device: str, dtype: str) -> dict[str, float]:
    """Measured once in a run, for each dtype."""
    return machine.ceilings(device, (dtype,))


def _inputs_do_not_fit(group: Group, scratch: Path | None) -> str:
    """Why a group's inputs cannot be made here: they are made on the host and kept in files."""
    size = group.input_bytes()
    wide = 2 * size + 8 * group.shape.vocab * max(group.shape.student_hidden, 1)
    if wide > MEMORY_SHARE * machine.free_memory("cpu"):
        return f"its inputs need about {wide / 2**30:.1f} GiB of the host's memory"
    free = shutil.disk_usage(scratch or tempfile.gettempdir()).free
    if size > MEMORY_SHARE * free:
        return f"its inputs need {size / 2**30:.1f} GiB of the {free / 2**30:.1f} GiB free on disk"
    return ""


def floor_rounds(rows: Iterable[dict[str, Any]]) -> list[float]:
    """Seconds, round by round, of the fastest arrangement of the bare matmuls; or nothing.

    One that keeps more than ``FLOOR_MEMORY`` is shown but is no floor: larger chunks are faster,
    and what a loss does within that memory is the question.
    """
    floors = [
        row["seconds"]
        for row in rows
        if is_floor(row["implementation"])
        and row["seconds"]
        and (row["suite"] == "capture" or row.get("extra_memory", 0) <= FLOOR_MEMORY)
    ]
    return min(floors, key=statistics.median, default=[])


def merged(old: dict[str, Any], new: dict[str, Any]) -> dict[str, Any]:
    """Two runs of one group with other rivals as one: rows of both, rounds of those in both added.

    Each row keeps the floor's rounds of its own run beside its own, so ratios stay paired.
    """
    rows = {row["implementation"]: row for row in old["rows"]}
    for row in new["rows"]:
        before = rows.get(row["implementation"])
        if before is not None and before["seconds"] and row["seconds"]:
            both = ("seconds", "floor_seconds")
            row = {**before, **{key: before[key] + row[key] for key in both}}
        elif before is not None and before["seconds"]:
            continue
        rows[row["implementation"]] = row
    return {**new, "rows": list(rows.values())}


def _new_row(group: Group, implementation: Implementation, device: str) -> dict[str, Any]:
    itemsize = DTYPES[group.dtype].itemsize
    row: dict[str, Any] = {
        "suite": group.suite,
        "shape": dataclasses.asdict(group.shape),
        "dtype": group.dtype,
        "divergence": group.divergence,
        "implementation": implementation.name,
        "note": implementation.note,
        "floor_flops": floor_flops(group.suite, group.shape),
        "floor_bytes": floor_bytes(group.suite, group.shape, itemsize),
        "seconds": [],
    }
    version = version_of(implementation.package)
    row["version"] = version
    needed, free = group.needs(implementation), machine.free_memory(device)
    if version is None:
        row["skipped"] = implementation.missing or f"{implementation.package} is not installed"
    elif implementation.needs_gpu and device == "cpu":
        row["skipped"] = "needs a GPU: on a CPU its Triton kernels would run in an interpreter"
    elif needed > MEMORY_SHARE * free:
        row["skipped"] = f"needs about {needed / 2**30:.1f} GiB of {free / 2**30:.1f} GiB free"
    return row


def _prepare(process: Process, row: dict[str, Any], say: Any) -> bool:
    """Check the answer, then the first whole step with its memory; False where it fails."""
    for command in ("memory",) if is_floor(row["implementation"]) else ("check", "memory"):
        answer = process.ask(command)
        if "error" in answer:
            row["skipped"] = answer["error"]
            say(f"  {row['implementation']}: {answer['error']}")
            return False
        row.update(answer)
    return True


def _time(
    running: dict[str, Process], rows: dict[str, dict[str, Any]], rounds: int, seconds: float
) -> None:
    """Take turns: every implementation once a round, the order reversed every other round.

    When the time is up, one that is much slower than the fastest has two rounds, the others three.
    """
    deadline = time.perf_counter() + seconds
    names = [name for name in running if "skipped" not in rows[name]]
    for number in range(1000):
        for name in names if number % 2 == 0 else reversed(names):
            answer = running[name].ask("time")
            if "error" in answer:
                rows[name]["skipped"] = answer["error"]
            else:
                rows[name]["seconds"].append(answer["seconds"])
        names = [name for name in names if "skipped" not in rows[name]]
        if number + 1 >= rounds and not _short(rows):
            return
        if time.perf_counter() > deadline:
            names = [name for name in names if number + 1 < _least(name, rows, rounds)]
        if not names:
            return


def _least(name: str, rows: dict[str, dict[str, Any]], rounds: int) -> int:
    """Rounds that an implementation gets even when the time is up."""
    fastest = min(min(row["seconds"]) for row in rows.values() if row["seconds"])
    return min(rounds, 2 if min(rows[name]["seconds"]) > SLOW * fastest else 3)


def _short(rows: dict[str, dict[str, Any]]) -> bool:
    """Whether steps are so quick that more rounds cost nothing: under 20 ms, up to 30 rounds."""
    timed = [row["seconds"] for row in rows.values() if row["seconds"]]
    return bool(timed) and max(map(max, timed)) < 0.02 and len(timed[0]) < 30


def run_groups(
    groups: list[Group], folder: Path, *, fresh: bool = False, add: bool = False, **options: Any
) -> None:
    """Measure the groups whose result is not there yet; each becomes one file under ``folder``.

    Args:
        groups: what to measure.
        folder: one JSON file a group; a group that has one is not measured again.
        fresh: measure again and replace.
        add: measure again and add rows and rounds to what is there, for one group in pieces.
        **options: as for ``run_group``.
    """
    say = options.setdefault("say", print)
    folder.mkdir(parents=True, exist_ok=True)
    for number, group in enumerate(groups, 1):
        path = folder / group.file_name
        if path.exists() and not fresh and not add:
            say(f"[{number}/{len(groups)}] {group.name}: measured before")
            continue
        say(f"[{number}/{len(groups)}] {group.name}")
        result = run_group(group, **options)
        if add and path.exists():
            result = merged(json.loads(path.read_text()), result)
        write_json(path, result)
