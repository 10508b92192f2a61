"""What is checked when a loss is called, before anything is computed, and the messages."""

from __future__ import annotations

import math
import warnings
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from kd.losses.divergences import Divergence
from kd.losses.inputs import MAX_TAIL_TEMPERATURES, TAIL_RULES, TAILS, Hidden, TopK
from kd.losses.sparse import covers

REDUCTIONS = ("mean", "sum", "none")
BACKENDS = ("auto", "torch", "triton", "reference")


def options(
    where: str,
    temperature: float,
    kd_weight: float,
    ce_weight: float,
    reduction: str,
    num_items: float | Tensor | None,
    backend: str,
    min_logprob: float | None,
) -> None:
    """The numbers and names of a loss."""
    positive("temperature", temperature, where)
    for name, value in (("kd_weight", kd_weight), ("ce_weight", ce_weight)):
        if isinstance(value, Tensor) or not math.isfinite(value) or value < 0:
            raise ValueError(f"{where}: {name} must be a finite number >= 0, got {value!r}.")
    if reduction not in REDUCTIONS:
        raise ValueError(
            f"{where}: reduction must be one of {', '.join(REDUCTIONS)}, got {reduction!r}."
        )
    if num_items is not None:
        denominator(where, reduction, num_items)
    if backend not in BACKENDS:
        raise ValueError(f"{where}: backend must be one of {', '.join(BACKENDS)}, got {backend!r}.")
    if min_logprob is not None and (
        isinstance(min_logprob, Tensor) or not -math.inf < min_logprob < 0
    ):
        raise ValueError(
            f"{where}: min_logprob must be a finite log-probability < 0 (for example -30.0), got "
            f"{min_logprob}."
        )


def denominator(where: str, reduction: str, num_items: float | Tensor) -> None:
    """A denominator is one finite number > 0, of "mean" alone.

    A tensor's value is looked at on a CPU only: elsewhere that would wait for the device, and a
    bad one makes the loss NaN instead.
    """
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


def combination(
    where: str,
    divergence: Divergence,
    teacher: Any,
    temperature: float,
    ce_weight: float,
    labels: Tensor | None,
    min_logprob: float | None,
) -> None:
    """What does not go together, or has no meaning."""
    if ce_weight > 0 and labels is None:
        raise ValueError(f"{where}: ce_weight={ce_weight} needs labels, got labels=None.")
    if not isinstance(teacher, TopK):
        return
    sparse(teacher, where)
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


def check_temperature(
    where: str,
    temperature: float,
    captured: float,
    tail: str,
    tail_temperatures: Sequence[float],
    rule: str | None,
) -> None:
    """Refuse a loss at another temperature than the capture's where the tail there is unknown.

    Raises:
        ValueError: saying what a spread tail does, and the ways out.
    """
    if rule is not None and rule not in TAIL_RULES:
        raise ValueError(
            f"{where}: tail_at_temperature must be one of {', '.join(TAIL_RULES)} or None, got "
            f"{rule!r}."
        )
    if tail != "bucket" or temperature == captured or rule is not None:
        return
    if covers(tail_temperatures, temperature):
        return
    known = ""
    if tail_temperatures:
        known = f" or from {min(tail_temperatures):g} to {max(tail_temperatures):g} (stored tails)"
    raise ValueError(
        f"{where}: temperature must be what the top-k targets were captured at ({captured:g})"
        f"{known}, got {temperature:g}. The tail's mass at another temperature is not in them: "
        "captured at 1 and used at 2, SmolLM2's trained a student to a held-out KL of 1.44 as "
        "'spread' and 1.83 as 'one_outcome', where stored tails gave 1.25. Capture at "
        f"temperature {temperature:g}, or again with stored tails (kd cache build, "
        "tail_temperatures), or name a rule: tail_at_temperature='spread' or 'one_outcome'."
    )


