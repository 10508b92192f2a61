"""``transformers.Trainer`` with the fused distillation loss, exact token averages, safe resume."""

from __future__ import annotations

import dataclasses
import json
import math
import shutil
import time
from collections.abc import Mapping
from functools import partial
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from torch import Tensor
from transformers import Trainer, TrainerCallback, TrainingArguments
from transformers.trainer_utils import EvalLoopOutput

from kd.training import checkpoints
from kd.training.arguments import apply_arguments
from kd.training.checkpoints import mark_complete
from kd.training.checks import (
    bad_batch,
    check_apart,
    check_coverage,
    check_domains,
    context_length,
)
from kd.training.collator import DistillationCollator, default_collator
from kd.training.loss import compute_loss
from kd.training.metrics import StepMetrics, TokenClasses
from kd.training.objective import Objective
from kd.training.report import append_metrics, peak_memory, write_report
from kd.training.rows import aligned_labels, trained_weight
from kd.training.stopping import StopSignal, TrainingInterrupted
from kd.training.student import prepare_student
from kd.training.teachers import Teachers

CARRIED = "kd_state.json"


class _Steps(TrainerCallback):
    """Picks a run up in the middle of a logging interval, and ends one that was interrupted."""

    def __init__(self, trainer: DistillationTrainer) -> None:
        self.trainer = trainer

    def on_train_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        self.trainer._carry_on()

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        if self.trainer._stop_agreed or (args.world_size == 1 and self.trainer._stop.name):
            self.trainer._stop_agreed = True
            control.should_save = control.should_training_stop = True
        if state.global_step >= state.max_steps and self.trainer._nothing_logged():
            control.should_log = True  # a run shorter than logging_steps has a curve too


