"""Training one student from a Job: settings, objective, checkpoints, and the model that is kept."""

from __future__ import annotations

import os
import shutil
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from kd.files import read_json, write_json
from kd.models import device, fast_bf16, load_model, load_tokenizer
from kd.stages import run_jobs


@dataclass(frozen=True)
class Training:
    """How a student is trained; the same class for SFT and for KD."""

    epochs: float = 3.0
    """Passes over the traces."""
    learning_rate: float = 1e-5
    """Peak."""
    min_rate: float = 0.0
    """Share of the peak that the cosine ends at."""
    warmup: float = 0.1
    """Share of the steps."""
    batch: int = 96
    """Traces in an optimiser step, over all GPUs."""
    micro_batch: int = 1
    """Traces on one GPU at a time."""
    max_grad_norm: float = 1.0
    """Gradients are clipped to it."""
    weight_decay: float = 0.0
    """Of AdamW."""
    adam_beta2: float = 0.999
    """Of AdamW."""
    train_embeddings: bool = True
    """Train the embedding and the lm_head too."""
    kd_weight: float = 0.0
    """Weight of the divergence from the teacher."""
    ce_weight: float = 1.0
    """Weight of the cross-entropy on the trace."""
    temperature: float = 1.0
    """Softens teacher and student in the divergence."""
    checkpoints: int = 4
    """Written over the run; a killed run continues from the last whole one."""


@dataclass(frozen=True)
class Job:
    """One training run of one student."""

    folder: Path
    start: str
    tokenizer: str
    rows: Path
    training: Training
    seed: int
    targets: str = ""
    online: str = ""


def train_all(jobs: list[Job], description: str, workers: int) -> list[dict[str, Any]]:
    """Several trainings, side by side on a CPU; finished ones are not trained again."""
    return run_jobs(train, jobs, description, 1 if device().type == "cuda" else workers)


def train(job: Job, report: Any) -> dict[str, Any]:
    """Train one student and keep its model, continuing from its last whole checkpoint."""
    done = read_json(job.folder / "result.json")
    if done:
        return done

    from datasets import load_from_disk

    from kd.cache import TeacherCache
    from kd.training import DistillationCollator, Objective, fit
    from kd.vocab import live_vocab

    settings, rows = (
        job.training,
        load_from_disk(job.rows / "rows").select_columns(["input_ids", "labels"]),
    )
    tokenizer = load_tokenizer(job.tokenizer)
    targets = TeacherCache(job.targets) if job.targets and settings.kd_weight else None
    _check_coverage(targets, rows)
    teacher = None
    if job.online and settings.kd_weight:
        dtype = {"dtype": "auto"} if device().type == "cuda" else {}
        teacher = load_model(job.online, **dtype).eval()
    objective = Objective(
        kd_weight=settings.kd_weight,
        ce_weight=settings.ce_weight,
        temperature=settings.temperature,
        vocab_size=live_vocab(tokenizer),
        teacher=targets if targets is not None else teacher,
    )
    model = load_model(job.start)
    for layer in (model.get_input_embeddings(), model.get_output_embeddings()):
        layer.weight.requires_grad_(settings.train_embeddings)
    log = fit(
        model,
        rows.with_format("torch"),
        job.folder,
        collator=DistillationCollator(tokenizer.pad_token_id or 0, targets, attention_mask=False),
        objective=objective,
        steps=max(1, round(settings.epochs * len(rows) / settings.batch)),
        learning_rate=settings.learning_rate,
        seed=job.seed,
        tokenizer=tokenizer,
        warmup=settings.warmup,
        report=report,
        **_arguments(settings),
    )
    result = {
        "seed": job.seed,
        "folder": str(job.folder),
        "model": str(job.folder / "model"),
        "log": log,
    }
    _save(model, tokenizer, job.folder / "model")
    write_json(job.folder / "result.json", result)
    for checkpoint in job.folder.glob("checkpoint-*"):
        shutil.rmtree(checkpoint, ignore_errors=True)  # the model is kept, its optimiser is not
    return result


def _check_coverage(targets: Any, rows: Any) -> None:
    """A cache that does not cover the data is refused before a model is loaded."""
    if targets is None:
        return
    missing = [i for i, ids in enumerate(rows["input_ids"]) if list(ids) not in targets]
    if missing:
        raise ValueError(
            f"recipe: cache must cover every training row, got none of {len(missing)} of "
            f"{len(rows)} rows (the first is row {missing[0]}) in {targets.path}. Build the cache "
            "from the same traces, template and tokenizer; --fresh does everything again."
        )


def _arguments(settings: Training) -> dict[str, Any]:
    gpu = device().type == "cuda"
    world = int(os.environ.get("WORLD_SIZE", "1"))
    micro = settings.micro_batch if gpu else settings.batch
    found: dict[str, Any] = {
        "batch_size": micro,
        "gradient_accumulation_steps": max(1, settings.batch // (micro * world)),
        "max_grad_norm": settings.max_grad_norm,
        "weight_decay": settings.weight_decay,
        "adam_beta2": settings.adam_beta2,
        "checkpoints": settings.checkpoints,
        "use_cpu": not gpu,
    }
    if settings.min_rate:
        found["lr_scheduler_type"] = "cosine_with_min_lr"
        found["lr_scheduler_kwargs"] = {"min_lr_rate": settings.min_rate}
    if gpu:
        found |= {"bf16": fast_bf16(), "gradient_checkpointing": True}
    return found


def _save(model: Any, tokenizer: Any, folder: Path) -> None:
    """The whole model from rank 0, also where its weights are sharded."""
    import torch

    state = None
    if any(hasattr(weight, "ds_id") for weight in model.parameters()):
        return _save_zero3(model, tokenizer, folder)
    if torch.distributed.is_available() and torch.distributed.is_initialized():
        from torch.distributed.checkpoint.state_dict import (
            StateDictOptions,
            get_model_state_dict,
        )

        options = StateDictOptions(full_state_dict=True, cpu_offload=True)
        state = get_model_state_dict(model, options=options)
        if torch.distributed.get_rank() != 0:
            return
    model.save_pretrained(folder, state_dict=state)
    tokenizer.save_pretrained(folder)


def _save_zero3(model: Any, tokenizer: Any, folder: Path) -> None:
    import importlib

    import torch

    zero: Any = importlib.import_module("deepspeed").zero
    with zero.GatheredParameters(list(model.parameters())):
        if torch.distributed.get_rank() == 0:
            model.save_pretrained(folder)
            tokenizer.save_pretrained(folder)
