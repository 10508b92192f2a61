"""The driver: every loss, of any form and on any backend, a chunk of rows at a time.

    raw logits of a chunk = sum of x @ w.T + bias       (a student given as logits has them)
    backend: raw logits -> row losses, gradient of the raw logits
    dx = gradient @ w,  dw += gradient.T @ x            accumulated in float32 over chunks

No [N, V] tensor of a projection exists, and each matmul runs once: 6*N*V*Hs + 2*N*V*Ht FLOPs, the
least there is (a design that makes the logits again in backward spends 8 and 4).

With Triton logits are float32 whatever the hidden states are: at student ~ teacher (logit gap 0.05
at magnitude 25) bf16 logits give a gradient that is all rounding (109 % relative error), float32
ones none.
"""

from __future__ import annotations

import functools
from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor

from kd.losses import chunks
from kd.losses.inputs import TopK
from kd.losses.problem import NO_TRANSFORM, Problem, Projection, SparseRows, Tile
from kd.losses.sparse import canonical

SLAB_ELEMENTS = 1 << 18
"""Logits of one slab of the vocabulary, where a projection is made slab by slab."""

SLAB_WIDTH = 512
"""Hidden width from which a projection is made slab by slab."""

Gradients = list[Tensor | None]
"""d loss / d the student's tensors, in the order of ``kd.losses.autograd.leaves``."""


Index = slice | Tensor | None
"""Which of the rows; None is all."""


def part(given: Any, index: slice | Tensor | None) -> Any:
    """Rows ``index`` of a tensor or of sparse rows, None for all; what is not there stays so."""
    return given if given is None or index is None else given[index]


def run(
    problem: Problem, coefficient: Tensor, needed: tuple[bool, ...] = ()
) -> tuple[Tensor, Gradients]:
    """Row losses [N], unweighted, and the gradient of sum(coefficient * losses).

    coefficient [N]. needed: which of the student's tensors want gradients; none by default. Rows
    that do not count give zero.
    """
    student, backend, rows, like = problem.student, problem.backend, problem.rows, problem.weight
    count = len(like) if rows is None else len(rows)
    found: list[Tensor] = []
    wanted = any(needed)
    plan, several = plan_chunks(problem, needed, count)
    grads = allocate_gradients(problem, needed, several)
    memory = chunks.empty((plan.bytes,), torch.uint8, like.device) if plan.bytes else None
    transform = student.transform if isinstance(student, Projection) else NO_TRANSFORM
    # In full precision the weights go to the matmuls' small sides, saving a pass; in a narrow type
    # that would round twice.
    outer = isinstance(student, Projection) and wanted and not (backend.fused or problem.shard)
    outer = outer and student.pairs[0][0].dtype == like.dtype  # type: ignore[union-attr]
    start = 0
    while start < count:
        stop = min(start + (plan.later if start else plan.first), count)
        index: Index = None if stop - start == len(like) else slice(start, stop)
        index = index if rows is None else rows[start:stop]
        own, spare = (None, None) if memory is None else plan.split(memory, stop - start)
        if plan.borrows and start == 0:
            spare = next(g for g in grads[1::2] if g is not None).view(-1).view(torch.uint8)
        weight, labels = part(coefficient, index), part(problem.labels, index)
        inputs: list[Tensor] = []
        if isinstance(student, Projection):
            inputs = [part(x, index) for x, _ in student.pairs]
            raw = project(student, inputs, problem.columns, backend.wide, own)
            gradient = None
            if wanted:
                narrow = inputs[0].dtype
                gradient = raw if raw.dtype == narrow else torch.empty_like(raw, dtype=narrow)
        else:
            raw, gradient = part(student, index), part(grads[0], index)
        for first, last, teacher, scratch in teacher_rows(problem, start, stop, spare):
            whole = last - first == stop - start
            here = None if whole else slice(first - start, last - start)
            tile = Tile(
                part(raw, here),
                teacher,
                part(labels, here),
                None if outer else part(weight, here),
                part(gradient, here),
                problem.objective,
                problem.columns,
                transform,
                getattr(problem.teacher, "transform", NO_TRANSFORM),
                scratch,
                first,
            )
            found.append(backend.rows(tile))
        if isinstance(student, Projection) and gradient is not None:
            accumulate(
                student, grads, inputs, gradient, weight if outer else None, index, start == 0
            )
        start = stop
    if problem.shard is not None and problem.shard.reduce_hidden:
        for dx in grads[0:-1:2]:
            if dx is not None:
                problem.shard.all_reduce(dx)
    losses = found[0] if len(found) == 1 else torch.cat([like.new_zeros(0), *found])
    if rows is None:
        return losses, grads
    return losses.new_zeros(len(like)).index_copy_(0, rows, losses), grads


