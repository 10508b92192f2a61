"""One implementation in a process of its own, told what to do line by line.

    python -m kd_bench.worker FOLDER SUITE DIVERGENCE DEVICE IMPLEMENTATION

Commands on standard input: ``check`` (a step on the first rows, compared with the truth in
``FOLDER/truth.pt``), ``memory`` (a whole step, with its peak), ``time`` (a whole step after one
that is not timed), ``quit``.
Each is answered by one line of JSON.
"""

from __future__ import annotations

import gc
import json
import os
import sys
import time
from pathlib import Path
from typing import Any

import torch

from kd_bench.implementations import IMPLEMENTATIONS
from kd_bench.inputs import errors, first_rows, load, load_truth
from kd_bench.machine import PeakMemory, synchronize
from kd_bench.peers import add_peers_to_path
from kd_bench.steps import Step, answer_of


class Worker:
    """Builds one implementation over mapped inputs and runs its steps."""

    def __init__(self, folder: Path, suite: str, divergence: str, device: str, name: str) -> None:
        add_peers_to_path()
        self.suite, self.divergence, self.device = suite, divergence, device
        self.implementation = IMPLEMENTATIONS[name]
        self.truth = load_truth(folder / "truth.pt")
        self.inputs = load(folder, device)
        for tensor in self.inputs.values():  # bring the mapped pages in, so that they are no news
            tensor.view(-1)[::512].sum()
        self.step: Step | None = None

    def build(self, inputs: dict[str, torch.Tensor]) -> Step:
        return self.implementation.build(self.suite, self.divergence, inputs)

    def check(self) -> dict[str, Any]:
        few = {k: v.clone() if k == "logits" else v for k, v in first_rows(self.inputs).items()}
        step = self.build(few)
        own = getattr(step, "errors", None)
        found = own() if own is not None else errors(self.suite, answer_of(step), self.truth)
        detail = getattr(step, "detail", "")
        return found | ({"detail": detail} if detail else {})

    def memory(self) -> dict[str, Any]:
        """Extra bytes at the peak of a step, above the inputs and the gradients it returns."""
        self.step = self.build(self.inputs)
        gc.collect()
        with PeakMemory(self.device) as peak:
            value, gradients = self.step()
            synchronize(self.device)
        inputs = {tensor.data_ptr() for tensor in self.inputs.values()}
        results = [t for t in gradients.values() if t.data_ptr() not in inputs]
        returned = sum(t.numel() * t.element_size() for t in results)
        return {
            "extra_memory": max(0, peak.extra - returned),
            "returned_memory": returned,
            "whole_value": float(value),
        }

    def time(self) -> dict[str, Any]:
        """Seconds of a step right after another one, as in a training loop.

        The step before is not timed: while the others took their turns, a virtual machine may
        have handed free memory back to its host, and who touches it first pays for that.
        """
        if self.step is None:
            self.step = self.build(self.inputs)
        if getattr(self.step, "warm", True):
            self.step()
        synchronize(self.device)
        started = time.perf_counter()
        self.step()
        synchronize(self.device)
        return {"seconds": time.perf_counter() - started}


def main(arguments: list[str]) -> int:
    answers = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)  # what peers print must not mix with the answers
    folder, suite, divergence, device, name = arguments
    worker: Worker | None = None
    for line in sys.stdin:
        command = line.strip()
        if command == "quit":
            break
        try:
            if worker is None:
                worker = Worker(Path(folder), suite, divergence, device, name)
            answer = {"check": worker.check, "memory": worker.memory, "time": worker.time}[
                command
            ]()
        except Exception as error:  # reported beside the others' rows; never ends the run
            answer = {"error": f"{type(error).__name__}: {' '.join(str(error).split())[:300]}"}
        print(json.dumps(answer), file=answers, flush=True)
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
