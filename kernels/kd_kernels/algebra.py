"""Device functions that every row kernel shares: the divergences, and online softmax statistics.

A kernel works on logits in log2 units, z = logit * log2(e) / T, so that a softmax is one exp2 and
no multiplication. p is the teacher and q the student, log_p and log_q their base-2 logarithms.
A divergence is one branch of ``terms``: phi, whose sum over the row is the value in nats, and
h = q * dphi/dq, from which d value / dz = h - q * sum(h) (kd.losses.divergences holds the algebra
and its sources; every phi carries the terms of its Bregman form, as there).

-inf logits are probability zero and need no mask: 0 * inf is stopped where it can arise, and
nowhere else. NaN passes through.
"""

import triton
import triton.language as tl

LN2 = tl.constexpr(0.6931471805599453)
TINY = tl.constexpr(1.1754944e-38)  # smallest normal float32
LOWEST = tl.constexpr(-1.0e30)  # start of a running maximum: finite, so that -inf - max is -inf


@triton.jit
def log2(x, CUDA: tl.constexpr):
    """Base-2 logarithm; on CUDA the one-instruction form (2**-22 absolute error near 1)."""
    if CUDA:
        return tl.inline_asm_elementwise(
            "lg2.approx.ftz.f32 $0, $1;", "=f,f", [x], dtype=tl.float32, is_pure=True, pack=1
        )
    return tl.log2(x)


@triton.jit
def exp2(x, CUDA: tl.constexpr):
    """Power of two; on CUDA the one-instruction form, which flushes subnormal results to zero."""
    if CUDA:
        return tl.inline_asm_elementwise(
            "ex2.approx.ftz.f32 $0, $1;", "=f,f", [x], dtype=tl.float32, is_pure=True, pack=1
        )
    return tl.exp2(x)


@triton.jit
def reciprocal(x, CUDA: tl.constexpr):
    """1 / x; on CUDA the one-instruction form (1 ulp)."""
    if CUDA:
        return tl.inline_asm_elementwise(
            "rcp.approx.ftz.f32 $0, $1;", "=f,f", [x], dtype=tl.float32, is_pure=True, pack=1
        )
    return 1.0 / x


@triton.jit
def times(weight, factor):
    """weight * factor with 0 * inf = 0 and 0 * nan = 0."""
    return tl.where(weight == 0.0, 0.0, weight * factor)


@triton.jit
def to_log2(raw, inner, outer, SOFTCAP: tl.constexpr, CUDA: tl.constexpr):
    """Logits in log2 units and the slope of the soft cap, from raw logits in float32.

    Without a cap: raw * outer, with outer = logit_scale * log2(e) / T; the slope is 1.
    With one: outer * tanh(raw * inner), inner = logit_scale / cap, outer = cap * log2(e) / T. tanh
    is 1 - 2 / (1 + exp(2x)): tanh.approx is off by 2**-11, which a cap of 30 makes 0.015 nats.
    """
    if SOFTCAP:
        doubled = raw * inner * 2.8853900817779268  # 2 * log2(e)
        capped = 1.0 - 2.0 * reciprocal(1.0 + exp2(doubled, CUDA), CUDA)
        return capped * outer, 1.0 - capped * capped
    return raw * outer, 1.0


@triton.jit
def start_statistics(LANES: tl.constexpr):
    """Running (maximum, sum of exp2(z - maximum)) of each lane, empty."""
    return tl.full((LANES,), LOWEST, tl.float32), tl.zeros((LANES,), tl.float32)


