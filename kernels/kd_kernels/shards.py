"""Launchers of the kernels of vocabulary shards: raw tensors in, raw tensors out, no collectives.

Nothing here synchronises with the device or with other ranks. Raw logits become final ones as
cap * tanh(scale * raw / cap), given as (scale, cap).
"""

from __future__ import annotations

import torch
import triton
from torch import Tensor

from kd_kernels.launch import (
    WIDE_TEMPERATURE,
    check_logits,
    log2_bound,
    row_limit,
    target_of,
    to_log2,
    two_pass_shape,
    zero_padding,
)
from kd_kernels.shard_rows import (
    shard_gradient_rows,
    shard_statistics_rows,
    shard_sums_rows,
)

STATISTICS = 7
"""student peak and sum, teacher peak and sum, reference and mean of the gap, sum at T = 1."""
AS_THEY_ARE = (1.0, None)


def shard_statistics(
    student: Tensor,
    teacher: Tensor | None,
    weights: Tensor,
    *,
    vocab: int,
    temperature: float = 1.0,
    student_final: tuple[float, float | None] = AS_THEY_ARE,
    teacher_final: tuple[float, float | None] = AS_THEY_ARE,
    gap: str = "",
    hard: bool = False,
    ids: Tensor | None = None,
) -> Tensor:
    """[N, 7] float32 statistics of this shard, logits in log2 units at the temperature.

    Args:
        vocab: live columns of the shard.
        gap: "forward", "reverse" or another word for neither. hard: the sum at temperature 1 too.
        ids: [N, K] columns of this shard to leave out, -1 for none.
    """
    rows = len(student)
    found = torch.zeros((rows, STATISTICS), dtype=torch.float32, device=student.device)
    found[:, 0] = found[:, 2] = -torch.inf
    if rows == 0 or vocab == 0:
        return found
    slots, left_out = 0, weights
    if ids is not None:
        slots = triton.next_power_of_2(max(2, ids.shape[1]))
        left_out = ids.new_full((rows, slots), -1, dtype=torch.int32)
        left_out[:, : ids.shape[1]] = ids
    other = student if teacher is None else teacher
    numbers, options = _shared(student, other, vocab, temperature, student_final, teacher_final)
    shard_statistics_rows[(rows,)](
        student,
        other,
        left_out,
        found,
        weights,
        *numbers,
        temperature,
        SOFT=teacher is not None,
        GAP=gap,
        HARD=hard,
        SLOTS=slots,
        **options,
    )
    return found


def shard_sums(
    student: Tensor,
    teacher: Tensor,
    row_numbers: Tensor,
    weights: Tensor,
    *,
    divergence: str,
    vocab: int,
    temperature: float = 1.0,
    alpha: float = 0.0,
    beta: float = 0.0,
    min_logprob: float | None = None,
    student_final: tuple[float, float | None] = AS_THEY_ARE,
    teacher_final: tuple[float, float | None] = AS_THEY_ARE,
) -> Tensor:
    """[N, 2] float32: this shard's sums of phi and of h, in nats."""
    rows = len(student)
    found = torch.zeros((rows, 2), dtype=torch.float32, device=student.device)
    if rows == 0 or vocab == 0:
        return found
    numbers, options = _shared(student, teacher, vocab, temperature, student_final, teacher_final)
    shard_sums_rows[(rows,)](
        student,
        teacher,
        row_numbers,
        found,
        weights,
        *numbers,
        alpha,
        beta,
        log2_bound(min_logprob),
        DIVERGENCE=divergence,
        BOUNDED=min_logprob is not None,
        WIDE=temperature >= WIDE_TEMPERATURE,
        **options,
    )
    return found


def shard_gradient_(
    gradient: Tensor,
    student: Tensor,
    teacher: Tensor | None,
    row_numbers: Tensor,
    weights: Tensor,
    *,
    divergence: str,
    vocab: int,
    temperature: float = 1.0,
    kd: float = 1.0,
    ce: float = 0.0,
    alpha: float = 0.0,
    beta: float = 0.0,
    min_logprob: float | None = None,
    student_final: tuple[float, float | None] = AS_THEY_ARE,
    teacher_final: tuple[float, float | None] = AS_THEY_ARE,
    labels: Tensor | None = None,
) -> None:
    """Write the weighted gradient of this shard's raw logits; ``gradient`` may be the student's.

    labels: [N] columns of this shard, -1 where the label is another's.
    """
    rows = len(student)
    if rows == 0 or vocab == 0:
        gradient.zero_()
        return
    other = student if teacher is None else teacher
    numbers, options = _shared(student, other, vocab, temperature, student_final, teacher_final)
    width = zero_padding(gradient, vocab, options["BLOCK"])
    options["STUDENT_EXACT"] &= width == vocab
    options.pop("GROUP")
    shard_gradient_rows[(rows,)](
        student,
        other,
        gradient,
        row_numbers,
        weights,
        weights if labels is None else labels,
        *numbers[:2],
        gradient.stride(0),
        *numbers[2:5],
        width,
        *numbers[5:],
        temperature,
        alpha,
        beta,
        log2_bound(min_logprob),
        kd,
        ce,
        student_final[0],
        DIVERGENCE=divergence,
        BOUNDED=min_logprob is not None,
        WIDE=temperature >= WIDE_TEMPERATURE,
        HARD=labels is not None,
        **options,
    )


def _shared(
    student: Tensor,
    teacher: Tensor,
    vocab: int,
    temperature: float,
    student_final: tuple[float, float | None],
    teacher_final: tuple[float, float | None],
) -> tuple[tuple, dict]:
    """(what every kernel is told of its logits, its constants)."""
    check_logits(student, teacher)
    limits = row_limit(student, vocab), row_limit(teacher, vocab)
    target = target_of(student.device)
    block, group, warps = two_pass_shape(student, teacher, target)
    numbers = (
        student.stride(0),
        teacher.stride(0),
        vocab,
        *limits,
        *to_log2(*student_final, temperature),
        *to_log2(*teacher_final, temperature),
    )
    options = dict(
        STUDENT_CAP=student_final[1] is not None,
        TEACHER_CAP=teacher_final[1] is not None,
        STUDENT_EXACT=student_final[1] is None and limits[0] == vocab,
        TEACHER_EXACT=teacher_final[1] is None and limits[1] == vocab,
        CUDA=target.kind == "cuda",
        BLOCK=block,
        GROUP=group,
        num_warps=warps,
        num_stages=1,
    )
    return numbers, options
