"""The tail of a sparse teacher: the probability outside its K tokens, at the loss temperature.

With l the log-probabilities at the capture temperature T_c and u = T_c / T, the K + 1 outcomes at
T have the masses exp(u * l_i) of the K tokens and exp(A(u)) of the tail, normalised, where

    A(u) = log(sum over the tail of exp(u * l_j))

is the tail's log-partition. A sparse teacher knows A(1), what its tokens leave to one, and no more.
One with ``tail_log_partition`` knows A at some temperatures, and A is smooth in u: the polynomial
through them gives it at any temperature between.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from kd.losses.inputs import TAIL_RULES, TopK


def resolution(dtype: torch.dtype) -> float:
    """The least tail that log-probabilities of a type can tell from none."""
    return torch.finfo(dtype).eps if dtype == torch.float64 else 1e-7


def log_complement(logprobs: Tensor) -> Tensor:
    """log(1 - sum(exp(logprobs))) over the last dimension, kept: the log-mass of the tail.

    Summed in float64, and never below the resolution of the stored log-probs (1e-7 for float32):
    what is left of a saturated row is then their rounding, and a tail of exactly zero would turn
    that rounding into an infinite reverse KL.
    """
    least = resolution(logprobs.dtype)
    log_mass = torch.logsumexp(logprobs.double(), -1, keepdim=True).clamp(max=-least)
    return torch.log(-torch.expm1(log_mass)).to(logprobs.dtype)


def covers(tail_temperatures: Sequence[float], temperature: float) -> bool:
    """Whether a temperature lies between those that the tail was stored at."""
    return bool(tail_temperatures) and (
        min(tail_temperatures) <= temperature <= max(tail_temperatures)
    )


def log_partition(teacher: TopK, rows: Any, temperature: float) -> Tensor | None:
    """A at a temperature, [R, 1]; None where it is not stored around that temperature.

    The polynomial in 1 / T through the stored values: at one of them it is that value.
    """
    stored, temperatures = teacher.tail_log_partition, teacher.tail_temperatures
    if stored is None or not covers(temperatures, temperature):
        return None
    stored = stored[rows].double()  # [R, M]
    value = torch.zeros_like(stored[:, :1])
    for number, weight in enumerate(lagrange([1 / t for t in temperatures], 1 / temperature)):
        value = value + weight * stored[:, number : number + 1]
    # A tail without a token is without one at every temperature.
    return torch.where((stored == -torch.inf).any(-1, keepdim=True), -torch.inf, value)


def lagrange(nodes: Sequence[float], at: float) -> list[float]:
    """The weights of values at ``nodes`` in their polynomial's value at ``at``."""
    return [
        math.prod((at - other) / (node - other) for other in nodes if other != node)
        for node in nodes
    ]


def at_temperature(
    logprobs: Tensor,
    log_tail: Tensor,
    tail_tokens: Tensor,
    ratio: float,
    stored: Tensor | None,
    rule: str | None,
) -> tuple[Tensor, Tensor]:
    """Log-probs captured at T_c moved to T, with ratio = T_c / T.

    logprobs [N, K], log_tail [N, 1], tail_tokens [N, 1]; returns the same shapes. stored [N, 1] is
    A(ratio) where it is known. Else the tail is raised to ``ratio`` as ``tail_tokens`` equal
    tokens, or as one ("one_outcome").
    """
    if ratio == 1:
        if stored is not None:  # below three digits, what the K tokens leave is their rounding
            rounded = log_tail < math.log(1e3 * resolution(logprobs.dtype))
            stored = torch.where(stored == -torch.inf, log_tail, stored.to(log_tail.dtype))
            log_tail = torch.where(rounded, stored, log_tail)
        return logprobs, log_tail
    dtype, logprobs, log_tail = logprobs.dtype, logprobs.double(), log_tail.double()
    entries = torch.where(logprobs == -torch.inf, logprobs, logprobs * ratio)
    if stored is not None:
        tail = stored
    else:
        count = tail_tokens.double().clamp(min=1).log()
        count = torch.zeros_like(count) if rule == "one_outcome" else count
        tail = (log_tail - count) * ratio + count
    tail = torch.where(log_tail == -torch.inf, log_tail, tail)
    both = torch.cat([entries, tail], -1)
    norm = torch.logsumexp(both, -1, keepdim=True)
    nothing = norm == -torch.inf  # neither an entry nor a tail: it says nothing, as before
    norm = torch.where(nothing, 0.0, norm)
    moved = torch.where(nothing, log_tail, tail - norm)
    return (entries - norm).to(dtype), moved.to(dtype)


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
