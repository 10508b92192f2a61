"""The least logit of adaptive_kl's head: the most probable tokens that hold a given mass.

    heads[r] = the largest value v of row r with sum of p over {j: z_j >= v} >= head_mass

in log2 units at temperature T, so that ties with the last token taken belong to the head. Found by
bisection between values that occur in the row: each pass halves the interval and draws both ends
to the nearest values inside it, so a language model's peaked rows take a handful of passes and no
row more than about the bits of its dtype. No sort, no host sync.

teacher [N, width]: bf16, fp16 or fp32; heads [N] float32.

Reads 2 B/element in bf16 a pass (after the first from the cache), writes nothing per element,
least 2, ours 4 plus 2 for each step of the bisection.
"""

import triton
import triton.language as tl

from kd_kernels.algebra import (
    LOWEST,
    combine_statistics,
    exp2,
    fold,
    load_logits,
    start_statistics,
    update_statistics,
)


@triton.jit
def head_threshold(
    teacher,  # [N, width]
    heads,  # [N] float32
    weights,  # [N] float32: a row of weight 0 is skipped
    teacher_stride,
    vocab,
    teacher_limit,
    teacher_inner,
    teacher_outer,
    head_mass,
    TEACHER_CAP: tl.constexpr,
    TEACHER_EXACT: tl.constexpr,
    CUDA: tl.constexpr,
    BLOCK: tl.constexpr,
    GROUP: tl.constexpr,
):
    LANES: tl.constexpr = BLOCK // GROUP
    row = tl.program_id(0).to(tl.int64)
    teacher += row * teacher_stride
    if tl.load(weights + row) == 0.0:
        return
    peak, total = start_statistics(LANES)
    for start in range(0, vocab, BLOCK):
        z, slope = load_logits(
            teacher, start, teacher_limit, vocab, teacher_inner, teacher_outer,
            TEACHER_CAP, TEACHER_EXACT, True, CUDA, BLOCK,
        )  # fmt: skip
        peak, total, shrink, mass = update_statistics(z, peak, total, GROUP, CUDA)
    high, lse, share = combine_statistics(peak, total, CUDA)
    # The head reaches down to a value in [low, high]; a token below low adds less than 2**-40 V.
    low = high - 64.0
    steps = 0
    while (low < high) & (steps < 40):
        middle = 0.5 * (low + high)
        middle = tl.where(middle >= high, low, middle)  # rounded up between two neighbours
        taken_mass = tl.zeros((LANES,), tl.float32)
        above = tl.full((BLOCK,), 1.0e30, tl.float32)  # least value > middle
        below = tl.full((BLOCK,), LOWEST, tl.float32)  # greatest value <= middle
        for start in range(0, vocab, BLOCK):
            z, slope = load_logits(
                teacher, start, teacher_limit, vocab, teacher_inner, teacher_outer,
                TEACHER_CAP, TEACHER_EXACT, True, CUDA, BLOCK,
            )  # fmt: skip
            taken = z > middle
            taken_mass += fold(tl.where(taken, exp2(z - lse, CUDA), 0.0), GROUP)
            above = tl.minimum(above, tl.where(taken, z, 1.0e30))
            below = tl.maximum(below, tl.where(taken, LOWEST, z))
        if tl.sum(taken_mass, 0) >= head_mass:
            low = tl.min(above, 0)
        else:
            high = tl.max(below, 0)
        steps += 1
    tl.store(heads + row, high)
