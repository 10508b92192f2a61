"""Vocabulary shards in Triton: kd.losses.shards' three functions on kd_kernels.shards' kernels."""

from __future__ import annotations

import dataclasses
import math
from typing import Any

import torch
from torch import Tensor

from kd.losses.shards import Numbers, Tile
from kd.losses.triton_backend import _row_loss

UNIT = math.log(2)
"""Kernels keep logits in log2 units."""


def _arguments(tile: Tile, kind: str) -> tuple[Any, Any, Any]:
    """(student, teacher, row loss) as kernels take them; the vocabulary is the shard's."""
    from kd_kernels.rows import Logits

    def logits(raw: Tensor, transform: tuple[float | None, float | None]) -> Any:
        raw = raw if raw.shape[-1] < 2 or raw.stride(-1) == 1 else raw.contiguous()
        scale, cap = transform
        return Logits(raw, 1.0 if scale is None else scale, cap)

    loss = dataclasses.replace(_row_loss(tile.objective), vocab=tile.student.shape[1])
    loss = dataclasses.replace(loss, divergence=kind or loss.divergence)
    teacher = None if tile.teacher is None else logits(tile.teacher, tile.teacher_transform)
    return logits(tile.student, tile.student_transform), teacher, loss


def statistics(tile: Tile, *, gap: str, hard: bool, ids: Tensor | None = None) -> Tensor:
    from kd_kernels.shards import shard_statistics

    student, teacher, loss = _arguments(tile, "")
    return shard_statistics(student, teacher, tile.weight, loss, gap=gap, hard=hard, ids=ids)


def sums(tile: Tile, numbers: Numbers) -> Tensor:
    from kd_kernels.shards import shard_sums

    student, teacher, loss = _arguments(tile, "")
    return shard_sums(student, teacher, numbers.stacked(torch.float32), tile.weight, loss)


def gradient_(
    out: Tensor, tile: Tile, numbers: Numbers, coefficient: Tensor, *, kind: str, hard: bool
) -> None:
    from kd_kernels.shards import shard_gradient_

    student, teacher, loss = _arguments(tile, kind)
    shard_gradient_(
        out,
        student,
        teacher,
        numbers.stacked(torch.float32),
        coefficient.float(),
        loss,
        labels=tile.labels if hard else None,
    )