class DistillationTrainer(Trainer):
    """A ``transformers.Trainer`` whose loss is an ``Objective``.

    Differences from ``Trainer``: the student's logits are never materialised; the loss is a mean
    over all trained tokens of an optimiser step, whatever the microbatches and ranks (also with
    per-token ``weights``); a loss or gradient that is not finite stops the run before the weights
    change; checkpoints have a completeness marker, ``resume_from_checkpoint=True`` takes the newest
    that is whole, and Ctrl-C writes one; a folder of another run is refused; and the log has the
    parts of the loss and what the teacher thinks of the student.

    Args:
        model: the student, a causal LM.
        args: transformers' TrainingArguments. Each field is honoured, replaced or refused, as
            docs/training-arguments.md lists; so are ``Trainer``'s own arguments in ``options``.
        objective: what to minimise and its teachers; plain SFT when None and no teacher is given.
        teacher_model: the objective's teacher, where TRL's trainers take it: whatever
            ``Objective(teacher=...)`` takes. Given in both places, it is refused.
        token_classes: finds thoughts, answers and digits for the log; made from
            ``processing_class`` (a tokenizer) when None.
        report: write ``training.html`` and ``training.png`` into the output folder at the end.
        **options: ``train_dataset``, ``data_collator``, ``callbacks``, ... as for ``Trainer``;
            without a collator ``DistillationCollator`` with the tokenizer's or model's pad token.
    """

    def __init__(
        self,
        model: Any = None,
        args: TrainingArguments | None = None,
        *,
        objective: Objective | None = None,
        teacher_model: Any = None,
        token_classes: TokenClasses | None = None,
        report: bool = True,
        **options: Any,
    ) -> None:
        if not isinstance(args, TrainingArguments):
            raise TypeError(
                f"DistillationTrainer: args must be TrainingArguments, got {type(args).__name__}. "
                "A teacher goes into teacher_model=, or into Objective(teacher=...)."
            )
        apply_arguments(args, options)
        prepare_student(model)
        collator = options.get("data_collator")
        if collator is None:
            collator = default_collator(model, options.get("processing_class"))
        self.objective, collator = _joined(objective or Objective(), collator, teacher_model)
        check_apart(model, self.objective.teacher, "DistillationTrainer")
        if isinstance(collator, DistillationCollator) and collator.max_length is None:
            most = context_length(model.config)
            collator = dataclasses.replace(collator, max_length=most)
        options["data_collator"] = collator
        super().__init__(model=model, args=args, **options)
        self.label_names = ["shift_labels"]  # what makes evaluate() compute a loss
        self.loss_is_scaled_for_ga = True
        self.model_accepts_loss_kwargs = True  # the same, for transformers before 5.20
        tokenizer = options.get("processing_class")
        if token_classes is None and hasattr(tokenizer, "decode"):
            token_classes = TokenClasses(tokenizer)
        self.token_classes, self.write_report = token_classes, report
        if self.objective.teacher is not None:
            self.objective.teacher.to(args.device)
        self._metrics = StepMetrics()
        self._tokens_seen: Any = 0.0
        self._evaluated = torch.zeros(2, dtype=torch.float64)  # loss and tokens, summed
        self._last_log = (time.perf_counter(), 0.0)
        self._stop, self._stop_agreed = StopSignal(), False
        self._resumed_from: str | None = None
        self.callback_handler.callbacks.insert(0, _Steps(self))

    # --- the loss ---------------------------------------------------------------------------------

    def _get_num_items_in_batch(self, batch_samples: list, device: torch.device) -> Tensor:
        """Trained tokens (or their weights) of the optimiser step, over all ranks."""
        count = torch.zeros((), dtype=torch.float32, device=device)
        for batch in batch_samples:
            labels = aligned_labels(batch, "DistillationTrainer")
            count += trained_weight(labels, batch.get("weights")).to(device)
        if self.args.world_size > 1:  # ranks also agree here on whether to stop
            stop = torch.tensor(float(bool(self._stop.name)), device=device)
            both = self.accelerator.reduce(torch.stack([count, stop]), reduction="sum")
            count, self._stop_agreed = both[0], bool(both[1] > 0)
        self._tokens_seen = self._tokens_seen + count
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
        training, observe = model.training, None
        objective = self.objective.at(self.state.global_step, max(self.state.max_steps, 1))
        if training and self._step_is_logged():
            observe = partial(self._metrics.observe, objective)
            if self.token_classes is not None and objective.soft:
                inputs = {**inputs, "token_class": self.token_classes(inputs)}
        loss = compute_loss(model, inputs, objective, num_items=num_items_in_batch, observe=observe)
        if training and self.args.world_size > 1:
            loss = loss * self.args.world_size  # DDP and FSDP average over ranks; we want the sum
        return (loss, {"loss": loss.detach()}) if return_outputs else loss

    def training_step(self, model: Any, inputs: Any, num_items_in_batch: Any = None) -> Tensor:
        loss = super().training_step(model, inputs, num_items_in_batch)
        if not bool(torch.isfinite(loss)):
            again = None if self.args.world_size > 1 else partial(self.compute_loss, model)
            self._not_finite("loss", loss.item(), bad_batch(inputs, again))
        return loss

    def prediction_step(self, model: Any, inputs: Any, *args: Any, **kwargs: Any) -> Any:
        """Adds a batch to the sums that ``eval_loss`` is the quotient of; no logits are made."""
        inputs = self._prepare_inputs(inputs)
        labels = aligned_labels(inputs, "DistillationTrainer")
        labels[_real_rows(self.accelerator, len(labels)) :] = -100
        last = max(self.state.max_steps, 1)
        objective = self.objective.at(last, last)  # a schedule's end, so that steps can be compared
        with torch.no_grad(), self.compute_loss_context_manager():
            loss = compute_loss(model, inputs, objective, num_items=1.0)  # the sum
        tokens = trained_weight(labels, inputs.get("weights"))
        self._evaluated += torch.stack([loss, tokens.to(loss)]).double().cpu()
        return loss / tokens.clamp(min=1e-30), None, None

    def evaluation_loop(
        self, dataloader: Any, description: str, *args: Any, **kwargs: Any
    ) -> EvalLoopOutput:
        """As transformers', with the loss as a mean over all trained tokens (or their weights).

        transformers averages the batches' means, which depends on how the rows are batched.

        Raises:
            ValueError: no token of the data set is trained.
        """
        self._evaluated = torch.zeros(2, dtype=torch.float64)
        output = super().evaluation_loop(dataloader, description, *args, **kwargs)
        total, tokens = self._over_ranks(self._evaluated).tolist()
        if tokens <= 0:
            raise ValueError(
                f"DistillationTrainer: an evaluation must have trained tokens, got {tokens:g} of "
                f"{output.num_samples} rows. Unmask labels of its rows."
            )
        for name in output.metrics:
            if name.endswith("_loss"):
                output.metrics[name] = total / tokens
        return output

    def _get_grad_norm(self, *args: Any, **kwargs: Any) -> Any:
        """As transformers', asked before every optimiser step; a NaN never reaches the weights."""
        norm = super()._get_grad_norm(*args, **kwargs)
        value = float(norm) if norm is not None else 0.0
        if not math.isfinite(value) and getattr(self.accelerator, "scaler", None) is None:
            self._not_finite("gradient's norm", value, "the whole step")
        return norm

    def _not_finite(self, what: str, value: float, where: str) -> None:
        raise FloatingPointError(
            f"DistillationTrainer: the {what} must be finite, got {value} at step "
            f"{self.state.global_step + 1} from {where}. Lower the learning rate, or look at the "
            "batch with kd.check; the weights are those of the step before, and the last "
            "checkpoint is untouched."
        )

    def floating_point_ops(self, inputs: Any) -> int:
        return 0  # transformers sums all parameters again on every step to estimate this

    # --- the log ----------------------------------------------------------------------------------

    def _step_is_logged(self) -> bool:
        args, state = self.args, self.state
        every = 0
        if args.logging_strategy == "steps":
            every = int(state.logging_steps)  # a share of the run is steps there
        elif args.logging_strategy == "epoch":
            every = max(1, round(state.max_steps / max(state.num_train_epochs, 1)))
        first = args.logging_first_step and state.global_step == 0
        if state.global_step + 1 == state.max_steps and self._nothing_logged():
            return True
        return first or (every > 0 and (state.global_step + 1) % every == 0)

    def _nothing_logged(self) -> bool:
        wanted = self.args.logging_strategy != "no"
        return wanted and not any("loss" in entry for entry in self.state.log_history)

    def log(self, logs: dict[str, float], start_time: float | None = None) -> None:
        """Adds the parts of the loss, agreement, speed and memory (see the README's table)."""
        if "loss" in logs:
            logs.update(self._metrics.summary(self._over_ranks))
            if self.objective.scheduled:
                now = self.objective.at(self.state.global_step - 1, self.state.max_steps)
                logs |= {name: getattr(now, name) for name in ("kd_weight", "temperature")}
            seen = float(self._tokens_seen)
            now_time, (then, before) = time.perf_counter(), self._last_log
            if seen > before:
                logs["tokens_per_second"] = (seen - before) / max(now_time - then, 1e-9)
            self._last_log = (now_time, seen)
            logs["peak_memory_gib"] = peak_memory(self.args.device)
            teachers = self.objective.teacher
            members = () if teachers is None else teachers.members
            skipped = sum(getattr(member.source, "skipped", 0) for member in members)
            if skipped:
                logs["skipped_sequences"] = skipped
        if "train_loss" in logs:
            logs["train_loss"] = self._mean_loss()
        super().log(logs, start_time)
        if self.args.should_save:
            append_metrics(Path(self.args.output_dir), self.state.log_history[-1])

    def _mean_loss(self) -> float:
        """Over all steps of the run, also those before a resume."""
        total, last = float(getattr(self, "_tr_loss", 0.0)), 0
        for entry in self.state.log_history:
            if "loss" in entry:
                total += entry["loss"] * (entry["step"] - last)
                last = entry["step"]
        return total / max(self.state.global_step, 1)

    def _over_ranks(self, values: Tensor, reduction: str = "sum") -> Tensor:
        if self.args.world_size == 1:
            return values
        there = values.to(self.args.device, copy=True)
        return self.accelerator.reduce(there, reduction=reduction).cpu()

    # --- checkpoints ------------------------------------------------------------------------------

    def _save_checkpoint(self, *args: Any, **kwargs: Any) -> None:
        """Writes a checkpoint, then its marker, and only then deletes old ones."""
        folder = Path(self.args.output_dir) / f"checkpoint-{self.state.global_step}"
        limit, self.args.save_total_limit = self.args.save_total_limit, None
        carried = {
            "step": self.state.global_step,
            "logged": getattr(self, "_globalstep_last_logged", 0),
            "loss": float(self._over_ranks(getattr(self, "_tr_loss", torch.zeros(())), "mean")),
        }
        if self.args.should_save and folder.is_dir():
            shutil.rmtree(folder)  # torn, or of an earlier try at the same step
        self.accelerator.wait_for_everyone()
        try:
            super()._save_checkpoint(*args, **kwargs)
            if self.args.should_save:
                (folder / CARRIED).write_text(json.dumps(carried))
            self.accelerator.wait_for_everyone()
            if self.args.should_save:
                mark_complete(folder)
        except (OSError, RuntimeError, SafetensorError) as error:
            raise checkpoints.checkpoint_error(folder, error) from error
        finally:
            self.args.save_total_limit = limit
        if self.args.should_save:
            checkpoints.keep_newest(self.args.output_dir, limit, self.state.best_model_checkpoint)

    def _carry_on(self) -> None:
        """The loss since the last log goes on where the checkpoint was, so that the curve does."""
        path = Path(self._resumed_from or "") / CARRIED
        if not self._resumed_from or not path.is_file():
            return
        carried = json.loads(path.read_text())
        if carried["step"] == self.state.global_step and hasattr(self, "_tr_loss"):
            self._tr_loss += carried["loss"]
            self._globalstep_last_logged = carried["logged"]

    # --- a run ------------------------------------------------------------------------------------

    def train(self, resume_from_checkpoint: Any = None, *args: Any, **kwargs: Any) -> Any:
        """As ``Trainer.train``; True resumes from the newest whole checkpoint, or starts anew.

        Raises:
            FileExistsError: the output folder has checkpoints of another run.
            KeyError: a sequence is not in the teacher cache.
            TrainingInterrupted: after Ctrl-C or SIGTERM, with a checkpoint written.
        """
        folder = Path(self.args.output_dir)
        if resume_from_checkpoint is True or not resume_from_checkpoint:
            identity, going_on = checkpoints.run_identity(self), bool(resume_from_checkpoint)
            self._on_first_rank(lambda: checkpoints.claim_folder(folder, identity, going_on))
        if resume_from_checkpoint is True:
            found = self._on_first_rank(lambda: checkpoints.last_complete_checkpoint(folder))
            resume_from_checkpoint = None if found is None else str(found)
        if self.objective.soft:
            check_domains(self.train_dataset, self.objective.teacher)
            missing = check_coverage(self.train_dataset, self.objective.teacher)
            if missing:
                print(f"{missing} sequences are not in the teacher cache; they have labels only")
        self._resumed_from = resume_from_checkpoint or None
        if self._resumed_from:
            checkpoints.check_resumable(self._resumed_from)
        self._stop_agreed = False
        self._last_log = (time.perf_counter(), float(self._tokens_seen))
        with self._stop.listening():
            result = super().train(resume_from_checkpoint, *args, **kwargs)
        if self._stop_agreed and self.state.global_step < self.state.max_steps:
            raise TrainingInterrupted(
                f"stopped at step {self.state.global_step} of {self.state.max_steps}; "
                f"checkpoint-{self.state.global_step} is written. Run again to continue."
            )
        if self.write_report and self.args.should_save:
            write_report(folder, self.state.log_history)
        return result

    def _on_first_rank(self, function: Any) -> Any:
        """A function's result, computed by one rank for all."""
        if self.args.world_size == 1:
            return function()
        from accelerate.utils import broadcast_object_list

        found = [function() if self.args.process_index == 0 else None]
        return broadcast_object_list(found)[0]


