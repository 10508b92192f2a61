"""Step time and memory of training a small Qwen2: ours beside TRL's trainers on the same batch.

    python benchmarks/bench_training.py [--group SFT KD] [--dtype bfloat16] [--rounds 5]

A step is forward, backward, AdamW and zeroing, through each library's own trainer. Every
implementation has a process of its own, made from the same seed; they take turns, round by round,
in alternating order. Before anything is timed, the loss and the gradient's norm of all
implementations of a group are compared. TRL takes part where it is importable (KD_PEERS=folder).
"""

from __future__ import annotations

import argparse
import gc
import json
import multiprocessing
import os
import statistics
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

from kd_bench.training_suite import build_trainer

SIZES = {
    "small": {"student": (256, 4), "teacher": (512, 4), "vocab": 151_936, "batch": (2, 64)},
    "smoke": {"student": (32, 1), "teacher": (64, 1), "vocab": 512, "batch": (2, 16)},
}
GROUPS = {
    "SFT": ("kd SFT", "TRL SFTTrainer", "plain logits SFT"),
    "KD": ("kd online", "kd cached top-32", "TRL GKDTrainer", "plain logits KD"),
}
REFERENCE = {"SFT": "TRL SFTTrainer", "KD": "TRL GKDTrainer"}
PRELOADED = [
    "datasets",
    "kd.teachers",
    "kd.training.trainer",
    "transformers.models.qwen2.modeling_qwen2",
    "trl.trainer.sft_trainer",
    "trl.experimental.gkd",
]
PLAIN = {"SFT": "plain logits SFT", "KD": "plain logits KD"}


# --- what runs in a worker ------------------------------------------------------------------------


def high_water() -> int:
    """The process's largest resident size so far, in bytes."""
    import resource

    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024


def worker(pipe: Any, name: str, size: dict[str, Any], dtype: str, threads: int) -> None:
    """Serves "check", "step" and "memory" over a pipe."""
    import torch

    torch.set_num_threads(threads)
    with tempfile.TemporaryDirectory() as folder:
        try:
            made, batch, tokens = build_trainer(name, size, folder, getattr(torch, dtype))
        except Exception as error:  # a peer that is missing or refuses says why
            pipe.send({"error": f"{type(error).__name__}: {error}"})
            return
        if batch is None:
            batch = made.data_collator(made.train_dataset)
        made.model.train()
        made.create_optimizer()
        gc.collect()
        before = resident()
        pipe.send({"ready": True})
        while (asked := pipe.recv()) != "stop":
            started = time.perf_counter()
            loss = made.training_step(made.model, dict(batch), tokens)
            if asked == "check":
                grads = [p.grad.float().norm() for p in made.model.parameters()]
                norm = torch.stack(grads).norm().item()
                made.model.zero_grad()
                pipe.send({"loss": loss.item(), "norm": norm})
                continue
            made.optimizer.step()
            made.model.zero_grad()
            seconds = time.perf_counter() - started
            pipe.send({"seconds": seconds, "extra_bytes": max(0, high_water() - before)})


def resident() -> int:
    """Resident bytes now; the high-water mark where the system does not say."""
    try:
        pages = int(Path("/proc/self/statm").read_text().split()[1])
    except (OSError, ValueError):
        return high_water()
    return pages * os.sysconf("SC_PAGE_SIZE")


# --- the rounds -----------------------------------------------------------------------------------


def measure(
    size: dict[str, Any], dtype: str, rounds: int, threads: int, groups: Any
) -> list[dict[str, Any]]:
    rows = []
    for group in groups:
        rows += measure_group(group, GROUPS[group], size, dtype, rounds, threads)
    return rows


def measure_group(
    group: str, names: Any, size: dict[str, Any], dtype: str, rounds: int, threads: int
) -> list[dict[str, Any]]:
    context = multiprocessing.get_context("forkserver")  # it has run nothing that starts threads
    context.set_forkserver_preload(PRELOADED)
    rows, running, started = [], {}, []
    for name in names:
        ours, theirs = context.Pipe()
        process = context.Process(target=worker, args=(theirs, name, size, dtype, threads))
        process.start()
        started.append((name, ours, process))
    for name, ours, process in started:
        found = ours.recv()
        row = {"group": group, "implementation": name, "seconds": [], **found}
        rows.append(row)
        if "error" in found:
            print(f"{name}: left out, {found['error']}", file=sys.stderr)
            continue
        running[name] = (ours, process, row)
    for pipe, _, row in running.values():
        pipe.send("check")
        row |= pipe.recv()
    compare(rows, dtype)
    order = list(running.values())
    for number in range(rounds + 1):
        for pipe, _, row in order if number % 2 else reversed(order):
            pipe.send("step")
            found = pipe.recv()
            if number:  # the first makes the optimiser's state
                row["seconds"].append(found["seconds"])
            row["extra_bytes"] = found["extra_bytes"]
            print(f"{number} {row['implementation']}: {found['seconds']:.2f} s", file=sys.stderr)
    for pipe, process, _ in order:
        pipe.send("stop")
        process.join()
    return rows


