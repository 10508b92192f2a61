"""What a loss compares: logits, hidden states with their lm_head, or a sparse top-k teacher."""

from __future__ import annotations

import dataclasses
from typing import TypeAlias

from torch import Tensor

TAILS = ("bucket", "renormalize", "drop", "uniform")
TAIL_RULES = ("spread", "one_outcome")
MAX_TAIL_TEMPERATURES = 16


@dataclasses.dataclass(frozen=True)
class Hidden:
    """Logits that are never materialised: softcap(logit_scale * (hidden @ weight.T + bias)).

    Attributes:
        hidden: [..., H] final hidden states.
        weight: [V, H], the lm_head's weight as ``nn.Linear`` holds it. A DTensor is gathered.
        bias: [V] or None.
        logit_scale: multiplies the logits (Cohere, Granite); None is 1.
        softcap: cap * tanh(logits / cap) after the scale (Gemma 2); None is no cap.
        lora: (A [r, H], B [V, r], scaling): adds scaling * hidden @ A.T @ B.T before the scale.
    """

    hidden: Tensor
    weight: Tensor
    bias: Tensor | None = None
    logit_scale: float | None = None
    softcap: float | None = None
    lora: tuple[Tensor, Tensor, float] | None = None


@dataclasses.dataclass(frozen=True)
class TopK:
    """A sparse teacher: K tokens with log-probabilities, and a rule for the mass outside them.

    Attributes:
        ids: [..., K] integer token ids; -1 is an empty slot. Ids that repeat in a row are summed.
        logprobs: [..., K] natural-log probabilities over the whole live vocabulary. A row may sum
            to less than 1, and to more by rounding (1e-2, looked at on a CPU); used as they are.
            The tail is never less than their resolution: 1e-7, 2e-16 for float64.
        tail: what the remaining mass means:
            "bucket": one further outcome (default; every divergence, on K+1 outcomes);
            "renormalize": the K probabilities are rescaled to sum to one; the rest is zero, as
            one outcome (which alpha_beta and min_logprob can tell). A row without entries counts 0;
            "drop": the K masses as they are and nothing else: unbiased for sampled targets,
            forward KL only;
            "uniform": spread evenly over the other live tokens.
        temperature: the one the log-probs were captured at. "renormalize" and "uniform" say all
            that a loss at another temperature needs; "drop" has none; "bucket" needs one of:
        tail_log_partition: [..., M] log(sum over the tail of p ** (temperature / t)) at the M
            ``tail_temperatures`` t, as the cache stores it ("bucket" and "uniform"; -inf: no tail).
            A loss at any temperature between has the tail's mass to the polynomial through them
            (kd.losses.tails), and the K entries exactly.
        tail_temperatures: M different temperatures > 0, at most 16.
        tail_at_temperature: what a "bucket" is raised as at a temperature that is not stored:
            "spread" over the other live tokens evenly (it swells as T grows), or "one_outcome"
            (one token of its mass; it shrinks). None refuses such a loss.
    """

    ids: Tensor
    logprobs: Tensor
    tail: str = "bucket"
    temperature: float = 1.0
    tail_log_partition: Tensor | None = None
    tail_temperatures: tuple[float, ...] = ()
    tail_at_temperature: str | None = None


Student: TypeAlias = "Tensor | Hidden"
Teacher: TypeAlias = "Tensor | Hidden | TopK"
