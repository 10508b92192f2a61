"""The public losses: soft targets, hard labels, masks, weights and reductions.

Each checks what it is given once and hands a ``Problem``, flat over tokens, to autograd.
"""

from __future__ import annotations

import dataclasses
from typing import Any

import torch
from torch import Tensor

from kd.losses import autograd, checks, rows_sharded, rows_torch, rows_triton
from kd.losses.divergences import Divergence, forward_kl, resolve
from kd.losses.inputs import Hidden, Student, Teacher, TopK
from kd.losses.problem import Objective, Problem, Projection


def distillation_loss(
    student: Student,
    teacher: Teacher,
    *,
    divergence: str | Divergence = "forward_kl",
    temperature: float = 1.0,
    scale_by_t2: bool = True,
    labels: Tensor | None = None,
    ignore_index: int = -100,
    kd_weight: float = 1.0,
    ce_weight: float = 0.0,
    weights: Tensor | None = None,
    vocab_size: int | None = None,
    reduction: str = "mean",
    num_items: float | Tensor | None = None,
    min_logprob: float | None = None,
    overwrite_student_logits: bool = False,
    backend: str = "auto",
    floor: float | None = None,
) -> Tensor:
    """Distillation loss of a student from a teacher, row by row, in nats.

        loss[i] = weights[i] * (kd_weight * T**2 * D(p[i], q[i]) + ce_weight * CE(z[i], labels[i]))

    p = softmax(teacher / T) and q = softmax(student / T) over the live vocabulary; CE is taken at
    temperature 1. Row i of the student is compared with row i of the teacher: nothing is shifted.

    Args:
        student: logits [..., V], or ``kd.Hidden`` (logits are then never materialised).
        teacher: logits [..., V], ``kd.Hidden`` or ``kd.TopK``, with the student's leading shape.
            A constant: it gets no gradient and may not require one.
        divergence: a name, or ``kd.jsd(0.5)`` and the like.
        temperature: > 0, divides both sides' logits.
        scale_by_t2: multiply value and gradient of the soft part by T**2 (Hinton et al. 2015,
            section 2), so that its gradient keeps its size as T changes.
        labels: [...] integer token ids, aligned with the rows. Rows equal to ``ignore_index``
            are left out of the whole loss; the others enter it only where ce_weight > 0. Without
            labels and weights, rows of a ``kd.TopK`` without entries do not count either.
        ignore_index: label of rows that do not count.
        kd_weight, ce_weight: >= 0 weights of the two parts; no hard-label part by default.
        weights: [...] per-token weights, floating point, constants like the teacher; rows of
            zero do not count and cost nothing. "mean" of weights that sum to zero is zero.
        vocab_size: number of live tokens; columns past it are padding, probability zero on both
            sides. Needed where the two widths differ.
        reduction: "mean" over the unmasked weight, "sum", or "none".
        num_items: denominator of "mean" instead of the unmasked weight, so that microbatches and
            ranks add up to the one-batch gradient.
        min_logprob: lower bound in nats, < 0, on the log-probabilities of both sides over the
            outcomes compared (tokens, or a sparse teacher's K and their tail), at the temperature:
            D(max(p, e**min_logprob), max(q, e**min_logprob)). Nothing is renormalised; D takes the
            form that needs no sum of one (KL: sum(a * log(a / b) - a + b)), so it is >= 0, and 0
            where the sides are equal. Below the bound q is a constant: no gradient. Of
            tail="drop", whose masses are no distribution, only the logarithms are bounded.
            Without it reverse KL is +inf where the teacher is zero and the student is not, and
            its gradient NaN.
        floor: the former name of min_logprob; warns.
        overwrite_student_logits: let the gradient replace the student's logits in memory. They
            are garbage afterwards; saves one [N, V] tensor. Reduced losses on logits only.
        backend: "auto", "torch", "triton" or "reference" (float64, slow, obviously right).

    Returns:
        A scalar, or [...] for "none". float32; float64 for float64 students and the reference.
        Where no row counts: zero, with a graph. Differentiable once; backend="reference" twice.

    Raises:
        TypeError, ValueError: naming the argument, the rule and the value.
    """
    where = "distillation_loss"
    if floor is not None:
        min_logprob = checks.renamed_floor(where, min_logprob, floor)
    chosen = resolve(divergence)
    checks.options(
        where, temperature, kd_weight, ce_weight, reduction, num_items, backend, min_logprob
    )
    checks.combination(where, chosen, teacher, temperature, ce_weight, labels, min_logprob)
    objective = Objective(
        divergence=chosen,
        temperature=float(temperature),
        kd_weight=kd_weight * (temperature**2 if scale_by_t2 else 1.0),
        ce_weight=float(ce_weight),
        vocab_size=checks.inputs(where, student, teacher, labels, weights, vocab_size),
        min_logprob=min_logprob,
    )
    return solve(
        where,
        student,
        teacher,
        labels,
        weights,
        objective,
        ignore_index=ignore_index,
        reduction=reduction,
        num_items=num_items,
        overwrite=overwrite_student_logits,
        backend=backend,
    )


