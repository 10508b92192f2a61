"""Training a student: the collator, the objective, and a ``transformers.Trainer`` that uses them.

A bare loop needs three of the pieces:

    prepare_student(model)                                   # once: the loss goes into its forward
    batch = DistillationCollator(pad_token_id, cache)(rows)  # shifts the labels, adds the targets
    loss = compute_loss(model, batch, Objective(kd_weight=0.5, ce_weight=0.5, teacher=teacher))

README.md beside this file tells the rest.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

from kd.training.collator import DistillationCollator
from kd.training.loss import compute_loss
from kd.training.metrics import TokenClasses
from kd.training.objective import Objective
from kd.training.preflight import Check, check
from kd.training.rows import trained_weight
from kd.training.schedules import Schedule, cosine, linear
from kd.training.student import prepare_student
from kd.training.teachers import Teacher

if TYPE_CHECKING:
    from kd.training.checkpoints import last_complete_checkpoint, mark_complete
    from kd.training.fitting import fit, keep_student
    from kd.training.trainer import DistillationTrainer

__all__ = [
    "Check",
    "DistillationCollator",
    "DistillationTrainer",
    "Objective",
    "Schedule",
    "Teacher",
    "TokenClasses",
    "check",
    "compute_loss",
    "cosine",
    "fit",
    "keep_student",
    "last_complete_checkpoint",
    "linear",
    "mark_complete",
    "prepare_student",
    "trained_weight",
]


_LATE = {  # transformers' Trainer takes seconds to import
    "DistillationTrainer": "trainer",
    "fit": "fitting",
    "keep_student": "fitting",
    "last_complete_checkpoint": "checkpoints",
    "mark_complete": "checkpoints",
}


def __getattr__(name: str) -> Any:
    if name in _LATE:
        return getattr(importlib.import_module(f"kd.training.{_LATE[name]}"), name)
    raise AttributeError(f"module 'kd.training' has no attribute {name!r}")
