"""Which layers of a model matter least, and the model without them."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor


@torch.no_grad()
def block_influence(model: Any, blocks: Sequence[Tensor], batch_size: int = 4) -> list[float]:
    """How much each layer turns its input: 1 - cosine(input, output), mean over tokens.

    Args:
        model: a causal LM whose decoder has ``layers``.
        blocks: 1-D token ids, all of one length.
        batch_size: blocks in a forward pass.
    """
    layers = model.get_decoder().layers
    sums, rows = [0.0] * len(layers), 0

    def watch(index: int) -> Any:
        def hook(_: Any, inputs: Any, options: Any, output: Any) -> None:
            before = inputs[0] if inputs else options["hidden_states"]
            after = output[0] if isinstance(output, tuple) else output
            cosine = torch.cosine_similarity(before.float(), after.float(), dim=-1)
            sums[index] += float((1 - cosine).sum())

        return hook

    hooks = [
        layer.register_forward_hook(watch(i), with_kwargs=True) for i, layer in enumerate(layers)
    ]
    device = next(model.parameters()).device
    try:
        for start in range(0, len(blocks), batch_size):
            batch = torch.stack(list(blocks[start : start + batch_size])).to(device)
            model.get_decoder()(input_ids=batch, use_cache=False)
            rows += batch.numel()
    finally:
        for hook in hooks:
            hook.remove()
    return [total / rows for total in sums]


def least_influential(influence: Sequence[float], count: int) -> list[int]:
    """The ``count`` layers with the least influence, in the model's order.

    Raises:
        ValueError: no layer would be left.
    """
    if not 0 <= count < len(influence):
        raise ValueError(
            f"heal: drop_layers must be from 0 to {len(influence) - 1}, got {count}: the model has "
            f"{len(influence)} layers and must keep one."
        )
    return sorted(sorted(range(len(influence)), key=lambda i: influence[i])[:count])


def without_layers(model: Any, dropped: Sequence[int]) -> Any:
    """The same model object without some layers, renumbered, with a config that says so."""
    decoder = model.get_decoder()
    kept = [layer for i, layer in enumerate(decoder.layers) if i not in set(dropped)]
    types = getattr(model.config, "layer_types", None)
    for number, layer in enumerate(kept):
        if hasattr(layer, "self_attn"):
            layer.self_attn.layer_idx = number  # its place in the key-value cache
    decoder.layers = torch.nn.ModuleList(kept)
    model.config.num_hidden_layers = len(kept)
    if types is not None:
        model.config.layer_types = [t for i, t in enumerate(types) if i not in set(dropped)]
    return model
