"""Autograd around the driver: a reduced loss and one that is not.

A reduced loss computes its gradients in forward, where the logits are at hand, and backward only
scales them, in float32. An unreduced one returns per-token losses and recomputes in backward,
because the upstream gradient of each token is known only then.

What backward reads again goes through ``save_for_backward``: autograd refuses where it has been
changed, and hooks on saved tensors see it.

Half precision: a gradient times 1 / N lies below what float16 holds, until the loss scale that
arrives in backward. Of float16 logits it is therefore made in backward; of float16 hidden states it
is that of the sum, in units that float16 holds, until backward.
"""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Callable
from typing import Any, TypeVar

import torch
from torch import Tensor

from kd.losses import fused
from kd.losses.problem import Backend, Objective, Problem, Projection

T = TypeVar("T")
BLOCK = 1 << 20
"""Elements of a narrow gradient that are scaled in float32 at a time."""


def reduced(problem: Problem, scale: Tensor | float) -> Tensor:
    """scale * sum(weight * row loss)."""
    student = problem.student
    if isinstance(student, Tensor) and student.dtype == torch.float16:
        return torch.dot(TokenLoss.apply(problem, student), problem.weight) * scale
    return ReducedLoss.apply(problem, scale, *leaves(student))


def per_token(problem: Problem) -> Tensor:
    """weight * row loss, [N]."""
    return TokenLoss.apply(problem, *leaves(problem.student)) * problem.weight


def counted(weight: Tensor) -> Tensor | None:
    """The rows whose weight is not zero, None where that is all; waits for the device."""
    rows = weight.nonzero().squeeze(1)
    return None if len(rows) == len(weight) else rows


def leaves(student: Tensor | Projection) -> tuple[Tensor | None, ...]:
    """The tensors that may want gradients: logits, or each pair's input and weight, then bias."""
    if isinstance(student, Tensor):
        return (student,)
    return (*(t for pair in student.pairs for t in pair), student.bias)


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
    """scale * sum(weight * row loss), its gradients computed in forward."""

    @staticmethod
    def forward(
        ctx: Any, problem: Problem, scale: Tensor | float, *tensors: Tensor | None
    ) -> Tensor:
        needed = ctx.needs_input_grad[2:]
        coefficient, rest = in_units(problem, problem.weight, scale)
        losses, gradients = fused.run(problem, coefficient, needed)
        ctx.dtypes = [None if t is None else t.dtype for t in tensors]
        ctx.rest, ctx.overwritten, ctx.fused = rest, problem.overwrite, problem.backend.fused
        ctx.gradients = None
        if torch.compiler.is_compiling():
            ctx.save_for_backward(*gradients)
        elif any(needed):  # so that backward may scale them in place and let them go
            ctx.gradients = gradients
            ctx.versions = [None if g is None else g._version for g in gradients]
        loss = torch.dot(losses, coefficient)
        return loss if rest is None else loss * rest

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, upstream: Tensor) -> tuple[Tensor | None, ...]:
        gradients = ctx.saved_tensors if ctx.gradients is None else ctx.gradients
        if not gradients:
            raise RuntimeError(
                "distillation_loss: backward was called twice over a graph that was not kept. "
                "Pass retain_graph=True to the first call."
            )
        keep = ctx.gradients is None or keeps_graph()
        if ctx.overwritten and ctx.gradients is not None:
            _check_untouched(gradients, ctx.versions)
        factor = upstream if ctx.rest is None else (upstream * ctx.rest).to(upstream.dtype)
        out: list[Tensor | None] = [None, None]
        for gradient, dtype in zip(gradients, ctx.dtypes, strict=True):
            if gradient is not None:
                gradient = scaled(gradient, factor, dtype, reuse=not keep, kernel=ctx.fused)
            out.append(gradient)
        if not keep:
            ctx.gradients = ()
        return tuple(out)


class TokenLoss(torch.autograd.Function):
    """Row losses [N], zero where they do not count; recomputed in backward under any upstream."""

    @staticmethod
    def forward(ctx: Any, problem: Problem, *tensors: Tensor | None) -> Tensor:
        saved: list[Tensor] = []
        ctx.problem = take_out(problem, saved)
        ctx.save_for_backward(*saved)
        return fused.run(problem, problem.weight)[0]

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, upstream: Tensor) -> tuple[Tensor | None, ...]:
        problem = put_back(ctx.problem, ctx.saved_tensors)
        if problem.overwrite and keeps_graph():
            problem = dataclasses.replace(problem, overwrite=False)
        if isinstance(problem.student, Projection) and not (problem.backend.fused or problem.shard):
            # Rows without an upstream gradient do not count: 0 * inf would poison the others.
            problem = dataclasses.replace(problem, rows=counted(upstream))
        weight, rest = in_units(problem, upstream, 1.0)
        needed = ctx.needs_input_grad[1:]
        _, gradients = fused.run(problem, weight, needed)
        out: list[Tensor | None] = [None]
        for g, tensor in zip(gradients, leaves(problem.student), strict=True):
            if g is not None and tensor is not None:
                g = (g if rest is None else g * rest).to(tensor.dtype)
            out.append(g)
        return tuple(out)


