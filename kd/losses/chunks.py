"""How many rows of logits are alive at once, and where they lie.

Every chunk reads the lm_heads once, so few large chunks are faster; their memory is what a fused
loss takes beyond its inputs and its gradients.
"""

from __future__ import annotations

import dataclasses
import math

import numpy as np
import torch
from torch import Tensor

BUDGET = 264 << 20
"""Bytes of the student's and the teacher's logits of a chunk, together."""

TEACHER_BYTES = 80 << 20
"""Logits of a teacher given as hidden states beside a student given as logits."""

GATHERED_BYTES = 32 << 20
"""A teacher's logits that are gathered because some rows do not count."""

INTERPRETER_BYTES = 64 << 20
"""Logits of a chunk for Triton kernels where there is no GPU."""

HUGE_BYTES = 8 << 20
"""Size from which CPU memory is asked for in huge pages."""

ALIGNMENT = 64


def even(count: int, most: int) -> int:
    """Rows of a chunk: even chunks of ``most`` at most, as a short last one wastes its matmuls."""
    return -(-count // -(-count // max(1, most))) if count else 1


def fused_rows(count: int, row_bytes: int, device: torch.device) -> int:
    """Rows of a chunk for Triton kernels: even chunks of a sixteenth of the device's memory.

    float32 accumulation of dW moves 8 * V * H bytes a chunk, which the matmul hides from about
    1,000 tokens up: an 80 GB device takes 3,300 at a vocabulary of 152k.
    """
    budget = INTERPRETER_BYTES
    if device.type == "cuda":
        budget = torch.cuda.get_device_properties(device).total_memory // 16
    size = max(1, budget // max(1, row_bytes))
    size = size // 128 * 128 if size >= 128 else size
    return min(size, -(-even(count, size) // 128) * 128)


def empty(shape: tuple[int, ...] | torch.Size, dtype: torch.dtype, device: torch.device) -> Tensor:
    """Uninitialised memory. Large CPU tensors come from numpy, which asks for huge pages: the
    first touch of fresh memory is then a fraction of the page faults of ``torch.empty``, which
    cost as much as the whole of a row's arithmetic."""
    size = math.prod(shape)
    if device.type != "cpu" or size * dtype.itemsize < HUGE_BYTES:
        return torch.empty(shape, dtype=dtype, device=device)
    memory = torch.from_numpy(np.empty(size * dtype.itemsize, dtype=np.uint8))
    return memory.view(dtype).view(shape)


@dataclasses.dataclass(slots=True)
class Plan:
    """The cut of a loss's rows into chunks, and the memory for their logits."""

    first: int  # rows of the first chunk
    later: int  # rows of the others
    row_bytes: int = 0  # of the student's logits, where they are projected
    bytes: int = 0  # of a buffer that all chunks share; 0: each has memory of its own
    borrows: bool = False  # the first chunk's teacher logits lie in dW

    @classmethod
    def of(cls, count: int, row_bytes: int, teacher_row_bytes: int, spare: int) -> Plan:
        """The cut of a projection's rows on a CPU.

        Until the first chunk's dW is written, its memory is free: where it is large enough, the
        teacher's logits go there, and the first chunk may be as large as the budget. Later chunks
        share the buffer, two thirds and one.

        teacher_row_bytes: 0 where no teacher is projected; spare: bytes of dW.
        """
        most = max(1, BUDGET // row_bytes)
        if teacher_row_bytes == 0:
            rows = even(count, most)
            return cls(rows, rows, row_bytes, rows * row_bytes)
        rows = even(count, 2 * BUDGET // 3 // row_bytes)
        beside = even(rows, (BUDGET - rows * row_bytes) // teacher_row_bytes)
        size = rows * row_bytes + ALIGNMENT + beside * teacher_row_bytes
        whole = min(count, most)
        if 2 * spare < whole * teacher_row_bytes:
            return cls(rows, rows, row_bytes, size)
        rest = count - whole
        if rest * (row_bytes + teacher_row_bytes) + ALIGNMENT <= whole * row_bytes:
            return cls(whole, max(1, rest), row_bytes, whole * row_bytes, True)
        return cls(whole, min(rows, rest), row_bytes, max(whole * row_bytes, size), True)

    def split(self, memory: Tensor, rows: int) -> tuple[Tensor, Tensor]:
        """Bytes of ``rows`` of the student's logits, and those left for the teacher's."""
        used = rows * self.row_bytes
        return memory[:used], memory[-(-used // ALIGNMENT) * ALIGNMENT :]
