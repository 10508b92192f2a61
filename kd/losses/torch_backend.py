"""The pure-torch backend: chunked, in place, each matmul once, on any device.

A chunk of tokens at a time: student and teacher logits by matmul, loss and gradient in cache-sized
row blocks that overwrite the student's logits, then dH and dW by two matmuls. No [N, V] tensor
exists, and the work is 6*N*V*Hs + 2*N*V*Ht FLOPs, the floor (a recompute design spends 8 and 4).
"""

from __future__ import annotations

import dataclasses

import torch
from torch import Tensor

from kd.losses.inputs import Hidden, TopK
from kd.losses.rows import Objective, SparseRows, canonical_sparse, rows_loss_

CHUNK_BYTES = 256 << 20
"""Logit memory of one chunk, student and teacher together."""

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


def compute_dtype(dtype: torch.dtype) -> torch.dtype:
    """float64 stays; everything narrower is computed in float32."""
    return torch.float64 if dtype == torch.float64 else torch.float32


def run(
    problem: Problem, weight: Tensor, needs: tuple[bool, bool, bool] | None
) -> tuple[Tensor, Gradients]:
    """Row losses [N], unweighted, and the gradient of sum(weight * losses).

    weight [N]. needs: whether the inputs, the weights and the bias want gradients (for a logits
    student the first alone counts); None computes losses only. Rows that do not count give zero.
    """
    if isinstance(problem.student, Tensor):
        return _run_logits(problem, problem.student, weight, needs is not None and needs[0])
    return _run_projection(problem, problem.student, weight, needs)