def inputs(
    where: str,
    student: Any,
    teacher: Any,
    labels: Tensor | None,
    weights: Tensor | None,
    vocab_size: int | None,
) -> int:
    """Shapes, dtypes and devices; returns the number of live tokens."""
    for side, source in (("student", student), ("teacher", teacher)):
        if isinstance(source, Hidden):
            hidden(side, source, where)
        elif isinstance(source, TopK):
            if side == "student":
                raise TypeError(f"{where}: student must be logits or kd.Hidden, got kd.TopK.")
        elif source is not None or side == "student":
            floating(side, source, where)
            if source.ndim == 0:
                raise ValueError(f"{where}: {side} must be [..., V], got a scalar.")
    if labels is not None:
        integers("labels", labels, where)
    if weights is not None:
        floating("weights", weights, where)
        no_weight_gradient(weights, where)
    shape, device = leading_shape(student), device_of(student)
    if device.type == "meta":
        raise ValueError(f"{where}: student must be on a device with memory, got meta.")
    no_transform(where)
    others = {"teacher": teacher, "labels": labels, "weights": weights}
    for name, other in others.items():
        if other is None:
            continue
        flat = other.shape if name in ("labels", "weights") else leading_shape(other)
        if flat != shape:
            raise ValueError(
                f"{where}: {name} must have the student's leading shape {tuple(shape)}, got "
                f"{tuple(flat)}. Nothing is broadcast or shifted."
            )
        other_device = other.device if isinstance(other, Tensor) else device_of(other)
        if other_device != device:
            raise ValueError(
                f"{where}: {name} must be on the student's device {device}, got {other_device}."
            )
    if teacher is not None:
        no_teacher_gradient(teacher, where)
    return vocabulary(student, teacher, vocab_size, where)


def floating(name: str, tensor: Any, where: str) -> None:
    if not isinstance(tensor, Tensor):
        raise TypeError(f"{where}: {name} must be a tensor, got {type(tensor).__name__}.")
    if not tensor.is_floating_point():
        raise TypeError(
            f"{where}: {name} must be floating point, got {tensor.dtype}. Pass logits, not token "
            "ids or labels."
        )
    if tensor.layout != torch.strided:
        raise TypeError(f"{where}: {name} must be a dense tensor, got {tensor.layout}.")


def integers(name: str, tensor: Any, where: str) -> None:
    if not isinstance(tensor, Tensor):
        raise TypeError(f"{where}: {name} must be a tensor, got {type(tensor).__name__}.")
    if tensor.is_floating_point() or tensor.is_complex() or tensor.dtype == torch.bool:
        raise TypeError(f"{where}: {name} must be integer token ids, got {tensor.dtype}.")


