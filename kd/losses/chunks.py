"""How many rows of logits are alive at once, and where they lie.

Every chunk reads the lm_heads once, so few large chunks are faster; their memory is what a fused
loss takes beyond its inputs and its gradients.
"""

from __future__ import annotations

import dataclasses

from torch import Tensor

BUDGET = 264 << 20
"""Bytes of the student's and the teacher's logits of a chunk, together."""

ALIGNMENT = 64


def even(count: int, most: int) -> int:
    """Rows of a chunk: even chunks of ``most`` at most, as a short last one wastes its matmuls."""
    return -(-count // -(-count // max(1, most))) if count else 1


@dataclasses.dataclass(frozen=True)
class Plan:
    """The cut of a projection's rows into chunks, for a student and a teacher that is projected.

    Until the first chunk's dW is written, its memory is free: where it is large enough, the
    teacher's logits go there, and the first chunk may be as large as the budget. Later chunks
    share the buffer, two thirds and one.
    """

    first: int  # rows of the first chunk
    later: int  # rows of the others
    row_bytes: int  # of the student's logits
    bytes: int  # of the buffer
    borrows: bool = False  # the first chunk's teacher logits lie in dW

    @classmethod
    def of(cls, count: int, row_bytes: int, teacher_row_bytes: int, spare: int) -> Plan:
        """teacher_row_bytes: 0 where no teacher is projected; spare: bytes of dW."""
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
