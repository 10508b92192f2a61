"""What there is to read and to walk through: lines, import circles, calls and costs of one loss.

    python benchmarks/structure_table.py

Calls are those of one forward of ``kd.distillation_loss(kd.Hidden, kd.TopK, labels=...)`` on a CPU:
files entered, distinct functions (comprehensions are no functions), and calls from one file into
another. The kernels' are those of Triton's interpreter, which enters every device function once for
each tile.
"""

from __future__ import annotations

import os
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

os.environ.setdefault("TRITON_INTERPRET", "1")

import torch

import kd

ROOT = Path(__file__).parents[1]
ROOMS = ("kd", "kernels", "recipes", "benchmarks")


def lines(room: str) -> int:
    """Lines of Python, as they are tracked or new."""
    listed = ["git", "ls-files", "--cached", "--others", "--exclude-standard", f"{room}/*.py"]
    names = subprocess.run(listed, cwd=ROOT, capture_output=True, text=True, check=True).stdout
    found = {ROOT / name for name in names.split()}
    return sum(len(path.read_text().splitlines()) for path in found if path.exists())


def circles() -> list[list[str]]:
    """Groups of modules that import each other, by any import at all."""
    import grimp

    graph = grimp.build_graph("kd", "kd_kernels", "kd_recipes", cache_dir=None)
    reached = {m: graph.find_upstream_modules(m) for m in graph.modules}
    groups: list[list[str]] = []
    for module in sorted(graph.modules):
        if any(module in group for group in groups):
            continue
        both = [m for m in sorted(reached[module]) if module in reached[m]]
        if both:
            groups.append(sorted([module, *both]))
    return groups


def walk(call: Callable[[], object]) -> tuple[int, int, int]:
    """(files, distinct functions, calls into another file) of our own code in one call."""
    ours = (str(ROOT / "kd") + os.sep, str(ROOT / "kernels") + os.sep)
    functions, changes = set(), 0

    def profile(frame, event, _):
        nonlocal changes
        code = frame.f_code
        if event != "call" or not code.co_filename.startswith(ours) or code.co_name[0] == "<":
            return
        functions.add((code.co_filename, code.co_firstlineno))
        back = frame.f_back
        while back is not None and not back.f_code.co_filename.startswith(ours):
            back = back.f_back
        changes += back is not None and back.f_code.co_filename != code.co_filename

    call()
    sys.setprofile(profile)
    try:
        call()
    finally:
        sys.setprofile(None)
    return len({file for file, _ in functions}), len(functions), changes


def one_loss(backend: str) -> Callable[[], object]:
    """A fused linear loss against a sparse teacher, one row masked."""
    make = torch.Generator().manual_seed(0)
    hidden, weight = (torch.randn(n, 8, generator=make).requires_grad_() for n in (6, 50))
    logprobs, ids = torch.randn(6, 50, generator=make).log_softmax(-1).topk(8)
    labels = torch.tensor([1, 2, -100, 3, 4, 5])
    student, teacher = kd.Hidden(hidden, weight), kd.TopK(ids, logprobs)
    return lambda: kd.distillation_loss(student, teacher, labels=labels, backend=backend)


def overhead() -> tuple[float, float]:
    """Microseconds of forward and backward on [4, 100]: ours, and PyTorch's kl_div."""
    make = torch.Generator().manual_seed(0)
    z, t = (torch.randn(4, 100, generator=make) for _ in range(2))
    z.requires_grad_()
    log_p = t.log_softmax(-1)

    def plain():
        loss = torch.nn.functional.kl_div(
            z.log_softmax(-1), log_p, log_target=True, reduction="batchmean"
        )
        loss.backward()

    best = []
    for step in (lambda: kd.forward_kl(z, t).backward(), plain):
        rounds = []
        for _ in range(100):
            start = time.perf_counter()
            for _ in range(50):
                step()
            rounds.append((time.perf_counter() - start) / 50)
        best.append(1e6 * min(rounds))
    return best[0], best[1]


def help_seconds() -> float:
    """The fastest of five ``kd --help``."""
    rounds = []
    for _ in range(5):
        start = time.perf_counter()
        subprocess.run([sys.executable, "-m", "kd", "--help"], capture_output=True, check=True)
        rounds.append(time.perf_counter() - start)
    return min(rounds)


def main() -> None:
    counts = {room: lines(room) for room in ROOMS}
    shown = ", ".join(f"{room} {count:,}" for room, count in counts.items())
    ours, plain = overhead()
    table = {
        "lines of Python": f"{sum(counts.values()):,} ({shown})",
        "import circles": str(circles() or 0),
        "files · functions · changes of file, CPU": "{} · {} · {}".format(*walk(one_loss("torch"))),
        "the same through Triton's interpreter": "{} · {} · {}".format(*walk(one_loss("triton"))),
        "`kd --help`": f"{help_seconds():.2f} s",
        "`kd.forward_kl` on [4, 100], with backward": f"{ours:.0f} µs (`F.kl_div`: {plain:.0f})",
    }
    print("| | |\n|---|---|")
    for name, value in table.items():
        print(f"| {name} | {value} |")


if __name__ == "__main__":
    main()
