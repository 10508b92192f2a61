"""The sparse row kernels and their PyTorch operator: logits against K stored tokens and a tail."""

from __future__ import annotations

import torch
import triton
from torch import Tensor

from kd_kernels.launch import (
    LOG2E,
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
from kd_kernels.sparse_one_read import mark_rows, sparse_rows_one_read, store_slots
from kd_kernels.sparse_two_pass import sparse_rows_two_pass


def sparse_losses(
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
    temperature: float = 1.0,
    kd: float = 1.0,
    ce: float = 0.0,
    alpha: float = 0.0,
    beta: float = 0.0,
    min_logprob: float | None = None,
    student_scale: float = 1.0,
    student_cap: float | None = None,
) -> Tensor:
    """Unweighted losses [N] of every row; its weighted gradient into ``gradient``, where given.

    Args:
        student: [N, width] raw logits.
        ids: [N, K], unique in a row, -1 in empty slots. log_p: [N, K] nats at the loss temperature.
        log_tail: [N, 1] nats; -inf where there is no tail.
        heads: [N] nats, the least log_p of adaptive_kl's head; wanted by it alone.
        weights, labels, gradient and the numbers: as in ``kd_kernels.dense.dense_losses``.
    Raises:
        TypeError, ValueError: logits that kernels cannot read.
    """
    check_logits(student, gradient)
    rows, stored = ids.shape
    losses = torch.empty(rows, dtype=torch.float32, device=student.device)
    if rows == 0:
        return losses
    slots = triton.next_power_of_2(stored + 1)
    packed_ids, packed = pack_targets(ids, log_p, log_tail, slots)
    hard = 0 if labels is None or ce == 0 else (1 if temperature == 1 else 2)
    written = student if gradient is None else gradient
    target = target_of(student.device)
    shape = one_read_shape(student, None, gradient, vocab, target)
    tensors = (student, packed_ids, packed)
    rest = (
        written,
        losses,
        weights,
        labels if hard else weights,
        weights if heads is None else heads * LOG2E,
        student.stride(0),
        written.stride(0),
    )
    limit = row_limit(student, vocab)
    numbers = (
        *to_log2(student_scale, student_cap, temperature),
        temperature,
        alpha,
        beta,
        log2_bound(min_logprob),
        kd,
        ce,
        student_scale,
    )
    block, group, warps = two_pass_shape(student, student, target)
    covered = block if shape is None else shape.first + shape.second
    width = vocab if gradient is None else zero_padding(gradient, vocab, covered)
    options = dict(
        DIVERGENCE=divergence,
        STUDENT_CAP=student_cap is not None,
        STUDENT_EXACT=student_cap is None and limit == width == vocab,
        HARD=hard,
        BOUNDED=min_logprob is not None,
        WIDE=temperature >= WIDE_TEMPERATURE,
        GRADIENT=gradient is not None,
        CUDA=target.kind == "cuda",
        SLOTS=slots,
        num_stages=1,
    )
    if shape is None:
        # Left alone, ptxas for sm_100 stops at 48 registers and spills two.
        options |= {"maxnreg": 128} if target.kind == "cuda" else {}
        options |= dict(BLOCK=block, GROUP=group, num_warps=warps)
        sparse_rows_two_pass[(rows,)](
            *tensors, *rest, stored, vocab, limit, width, *numbers, **options
        )
        return losses
    marks = packed_ids.new_zeros((rows, -(-covered // 32)))
    values = packed if gradient is None else torch.empty_like(packed)
    mark_rows[(rows,)](packed_ids, marks, marks.shape[1], SLOTS=slots)
    options |= dict(FIRST=shape.first, SECOND=shape.second)
    sparse_rows_one_read[(rows,)](
        *tensors,
        marks.view(torch.uint8),
        values,
        *rest,
        4 * marks.shape[1],
        stored,
        vocab,
        limit,
        width,
        *numbers,
        num_warps=shape.warps,
        num_ctas=shape.blocks,
        **options,
    )
    if gradient is not None:
        store_slots[(rows,)](packed_ids, values, gradient, weights, gradient.stride(0), SLOTS=slots)
    return losses


sparse_rows = torch.library.custom_op(
    "kd_kernels::sparse_rows", sparse_losses, mutates_args=("gradient",)
)
"""``sparse_losses`` as an operator, which torch.compile keeps in one graph."""


@sparse_rows.register_fake
def _losses_of(student: Tensor, *rest: object, **numbers: object) -> Tensor:
    return student.new_empty(student.shape[0], dtype=torch.float32)


def pack_targets(ids: Tensor, log_p: Tensor, log_tail: Tensor, slots: int) -> tuple[Tensor, Tensor]:
    """(ids [N, slots] int32, log2 p [N, slots] float32): the K tokens, the tail, empty slots."""
    rows, stored = ids.shape
    packed_ids = ids.new_full((rows, slots), -1, dtype=torch.int32)
    packed_ids[:, :stored] = ids
    packed = log_p.new_full((rows, slots), -torch.inf, dtype=torch.float32)
    packed[:, :stored] = log_p
    packed[:, stored : stored + 1] = log_tail
    return packed_ids, packed.mul_(LOG2E)
