"""Dense rows, two passes: any vocabulary, any GPU (schedule S2).

    p = softmax(teacher / T), q = softmax(student / T) over the live columns
    loss = kd * D(p, q) + ce * (lse(student) - student[label])
    gradient = weight * d loss / d student,   written over the student's row if they are one tensor

One program a row. The first pass gathers the softmax statistics lane by lane (no reduction inside
the loop); the last goes through the row again, backwards, so that it starts with what the cache
still holds. forward_kl and reverse_kl need two passes: the sum of h is -1 in one, and gathered
online in the other. The others' h needs both normalisers, so its sum takes a pass of its own.

student [N, width], teacher [N, width_t]: bf16, fp16 or fp32, unit column stride; losses [N] fp32.

Reads 8 B/element in bf16 (12 in three passes), writes 2, least 6, ours 10 (14) where no second
read hits the cache.

Source: Milakov and Gimelshein 2018 (online softmax), https://arxiv.org/abs/1805.02867.
"""

import triton
import triton.language as tl

from kd_kernels.algebra import (
    LN2,
    combine_gap,
    combine_statistics,
    exp2,
    fold,
    load_logits,
    logit_gradient,
    normaliser_gap,
    outcomes,
    probability_gap,
    start_statistics,
    times,
    to_log2,
    update_gap,
    update_statistics,
    zero_row,
)


