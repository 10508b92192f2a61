"""The loss of a batch through a prepared student, for any training loop."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor

import kd
from kd.training.batches import MODEL_KEYS, per_token
from kd.training.checks import check_apart, check_context
from kd.training.objective import Objective
from kd.training.packs import documents_apart
from kd.training.rows import trained_weight

Observer = Callable[[kd.Hidden, dict[str, Any]], None]


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
        batch: what ``DistillationCollator`` returns; one without ``shift_labels`` is refused.
        objective: what to minimise; plain cross-entropy when None. One with schedules is passed
            as ``objective.at(step, steps)``. Its models in memory are run here.
        num_items: trained tokens of the whole optimiser step, over all microbatches and ranks;
            the loss is divided by it, so that any split gives the one-batch gradient. The batch's
            own count when None. Under DDP multiply the loss by the number of ranks, as DDP
            averages.
        observe: called without gradient with all rows [N, H] and their targets, for metrics.

    Returns:
        A scalar with a graph. What the model itself adds to its loss (the routers' of a mixture of
        experts with ``output_router_logits=True``, times the model's coefficient) is in it, as a
        mean over the step's microbatches, weighted by their trained tokens. Not without gradient:
        the loss of an evaluation is a mean over tokens, whatever its batches.
    """
    objective = objective or Objective()
    objective.check_batch(batch, "compute_loss")
    modules = model.modules() if isinstance(model, torch.nn.Module) else ()
    if modules and not any(getattr(m, "_kd_original_forward", None) is not None for m in modules):
        raise TypeError(
            "compute_loss: model must be one that prepare_student was called on, got "
            f"{type(model).__name__}. Call kd.training.prepare_student(model) once, before DDP, "
            "FSDP or accelerate wrap it."
        )
    check_apart(model, objective.teacher)
    config = getattr(getattr(model, "module", model), "config", None)
    if config is not None:
        check_context(config, batch)
    batch = documents_apart(model, batch, objective.teacher if objective.soft else None)
    inputs = {key: batch[key] for key in MODEL_KEYS if batch.get(key) is not None}
    if objective.soft and objective.teacher is not None:
        batch = objective.teacher.forward(batch)

    def head_loss(student: kd.Hidden) -> Tensor:
        """What the student's lm_head computes instead of logits (see kd.training.student)."""
        flat = dataclasses.replace(student, hidden=student.hidden.flatten(0, 1))  # [N, H]
        targets = flat_targets(batch)
        if observe is not None:
            with torch.no_grad():
                observe(flat, targets)
        return objective.loss(flat, targets, num_items=num_items)

    output = model(**inputs, head_loss=head_loss)
    loss, added = output["loss"], output["aux_loss"]
    if added is None or not torch.is_grad_enabled():
        return loss
    if num_items is not None:  # a mean over microbatches and ranks, weighted by their tokens
        added = added * (trained_weight(batch["shift_labels"], batch.get("weights")) / num_items)
    return loss + added.to(loss.device)


def flat_targets(batch: Mapping[str, Any]) -> dict[str, Any]:
    """The per-token entries of a batch with batch and length made one dimension."""
    return per_token(batch, lambda values: values.flatten(0, 1))
