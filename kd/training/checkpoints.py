"""Checkpoints that are whole or not used, and whose run they are.

transformers writes straight into ``checkpoint-N`` and resumes from the highest N, torn or not.
``mark_complete`` puts ``COMPLETE.json`` (size and SHA-256 of every file) into a finished
checkpoint, and ``last_complete_checkpoint`` takes the newest one that still matches its marker.
"""

from __future__ import annotations

import dataclasses
import hashlib
import json
import os
import re
import shutil
import warnings
from collections.abc import Mapping
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import torch

from kd.files import write_whole

MARKER = "COMPLETE.json"
RUN_FILE = "training.json"
SAMPLES = 64  # rows of a data set that its digest is of
ARGUMENTS = (
    "max_steps num_train_epochs learning_rate lr_scheduler_type warmup_steps weight_decay "
    "adam_beta1 adam_beta2 max_grad_norm optim seed data_seed bf16 fp16"
).split()


class CheckpointError(OSError):
    """A checkpoint could not be written; the ones before it are whole."""


def _digest(path: Path) -> str:
    digest = hashlib.sha256()
    with path.open("rb") as file:
        while block := file.read(1 << 20):
            digest.update(block)
    return digest.hexdigest()


def _entry(path: Path) -> dict[str, int | str]:
    """A file's size and digest, once it is flushed to disk."""
    with path.open("rb") as file:
        os.fsync(file.fileno())
    return {"bytes": path.stat().st_size, "sha256": _digest(path)}


def mark_complete(folder: str | Path) -> Path:
    """Flush every file of a checkpoint to disk, then write its marker atomically.

    Args:
        folder: a ``checkpoint-N`` folder nobody writes to any more.

    Returns:
        The marker's path.
    """
    folder = Path(folder)
    files = sorted(p for p in folder.rglob("*") if p.is_file() and p.name != MARKER)
    with ThreadPoolExecutor(8) as pool:  # hashing releases the interpreter
        entries = list(pool.map(_entry, files))
    names = [path.relative_to(folder).as_posix() for path in files]
    listing = dict(zip(names, entries, strict=True))
    marker = folder / MARKER
    text = json.dumps({"files": listing}, indent=1, sort_keys=True)
    write_whole(marker, text.encode())
    return marker


def problem_with(folder: str | Path) -> str | None:
    """Why a checkpoint must not be resumed from, or None when it is whole."""
    folder = Path(folder)
    marker = folder / MARKER
    if not marker.is_file():
        return f"has no {MARKER} (its writer was interrupted)"
    try:
        files = json.loads(marker.read_text())["files"]
        for name, wanted in files.items():
            path = folder / name
            if not path.is_file():
                return f"lacks {name}"
            size = path.stat().st_size
            if size != wanted["bytes"]:
                return f"has {size} bytes in {name} instead of {wanted['bytes']}"
            if _digest(path) != wanted["sha256"]:
                return f"has a damaged {name} (its SHA-256 differs)"
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        return f"has an unreadable {MARKER} ({error})"
    return None


def last_complete_checkpoint(output_dir: str | Path) -> Path | None:
    """The newest whole ``checkpoint-N`` under a folder; torn ones are skipped with a warning."""
    for path in reversed(checkpoints_in(output_dir)):
        why = problem_with(path)
        if why is None:
            return path
        warnings.warn(
            f"last_complete_checkpoint: {path.name} {why}; trying the one before it.", stacklevel=2
        )
    return None


def checkpoints_in(output_dir: str | Path) -> list[Path]:
    """All ``checkpoint-N`` folders, whole or not, the oldest first."""
    output_dir = Path(output_dir)
    if not output_dir.is_dir():
        return []
    found = [
        (int(match.group(1)), path)
        for path in output_dir.iterdir()
        if (match := re.fullmatch(r"checkpoint-(\d+)", path.name)) and path.is_dir()
    ]
    return [path for _, path in sorted(found)]


def keep_newest(output_dir: str | Path, limit: int | None, keep: str | Path | None = None) -> None:
    """Delete the oldest checkpoints beyond ``limit``; call it when the newest is marked."""
    if limit is None or limit < 1:
        return
    for path in checkpoints_in(output_dir)[:-limit]:
        if keep is None or path.resolve() != Path(keep).resolve():
            (path / MARKER).unlink(missing_ok=True)  # half deleted it is torn
            shutil.rmtree(path, ignore_errors=True)


# --- whose run a folder is ------------------------------------------------------------------------


def run_identity(trainer: Any) -> dict[str, Any]:
    """What makes a run the same run: model, objective, data and the settings that steer it."""
    args = trainer.args
    config = trainer.model.config.to_dict()
    for name in ("_name_or_path", "transformers_version", "dtype", "torch_dtype"):
        config.pop(name, None)
    objective = dataclasses.asdict(dataclasses.replace(trainer.objective, teacher=None))
    batch = args.per_device_train_batch_size * args.gradient_accumulation_steps * args.world_size
    return {
        "model": _short_hash(config),
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


def _short_hash(value: Any) -> str:
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


def check_resumable(folder: str | Path) -> None:
    """Refuse to go on from a checkpoint that cannot give the same run.

    Raises:
        ValueError: it was written with ``save_only_model=True``, so that the optimizer would start
            anew in the middle of its schedule.
    """
    folder = Path(folder)
    if any(folder.glob("global_step*")) or any(folder.glob("optimizer_*")):  # sharded
        return
    missing = [n for n in ("optimizer.pt", "scheduler.pt") if not (folder / n).is_file()]
    if missing:
        raise ValueError(
            f"DistillationTrainer: resume_from_checkpoint must have the optimizer's state, got "
            f"{folder} without {' and '.join(missing)} (save_only_model=True writes weights "
            "alone): the run would go on another curve. Load its weights as the student of a new "
            "run in another folder."
        )