def cross_entropy(
    student: Student,
    labels: Tensor,
    *,
    ignore_index: int = -100,
    weights: Tensor | None = None,
    vocab_size: int | None = None,
    reduction: str = "mean",
    num_items: float | Tensor | None = None,
    overwrite_student_logits: bool = False,
    backend: str = "auto",
) -> Tensor:
    """Cross-entropy on hard labels, in nats, without materialising the logits of a kd.Hidden.

    The same machinery, masks, weights and reductions as ``kd.distillation_loss``; labels are
    aligned with the rows and never shifted.

    Args:
        student: logits [..., V] or ``kd.Hidden``.
        labels: [...] integer token ids; ``ignore_index`` where a row does not count.
        ignore_index, weights, vocab_size, reduction, num_items, overwrite_student_logits,
            backend: as in ``kd.distillation_loss``.
    Returns:
        A scalar, or [...] for reduction="none".
    Raises:
        TypeError, ValueError: naming the argument, the rule and the value.
    """
    where = "cross_entropy"
    if not isinstance(labels, Tensor):
        raise TypeError(f"{where}: labels must be a tensor, got {type(labels).__name__}.")
    checks.options(where, 1.0, 0.0, 1.0, reduction, num_items, backend, None)
    vocab = checks.inputs(where, student, None, labels, weights, vocab_size)
    return solve(
        where,
        student,
        None,
        labels,
        weights,
        Objective(forward_kl, 1.0, 0.0, 1.0, vocab, None),
        ignore_index=ignore_index,
        reduction=reduction,
        num_items=num_items,
        overwrite=overwrite_student_logits,
        backend=backend,
    )


Divergence.compute = staticmethod(distillation_loss)


def solve(
    where: str,
    student: Student,
    teacher: Teacher | None,
    labels: Tensor | None,
    weights: Tensor | None,
    objective: Objective,
    *,
    ignore_index: int,
    reduction: str,
    num_items: float | Tensor | None,
    overwrite: bool,
    backend: str,
    shard: rows_sharded.Shard | None = None,
) -> Tensor:
    """The loss of inputs that were checked; shard: this rank's part of the vocabulary."""
    if overwrite:
        checks.may_overwrite(where, student, reduction)
    shape = checks.leading_shape(student)
    flat_labels = None if labels is None else labels.reshape(-1).long()
    flat_teacher = flat(teacher, agreeing=True)
    checks.values_on_cpu(flat_teacher, flat_labels, ignore_index, objective.vocab_size, where)
    flat_student = flat(student)
    assert isinstance(flat_student, (Tensor, Projection))
    like = flat_student if isinstance(flat_student, Tensor) else flat_student.pairs[0][0]
    weight = _row_weights(flat_labels, weights, teacher, ignore_index, like)
    if backend == "reference":
        losses = _reference(student, teacher, flat_labels, objective, weight != 0)
        weighted = losses * weight.double()
        if reduction == "none":
            return weighted.reshape(shape)
        return weighted.sum() * scale_of(weight.double(), reduction, num_items)
    asked = backend == "triton" or (backend == "auto" and like.is_cuda)
    on_triton = asked and rows_triton.available(where, like, required=backend == "triton")
    chosen = rows_triton.BACKEND if on_triton else rows_torch.BACKEND
    if shard is not None:
        chosen = rows_sharded.backend(shard, on_triton)
    rows = None
    if isinstance(flat_student, Projection) and not (on_triton and torch.compiler.is_compiling()):
        # Packed for the matmuls. A graph has no number of rows to pack: there, masked rows go
        # through them as zeros.
        rows = autograd.counted(weight)
    problem = Problem(
        student=flat_student,
        teacher=flat_teacher if objective.kd_weight != 0 else None,
        labels=flat_labels if objective.ce_weight != 0 else None,
        weight=weight,
        objective=objective,
        backend=chosen,
        columns=objective.vocab_size if shard is None else shard.live,
        rows=rows,
        overwrite=overwrite,
        shard=shard,
    )
    if torch.is_autocast_enabled(like.device.type):
        with torch.autocast(like.device.type, enabled=False):
            return _computed(problem, reduction, num_items, shape)
    return _computed(problem, reduction, num_items, shape)


