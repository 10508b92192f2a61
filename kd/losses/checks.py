"""Every check at the door of the losses, and their messages."""

from __future__ import annotations

import math
import warnings
from typing import Any

import torch
from torch import Tensor

from kd.losses.inputs import MAX_TAIL_TEMPERATURES, TAILS, Hidden, TopK

REDUCTIONS = ("mean", "sum", "none")
BACKENDS = ("auto", "torch", "triton", "reference")


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
    stored_tails(teacher, where)


def stored_tails(teacher: TopK, where: str) -> None:
    """A TopK's tail_log_partition and tail_temperatures."""
    stored, temperatures = teacher.tail_log_partition, teacher.tail_temperatures
    if stored is None and not temperatures:
        return
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
