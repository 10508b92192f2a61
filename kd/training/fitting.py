"""One call that trains a student with settings that suit a recipe, and continues when rerun."""

from __future__ import annotations

import importlib
import os
import shutil
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from transformers import PrinterCallback, TrainerCallback, TrainingArguments
from transformers.utils import logging

from kd.training import preflight
from kd.training.checkpoints import checkpoints_in
from kd.training.collator import default_collator
from kd.training.metrics import TokenClasses
from kd.training.objective import Objective
from kd.training.trainer import DistillationTrainer


class ReportShare(TrainerCallback):
    """Tells a function the share of the optimiser steps done, from 0 to 1."""

    def __init__(self, report: Callable[[float], None]) -> None:
        self.report = report

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        self.report(state.global_step / max(state.max_steps, 1))


@contextmanager
def _quiet() -> Iterator[None]:
    """No bars for written shards and no remarks on checkpoints' times; errors are still shown."""
    level, bars = logging.get_verbosity(), logging.is_progress_bar_enabled()
    logging.set_verbosity_error()
    logging.disable_progress_bar()
    try:
        yield
    finally:
        logging.set_verbosity(level)
        if bars:
            logging.enable_progress_bar()


def fit(
    model: Any,
    rows: Any,
    folder: str | Path,
    *,
    collator: Any = None,
    objective: Objective | None = None,
    steps: int,
    batch_size: int,
    learning_rate: float,
    seed: int = 0,
    warmup: float = 0.05,
    checkpoints: int = 4,
    tokenizer: Any = None,
    report: Callable[[float], None] | None = None,
    **arguments: Any,
) -> list[dict[str, float]]:
    """Train a student in place; a call that was killed continues from its last whole checkpoint.

    Args:
        model: the student, a causal LM.
        rows: a dataset of {input_ids, labels}.
        folder: for checkpoints; a rerun with the same folder continues.
        collator: a ``DistillationCollator``; one with the tokenizer's or model's pad token when
            None.
        objective: what to minimise; plain SFT when None and the collator has no teacher.
        steps: optimiser steps.
        batch_size: sequences in one step on one process.
        learning_rate: peak; warmed up linearly, then cosine to zero.
        seed: of the data order.
        warmup: share of the steps.
        checkpoints: how many are written over the run; 0 for none.
        tokenizer: decodes tokens, to log the divergence on thoughts, answers and digits apart.
        report: called with the share done.
        **arguments: more of transformers' ``TrainingArguments``; they win.

    Raises:
        Checked: inside ``preflight.instead_of_training()``; nothing was trained or written.

    Returns:
        The log: one dict a logged step, with ``step``, ``loss``, its parts and the speed.
    """
    if collator is None:
        collator = default_collator(model, tokenizer)
    if preflight.asked():
        title = preflight.title_of(Path(folder).name, objective)
        found = preflight.check(model, collator, rows, objective, tokenizer=tokenizer, title=title)
        raise preflight.Checked([found])
    settings: dict[str, Any] = {
        "max_steps": steps,
        "per_device_train_batch_size": batch_size,
        "learning_rate": learning_rate,
        "lr_scheduler_type": "cosine",
        "warmup_steps": round(warmup * steps),
        "logging_steps": max(1, steps // 20),
        "save_strategy": "steps" if checkpoints else "no",
        "save_steps": max(1, steps // max(checkpoints, 1)),
        "save_total_limit": 2,
        "seed": seed,
        "report_to": [],
        "disable_tqdm": True,
        "dataloader_pin_memory": torch.cuda.is_available(),
    }
    args = TrainingArguments(str(folder), **{**settings, **arguments})
    trainer = DistillationTrainer(
        model,
        args,
        objective=objective,
        train_dataset=rows,
        data_collator=collator,
        token_classes=None if tokenizer is None else TokenClasses(tokenizer),
        report=False,
        callbacks=[ReportShare(report)] if report is not None else [],
    )
    trainer.remove_callback(PrinterCallback)
    with _quiet():
        trainer.train(resume_from_checkpoint=True)
    log = [dict(entry) for entry in trainer.state.log_history if "loss" in entry]
    for entry in log:
        entry.pop("peak_memory_gib", None)  # of the process, whatever else it did
    return log


def keep_student(model: Any, tokenizer: Any, folder: str | Path) -> Path:
    """Save a trained student whole as ``folder/model``, and delete the checkpoints beside it.

    Every rank calls it; the first one writes, also where the weights are sharded (FSDP2, ZeRO-3).

    Args:
        model: the student that ``fit`` trained.
        tokenizer: saved with it.
        folder: what ``fit`` was given.

    Returns:
        The model's folder.
    """
    folder = Path(folder)
    with _whole(model) as state:
        if int(os.environ.get("RANK", "0")) == 0:
            model.save_pretrained(folder / "model", state_dict=state)
            tokenizer.save_pretrained(folder / "model")
            for checkpoint in checkpoints_in(folder):
                shutil.rmtree(checkpoint)  # the model is kept, its optimiser is not
    return folder / "model"


@contextmanager
def _whole(model: Any) -> Iterator[dict[str, Any] | None]:
    """The state dict of a sharded model; None where ``save_pretrained`` finds it by itself."""
    if any(hasattr(weight, "ds_id") for weight in model.parameters()):
        zero: Any = importlib.import_module("deepspeed").zero
        with zero.GatheredParameters(list(model.parameters())):
            yield None
    elif torch.distributed.is_available() and torch.distributed.is_initialized():
        from torch.distributed.checkpoint.state_dict import StateDictOptions, get_model_state_dict

        options = StateDictOptions(full_state_dict=True, cpu_offload=True)
        yield get_model_state_dict(model, options=options)
    else:
        yield None