def _check_untouched(gradients: Any, versions: list[int | None]) -> None:
    """The gradient that lies in the student's logits is what forward left there."""
    for gradient, version in zip(gradients, versions, strict=True):
        if gradient is not None and gradient._version != version:
            raise RuntimeError(
                "distillation_loss: student logits given with overwrite_student_logits must be "
                "left alone until backward, which finds the gradient there, got a change in "
                "place. Leave overwrite_student_logits out."
            )


def in_units(
    problem: Problem, weight: Tensor, scale: Tensor | float
) -> tuple[Tensor, Tensor | float | None]:
    """(row coefficients, what is left of ``scale``) of the gradient of the raw logits.

    Their product is weight * scale, and None is one. A float16 projection's gradients come in
    units of 1/32 of the largest that a row's cross-entropy can have: small entries stay normal
    numbers, and a divergence may be a thousand times as steep. Everything else has the exponents
    for the whole scale.
    """
    student, objective = problem.student, problem.objective
    half = isinstance(student, Projection) and student.pairs[0][0].dtype == torch.float16
    if not half or len(weight) == 0:
        scaled = weight * scale
        return scaled if scaled.dtype == weight.dtype else scaled.to(weight.dtype), None
    steepest = max(objective.kd_weight / objective.temperature, objective.ce_weight)
    if student.transform[0] is not None:  # type: ignore[union-attr]
        steepest *= abs(student.transform[0])  # type: ignore[union-attr]
    heaviest = weight.abs().amax()
    unit = torch.where(heaviest == 0, 1.0, heaviest) * ((steepest or 1.0) / 32)
    return weight / unit, unit * scale


def scaled(
    gradient: Tensor, factor: Tensor, dtype: torch.dtype, *, reuse: bool, kernel: bool = False
) -> Tensor:
    """gradient * factor, multiplied in float32 or float64 and cast once.

    factor: one number, float32 or float64, on the gradient's device. reuse: in the gradient's own
    memory. kernel: by a Triton kernel, where it may be in place.
    """
    if torch.compiler.is_compiling():
        return (gradient.to(factor.dtype) * factor).to(dtype)
    if kernel and reuse:
        from kd_kernels.scale import scale_

        return scale_(gradient, factor).to(dtype)
    if not kernel and gradient.device.type == "cpu" and float(factor) == 1.0:
        return gradient.to(dtype, copy=not reuse)
    out = gradient if reuse else torch.empty_like(gradient)
    if gradient.dtype in (torch.float32, torch.float64):
        return torch.mul(gradient, factor.to(gradient.dtype), out=out).to(dtype)
    rows = max(1, BLOCK // max(1, gradient[:1].numel()))
    for start in range(0, len(gradient), rows):
        block = slice(start, start + rows)
        out[block] = gradient[block].to(factor.dtype) * factor
    return out.to(dtype)


def keeps_graph() -> bool:
    """Whether this backward may be followed by another over the same graph."""
    keep = getattr(torch._C._autograd, "_get_current_graph_task_keep_graph", None)
    return True if keep is None else bool(keep())


@dataclasses.dataclass(frozen=True)
class _Place:
    """Where a tensor was, by its number among those taken out."""

    number: int


def take_out(value: T, tensors: list[Tensor]) -> T:
    """``value``, dataclasses and tuples of them, without its tensors, which join ``tensors``."""
    if isinstance(value, Tensor):
        tensors.append(value)
        return _Place(len(tensors) - 1)  # type: ignore[return-value]
    if isinstance(value, (Backend, Objective)):
        return value
    if isinstance(value, tuple):
        return tuple(take_out(v, tensors) for v in value)  # type: ignore[return-value]
    if dataclasses.is_dataclass(value) and not isinstance(value, type):
        fields = {f.name: getattr(value, f.name) for f in dataclasses.fields(value)}
        return dataclasses.replace(value, **{k: take_out(v, tensors) for k, v in fields.items()})
    return value


def put_back(value: T, tensors: tuple[Tensor, ...] | list[Tensor]) -> T:
    """The inverse of ``take_out``; the tensors come back detached."""
    if isinstance(value, _Place):
        return tensors[value.number].detach()  # type: ignore[return-value]
    if isinstance(value, (Backend, Objective)):
        return value
    if isinstance(value, tuple):
        return tuple(put_back(v, tensors) for v in value)  # type: ignore[return-value]
    if dataclasses.is_dataclass(value) and not isinstance(value, type):
        fields = {f.name: getattr(value, f.name) for f in dataclasses.fields(value)}
        return dataclasses.replace(value, **{k: put_back(v, tensors) for k, v in fields.items()})
    return value
