"""Sparse teacher, two passes: K stored tokens and a tail against a row of logits.

    outcomes z~ = (z at ids, log-sum-exp of the other columns)        K + 1 of them
    loss = kd * D(p, softmax(z~)) + ce * (lse - z[label])
    gradient of column j = weight * (g_k where j is stored token k, g_tail * softmax_j elsewhere)

One program a row. The first pass takes the tail's log-sum-exp with the stored columns left out,
never as 1 - sum, so a saturated student loses nothing; a histogram of the ids that fall into a tile
marks them. The K + 1 outcomes are then a dense row of their own: every divergence, one definition.
The second pass, backwards, writes the tail's softmax; the stored columns are written over it.

student [N, width]: bf16, fp16 or fp32, unit column stride; ids [N, S] int32, log_p [N, S] float32
in log2 units, S a power of two above K: slot K is the tail, empty slots hold id -1 and -inf. Ids
are unique in a row.

Reads 4 B/element in bf16, writes 2, least 4, ours 6 where the second read misses the cache; per row
12 S bytes of targets and K scattered 32-byte sectors, read and written.

Source: Anshumann et al. 2025 (sparse logit sampling), https://arxiv.org/abs/2503.16870, for the
targets; the algebra is kd.losses.rows.sparse_divergence_'s.
"""

import triton
import triton.language as tl

from kd_kernels.algebra import (
    LN2,
    LOWEST,
    bounded_terms,
    combine_statistics,
    exp2,
    load_logits,
    logit_gradient,
    probability_gap,
    start_statistics,
    to_log2,
    update_statistics,
    zero_row,
)


@triton.jit
def without(z, ids, start, BLOCK: tl.constexpr):
    """A tile of logits with -inf at the ids that fall into it.

    "!= 0" and not "> 0": Triton 3.8's AMD range analysis takes a histogram's counts for zeros and
    folds the latter away, with the whole histogram (compiled, it is 32 bytes of shared memory).
    """
    place = ids - start
    hits = tl.histogram(place, BLOCK, mask=(place >= 0) & (place < BLOCK))
    return tl.where(hits != 0, float("-inf"), z)


@triton.jit
def slot_gradient(
    DIVERGENCE: tl.constexpr,
    BOUNDED: tl.constexpr,
    WIDE: tl.constexpr,
    log_p,
    log_q,
    head,
    alpha,
    beta,
    bound,  # min_logprob in log2 units
    CUDA: tl.constexpr,
):
    """(value, d value / d z~ [S], q [S]) of the outcomes."""
    head_share = 0.0
    if DIVERGENCE == "adaptive_kl":
        gap = probability_gap(log_p, log_q, bound, BOUNDED, CUDA)
        total = tl.sum(gap, 0)
        in_head = tl.sum(tl.where(log_p >= head, gap, 0.0), 0)
        head_share = tl.where(total > 0, in_head / total, 0.5)
    if WIDE:
        log_p, log_q = log_p.to(tl.float64), log_q.to(tl.float64)
        p, phi, h, q = bounded_terms(
            DIVERGENCE, BOUNDED, log_p, log_q, log_q - log_p, head_share, alpha, beta, bound, False
        )
    else:
        p, phi, h, q = bounded_terms(
            DIVERGENCE, BOUNDED, log_p, log_q, log_q - log_p, head_share, alpha, beta, bound, CUDA
        )
    g = logit_gradient(DIVERGENCE, not BOUNDED, p, q, h, tl.sum(h, 0))
    return tl.sum(phi, 0).to(tl.float32), g.to(tl.float32), q.to(tl.float32)


