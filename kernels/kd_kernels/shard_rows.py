"""Vocabulary shards: a rank's part of each row's sums, then the gradient of its columns.

    shard_statistics_rows   for student and teacher the peak and the sum of exp2(z - peak) over this
                            shard, and the mean gap of forward or reverse KL; with the ids of stored
                            tokens, the student's over the other columns
    shard_sums_rows         given the whole row's normalisers: sums of phi and of h
    shard_gradient_rows     the gradient of this shard's columns

Each is one pass over the row.

What lies between, a few numbers a row, crosses ranks in kd.losses.tensor_parallel. The device
functions are the unsharded kernels' own.

student [N, live], teacher [N, live]: bf16, fp16 or fp32, unit column stride.

Reads 8 B/element in bf16 (12 with shard_sums: neither forward nor reverse KL; 4 for a sparse
teacher), writes 2, least 6 (4 sparse), ours 10 (14; 6 sparse): a row cannot wait in registers for
the other ranks.
"""

import triton
import triton.language as tl

from kd_kernels.algebra import (
    LN2,
    combine_gap,
    exp2,
    fold,
    load_logits,
    logit_gradient,
    outcomes,
    start_statistics,
    times,
    update_statistics,
    zero_row,
)
from kd_kernels.sparse_two_pass import without


@triton.jit
def fold_gap(grouped, gap, mass, shrink, old_total, peak, acc, reference):
    """update_gap where the value too comes of it: an infinite gap is never the reference."""
    at_peak = tl.where((grouped == peak[:, None]) & (gap < float("inf")), gap, float("-inf"))
    at_peak = tl.max(at_peak, 1)
    moved = tl.where(at_peak == float("-inf"), reference, at_peak)
    acc = times(shrink, acc + times(old_total, reference - moved))
    return acc + tl.sum(times(mass, gap - moved[:, None]), 1), moved


@triton.jit
def shard_statistics_rows(
    student,  # [N, live]
    teacher,  # [N, live], with SOFT
    ids,  # [N, SLOTS] int32 columns to leave out, -1 for none
    found,  # [N, 7] float32
    weights,  # [N] float32: a row of weight 0 is skipped
    student_stride,
    teacher_stride,
    vocab,
    student_limit,
    teacher_limit,
    student_inner,
    student_outer,
    teacher_inner,
    teacher_outer,
    temperature,
    SOFT: tl.constexpr,
    GAP: tl.constexpr,  # "forward": teacher - student under the teacher; "reverse"
    HARD: tl.constexpr,  # the sum at temperature 1 too
    SLOTS: tl.constexpr,
    STUDENT_CAP: tl.constexpr,
    TEACHER_CAP: tl.constexpr,
    STUDENT_EXACT: tl.constexpr,
    TEACHER_EXACT: tl.constexpr,
    CUDA: tl.constexpr,
    BLOCK: tl.constexpr,
    GROUP: tl.constexpr,
):
    LANES: tl.constexpr = BLOCK // GROUP
    row = tl.program_id(0).to(tl.int64)
    student += row * student_stride
    teacher += row * teacher_stride
    found += row * 7
    if tl.load(weights + row) == 0.0:
        return
    if SLOTS > 0:
        left_out = tl.load(ids + row * SLOTS + tl.arange(0, SLOTS))
    s_peak, s_total = start_statistics(LANES)
    t_peak, t_total = start_statistics(LANES)
    gap_total = tl.zeros((LANES,), tl.float32)
    reference = tl.zeros((LANES,), tl.float32)
    hard_total = tl.zeros((LANES,), tl.float32)
    for start in range(0, vocab, BLOCK):
        s, s_slope = load_logits(
            student, start, student_limit, vocab, student_inner, student_outer,
            STUDENT_CAP, STUDENT_EXACT, True, CUDA, BLOCK,
        )  # fmt: skip
        if SLOTS > 0:
            s = without(s, left_out, start, BLOCK)
        old_peak, old_total = s_peak, s_total
        s_peak, s_total, s_shrink, s_mass = update_statistics(s, s_peak, s_total, GROUP, CUDA)
        if HARD:
            cold = exp2((tl.reshape(s, (LANES, GROUP)) - s_peak[:, None]) * temperature, CUDA)
            hard_total *= exp2((old_peak - s_peak) * temperature, CUDA)
            hard_total += tl.sum(cold, 1)
        if SOFT:
            t, t_slope = load_logits(
                teacher, start, teacher_limit, vocab, teacher_inner, teacher_outer,
                TEACHER_CAP, TEACHER_EXACT, True, CUDA, BLOCK,
            )  # fmt: skip
            old_t_total = t_total
            t_peak, t_total, t_shrink, t_mass = update_statistics(t, t_peak, t_total, GROUP, CUDA)
            if GAP == "reverse":
                gap_total, reference = fold_gap(
                    tl.reshape(s, (LANES, GROUP)), tl.reshape(s - t, (LANES, GROUP)),
                    s_mass, s_shrink, old_total, s_peak, gap_total, reference,
                )  # fmt: skip
            if GAP == "forward":
                gap_total, reference = fold_gap(
                    tl.reshape(t, (LANES, GROUP)), tl.reshape(t - s, (LANES, GROUP)),
                    t_mass, t_shrink, old_t_total, t_peak, gap_total, reference,
                )  # fmt: skip
    s_top = tl.max(s_peak, 0)
    s_share = exp2(s_peak - s_top, CUDA)
    s_sum = tl.sum(s_total * s_share, 0)
    tl.store(found, s_top)
    tl.store(found + 1, s_sum)
    if SOFT:
        t_top = tl.max(t_peak, 0)
        t_share = exp2(t_peak - t_top, CUDA)
        t_sum = tl.sum(t_total * t_share, 0)
        tl.store(found + 2, t_top)
        tl.store(found + 3, t_sum)
        if GAP == "reverse":
            acc, gap = combine_gap(gap_total, reference, s_total, s_peak, s_top, s_share)
            tl.store(found + 4, gap)
            tl.store(found + 5, tl.where(s_sum == 0.0, 0.0, acc / s_sum))
        if GAP == "forward":
            acc, gap = combine_gap(gap_total, reference, t_total, t_peak, t_top, t_share)
            tl.store(found + 4, gap)
            tl.store(found + 5, tl.where(t_sum == 0.0, 0.0, acc / t_sum))
    if HARD:
        tl.store(found + 6, tl.sum(hard_total * exp2((s_peak - s_top) * temperature, CUDA), 0))


