"""One implementation's process, asked line by line; it may end or hang without harm to others."""

from __future__ import annotations

import contextlib
import json
import os
import select
import subprocess
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Any

from kd_bench.steps import Implementation

if TYPE_CHECKING:
    from kd_bench.runner import Group

ANSWER_SECONDS = 600
"""What does not answer in this time is ended, and its row says so."""


def _own_path() -> list[str]:
    """This process's import path for the workers, without the peers that go last."""
    peers = os.environ.get("KD_PEERS", "").split(os.pathsep)
    return [folder for folder in sys.path if folder and folder not in peers]


def _one_card(device: str) -> dict[str, str]:
    """A worker sees one card: trainers would spread over all of them."""
    if device == "cpu":
        return {}
    return {"CUDA_VISIBLE_DEVICES": os.environ.get("CUDA_VISIBLE_DEVICES", "0").split(",")[0]}


class Process:
    """A worker that answers one command at a time."""

    def __init__(self, folder: Path, group: Group, device: str, implementation: Implementation):
        self.implementation = implementation
        command = [sys.executable, "-m", "kd_bench.worker", str(folder), group.suite]
        self.process = subprocess.Popen(
            [*command, group.divergence, device, implementation.name],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.DEVNULL,
            text=True,
            env={**os.environ, **_one_card(device), "PYTHONPATH": os.pathsep.join(_own_path())},
        )

    def ask(self, command: str) -> dict[str, Any]:
        assert self.process.stdin is not None and self.process.stdout is not None
        try:
            self.process.stdin.write(command + "\n")
            self.process.stdin.flush()
            ready, _, _ = select.select([self.process.stdout], [], [], ANSWER_SECONDS)
            if not ready:
                self.process.kill()
                self.process.wait()
                return {"error": f"took longer than {ANSWER_SECONDS} s for one step"}
            line = self.process.stdout.readline()
        except BrokenPipeError:
            line = ""
        if not line:
            code = self.process.wait()
            reason = "out of memory, or killed" if code < 0 else f"exit status {code}"
            return {"error": f"its process ended ({reason})"}
        return json.loads(line)

    def close(self) -> None:
        with contextlib.suppress(BrokenPipeError, OSError):
            if self.process.poll() is None and self.process.stdin is not None:
                self.process.stdin.write("quit\n")
                self.process.stdin.close()
        try:
            self.process.wait(timeout=20)
        except subprocess.TimeoutExpired:
            self.process.kill()
            self.process.wait()
