"""Verifiers that run in a worker process, which is killed when it takes too long or too much."""

from __future__ import annotations

import json
import os
import secrets
import selectors
import subprocess
import sys
import threading
import time
import weakref
from importlib import metadata
from pathlib import Path
from typing import Any, ClassVar

from kd.traces.trace import Trace
from kd.traces.verifiers.answers import final_answer
from kd.traces.verifiers.verdict import UNKNOWN, Verdict

START_SECONDS = 120.0
_WORKER = Path(__file__).with_name("worker.py")


class Worker:
    """One worker process; started on first use, killed and replaced after a time-out.

    Not for several threads at once: ``_Threads`` gives each its own.
    """

    def __init__(self) -> None:
        self._process: subprocess.Popen[bytes] | None = None

    def ask(self, request: dict[str, Any], seconds: float) -> Verdict:
        """Send a request and wait for its answer at most so long; starting up does not count."""
        process = self._start(str(request.get("task", "")))
        if process is None:
            detail = f"it did not start within {START_SECONDS:g} s, or its library is missing"
            return Verdict("error", "verifier crashed", detail=detail)
        nonce = secrets.token_hex(8)
        line = json.dumps({**request, "nonce": nonce}).encode() + b"\n"
        try:
            assert process.stdin is not None
            process.stdin.write(line)
            process.stdin.flush()
            answer = self._read(process, time.monotonic() + seconds)
        except OSError as error:
            self.close()
            return Verdict("error", "verifier crashed", detail=str(error))
        if answer is None:
            dead = process.poll()
            self.close()
            if dead is not None:
                return Verdict("error", "verifier crashed", detail=f"exit status {dead}")
            return Verdict(UNKNOWN, "verifier timed out", detail=f"after {seconds:g} s")
        try:
            echoed, status, reason, detail = json.loads(answer)
        except ValueError:
            echoed, status, reason, detail = "", "", "", ""
        if echoed != nonce:
            self.close()
            return Verdict("error", "verifier crashed", detail="its answer was not readable")
        return Verdict(status, reason, detail=detail)

    def close(self) -> None:
        """End the process."""
        process, self._process = self._process, None
        if process is not None:
            process.kill()
            process.wait()
            for pipe in (process.stdin, process.stdout):
                if pipe is not None:
                    try:
                        pipe.close()
                    except OSError:
                        pass

    def _start(self, task: str) -> subprocess.Popen[bytes] | None:
        if self._process is None or self._process.poll() is not None:
            self.close()
            self._process = subprocess.Popen(
                [sys.executable, "-I", str(_WORKER), task],
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                stderr=subprocess.DEVNULL,
                start_new_session=True,
            )
            weakref.finalize(self, _kill, self._process)
            # imports take seconds, and many on a busy machine
            if self._read(self._process, time.monotonic() + START_SECONDS) != b"ready\n":
                self.close()
        return self._process

    def _read(self, process: subprocess.Popen[bytes], until: float) -> bytes | None:
        assert process.stdout is not None
        handle = process.stdout.fileno()
        line = b""
        with selectors.DefaultSelector() as selector:
            selector.register(handle, selectors.EVENT_READ)
            while not line.endswith(b"\n"):
                left = until - time.monotonic()
                if left <= 0 or not selector.select(left):
                    return None
                part = os.read(handle, 65536)
                if not part or len(line) > 2**20:
                    process.wait(1)
                    return None
                line += part
        return line


def _kill(process: subprocess.Popen[bytes]) -> None:
    if process.poll() is None:
        process.kill()
        process.wait()


class _Threads(threading.local):
    def __init__(self) -> None:
        self.worker = Worker()


class ReasoningGym:
    """reasoning-gym's own scorer; the item is in ``metadata["gym"]``, as ``gym_problems`` puts it.

    Args:
        seconds: a score may take; the worker is killed then.
    """

    reads: ClassVar[tuple[str, ...]] = ("gym",)

    def __init__(self, seconds: float = 20.0) -> None:
        self.seconds = seconds
        self._threads = _Threads()

    def __repr__(self) -> str:
        return f"ReasoningGym(seconds={self.seconds})"

    @property
    def version(self) -> str:
        """Of this class, and of the package whose scorers decide."""
        try:
            return f"2 of reasoning-gym {metadata.version('reasoning-gym')}"
        except metadata.PackageNotFoundError:
            return "2"

    def __call__(self, trace: Trace) -> Verdict:
        item = trace.metadata.get("gym")
        if not item:
            return Verdict(UNKNOWN, "not a reasoning-gym item")
        request = {"task": "gym", "dataset": item["dataset"], "entry": item["entry"]}
        whole = trace.answer[-20_000:].strip()
        answers = list(dict.fromkeys((final_answer(whole), whole)))  # grids take several lines
        return self._threads.worker.ask({**request, "answers": answers}, self.seconds)


def gym_problems(dataset: str, size: int, seed: int = 0, **options: Any) -> list[Trace]:
    """Problems of one reasoning-gym family as traces to be answered.

    Args:
        dataset: the family, such as "chain_sum".
        size: how many.
        seed: the same seed gives the same problems.
        **options: of the family, such as ``min_terms=2``.
    """
    import reasoning_gym

    made = []
    for entry in reasoning_gym.create_dataset(dataset, size=size, seed=seed, **options):
        plain = json.loads(json.dumps(entry, default=str))
        reference = "" if entry["answer"] is None else str(entry["answer"])
        noted = {"gym": {"dataset": dataset, "entry": plain}}
        made.append(
            Trace(
                entry["question"],
                source="reasoning-gym",
                domain=dataset,
                reference=reference,
                metadata=noted,
            )
        )
    return made
