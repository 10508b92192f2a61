"""A loss as the driver and the backends see it: flat over tokens, every option resolved.

A ``Problem`` is the whole loss. The driver (kd.losses.fused) makes the raw logits of some of its
rows and hands them, as a ``Tile``, to the backend: raw logits in, row losses and the gradient of
the raw logits out.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from typing import Any, TypeAlias

from torch import Tensor

from kd.losses.divergences import Divergence
from kd.losses.inputs import TopK

Transform: TypeAlias = "tuple[float | None, float | None]"
"""(scale, cap) of final logits, cap * tanh(scale * raw / cap); None where there is none."""
NO_TRANSFORM: Transform = (None, None)


@dataclasses.dataclass(slots=True)
class Objective:
    """What a row's loss is: kd_weight * divergence(T) + ce_weight * cross-entropy."""

    divergence: Divergence
    temperature: float
    kd_weight: float  # T**2 included where asked for
    ce_weight: float
    vocab_size: int
    min_logprob: float | None


@dataclasses.dataclass(slots=True)
class Projection:
    """Logits as matmuls, sum of x @ w.T + bias: the lm_head, and LoRA's second pair."""

    pairs: tuple[tuple[Tensor, Tensor], ...]  # ([N, H_i], [V, H_i])
    bias: Tensor | None  # [V]
    transform: Transform


@dataclasses.dataclass(slots=True)
class SparseRows:
    """A sparse teacher's rows, canonical: unique ids, at the loss temperature.

    ids [R, K] with -1 in empty slots; log_p [R, K]; log_tail [R, 1]; tail the mode.
    """

    ids: Tensor
    log_p: Tensor
    log_tail: Tensor
    tail: str

    def __getitem__(self, rows: slice | Tensor) -> SparseRows:
        return SparseRows(self.ids[rows], self.log_p[rows], self.log_tail[rows], self.tail)


@dataclasses.dataclass(slots=True)
class Tile:
    """Rows for a backend."""

    student: Tensor  # [R, >= columns] raw logits
    teacher: Tensor | SparseRows | None  # [R, >= columns] raw logits, or sparse rows
    labels: Tensor | None  # [R] token ids, where they enter the loss; not read where weight is 0
    weight: Tensor | None  # [R] of the gradient; rows of zero are skipped; None: all count, as one
    gradient: Tensor | None  # [R, width]; columns past the live ones become 0; may be the student's
    objective: Objective
    columns: int  # live ones
    student_transform: Transform = NO_TRANSFORM
    teacher_transform: Transform = NO_TRANSFORM
    scratch: bool = False  # the teacher's logits may be overwritten
    first: int = 0  # which of the problem's rows the tile begins with


@dataclasses.dataclass(frozen=True)
class Backend:
    """How the rows of a tile are computed, and what the driver must know of it."""

    rows: Callable[[Tile], Tensor]
    """Losses [R] of a tile; its gradient goes into ``Tile.gradient`` where that is given."""
    wide: bool = False
    """Raw logits of a projection are float32 whatever the hidden states are."""
    fused: bool = False
    """Runs Triton kernels, so that a large chunk costs no memory beyond its logits."""


@dataclasses.dataclass(slots=True)
class Problem:
    """One loss: what is compared and how rows count. Tensors are flat over tokens."""

    student: Tensor | Projection  # [N, V] logits or a projection
    teacher: Tensor | Projection | TopK | None  # None where it does not enter the loss
    labels: Tensor | None  # [N], None where they do not enter the loss
    weight: Tensor  # [N], zero where a row does not count; float64 of float64, else float32
    objective: Objective
    backend: Backend
    columns: int  # live columns of the student on this device
    rows: Tensor | None = None  # [M] rows of a projection that count; None is all
    overwrite: bool = False  # logits only: the gradient replaces the student's logits
    shard: Any = None  # kd.losses.rows_sharded.Shard, where ranks hold parts of the vocabulary