@triton.jit
def update_statistics(z, peak, total, GROUP: tl.constexpr, CUDA: tl.constexpr):
    """Fold a tile into the running statistics of its lanes, without a reduction across threads.

    A lane is a run of GROUP neighbouring columns, which one thread holds: one rescaling each.
    Returns (peak, total, shrink of what was there, exp2(z - peak) [LANES, GROUP]).
    """
    grouped = tl.reshape(z, (z.shape[0] // GROUP, GROUP))
    new_peak = tl.maximum(peak, tl.max(grouped, 1))
    shrink = exp2(peak - new_peak, CUDA)
    mass = exp2(grouped - new_peak[:, None], CUDA)
    return new_peak, total * shrink + tl.sum(mass, 1), shrink, mass


@triton.jit
def combine_statistics(peak, total, CUDA: tl.constexpr):
    """(maximum, log2 of the row's sum of exp2(z), each lane's share of the row's maximum)."""
    top = tl.max(peak, 0)
    share = exp2(peak - top, CUDA)
    return top, top + tl.log2(tl.sum(total * share, 0)), share


@triton.jit
def normaliser_gap(s_top, s_sum, t_top, t_sum):
    """Difference of two log-sum-exps, not rounded to their size."""
    return (s_top - t_top) + tl.log2(s_sum / t_sum)


@triton.jit
def update_gap(grouped, gap, mass, shrink, old_total, peak, acc, reference):
    """Fold a tile into each lane's sum of exp2(s - peak) * (gap - reference).

    reference is the gap at the lane's peak: where a row collapses onto one token its own gap, which
    may be hundreds of nats, leaves the sum, and the gradient there is not a difference of two such.
    """
    at_peak = tl.max(tl.where(grouped == peak[:, None], gap, float("-inf")), 1)
    moved = tl.where(at_peak == float("-inf"), reference, at_peak)
    acc = times(shrink, acc + old_total * (reference - moved))
    return acc + tl.sum(times(mass, gap - moved[:, None]), 1), moved


@triton.jit
def combine_gap(acc, reference, total, peak, top, share):
    """(sum of exp2(s - top) * (gap - reference of the row), that reference)."""
    row_reference = tl.max(tl.where(peak == top, reference, float("-inf")), 0)
    shifted = acc + times(total, reference - row_reference)
    return tl.sum(times(share, shifted), 0), row_reference


@triton.jit
def mix(p, q, p_weight, CUDA: tl.constexpr):
    """m = p_weight * p + (1 - p_weight) * q and its logarithm, finite where both are zero."""
    mixture = p_weight * p + (1.0 - p_weight) * q
    mixture = tl.maximum(mixture, TINY, propagate_nan=tl.PropagateNan.ALL)
    return mixture, log2(mixture, CUDA)


@triton.jit
def finite(log_a):
    """log_a with a large negative number for -inf, so that 0 * it is 0."""
    return tl.maximum(log_a, LOWEST, propagate_nan=tl.PropagateNan.ALL)


@triton.jit
def terms(
    DIVERGENCE: tl.constexpr,
    p,
    q,
    log_p,
    log_q,
    gap,
    head_share,
    alpha,
    beta,
    CUDA: tl.constexpr,
):
    """phi and h of every outcome, in nats; neither needs p or q to sum to one.

    gap: log_q - log_p, known more closely than either; total variation's ties are decided by it.
    head_share is adaptive_kl's alone.
    """
    if DIVERGENCE == "forward_kl":
        h = q - p
        phi = times(p, log_p - log_q) * LN2 + h
    elif DIVERGENCE == "forward_kl_raw":  # p need not sum to one
        phi = times(p, log_p - log_q) * LN2
        h = -p
    elif DIVERGENCE == "reverse_kl":
        h = times(q, log_q - log_p) * LN2
        phi = h + (p - q)
    elif DIVERGENCE == "jsd":
        mixture, log_m = mix(p, q, beta, CUDA)
        h = ((1.0 - beta) * LN2) * (q * (finite(log_q) - log_m))
        phi = (beta * LN2) * (p * (finite(log_p) - log_m)) + h
    elif DIVERGENCE == "skew_forward_kl":
        mixture, log_m = mix(p, q, alpha, CUDA)
        phi = LN2 * (p * (finite(log_p) - log_m)) + (mixture - p)
        h = (1.0 - alpha) * (q - q * (p * reciprocal(mixture, CUDA)))
    elif DIVERGENCE == "skew_reverse_kl" or DIVERGENCE == "skew_reverse_kl_detached":
        mixture, log_m = mix(p, q, 1.0 - alpha, CUDA)
        h = LN2 * (q * (finite(log_q) - log_m))
        phi = h + (mixture - q)
        if DIVERGENCE == "skew_reverse_kl":
            h = h + alpha * (q - q * (q * reciprocal(mixture, CUDA)))
    elif DIVERGENCE == "total_variation":
        phi = 0.5 * tl.abs(q - p)
        h = tl.where(gap == 0.0, 0.0, tl.where(gap > 0.0, 0.5 * q, -0.5 * q))
    elif DIVERGENCE == "alpha_beta":
        # Differences of powers whose exponents are rounded alike: zero where p = q.
        p_a, q_b = alpha * log_p, beta * log_q
        cross = exp2(p_a + q_b, CUDA)
        of_p = exp2(p_a + beta * log_p, CUDA) - cross
        h = (exp2(alpha * log_q + q_b, CUDA) - cross) * (1.0 / alpha)
        phi = (h + of_p * (1.0 / beta)) * (1.0 / (alpha + beta))
    elif DIVERGENCE == "alpha_beta_forward":  # beta = 0
        p_a = exp2(alpha * log_p, CUDA)
        q_a = exp2(alpha * log_q, CUDA)
        phi = (times(p_a, log_p - log_q) * (LN2 * alpha) + (q_a - p_a)) * (1.0 / (alpha * alpha))
        h = (q_a - p_a) * (1.0 / alpha)
    elif DIVERGENCE == "alpha_beta_reverse":  # alpha = 0
        p_b = exp2(beta * log_p, CUDA)
        q_b = exp2(beta * log_q, CUDA)
        gap = times(q_b, log_q - log_p) * (LN2 * beta)
        phi = (gap + (p_b - q_b)) * (1.0 / (beta * beta))
        h = gap * (1.0 / beta)
    else:
        tl.static_assert(DIVERGENCE == "adaptive_kl")
        reverse = times(q, log_q - log_p) * LN2
        forward = times(p, log_p - log_q) * LN2 + (q - p)
        phi = times(head_share, forward) + times(1.0 - head_share, reverse + (p - q))
        h = times(1.0 - head_share, reverse) + head_share * (q - p)
    return phi, h


@triton.jit
def load_logits(
    row,
    start,
    limit,
    vocab,
    inner,
    outer,
    SOFTCAP: tl.constexpr,
    EXACT: tl.constexpr,
    KEEP: tl.constexpr,
    CUDA: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """Columns start..start+BLOCK of a row in log2 units, and the soft cap's slope.

    Tokens end at vocab; reading ends at limit, the end of vocab's last whole vector where the row
    is long enough, which keeps every load wide. EXACT: they are the same and -inf stays -inf.
    KEEP asks the cache to hold the columns for another pass.
    """
    columns = start + tl.arange(0, BLOCK)
    policy: tl.constexpr = "evict_last" if KEEP else "evict_first"
    raw = tl.load(row + columns, mask=columns < limit, other=float("-inf"), eviction_policy=policy)
    z, slope = to_log2(raw.to(tl.float32), inner, outer, SOFTCAP, CUDA)
    if not EXACT:
        z = tl.where(columns < vocab, z, float("-inf"))
    return z, slope


@triton.jit
def fold(values, GROUP: tl.constexpr):
    """Sums of runs of GROUP columns, [BLOCK] to [BLOCK / GROUP], within threads."""
    return tl.sum(tl.reshape(values, (values.shape[0] // GROUP, GROUP)), 1)


@triton.jit
def bounded_terms(
    DIVERGENCE: tl.constexpr,
    BOUNDED: tl.constexpr,
    log_p,
    log_q,
    gap,
    head_share,
    alpha,
    beta,
    bound,
    CUDA: tl.constexpr,
):
    """(p, phi, h, softmax): p and q no smaller than 2**bound, the softmax as it is.

    Below the bound q is a constant, so h is zero there. Raw masses are left as they are: of them
    the logarithms alone are bounded.
    """
    p = exp2(log_p, CUDA)
    softmax = exp2(log_q, CUDA)
    q = softmax
    if BOUNDED:
        below = log_q < bound
        log_p = tl.maximum(log_p, bound, propagate_nan=tl.PropagateNan.ALL)
        log_q = tl.maximum(log_q, bound, propagate_nan=tl.PropagateNan.ALL)
        gap = log_q - log_p
        q = exp2(log_q, CUDA)
        if DIVERGENCE != "forward_kl_raw":
            p = exp2(log_p, CUDA)
    phi, h = terms(DIVERGENCE, p, q, log_p, log_q, gap, head_share, alpha, beta, CUDA)
    if BOUNDED:
        h = tl.where(below, 0.0, h)
    return p, phi, h, softmax


@triton.jit
def probability_gap(log_p, log_q, bound, BOUNDED: tl.constexpr, CUDA: tl.constexpr):
    """|p - q|, both no smaller than 2**bound: what adaptive_kl's share is made of."""
    if BOUNDED:
        log_p = tl.maximum(log_p, bound, propagate_nan=tl.PropagateNan.ALL)
        log_q = tl.maximum(log_q, bound, propagate_nan=tl.PropagateNan.ALL)
    return tl.abs(exp2(log_p, CUDA) - exp2(log_q, CUDA))


@triton.jit
def beside(s, t, log_q, gap, t_lse):
    """log p, of which log q - log p is the gap."""
    both = (s > float("-inf")) & (t > float("-inf"))
    return tl.where(both, log_q - gap, t - t_lse)


@triton.jit
def outcomes(
    DIVERGENCE: tl.constexpr,
    BOUNDED: tl.constexpr,
    WIDE: tl.constexpr,
    s,
    t,
    s_lse,
    t_lse,
    lse_gap,
    head_share,
    alpha,
    beta,
    bound,
    CUDA: tl.constexpr,
):
    """(p, phi, h, softmax of s) of every outcome, from logits and their log-sum-exp in log2 units.

    lse_gap is s_lse - t_lse, known more closely than either. WIDE: in float64, as at a high
    temperature p and q are so close that a term is a difference of two in its last digits.
    """
    if WIDE:
        s, t = s.to(tl.float64), t.to(tl.float64)
        log_q, gap = s - s_lse, (s - t) - lse_gap
        log_p = beside(s, t, log_q, gap, t_lse)
        p, phi, h, softmax = bounded_terms(
            DIVERGENCE, BOUNDED, log_p, log_q, gap, head_share, alpha, beta, bound, False
        )
        return p.to(tl.float32), phi.to(tl.float32), h.to(tl.float32), softmax.to(tl.float32)
    log_q, gap = s - s_lse, (s - t) - lse_gap
    return bounded_terms(
        DIVERGENCE, BOUNDED, t - t_lse, log_q, gap, head_share, alpha, beta, bound, CUDA
    )


@triton.jit
def logit_gradient(DIVERGENCE: tl.constexpr, SHORT: tl.constexpr, p, softmax, h, h_sum):
    """d value / dz. SHORT: for forward KL q - p, whose h sums to zero; zero where p = q."""
    if SHORT and DIVERGENCE == "forward_kl":
        return softmax - p
    return h - softmax * h_sum


@triton.jit
def zero_row(gradient, limit, BLOCK: tl.constexpr):
    """The gradient of a row that does not count."""
    for start in range(0, limit, BLOCK):
        columns = start + tl.arange(0, BLOCK)
        zeros = tl.zeros((BLOCK,), gradient.dtype.element_ty)
        tl.store(gradient + columns, zeros, mask=columns < limit)