def _real_rows(accelerator: Any, rows: int) -> int:
    """Rows of this rank's batch that are not there twice to make the last batch of all even."""
    state = accelerator.gradient_state
    remainder = state.remainder if state.end_of_dataloader else -1
    if accelerator.num_processes == 1 or remainder <= 0:
        return rows
    return min(rows, max(0, remainder - accelerator.process_index * rows))


def _joined(objective: Objective, collator: Any, teacher_model: Any) -> tuple[Objective, Any]:
    """One place knows the teachers, the objective; the collator looks up what it asks for."""
    if teacher_model is not None:
        if objective.teacher is not None:
            raise ValueError(
                "DistillationTrainer: a teacher must be given once, got teacher_model and the "
                "objective's own. Leave one out; several go into Objective(teacher=[...])."
            )
        objective = objective.taught_by(teacher_model)
    if not isinstance(collator, DistillationCollator):
        return objective, collator
    theirs = Teachers.of(collator.cache)
    if theirs is not None and objective.teacher is None:
        objective = objective.taught_by(theirs)
    elif theirs is not None and not theirs.same(objective.teacher):
        raise ValueError(
            "DistillationTrainer: the collator's cache must be the objective's teacher, got "
            "another, or other weights or domains. Leave it out of the collator: the trainer hands "
            "it the objective's."
        )
    return objective, dataclasses.replace(collator, cache=objective.teacher)
