"""Sparse teacher, one read: a row of logits held in the registers of a thread-block cluster.

    outcomes z~ = (z at ids, log-sum-exp of the other columns)        K + 1 of them
    loss = kd * D(p, softmax(z~)) + ce * (lse - z[label])
    gradient of column j = weight * (g_k where j is stored token k, g_tail * softmax_j elsewhere)

The arithmetic of kd_kernels.sparse_two_pass, for sm_90 and later, in three launches: ``mark_rows``
sets a bit for each stored token, ``sparse_rows_one_read`` takes the row once, leaving marked
columns out of the tail, and ``store_slots`` writes the stored tokens' gradients over the tail's.
Launches order what a cluster's blocks would else have to wait for.

student [N, width]: bf16, fp16 or fp32, rows of whole 16-byte vectors; ids [N, S] int32, log_p
[N, S] float32 in log2 units, as in kd_kernels.sparse_two_pass; marks [N, columns / 8] bytes.

Reads 2 B/element in bf16, writes 2, least 4, ours 4.25: the marks are an eighth of a byte, once
zeroed and once read; per row 20 S bytes of targets, gradients and marks, and K scattered 32-byte
sectors.

Source: the cluster softmax of quack (https://github.com/Dao-AILab/quack), the idea alone.
"""

import triton
import triton.language as tl

from kd_kernels.algebra import LN2, LOWEST, exp2, load_logits, to_log2, zero_row
from kd_kernels.sparse_two_pass import slot_gradient


@triton.jit
def mark_rows(
    ids,  # [N, SLOTS] int32, unique in a row, -1 in empty slots
    marks,  # [N, words] int32, zero
    words,
    SLOTS: tl.constexpr,
):
    row = tl.program_id(0).to(tl.int64)
    token = tl.load(ids + row * SLOTS + tl.arange(0, SLOTS))
    place = marks + row * words + tl.maximum(token, 0) // 32
    tl.atomic_or(place, 1 << (token & 31), mask=token >= 0)


@triton.jit
def store_slots(
    ids,  # [N, SLOTS] int32
    values,  # [N, SLOTS] float32
    gradient,  # [N, width]
    weights,  # [N] float32: a row of weight 0 is left as it is
    gradient_stride,
    SLOTS: tl.constexpr,
):
    row = tl.program_id(0).to(tl.int64)
    if tl.load(weights + row) == 0.0:
        return
    slots = row * SLOTS + tl.arange(0, SLOTS)
    token = tl.load(ids + slots)
    value = tl.load(values + slots)
    gradient += row * gradient_stride
    tl.store(gradient + token, value.to(gradient.dtype.element_ty), mask=token >= 0)


