"""Launchers of the kernels of vocabulary shards: raw tensors in, raw tensors out, no collectives.

Nothing here synchronises with the device or with other ranks.
"""

from __future__ import annotations

import math

import torch
import triton
from torch import Tensor

from kd_kernels.rows import LOG2E, Logits, RowLoss, row_limit, target_of
from kd_kernels.schedules import two_pass_shape, zero_padding
from kd_kernels.shard_rows import (
    shard_gradient_rows,
    shard_statistics_rows,
    shard_sums_rows,
)

STATISTICS = 7
"""student peak and sum, teacher peak and sum, reference and mean of the gap, sum at T = 1."""
ROW_NUMBERS = 8
"""student top and log-sum, teacher top and log-sum, h's sum, its shift, log-sum at T = 1, and the
student's log-sum less the teacher's."""


def shard_statistics(
    student: Logits,
    teacher: Logits | None,
    weights: Tensor,
    loss: RowLoss,
    *,
    gap: str = "",
    hard: bool = False,
    ids: Tensor | None = None,
) -> Tensor:
    """[N, 7] float32 statistics of this shard, logits in log2 units at the temperature.

    Args:
        gap: "forward", "reverse" or another word for neither. hard: the sum at temperature 1 too.
        ids: [N, K] columns of this shard to leave out, -1 for none.
    """
    rows = len(student.tensor)
    found = torch.zeros((rows, STATISTICS), dtype=torch.float32, device=student.tensor.device)
    found[:, 0] = found[:, 2] = -torch.inf
    if rows == 0 or loss.vocab == 0:
        return found
    slots, left_out = 0, weights
    if ids is not None:
        slots = triton.next_power_of_2(max(2, ids.shape[1]))
        left_out = ids.new_full((rows, slots), -1, dtype=torch.int32)
        left_out[:, : ids.shape[1]] = ids
    shape, numbers, options = _shared(student, teacher, loss)
    shard_statistics_rows[(rows,)](
        *shape[:2],
        left_out,
        found,
        weights,
        *numbers,
        loss.temperature,
        SOFT=teacher is not None,
        GAP=gap,
        HARD=hard,
        SLOTS=slots,
        **options,
    )
    return found


def shard_sums(
    student: Logits, teacher: Logits, numbers: Tensor, weights: Tensor, loss: RowLoss
) -> Tensor:
    """[N, 2] float32: this shard's sums of phi and of h, in nats."""
    rows = len(student.tensor)
    found = torch.zeros((rows, 2), dtype=torch.float32, device=student.tensor.device)
    if rows == 0 or loss.vocab == 0:
        return found
    shape, shared, options = _shared(student, teacher, loss)
    shard_sums_rows[(rows,)](
        *shape,
        numbers,
        found,
        weights,
        *shared,
        *_divergence(loss),
        DIVERGENCE=loss.divergence,
        BOUNDED=loss.min_logprob is not None,
        WIDE=loss.wide,
        **options,
    )
    return found


def shard_gradient_(
    gradient: Tensor,
    student: Logits,
    teacher: Logits | None,
    numbers: Tensor,
    weights: Tensor,
    loss: RowLoss,
    *,
    labels: Tensor | None = None,
) -> None:
    """Write the weighted gradient of this shard's raw logits; ``gradient`` may be the student's.

    labels: [N] columns of this shard, -1 where the label is another's.
    """
    rows = len(student.tensor)
    if rows == 0 or loss.vocab == 0:
        gradient.zero_()
        return
    shape, shared, options = _shared(student, teacher, loss)
    width = zero_padding(gradient, loss.vocab, options["BLOCK"])
    options["STUDENT_EXACT"] &= width == loss.vocab
    options.pop("GROUP")
    shard_gradient_rows[(rows,)](
        *shape,
        gradient,
        numbers,
        weights,
        weights if labels is None else labels,
        *shared[:2],
        gradient.stride(0),
        *shared[2:5],
        width,
        *shared[5:],
        loss.temperature,
        *_divergence(loss),
        loss.kd,
        loss.ce,
        student.scale,
        DIVERGENCE=loss.divergence,
        BOUNDED=loss.min_logprob is not None,
        WIDE=loss.wide,
        HARD=labels is not None,
        **options,
    )


def _divergence(loss: RowLoss) -> tuple[float, float, float]:
    return (
        loss.alpha,
        loss.beta,
        -math.inf if loss.min_logprob is None else loss.min_logprob * LOG2E,
    )


def _shared(student: Logits, teacher: Logits | None, loss: RowLoss) -> tuple:
    """((student, teacher), what every kernel is told of them, its constants)."""
    other = student if teacher is None else teacher
    limits = row_limit(student.tensor, loss.vocab), row_limit(other.tensor, loss.vocab)
    target = target_of(student.tensor.device)
    block, group, warps = two_pass_shape(student.tensor, other.tensor, target)
    numbers = (
        student.tensor.stride(0),
        other.tensor.stride(0),
        loss.vocab,
        *limits,
        *student.to_log2(loss.temperature),
        *other.to_log2(loss.temperature),
    )
    options = dict(
        STUDENT_CAP=student.cap is not None,
        TEACHER_CAP=other.cap is not None,
        STUDENT_EXACT=student.cap is None and limits[0] == loss.vocab,
        TEACHER_EXACT=other.cap is None and limits[1] == loss.vocab,
        CUDA=target.kind == "cuda",
        BLOCK=block,
        GROUP=group,
        num_warps=warps,
        num_stages=1,
    )
    return (student.tensor, other.tensor), numbers, options
