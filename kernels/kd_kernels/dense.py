"""Launcher of the dense row kernels: losses and gradients of logits against logits.

Raw tensors in, raw tensors out; nothing here synchronises with the device.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

from kd_kernels.dense_one_read import dense_rows_one_read
from kd_kernels.dense_two_pass import dense_rows_two_pass
from kd_kernels.head import head_threshold
from kd_kernels.rows import LOG2E, Logits, RowLoss, row_limit, target_of
from kd_kernels.schedules import one_read_shape, two_pass_shape, zero_padding


def dense_losses(
    student: Logits,
    teacher: Logits | None,
    weights: Tensor,
    loss: RowLoss,
    *,
    labels: Tensor | None = None,
    gradient: Tensor | None = None,
) -> Tensor:
    """Unweighted losses [N] of every row; its weighted gradient into ``gradient``, where given.

    Args:
        student: [N, width] logits. teacher: [N, width_t], or None for cross-entropy alone.
        weights: [N] float32; a row of weight zero gets loss and gradient zero and is not read.
        labels: [N] token ids, wanted where loss.ce is not zero.
        gradient: [N, width]; columns past the vocabulary are zeroed. May be the student's tensor.
    """
    rows = student.tensor.shape[0]
    losses = torch.empty(rows, dtype=torch.float32, device=student.tensor.device)
    if rows == 0:
        return losses
    divergence = loss.divergence if teacher is not None and loss.kd != 0 else "none"
    if teacher is None or divergence == "none":
        divergence, teacher = "none", student
    heads = losses
    if divergence == "adaptive_kl":
        heads = head_logits(teacher, weights, loss)
    hard = 0 if labels is None or loss.ce == 0 else (1 if loss.temperature == 1 else 2)
    written = student.tensor if gradient is None else gradient
    s_limit, t_limit = row_limit(student.tensor, loss.vocab), row_limit(teacher.tensor, loss.vocab)
    target = target_of(student.tensor.device)
    wide = student.tensor.dtype.itemsize == 4 or divergence == "adaptive_kl"
    shape = one_read_shape(
        student.tensor, teacher.tensor, gradient, loss.vocab, target, crowded=hard == 2 and wide
    )
    if shape is None:
        block, group, warps = two_pass_shape(student.tensor, teacher.tensor, target)
        kernel, options = dense_rows_two_pass, dict(BLOCK=block, GROUP=group, num_warps=warps)
        if divergence == "adaptive_kl" and hard == 2 and target.kind == "cuda":
            options["maxnreg"] = 168  # left alone, ptxas for sm_100 stops at 128 and spills two
    else:
        kernel, block = dense_rows_one_read, shape.first + shape.second
        options = dict(FIRST=shape.first, SECOND=shape.second, num_warps=shape.warps)
        options["num_ctas"] = shape.blocks
    width = loss.vocab if gradient is None else zero_padding(gradient, loss.vocab, block)
    kernel[(rows,)](
        student.tensor,
        teacher.tensor,
        written,
        losses,
        weights,
        labels if hard else weights,
        heads,
        student.tensor.stride(0),
        teacher.tensor.stride(0),
        written.stride(0),
        loss.vocab,
        s_limit,
        t_limit,
        width,
        *student.to_log2(loss.temperature),
        *teacher.to_log2(loss.temperature),
        loss.temperature,
        loss.alpha,
        loss.beta,
        -math.inf if loss.min_logprob is None else loss.min_logprob * LOG2E,
        loss.kd,
        loss.ce,
        student.scale,
        DIVERGENCE=divergence,
        STUDENT_CAP=student.cap is not None,
        TEACHER_CAP=teacher.cap is not None,
        STUDENT_EXACT=student.cap is None and s_limit == width == loss.vocab,
        TEACHER_EXACT=teacher.cap is None and t_limit == loss.vocab,
        HARD=hard,
        BOUNDED=loss.min_logprob is not None,
        WIDE=loss.wide,
        GRADIENT=gradient is not None,
        CUDA=target.kind == "cuda",
        num_stages=1,
        **options,
    )
    return losses


def head_logits(teacher: Logits, weights: Tensor, loss: RowLoss) -> Tensor:
    """[N] float32: the least logit of adaptive_kl's head, in log2 units at the temperature."""
    heads = torch.empty_like(weights)
    limit = row_limit(teacher.tensor, loss.vocab)
    target = target_of(teacher.tensor.device)
    block, group, warps = two_pass_shape(teacher.tensor, teacher.tensor, target)
    head_threshold[(len(heads),)](
        teacher.tensor,
        heads,
        weights,
        teacher.tensor.stride(0),
        loss.vocab,
        limit,
        *teacher.to_log2(loss.temperature),
        loss.head_mass,
        TEACHER_CAP=teacher.cap is not None,
        TEACHER_EXACT=teacher.cap is None and limit == loss.vocab,
        CUDA=target.kind == "cuda",
        BLOCK=block,
        GROUP=group,
        num_warps=warps,
        num_stages=1,
    )
    return heads
