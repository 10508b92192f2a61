"""The launchers as PyTorch operators, which torch.compile keeps in one graph.

Each writes the gradient into the tensor it is given and returns the row losses. The fakes give
shapes alone; autograd is kd.losses'.
"""

from __future__ import annotations

import torch
from torch import Tensor

from kd_kernels.dense import dense_losses
from kd_kernels.rows import Logits, RowLoss
from kd_kernels.sparse import sparse_losses


@torch.library.custom_op("kd_kernels::dense_rows", mutates_args=("gradient",))
def dense_rows(
    student: Tensor,
    teacher: Tensor | None,
    weights: Tensor,
    labels: Tensor | None,
    gradient: Tensor | None,
    divergence: str,
    vocab: int,
    alpha: float,
    beta: float,
    head_mass: float,
    temperature: float,
    kd: float,
    ce: float,
    min_logprob: float | None,
    student_scale: float,
    student_cap: float | None,
    teacher_scale: float,
    teacher_cap: float | None,
) -> Tensor:
    """``kd_kernels.dense.dense_losses`` of raw logits and their scales and caps."""
    loss = RowLoss(divergence, vocab, alpha, beta, head_mass, temperature, kd, ce, min_logprob)
    return dense_losses(
        Logits(student, student_scale, student_cap),
        None if teacher is None else Logits(teacher, teacher_scale, teacher_cap),
        weights,
        loss,
        labels=labels,
        gradient=gradient,
    )


@torch.library.custom_op("kd_kernels::sparse_rows", mutates_args=("gradient",))
def sparse_rows(
    student: Tensor,
    ids: Tensor,
    log_p: Tensor,
    log_tail: Tensor,
    weights: Tensor,
    heads: Tensor | None,
    labels: Tensor | None,
    gradient: Tensor | None,
    divergence: str,
    vocab: int,
    alpha: float,
    beta: float,
    temperature: float,
    kd: float,
    ce: float,
    min_logprob: float | None,
    student_scale: float,
    student_cap: float | None,
) -> Tensor:
    """``kd_kernels.sparse.sparse_losses`` of raw logits, their scale and cap."""
    loss = RowLoss(divergence, vocab, alpha, beta, 0.5, temperature, kd, ce, min_logprob)
    return sparse_losses(
        Logits(student, student_scale, student_cap),
        ids,
        log_p,
        log_tail,
        weights,
        loss,
        heads=heads,
        labels=labels,
        gradient=gradient,
    )


@dense_rows.register_fake
@sparse_rows.register_fake
def _row_losses(student: Tensor, *rest: object) -> Tensor:
    return student.new_empty(student.shape[0], dtype=torch.float32)
