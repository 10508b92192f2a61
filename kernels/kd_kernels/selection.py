"""What a cache keeps of a teacher: its top-k tokens with the tail's mass, or draws from it.

    select_top: ids of the k largest logits, log softmax there, log of the mass elsewhere
    sample:     draws from softmax(logits / T), with replacement, by inversion of the running sum

One program a row; no log-softmax is written and nothing is sorted but the k entries kept. The
k-th largest value is found by bisection on counts, from 64 octaves under the top, drawing both ends
of the interval to values that occur, and stops as soon as exactly k tokens lie above a value. What
is kept is then compacted in one more pass, which also sums the tail: never as 1 - sum. Tokens less
probable than 2**-64 of the likeliest are not stored (id -1); ties at the k-th value go to the
lowest ids.

logits [N, width]: bf16, fp16 or fp32; ids [N, k] int64, log_p [N, k] and log_tail [N] float32.

Reads 4 B/element in bf16 from memory (statistics, compaction) and 2 a bisection step from the
cache, writes nothing per element, floor 2, ours 4.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from kd_kernels.algebra import (
    LN2,
    LOWEST,
    combine_statistics,
    exp2,
    fold,
    load_logits,
    start_statistics,
    update_statistics,
)
from kd_kernels.launch import check_logits, row_limit, target_of, to_log2, two_pass_shape


@triton.jit
def row_statistics(
    logits,
    vocab,
    limit,
    outer,
    EXACT: tl.constexpr,
    CUDA: tl.constexpr,
    BLOCK: tl.constexpr,
    GROUP: tl.constexpr,
):
    """(maximum, log-sum-exp) of a row in log2 units."""
    peak, total = start_statistics(BLOCK // GROUP)
    for start in range(0, vocab, BLOCK):
        z, slope = load_logits(
            logits, start, limit, vocab, 0.0, outer, False, EXACT, True, CUDA, BLOCK
        )
        peak, total, shrink, mass = update_statistics(z, peak, total, GROUP, CUDA)
    top, lse, share = combine_statistics(peak, total, CUDA)
    return top, lse


@triton.jit
def select_top_rows(
    logits,  # [N, width]
    ids,  # [N, k] int64, full of -1
    log_p,  # [N, k] float32, full of -inf
    log_tail,  # [N] float32
    stride,
    k,
    log2_k,
    vocab,
    limit,
    outer,
    EXACT: tl.constexpr,
    CUDA: tl.constexpr,
    BLOCK: tl.constexpr,
    GROUP: tl.constexpr,
):
    row = tl.program_id(0).to(tl.int64)
    logits += row * stride
    top, lse = row_statistics(logits, vocab, limit, outer, EXACT, CUDA, BLOCK, GROUP)
    # The k-th largest lies in [low, high]: k tokens of probability above 1/k do not exist.
    low = top - 64.0
    high = tl.minimum(top, lse - log2_k + 1e-3)
    cut = low
    steps = 0
    while (low < high) & (steps < 48):
        middle = 0.5 * (low + high)
        middle = tl.where(middle >= high, low, middle)
        taken = tl.zeros((BLOCK // GROUP,), tl.int32)
        above = tl.full((BLOCK,), 1.0e30, tl.float32)  # least value > middle
        below = tl.full((BLOCK,), LOWEST, tl.float32)  # greatest value <= middle
        for start in range(0, vocab, BLOCK):
            z, slope = load_logits(
                logits, start, limit, vocab, 0.0, outer, False, EXACT, True, CUDA, BLOCK
            )
            taken += fold((z > middle).to(tl.int32), GROUP)
            above = tl.minimum(above, tl.where(z > middle, z, 1.0e30))
            below = tl.maximum(below, tl.where(z > middle, LOWEST, z))
        count = tl.sum(taken, 0)
        if count == k:
            cut = middle
            high = low
        elif count > k:
            low = tl.min(above, 0)
            cut = low
        else:
            high = tl.minimum(high, tl.max(below, 0))
            cut = high
        steps += 1

    larger = tl.zeros((BLOCK // GROUP,), tl.int32)
    for start in range(0, vocab, BLOCK):
        z, slope = load_logits(
            logits, start, limit, vocab, 0.0, outer, False, EXACT, True, CUDA, BLOCK
        )
        larger += fold((z > cut).to(tl.int32), GROUP)
    next_larger = 0
    next_equal = tl.sum(larger, 0)
    tail = tl.zeros((BLOCK,), tl.float32)
    for start in range(0, vocab, BLOCK):
        z, slope = load_logits(
            logits, start, limit, vocab, 0.0, outer, False, EXACT, False, CUDA, BLOCK
        )
        columns = start + tl.arange(0, BLOCK)
        is_larger = (z > cut).to(tl.int32)
        is_equal = ((z == cut) & (columns < vocab)).to(tl.int32)
        if tl.max(is_larger + is_equal, 0) > 0:  # few tiles hold what is kept
            slot_larger = next_larger + tl.cumsum(is_larger, 0) - 1
            slot_equal = next_equal + tl.cumsum(is_equal, 0) - 1
            slot = tl.where(is_larger > 0, slot_larger, slot_equal)
            kept = ((is_larger > 0) | (is_equal > 0)) & (slot < k)
            place = row * k + slot
            tl.store(ids + place, columns.to(tl.int64), mask=kept)
            tl.store(log_p + place, (z - lse) * LN2, mask=kept)
            z = tl.where(kept, float("-inf"), z)
            next_larger += tl.sum(is_larger, 0)
            next_equal += tl.sum(is_equal, 0)
        tail += exp2(z - lse, CUDA)
    tl.store(log_tail + row, tl.log2(tl.sum(tail, 0)) * LN2)


@triton.jit
def sample_rows(
    logits,  # [N, width]
    ids,  # [N, DRAWS] int64
    seed,
    stride,
    draws,
    vocab,
    limit,
    outer,
    EXACT: tl.constexpr,
    CUDA: tl.constexpr,
    DRAWS: tl.constexpr,  # a power of two, >= draws
    BLOCK: tl.constexpr,
    STEPS: tl.constexpr,  # log2(BLOCK)
    GROUP: tl.constexpr,
):
    row = tl.program_id(0).to(tl.int64)
    logits += row * stride
    top, lse = row_statistics(logits, vocab, limit, outer, EXACT, CUDA, BLOCK, GROUP)
    slots = tl.arange(0, DRAWS)
    uniform = tl.rand(seed, row * DRAWS + slots)
    found = tl.full((DRAWS,), -1, tl.int32)
    likeliest = tl.full((BLOCK,), 2147483647, tl.int32)
    before = 0.0  # mass of the tiles gone through
    for start in range(0, vocab, BLOCK):
        z, slope = load_logits(
            logits, start, limit, vocab, 0.0, outer, False, EXACT, False, CUDA, BLOCK
        )
        columns = start + tl.arange(0, BLOCK)
        likeliest = tl.minimum(likeliest, tl.where(z == top, columns, 2147483647))
        running = before + tl.cumsum(exp2(z - lse, CUDA), 0)
        # Bisection for the first column whose running sum exceeds the draw.
        position = tl.zeros((DRAWS,), tl.int32)
        for step in tl.static_range(STEPS):
            probe = tl.gather(running, position + ((BLOCK >> (step + 1)) - 1), 0)
            position = tl.where(probe <= uniform, position + (BLOCK >> (step + 1)), position)
        here = tl.gather(running, position, 0) > uniform
        found = tl.where((found < 0) & here, start + position, found)
        before += tl.sum(exp2(z - lse, CUDA), 0)
    # The running sum may end a rounding short of a draw.
    found = tl.where(found < 0, tl.min(likeliest, 0), found)
    tl.store(ids + row * draws + slots, found.to(tl.int64), mask=slots < draws)


def select_top(
    logits: Tensor, k: int, *, vocab: int | None = None, temperature: float = 1.0
) -> tuple[Tensor, Tensor, Tensor]:
    """(ids [N, k] int64 by falling probability, log_p [N, k], log_tail [N]) in float32 nats.

    Args:
        logits: [N, width]; vocab of the columns are live. k: 1 to vocab.
    Raises:
        ValueError: k out of range.
    """
    width = logits.shape[1] if vocab is None else vocab
    if not 1 <= k <= width:
        raise ValueError(f"select_top: k must lie in [1, {width}], got {k}.")
    rows = len(logits)
    ids = torch.full((rows, k), -1, dtype=torch.int64, device=logits.device)
    log_p = torch.full((rows, k), -torch.inf, device=logits.device)
    log_tail = torch.empty(rows, device=logits.device)
    if rows:
        log2_k = float(torch.tensor(float(k)).log2())
        options = _options(logits, width, temperature)
        select_top_rows[(rows,)](
            logits, ids, log_p, log_tail, logits.stride(0), k, log2_k, width, **options
        )
    order = log_p.argsort(dim=-1, descending=True, stable=True)
    return ids.gather(1, order), log_p.gather(1, order), log_tail


def sample(
    logits: Tensor,
    draws: int,
    seed: int,
    *,
    vocab: int | None = None,
    temperature: float = 1.0,
) -> Tensor:
    """ids [N, draws] int64, drawn from softmax(logits / temperature) with replacement.

    As targets, give each draw the mass 1 / draws: repeats sum, and forward KL with tail="drop" has
    the dense gradient in expectation. The same seed gives the same draws.
    """
    width = logits.shape[1] if vocab is None else vocab
    if draws < 1:
        raise ValueError(f"sample: draws must be at least 1, got {draws}.")
    ids = torch.empty((len(logits), draws), dtype=torch.int64, device=logits.device)
    if len(logits):
        options = _options(logits, width, temperature)
        sample_rows[(len(logits),)](
            logits,
            ids,
            seed,
            logits.stride(0),
            draws,
            width,
            DRAWS=max(2, triton.next_power_of_2(draws)),
            STEPS=options["BLOCK"].bit_length() - 1,
            **options,
        )
    return ids


def _options(logits: Tensor, vocab: int, temperature: float) -> dict:
    """Arguments that the row kernels share, by name."""
    check_logits(logits)
    target = target_of(logits.device)
    block, group, warps = two_pass_shape(logits, logits, target)
    limit = row_limit(logits, vocab)
    return dict(
        limit=limit,
        outer=to_log2(1.0, None, temperature)[1],
        EXACT=limit == vocab,
        CUDA=target.kind == "cuda",
        BLOCK=block,
        GROUP=group,
        num_warps=warps,
        num_stages=1,
    )
