"""What a person wants to know before they leave a run for the night, from two of its batches."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

from kd.heads import undisturbed
from kd.training import findings
from kd.training.findings import Check
from kd.training.objective import Objective
from kd.training.student import prepare_student


class Checked(Exception):
    """Raised by ``fit`` in place of training, where a check was asked for.

    Attributes:
        checks: what was found.
    """

    def __init__(self, checks: Sequence[Check]) -> None:
        super().__init__(f"{len(checks)} trainings were checked and not started.")
        self.checks = list(checks)


_asked = False


@contextmanager
def instead_of_training() -> Iterator[None]:
    """Inside, ``fit`` checks and raises ``Checked``; ``kd run NAME --check`` works by it."""
    global _asked
    before, _asked = _asked, True
    try:
        yield
    finally:
        _asked = before


def title_of(name: str, objective: Objective | None) -> str:
    """A training's name and what was set of its objective."""
    objective = objective or Objective()
    set_here = [
        f"{item.name}={value!r}"
        for item in dataclasses.fields(objective)
        if item.repr and (value := getattr(objective, item.name)) != item.default
    ]
    return f"{name}: Objective({', '.join(set_here)})"


def asked() -> bool:
    """Whether trainings are to be checked and not started."""
    return _asked


def check(
    student: Any,
    collator: Any,
    rows: Any,
    objective: Objective | None = None,
    *,
    tokenizer: Any = None,
    batch_size: int = 2,
    batches: int = 2,
    title: str = "",
) -> Check:
    """Run two batches forward and backward, and say what they show; nothing is trained.

    Args:
        student: the causal LM about to be trained; its weights, gradients, mode and the random
            state are as before afterwards.
        collator: a ``DistillationCollator``.
        rows: the training rows, ``{input_ids, labels, ...}``; the first ``batches * batch_size``
            and, of a data set with a length, none else are looked at.
        objective: what will be minimised; plain SFT when None.
        tokenizer: shows the rows as text; ids are shown without one.
        batch_size: rows in a batch.
        batches: how many.
        title: the first line of the page.

    Returns:
        A ``Check``; print it.

    Raises:
        ValueError: there are no rows, or the batch itself is refused.
    """
    objective = (objective or Objective()).at(0, 2)
    taken = findings.first_rows(rows, batch_size * batches)
    if not taken:
        raise ValueError("check: rows must hold at least one row, got none.")
    parts = [taken[at : at + batch_size] for at in range(0, len(taken), batch_size)]
    found = Check(
        title, rows=[findings.shown(row, tokenizer) for row in taken[: findings.ROWS_SHOWN]]
    )
    prepare_student(student)
    with findings.own_gradients(student), undisturbed(student):
        made = [findings.on_device_of(collator(part), student) for part in parts]
        findings.count_tokens(found, made, taken)
        findings.look_at_ends(found, taken, student, tokenizer)
        findings.compare_losses(found, student, made, objective)
        if objective.soft:
            findings.compare_teacher(found, student, made, objective)
        findings.idle_fields(found, student, made, objective)
        findings.gradients(found, student, made, objective)
    return found
