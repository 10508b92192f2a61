"""The weights of an lm_head as a ``kd.Hidden``, with peft's layers around it."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from kd.losses import Hidden


def as_hidden(head: Any, hidden: Tensor) -> Hidden:
    """Hidden states and the lm_head that would have read them, as a ``kd.Hidden``."""
    if hasattr(head, "modules_to_save"):  # peft trains a whole copy of the head
        active = head.active_adapters[0] if head.active_adapters else None
        copies = {} if head.disable_adapters else head.modules_to_save
        base = copies[active] if active in copies else head.original_module
    else:
        base = head.get_base_layer() if hasattr(head, "get_base_layer") else head
    return Hidden(hidden, base.weight, getattr(base, "bias", None), lora=lora_pair(head))


def lora_pair(head: Any) -> tuple[Tensor, Tensor, float] | None:
    """The active LoRA pair of a peft lm_head, or None; ValueError where it is more than a pair."""
    if not hasattr(head, "lora_A") or getattr(head, "disable_adapters", False):
        return None
    if getattr(head, "merged", False):
        return None
    active = [name for name in head.active_adapters if name in head.lora_A]
    if not active:
        return None
    if len(active) > 1:
        raise ValueError(
            f"prepare_student: lm_head must have one active LoRA adapter, got {active}. "
            "Activate one with set_adapter, or leave lm_head out of target_modules."
        )
    name = active[0]
    dropout = getattr(head.lora_dropout[name], "p", 0.0) if name in head.lora_dropout else 0.0
    if dropout and head.training:
        raise ValueError(
            f"prepare_student: the LoRA of the lm_head must have lora_dropout=0, got {dropout}: "
            "its input is the loss's own. Set it to 0, or leave lm_head out of target_modules."
        )
    if name in getattr(head, "lora_magnitude_vector", {}):
        raise ValueError(
            "prepare_student: the LoRA of the lm_head must be a plain one, got DoRA. Use "
            "use_dora=False, or leave lm_head out of target_modules."
        )
    return (
        head.lora_A[name].weight,
        head.lora_B[name].weight,
        float(head.scaling[name]),
    )


def scaled(logits: Tensor, scale: float | None, softcap: float | None) -> Tensor:
    """Logits times a scale, then softcapped."""
    if scale is not None:
        logits = logits * scale
    return logits if softcap is None else softcap * torch.tanh(logits / softcap)


def dense_logits(student: Hidden) -> Tensor:
    """The logits a ``kd.Hidden`` stands for."""
    logits = student.hidden @ student.weight.T
    if student.lora is not None:
        first, second, scaling = student.lora
        logits = logits + scaling * (student.hidden @ first.T @ second.T)
    if student.bias is not None:
        logits = logits + student.bias
    return scaled(logits, student.logit_scale, student.softcap)
