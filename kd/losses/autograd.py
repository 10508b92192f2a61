"""Autograd around a backend's losses and gradients.

A reduced loss computes its gradients in forward, where the logits are at hand, and backward only
scales them. An unreduced one returns per-token losses and recomputes in backward, because the
upstream gradient of each token is known only then.
"""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from kd.losses.torch_backend import Gradients, Needs, Problem, Projection, run


def _rebuild(problem: Problem, tensors: tuple[Tensor | None, ...]) -> Problem:
    """The problem over detached tensors, in the order of ``leaves``."""
    if isinstance(problem.student, Tensor):
        assert tensors[0] is not None
        return dataclasses.replace(problem, student=tensors[0])
    *flat, bias = tensors
    pairs: Any = tuple(zip(flat[0::2], flat[1::2], strict=True))
    return dataclasses.replace(
        problem, student=dataclasses.replace(problem.student, pairs=pairs, bias=bias)
    )


def leaves(student: Tensor | Projection) -> tuple[Tensor | None, ...]:
    """The tensors that may want gradients: logits, or each pair's input and weight, then bias."""
    if isinstance(student, Tensor):
        return (student,)
    return (*(t for pair in student.pairs for t in pair), student.bias)


def _in_order(grads: Gradients, student: Tensor | Projection) -> list[Tensor | None]:
    if isinstance(student, Tensor):
        return [grads.logits]
    pairs = zip(grads.inputs, grads.weights, strict=True)
    return [*(g for pair in pairs for g in pair), grads.bias]


def _keeps_graph() -> bool:
    """Whether this backward may be followed by another over the same graph."""
    keep = getattr(torch._C._autograd, "_get_current_graph_task_keep_graph", None)
    return True if keep is None else bool(keep())


class _Refusing(torch.autograd.Function):
    """A gradient that cannot be differentiated; ``anchor`` is there to require a gradient."""

    @staticmethod
    def forward(ctx: Any, gradient: Tensor, anchor: Tensor) -> Tensor:
        return gradient.view_as(gradient)

    @staticmethod
    def backward(ctx: Any, upstream: Tensor) -> Any:
        raise RuntimeError(
            "distillation_loss: can be differentiated once, got a second derivative. Use "
            "backend='reference', whose graph autograd made."
        )


def once_differentiable(backward: Callable[..., Any]) -> Callable[..., Any]:
    """A backward without gradient, whose results refuse to be differentiated.

    torch.autograd.function.once_differentiable returns constants where the upstream gradient is
    one, as below a loss: a gradient penalty would silently be left out.
    """

    @functools.wraps(backward)
    def wrapper(ctx: Any, *upstream: Tensor) -> Any:
        if not torch.is_grad_enabled() or torch.compiler.is_compiling():
            return backward(ctx, *upstream)
        with torch.no_grad():
            found = backward(ctx, *upstream)
        anchor = torch.zeros((), requires_grad=True)
        return tuple(None if g is None else _Refusing.apply(g, anchor) for g in found)

    return wrapper


class ReducedLoss(torch.autograd.Function):
    """sum(weight * row loss), its gradients computed in forward."""

    @staticmethod
    def forward(ctx: Any, problem: Problem, weight: Tensor, *tensors: Tensor | None) -> Tensor:
        problem = _rebuild(problem, tuple(None if t is None else t.detach() for t in tensors))
        needed = ctx.needs_input_grad[2:]
        losses, grads = run(problem, weight, Needs.of(problem.student, needed))
        if any(needed):
            ordered = _in_order(grads, problem.student)
            ctx.gradients = [g if n else None for g, n in zip(ordered, needed, strict=True)]
            ctx.dtypes = [None if t is None else t.dtype for t in tensors]
        return torch.dot(losses, weight.to(losses.dtype))

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, upstream: Tensor) -> tuple[Tensor | None, ...]:
        if ctx.gradients is None:
            raise RuntimeError(
                "distillation_loss: backward was called twice over a graph that was not kept. "
                "Pass retain_graph=True to the first call."
            )
        keep = _keeps_graph()
        out: list[Tensor | None] = [None, None]
        for g, dtype in zip(ctx.gradients, ctx.dtypes, strict=True):
            if g is None:
                out.append(None)
                continue
            unit = upstream.device.type == "cpu" and float(upstream) == 1.0
            scaled = g if keep or unit else g.mul_(upstream.to(g.dtype))
            if keep:
                scaled = g * upstream.to(g.dtype)
            out.append(scaled.to(dtype))
            del g, scaled
        if not keep:
            ctx.gradients = None
        return tuple(out)


class TokenLoss(torch.autograd.Function):
    """Row losses [N], recomputed in backward under any upstream gradient."""

    @staticmethod
    def forward(ctx: Any, problem: Problem, *tensors: Tensor | None) -> Tensor:
        ctx.problem = dataclasses.replace(problem, student=_without_tensors(problem.student))
        ctx.save_for_backward(*tensors)
        problem = _rebuild(problem, tuple(None if t is None else t.detach() for t in tensors))
        first = next(t for t in tensors if t is not None)
        losses, _ = run(problem, first.new_ones(len(first), dtype=torch.float32), None)
        return losses

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, upstream: Tensor) -> tuple[Tensor | None, ...]:
        tensors = ctx.saved_tensors
        if isinstance(ctx.problem.student, Projection):
            blank = tensors[:-1]
            pairs = tuple(zip(blank[0::2], blank[1::2], strict=True))
            student: Any = dataclasses.replace(ctx.problem.student, pairs=pairs)
        else:
            student = tensors[0]
        # Rows without an upstream gradient do not count: 0 * inf would poison the others.
        rows, counts = ctx.problem.rows, upstream != 0
        rows = counts.nonzero().squeeze(1) if rows is None else rows[counts[rows]]
        rows = None if len(rows) == len(counts) else rows
        problem = dataclasses.replace(ctx.problem, student=student, rows=rows)
        problem = _rebuild(problem, tuple(None if t is None else t.detach() for t in tensors))
        needed = ctx.needs_input_grad[1:]
        _, grads = run(problem, upstream, Needs.of(problem.student, needed))
        ordered = _in_order(grads, problem.student)
        return (
            None,
            *(
                g.to(t.dtype) if n and g is not None and t is not None else None
                for g, n, t in zip(ordered, needed, tensors, strict=True)
            ),
        )


def _without_tensors(student: Tensor | Projection) -> Any:
    """The student's options without its tensors, which autograd saves itself."""
    if isinstance(student, Tensor):
        return None
    return dataclasses.replace(student, pairs=(), bias=None)
