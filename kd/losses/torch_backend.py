"""The pure-torch backend: chunked, in place, each matmul once, on any device.

A chunk of tokens at a time: student and teacher logits by matmul, loss and gradient in cache-sized
row blocks that overwrite the student's logits, then dH and dW by two matmuls. No [N, V] tensor
exists, and the work is 6*N*V*Hs + 2*N*V*Ht FLOPs, the floor (a recompute design spends 8 and 4).
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable

import numpy as np
import torch
from torch import Tensor

from kd.losses import chunks, threads
from kd.losses.chunks import even
from kd.losses.inputs import Hidden, TopK
from kd.losses.rows import (
    Objective,
    SparseRows,
    canonical_sparse,
    dense_forward_kl,
    rows_loss_,
)

TEACHER_BYTES = 80 << 20
"""Logits of a teacher given as hidden states beside a student given as logits."""

HUGE_BYTES = 8 << 20
"""Size from which CPU memory is asked for in huge pages."""

SLAB_ELEMENTS = 1 << 18
"""Logits of one slab of the vocabulary, where a projection is made slab by slab."""

SLAB_WIDTH = 512
"""Hidden width from which a projection is made slab by slab."""

BLOCK_ELEMENTS = 1 << 19
"""Elements of one row block per thread: student and teacher rows stay in the cache."""


@dataclasses.dataclass(frozen=True)
class Projection:
    """Student logits as a sum of matmuls: hidden @ weight.T [+ low @ lora_b.T] + bias."""

    pairs: tuple[tuple[Tensor, Tensor], ...]  # ([N, H_i], [V, H_i])
    bias: Tensor | None
    logit_scale: float | None
    softcap: float | None


@dataclasses.dataclass(frozen=True)
class Problem:
    """One loss: what is compared and how rows count. Tensors are flat over tokens."""

    student: Tensor | Projection  # [N, V] logits or a projection
    teacher: Tensor | Hidden | TopK | None
    labels: Tensor | None  # [N], ignored rows already left out of `rows`
    rows: Tensor | None  # [M] indices of the rows that count; None is all
    objective: Objective
    overwrite: bool = False  # logits only: the gradient replaces the student's logits


@dataclasses.dataclass
class Gradients:
    """d loss / d student, shaped as the student; None where it is not needed."""

    logits: Tensor | None = None
    inputs: list[Tensor | None] = dataclasses.field(default_factory=list)  # per pair [N, H_i]
    weights: list[Tensor | None] = dataclasses.field(default_factory=list)  # per pair [V, H_i]
    bias: Tensor | None = None


@dataclasses.dataclass(frozen=True)
class Needs:
    """Which tensors of the student want gradients; of a projection, pair by pair."""

    inputs: tuple[bool, ...]
    weights: tuple[bool, ...] = ()
    bias: bool = False

    @classmethod
    def of(cls, student: Tensor | Projection, needed: tuple[bool, ...]) -> Needs | None:
        """From what autograd needs of ``kd.losses.autograd.leaves``; None where it is nothing."""
        if not any(needed):
            return None
        if isinstance(student, Tensor):
            return cls((needed[0],))
        return cls(tuple(needed[0:-1:2]), tuple(needed[1:-1:2]), needed[-1])


def compute_dtype(dtype: torch.dtype) -> torch.dtype:
    """float64 stays; everything narrower is computed in float32."""
    return torch.float64 if dtype == torch.float64 else torch.float32


def run(problem: Problem, weight: Tensor, needs: Needs | None) -> tuple[Tensor, Gradients]:
    """Row losses [N], unweighted, and the gradient of sum(weight * losses).

    weight [N]. needs: the tensors that want gradients; None computes losses only. Rows that do
    not count give zero.
    """
    if isinstance(problem.student, Tensor):
        return _run_logits(problem, problem.student, weight, needs is not None)
    return _run_projection(problem, problem.student, weight, needs)


def _empty(shape: tuple[int, ...] | torch.Size, dtype: torch.dtype, device: torch.device) -> Tensor:
    """Uninitialised memory. Large CPU tensors come from numpy, which asks for huge pages: the
    first touch of fresh memory is then a fraction of the page faults of ``torch.empty``, which
    cost as much as the whole of a row's arithmetic."""
    size = math.prod(shape)
    if device.type != "cpu" or size * dtype.itemsize < HUGE_BYTES:
        return torch.empty(shape, dtype=dtype, device=device)
    memory = torch.from_numpy(np.empty(size * dtype.itemsize, dtype=np.uint8))
    return memory.view(dtype).view(shape)