@triton.jit
def sparse_rows_two_pass(
    student,  # [N, width]
    ids,  # [N, SLOTS] int32
    log_p,  # [N, SLOTS] float32, log2 units, at the loss temperature
    gradient,  # [N, width], may be the student
    losses,  # [N] float32
    weights,  # [N] float32: a row of weight 0 does not count
    labels,  # [N] int64, with HARD
    heads,  # [N] float32: adaptive_kl's least log_p in the head
    student_stride,
    gradient_stride,
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
    BLOCK: tl.constexpr,
    GROUP: tl.constexpr,
):
    LANES: tl.constexpr = BLOCK // GROUP
    row = tl.program_id(0).to(tl.int64)
    weight = tl.load(weights + row)
    student += row * student_stride
    gradient += row * gradient_stride
    if weight == 0.0:
        tl.store(losses + row, 0.0)
        if GRADIENT:
            zero_row(gradient, gradient_limit, BLOCK)
        return

    slots = tl.arange(0, SLOTS)
    token = tl.load(ids + row * SLOTS + slots)
    target = tl.load(log_p + row * SLOTS + slots)
    raw = tl.load(student + token, mask=token >= 0, other=float("-inf")).to(tl.float32)
    at_ids, slot_slope = to_log2(raw, student_inner, student_outer, STUDENT_CAP, CUDA)
    at_ids = tl.where(token >= 0, at_ids, float("-inf"))

    # First pass: the tail's statistics.
    peak, total = start_statistics(LANES)
    hard_total = tl.zeros((LANES,), tl.float32)
    for start in range(0, vocab, BLOCK):
        z, slope = load_logits(
            student, start, student_limit, vocab, student_inner, student_outer,
            STUDENT_CAP, STUDENT_EXACT, True, CUDA, BLOCK,
        )  # fmt: skip
        z = without(z, token, start, BLOCK)
        old_peak = peak
        peak, total, shrink, mass = update_statistics(z, peak, total, GROUP, CUDA)
        if HARD == 2:
            cold = exp2((tl.reshape(z, (LANES, GROUP)) - peak[:, None]) * temperature, CUDA)
            hard_total *= exp2((old_peak - peak) * temperature, CUDA)
            hard_total += tl.sum(cold, 1)
    top, tail_lse, share = combine_statistics(peak, total, CUDA)

    # The outcomes.
    outcome = tl.where(slots == stored, tail_lse, at_ids)
    outcome_top = tl.max(outcome, 0)
    # Relative to the largest: a log-sum-exp of the logits' own size is rounded to that size.
    log_sum = tl.log2(tl.sum(exp2(outcome - outcome_top, CUDA), 0))
    lse = outcome_top + log_sum
    head = 0.0
    if DIVERGENCE == "adaptive_kl":
        head = tl.load(heads + row)
    value, g, q = slot_gradient(
        DIVERGENCE, BOUNDED, WIDE, target, (outcome - outcome_top) - log_sum, head, alpha, beta,
        bound, CUDA,
    )  # fmt: skip
    kd_scale = kd * weight * gradient_scale / temperature
    ce_scale = ce * weight * gradient_scale
    loss = kd * value
    g *= kd_scale
    hard_lse = lse
    label = 0
    label_z = 0.0
    label_slope = 1.0
    if HARD > 0:
        label = tl.load(labels + row).to(tl.int32)
        label_raw = tl.load(student + label).to(tl.float32)
        label_z, label_slope = to_log2(label_raw, student_inner, student_outer, STUDENT_CAP, CUDA)
        hard_z = label_z
        if HARD == 2:
            cold_share = exp2((peak - top) * temperature, CUDA)
            hard_tail = top * temperature + tl.log2(tl.sum(hard_total * cold_share, 0))
            hard_outcome = tl.where(slots == stored, hard_tail, at_ids * temperature)
            hard_top = tl.max(hard_outcome, 0)
            hard_mass = tl.sum(exp2(hard_outcome - hard_top, CUDA), 0)
            hard_lse = hard_top + tl.log2(hard_mass)
            hard_z = label_z * temperature
            g += tl.where(token >= 0, ce_scale * exp2(at_ids * temperature - hard_lse, CUDA), 0.0)
        else:
            g += ce_scale * q
        g -= tl.where(token == label, ce_scale, 0.0)
        loss += ce * LN2 * (hard_lse - hard_z)
    tl.store(losses + row, loss)

    # Second pass, backwards: the tail's softmax everywhere, then the stored columns over it.
    if GRADIENT:
        tail_g = tl.sum(tl.where(slots == stored, g, 0.0), 0)
        tail_lse = tl.maximum(tail_lse, LOWEST, propagate_nan=tl.PropagateNan.ALL)
        last = (vocab - 1) // BLOCK * BLOCK
        for back in range(0, vocab, BLOCK):
            start = last - back
            z, slope = load_logits(
                student, start, student_limit, vocab, student_inner, student_outer,
                STUDENT_CAP, STUDENT_EXACT, False, CUDA, BLOCK,
            )  # fmt: skip
            columns = start + tl.arange(0, BLOCK)
            tail = tail_g * exp2(z - tail_lse, CUDA)
            if HARD == 2:
                tail += ce_scale * exp2(z * temperature - hard_lse, CUDA)
            tail *= slope
            if not STUDENT_EXACT:
                tail = tl.where(columns < vocab, tail, 0.0)
            tl.store(
                gradient + columns,
                tail.to(gradient.dtype.element_ty),
                mask=columns < gradient_limit,
            )
        tl.debug_barrier()
        tl.store(gradient + token, (g * slot_slope).to(gradient.dtype.element_ty), mask=token >= 0)
        if HARD > 0:
            g_label = tail_g * tl.exp2(label_z - tail_lse) - ce_scale
            if HARD == 2:
                g_label += ce_scale * tl.exp2(label_z * temperature - hard_lse)
            stored_label = tl.max((token == label).to(tl.int32), 0)
            g_label = (g_label * label_slope).to(gradient.dtype.element_ty)
            tl.store(gradient + label, g_label, mask=stored_label == 0)
