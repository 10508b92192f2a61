"""From a chunk of logits to the few tokens of each row that are kept."""

from __future__ import annotations

import torch
from torch import Tensor


def top_k_rows(logits: Tensor, top_k: int, temperature: float) -> tuple[Tensor, Tensor]:
    """The k likeliest tokens of each row and their log-probabilities over all.

    Args:
        logits: [C, V] of any floating dtype; -inf is probability zero.
        top_k: how many.
        temperature: divides the logits.

    Returns:
        ids [C, k] int64, -1 where fewer than k tokens have a probability; log-probs [C, k]
        float32, in descending order.
    """
    logits = logits.float()
    values, ids = logits.topk(min(top_k, logits.shape[1]), dim=1)
    peak = values[:, :1]
    scaled = logits.sub(peak).mul_(1 / temperature)
    log_mass = scaled.exp_().sum(1, keepdim=True).log_()
    logprobs = (values - peak) / temperature - log_mass
    return ids.masked_fill_(logprobs == -torch.inf, -1), logprobs


def bad_rows(logits: Tensor) -> Tensor:
    """Rows [C] that are no distribution: a NaN, a +inf, or nothing above -inf."""
    peak = logits.amax(1)
    return ~torch.isfinite(peak)
