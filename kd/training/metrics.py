"""What a distillation run says about itself: loss parts, agreement with the teacher, its mass."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

import kd
from kd.heads import dense_logits
from kd.losses import Hidden
from kd.training.objective import Objective
from kd.training.teachers import STAMP
from kd.training.tokens import ANSWER, DIGIT, THINK

CLASSES = {"think": THINK, "answer": ANSWER, "digit": DIGIT}
NAMES: tuple[str, ...] = ("tokens", "ce", "kd", "taught", "top1", "sparse", "mass")
NAMES += tuple(f"{part}_{name}" for name in CLASSES for part in ("kd", "tokens"))
MAX_ROWS = 2048  # agreement needs an argmax over the vocabulary: enough rows for two digits
BLOCK = 256


class StepMetrics:
    """Sums over the trained tokens of the steps that are logged, additive over microbatches.

    Attributes:
        sums: float64, in the order of ``NAMES``.
    """

    def __init__(self) -> None:
        self.sums = torch.zeros(len(NAMES), dtype=torch.float64)

    def observe(self, objective: Objective, student: Hidden, targets: dict[str, Any]) -> None:
        """Add one microbatch: student rows [N, H] and their targets."""
        rows = (targets["shift_labels"] != -100).nonzero().squeeze(1)[:MAX_ROWS]
        if rows.numel() == 0:
            return
        taken = selected(targets, rows)
        taken.pop("weights", None)  # the log has plain means over tokens
        student = dataclasses.replace(student, hidden=student.hidden.index_select(0, rows))
        found = dict.fromkeys(NAMES, 0.0)
        found["tokens"] = float(rows.numel())
        found["ce"] = kd.cross_entropy(
            student,
            taken["shift_labels"],
            vocab_size=objective.vocab_size,
            backend=objective.backend,
            reduction="sum",
        ).item()
        if objective.soft:
            found |= _soft_parts(objective, student, taken)
        self.sums += torch.tensor([found[name] for name in NAMES], dtype=torch.float64)

    def summary(self, reduce: Callable[[Tensor], Tensor] | None = None) -> dict[str, float]:
        """Means per trained token, and start again.

        Args:
            reduce: sums a tensor over all ranks; every rank must call ``summary`` then.
        """
        sums = self.sums if reduce is None else reduce(self.sums)
        self.sums = torch.zeros_like(self.sums)
        total = dict(zip(NAMES, sums.tolist(), strict=True))
        if total["tokens"] == 0:
            return {}
        found = {"ce": total["ce"] / total["tokens"]}
        if total["taught"]:
            found["kd"] = total["kd"] / total["taught"]
            found["teacher_top1_agreement"] = total["top1"] / total["taught"]
        if total["sparse"]:
            found["teacher_mass"] = total["mass"] / total["sparse"]
        for name in CLASSES:
            if total[f"tokens_{name}"]:
                found[f"kd_{name}"] = total[f"kd_{name}"] / total[f"tokens_{name}"]
        return {key: value if math.isfinite(value) else math.nan for key, value in found.items()}


def _soft_parts(objective: Objective, student: Hidden, taken: dict[str, Any]) -> dict[str, float]:
    """Divergences without weights or T**2, by class of token; agreement; mass covered."""
    soft = dataclasses.replace(objective, kd_weight=1.0, ce_weight=0.0, scale_by_t2=False)
    each = soft.loss(student, taken, reduction="none").double()
    found = {"kd": each.sum().item(), "taught": 0.0, "top1": 0.0, "sparse": 0.0, "mass": 0.0}
    taught = torch.zeros_like(each, dtype=torch.bool)
    best = top_tokens(student, objective.vocab_size)
    for target, rows in objective.targets(taken):
        if target is None:
            continue
        rows = torch.ones_like(taught) if rows is None else rows
        if isinstance(target, kd.TopK):
            rows = rows & (target.ids >= 0).any(-1)  # a sequence that was skipped has none
            wanted = target.ids.gather(-1, target.logprobs.argmax(-1, keepdim=True)).squeeze(-1)
            found["sparse"] += float(rows.sum())
            found["mass"] += target.logprobs[rows].double().exp().sum().item()
        else:
            wanted = top_tokens(target, objective.vocab_size)
        found["top1"] += float(((best == wanted) & rows).sum())
        found["taught"] += float(rows.sum())
        taught |= rows
    found["kd"] = each[taught].sum().item() if found["taught"] else 0.0
    kinds = taken.get("token_class")
    if kinds is not None:
        for name, bit in CLASSES.items():
            mine = taught & ((kinds & bit) > 0)
            found[f"kd_{name}"] = each[mine].sum().item()
            found[f"tokens_{name}"] = float(mine.sum())
    return found


def selected(flat: dict[str, Any], rows: Tensor) -> dict[str, Any]:
    """Some rows of flattened targets."""
    taken: dict[str, Any] = {}
    for key, value in flat.items():
        if isinstance(value, Hidden):
            taken[key] = dataclasses.replace(value, hidden=value.hidden.index_select(0, rows))
        elif key.startswith(("teacher_form", STAMP)):
            taken[key] = value
        else:
            taken[key] = value.index_select(0, rows)
    return taken


def top_tokens(source: Hidden | Tensor, vocab_size: int | None) -> Tensor:
    """The likeliest token of every row [N]; [N, V] is never made from hidden states."""
    if isinstance(source, Tensor):
        return source[:, :vocab_size].argmax(dim=-1)
    best = []
    for start in range(0, len(source.hidden), BLOCK):
        part = dataclasses.replace(source, hidden=source.hidden[start : start + BLOCK])
        best.append(dense_logits(part)[:, :vocab_size].argmax(dim=-1))
    return torch.cat(best)
