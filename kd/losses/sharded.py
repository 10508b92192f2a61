"""The losses of vocabulary shards, a chunk of rows at a time, under autograd.

A reduced loss makes its gradients in forward; an unreduced one makes the logits again in backward
and keeps what crossed ranks, so that its backward needs no collective but the hidden states' own.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from kd.losses import chunks, shards, triton_backend
from kd.losses.autograd import (
    detached,
    given_back,
    in_order,
    in_units,
    is_half,
    leaves,
    once_differentiable,
    put_back,
    scaled,
    take_out,
)
from kd.losses.exchange import Known, Sharded, solve, tile_gradient_
from kd.losses.inputs import Hidden, TopK
from kd.losses.rows import SparseRows, canonical_sparse
from kd.losses.shards import Tile
from kd.losses.torch_backend import (
    Gradients,
    Needs,
    Projection,
    _scatter_rows,
    _take,
    compute_dtype,
    room,
)


def run(
    sharded: Sharded,
    coefficient: Tensor | None,
    needs: Needs | None,
    known: list[Known] | None = None,
) -> tuple[Tensor, Gradients, list[Known]]:
    """Row losses [N], the gradient of sum(coefficient * losses), and what a backward needs.

    known: of a forward over the same rows; nothing but hidden gradients then crosses ranks.
    """
    student = sharded.problem.student
    first = student if isinstance(student, Tensor) else student.pairs[0][0]
    rows = None
    if isinstance(student, Projection):
        rows = sharded.weight.nonzero().squeeze(1)  # the one host sync
        rows = None if len(rows) == len(first) else rows
    count = len(first) if rows is None else len(rows)
    size = _chunk(sharded, count, first)
    grads, live = _room(sharded, rows, needs, size < count), sharded.shard.live
    found: list[Known] = []
    for start in range(0, count, size):
        stop = min(start + size, count)
        if isinstance(student, Tensor):
            inputs, logits = [], student[start:stop, :live]
        else:
            inputs = [_take(x, rows, start, stop) for x, _ in student.pairs]
            logits = _logits(student, inputs, live)
        tile, sparse, label = _tile(sharded, logits, rows, start, stop)
        found.append(known[len(found)] if known else solve(tile, sparse, sharded, label))
        if needs is None or coefficient is None:
            continue
        weight, hard = _take(coefficient, rows, start, stop), label is not None
        dlogits = grads.logits[start:stop] if grads.logits is not None else None
        if dlogits is None:
            narrow = logits.dtype != first.dtype
            dlogits = torch.empty_like(logits, dtype=first.dtype) if narrow else logits
        tile_gradient_(dlogits, tile, found[-1], weight, sharded.backend, hard)
        if isinstance(student, Projection):
            triton_backend._accumulate(student, grads, inputs, dlogits, start, rows)
    if sharded.reduce_hidden:
        for gradient in grads.inputs:
            if gradient is not None:
                sharded.shard.all_reduce(gradient)
    dtype = compute_dtype(first.dtype)
    losses = torch.cat([first.new_zeros(0, dtype=dtype), *(k.losses.to(dtype) for k in found)])
    return _scatter_rows(losses, rows, len(first)), grads, found


def _chunk(sharded: Sharded, count: int, like: Tensor) -> int:
    """Rows of a chunk: the same on every rank, so of the largest shard."""
    width = -(-sharded.problem.objective.vocab_size // sharded.shard.ranks)
    if isinstance(sharded.problem.student, Tensor) and isinstance(sharded.problem.teacher, Tensor):
        return max(1, count)
    if sharded.backend is shards:
        return chunks.even(count, chunks.BUDGET // (2 * width * like.dtype.itemsize))
    from kd_kernels.linear import chunk_tokens

    return max(1, chunk_tokens(count, width * 10, like.device))


def _room(sharded: Sharded, rows: Tensor | None, needs: Needs | None, chunked: bool) -> Gradients:
    student = sharded.problem.student
    if needs is None:
        return Gradients()
    if isinstance(student, Projection):
        narrow = student.pairs[0][0].dtype
        dtype = torch.float32 if chunked or is_half(student) else narrow
        wide = compute_dtype(narrow)
        return room(student, rows, needs, wide if wide == torch.float64 else dtype)
    return Gradients(logits=torch.empty_like(student))


def _logits(source: Projection | Hidden, inputs: list[Tensor], live: int) -> Tensor:
    """Raw logits [c, live] of a chunk, in float32 where the backend can have them."""
    from_pairs: Any = source.pairs if isinstance(source, Projection) else None
    if from_pairs is None:
        assert isinstance(source, Hidden)
        from_pairs = [(None, source.weight)]
        if source.lora is not None:
            a, b, scaling = source.lora
            inputs, from_pairs = [*inputs, scaling * (inputs[0] @ a.T)], [*from_pairs, (None, b)]
    pairs = zip(inputs, (w for _, w in from_pairs), strict=True)
    return _project(tuple(pairs), source.bias, live)


def _project(pairs: tuple[tuple[Tensor, Tensor], ...], bias: Tensor | None, live: int) -> Tensor:
    (x, w), *more = pairs
    if x.is_cuda:
        from kd_kernels.linear import project

        return project(pairs, bias, live)
    out = torch.mm(x, w[:live].T)
    for x, w in more:
        out.addmm_(x, w[:live].T)
    return out if bias is None else out.add_(bias[:live])


def _tile(
    sharded: Sharded, logits: Tensor, rows: Tensor | None, start: int, stop: int
) -> tuple[Tile, SparseRows | None, Tensor | None]:
    """(this rank's tile, the sparse teacher's rows, labels that enter the loss)."""
    problem, shard = sharded.problem, sharded.shard
    objective, student = problem.objective, problem.student
    source = problem.teacher if objective.kd_weight != 0 else None
    teacher, sparse, label = None, None, None
    transform: tuple[float | None, float | None] = (None, None)
    if isinstance(source, Tensor):
        teacher = _take(source, rows, start, stop)[:, : shard.live]
    elif isinstance(source, Hidden):
        teacher = _logits(source, [_take(source.hidden, rows, start, stop)], shard.live)
        transform = (source.logit_scale, source.softcap)
    elif isinstance(source, TopK):
        index = slice(start, stop) if rows is None else rows[start:stop]
        sparse = canonical_sparse(source, index, objective, compute_dtype(logits.dtype))
        if source.tail == "uniform":  # log-probs are at the temperature already
            teacher, transform = _spread(sparse, sharded), (objective.temperature, None)
            sparse = None
    if problem.labels is not None and objective.ce_weight != 0:
        label = _take(problem.labels, rows, start, stop).long()
    tile = Tile(
        logits,
        teacher,
        _take(sharded.weight, rows, start, stop),
        None if label is None else shard.columns(label),
        objective,
        (student.logit_scale, student.softcap) if isinstance(student, Projection) else (None, None),
        transform,
    )
    return tile, sparse, label


def _spread(sparse: SparseRows, sharded: Sharded) -> Tensor:
    """This shard's log-probs [R, live] of a teacher whose tail is even over the other tokens."""
    shard, vocab = sharded.shard, sharded.problem.objective.vocab_size
    count = (vocab - (sparse.ids >= 0).sum(-1, keepdim=True)).to(sparse.log_p.dtype)
    fill = sparse.log_tail - count.clamp(min=1).log()
    columns = shard.columns(sparse.ids)
    index = torch.where(columns < 0, shard.live, columns)  # one column past the end takes others'
    dense = fill.expand(-1, shard.live + 1).clone()
    return dense.scatter_(1, index, sparse.log_p)[:, : shard.live]


