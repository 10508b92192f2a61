"""What a distillation run says about itself: loss parts, agreement with the teacher, its mass."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable

import torch
from torch import Tensor

from kd.losses import Hidden
from kd.training.objective import Objective

NAMES = ("tokens", "ce", "kd", "top1", "mass")
MAX_ROWS = 2048  # agreement needs an argmax over the vocabulary: enough rows for two digits
BLOCK = 256


class StepMetrics:
    """Sums over the trained tokens of the steps that are logged, additive over microbatches.

    Attributes:
        sums: float64 [5], in the order of ``NAMES``.
    """

    def __init__(self, objective: Objective) -> None:
        self.objective = objective
        self.sums = torch.zeros(len(NAMES), dtype=torch.float64)

    def observe(self, student: Hidden, targets: dict[str, Tensor]) -> None:
        """Add one microbatch: student rows [N, H] and their targets."""
        rows = (targets["labels"] != -100).nonzero().squeeze(1)[:MAX_ROWS]
        if rows.numel() == 0:
            return
        taken = {key: value.index_select(0, rows) for key, value in targets.items()}
        student = dataclasses.replace(student, hidden=student.hidden.index_select(0, rows))
        ce = dataclasses.replace(self.objective, kd_weight=0.0, ce_weight=1.0)
        parts = [float(rows.numel()), ce.loss(student, taken, reduction="sum").item(), 0.0, 0.0]
        mass = 0.0
        if self.objective.kd_weight > 0:
            soft = dataclasses.replace(
                self.objective, kd_weight=1.0, ce_weight=0.0, scale_by_t2=False
            )
            parts[2] = soft.loss(student, taken, reduction="sum").item()
            parts[3] = float(agreement(student, taken, self.objective.vocab_size))
            mass = taken["teacher_logprobs"].double().exp().sum().item()
        self.sums += torch.tensor([*parts, mass], dtype=torch.float64)

    def summary(self, reduce: Callable[[Tensor], Tensor] | None = None) -> dict[str, float]:
        """Means per trained token, and start again.

        Args:
            reduce: sums a tensor over all ranks; every rank must call ``summary`` then.
        """
        sums = self.sums if reduce is None else reduce(self.sums)
        self.sums = torch.zeros_like(self.sums)
        tokens, ce, soft, top1, mass = (float(value) for value in sums)
        if tokens == 0:
            return {}
        found = {"ce": ce / tokens}
        if self.objective.kd_weight > 0:
            found |= {
                "kd": soft / tokens,
                "teacher_top1_agreement": top1 / tokens,
                "teacher_mass": mass / tokens,
            }
        return {key: value if math.isfinite(value) else math.nan for key, value in found.items()}


def agreement(student: Hidden, targets: dict[str, Tensor], vocab_size: int | None) -> int:
    """In how many rows the student's likeliest token is the teacher's; [N, V] is never made."""
    best = targets["teacher_logprobs"].argmax(dim=-1, keepdim=True)
    wanted = targets["teacher_ids"].gather(-1, best).squeeze(-1)  # [N]
    same = 0
    for start in range(0, wanted.numel(), BLOCK):
        part = dataclasses.replace(student, hidden=student.hidden[start : start + BLOCK])
        logits = dense_logits(part)[:, :vocab_size]
        same += int((logits.argmax(dim=-1) == wanted[start : start + BLOCK]).sum())
    return same


def dense_logits(student: Hidden) -> Tensor:
    """The logits a ``kd.Hidden`` stands for."""
    logits = student.hidden @ student.weight.T
    if student.lora is not None:
        first, second, scaling = student.lora
        logits = logits + scaling * (student.hidden @ first.T @ second.T)
    if student.bias is not None:
        logits = logits + student.bias
    if student.logit_scale is not None:
        logits = logits * student.logit_scale
    if student.softcap is not None:
        logits = student.softcap * torch.tanh(logits / student.softcap)
    return logits