@triton.jit
def load_tail(
    row,
    marks,
    start,
    limit,
    vocab,
    inner,
    outer,
    SOFTCAP: tl.constexpr,
    EXACT: tl.constexpr,
    CUDA: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """A segment of logits with -inf where a token is stored, and the soft cap's slope."""
    z, slope = load_logits(
        row, start, limit, vocab, inner, outer, SOFTCAP, EXACT, False, CUDA, BLOCK
    )
    byte = tl.load(marks + start // 8 + tl.arange(0, BLOCK // 8)).to(tl.int32)
    bits = byte[:, None] & (1 << tl.arange(0, 8))[None, :]
    return tl.where(tl.reshape(bits, (BLOCK,)) != 0, float("-inf"), z), slope


@triton.jit
def tail_segment(
    gradient,
    start,
    vocab,
    gradient_limit,
    z,
    slope,
    top,
    tail_scale,
    label,
    temperature,
    hard_lse,
    ce_scale,
    HARD: tl.constexpr,
    EXACT: tl.constexpr,
    CUDA: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """Store the tail's gradient of a segment; tail_scale is relative to exp2(z - top)."""
    columns = start + tl.arange(0, BLOCK)
    g = tail_scale * exp2(z - top, CUDA)
    if HARD == 2:
        g += ce_scale * exp2(z * temperature - hard_lse, CUDA)
    if HARD > 0:
        g = tl.where(columns == label, g - ce_scale, g)
    g *= slope
    if not EXACT:
        g = tl.where(columns < vocab, g, 0.0)
    tl.store(gradient + columns, g.to(gradient.dtype.element_ty), mask=columns < gradient_limit)


@triton.jit
def sparse_rows_one_read(
    student,  # [N, width]
    ids,  # [N, SLOTS] int32
    log_p,  # [N, SLOTS] float32, log2 units, at the loss temperature
    marks,  # [N, mark_stride] uint8
    slot_values,  # [N, SLOTS] float32: gradients of the stored tokens
    gradient,  # [N, width], may be the student
    losses,  # [N] float32
    weights,  # [N] float32: a row of weight 0 does not count
    labels,  # [N] int64, with HARD
    heads,  # [N] float32: adaptive_kl's least log_p in the head
    student_stride,
    gradient_stride,
    mark_stride,
    stored,  # K: the tail's slot
    vocab,
    student_limit,
    gradient_limit,
    student_inner,
    student_outer,
    temperature,
    alpha,
    beta,
    bound,  # min_logprob in log2 units
    kd,
    ce,
    gradient_scale,
    DIVERGENCE: tl.constexpr,
    STUDENT_CAP: tl.constexpr,
    STUDENT_EXACT: tl.constexpr,
    HARD: tl.constexpr,  # 0: no hard labels; 1: at temperature 1; 2: at another
    BOUNDED: tl.constexpr,
    WIDE: tl.constexpr,
    GRADIENT: tl.constexpr,
    CUDA: tl.constexpr,
    SLOTS: tl.constexpr,
    FIRST: tl.constexpr,  # columns of the first segment
    SECOND: tl.constexpr,  # columns of the second, 0 for none; vocab > FIRST where there is one
):
    FULL: tl.constexpr = STUDENT_EXACT or SECOND > 0
    row = tl.program_id(0).to(tl.int64)
    weight = tl.load(weights + row)
    student += row * student_stride
    gradient += row * gradient_stride
    marks += row * mark_stride
    if weight == 0.0:
        tl.store(losses + row, 0.0)
        if GRADIENT:
            zero_row(gradient, gradient_limit, FIRST)
        return

    # The row, the stored tokens' logits and the label's, before anything is overwritten.
    slots = tl.arange(0, SLOTS)
    token = tl.load(ids + row * SLOTS + slots)
    target = tl.load(log_p + row * SLOTS + slots)
    raw = tl.load(student + token, mask=token >= 0, other=float("-inf")).to(tl.float32)
    at_ids, slot_slope = to_log2(raw, student_inner, student_outer, STUDENT_CAP, CUDA)
    at_ids = tl.where(token >= 0, at_ids, float("-inf"))
    label = -1
    label_z = 0.0
    if HARD > 0:
        label = tl.load(labels + row).to(tl.int32)
        label_raw = tl.load(student + label).to(tl.float32)
        label_z, label_slope = to_log2(label_raw, student_inner, student_outer, STUDENT_CAP, CUDA)
    z, slope = load_tail(
        student, marks, 0, student_limit, vocab, student_inner, student_outer,
        STUDENT_CAP, FULL, CUDA, FIRST,
    )  # fmt: skip
    top = tl.max(z, 0)
    if SECOND > 0:
        z_2, slope_2 = load_tail(
            student, marks, FIRST, student_limit, vocab, student_inner, student_outer,
            STUDENT_CAP, STUDENT_EXACT, CUDA, SECOND,
        )  # fmt: skip
        top = tl.maximum(top, tl.max(z_2, 0))
    top = tl.maximum(top, LOWEST, propagate_nan=tl.PropagateNan.ALL)
    total = tl.sum(exp2(z - top, CUDA), 0)
    if SECOND > 0:
        total += tl.sum(exp2(z_2 - top, CUDA), 0)
    tail_log = tl.log2(total)

    # The outcomes, relative to the largest: a log-sum-exp is rounded to its own size.
    outcome = tl.where(slots == stored, top + tail_log, at_ids)
    outcome_top = tl.max(outcome, 0)
    log_sum = tl.log2(tl.sum(exp2(outcome - outcome_top, CUDA), 0))
    head = 0.0
    if DIVERGENCE == "adaptive_kl":
        head = tl.load(heads + row)
    log_q = (outcome - outcome_top) - log_sum
    value, g, q = slot_gradient(
        DIVERGENCE, BOUNDED, WIDE, target, log_q, head, alpha, beta, bound, CUDA
    )  # fmt: skip
    kd_scale = kd * weight * gradient_scale / temperature
    ce_scale = ce * weight * gradient_scale
    loss = kd * value
    g *= kd_scale
    hard_lse = outcome_top + log_sum
    if HARD == 2:
        hard_tail = tl.sum(exp2((z - top) * temperature, CUDA), 0)
        if SECOND > 0:
            hard_tail += tl.sum(exp2((z_2 - top) * temperature, CUDA), 0)
        hard_tail = top * temperature + tl.log2(hard_tail)
        hard_outcome = tl.where(slots == stored, hard_tail, at_ids * temperature)
        hard_top = tl.max(hard_outcome, 0)
        hard_lse = hard_top + tl.log2(tl.sum(exp2(hard_outcome - hard_top, CUDA), 0))
        g += tl.where(token >= 0, ce_scale * exp2(at_ids * temperature - hard_lse, CUDA), 0.0)
        label_z *= temperature
    if HARD == 1:
        g += ce_scale * q
    if HARD > 0:
        g -= tl.where(token == label, ce_scale, 0.0)
        loss += ce * LN2 * (hard_lse - label_z)
    tl.store(losses + row, loss)
    if GRADIENT:
        tl.store(slot_values + row * SLOTS + slots, g * slot_slope)
        tail_scale = tl.sum(tl.where(slots == stored, g, 0.0), 0) / tl.maximum(total, 1e-30)
        tail_segment(
            gradient, 0, vocab, gradient_limit, z, slope, top, tail_scale, label, temperature,
            hard_lse, ce_scale, HARD, FULL, CUDA, FIRST,
        )  # fmt: skip
        if SECOND > 0:
            tail_segment(
                gradient, FIRST, vocab, gradient_limit, z_2, slope_2, top, tail_scale, label,
                temperature, hard_lse, ce_scale, HARD, STUDENT_EXACT, CUDA, SECOND,
            )  # fmt: skip