def hidden(side: str, source: Hidden, where: str) -> None:
    """A Hidden's own shapes and dtypes; autocast casts, so that dtypes may differ there."""
    floating(f"{side}.hidden", source.hidden, where)
    floating(f"{side}.weight", source.weight, where)
    matrix = source.weight.ndim == 2 and source.hidden.ndim > 0 and source.weight.shape[1] > 0
    if not matrix or source.hidden.shape[-1] != source.weight.shape[1]:
        raise ValueError(
            f"{where}: {side}.hidden must be [..., H] and {side}.weight [V, H] with one H, got "
            f"{tuple(source.hidden.shape)} and {tuple(source.weight.shape)}."
        )
    cast = torch.is_autocast_enabled(source.hidden.device.type)
    if source.hidden.dtype != source.weight.dtype and not cast:
        raise ValueError(
            f"{where}: {side}.hidden and {side}.weight must share a dtype, got "
            f"{source.hidden.dtype} and {source.weight.dtype}. Cast one, or use torch.autocast."
        )
    if source.bias is not None and source.bias.shape != source.weight.shape[:1]:
        raise ValueError(
            f"{where}: {side}.bias must be [V] = [{source.weight.shape[0]}], got "
            f"{tuple(source.bias.shape)}."
        )
    for name in ("softcap", "logit_scale"):
        value = getattr(source, name)
        if value is None:
            continue
        if isinstance(value, Tensor):
            raise TypeError(
                f"{where}: {side}.{name} must be a number, got a tensor, which would get no "
                "gradient. Pass a float, or multiply the hidden states by it."
            )
        if not math.isfinite(value) or (name == "softcap" and value <= 0):
            rule = "finite and positive" if name == "softcap" else "finite"
            raise ValueError(f"{where}: {side}.{name} must be {rule}, got {value}.")
    if source.lora is not None:
        if len(source.lora) != 3:
            raise ValueError(
                f"{where}: {side}.lora must be (A [r, H], B [V, r], scaling), got "
                f"{len(source.lora)} items."
            )
        a, b, _ = source.lora
        rank_ok = a.ndim == 2 and b.ndim == 2 and a.shape[0] == b.shape[1]
        if not rank_ok or a.shape[1] != source.weight.shape[1] or len(b) != len(source.weight):
            raise ValueError(
                f"{where}: {side}.lora must be (A [r, H], B [V, r], scaling), got A "
                f"{tuple(a.shape)}, B {tuple(b.shape)} for a weight {tuple(source.weight.shape)}."
            )
        if not cast and not a.dtype == b.dtype == source.hidden.dtype:
            raise ValueError(
                f"{where}: {side}.lora must share {side}.hidden's dtype {source.hidden.dtype}, got "
                f"A {a.dtype} and B {b.dtype}. Cast them, or use torch.autocast."
            )


def width(source: Tensor | Hidden) -> int:
    return source.weight.shape[0] if isinstance(source, Hidden) else source.shape[-1]


def leading_shape(source: Tensor | Hidden | TopK) -> torch.Size:
    if isinstance(source, TopK):
        return source.ids.shape[:-1]
    return (source.hidden if isinstance(source, Hidden) else source).shape[:-1]


def device_of(source: Tensor | Hidden | TopK) -> torch.device:
    if isinstance(source, TopK):
        return source.ids.device
    return (source.hidden if isinstance(source, Hidden) else source).device


def sparse(teacher: TopK, where: str) -> None:
    """A TopK's own shapes, dtypes and options."""
    if not isinstance(teacher.ids, Tensor) or not isinstance(teacher.logprobs, Tensor):
        raise TypeError(f"{where}: teacher.ids and teacher.logprobs must be tensors.")
    if teacher.ids.is_floating_point() or teacher.ids.dtype == torch.bool:
        raise TypeError(f"{where}: teacher.ids must be integers, got {teacher.ids.dtype}.")
    floating("teacher.logprobs", teacher.logprobs, where)
    shape = teacher.ids.shape
    if shape != teacher.logprobs.shape or len(shape) < 1 or shape[-1] < 1:
        raise ValueError(
            f"{where}: teacher.ids and teacher.logprobs must both be [..., K] with K >= 1, got "
            f"{tuple(teacher.ids.shape)} and {tuple(teacher.logprobs.shape)}."
        )
    if teacher.tail not in TAILS:
        raise ValueError(
            f"{where}: teacher.tail must be one of {', '.join(TAILS)}, got {teacher.tail!r}."
        )
    positive("teacher.temperature", teacher.temperature, where)
    if teacher.tail_log_partition is not None or teacher.tail_temperatures:
        stored_tails(teacher, where)


