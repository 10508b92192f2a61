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
import importlib
import json
import multiprocessing
import os
import statistics
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

SIZES = {
    "small": {"student": (256, 4), "teacher": (512, 4), "vocab": 151_936, "batch": (2, 64)},
    "smoke": {"student": (32, 1), "teacher": (64, 1), "vocab": 512, "batch": (2, 16)},
}
GROUPS = {
    "SFT": ("kd SFT", "TRL SFTTrainer", "plain logits SFT"),
    "KD": ("kd online", "kd cached top-32", "TRL GKDTrainer", "plain logits KD"),
}
REFERENCE = {"SFT": "TRL SFTTrainer", "KD": "TRL GKDTrainer"}
PLAIN = {"SFT": "plain logits SFT", "KD": "plain logits KD"}


# --- what runs in a worker ------------------------------------------------------------------------


def make_model(hidden: int, layers: int, vocab: int, seed: int, dtype: Any) -> Any:
    import torch
    from transformers import Qwen2Config, Qwen2ForCausalLM

    torch.manual_seed(seed)
    config = Qwen2Config(
        vocab_size=vocab,
        hidden_size=hidden,
        intermediate_size=4 * hidden,
        num_hidden_layers=layers,
        num_attention_heads=max(1, hidden // 64),
        num_key_value_heads=1,
        tie_word_embeddings=True,
        use_cache=False,
        pad_token_id=0,
        bos_token_id=1,
        eos_token_id=2,
    )
    return Qwen2ForCausalLM(config).to(dtype)


def make_rows(vocab: int, batch: tuple[int, int]) -> list[dict[str, list[int]]]:
    import random

    rng = random.Random(0)
    ids = [[rng.randrange(3, vocab) for _ in range(batch[1])] for _ in range(batch[0])]
    return [{"input_ids": row, "labels": [-100] * 8 + row[8:]} for row in ids]


def make_tokenizer() -> Any:
    from tokenizers import Tokenizer, models
    from transformers import PreTrainedTokenizerFast

    made = Tokenizer(models.WordLevel({"<pad>": 0, "<s>": 1, "</s>": 2}, unk_token="<pad>"))
    return PreTrainedTokenizerFast(tokenizer_object=made, pad_token="<pad>", eos_token="</s>")


def common(folder: str, dtype: Any) -> dict[str, Any]:
    return {
        "output_dir": folder,
        "per_device_train_batch_size": 2,
        "learning_rate": 1e-5,
        "logging_steps": 1000,
        "max_steps": 1000,
        "report_to": [],
        "use_cpu": True,
        "bf16": False,
        "save_strategy": "no",
        "dataloader_pin_memory": False,
        "disable_tqdm": True,
    }


def build(name: str, size: dict[str, Any], folder: str, dtype: Any) -> tuple[Any, Any, Any]:
    """(trainer, batch, trained tokens) of an implementation."""
    import torch
    from datasets import Dataset
    from transformers import Trainer, TrainingArguments

    vocab, rows = size["vocab"], make_rows(size["vocab"], size["batch"])
    student = make_model(*size["student"], vocab, 0, dtype)
    data = Dataset.from_list(rows)
    teacher = None
    if name in ("kd online", "kd cached top-32", "TRL GKDTrainer", "plain logits KD"):
        teacher = make_model(*size["teacher"], vocab, 1, dtype).eval()
    raw = {key: torch.tensor([row[key] for row in rows]) for key in ("input_ids", "labels")}
    raw["attention_mask"] = torch.ones_like(raw["input_ids"])
    tokens = (raw["labels"][:, 1:] != -100).sum()
    options = common(folder, dtype)
    if name.startswith("TRL"):
        return trl_trainer(name, student, teacher, data, options), raw, tokens
    args = TrainingArguments(**options)
    if name.startswith("plain"):
        made = Trainer(student, args, train_dataset=data)
        made.compute_loss = plain_loss(teacher)
        return made, raw, tokens
    return ours(name, student, teacher, rows, args, vocab, folder), None, tokens


def ours(
    name: str, student: Any, teacher: Any, rows: Any, args: Any, vocab: int, folder: str
) -> Any:
    from kd.training import DistillationCollator, DistillationTrainer, Objective

    objective = Objective()
    if name == "kd online":
        objective = Objective(kd_weight=1.0, ce_weight=0.0, teacher=teacher)
    elif name == "kd cached top-32":
        from kd.teachers import build_cache

        cache = build_cache(
            teacher, [row["input_ids"] for row in rows], Path(folder) / "cache", progress=False
        )
        objective = Objective(kd_weight=1.0, ce_weight=0.0, teacher=cache)
    made = DistillationTrainer(
        student,
        args,
        objective=objective,
        train_dataset=rows,
        data_collator=DistillationCollator(0, attention_mask=False),
        report=False,
    )
    made.state.max_steps = 1000
    return made


def trl_trainer(name: str, student: Any, teacher: Any, data: Any, options: Any) -> Any:
    extra = {"dataset_kwargs": {"skip_prepare_dataset": True}, "gradient_checkpointing": False}
    if name == "TRL SFTTrainer":
        from trl import SFTConfig, SFTTrainer

        args = SFTConfig(**options, **extra)
        return SFTTrainer(
            model=student, args=args, train_dataset=data, processing_class=make_tokenizer()
        )
    from trl.experimental.gkd import GKDConfig, GKDTrainer

    args = GKDConfig(**options, **extra, lmbda=0.0, beta=0.0)
    return GKDTrainer(
        model=student,
        teacher_model=teacher,
        args=args,
        train_dataset=data,
        processing_class=make_tokenizer(),
    )


def plain_loss(teacher: Any) -> Any:
    """What a loop without a library does: all logits of both models, then the loss."""
    import torch
    from torch.nn import functional

    def loss_of(model: Any, inputs: Any, num_items_in_batch: Any = None, **_: Any) -> Any:
        ids, labels = inputs["input_ids"], inputs["labels"][:, 1:].flatten()
        logits = model(input_ids=ids).logits[:, :-1].flatten(0, 1)
        if teacher is None:
            summed = functional.cross_entropy(logits.float(), labels, reduction="sum")
            return summed / num_items_in_batch
        with torch.no_grad():
            wanted = teacher(input_ids=ids).logits[:, :-1].flatten(0, 1)
        rows = labels != -100
        found = functional.kl_div(
            functional.log_softmax(logits.float(), -1),
            functional.log_softmax(wanted.float(), -1),
            reduction="none",
            log_target=True,
        )
        return found[rows].sum() / num_items_in_batch

    return loss_of


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
            made, batch, tokens = build(name, size, folder, getattr(torch, dtype))
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
    preload()
    context = multiprocessing.get_context("fork" if sys.platform == "linux" else "spawn")
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


def preload() -> None:
    """Import once what every worker needs; nothing is computed before they are forked."""
    import datasets  # noqa: F401
    import transformers.models.qwen2.modeling_qwen2  # noqa: F401

    import kd.teachers
    import kd.training.trainer  # noqa: F401

    for name in ("trl.trainer.sft_trainer", "trl.experimental.gkd"):
        try:
            importlib.import_module(name)
        except Exception as error:
            print(f"{name}: {error}", file=sys.stderr)


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

    from kd.bench.machine import folder_name, line_of, machine_info

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