class ReducedLoss(torch.autograd.Function):
    """scale * sum(weight * row loss), its gradients computed in forward."""

    @staticmethod
    def forward(
        ctx: Any, sharded: Sharded, scale: Tensor | float, *tensors: Tensor | None
    ) -> Tensor:
        sharded = detached(sharded)
        student, needed = sharded.problem.student, ctx.needs_input_grad[2:]
        coefficient, rest = in_units(student, sharded.problem.objective, sharded.weight, scale)
        needs = Needs.of(student, needed)
        losses, grads, _ = run(sharded, coefficient, needs)
        ordered = in_order(grads, student) if needs else [None] * len(tensors)
        ctx.save_for_backward(*(g if n else None for g, n in zip(ordered, needed, strict=True)))
        ctx.dtypes, ctx.rest = [None if t is None else t.dtype for t in tensors], rest
        loss = torch.dot(losses, coefficient.to(losses.dtype))
        return loss if rest is None else loss * rest

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, upstream: Tensor) -> tuple[Tensor | None, ...]:
        factor = upstream if ctx.rest is None else (upstream * ctx.rest).to(upstream.dtype)
        pairs = zip(ctx.saved_tensors, ctx.dtypes, strict=True)
        return (
            None,
            None,
            *(None if g is None else scaled(g, factor, d, reuse=False) for g, d in pairs),
        )


class TokenLoss(torch.autograd.Function):
    """Row losses [N]; the logits are made again in backward, what crossed ranks is kept."""

    @staticmethod
    def forward(ctx: Any, sharded: Sharded, *tensors: Tensor | None) -> Tensor:
        saved: list[Tensor] = []
        ctx.sharded = take_out(sharded, saved)
        ctx.save_for_backward(*saved)
        losses, _, ctx.known = run(put_back(ctx.sharded, saved), None, None)
        return losses

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, upstream: Tensor) -> tuple[Tensor | None, ...]:
        sharded = put_back(ctx.sharded, ctx.saved_tensors)
        problem, needed = sharded.problem, ctx.needs_input_grad[1:]
        weight, rest = in_units(problem.student, problem.objective, upstream, 1.0)
        _, grads, _ = run(sharded, weight, Needs.of(problem.student, needed), ctx.known)
        return None, *given_back(grads, problem.student, needed, rest)


def loss(sharded: Sharded, scale: Tensor | float | None) -> Tensor:
    """Weighted losses [N] where scale is None, else scale * their sum."""
    student = sharded.problem.student
    if scale is None:
        return TokenLoss.apply(sharded, *leaves(student)) * sharded.weight
    if isinstance(student, Tensor) and is_half(student):
        return torch.dot(TokenLoss.apply(sharded, student), sharded.weight) * scale
    return ReducedLoss.apply(sharded, scale, *leaves(student))
