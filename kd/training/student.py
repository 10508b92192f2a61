"""Put the loss where the lm_head is: a student's forward that never makes its logits.

A causal LM's own forward multiplies hidden states [B, L, H] with the lm_head and hands out logits
[B, L, V], which for a vocabulary of 152k are the largest tensor of the whole step. After
``prepare_student`` the model takes one more argument:

    model(input_ids=..., attention_mask=..., head_loss=function)

Then its own forward runs with an lm_head that lets its input through, and the lm_head module is
called once more, to compute ``function(kd.Hidden(hidden, weight, ...))`` (see ``kd.heads``). The
calls go through the model's and the lm_head's ``__call__``: DDP sees a forward, and FSDP2 and
ZeRO-3 gather the weight at their usual hooks. Without ``head_loss`` nothing changes.
"""

from __future__ import annotations

import re
from inspect import signature
from typing import Any

from kd.heads import causal_lm, install, lm_head, lora_pair, reading, refusal

# Arguments of a forward that hold images or sound, as transformers names them.
OTHER_INPUTS = re.compile("pixel|image|video|audio|input_features")


def prepare_student(model: Any) -> Any:
    """Give a causal LM the ``head_loss`` argument; calling it twice does no harm.

    Two forward passes of a few tokens compare the logits that the loss will stand for with the
    model's own, in eval mode, without gradient and without touching random state. A model on the
    meta device or already sharded (FSDP2, ZeRO-3) is compared in its first forward instead.

    Args:
        model: a transformers causal LM, or a peft model around one.

    Returns:
        The same object, changed in place.

    Raises:
        TypeError: it has no lm_head, is an encoder-decoder, reads images or sound, makes its logits
            in another way than by scale and softcap of its lm_head's product (with both numbers),
            or has a loss term that cannot be added without logits.
        ValueError: the lm_head's adapter is more than one pair of matrices.
    """
    causal = causal_lm(model)
    if lm_head(model) is None and hasattr(model, "module"):
        raise TypeError(
            f"prepare_student: model must not be wrapped yet, got {type(model).__name__}. Prepare "
            "the model inside it, before wrapping."
        )
    if lm_head(model) is None:
        raise TypeError(
            "prepare_student: model must be a causal LM with an lm_head, got "
            f"{type(model).__name__}. Load it with AutoModelForCausalLM."
        )
    other = [name for name in signature(causal.forward).parameters if OTHER_INPUTS.search(name)]
    if other:
        raise TypeError(
            f"prepare_student: model must read text only, got {type(causal).__name__}, which reads "
            f"{other[0]} too: batches hold tokens alone. Train its text model."
        )
    lora_pair(lm_head(model))
    found = reading(model)
    trouble = None if found is None else found.reason or found.weightless or found.untrainable
    if trouble is not None:
        raise TypeError(refusal("prepare_student", model, trouble))
    return install(model)