def _row_blocks(rows: int, vocab: int, device: torch.device) -> range:
    threads = torch.get_num_threads() if device.type == "cpu" else 64
    return range(0, rows, max(1, BLOCK_ELEMENTS * threads // vocab))


def _take(tensor: Tensor, rows: Tensor | None, start: int, stop: int) -> Tensor:
    """Rows start..stop of those that count: a view where all count."""
    return tensor[start:stop] if rows is None else tensor.index_select(0, rows[start:stop])


def _take_sparse(problem: Problem, teacher: TopK, start: int, stop: int, dtype) -> SparseRows:
    index = slice(start, stop) if problem.rows is None else problem.rows[start:stop]
    return canonical_sparse(teacher, index, problem.objective, dtype)


def _teacher_logits(teacher: Hidden, hidden: Tensor, vocab: int) -> Tensor:
    """Final logits of a teacher's lm_head over the live vocabulary, [rows, vocab]."""
    logits = hidden @ teacher.weight[:vocab].T
    if teacher.bias is not None:
        logits += teacher.bias[:vocab]
    if teacher.lora is not None:
        a, b, scaling = teacher.lora
        logits.addmm_(hidden @ a.T, b[:vocab].T, alpha=scaling)
    if teacher.logit_scale is not None:
        logits *= teacher.logit_scale
    if teacher.softcap is not None:
        logits.div_(teacher.softcap).tanh_().mul_(teacher.softcap)
    return logits


def _scratch(block: Tensor, dtype: torch.dtype, owned: bool) -> Tensor:
    """The block in the compute dtype, safe to overwrite and contiguous."""
    if block.dtype != dtype:
        return block.to(dtype)
    return (
        block
        if owned and block.is_contiguous()
        else block.clone(memory_format=torch.contiguous_format)
    )


def _chunk_loss_(
    problem: Problem,
    student: Tensor,
    owned: bool,
    teacher: Tensor | SparseRows | None,
    teacher_owned: bool,
    weight: Tensor,
    labels: Tensor | None,
    gradient: Tensor | None,
    losses: Tensor,
) -> None:
    """Losses of a chunk's rows [c] into ``losses``; their gradient into ``gradient`` [c, V]."""
    dtype = compute_dtype(student.dtype)
    scale = softcap = None
    if isinstance(problem.student, Projection):
        scale, softcap = problem.student.logit_scale, problem.student.softcap
    blocks = _row_blocks(len(student), problem.objective.vocab_size, student.device)
    for start in blocks:
        block = slice(start, min(start + blocks.step, len(student)))
        z = _scratch(student[block], dtype, owned)
        t: Tensor | SparseRows | None
        if isinstance(teacher, Tensor):
            t = _scratch(teacher[block], dtype, teacher_owned)
        else:
            t = None if teacher is None else teacher[block]
        losses[block] = rows_loss_(
            z,
            t,
            None if labels is None else labels[block],
            weight[block],
            problem.objective,
            logit_scale=scale,
            softcap=softcap,
        )
        if gradient is not None and (
            z.data_ptr() != gradient[block].data_ptr() or z.dtype != gradient.dtype
        ):
            gradient[block].copy_(z)


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
        gradient = (
            logits
            if problem.overwrite
            else torch.empty_like(logits, memory_format=torch.contiguous_format)
        )
        _zero_outside(gradient, rows, vocab)
    teacher = problem.teacher
    for start in _chunks(count, vocab, 2 * dtype.itemsize):
        stop = min(start + _chunks(count, vocab, 2 * dtype.itemsize).step, count)
        z = _take(logits, rows, start, stop)[:, :vocab]
        t, owned = _teacher_chunk(problem, teacher, start, stop, vocab, dtype)
        out = None
        if gradient is not None:
            out = gradient[start:stop, :vocab] if rows is None else torch.empty_like(z)
        _chunk_loss_(
            problem,
            z,
            rows is not None or (problem.overwrite and wanted),
            t,
            owned,
            _take(weight, rows, start, stop).to(dtype),
            None if problem.labels is None else _take(problem.labels, rows, start, stop),
            out,
            losses[start:stop],
        )
        if gradient is not None and rows is not None and out is not None:
            gradient[:, :vocab].index_copy_(0, rows[start:stop], out)
    return _scatter_rows(losses, rows, len(logits)), Gradients(logits=gradient)


def _zero_outside(gradient: Tensor, rows: Tensor | None, vocab: int) -> None:
    """Zero the padded columns now; masked rows too, unless their logits are still to be read."""
    gradient[:, vocab:] = 0
    if rows is not None:
        masked = torch.ones(len(gradient), dtype=torch.bool, device=gradient.device)
        masked[rows] = False
        gradient[masked] = 0


def _chunks(count: int, vocab: int, bytes_per_element: int) -> range:
    size = max(1, CHUNK_BYTES // max(1, vocab * bytes_per_element))
    if count > size:  # even chunks: a short last one wastes its matmuls
        size = -(-count // -(-count // size))
    return range(0, count, max(1, min(size, max(count, 1))))


def _teacher_chunk(
    problem: Problem, teacher, start: int, stop: int, vocab: int, dtype: torch.dtype
) -> tuple[Tensor | SparseRows | None, bool]:
    """The teacher's rows of a chunk, and whether they may be overwritten."""
    if teacher is None or problem.objective.kd_weight == 0:
        return None, False
    if isinstance(teacher, TopK):
        return _take_sparse(problem, teacher, start, stop, dtype), True
    if isinstance(teacher, Hidden):
        hidden = _take(teacher.hidden, problem.rows, start, stop)
        return _teacher_logits(teacher, hidden, vocab), True
    return _take(teacher, problem.rows, start, stop)[:, :vocab], problem.rows is not None


def _run_projection(
    problem: Problem,
    student: Projection,
    weight: Tensor,
    needs: tuple[bool, bool, bool] | None,
) -> tuple[Tensor, Gradients]:
    vocab, rows = problem.objective.vocab_size, problem.rows
    first = student.pairs[0][0]
    total = len(first)
    count = total if rows is None else len(rows)
    dtype = compute_dtype(first.dtype)
    losses = torch.zeros(count, dtype=dtype, device=first.device)
    wants_x, wants_w, wants_b = needs or (False, False, False)
    grads = _allocate(student, rows, (wants_x, wants_w, wants_b), dtype)
    element_bytes = first.dtype.itemsize
    if isinstance(problem.teacher, Hidden):
        element_bytes += problem.teacher.weight.dtype.itemsize
    chunks = _chunks(count, vocab, element_bytes)
    for start in chunks:
        stop = min(start + chunks.step, count)
        inputs = [_take(x, rows, start, stop) for x, _ in student.pairs]
        logits = _project(student, inputs, vocab)
        t, owned = _teacher_chunk(problem, problem.teacher, start, stop, vocab, dtype)
        _chunk_loss_(
            problem,
            logits,
            True,
            t,
            owned,
            _take(weight, rows, start, stop).to(dtype),
            None if problem.labels is None else _take(problem.labels, rows, start, stop),
            logits if needs is not None else None,
            losses[start:stop],
        )
        del t
        if needs is not None:
            _accumulate(student, grads, inputs, logits, start, stop, rows, vocab)
        del logits
    if count == 0:
        grads.weights = [
            None if g is None else torch.zeros(w.shape, dtype=g.dtype, device=w.device)
            for g, (_, w) in zip(grads.weights, student.pairs, strict=True)
        ]
    return _scatter_rows(losses, rows, total), grads


def _project(student: Projection, inputs: list[Tensor], vocab: int) -> Tensor:
    """Raw student logits [c, vocab] of a chunk."""
    logits = inputs[0] @ student.pairs[0][1][:vocab].T
    for x, (_, w) in zip(inputs[1:], student.pairs[1:], strict=True):
        logits.addmm_(x, w[:vocab].T)
    if student.bias is not None:
        logits += student.bias[:vocab]
    return logits


def _allocate(
    student: Projection, rows: Tensor | None, needs: tuple[bool, bool, bool], dtype: torch.dtype
) -> Gradients:
    wants_x, wants_w, wants_b = needs
    make = torch.empty_like if rows is None else torch.zeros_like
    grads = Gradients()
    for x, w in student.pairs:
        grads.inputs.append(make(x, memory_format=torch.contiguous_format) if wants_x else None)
        grads.weights.append(None if not wants_w else torch.empty(0, dtype=dtype, device=w.device))
    if wants_b and student.bias is not None:
        grads.bias = torch.zeros(student.bias.shape, dtype=dtype, device=student.bias.device)
    return grads


def _accumulate(
    student: Projection,
    grads: Gradients,
    inputs: list[Tensor],
    dlogits: Tensor,
    start: int,
    stop: int,
    rows: Tensor | None,
    vocab: int,
) -> None:
    """dX, dW and db of one chunk from d loss / d raw logits [c, vocab]."""
    for i, (x, (full, w)) in enumerate(zip(inputs, student.pairs, strict=True)):
        if (dx := grads.inputs[i]) is not None:
            if rows is None:
                torch.mm(dlogits, w[:vocab], out=dx[start:stop])
            else:
                dx.index_copy_(0, rows[start:stop], dlogits @ w[:vocab])
        if (dw := grads.weights[i]) is not None:
            if dw.numel() == 0:  # the first chunk writes, the others add
                dw = torch.empty(w.shape, dtype=dw.dtype, device=w.device)
                dw[vocab:] = 0
                grads.weights[i] = dw
                _mm_into(dw[:vocab], dlogits.T, x, add=False)
            else:
                _mm_into(dw[:vocab], dlogits.T, x, add=True)
        del full
    if grads.bias is not None:
        grads.bias[:vocab] += dlogits.sum(0, dtype=grads.bias.dtype)


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
