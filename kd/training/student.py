"""Put the loss where the lm_head is: a student's forward that never makes its logits.

A causal LM's own forward multiplies hidden states [B, L, H] with the lm_head and hands out logits
[B, L, V], which for a vocabulary of 152k are the largest tensor of the whole step. After
``prepare_student`` the model takes one more argument:

    model(input_ids=..., attention_mask=..., head_loss=function)

and then the lm_head module is called with its input as always, but computes
``function(kd.Hidden(hidden, weight, ...))`` and returns that. Because the call still goes through
the model's and the lm_head's ``__call__``, DDP sees a forward, and FSDP2 and ZeRO-3 gather the
weight at their usual hooks. Without ``head_loss`` nothing changes.
"""

from __future__ import annotations

import types
from collections.abc import Callable
from typing import Any

from torch import Tensor, nn

from kd.losses import Hidden

HeadLoss = Callable[[Hidden], Any]


def prepare_student(model: Any) -> Any:
    """Give a causal LM the ``head_loss`` argument; calling it twice does no harm.

    Args:
        model: a transformers causal LM, or a peft model around one.

    Returns:
        The same object, changed in place.

    Raises:
        TypeError: the model has no decoder or no output embeddings.
    """
    causal = model.get_base_model() if hasattr(model, "get_base_model") else model
    head = causal.get_output_embeddings() if hasattr(causal, "get_output_embeddings") else None
    if getattr(head, "_kd_original_forward", None) is not None:
        return model
    decoder = causal.get_decoder() if hasattr(causal, "get_decoder") else None
    if head is None or decoder is None or decoder is causal:
        raise TypeError(
            "prepare_student: model must be a causal LM with a decoder and an lm_head, got "
            f"{type(model).__name__}. Load it with AutoModelForCausalLM."
        )
    scale, softcap = head_options(causal.config)
    if getattr(causal, "_kd_original_forward", None) is None:
        causal._kd_original_forward = causal.forward
        causal.forward = types.MethodType(_forward, causal)
    for inner in head.modules():  # peft may have put a layer of its own around a prepared head
        if getattr(inner, "_kd_original_forward", None) is not None:
            inner.forward, inner._kd_original_forward = inner._kd_original_forward, None
    head._kd_original_forward = head.forward
    head._kd_scale, head._kd_softcap = scale, softcap
    head.forward = types.MethodType(_head_forward, head)
    return model


def head_options(config: Any) -> tuple[float | None, float | None]:
    """What a model family does to its logits after the lm_head: (logit_scale, softcap)."""
    text = config.get_text_config() if hasattr(config, "get_text_config") else config
    scale = getattr(text, "logit_scale", None)  # Cohere multiplies
    divisor = getattr(text, "logits_scaling", None)  # Granite divides
    if divisor is not None:
        scale = (1.0 if scale is None else float(scale)) / float(divisor)
    softcap = getattr(text, "final_logit_softcapping", None)  # Gemma 2 and 3
    return (None if scale is None else float(scale)), (None if softcap is None else float(softcap))


def _forward(self: Any, *args: Any, head_loss: HeadLoss | None = None, **kwargs: Any) -> Any:
    if head_loss is None:
        return self._kd_original_forward(*args, **kwargs)
    kwargs.setdefault("use_cache", False)
    hidden = self.get_decoder()(*args, **kwargs).last_hidden_state  # [B, L, H]
    return {"loss": self.get_output_embeddings()(hidden, head_loss=head_loss)}


def _head_forward(self: nn.Module, hidden: Tensor, *args: Any, **kwargs: Any) -> Any:
    head_loss = kwargs.pop("head_loss", None)
    if head_loss is None:
        return self._kd_original_forward(hidden, *args, **kwargs)  # type: ignore[operator]
    return head_loss(as_hidden(self, hidden))


def as_hidden(head: Any, hidden: Tensor) -> Hidden:
    """Hidden states and the lm_head that would have read them, as a ``kd.Hidden``."""
    if hasattr(head, "modules_to_save"):  # peft trains a whole copy of the head
        active = head.active_adapters[0] if head.active_adapters else None
        copies = {} if head.disable_adapters else head.modules_to_save
        base = copies[active] if active in copies else head.original_module
    else:
        base = head.get_base_layer() if hasattr(head, "get_base_layer") else head
    return Hidden(
        hidden,
        base.weight,
        getattr(base, "bias", None),
        logit_scale=getattr(head, "_kd_scale", None),
        softcap=getattr(head, "_kd_softcap", None),
        lora=_lora(head),
    )


def _lora(head: Any) -> tuple[Tensor, Tensor, float] | None:
    """The active LoRA pair of a peft lm_head, or None."""
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
