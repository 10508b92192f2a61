"""What can go wrong in a run, found early and said in one line."""

from __future__ import annotations

import dataclasses
import hashlib
import json
import shutil
import signal
import threading
from collections import Counter
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from kd.training.checkpoints import checkpoints_in

RUN_FILE = "training.json"
SAMPLES = 64
ARGUMENTS = (
    "max_steps",
    "num_train_epochs",
    "learning_rate",
    "lr_scheduler_type",
    "warmup_steps",
    "weight_decay",
    "adam_beta1",
    "adam_beta2",
    "max_grad_norm",
    "optim",
    "seed",
    "data_seed",
    "bf16",
    "fp16",
)


class TrainingInterrupted(KeyboardInterrupt):
    """Ctrl-C or SIGTERM: the step in hand was finished and a checkpoint written."""


class CheckpointError(OSError):
    """A checkpoint could not be written; the ones before it are whole."""


# --- the student's context ------------------------------------------------------------------------


def context_length(config: Any) -> int | None:
    """Tokens a model can read: its positions, times RoPE scaling; None when it has no limit."""
    text = config.get_text_config() if hasattr(config, "get_text_config") else config
    most = getattr(text, "max_position_embeddings", None)
    if not isinstance(most, int) or most < 1:
        return None
    scaling = getattr(text, "rope_scaling", None) or getattr(text, "rope_parameters", None) or {}
    factor = scaling.get("factor") if isinstance(scaling, Mapping) else None
    original = scaling.get("original_max_position_embeddings") if factor else None
    return max(most, int(original * factor)) if original else most


def check_context(config: Any, batch: Mapping[str, Any]) -> None:
    """Refuse a batch of single documents that is longer than the model's context."""
    most, length = context_length(config), batch["input_ids"].shape[1]
    if most is None or length <= most or batch.get("position_ids") is not None:
        return
    raise ValueError(
        f"compute_loss: a batch must have at most {most} tokens in a row, the student's "
        f"max_position_embeddings, got {length}. Filter or truncate the traces, or scale its RoPE."
    )


# --- the output folder ----------------------------------------------------------------------------


def run_identity(trainer: Any) -> dict[str, Any]:
    """What makes a run the same run: model, objective, data and the settings that steer it."""
    args = trainer.args
    config = trainer.model.config.to_dict()
    for name in ("_name_or_path", "transformers_version", "dtype", "torch_dtype"):
        config.pop(name, None)
    objective = dataclasses.asdict(dataclasses.replace(trainer.objective, teacher=None))
    batch = args.per_device_train_batch_size * args.gradient_accumulation_steps * args.world_size
    return {
        "model": _digest(config),
        "trained_parameters": sum(p.numel() for p in trainer.model.parameters() if p.requires_grad),
        "objective": {name: str(value) for name, value in objective.items()},
        "data": data_digest(trainer.train_dataset),
        "rows_a_step": batch,
        **{name: str(getattr(args, name, None)) for name in ARGUMENTS},
    }