@triton.jit
def shard_sums_rows(
    student,
    teacher,
    numbers,  # [N, 8] float32, of the whole row
    found,  # [N, 2] float32: sums of phi and of h
    weights,
    student_stride,
    teacher_stride,
    vocab,
    student_limit,
    teacher_limit,
    student_inner,
    student_outer,
    teacher_inner,
    teacher_outer,
    alpha,
    beta,
    bound,  # min_logprob in log2 units
    DIVERGENCE: tl.constexpr,
    BOUNDED: tl.constexpr,
    WIDE: tl.constexpr,  # terms in float64
    STUDENT_CAP: tl.constexpr,
    TEACHER_CAP: tl.constexpr,
    STUDENT_EXACT: tl.constexpr,
    TEACHER_EXACT: tl.constexpr,
    CUDA: tl.constexpr,
    BLOCK: tl.constexpr,
    GROUP: tl.constexpr,
):
    row = tl.program_id(0).to(tl.int64)
    student += row * student_stride
    teacher += row * teacher_stride
    numbers += row * 8
    if tl.load(weights + row) == 0.0:
        return
    s_top, s_log = tl.load(numbers), tl.load(numbers + 1)
    t_top, t_log = tl.load(numbers + 2), tl.load(numbers + 3)
    log_gap = tl.load(numbers + 7)
    value = tl.zeros((BLOCK // GROUP,), tl.float32)
    h_sum = tl.zeros((BLOCK // GROUP,), tl.float32)
    last = (vocab - 1) // BLOCK * BLOCK
    for back in range(0, vocab, BLOCK):
        start = last - back
        s, s_slope = load_logits(
            student, start, student_limit, vocab, student_inner, student_outer,
            STUDENT_CAP, STUDENT_EXACT, True, CUDA, BLOCK,
        )  # fmt: skip
        t, t_slope = load_logits(
            teacher, start, teacher_limit, vocab, teacher_inner, teacher_outer,
            TEACHER_CAP, TEACHER_EXACT, True, CUDA, BLOCK,
        )  # fmt: skip
        p, phi, h, softmax = outcomes(
            DIVERGENCE, BOUNDED, WIDE, s - s_top, t - t_top, s_log, t_log, log_gap, 0.0, alpha,
            beta, bound, CUDA,
        )  # fmt: skip
        value += fold(phi, GROUP)
        h_sum += fold(h, GROUP)
    tl.store(found + row * 2, tl.sum(value, 0))
    tl.store(found + row * 2 + 1, tl.sum(h_sum, 0))


@triton.jit
def shard_gradient_rows(
    student,  # [N, live]
    teacher,  # [N, live]; not read where DIVERGENCE is "none" or "tail"
    gradient,  # [N, width], may be the student
    numbers,  # [N, 8] float32, of the whole row
    weights,  # [N] float32: a row of weight 0 does not count
    labels,  # [N] int64 columns of this shard, -1 for another's; with HARD
    student_stride,
    teacher_stride,
    gradient_stride,
    vocab,
    student_limit,
    teacher_limit,
    gradient_limit,
    student_inner,
    student_outer,
    teacher_inner,
    teacher_outer,
    temperature,
    alpha,
    beta,
    bound,  # min_logprob in log2 units
    kd,
    ce,
    gradient_scale,
    DIVERGENCE: tl.constexpr,  # "tail": h's sum is the gradient of the tail's log-sum-exp
    BOUNDED: tl.constexpr,
    WIDE: tl.constexpr,  # terms in float64
    HARD: tl.constexpr,
    STUDENT_CAP: tl.constexpr,
    TEACHER_CAP: tl.constexpr,
    STUDENT_EXACT: tl.constexpr,
    TEACHER_EXACT: tl.constexpr,
    CUDA: tl.constexpr,
    BLOCK: tl.constexpr,
):
    SHORT: tl.constexpr = not BOUNDED and not WIDE
    row = tl.program_id(0).to(tl.int64)
    student += row * student_stride
    teacher += row * teacher_stride
    gradient += row * gradient_stride
    numbers += row * 8
    weight = tl.load(weights + row)
    if weight == 0.0:
        zero_row(gradient, gradient_limit, BLOCK)
        return
    s_top, s_log = tl.load(numbers), tl.load(numbers + 1)
    t_top, t_log = tl.load(numbers + 2), tl.load(numbers + 3)
    log_gap = tl.load(numbers + 7)
    h_sum, shift, hard_log = tl.load(numbers + 4), tl.load(numbers + 5), tl.load(numbers + 6)
    label = -1
    if HARD:
        label = tl.load(labels + row).to(tl.int32)
    kd_scale = kd * weight * gradient_scale / temperature
    ce_scale = ce * weight * gradient_scale
    last = (vocab - 1) // BLOCK * BLOCK
    for back in range(0, vocab, BLOCK):
        start = last - back
        s, s_slope = load_logits(
            student, start, student_limit, vocab, student_inner, student_outer,
            STUDENT_CAP, STUDENT_EXACT, False, CUDA, BLOCK,
        )  # fmt: skip
        columns = start + tl.arange(0, BLOCK)
        g = tl.zeros((BLOCK,), tl.float32)
        if DIVERGENCE == "tail":
            g = h_sum * gradient_scale * exp2(s - s_top - s_log, CUDA)
        elif DIVERGENCE != "none":
            t, t_slope = load_logits(
                teacher, start, teacher_limit, vocab, teacher_inner, teacher_outer,
                TEACHER_CAP, TEACHER_EXACT, False, CUDA, BLOCK,
            )  # fmt: skip
            p, phi, h, softmax = outcomes(
                DIVERGENCE, BOUNDED, WIDE, s - s_top, t - t_top, s_log, t_log, log_gap, 0.0,
                alpha, beta, bound, CUDA,
            )  # fmt: skip
            if DIVERGENCE == "reverse_kl" and not BOUNDED and not WIDE:
                h = times(softmax, s - t - shift) * LN2
            g = logit_gradient(DIVERGENCE, SHORT, p, softmax, h, h_sum) * kd_scale
        if HARD:
            hard = exp2((s - s_top) * temperature - hard_log, CUDA)
            g += ce_scale * tl.where(columns == label, hard - 1.0, hard)
        g *= s_slope
        if not STUDENT_EXACT:
            g = tl.where(columns < vocab, g, 0.0)
        tl.store(gradient + columns, g.to(gradient.dtype.element_ty), mask=columns < gradient_limit)
