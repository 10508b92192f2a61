"""The public losses: soft targets, hard labels, masks, weights and reductions."""

from __future__ import annotations

import dataclasses
import math

import torch
from torch import Tensor

from kd.losses import checks, torch_backend, triton_backend
from kd.losses.autograd import TokenLoss, leaves, reduced
from kd.losses.divergences import Divergence, forward_kl, resolve
from kd.losses.inputs import Hidden, Student, Teacher, TopK, full_tensor
from kd.losses.rows import Objective
from kd.losses.tails import check_temperature
from kd.losses.torch_backend import Problem, Projection, compute_dtype


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
    min_logprob = checks.renamed_floor(where, min_logprob, floor)
    chosen = resolve(divergence)
    _check_options(
        where, temperature, kd_weight, ce_weight, reduction, num_items, backend, min_logprob
    )
    _check_combination(where, chosen, teacher, temperature, ce_weight, labels, min_logprob)
    objective = Objective(
        divergence=chosen,
        temperature=float(temperature),
        kd_weight=kd_weight * (temperature**2 if scale_by_t2 else 1.0),
        ce_weight=float(ce_weight),
        vocab_size=_check_inputs(where, student, teacher, labels, weights, vocab_size),
        min_logprob=min_logprob,
    )
    return _loss(
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
    _check_options(where, 1.0, 0.0, 1.0, reduction, num_items, backend, None)
    vocab = _check_inputs(where, student, None, labels, weights, vocab_size)
    return _loss(
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


def _check_options(
    where, temperature, kd_weight, ce_weight, reduction, num_items, backend, min_logprob
) -> None:
    checks.positive("temperature", temperature, where)
    for name, value in (("kd_weight", kd_weight), ("ce_weight", ce_weight)):
        if isinstance(value, Tensor) or not math.isfinite(value) or value < 0:
            raise ValueError(f"{where}: {name} must be a finite number >= 0, got {value!r}.")
    if reduction not in checks.REDUCTIONS:
        raise ValueError(
            f"{where}: reduction must be one of {', '.join(checks.REDUCTIONS)}, got {reduction!r}."
        )
    _check_num_items(where, reduction, num_items)
    if backend not in checks.BACKENDS:
        raise ValueError(
            f"{where}: backend must be one of {', '.join(checks.BACKENDS)}, got {backend!r}."
        )
    bounds = min_logprob is not None
    if bounds and (isinstance(min_logprob, Tensor) or not -math.inf < min_logprob < 0):
        raise ValueError(
            f"{where}: min_logprob must be a finite log-probability < 0 (for example -30.0), got "
            f"{min_logprob}."
        )


def _check_combination(
    where, divergence, teacher, temperature, ce_weight, labels, min_logprob
) -> None:
    if ce_weight > 0 and labels is None:
        raise ValueError(f"{where}: ce_weight={ce_weight} needs labels, got labels=None.")
    if not isinstance(teacher, TopK):
        return
    checks.sparse(teacher, where)
    check_temperature(
        where,
        temperature,
        teacher.temperature,
        teacher.tail,
        teacher.tail_temperatures,
        teacher.tail_at_temperature,
    )
    if teacher.tail == "drop" and divergence.name != "forward_kl":
        raise ValueError(
            f"{where}: tail='drop' must be used with forward_kl, got {divergence}. Its masses are "
            "unbiased only in a loss linear in p; others reward emptying the top-k. Use "
            "tail='bucket'."
        )
    if teacher.tail == "drop" and teacher.temperature != temperature:
        raise ValueError(
            f"{where}: tail='drop' must be used at the temperature the targets were captured at "
            f"({teacher.temperature}), got temperature={temperature}: dropped mass cannot be "
            "renormalised."
        )
    if teacher.tail == "renormalize" and divergence.needs_teacher_support and min_logprob is None:
        raise ValueError(
            f"{where}: tail='renormalize' leaves the teacher zero outside its top-k, where "
            f"{divergence} is +inf for every student. Use tail='bucket', or bound it with "
            "min_logprob."
        )


def _check_inputs(where, student, teacher, labels, weights, vocab_size) -> int:
    for side, source in (("student", student), ("teacher", teacher)):
        if isinstance(source, Hidden):
            checks.hidden(side, source, where)
        elif isinstance(source, TopK):
            if side == "student":
                raise TypeError(f"{where}: student must be logits or kd.Hidden, got kd.TopK.")
        elif source is not None or side == "student":
            checks.floating(side, source, where)
            if source.ndim == 0:
                raise ValueError(f"{where}: {side} must be [..., V], got a scalar.")
    if labels is not None:
        checks.integers("labels", labels, where)
    if weights is not None:
        checks.floating("weights", weights, where)
        checks.no_weight_gradient(weights, where)
    shape, device = checks.leading_shape(student), checks.device_of(student)
    if device.type == "meta":
        raise ValueError(f"{where}: student must be on a device with memory, got meta.")
    checks.no_transform(where)
    others = {"teacher": teacher, "labels": labels, "weights": weights}
    for name, other in others.items():
        if other is None:
            continue
        flat = other.shape if name in ("labels", "weights") else checks.leading_shape(other)
        if flat != shape:
            raise ValueError(
                f"{where}: {name} must have the student's leading shape {tuple(shape)}, got "
                f"{tuple(flat)}. Nothing is broadcast or shifted."
            )
        other_device = other.device if isinstance(other, Tensor) else checks.device_of(other)
        if other_device != device:
            raise ValueError(
                f"{where}: {name} must be on the student's device {device}, got {other_device}."
            )
    if teacher is not None:
        checks.no_teacher_gradient(teacher, where)
    return checks.vocabulary(student, teacher, vocab_size, where)


def _flat_student(student: Student) -> Tensor | Projection:
    """Tokens flattened to [N, ...], LoRA as a second matmul, autocast applied."""
    if not isinstance(student, Hidden):
        return student.reshape(-1, student.shape[-1])
    hidden = student.hidden.reshape(-1, student.hidden.shape[-1])
    weight = full_tensor(student.weight)
    bias = None if student.bias is None else full_tensor(student.bias)
    lora = student.lora
    kind = hidden.device.type
    if torch.is_autocast_enabled(kind):
        dtype = torch.get_autocast_dtype(kind)
        hidden, weight = hidden.to(dtype), weight.to(dtype)
        bias = None if bias is None else bias.to(dtype)
        lora = None if lora is None else (lora[0].to(dtype), lora[1].to(dtype), lora[2])
    pairs = [(hidden, weight)]
    if lora is not None:
        a, b, scaling = full_tensor(lora[0]), full_tensor(lora[1]), lora[2]
        pairs.append((scaling * (hidden @ a.T), b))
    return Projection(tuple(pairs), bias, student.logit_scale, student.softcap)


def _flat_teacher(teacher: Teacher | None) -> Teacher | None:
    if teacher is None or isinstance(teacher, Tensor):
        return None if teacher is None else teacher.detach().reshape(-1, teacher.shape[-1])
    if isinstance(teacher, TopK):
        k, stored = teacher.ids.shape[-1], teacher.tail_log_partition
        if stored is not None:
            stored = stored.detach().reshape(-1, stored.shape[-1])
        return dataclasses.replace(
            teacher,
            ids=teacher.ids.reshape(-1, k),
            logprobs=teacher.logprobs.detach().reshape(-1, k),
            tail_log_partition=stored,
        )
    flat = teacher.hidden.detach().reshape(-1, teacher.hidden.shape[-1])
    weight = full_tensor(teacher.weight).detach()
    bias = None if teacher.bias is None else full_tensor(teacher.bias).detach()
    lora = teacher.lora
    parts = [weight] if lora is None else [weight, *lora[:2]]
    kind = flat.device.type
    if torch.is_autocast_enabled(kind) and any(t.dtype != flat.dtype for t in parts):
        dtype = torch.get_autocast_dtype(kind)  # what agrees keeps its precision
        flat, weight = flat.to(dtype), weight.to(dtype)
        bias = None if bias is None else bias.to(dtype)
        lora = None if lora is None else (lora[0].to(dtype), lora[1].to(dtype), lora[2])
    return dataclasses.replace(teacher, hidden=flat, weight=weight, bias=bias, lora=lora)


def _loss(
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
) -> Tensor:
    shape = checks.leading_shape(student)
    flat_labels = None if labels is None else labels.reshape(-1).long()
    flat_teacher = _flat_teacher(teacher)
    checks.values_on_cpu(flat_teacher, flat_labels, ignore_index, objective.vocab_size, where)
    flat_student = _flat_student(student)
    leaf = next(t for t in leaves(flat_student) if t is not None)
    dtype = compute_dtype(leaf.dtype)
    row_weight = _row_weights(flat_labels, weights, teacher, ignore_index, leaf, dtype)
    if backend == "reference":
        losses = _reference(student, flat_teacher, flat_labels, objective, row_weight != 0)
        return _reduce(losses, row_weight.double(), reduction, num_items, shape)
    on_triton = triton_backend.chosen(where, backend, leaf)
    rows = None if on_triton else row_weight.nonzero().squeeze(1)
    problem = Problem(
        student=flat_student,
        teacher=flat_teacher,
        labels=flat_labels,
        rows=None if rows is None or len(rows) == len(row_weight) else rows,
        objective=objective,
        overwrite=_may_overwrite(where, overwrite, student, reduction),
    )
    run = triton_backend.run if on_triton else torch_backend.run
    problem = triton_backend.counted(problem, row_weight) if on_triton else problem
    with torch.autocast(leaf.device.type, enabled=False):
        if reduction == "none":
            losses = TokenLoss.apply(run, problem, row_weight, *leaves(flat_student))
            return (losses * row_weight).reshape(shape)
        return reduced(run, problem, row_weight, _scale(row_weight, reduction, num_items))


def _may_overwrite(where: str, asked: bool, student: Student, reduction: str) -> bool:
    if not asked:
        return False
    if not isinstance(student, Tensor) or reduction == "none":
        raise ValueError(
            f"{where}: overwrite_student_logits needs logits and a reduced loss, got "
            f"{'logits' if isinstance(student, Tensor) else 'kd.Hidden'} and "
            f"reduction={reduction!r}. Leave it out: nothing is materialised for kd.Hidden."
        )
    if student.requires_grad and student.is_leaf:
        raise ValueError(
            f"{where}: overwrite_student_logits must not be used on a leaf tensor, whose values "
            "the caller still owns. Pass a model's output, or leave it out."
        )
    if any(n > 1 and s == 0 for n, s in zip(student.shape, student.stride(), strict=True)):
        raise ValueError(
            f"{where}: overwrite_student_logits must be used on logits with memory of their own, "
            "got an expanded tensor. Clone it, or leave it out."
        )
    return True


def _row_weights(
    labels, weights, teacher, ignore_index, like: Tensor, dtype: torch.dtype
) -> Tensor:
    """[N] weight of each row, zero where the label is ignored.

    Where neither labels nor weights say which rows count, those that a sparse teacher has nothing
    for (padding, tokens the cache lacks) do not.
    """
    if weights is not None:
        weight = weights.detach().reshape(-1).to(dtype)
    elif labels is None and isinstance(teacher, TopK):
        weight = (teacher.ids >= 0).any(-1).reshape(-1).to(dtype)
    else:
        weight = torch.ones(like.shape[0], dtype=dtype, device=like.device)
    if labels is not None:
        weight = torch.where(labels == ignore_index, torch.zeros_like(weight), weight)
    return weight


def _check_num_items(where: str, reduction: str, num_items: float | Tensor | None) -> None:
    """A denominator is one finite number > 0, of "mean" alone.

    A tensor's value is looked at on a CPU only: elsewhere that would wait for the device, and a
    bad one makes the loss NaN instead.
    """
    if num_items is None:
        return
    if reduction != "mean":
        raise ValueError(
            f"{where}: num_items must be used with reduction='mean', which it divides, got "
            f"reduction={reduction!r}. Leave it out."
        )
    value: float | bool = False
    if isinstance(num_items, Tensor):
        if num_items.numel() != 1:
            raise ValueError(
                f"{where}: num_items must be one number, got a tensor of shape "
                f"{tuple(num_items.shape)}. Sum it."
            )
        if num_items.dtype == torch.bool or num_items.is_complex():
            raise TypeError(f"{where}: num_items must be a number, got {num_items.dtype}.")
        if num_items.device.type != "cpu" or torch.compiler.is_compiling():
            return
        value = float(num_items.detach())
    elif isinstance(num_items, (int, float)) and not isinstance(num_items, bool):
        value = float(num_items)
    else:
        raise TypeError(f"{where}: num_items must be a number, got {type(num_items).__name__}.")
    if not 0 < value < math.inf:
        raise ValueError(
            f"{where}: num_items must be finite and > 0, got {value:g}. Pass the number of "
            "trained tokens of the whole step."
        )


def _scale(weight: Tensor, reduction: str, num_items: float | Tensor | None) -> Tensor | float:
    """What turns the weighted sum into the reduction; NaN for a tensor that no divisor is."""
    if reduction == "sum":
        return 1.0
    if isinstance(num_items, Tensor):
        count = num_items.detach().reshape(())
        return torch.where((count > 0) & count.isfinite(), 1.0 / count, torch.nan)
    if num_items is not None:
        return 1.0 / num_items
    total = weight.sum()
    return torch.where(total == 0, torch.zeros_like(total), 1 / total)


def _reduce(losses, weight, reduction, num_items, shape) -> Tensor:
    weighted = losses * weight
    if reduction == "none":
        return weighted.reshape(shape)
    return weighted.sum() * _scale(weight, reduction, num_items)


def _reference(student, teacher, labels, objective: Objective, counts: Tensor) -> Tensor:
    from kd.losses.reference import per_token_loss

    if isinstance(student, Hidden):
        flat: Student = dataclasses.replace(
            student, hidden=student.hidden.reshape(-1, student.hidden.shape[-1])
        )
    else:
        flat = student.reshape(-1, student.shape[-1])
    return per_token_loss(
        flat,
        teacher,
        labels,
        divergence=objective.divergence,
        temperature=objective.temperature,
        kd_weight=objective.kd_weight,
        ce_weight=objective.ce_weight,
        counts=counts,
        vocab_size=objective.vocab_size,
        min_logprob=objective.min_logprob,
    )