def plan_chunks(problem: Problem, needed: tuple[bool, ...], count: int) -> tuple[chunks.Plan, bool]:
    """The cut into chunks, and whether a weight's gradient is summed over several."""
    student, teacher, columns = problem.student, problem.teacher, problem.columns
    projected, backend, device = (
        isinstance(student, Projection),
        problem.backend,
        problem.weight.device,
    )
    uniform = isinstance(teacher, TopK) and teacher.tail == "uniform"
    if backend.fused or problem.shard is not None:
        made = projected or isinstance(teacher, Projection) or uniform
        rows = count
        if made and problem.shard is not None:  # the same on every rank: of a mean shard's width
            columns = -(-problem.objective.vocab_size // problem.shard.ranks)
        if made and backend.fused:
            rows = chunks.fused_rows(count, columns * (10 if projected else 4), device)
        elif made:
            rows = chunks.even(count, chunks.BUDGET // (8 * columns))
        return chunks.Plan(max(1, rows), max(1, rows)), rows < count
    teacher_row = 0
    if isinstance(teacher, Projection):
        teacher_row = columns * teacher.pairs[0][1].dtype.itemsize
    if not isinstance(student, Projection):
        rows = chunks.even(count, chunks.TEACHER_BYTES // teacher_row) if teacher_row else count
        return chunks.Plan(max(1, rows), max(1, rows), 0, rows * teacher_row), False
    narrow = student.pairs[0][0].dtype.itemsize
    heads = [w.numel() for (_, w), want in zip(student.pairs, needed[1::2], strict=False) if want]
    spare, row = heads[0] if heads else 0, columns * narrow
    plan = chunks.Plan.of(count, row, teacher_row, spare * narrow)
    if plan.first >= count or not heads:
        return plan, plan.first < count
    wide = problem.weight.dtype.itemsize
    return chunks.Plan.of(count, row, teacher_row, spare * wide), True


def teacher_rows(
    problem: Problem, start: int, stop: int, spare: Tensor | None
) -> Iterator[tuple[int, int, Tensor | SparseRows | None, bool]]:
    """(first, last, the teacher's rows, whether they may be overwritten) of a chunk's rows.

    spare: bytes for projected logits; where they are few, the rows come in several parts.
    """
    teacher, rows = problem.teacher, problem.rows
    if teacher is None or (isinstance(teacher, Tensor) and rows is None):
        whole = teacher is None or stop - start == len(teacher)
        yield start, stop, teacher if whole else teacher[start:stop], False  # type: ignore[index]
        return
    if isinstance(teacher, TopK):
        index = slice(start, stop) if rows is None else rows[start:stop]
        yield start, stop, canonical(teacher, index, problem.objective, problem.weight.dtype), False
        return
    size = stop - start
    if isinstance(teacher, Tensor) and not problem.backend.fused:
        size = chunks.even(size, chunks.GATHERED_BYTES // max(1, teacher[:1].nbytes))
    elif isinstance(teacher, Projection) and spare is not None:
        row_bytes = problem.columns * teacher.pairs[0][1].dtype.itemsize
        size = chunks.even(size, len(spare) // row_bytes)
    for first in range(start, stop, size):
        last = min(first + size, stop)
        index = slice(first, last) if rows is None else rows[first:last]
        if isinstance(teacher, Tensor):
            yield first, last, teacher[index], True
        else:
            inputs = [x[index] for x, _ in teacher.pairs]
            logits = project(teacher, inputs, problem.columns, problem.backend.wide, spare)
            yield first, last, logits, True


def allocate_gradients(problem: Problem, needed: tuple[bool, ...], several: bool) -> Gradients:
    """Memory for the gradients that are wanted and for no others: a frozen lm_head gets none.

    Those of weights [V, H], filled by the first chunk, are in the compute dtype where they are
    summed over ``several``, or over rows in float16, which would overflow.
    """
    student, rows = problem.student, problem.rows
    if not any(needed):
        return [None] * max(1, len(needed))
    if not isinstance(student, Projection):
        if problem.overwrite:
            return [student.detach()]
        return [chunks.empty(student.shape, student.dtype, student.device)]
    wide = problem.weight.dtype
    like = student.pairs[0][0]
    kind = wide if several or like.dtype in (torch.float16, torch.float64) else like.dtype
    nothing = len(like) == 0 or (rows is not None and len(rows) == 0)
    make = torch.empty_like if rows is None else torch.zeros_like
    grads: Gradients = []
    for (x, w), of_x, of_w in zip(student.pairs, needed[0:-1:2], needed[1:-1:2], strict=True):
        grads.append(make(x, memory_format=torch.contiguous_format) if of_x else None)
        zeros = torch.zeros if nothing else torch.empty
        grads.append(zeros(w.shape, dtype=kind, device=w.device) if of_w else None)
    bias = student.bias
    wants_bias = needed[-1] and bias is not None
    grads.append(torch.zeros_like(bias, dtype=wide) if wants_bias else None)  # type: ignore[arg-type]
    return grads


def accumulate(
    student: Projection,
    grads: Gradients,
    inputs: list[Tensor],
    gradient: Tensor,
    weight: Tensor | None,
    index: Index,
    first: bool,
) -> None:
    """dx, dw and db of a chunk from the gradient of its raw logits [c, columns].

    weight [c]: of the rows, where the gradient has not got it yet. first: the first chunk's dw
    finds no sum.
    """
    columns = gradient.shape[1]
    column = None if weight is None else weight.unsqueeze(1)
    for x, (_, w), dx, dw in zip(inputs, student.pairs, grads[0:-1:2], grads[1:-1:2], strict=True):
        if dx is not None:
            packed = isinstance(index, Tensor)
            here = torch.empty_like(x) if packed else part(dx, index)
            torch.mm(gradient, w[:columns], out=here)
            if column is not None:
                here.mul_(column)
            if packed:
                dx.index_copy_(0, index, here)  # type: ignore[arg-type]
        if dw is not None:
            if first:
                dw[columns:] = 0
            product_(dw[:columns], gradient.T, x if column is None else x * column, add=not first)
    if grads[-1] is not None:
        db = grads[-1][:columns]
        if weight is None:
            db += gradient.sum(0, dtype=db.dtype)
        else:
            db.addmv_(gradient.T, weight)


def project(
    source: Projection, inputs: list[Tensor], columns: int, wide: bool, memory: Tensor | None
) -> Tensor:
    """Raw logits [c, columns] of a projection's rows; wide: in float32 of narrower inputs.

    memory: bytes that hold them; None for memory of their own.
    """
    first, weights = inputs[0], [w[:columns] for _, w in source.pairs]
    dtype = torch.float32 if wide and first.dtype != torch.float64 else first.dtype
    if memory is not None:
        size = len(first) * columns * dtype.itemsize
        out = memory[:size].view(dtype).view(len(first), columns)
    else:
        out = first.new_empty((len(first), columns), dtype=dtype)
    if out.dtype != first.dtype and not first.is_cuda:  # the interpreter: as a GPU would have them
        inputs, weights = [x.float() for x in inputs], [w.float() for w in weights]
    for number, (x, w) in enumerate(zip(inputs, weights, strict=True)):
        product_(out, x, w.T, add=number > 0)
    return out if source.bias is None else out.add_(source.bias[:columns])


def product_(out: Tensor, a: Tensor, b: Tensor, *, add: bool) -> None:
    """out [+]= a @ b, accumulated in out's dtype, which may be wider than the factors'."""
    rows, width = a.shape
    if out.dtype == a.dtype:
        wide = width >= SLAB_WIDTH and 32 <= rows <= 2048 and b.shape[1] >= SLAB_WIDTH
        wide = wide and b.stride(0) == 1  # a weight's transpose
        if wide and not add and out.dtype == torch.float32 and out.device.type == "cpu":
            _transposed_product_(out, a, b)
        else:
            torch.addmm(out, a, b, out=out) if add else torch.mm(a, b, out=out)
    elif a.is_cuda and has_out_dtype():
        kind = {"out_dtype": torch.float32, "out": out}
        torch.addmm(out, a, b, **kind) if add else torch.mm(a, b, **kind)  # type: ignore[call-overload]
    else:  # a slab of rows at a time: the product in the narrow dtype stays small
        slab = max(1, (32 << 20) // max(1, b.shape[1] * a.dtype.itemsize))
        for start in range(0, rows, slab):
            product, here = a[start : start + slab] @ b, out[start : start + slab]
            here.add_(product) if add else here.copy_(product)


def _transposed_product_(out: Tensor, a: Tensor, b: Tensor) -> None:
    """out [R, V] = a [R, H] @ b [H, V], the transpose of a wide weight.

    float32 BLAS packs a wide transposed weight slowly: taken as b.T @ a.T, slab by slab, and
    transposed while the slab is in cache, the same product took 0.5 to 0.9 of the time.
    """
    slab = SLAB_ELEMENTS // len(a)
    product = out.new_empty((slab, len(a)))
    for start in range(0, b.shape[1], slab):
        weight = b.T[start : start + slab]
        torch.mm(weight, a.T, out=product[: len(weight)])
        out[:, start : start + slab].copy_(product[: len(weight)].T)


@functools.cache
def has_out_dtype() -> bool:
    """Whether this torch's matmuls write float32 of narrower factors on a GPU."""
    return "dtype" in torch.ops.aten.addmm.overloads() and torch.version.hip is None
