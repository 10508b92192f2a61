"""The dense row kernels and their PyTorch operator: losses and gradients of logits against logits.

Raw tensors in, raw tensors out; nothing here synchronises with the device. torch.compile keeps the
operator in one graph; autograd is kd.losses'.
"""

from __future__ import annotations

import torch
from torch import Tensor

from kd_kernels.dense_one_read import dense_rows_one_read
from kd_kernels.dense_two_pass import dense_rows_two_pass
from kd_kernels.head import head_threshold
from kd_kernels.launch import (
    WIDE_TEMPERATURE,
    check_logits,
    log2_bound,
    one_read_shape,
    row_limit,
    target_of,
    to_log2,
    two_pass_shape,
    zero_padding,
)


def dense_losses(
    student: Tensor,
    teacher: Tensor | None,
    weights: Tensor,
    labels: Tensor | None,
    gradient: Tensor | None,
    divergence: str,
    vocab: int,
    temperature: float = 1.0,
    kd: float = 1.0,
    ce: float = 0.0,
    alpha: float = 0.0,
    beta: float = 0.0,
    head_mass: float = 0.5,
    min_logprob: float | None = None,
    student_scale: float = 1.0,
    student_cap: float | None = None,
    teacher_scale: float = 1.0,
    teacher_cap: float | None = None,
) -> Tensor:
    """Unweighted losses [N], kd * D(teacher, student at T) + ce * cross-entropy at T = 1, of every
    row; its weighted gradient into ``gradient``, where given.

    Args:
        student: [N, width] raw logits, of which the final ones are cap * tanh(scale * raw / cap).
        teacher: [N, width_t], or None for cross-entropy alone.
        weights: [N] float32; a row of weight zero gets loss and gradient zero and is not read.
        labels: [N] token ids, wanted where ce is not zero.
        gradient: [N, width]; columns past the vocabulary are zeroed. May be the student's tensor.
        divergence: a branch of kd_kernels.algebra.terms, or "none". min_logprob: nats.
    Raises:
        TypeError, ValueError: logits that kernels cannot read.
    """
    check_logits(student, teacher, gradient)
    rows = student.shape[0]
    losses = torch.empty(rows, dtype=torch.float32, device=student.device)
    if rows == 0:
        return losses
    if teacher is None or kd == 0:
        divergence, teacher, teacher_scale, teacher_cap = (
            "none",
            student,
            student_scale,
            student_cap,
        )
    heads = losses
    if divergence == "adaptive_kl":
        heads = head_logits(
            teacher, weights, vocab, temperature, head_mass, teacher_scale, teacher_cap
        )
    hard = 0 if labels is None or ce == 0 else (1 if temperature == 1 else 2)
    written = student if gradient is None else gradient
    s_limit, t_limit = row_limit(student, vocab), row_limit(teacher, vocab)
    target = target_of(student.device)
    wide = student.dtype.itemsize == 4 or divergence == "adaptive_kl"
    shape = one_read_shape(student, teacher, gradient, vocab, target, crowded=hard == 2 and wide)
    if shape is None:
        block, group, warps = two_pass_shape(student, teacher, target)
        kernel, options = dense_rows_two_pass, dict(BLOCK=block, GROUP=group, num_warps=warps)
        if divergence == "adaptive_kl" and hard == 2 and target.kind == "cuda":
            options["maxnreg"] = 168  # left alone, ptxas for sm_100 stops at 128 and spills two
    else:
        kernel, block = dense_rows_one_read, shape.first + shape.second
        options = dict(FIRST=shape.first, SECOND=shape.second, num_warps=shape.warps)
        options["num_ctas"] = shape.blocks
    width = vocab if gradient is None else zero_padding(gradient, vocab, block)
    kernel[(rows,)](
        student,
        teacher,
        written,
        losses,
        weights,
        labels if hard else weights,
        heads,
        student.stride(0),
        teacher.stride(0),
        written.stride(0),
        vocab,
        s_limit,
        t_limit,
        width,
        *to_log2(student_scale, student_cap, temperature),
        *to_log2(teacher_scale, teacher_cap, temperature),
        temperature,
        alpha,
        beta,
        log2_bound(min_logprob),
        kd,
        ce,
        student_scale,
        DIVERGENCE=divergence,
        STUDENT_CAP=student_cap is not None,
        TEACHER_CAP=teacher_cap is not None,
        STUDENT_EXACT=student_cap is None and s_limit == width == vocab,
        TEACHER_EXACT=teacher_cap is None and t_limit == vocab,
        HARD=hard,
        BOUNDED=min_logprob is not None,
        WIDE=temperature >= WIDE_TEMPERATURE,
        GRADIENT=gradient is not None,
        CUDA=target.kind == "cuda",
        num_stages=1,
        **options,
    )
    return losses


dense_rows = torch.library.custom_op(
    "kd_kernels::dense_rows", dense_losses, mutates_args=("gradient",)
)
"""``dense_losses`` as an operator, which torch.compile keeps in one graph."""


@dense_rows.register_fake
def _losses_of(student: Tensor, *rest: object, **numbers: object) -> Tensor:
    return student.new_empty(student.shape[0], dtype=torch.float32)


def head_logits(
    teacher: Tensor,
    weights: Tensor,
    vocab: int,
    temperature: float = 1.0,
    head_mass: float = 0.5,
    teacher_scale: float = 1.0,
    teacher_cap: float | None = None,
) -> Tensor:
    """[N] float32: the least logit of adaptive_kl's head, in log2 units at the temperature."""
    heads = torch.empty_like(weights)
    limit = row_limit(teacher, vocab)
    target = target_of(teacher.device)
    block, group, warps = two_pass_shape(teacher, teacher, target)
    head_threshold[(len(heads),)](
        teacher,
        heads,
        weights,
        teacher.stride(0),
        vocab,
        limit,
        *to_log2(teacher_scale, teacher_cap, temperature),
        head_mass,
        TEACHER_CAP=teacher_cap is not None,
        TEACHER_EXACT=teacher_cap is None and limit == vocab,
        CUDA=target.kind == "cuda",
        BLOCK=block,
        GROUP=group,
        num_warps=warps,
        num_stages=1,
    )
    return heads
