"""Dense rows, one read: a row pair held in the registers of a thread-block cluster (schedule S1).

    loss = kd * D(softmax(teacher / T), softmax(student / T)) + ce * (lse(student) - student[label])
    gradient = weight * d loss / d student,   written over the student's row if they are one tensor

The same arithmetic as kd_kernels.dense_two_pass, for sm_90 and later. One program a row; its
``num_ctas`` thread blocks share it, and each reduction over the row crosses the cluster through
distributed shared memory, so the row is read once whatever the divergence. A row is one or two
segments of power-of-two width: 151,936 columns are 131,072 and 32,768.

student [N, width], teacher [N, width_t]: bf16, fp16 or fp32, unit column stride, rows of whole
16-byte vectors; losses [N] float32.

Reads 4 B/element in bf16, writes 2, least 6, ours 6.

Source: the cluster softmax of quack (https://github.com/Dao-AILab/quack), the idea alone.
"""

import triton
import triton.language as tl

from kd_kernels.algebra import (
    LN2,
    exp2,
    load_logits,
    logit_gradient,
    normaliser_gap,
    outcomes,
    probability_gap,
    to_log2,
    zero_row,
)


@triton.jit
def larger_pair(a, b, c, d):
    return tl.maximum(a, c), tl.maximum(b, d)


@triton.jit
def add_pair(a, b, c, d):
    return a + c, b + d


@triton.jit
def value_and_sum(phi, h, SHORT: tl.constexpr):
    """Sums of phi and of h over a segment, in one crossing of the cluster."""
    if SHORT:  # the gradient is q - p
        return tl.sum(phi, 0), 0.0
    value, h_sum = tl.reduce((phi, h), 0, add_pair)
    return value, h_sum


