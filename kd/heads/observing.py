"""A causal LM's forward without logits: what its lm_head sees, and what it adds to its loss."""

from __future__ import annotations

import contextlib
import inspect
import types
from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import Tensor

from kd.heads.weights import as_hidden
from kd.losses import Hidden

HeadLoss = Callable[[Hidden], Any]


class Unlike(Exception):
    """Why a model is not a decoder with one lm_head."""


def causal_lm(model: Any) -> Any:
    """The transformers model inside a peft model; any other as it is."""
    return model.get_base_model() if hasattr(model, "get_base_model") else model


def lm_head(model: Any) -> Any:
    """A model's output embeddings, or None."""
    find = getattr(causal_lm(model), "get_output_embeddings", None)
    return find() if callable(find) else None


def text_config(config: Any) -> Any:
    """The part of a config that describes the text model; the config itself, or None, otherwise."""
    return config.get_text_config() if hasattr(config, "get_text_config") else config


def own_forward(causal: Any) -> Any:
    """A model's forward as it was before it had a ``head_loss`` argument."""
    return getattr(causal, "_kd_original_forward", None) or causal.forward


def takes(function: Any, name: str) -> bool:
    """Whether a function can be given a keyword argument."""
    parameters = inspect.signature(function).parameters
    return name in parameters or any(p.kind is p.VAR_KEYWORD for p in parameters.values())


def without_logits(
    causal: Any, args: Any, kwargs: Any, *, labels: bool, probe: Tensor | None = None
) -> tuple[Any, Tensor, Any]:
    """The model's own forward with a placeholder for logits: (lm_head, its input, output)."""
    forward = own_forward(causal)
    if takes(forward, "use_cache"):
        kwargs.setdefault("use_cache", False)
    if labels:  # their values are never looked at: ``no_loss`` stands for the loss
        given = kwargs.get("input_ids", args[0] if args else None)
        kwargs["labels"] = kwargs["inputs_embeds"][..., 0].long() if given is None else given
    with observing(causal, probe) as seen, loss_replaced(causal, no_loss):
        output = forward(*args, **kwargs)
    if len(seen) != 1:
        raise Unlike(f"it calls its lm_head {len(seen)} times in a forward")
    return lm_head(causal), seen[0], output


@contextlib.contextmanager
def observing(model: Any, probe: Tensor | None = None) -> Iterator[list[Tensor]]:
    """While open, the model's lm_head makes no logits; the list yielded receives its inputs.

    ``probe`` is what it returns, zeros [..., 1] by default.
    """
    head = _watched(lm_head(model))
    seen: list[Tensor] = []
    head._kd_seen, head._kd_probe = seen, probe
    try:
        yield seen
    finally:
        head._kd_seen = head._kd_probe = None


def _watched(head: Any) -> Any:
    """The lm_head with a forward that can be observed.

    Where accelerate has put a hook around it, inside that hook, which brings the weights.
    """
    if "_kd_head_forward" not in vars(head):
        name = "_old_forward" if hasattr(head, "_hf_hook") else "forward"
        head._kd_seen = head._kd_probe = None
        head._kd_head_forward = getattr(head, name)
        setattr(head, name, types.MethodType(_head_forward, head))
    return head


def _head_forward(
    self: Any, hidden: Tensor, *args: Any, head_loss: HeadLoss | None = None, **kwargs: Any
) -> Any:
    if head_loss is not None:
        return _loss_at(head_loss, self, hidden)
    if self._kd_seen is None:
        return self._kd_head_forward(hidden, *args, **kwargs)
    self._kd_seen.append(hidden)
    if self._kd_probe is not None:
        return self._kd_probe
    return hidden.new_zeros((*hidden.shape[:-1], 1))


@torch.compiler.disable  # kernels and their gradients in one: nothing for a compiler to do
def _loss_at(head_loss: HeadLoss, head: Any, hidden: Tensor) -> Any:
    return head_loss(as_hidden(head, hidden))


def no_loss(logits: Any, *args: Any, **kwargs: Any) -> Tensor:
    """Stands for a model's ``loss_function``: what is left of its loss is what it adds to it."""
    return torch.zeros((), device=logits.device)


@contextlib.contextmanager
def loss_replaced(causal: Any, function: Callable[..., Tensor]) -> Iterator[None]:
    """While open, a model's ``loss_function`` is another."""
    before = vars(causal).get("_loss_function")
    causal._loss_function = function
    try:
        yield
    finally:
        del causal._loss_function
        if before is not None:
            causal._loss_function = before


@contextlib.contextmanager
def undisturbed(model: Any) -> Iterator[None]:
    """While open, a model is in eval mode; its modes and the random state come back."""
    modes = [(module, module.training) for module in model.modules()]
    devices = [d for d in {p.device for p in model.parameters()} if d.type == "cuda"]
    model.eval()
    try:
        with torch.random.fork_rng(devices=devices):
            yield
    finally:
        for module, mode in modes:
            module.training = mode