@triton.jit
def dense_rows_two_pass(
    student,  # [N, width]
    teacher,  # [N, width_t]; not read where DIVERGENCE is "none"
    gradient,  # [N, width], may be the student
    losses,  # [N] float32
    weights,  # [N] float32: a row of weight 0 does not count
    labels,  # [N] int64, with HARD
    heads,  # [N] float32: adaptive_kl's least head logit in log2 units
    student_stride,
    teacher_stride,
    gradient_stride,
    vocab,
    student_limit,
    teacher_limit,
    gradient_limit,  # columns vocab..gradient_limit of the gradient are zeroed
    student_inner,
    student_outer,
    teacher_inner,
    teacher_outer,
    temperature,
    alpha,
    beta,
    bound,  # in log2 units
    kd,
    ce,
    gradient_scale,  # logit_scale: d final logit / d raw logit but for the cap
    DIVERGENCE: tl.constexpr,
    STUDENT_CAP: tl.constexpr,
    TEACHER_CAP: tl.constexpr,
    STUDENT_EXACT: tl.constexpr,
    TEACHER_EXACT: tl.constexpr,
    HARD: tl.constexpr,  # 0: no hard labels; 1: at temperature 1; 2: at another
    BOUNDED: tl.constexpr,
    WIDE: tl.constexpr,  # terms in float64
    GRADIENT: tl.constexpr,
    CUDA: tl.constexpr,
    BLOCK: tl.constexpr,
    GROUP: tl.constexpr,
):
    SOFT: tl.constexpr = DIVERGENCE != "none"
    PLAIN: tl.constexpr = not BOUNDED and not WIDE
    ONLINE: tl.constexpr = DIVERGENCE == "reverse_kl" and GRADIENT and PLAIN
    SHORT: tl.constexpr = DIVERGENCE == "forward_kl" and PLAIN
    SUMS: tl.constexpr = DIVERGENCE == "adaptive_kl" or (
        GRADIENT and SOFT and not SHORT and not ONLINE
    )
    LANES: tl.constexpr = BLOCK // GROUP
    row = tl.program_id(0).to(tl.int64)
    weight = tl.load(weights + row)
    student += row * student_stride
    teacher += row * teacher_stride
    gradient += row * gradient_stride
    if weight == 0.0:
        tl.store(losses + row, 0.0)
        if GRADIENT:
            zero_row(gradient, gradient_limit, BLOCK)
        return

    # First pass: statistics.
    s_peak, s_total = start_statistics(LANES)
    t_peak, t_total = start_statistics(LANES)
    gap_total = tl.zeros((LANES,), tl.float32)  # sum of exp2(s - s_peak) * (s - t - reference)
    reference = tl.zeros((LANES,), tl.float32)
    hard_total = tl.zeros((LANES,), tl.float32)  # sum of exp2((s - s_peak) * T)
    for start in range(0, vocab, BLOCK):
        s, s_slope = load_logits(
            student, start, student_limit, vocab, student_inner, student_outer,
            STUDENT_CAP, STUDENT_EXACT, True, CUDA, BLOCK,
        )  # fmt: skip
        old_peak, old_total = s_peak, s_total
        s_peak, s_total, shrink, mass = update_statistics(s, s_peak, s_total, GROUP, CUDA)
        if HARD == 2:
            cold = exp2((tl.reshape(s, (LANES, GROUP)) - s_peak[:, None]) * temperature, CUDA)
            hard_total *= exp2((old_peak - s_peak) * temperature, CUDA)
            hard_total += tl.sum(cold, 1)
        if SOFT:
            t, t_slope = load_logits(
                teacher, start, teacher_limit, vocab, teacher_inner, teacher_outer,
                TEACHER_CAP, TEACHER_EXACT, True, CUDA, BLOCK,
            )  # fmt: skip
            t_peak, t_total, t_shrink, t_mass = update_statistics(t, t_peak, t_total, GROUP, CUDA)
            if ONLINE:
                gap = tl.reshape(s - t, (LANES, GROUP))
                grouped = tl.reshape(s, (LANES, GROUP))
                gap_total, reference = update_gap(
                    grouped, gap, mass, shrink, old_total, s_peak, gap_total, reference
                )
    s_top, s_lse, s_share = combine_statistics(s_peak, s_total, CUDA)
    hard_lse = s_lse
    if HARD == 2:
        share = exp2((s_peak - s_top) * temperature, CUDA)
        hard_lse = s_top * temperature + tl.log2(tl.sum(hard_total * share, 0))
    t_lse = s_lse
    h_sum = 0.0
    shift = 0.0  # of reverse KL's h, so that a collapsed row's gradient does not cancel
    head_share = 0.0
    lse_gap = 0.0
    if SOFT:
        t_top, t_lse, t_share = combine_statistics(t_peak, t_total, CUDA)
        lse_gap = normaliser_gap(
            s_top, tl.sum(s_total * s_share, 0), t_top, tl.sum(t_total * t_share, 0)
        )
        if ONLINE:
            gap_sum, shift = combine_gap(gap_total, reference, s_total, s_peak, s_top, s_share)
            h_sum = gap_sum * tl.exp2(s_top - s_lse) * LN2

    # Middle pass, backwards: the sums that the gradient needs.
    if SUMS:
        head = 0.0
        h_lanes = tl.zeros((LANES,), tl.float32)
        head_lanes = tl.zeros((LANES,), tl.float32)
        gap_lanes = tl.zeros((LANES,), tl.float32)
        forward_lanes = tl.zeros((LANES,), tl.float32)
        if DIVERGENCE == "adaptive_kl":
            head = tl.load(heads + row)
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
                DIVERGENCE, BOUNDED, WIDE, s, t, s_lse, t_lse, lse_gap, 0.0, alpha, beta, bound,
                CUDA,
            )  # fmt: skip
            h_lanes += fold(h, GROUP)
            if DIVERGENCE == "adaptive_kl":  # at a share of 0, h is reverse KL's; at 1, forward's
                gap = probability_gap(t - t_lse, s - s_lse, bound, BOUNDED, CUDA)
                gap_lanes += fold(gap, GROUP)
                head_lanes += fold(tl.where(t >= head, gap, 0.0), GROUP)
                p, phi, h, softmax = outcomes(
                    DIVERGENCE, BOUNDED, WIDE, s, t, s_lse, t_lse, lse_gap, 1.0, alpha, beta,
                    bound, CUDA,
                )  # fmt: skip
                forward_lanes += fold(h, GROUP)
        h_sum = tl.sum(h_lanes, 0)
        if DIVERGENCE == "adaptive_kl":
            total = tl.sum(gap_lanes, 0)
            head_share = tl.where(total > 0, tl.sum(head_lanes, 0) / total, 0.5)
            h_sum = times(1.0 - head_share, h_sum) + head_share * tl.sum(forward_lanes, 0)

    # Last pass: value and gradient; away from where the pass before it ended.
    label = -1
    loss = 0.0
    if HARD > 0:
        label = tl.load(labels + row).to(tl.int32)
        raw = tl.load(student + label).to(tl.float32)
        z, z_slope = to_log2(raw, student_inner, student_outer, STUDENT_CAP, CUDA)
        if HARD == 2:
            z *= temperature
        loss = ce * LN2 * (hard_lse - z)
    kd_scale = kd * weight * gradient_scale / temperature
    ce_scale = ce * weight * gradient_scale
    lanes = tl.zeros((LANES,), tl.float32)
    if GRADIENT or SOFT:
        last = (vocab - 1) // BLOCK * BLOCK
        for step in range(0, vocab, BLOCK):
            start = step if SUMS else last - step
            s, s_slope = load_logits(
                student, start, student_limit, vocab, student_inner, student_outer,
                STUDENT_CAP, STUDENT_EXACT, False, CUDA, BLOCK,
            )  # fmt: skip
            g = tl.zeros((BLOCK,), tl.float32)
            if SOFT:
                t, t_slope = load_logits(
                    teacher, start, teacher_limit, vocab, teacher_inner, teacher_outer,
                    TEACHER_CAP, TEACHER_EXACT, False, CUDA, BLOCK,
                )  # fmt: skip
                p, phi, h, softmax = outcomes(
                    DIVERGENCE, BOUNDED, WIDE, s, t, s_lse, t_lse, lse_gap, head_share, alpha,
                    beta, bound, CUDA,
                )  # fmt: skip
                lanes += fold(phi, GROUP)
                if ONLINE:
                    h = times(softmax, s - t - shift) * LN2
                g = logit_gradient(DIVERGENCE, SHORT, p, softmax, h, h_sum) * kd_scale
            if GRADIENT:
                columns = start + tl.arange(0, BLOCK)
                if HARD == 2:
                    s *= temperature
                if HARD > 0:
                    hard = exp2(s - hard_lse, CUDA)
                    g += ce_scale * tl.where(columns == label, hard - 1.0, hard)
                g *= s_slope
                if not STUDENT_EXACT:
                    g = tl.where(columns < vocab, g, 0.0)
                tl.store(
                    gradient + columns,
                    g.to(gradient.dtype.element_ty),
                    mask=columns < gradient_limit,
                )
    tl.store(losses + row, loss + kd * tl.sum(lanes, 0))