@triton.jit
def gradient_segment(
    gradient,
    start,
    vocab,
    gradient_limit,
    g,
    s,
    slope,
    label,
    temperature,
    hard_lse,
    ce_scale,
    HARD: tl.constexpr,
    EXACT: tl.constexpr,
    CUDA: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """Store d loss / d raw logits of a segment from the soft part g, scaled."""
    columns = start + tl.arange(0, BLOCK)
    if HARD > 0:
        if HARD == 2:
            s *= temperature
        hard = exp2(s - hard_lse, CUDA)
        g += ce_scale * tl.where(columns == label, hard - 1.0, hard)
    g *= slope
    if not EXACT:
        g = tl.where(columns < vocab, g, 0.0)
    tl.store(gradient + columns, g.to(gradient.dtype.element_ty), mask=columns < gradient_limit)


@triton.jit
def dense_rows_one_read(
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
    FIRST: tl.constexpr,  # columns of the first segment
    SECOND: tl.constexpr,  # columns of the second, 0 for none; vocab > FIRST where there is one
):
    SOFT: tl.constexpr = DIVERGENCE != "none"
    # With a second segment every column of the first is a token's: no masks.
    S_FULL: tl.constexpr = STUDENT_EXACT or SECOND > 0
    T_FULL: tl.constexpr = TEACHER_EXACT or SECOND > 0
    SHORT: tl.constexpr = DIVERGENCE == "forward_kl" and not BOUNDED and not WIDE
    ADAPTIVE: tl.constexpr = DIVERGENCE == "adaptive_kl"
    row = tl.program_id(0).to(tl.int64)
    weight = tl.load(weights + row)
    student += row * student_stride
    teacher += row * teacher_stride
    gradient += row * gradient_stride
    if weight == 0.0:
        tl.store(losses + row, 0.0)
        if GRADIENT:
            zero_row(gradient, gradient_limit, FIRST)
        return

    # The row, and the label's logit before anything is overwritten.
    label = -1
    label_z = 0.0
    if HARD > 0:
        label = tl.load(labels + row).to(tl.int32)
        raw = tl.load(student + label).to(tl.float32)
        label_z, label_slope = to_log2(raw, student_inner, student_outer, STUDENT_CAP, CUDA)
    s, slope = load_logits(
        student, 0, student_limit, vocab, student_inner, student_outer,
        STUDENT_CAP, S_FULL, False, CUDA, FIRST,
    )  # fmt: skip
    t = s
    if SOFT:
        t, t_slope = load_logits(
            teacher, 0, teacher_limit, vocab, teacher_inner, teacher_outer,
            TEACHER_CAP, T_FULL, False, CUDA, FIRST,
        )  # fmt: skip
    if SECOND > 0:
        s_2, slope_2 = load_logits(
            student, FIRST, student_limit, vocab, student_inner, student_outer,
            STUDENT_CAP, STUDENT_EXACT, False, CUDA, SECOND,
        )  # fmt: skip
        t_2 = s_2
        if SOFT:
            t_2, t_slope_2 = load_logits(
                teacher, FIRST, teacher_limit, vocab, teacher_inner, teacher_outer,
                TEACHER_CAP, TEACHER_EXACT, False, CUDA, SECOND,
            )  # fmt: skip

    # Normalisers.
    if SOFT:
        s_top, t_top = tl.reduce((s, t), 0, larger_pair)
    else:
        s_top = tl.max(s, 0)
        t_top = s_top
    if SECOND > 0:
        s_top_2, t_top_2 = tl.reduce((s_2, t_2), 0, larger_pair)
        s_top = tl.maximum(s_top, s_top_2)
        t_top = tl.maximum(t_top, t_top_2)
    if SOFT:
        s_sum, t_sum = tl.reduce((exp2(s - s_top, CUDA), exp2(t - t_top, CUDA)), 0, add_pair)
    else:
        s_sum = tl.sum(exp2(s - s_top, CUDA), 0)
        t_sum = s_sum
    if SECOND > 0:
        s_sum_2, t_sum_2 = tl.reduce(
            (exp2(s_2 - s_top, CUDA), exp2(t_2 - t_top, CUDA)), 0, add_pair
        )
        s_sum += s_sum_2
        t_sum += t_sum_2
    s_lse = s_top + tl.log2(s_sum)
    t_lse = t_top + tl.log2(t_sum)
    lse_gap = normaliser_gap(s_top, s_sum, t_top, t_sum)
    hard_lse = s_lse
    if HARD == 2:
        hard_sum = tl.sum(exp2((s - s_top) * temperature, CUDA), 0)
        if SECOND > 0:
            hard_sum += tl.sum(exp2((s_2 - s_top) * temperature, CUDA), 0)
        hard_lse = s_top * temperature + tl.log2(hard_sum)
        label_z *= temperature

    # Value, and the sum of h.
    loss = 0.0
    if HARD > 0:
        loss = ce * LN2 * (hard_lse - label_z)
    kd_scale = kd * weight * gradient_scale / temperature
    ce_scale = ce * weight * gradient_scale
    head_share = 0.0
    if ADAPTIVE:
        head = tl.load(heads + row)
        gap = probability_gap(t - t_lse, s - s_lse, bound, BOUNDED, CUDA)
        gap_sum, head_sum = tl.reduce((gap, tl.where(t >= head, gap, 0.0)), 0, add_pair)
        if SECOND > 0:
            gap_2 = probability_gap(t_2 - t_lse, s_2 - s_lse, bound, BOUNDED, CUDA)
            more, head_more = tl.reduce((gap_2, tl.where(t_2 >= head, gap_2, 0.0)), 0, add_pair)
            gap_sum += more
            head_sum += head_more
        head_share = tl.where(gap_sum > 0, head_sum / gap_sum, 0.5)
    g = tl.zeros((FIRST,), tl.float32)
    if SECOND > 0:
        g_2 = tl.zeros((SECOND,), tl.float32)
    if SOFT:
        p, phi, h, softmax = outcomes(
            DIVERGENCE, BOUNDED, WIDE, s, t, s_lse, t_lse, lse_gap, head_share, alpha, beta, bound,
            CUDA,
        )  # fmt: skip
        value, h_sum = value_and_sum(phi, h, SHORT)
        if SECOND > 0:
            p_2, phi_2, h_2, softmax_2 = outcomes(
                DIVERGENCE, BOUNDED, WIDE, s_2, t_2, s_lse, t_lse, lse_gap, head_share, alpha,
                beta, bound, CUDA,
            )  # fmt: skip
            value_2, h_sum_2 = value_and_sum(phi_2, h_2, SHORT)
            value += value_2
            h_sum += h_sum_2
            g_2 = logit_gradient(DIVERGENCE, SHORT, p_2, softmax_2, h_2, h_sum) * kd_scale
        g = logit_gradient(DIVERGENCE, SHORT, p, softmax, h, h_sum) * kd_scale
        loss += kd * value
    tl.store(losses + row, loss)
    if GRADIENT:
        gradient_segment(
            gradient, 0, vocab, gradient_limit, g, s, slope, label, temperature, hard_lse,
            ce_scale, HARD, S_FULL, CUDA, FIRST,
        )  # fmt: skip
        if SECOND > 0:
            gradient_segment(
                gradient, FIRST, vocab, gradient_limit, g_2, s_2, slope_2, label, temperature,
                hard_lse, ce_scale, HARD, STUDENT_EXACT, CUDA, SECOND,
            )  # fmt: skip
