"""A CPU loss beside a process that competes for a core: ours and plain PyTorch, side by side.

Forward KL, forward and backward, of [128, 151936] float32 logits on two threads; quiet, then with
one process that never rests. What else runs on the machine is printed, and competes too.

    python benchmarks/bench_load.py [--rows 128] [--rounds 9] [--write FILE.md]
"""

from __future__ import annotations

import argparse
import contextlib
import os
import pathlib
import platform
import statistics
import subprocess
import sys
import time
from collections.abc import Callable, Iterator

import torch

import kd

VOCAB = 151_936
THREADS = 2


def plain(student: torch.Tensor, teacher: torch.Tensor) -> torch.Tensor:
    log_q, log_p = torch.log_softmax(student, -1), torch.log_softmax(teacher, -1)
    return torch.nn.functional.kl_div(log_q, log_p, reduction="batchmean", log_target=True)


@contextlib.contextmanager
def competitor(wanted: bool) -> Iterator[None]:
    """One process that takes all of a core that it can get."""
    if not wanted:
        yield
        return
    process = subprocess.Popen([sys.executable, "-c", "while True: pass"])
    try:
        yield
    finally:
        process.kill()
        process.wait()


def seconds(
    losses: dict[str, Callable[..., torch.Tensor]],
    student: torch.Tensor,
    teacher: torch.Tensor,
    rounds: int,
) -> dict[str, list[float]]:
    """Of each loss, its turns taken in each round, the first round left out."""
    found: dict[str, list[float]] = {name: [] for name in losses}
    for _ in range(rounds + 1):
        for name, loss in losses.items():
            student.grad = None
            start = time.perf_counter()
            loss(student, teacher).backward()
            found[name].append(time.perf_counter() - start)
    return {name: times[1:] for name, times in found.items()}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--rows", type=int, default=128)
    parser.add_argument("--rounds", type=int, default=9)
    parser.add_argument("--write", type=pathlib.Path)
    chosen = parser.parse_args()
    torch.set_num_threads(THREADS)
    generator = torch.Generator().manual_seed(0)
    student, teacher = (2 * torch.randn(chosen.rows, VOCAB, generator=generator) for _ in range(2))
    student.requires_grad_()
    losses = {"kd.forward_kl": kd.forward_kl, "plain PyTorch": plain}
    lines = [
        f"Forward KL, forward and backward, [{chosen.rows}, {VOCAB}] float32, {THREADS} threads on "
        f"{os.cpu_count()} cores ({platform.processor() or platform.machine()}), torch "
        f"{torch.__version__}, {chosen.rounds} rounds.",
        "",
        "| competing process | load before | implementation | median ms | min ms | max ms |",
        "|---|---|---|---|---|---|",
    ]
    medians = {}
    for loaded in (False, True):
        load = os.getloadavg()[0]
        with competitor(loaded):
            for name, times in seconds(losses, student, teacher, chosen.rounds).items():
                medians[name, loaded] = statistics.median(times)
                numbers = (statistics.median(times), min(times), max(times))
                cells = " | ".join(f"{1e3 * number:.0f}" for number in numbers)
                lines.append(f"| {'one' if loaded else 'none'} | {load:.1f} | {name} | {cells} |")
    lines.append("")
    for name in losses:
        lines.append(f"{name}: {medians[name, True] / medians[name, False]:.2f} x slower loaded.")
    for loaded, word in ((False, "quiet"), (True, "loaded")):
        ratio = medians["plain PyTorch", loaded] / medians["kd.forward_kl", loaded]
        lines.append(f"{word}: plain PyTorch takes {ratio:.2f} x ours.")
    print("\n".join(lines))
    if chosen.write:
        chosen.write.write_text("\n".join(lines) + "\n")


if __name__ == "__main__":
    main()