def stored_tails(teacher: TopK, where: str) -> None:
    """A TopK's tail_log_partition and tail_temperatures."""
    stored, temperatures = teacher.tail_log_partition, teacher.tail_temperatures
    for temperature in temperatures:
        positive("teacher.tail_temperatures", temperature, where)
    if not 1 <= len(set(temperatures)) == len(temperatures) <= MAX_TAIL_TEMPERATURES:
        raise ValueError(
            f"{where}: teacher.tail_temperatures must be 1 to {MAX_TAIL_TEMPERATURES} different "
            f"temperatures beside tail_log_partition, got {tuple(temperatures)}."
        )
    floating("teacher.tail_log_partition", stored, where)
    assert stored is not None
    if stored.shape != (*teacher.ids.shape[:-1], len(temperatures)):
        raise ValueError(
            f"{where}: teacher.tail_log_partition must be [..., M] with ids' leading shape and one "
            f"value for each of the {len(temperatures)} tail_temperatures, got "
            f"{tuple(stored.shape)} beside ids {tuple(teacher.ids.shape)}."
        )
    if stored.device != teacher.ids.device:
        raise ValueError(
            f"{where}: teacher.tail_log_partition must be on ids' device {teacher.ids.device}, got "
            f"{stored.device}."
        )
    if teacher.tail not in ("bucket", "uniform"):
        raise ValueError(
            f"{where}: teacher.tail_log_partition must come with a tail, got "
            f"tail={teacher.tail!r}, which has none. Leave it out."
        )


def renamed_floor(where: str, min_logprob: float | None, floor: float | None) -> float | None:
    """min_logprob, also by its former name."""
    if floor is None:
        return min_logprob
    if min_logprob is not None:
        raise TypeError(
            f"{where}: min_logprob must be given once, got {min_logprob} and floor={floor}. Leave "
            "floor, its former name, out."
        )
    message = f"{where}: floor is called min_logprob now, and bounds both sides. Rename it."
    warnings.warn(message, FutureWarning, stacklevel=3)
    return floor


def positive(name: str, value: Any, where: str) -> None:
    if isinstance(value, Tensor) or not isinstance(value, (int, float)):
        raise TypeError(f"{where}: {name} must be a number, got {type(value).__name__}.")
    if not math.isfinite(value) or value <= 0:
        raise ValueError(f"{where}: {name} must be finite and > 0, got {value}.")


def no_teacher_gradient(teacher: Tensor | Hidden | TopK, where: str) -> None:
    parts = {
        "teacher": teacher if isinstance(teacher, Tensor) else None,
        "teacher.hidden": getattr(teacher, "hidden", None),
        "teacher.logprobs": getattr(teacher, "logprobs", None),
        "teacher.tail_log_partition": getattr(teacher, "tail_log_partition", None),
    }
    for name, part in parts.items():
        if part is not None and part.requires_grad and torch.is_grad_enabled():
            raise ValueError(
                f"{where}: {name} must not require a gradient: the teacher is a constant of the "
                f"loss. Detach it ({name}.detach()) or run the teacher under torch.no_grad()."
            )


def no_weight_gradient(weights: Tensor, where: str) -> None:
    if weights.requires_grad and torch.is_grad_enabled():
        raise ValueError(
            f"{where}: weights must not require a gradient: they are constants of the loss and "
            "would get none. Detach them, or multiply the losses of reduction='none' by them."
        )


def no_transform(where: str) -> None:
    """torch.func would look for rules that these functions do not have."""
    if not torch.compiler.is_compiling() and torch._C._are_functorch_transforms_active():
        raise RuntimeError(
            f"{where}: must run outside torch.func transforms (grad, vmap, jvp, ...), got one "
            "active. Use torch.autograd.grad, and batch dimensions instead of vmap."
        )


def vocabulary(student: Any, teacher: Any, vocab_size: int | None, where: str) -> int:
    """The number of live tokens."""
    widths = {"student": width(student)}
    if teacher is not None and not isinstance(teacher, TopK):
        widths["teacher"] = width(teacher)
    if vocab_size is None:
        if len(set(widths.values())) > 1:
            raise ValueError(
                f"{where}: student and teacher must have the same vocabulary width, got "
                f"{widths['student']} and {widths['teacher']}. If the wider one is padding, pass "
                "vocab_size=<number of live tokens> (151,665 for Qwen2.5)."
            )
        vocab_size = widths["student"]
    if (
        isinstance(vocab_size, bool)
        or not isinstance(vocab_size, int)
        or not 1 <= vocab_size <= min(widths.values())
    ):
        raise ValueError(
            f"{where}: vocab_size must be an integer between 1 and the narrower width "
            f"{min(widths.values())}, got {vocab_size!r}."
        )
    if isinstance(teacher, TopK) and teacher.ids.shape[-1] > vocab_size:
        raise ValueError(
            f"{where}: teacher holds {teacher.ids.shape[-1]} entries a row, more than the "
            f"{vocab_size} live tokens. Slice ids and logprobs, or correct vocab_size."
        )
    return vocab_size