def block_rows(vocab: int, device: torch.device) -> int:
    """Rows of a block: of one thread's, or of what all of PyTorch's threads share."""
    sharing = (
        64 if device.type != "cpu" else 1 if threads.count(device) > 1 else torch.get_num_threads()
    )
    return max(1, BLOCK_ELEMENTS * sharing // max(1, vocab))


def _take(tensor: Tensor, rows: Tensor | None, start: int, stop: int) -> Tensor:
    """Rows start..stop of those that count: a view where all count."""
    return tensor[start:stop] if rows is None else tensor.index_select(0, rows[start:stop])


class _TeacherRows:
    """The teacher's rows, a block at a time, in memory that may be overwritten."""

    def __init__(self, problem: Problem, count: int, dtype: torch.dtype, device: torch.device):
        self.problem, self.count, self.dtype = problem, count, dtype
        self.vocab = problem.objective.vocab_size
        self.source = problem.teacher if problem.objective.kd_weight != 0 else None
        self.block_rows = block_rows(self.vocab, device)
        self.first = self.last = 0  # rows that `ready` holds
        self.ready: Tensor | SparseRows | None = None
        self.memory: Tensor | None = None  # bytes that hold a sub-chunk's logits

    def prepare(self, start: int, stop: int) -> int:
        """Make rows from ``start`` ready, as far as ``stop``; returns where they end."""
        if self.source is None or isinstance(self.source, Tensor):
            return stop
        if start < self.last:
            return min(stop, self.last)
        self.first = start
        if isinstance(self.source, TopK):
            rows = self.problem.rows
            index = slice(start, stop) if rows is None else rows[start:stop]
            self.ready = canonical_sparse(self.source, index, self.problem.objective, self.dtype)
            self.last = stop
        else:
            self.ready, self.last = self._project(self.source, start, stop)
        return self.last

    def _project(self, teacher: Hidden, start: int, stop: int) -> tuple[Tensor, int]:
        row_bytes, weight = self.row_bytes(), teacher.weight
        if self.memory is None:
            size = even(stop - start, TEACHER_BYTES // row_bytes)
            self.memory = _empty((size * row_bytes,), torch.uint8, weight.device)
        size = even(stop - start, self.memory.numel() // row_bytes)
        logits = self.memory[: size * row_bytes].view(weight.dtype).view(size, self.vocab)
        stop = min(stop, start + size)
        hidden = _take(teacher.hidden, self.problem.rows, start, stop)
        return _teacher_logits(teacher, hidden, logits[: stop - start]), stop

    def row_bytes(self) -> int:
        """Bytes of a row of logits where the teacher is projected, or 0."""
        if not isinstance(self.source, Hidden):
            return 0
        return self.vocab * self.source.weight.dtype.itemsize

    def block(self, start: int, stop: int, scratch: list[Tensor]) -> Tensor | SparseRows | None:
        """Rows start..stop, prepared: final logits [R, V] in the compute dtype, or sparse rows.

        scratch: a thread's own, empty at first; holds the block where it has to be copied.
        """
        if self.source is None:
            return None
        if isinstance(self.source, Tensor):
            rows = _take(self.source, self.problem.rows, start, stop)[:, : self.vocab]
        elif isinstance(self.ready, SparseRows):
            return self.ready[start - self.first : stop - self.first]
        else:
            assert self.ready is not None
            rows = self.ready[start - self.first : stop - self.first]
            if rows.dtype == self.dtype:
                return rows
        if not scratch:
            size = min(self.block_rows, self.count)
            scratch.append(rows.new_empty((size, self.vocab), dtype=self.dtype))
        return scratch[0][: stop - start].copy_(rows)


def _teacher_logits(teacher: Hidden, hidden: Tensor, out: Tensor) -> Tensor:
    """Final logits of a teacher's lm_head over the live vocabulary into ``out`` [rows, vocab]."""
    vocab = out.shape[1]
    _logits_into(out, hidden, teacher.weight[:vocab])
    if teacher.bias is not None:
        out += teacher.bias[:vocab]
    if teacher.lora is not None:
        a, b, scaling = teacher.lora
        out.addmm_(hidden @ a.T, b[:vocab].T, alpha=scaling)
    if teacher.logit_scale is not None:
        out *= teacher.logit_scale
    if teacher.softcap is not None:
        out.div_(teacher.softcap).tanh_().mul_(teacher.softcap)
    return out


def _scatter_rows(values: Tensor, rows: Tensor | None, count: int) -> Tensor:
    """[M] values put back at their rows of [count] zeros."""
    if rows is None:
        return values
    return values.new_zeros((count, *values.shape[1:])).index_copy_(0, rows, values)


def _run_logits(
    problem: Problem, logits: Tensor, weight: Tensor, wanted: bool
) -> tuple[Tensor, Gradients]:
    vocab, rows = problem.objective.vocab_size, problem.rows
    count = len(logits) if rows is None else len(rows)
    dtype = compute_dtype(logits.dtype)
    losses = torch.zeros(count, dtype=dtype, device=logits.device)
    gradient = None
    if wanted:
        gradient = logits
        if not problem.overwrite:
            gradient = _empty(logits.shape, logits.dtype, logits.device)
        _zero_outside(gradient, rows, vocab)
    # Where the gradient's rows can hold the arithmetic, no other memory is touched.
    direct = gradient is not None and rows is None and gradient.dtype == dtype
    direct = direct and gradient is not None and gradient[:, :vocab].is_contiguous()
    teacher = _TeacherRows(problem, count, dtype, logits.device)
    step = teacher.block_rows
    in_place = direct and _is_forward_kl_alone(problem, weight, dtype)

    def begin() -> threads.Work:
        scratch = None if direct else logits.new_empty((min(step, count), vocab), dtype=dtype)
        of_teacher: list[Tensor] = []

        def work(first: int, last: int) -> None:
            z = gradient[first:last, :vocab] if scratch is None else scratch[: last - first]  # type: ignore[index]
            if in_place:  # read where it lies: a copy of each side less
                if not of_teacher:
                    of_teacher.append(logits.new_empty((min(step, count), vocab)))
                sides = (logits[first:last, :vocab], problem.teacher[first:last, :vocab])  # type: ignore[index]
                losses[first:last] = dense_forward_kl(*sides, z, of_teacher[0][: last - first])
                return
            if z.data_ptr() != logits[first:last].data_ptr():
                z.copy_(_take(logits, rows, first, last)[:, :vocab])
            losses[first:last] = rows_loss_(
                z,
                teacher.block(first, last, of_teacher),
                None if problem.labels is None else _take(problem.labels, rows, first, last),
                _take(weight, rows, first, last).to(dtype) if wanted else None,
                problem.objective,
            )
            if gradient is None or scratch is None:
                return
            if rows is None:
                gradient[first:last, :vocab].copy_(z)
            else:
                gradient[:, :vocab].index_copy_(0, rows[first:last], z.to(gradient.dtype))

        return work

    start = 0
    while start < count:
        stop = teacher.prepare(start, count)
        threads.spread(start, stop, step, begin, logits.device)
        start = stop
    return _scatter_rows(losses, rows, len(logits)), Gradients(logits=gradient)


def _is_forward_kl_alone(problem: Problem, weight: Tensor, dtype: torch.dtype) -> bool:
    """Whether a CPU's rows, both sides logits of one type, have no other term, factor or weight."""
    aim, teacher = problem.objective, problem.teacher
    if not isinstance(teacher, Tensor) or teacher.device.type != "cpu" or teacher.dtype != dtype:
        return False
    if aim.divergence.name != "forward_kl" or aim.min_logprob is not None:
        return False
    if (aim.temperature, aim.kd_weight) != (1, 1) or aim.ce_weight != 0:
        return False
    return bool((weight == 1).all())


def _zero_outside(gradient: Tensor, rows: Tensor | None, vocab: int) -> None:
    """Zero the padded columns and the masked rows."""
    gradient[:, vocab:] = 0
    if rows is not None:
        masked = torch.ones(len(gradient), dtype=torch.bool, device=gradient.device)
        masked[rows] = False
        gradient[masked] = 0


def _run_projection(
    problem: Problem,
    student: Projection,
    weight: Tensor,
    needs: Needs | None,
) -> tuple[Tensor, Gradients]:
    vocab, rows = problem.objective.vocab_size, problem.rows
    first_input = student.pairs[0][0]
    total, narrow = len(first_input), first_input.dtype
    count = total if rows is None else len(rows)
    dtype = compute_dtype(narrow)
    losses = torch.zeros(count, dtype=dtype, device=first_input.device)
    teacher = _TeacherRows(problem, count, dtype, first_input.device)
    plan, wide = _plan(student, needs, narrow, count, vocab, teacher.row_bytes())
    # Half precision's sum over rows in units (kd.losses.autograd) would overflow.
    wide = wide or narrow == torch.float16
    grads = room(student, rows, needs, dtype if wide else narrow)
    memory = _empty((plan.bytes,), torch.uint8, first_input.device)
    step = teacher.block_rows
    start = 0
    while start < count:
        stop = min(start + (plan.later if start else plan.first), count)
        buffer, teacher.memory = plan.split(memory, stop - start)
        if plan.borrows and start == 0:
            teacher.memory = next(w for w in grads.weights if w is not None).view(-1)
            teacher.memory = teacher.memory.view(torch.uint8)
        inputs = [_take(x, rows, start, stop) for x, _ in student.pairs]
        logits = _project(student, inputs, buffer.view(narrow).view(stop - start, vocab))
        row_weight = _take(weight, rows, start, stop).to(dtype)
        labels = None if problem.labels is None else _take(problem.labels, rows, start, stop)
        # In full precision the weights go to the matmuls' small sides, saving a pass; in a
        # narrow type that would round twice.
        in_block = row_weight if narrow != dtype and needs is not None else None
        begin = _of_chunk(problem, student, teacher, logits, start, labels, in_block, losses)
        first = start
        while first < stop:
            last = teacher.prepare(first, stop)
            threads.spread(first, last, step, begin, logits.device)
            first = last
        if needs is not None:
            outer = row_weight if narrow == dtype else None
            _accumulate(student, grads, inputs, logits, outer, start, rows)
        start = stop
    return _scatter_rows(losses, rows, total), grads


def _of_chunk(
    problem: Problem,
    student: Projection,
    teacher: _TeacherRows,
    logits: Tensor,
    start: int,
    labels: Tensor | None,
    weight: Tensor | None,
    losses: Tensor,
) -> Callable[[], threads.Work]:
    """Work on blocks of a projection's chunk: raw logits [c, vocab] from row ``start`` on.

    Logits become their gradient. labels and weight: [c], the chunk's.
    """
    dtype = compute_dtype(logits.dtype)

    def begin() -> threads.Work:
        scratch, of_teacher = None, []  # type: ignore[var-annotated]
        if logits.dtype != dtype:
            rows = min(teacher.block_rows, len(logits))
            scratch = logits.new_empty((rows, logits.shape[1]), dtype=dtype)

        def work(first: int, last: int) -> None:
            block = slice(first - start, last - start)
            z = logits[block] if scratch is None else scratch[: last - first].copy_(logits[block])
            losses[first:last] = rows_loss_(
                z,
                teacher.block(first, last, of_teacher),
                None if labels is None else labels[block],
                None if weight is None else weight[block],
                problem.objective,
                logit_scale=student.logit_scale,
                softcap=student.softcap,
            )
            if weight is not None:
                logits[block].copy_(z)

        return work

    return begin


def _plan(
    student: Projection,
    needs: Needs | None,
    narrow: torch.dtype,
    count: int,
    vocab: int,
    teacher_row_bytes: int,
) -> tuple[chunks.Plan, bool]:
    """The cut into chunks, and whether dW is summed over several, so in the compute dtype."""
    wanted = () if needs is None else needs.weights
    heads = [w.numel() for (_, w), wants in zip(student.pairs, wanted, strict=False) if wants]
    spare, row_bytes = heads[0] if heads else 0, vocab * narrow.itemsize
    plan = chunks.Plan.of(count, row_bytes, teacher_row_bytes, spare * narrow.itemsize)
    if plan.first >= count or not heads:
        return plan, plan.first < count
    wide = spare * compute_dtype(narrow).itemsize
    return chunks.Plan.of(count, row_bytes, teacher_row_bytes, wide), True


def _project(student: Projection, inputs: list[Tensor], out: Tensor) -> Tensor:
    """Raw student logits of a chunk into ``out`` [c, vocab]."""
    vocab = out.shape[1]
    _logits_into(out, inputs[0], student.pairs[0][1][:vocab])
    for x, (_, w) in zip(inputs[1:], student.pairs[1:], strict=True):
        out.addmm_(x, w[:vocab].T)
    if student.bias is not None:
        out += student.bias[:vocab]
    return out


def _logits_into(out: Tensor, hidden: Tensor, weight: Tensor) -> None:
    """out [R, V] = hidden [R, H] @ weight [V, H].T

    float32 BLAS packs a wide transposed weight slowly: taken as weight @ hidden.T, slab by slab,
    and transposed while the slab is in cache, the same product took 0.5 to 0.9 of the time.
    """
    rows, width = hidden.shape
    wide = width >= SLAB_WIDTH and 32 <= rows <= 2048 and len(weight) >= SLAB_WIDTH
    if not (wide and out.dtype == torch.float32 and out.device.type == "cpu"):
        torch.mm(hidden, weight.T, out=out)
        return
    slab = SLAB_ELEMENTS // rows
    product = out.new_empty((slab, rows))
    for start in range(0, len(weight), slab):
        part = weight[start : start + slab]
        torch.mm(part, hidden.T, out=product[: len(part)])
        out[:, start : start + slab].copy_(product[: len(part)].T)


def room(
    student: Projection, rows: Tensor | None, needs: Needs | None, dtype: torch.dtype
) -> Gradients:
    """Room for the gradients that are wanted and for no others: a frozen lm_head gets none.

    Those of the weights [V, H] are in ``dtype``, filled by the first chunk.
    """
    count = len(student.pairs)
    needs = needs or Needs((False,) * count, (False,) * count)
    make = torch.empty_like if rows is None else torch.zeros_like
    empty = len(student.pairs[0][0]) == 0 or (rows is not None and len(rows) == 0)
    make_weight = torch.zeros if empty else torch.empty
    grads = Gradients()
    for (x, w), wants_x, wants_w in zip(student.pairs, needs.inputs, needs.weights, strict=True):
        grads.inputs.append(make(x, memory_format=torch.contiguous_format) if wants_x else None)
        grads.weights.append(
            make_weight(w.shape, dtype=dtype, device=w.device) if wants_w else None
        )
    if needs.bias and student.bias is not None:
        wide = compute_dtype(student.bias.dtype)
        grads.bias = torch.zeros(student.bias.shape, dtype=wide, device=student.bias.device)
    return grads


def _accumulate(
    student: Projection,
    grads: Gradients,
    inputs: list[Tensor],
    dlogits: Tensor,
    row_weight: Tensor | None,
    start: int,
    rows: Tensor | None,
) -> None:
    """dX, dW and db of one chunk from d loss / d raw logits [c, vocab], rows still unweighted."""
    stop, vocab = start + len(dlogits), dlogits.shape[1]
    column = None if row_weight is None else row_weight.unsqueeze(1)
    for x, (_, w), dx, dw in zip(inputs, student.pairs, grads.inputs, grads.weights, strict=True):
        if dx is not None:
            part = dx[start:stop] if rows is None else torch.empty_like(x)
            torch.mm(dlogits, w[:vocab], out=part)
            if column is not None:
                part.mul_(column)
            if rows is not None:
                dx.index_copy_(0, rows[start:stop], part)
        if dw is not None:
            if start == 0:
                dw[vocab:] = 0
            weighted = x if column is None else x * column
            _mm_into(dw[:vocab], dlogits.T, weighted, add=start > 0)
    if grads.bias is not None:
        if row_weight is None:
            grads.bias[:vocab] += dlogits.sum(0, dtype=grads.bias.dtype)
        else:
            grads.bias[:vocab].addmv_(dlogits.T, row_weight)


def _mm_into(out: Tensor, a: Tensor, b: Tensor, *, add: bool) -> None:
    """out [+]= a @ b with float32 accumulation in ``out`` for narrower a and b."""
    if out.dtype == a.dtype:
        torch.addmm(out, a, b, out=out) if add else torch.mm(a, b, out=out)
        return
    # A slab of rows at a time: the product in the narrow dtype stays small.
    slab = max(1, (32 << 20) // max(1, b.shape[1] * a.dtype.itemsize))
    for v in range(0, out.shape[0], slab):
        part = a[v : v + slab] @ b
        out[v : v + slab].add_(part) if add else out[v : v + slab].copy_(part)