def compare(rows: list[dict[str, Any]], dtype: str) -> None:
    """Refuse to time implementations that do not compute the same (a top-k loss is another)."""
    bound = 1e-3 if dtype == "float32" else 5e-2
    for group in GROUPS:
        found = [row for row in rows if row["group"] == group and "loss" in row]
        found = [row for row in found if "top" not in row["implementation"]]
        for row in found[1:]:
            for what in ("loss", "norm"):
                if abs(row[what] / found[0][what] - 1) > bound:
                    raise SystemExit(
                        f"{row['implementation']}: {what} {row[what]} is not that of "
                        f"{found[0]['implementation']}, {found[0][what]}"
                    )


def ratio(row: dict[str, Any], rows: list[dict[str, Any]], reference: dict[str, str]) -> Any:
    """Median over rounds of a step's time over the reference's in the same round."""
    name = reference[row["group"]]
    other = next((r for r in rows if r["implementation"] == name and r["seconds"]), None)
    if other is None or not row["seconds"]:
        return None
    pairs = zip(row["seconds"], other["seconds"], strict=True)
    return statistics.median(ours / theirs for ours, theirs in pairs)


def markdown(found: dict[str, Any]) -> str:
    size = found["size"]
    (hidden, layers), (teacher, depth) = size["student"], size["teacher"]
    lines = [
        "# A training step",
        "",
        found["machine_line"],
        "",
        f"Qwen2 of {layers} layers, hidden {hidden}, vocabulary {size['vocab']:,}, tied; teacher "
        f"of {depth} layers, hidden {teacher}; {size['batch'][0]} x {size['batch'][1]} tokens; "
        f"{found['dtype']}; {found['rounds']} rounds; load average {found['load']:.1f}. "
        "A step is forward, backward, AdamW; extra "
        "memory is the process's peak above model and inputs, the optimiser's moments included.",
        "",
        "| | implementation | step s | x TRL | x plain logits | extra MiB | loss | grad norm |",
        "|---|---|---|---|---|---|---|---|",
    ]
    for row in found["rows"]:
        if "error" in row:
            lines.append(
                f"| {row['group']} | {row['implementation']} | left out: {row['error'][:60]} |"
                + " |" * 5
            )
            continue
        cells = [row["group"], row["implementation"], f"{statistics.median(row['seconds']):.3f}"]
        cells += ["-" if row[key] is None else f"{row[key]:.2f}" for key in ("x_trl", "x_plain")]
        cells += [f"{row['extra_bytes'] / 2**20:,.0f}", f"{row['loss']:.5f}", f"{row['norm']:.4f}"]
        lines.append("| " + " | ".join(cells) + " |")
    return "\n".join(lines) + "\n"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--dtype", default="float32", choices=("float32", "bfloat16"))
    parser.add_argument("--group", nargs="*", default=list(GROUPS), choices=list(GROUPS))
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--smoke", action="store_true", help="tiny shapes, two rounds")
    parser.add_argument("--results", type=Path, help="folder of results; nothing is written else")
    chosen = parser.parse_args()
    import torch

    from kd_bench.machine import folder_name, line_of, machine_info

    if os.environ.get("KD_PEERS"):  # the workers get the parent's path
        sys.path.append(str(Path(os.environ["KD_PEERS"]).resolve()))
    size = SIZES["smoke" if chosen.smoke else "small"]
    rounds = 2 if chosen.smoke else chosen.rounds
    load = max(0.0, os.getloadavg()[0]) if hasattr(os, "getloadavg") else 0.0
    rows = measure(size, chosen.dtype, rounds, torch.get_num_threads(), chosen.group)
    for row in rows:
        row["x_trl"], row["x_plain"] = ratio(row, rows, REFERENCE), ratio(row, rows, PLAIN)
    info = machine_info("cpu")
    found = {
        "machine": info,
        "machine_line": line_of(info),
        "size": size,
        "dtype": chosen.dtype,
        "rounds": rounds,
        "load": load,
        "rows": rows,
    }
    print(markdown(found))
    if chosen.results:
        folder = chosen.results / folder_name("cpu")
        folder.mkdir(parents=True, exist_ok=True)
        name = "training" if chosen.dtype == "float32" else f"training-{chosen.dtype}"
        (folder / f"{name}.json").write_text(json.dumps(found, indent=1) + "\n")
        (folder / f"{name}.md").write_text(markdown(found))


if __name__ == "__main__":
    main()
