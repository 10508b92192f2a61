"""What a step minimises: hard labels, a cached teacher, or a weighted mix; and the bare loop."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

import kd
from kd.losses import Hidden


@dataclass(frozen=True)
class Objective:
    """kd_weight * T**2 * D(teacher, student) + ce_weight * cross-entropy, per trained token.

    ``Objective()`` is plain SFT on the traces. ``Objective(kd_weight=0.5, ce_weight=0.5,
    temperature=2.0)`` mixes in a teacher, whose targets the collator puts in the batch.
    """

    kd_weight: float = 0.0
    """Weight of the divergence from the teacher; 0 needs no teacher."""
    ce_weight: float = 1.0
    """Weight of the cross-entropy on the labels."""
    divergence: Any = "forward_kl"
    """A name, or kd.jsd(0.5), kd.skew_reverse_kl(0.1), ..."""
    temperature: float = 1.0
    """Divides both models' logits in the soft part; the hard part is never affected."""
    scale_by_t2: bool = True
    """Multiply the soft part by temperature**2 (Hinton), so that the mix keeps its balance."""
    teacher_temperature: float = 1.0
    """The temperature the cached log-probabilities were captured at (cache.meta.temperature)."""
    tail: str = "bucket"
    """What the probability outside the cached tokens means (see kd.TopK)."""
    vocab_size: int | None = None
    """Live tokens; the padded rows of the lm_head past it take no part."""
    floor: float | None = None
    """Bounds divergences that would be infinite where the teacher has probability zero."""
    backend: str = "auto"
    """Which implementation of the losses runs: auto, torch, triton, reference."""

    def __post_init__(self) -> None:
        for name in ("kd_weight", "ce_weight"):
            value = getattr(self, name)
            if not (math.isfinite(value) and value >= 0):
                raise ValueError(
                    f"Objective: {name} must be a finite number of at least 0, got {value}. "
                    "Turn a part off with 0."
                )
        if self.kd_weight == 0 and self.ce_weight == 0:
            raise ValueError(
                "Objective: kd_weight or ce_weight must be above 0, got 0 and 0. "
                "Nothing would be trained."
            )

    def loss(
        self,
        student: Hidden | Tensor,
        batch: Mapping[str, Any],
        *,
        reduction: str = "mean",
        num_items: Any = None,
    ) -> Tensor:
        """The objective on one batch whose labels are already aligned with the student's rows."""
        labels, weights = batch["labels"], batch.get("weights")
        if self.kd_weight == 0:
            loss = kd.cross_entropy(
                student,
                labels,
                weights=weights,
                vocab_size=self.vocab_size,
                reduction=reduction,
                num_items=num_items,
                backend=self.backend,
            )
            return loss if self.ce_weight == 1 else loss * self.ce_weight
        return kd.distillation_loss(
            student,
            self.teacher(batch),
            divergence=self.divergence,
            temperature=self.temperature,
            scale_by_t2=self.scale_by_t2,
            labels=labels,
            kd_weight=self.kd_weight,
            ce_weight=self.ce_weight,
            weights=weights,
            vocab_size=self.vocab_size,
            reduction=reduction,
            num_items=num_items,
            floor=self.floor,
            backend=self.backend,
        )

    def teacher(self, batch: Mapping[str, Any]) -> kd.TopK:
        """The batch's cached targets as a ``kd.TopK``."""
        if batch.get("teacher_ids") is None:
            raise ValueError(
                "Objective: batch must hold teacher_ids and teacher_logprobs when kd_weight > 0, "
                f"got {sorted(batch)}. Give the collator a cache, or set kd_weight=0."
            )
        return kd.TopK(
            batch["teacher_ids"],
            batch["teacher_logprobs"],
            tail=self.tail,
            temperature=self.teacher_temperature,
        )


Observer = Callable[[Hidden, dict[str, Tensor]], None]
TOKEN_KEYS = ("labels", "weights", "teacher_ids", "teacher_logprobs")


def flat_targets(batch: Mapping[str, Any]) -> dict[str, Tensor]:
    """The per-token entries of a batch with batch and length made one dimension."""
    found = {key: batch[key] for key in TOKEN_KEYS if batch.get(key) is not None}
    return {key: value.flatten(0, 1) for key, value in found.items()}


def head_loss(
    objective: Objective,
    batch: Mapping[str, Any],
    num_items: Any = None,
    observe: Observer | None = None,
) -> Callable[[Hidden], Tensor]:
    """What the student's lm_head computes instead of logits (see kd.training.student)."""

    def loss(student: Hidden) -> Tensor:
        flat = dataclasses.replace(student, hidden=student.hidden.flatten(0, 1))  # [N, H]
        targets = flat_targets(batch)
        if observe is not None:
            with torch.no_grad():
                observe(flat, targets)
        return objective.loss(flat, targets, num_items=num_items)

    return loss


MODEL_KEYS = ("input_ids", "attention_mask", "position_ids", "inputs_embeds")


def compute_loss(
    model: Any,
    batch: Mapping[str, Any],
    objective: Objective | None = None,
    *,
    num_items: Any = None,
    observe: Observer | None = None,
) -> Tensor:
    """The loss of one batch through a prepared student, for a training loop of one's own.

    Args:
        model: the student after ``prepare_student``, bare or wrapped by DDP, FSDP or accelerate.
        batch: what ``DistillationCollator`` returns.
        objective: what to minimise; plain cross-entropy when None.
        num_items: trained tokens of the whole optimiser step, over all microbatches and ranks;
            the loss is divided by it, so that any split gives the one-batch gradient. The batch's
            own count when None. Under DDP multiply the loss by the number of ranks, as DDP
            averages.
        observe: called without gradient with all rows [N, H] and their targets, for metrics.

    Returns:
        A scalar with a graph.
    """
    inputs = {key: batch[key] for key in MODEL_KEYS if batch.get(key) is not None}
    function = head_loss(objective or Objective(), batch, num_items, observe)
    output = model(**inputs, head_loss=function)
    return output["loss"]