def data_digest(rows: Any) -> str:
    """Of the number of rows and up to 64 of them, evenly spread; "stream" without a length."""
    try:
        count = len(rows)
    except TypeError:
        return "stream"
    digest = hashlib.sha256(str(count).encode())
    for index in range(0, count, max(1, count // SAMPLES)):
        row = rows[index]
        for name in ("input_ids", "labels"):
            values = torch.as_tensor(row[name]).tolist() if name in row else []
            digest.update(json.dumps(values).encode())
    return digest.hexdigest()[:16]


def _digest(value: Any) -> str:
    return hashlib.sha256(json.dumps(value, sort_keys=True, default=str).encode()).hexdigest()[:16]


def claim_folder(folder: str | Path, identity: Mapping[str, Any], resume: bool) -> None:
    """Write down whose the folder is; refuse one with checkpoints of another run.

    Raises:
        FileExistsError: it has checkpoints that this run did not write, or that it would not
            continue from.
    """
    folder = Path(folder)
    marker, found = folder / RUN_FILE, checkpoints_in(folder)
    if found and not resume:
        raise FileExistsError(
            f"DistillationTrainer: output_dir must be free of checkpoints for a new run, got "
            f"{folder} with {found[-1].name}. Continue with train(resume_from_checkpoint=True), or "
            "choose another folder."
        )
    if found:
        try:
            owner = json.loads(marker.read_text())
        except (OSError, ValueError):
            owner = {}
        differing = [
            f"{name}: {owner.get(name, '(unknown)')} there, {value} here"
            for name, value in identity.items()
            if owner.get(name) != value
        ]
        if differing:
            raise FileExistsError(
                f"DistillationTrainer: output_dir must hold this run's checkpoints, got {folder} "
                f"with those of another run ({'; '.join(differing[:4])}). Choose another folder, "
                "or name the checkpoint to start from in resume_from_checkpoint."
            )
    folder.mkdir(parents=True, exist_ok=True)
    marker.write_text(json.dumps(identity, indent=1, sort_keys=True) + "\n")


def checkpoint_error(folder: Path, error: Exception) -> CheckpointError:
    """What to say when a checkpoint could not be written."""
    whole = [path.name for path in checkpoints_in(folder.parent) if path != folder]
    free = shutil.disk_usage(folder.parent).free / 2**20
    before = f"{whole[-1]} before it is whole" if whole else "there is none before it"
    reason = str(error).splitlines()[0] if str(error) else type(error).__name__
    return CheckpointError(
        f"DistillationTrainer: {folder.name} must fit on the disk, got {reason!r} with "
        f"{free:,.0f} MiB free; {before}. Make room and run again with "
        "resume_from_checkpoint=True."
    )


# --- the loss -------------------------------------------------------------------------------------


def bad_batch(batch: Mapping[str, Any], loss_of: Callable[[dict[str, Any]], Tensor] | None) -> str:
    """Names the rows of a batch whose loss is not finite.

    Args:
        batch: as the collator made it.
        loss_of: the loss of a part of the batch; None to leave the rows unexamined.
    """
    ids = batch["input_ids"]
    rows = list(range(len(ids)))
    if loss_of is not None:
        with torch.no_grad():
            parts = [{k: _row(v, i, len(ids)) for k, v in batch.items()} for i in rows]
            rows = [i for i in rows if not bool(torch.isfinite(loss_of(parts[i])))]
    if not rows:
        return "no row of the batch by itself"
    if len(rows) == len(ids) and loss_of is not None:
        start = "every row of the batch, so the weights themselves may not be finite"
    else:
        start = f"row {rows[0]} of the batch" if loss_of else "the batch"
    return f"{start} (input_ids start with {ids[rows[0], :8].tolist()})"


def _row(value: Any, row: int, count: int) -> Any:
    is_row = isinstance(value, Tensor) and value.ndim > 0 and len(value) == count
    return value[row : row + 1] if is_row else value


def check_coverage(rows: Any, teachers: Any) -> int:
    """Look every document of a dataset up in the caches that teach it, before training.

    Returns:
        How many are missing from a cache opened with on_missing="skip".

    Raises:
        KeyError: naming the first sequence that an on_missing="error" cache lacks.
    """
    missing = 0
    members = [] if teachers is None else list(enumerate(teachers.members))
    caches = [(n, m.source) for n, m in members if m.kind in ("sparse", "hidden")]
    caches = [(n, cache) for n, cache in caches if hasattr(cache, "__contains__")]
    if not caches or not hasattr(rows, "__len__"):
        return 0
    for index in range(len(rows)):
        row = rows[index]
        ids = torch.as_tensor(row["input_ids"])
        start = 0
        sizes = [int(size) for size in row["lengths"]] if "lengths" in row else [len(ids)]
        for number, size in enumerate(sizes):
            document, start = ids[start : start + size], start + size
            domain = teachers.domain_of(row, number)
            for at, cache in caches:
                if not teachers.teaches(at, domain) or document in cache:
                    continue
                if getattr(cache, "on_missing", "error") != "skip":
                    raise KeyError(
                        "DistillationTrainer: every sequence must be in the teacher cache, got "
                        f"row {index} ({len(document)} tokens, starting with "
                        f"{document[:8].tolist()}) that is not in {cache.path}. Build the cache "
                        "from the same rendered rows, or open it with on_missing='skip'."
                    )
                missing += 1
    return missing


def check_domains(rows: Any, teachers: Any) -> None:
    """Refuse a teacher whose domains no row of a dataset has: it would never teach.

    Raises:
        ValueError: naming its domains and those of the rows.
    """
    if teachers is None or not teachers.domains or not hasattr(rows, "__len__"):
        return
    names = getattr(rows, "column_names", None)
    if names is not None:  # a datasets.Dataset: the column, without the tokens beside it
        listed = [name for name in ("domain", "domains") if name in names]
        found = Counter(
            item
            for name in listed
            for value in rows[name]
            for item in (value if name == "domains" else [value])
        )
    else:
        found = Counter(
            item
            for row in (rows[index] for index in range(len(rows)))
            for item in (row["domains"] if "domains" in row else [row.get("domain")])
        )
    for member in teachers.members:
        if member.domains is None or found.keys() & set(member.domains):
            continue
        there = ", ".join(f"{name!r} ({n})" for name, n in found.most_common(8)) or "none"
        raise ValueError(
            f"DistillationTrainer: a teacher must teach some rows, got domains={member.domains!r} "
            f"for rows whose domains are {there}. Name one of theirs, or leave this teacher out."
        )


# --- Ctrl-C ---------------------------------------------------------------------------------------


class StopSignal:
    """Remembers the first SIGINT or SIGTERM; a second one interrupts at once."""

    def __init__(self) -> None:
        self.name = ""

    def _note(self, number: int, frame: Any) -> None:
        if self.name:
            raise KeyboardInterrupt
        self.name = signal.Signals(number).name

    @contextmanager
    def listening(self) -> Iterator[StopSignal]:
        """Listens inside, in the main thread (signals reach no other)."""
        self.name = ""
        if threading.current_thread() is not threading.main_thread():
            yield self
            return
        numbers = (signal.SIGINT, signal.SIGTERM)
        before = {number: signal.signal(number, self._note) for number in numbers}
        try:
            yield self
        finally:
            for number, handler in before.items():
                signal.signal(number, handler)