def values_on_cpu(
    teacher: Any, labels: Tensor | None, ignore_index: int, vocab_size: int, where: str
) -> None:
    """Ranges of ids, log-probs and labels; on a CPU alone, where looking costs no sync, and not
    under torch.compile, whose graph a look would break."""
    if torch.compiler.is_compiling():
        return
    if isinstance(teacher, TopK) and teacher.ids.device.type == "cpu" and teacher.ids.numel():
        low, high = int(teacher.ids.min()), int(teacher.ids.max())
        if low < -1 or high >= vocab_size:
            raise ValueError(
                f"{where}: teacher.ids must lie in [0, {vocab_size}) or be -1 (empty slot), got "
                f"values from {low} to {high}. Was the cache made with another vocabulary?"
            )
        used = teacher.logprobs.masked_fill(teacher.ids < 0, -torch.inf)
        top = float(used.double().logsumexp(-1).nan_to_num(nan=0.0).max())
        if top > 1e-2:
            raise ValueError(
                f"{where}: teacher.logprobs must be natural-log probabilities summing to at most "
                f"1 a row, got a row summing to {math.exp(min(top, 700)):.4g}. Pass log_softmax "
                "values over the full vocabulary, not logits or probabilities."
            )
        stored = teacher.tail_log_partition
        if stored is not None and not bool((stored < torch.inf).all()):  # NaN included
            raise ValueError(
                f"{where}: teacher.tail_log_partition must be finite, or -inf where a row has no "
                "tail, got NaN or +inf. Was it computed from logits that are not finite?"
            )
    if labels is not None and labels.device.type == "cpu" and labels.numel():
        bad = (labels != ignore_index) & ((labels < 0) | (labels >= vocab_size))
        if bool(bad.any()):
            first = int(bad.nonzero()[0])
            raise ValueError(
                f"{where}: labels must lie in [0, {vocab_size}) or equal ignore_index="
                f"{ignore_index}, got {int(labels[first])} at position {first}."
            )


def may_overwrite(where: str, student: Any, reduction: str) -> None:
    """Whether the gradient may replace the student's logits."""
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


def check(name: str, tensor: Tensor, *, allow_minus_inf: bool = True) -> Tensor:
    """Raise if a tensor holds NaN or +inf (or -inf, where that is not allowed), naming the row.

    Synchronises with the device, so it is for debugging and for boundaries (capture, evaluation),
    not for the inner loop. Returns the tensor.

    Args:
        name: what to call it in the message.
        tensor: [..., V]; the row is an index over the leading dimensions.
        allow_minus_inf: -inf means probability zero in logits; False refuses it too.
    Raises:
        ValueError: a value is not finite, with its row, column and the count of bad rows.
    """
    bad = tensor.isnan() | (tensor == torch.inf)
    if not allow_minus_inf:
        bad |= tensor == -torch.inf
    if not bool(bad.any()):
        return tensor
    where = bad.nonzero()[0].tolist()
    value = float(tensor[tuple(where)])
    rows = int(bad.reshape(-1, tensor.shape[-1]).any(-1).sum()) if tensor.ndim else 1
    place = f"row {where[:-1] if len(where) != 2 else where[0]}, column {where[-1]}"
    if tensor.ndim < 2:
        place = f"position {where[0] if where else 0}"
    raise ValueError(f"check: {name} must be finite, got {value} at {place} ({rows} bad rows).")
