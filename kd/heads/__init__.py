"""What a causal LM does between its last hidden states and its logits, read from its own forward.

Models differ there: some multiply the hidden states, transform or norm them; some scale, divide,
softcap or cut the logits; and a config may hold an attribute of such a name that the model ignores.
So nothing is read from names. The model's own forward runs, and its lm_head

- records its input, which is the hidden state [B, L, H] whatever was done to it, and
- returns a placeholder [B, L, 1] in place of the logits [B, L, V]: in training no logits are made.

Once per model, on a few tokens, the placeholder holds known numbers; what the model makes of them
is its scale and its softcap (``HeadReading``), and the logits so described must be the model's own.
"""

from __future__ import annotations

import dataclasses
import types
from typing import Any

import torch
from torch import Tensor

from kd.heads.observing import (
    HeadLoss,
    Unlike,
    causal_lm,
    lm_head,
    observing,
    text_config,
    undisturbed,
    without_logits,
)
from kd.heads.reading import HeadReading, measure, reading
from kd.heads.weights import as_hidden, dense_logits, lora_pair
from kd.losses import Hidden


def install(model: Any) -> Any:
    """Give a causal LM's forward the ``head_loss`` argument; twice does no harm.

    ``model(..., head_loss=function)["loss"]`` is ``function(kd.Hidden(...))`` of the last hidden
    states [B, L, H], computed inside the lm_head's ``__call__``; ``["aux_loss"]`` is what the model
    itself adds to its loss (times its own coefficient), or None.
    """
    causal = causal_lm(model)
    if getattr(causal, "_kd_original_forward", None) is None:
        causal._kd_original_forward = causal.forward
        causal.forward = types.MethodType(_forward, causal)
    return model


def final_hidden(model: Any, **inputs: Any) -> Hidden:
    """A causal LM's last hidden states [B, L, H] with its lm_head, detached.

    Raises:
        TypeError: its logits are not the lm_head's product with them, scaled and softcapped.
    """
    install(model)
    with torch.no_grad():
        said = model(**inputs, head_loss=lambda seen: seen)["loss"]
    fixed = {
        field.name: value.detach()
        for field in dataclasses.fields(said)
        if isinstance(value := getattr(said, field.name), Tensor)
    }
    return dataclasses.replace(said, **fixed)


@torch.compiler.disable(recursive=False)  # the model's own forward is compiled, the loss is not
def _forward(self: Any, *args: Any, head_loss: HeadLoss | None = None, **kwargs: Any) -> Any:
    if head_loss is None:
        return self._kd_original_forward(*args, **kwargs)
    found = reading(self) or measure(self)  # sharded or on meta when it was prepared
    trouble = found.reason or found.weightless
    if trouble is None and torch.is_grad_enabled():
        trouble = found.untrainable
    if trouble is not None:
        raise TypeError(refusal("head_loss", self, trouble))
    try:
        head, hidden, output = without_logits(self, args, kwargs, labels=found.takes_labels)
    except Unlike as error:
        raise TypeError(refusal("head_loss", self, str(error))) from error
    loss = head(hidden, head_loss=lambda seen: head_loss(found.described(seen)))
    return {"loss": loss, "aux_loss": output.loss if found.takes_labels else None}


def refusal(where: str, model: Any, reason: str) -> str:
    """The words of a refusal, with the way out."""
    return (
        f"{where}: model must make its logits by its lm_head from hidden states, scaled and "
        f"softcapped at most, got {type(causal_lm(model)).__name__}: {reason}. Give its logits to "
        "kd.distillation_loss or kd.cross_entropy in a loop of your own."
    )


__all__ = [
    "HeadReading",
    "as_hidden",
    "causal_lm",
    "dense_logits",
    "final_hidden",
    "install",
    "lm_head",
    "lora_pair",
    "observing",
    "reading",
    "refusal",
    "text_config",
    "undisturbed",
]
