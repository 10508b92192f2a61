"""Launcher of the sparse row kernels: logits against K stored tokens and a tail."""

from __future__ import annotations

import math

import torch
import triton
from torch import Tensor

from kd_kernels.rows import (
    LOG2E,
    Logits,
    RowLoss,
    row_limit,
    target_of,
)
from kd_kernels.schedules import one_read_shape, two_pass_shape, zero_padding
from kd_kernels.sparse_one_read import mark_rows, sparse_rows_one_read, store_slots
from kd_kernels.sparse_two_pass import sparse_rows_two_pass


def sparse_losses(
    student: Logits,
    ids: Tensor,
    log_p: Tensor,
    log_tail: Tensor,
    weights: Tensor,
    loss: RowLoss,
    *,
    heads: Tensor | None = None,
    labels: Tensor | None = None,
    gradient: Tensor | None = None,
) -> Tensor:
    """Unweighted losses [N] of every row; its weighted gradient into ``gradient``, where given.

    Args:
        student: [N, width] logits.
        ids: [N, K], unique in a row, -1 in empty slots. log_p: [N, K] nats at the loss temperature.
        log_tail: [N, 1] nats; -inf where there is no tail.
        weights, labels, gradient: as in ``kd_kernels.dense.dense_losses``.
        heads: [N] nats, the least log_p of adaptive_kl's head; wanted by it alone.
    """
    rows, stored = ids.shape
    losses = torch.empty(rows, dtype=torch.float32, device=student.tensor.device)
    if rows == 0:
        return losses
    slots = triton.next_power_of_2(stored + 1)
    packed_ids, packed = pack_targets(ids, log_p, log_tail, slots)
    hard = 0 if labels is None or loss.ce == 0 else (1 if loss.temperature == 1 else 2)
    written = student.tensor if gradient is None else gradient
    target = target_of(student.tensor.device)
    shape = one_read_shape(student.tensor, None, gradient, loss.vocab, target)
    tensors = (student.tensor, packed_ids, packed)
    rest = (
        written,
        losses,
        weights,
        labels if hard else weights,
        weights if heads is None else heads * LOG2E,
        student.tensor.stride(0),
        written.stride(0),
    )
    limit = row_limit(student.tensor, loss.vocab)
    numbers = (
        *student.to_log2(loss.temperature),
        loss.temperature,
        loss.alpha,
        loss.beta,
        -math.inf if loss.min_logprob is None else loss.min_logprob * LOG2E,
        loss.kd,
        loss.ce,
        student.scale,
    )
    block, group, warps = two_pass_shape(student.tensor, student.tensor, target)
    covered = block if shape is None else shape.first + shape.second
    width = loss.vocab if gradient is None else zero_padding(gradient, loss.vocab, covered)
    options = dict(
        DIVERGENCE=loss.divergence,
        STUDENT_CAP=student.cap is not None,
        STUDENT_EXACT=student.cap is None and limit == width == loss.vocab,
        HARD=hard,
        BOUNDED=loss.min_logprob is not None,
        WIDE=loss.wide,
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
            *tensors, *rest, stored, loss.vocab, limit, width, *numbers, **options
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
        loss.vocab,
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


def pack_targets(ids: Tensor, log_p: Tensor, log_tail: Tensor, slots: int) -> tuple[Tensor, Tensor]:
    """(ids [N, slots] int32, log2 p [N, slots] float32): the K tokens, the tail, empty slots."""
    rows, stored = ids.shape
    packed_ids = ids.new_full((rows, slots), -1, dtype=torch.int32)
    packed_ids[:, :stored] = ids
    packed = log_p.new_full((rows, slots), -torch.inf, dtype=torch.float32)
    packed[:, :stored] = log_p
    packed[:, stored : stored + 1] = log_tail
    return packed_ids, packed.mul_(LOG2E)
