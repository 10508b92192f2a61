"""``transformers.Trainer`` with the fused distillation loss, exact token averages, safe resume."""

from __future__ import annotations

import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from transformers import Trainer, TrainerCallback, TrainingArguments

from kd.training.checkpoints import last_complete_checkpoint, mark_complete
from kd.training.metrics import StepMetrics
from kd.training.objective import Objective, compute_loss
from kd.training.student import prepare_student


class _MarkComplete(TrainerCallback):
    """Puts the completeness marker into a checkpoint once every rank has written its part."""

    def __init__(self, trainer: DistillationTrainer) -> None:
        self.trainer = trainer

    def on_save(self, args: TrainingArguments, state: Any, control: Any, **kwargs: Any) -> None:
        self.trainer.accelerator.wait_for_everyone()
        if args.should_save:
            mark_complete(Path(args.output_dir) / f"checkpoint-{state.global_step}")


class DistillationTrainer(Trainer):
    """A ``transformers.Trainer`` whose loss is an ``Objective``.

    Differences from ``Trainer``: the student's logits are never materialised; the loss is a mean
    over all trained tokens of an optimiser step, whatever the microbatches and ranks (also with
    per-token ``weights``); a NaN loss stops the run; ``resume_from_checkpoint=True`` takes the
    newest checkpoint that is whole; and the log has the parts of the loss.

    Args:
        model: the student, a causal LM.
        args: transformers' TrainingArguments; ``remove_unused_columns`` is switched off, since the
            collator needs every column.
        objective: what to minimise; plain SFT when None.
        **options: ``train_dataset``, ``data_collator``, ``callbacks``, ... as for ``Trainer``.
    """

    def __init__(
        self,
        model: Any = None,
        args: TrainingArguments | None = None,
        *,
        objective: Objective | None = None,
        **options: Any,
    ) -> None:
        if args is None:
            raise TypeError("DistillationTrainer: args must be TrainingArguments, got None.")
        args.remove_unused_columns = False
        args.logging_nan_inf_filter = False  # a NaN must be seen, not averaged away
        prepare_student(model)
        super().__init__(model=model, args=args, **options)
        self.objective = objective or Objective()
        self.loss_is_scaled_for_ga = True
        self.model_accepts_loss_kwargs = True  # the same, for transformers before 5.20
        self._metrics = StepMetrics(self.objective)
        self._tokens_seen = 0.0
        self._last_log = (time.perf_counter(), 0.0)
        # first, so that the marker is there before any other callback copies the checkpoint
        self.callback_handler.callbacks.insert(0, _MarkComplete(self))

    # --- the loss ---------------------------------------------------------------------------------

    def _get_num_items_in_batch(self, batch_samples: list, device: torch.device) -> Tensor:
        """Trained tokens (or their weights) of the optimiser step, over all ranks."""
        count = torch.zeros((), dtype=torch.float32, device=device)
        for batch in batch_samples:
            trained = batch["labels"] != -100
            weights = batch.get("weights")
            part = trained.sum() if weights is None else (weights * trained).sum()
            count += part.to(device)
        if self.args.world_size > 1:
            count = self.accelerator.reduce(count, reduction="sum")
        self._tokens_seen += float(count) if count.device.type == "cpu" else 0.0
        # an optimiser step without a single trained token must stay 0, not become 0 / 0
        return torch.where(count > 0, count, torch.ones_like(count))

    def compute_loss(
        self,
        model: Any,
        inputs: Mapping[str, Any],
        return_outputs: bool = False,
        num_items_in_batch: Any = None,
    ) -> Any:
        """The objective's sum over this microbatch, divided by the tokens of the whole step."""
        training = model.training
        observe = self._metrics.observe if training and self._step_is_logged() else None
        if num_items_in_batch is None:  # evaluation
            num_items_in_batch = (inputs["labels"] != -100).sum().clamp(min=1)
        loss = compute_loss(
            model, inputs, self.objective, num_items=num_items_in_batch, observe=observe
        )
        if training and self.args.world_size > 1:
            loss = loss * self.args.world_size  # DDP and FSDP average over ranks; we want the sum
        return (loss, {"loss": loss.detach()}) if return_outputs else loss

    def training_step(self, model: Any, inputs: Any, num_items_in_batch: Any = None) -> Tensor:
        loss = super().training_step(model, inputs, num_items_in_batch)
        if loss.device.type == "cpu" and not torch.isfinite(loss):
            raise FloatingPointError(
                f"DistillationTrainer: the loss must be finite, got {loss.item()} at step "
                f"{self.state.global_step + 1}, input_ids of the batch start with "
                f"{inputs['input_ids'][0, :8].tolist()}. Lower the learning rate or check the "
                "targets with kd.check; the last checkpoint is untouched."
            )
        return loss

    def floating_point_ops(self, inputs: Any) -> int:
        return 0  # transformers sums all parameters again on every step to estimate this

    # --- the log ----------------------------------------------------------------------------------

    def _step_is_logged(self) -> bool:
        every = int(self.args.logging_steps) if self.args.logging_strategy == "steps" else 0
        return every > 0 and (self.state.global_step + 1) % every == 0

    def log(self, logs: dict[str, float], start_time: float | None = None) -> None:
        """Adds ce, kd, teacher_mass, teacher_top1_agreement and tokens_per_second."""
        if "loss" in logs:
            reduce = self._sum_over_ranks if self.args.world_size > 1 else None
            logs.update(self._metrics.summary(reduce))
            now, (then, seen) = time.perf_counter(), self._last_log
            if self._tokens_seen > seen:
                logs["tokens_per_second"] = (self._tokens_seen - seen) / max(now - then, 1e-9)
            self._last_log = (now, self._tokens_seen)
        super().log(logs, start_time)

    def _sum_over_ranks(self, sums: Tensor) -> Tensor:
        return self.accelerator.reduce(sums.to(self.args.device), reduction="sum").cpu()

    # --- resume -----------------------------------------------------------------------------------

    def train(self, resume_from_checkpoint: Any = None, *args: Any, **kwargs: Any) -> Any:
        """As ``Trainer.train``; True resumes from the newest whole checkpoint, or starts anew."""
        if resume_from_checkpoint is True:
            found = last_complete_checkpoint(str(self.args.output_dir))
            resume_from_checkpoint = None if found is None else str(found)
        self._last_log = (time.perf_counter(), self._tokens_seen)
        return super().train(resume_from_checkpoint, *args, **kwargs)