def _computed(
    problem: Problem, reduction: str, num_items: float | Tensor | None, shape: torch.Size
) -> Tensor:
    if reduction == "none":
        return autograd.per_token(problem).reshape(shape)
    return autograd.reduced(problem, scale_of(problem.weight, reduction, num_items))


def flat(
    source: Student | Teacher | None, *, agreeing: bool = False
) -> Tensor | Projection | TopK | None:
    """Tokens flattened to [N, ...], LoRA as a second matmul, autocast applied.

    agreeing: a teacher, a constant, whose tensors keep their precision where they share it.
    """
    if source is None:
        return None
    if isinstance(source, Tensor):
        source = source.detach() if agreeing else source
        return source if source.ndim == 2 else source.reshape(-1, source.shape[-1])
    if isinstance(source, TopK):
        stored = source.tail_log_partition
        return dataclasses.replace(
            source,
            ids=source.ids.reshape(-1, source.ids.shape[-1]),
            logprobs=source.logprobs.detach().reshape(-1, source.ids.shape[-1]),
            tail_log_partition=None if stored is None else stored.detach().flatten(0, -2),
        )
    lora = () if source.lora is None else source.lora[:2]
    given = (source.hidden.flatten(0, -2), source.weight, source.bias, *lora)
    tensors = [None if t is None else full_tensor(t) for t in given]
    if agreeing:
        tensors = [None if t is None else t.detach() for t in tensors]
    kind = source.hidden.device.type
    if torch.is_autocast_enabled(kind):
        matmuls = {t.dtype for t in (*tensors[:2], *tensors[3:]) if t is not None}
        if not agreeing or len(matmuls) > 1:
            dtype = torch.get_autocast_dtype(kind)
            tensors = [None if t is None else t.to(dtype) for t in tensors]
    hidden, weight, bias, *factors = tensors
    pairs: Any = [(hidden, weight)]
    if source.lora is not None:
        a, b = factors
        pairs.append((source.lora[2] * (hidden @ a.T), b))  # type: ignore[operator,union-attr]
    return Projection(tuple(pairs), bias, (source.logit_scale, source.softcap))


def full_tensor(tensor: Tensor) -> Tensor:
    """A sharded DTensor gathered (differentiably); any other tensor as it is."""
    gather = getattr(tensor, "full_tensor", None)
    return gather() if callable(gather) else tensor


def _row_weights(
    labels: Tensor | None,
    weights: Tensor | None,
    teacher: Teacher | None,
    ignore_index: int,
    like: Tensor,
) -> Tensor:
    """[N] weight of each row in the compute dtype, zero where the label is ignored.

    Where neither labels nor weights say which rows count, those that a sparse teacher has nothing
    for (padding, tokens the cache lacks) do not.
    """
    dtype = torch.float64 if like.dtype == torch.float64 else torch.float32
    if weights is not None:
        weight = weights.detach().reshape(-1).to(dtype)
    elif labels is None and isinstance(teacher, TopK):
        return (teacher.ids >= 0).any(-1).reshape(-1).to(dtype)
    elif labels is None:
        return torch.ones(like.shape[0], dtype=dtype, device=like.device)
    else:
        return (labels != ignore_index).to(dtype)
    if labels is not None:
        weight = torch.where(labels == ignore_index, torch.zeros_like(weight), weight)
    return weight


def scale_of(weight: Tensor, reduction: str, num_items: float | Tensor | None) -> Tensor | float:
    """What turns the weighted sum into the reduction; NaN for a tensor that no divisor is."""
    if reduction == "sum":
        return 1.0
    if isinstance(num_items, Tensor):
        count = num_items.detach().reshape(())
        return torch.where((count > 0) & count.isfinite(), 1.0 / count, torch.nan)
    if num_items is not None:
        return 1.0 / num_items
    total = weight.sum()
    if total.device.type == "cpu" and not torch.compiler.is_compiling():  # free to look at
        counted = float(total)
        return 1 / counted if counted else 0.0
    return torch.where(total == 0, torch.zeros_like(total), 1 / total)


def _reference(
    student: Student,
    teacher: Teacher | None,
    labels: Tensor | None,
    objective: Objective,
    counts: Tensor,
) -> Tensor:
    """The oracle's losses [N]; of hidden states it makes the logits itself."""
    from kd.losses.oracle import per_token_loss

    def rows(source: Any) -> Any:
        if not isinstance(source, Hidden):
            return flat(source)
        return dataclasses.replace(source, hidden=source.hidden.flatten(0, -2))

    return per_token_loss(
        rows(student),
        rows(teacher),
        labels,
        divergence=objective.divergence,
        temperature=objective.temperature,
        kd_weight=objective.kd_weight,
        ce_weight=objective.ce_weight,
        counts=counts,
        vocab_size=objective.vocab_size,
        min_logprob=objective.min_logprob,
    )
