"""A sparse teacher: K tokens and a tail, moved to the loss temperature and compared.

``canonical`` gives its rows with unique ids at the loss temperature, whatever was stored.

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

from kd.losses.divergences import bounded_terms, head_mask, raw_terms
from kd.losses.inputs import TopK
from kd.losses.problem import Objective, SparseRows


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


def merge_duplicates(ids: Tensor, logprobs: Tensor) -> tuple[Tensor, Tensor]:
    """Sum the probabilities of ids that repeat in a row.

    ids, logprobs: [N, K]. Returns the same shapes, freed slots at id -1 and -inf. Empty slots
    (id -1) come back with log-prob -inf whatever they held.
    """
    logprobs = logprobs.masked_fill(ids < 0, -torch.inf)
    if ids.shape[1] < 2:
        return ids, logprobs
    sorted_ids, order = ids.sort(dim=1, stable=True)
    repeats = (sorted_ids[:, 1:] == sorted_ids[:, :-1]) & (sorted_ids[:, 1:] >= 0)
    looks = ids.device.type == "cpu" and not torch.compiler.is_compiling()  # free, no sync
    if looks and not bool(repeats.any()):
        return ids, logprobs
    log_sorted = logprobs.gather(1, order)
    first = torch.ones_like(sorted_ids, dtype=torch.bool)
    first[:, 1:] = ~repeats
    group = first.cumsum(1) - 1  # [N, K] slot of the run that an entry belongs to
    peak = torch.full_like(log_sorted, -torch.inf).scatter_reduce(1, group, log_sorted, "amax")
    shift = peak.clamp(min=torch.finfo(peak.dtype).min)
    mass = torch.zeros_like(log_sorted).scatter_add(
        1, group, (log_sorted - shift.gather(1, group)).exp()
    )
    merged = torch.full_like(ids, -1).scatter(1, group, sorted_ids)
    return merged, torch.where(merged < 0, -torch.inf, shift + mass.log())


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


def canonical(
    teacher: TopK, rows: Tensor | slice, objective: Objective, dtype: torch.dtype
) -> SparseRows:
    """Rows of a teacher: repeats merged, the tail split off, at the loss temperature."""
    ids = teacher.ids[rows].long()
    stored = teacher.logprobs[rows]
    stored = stored if stored.dtype == torch.float64 else stored.float()
    ids, log_p = merge_duplicates(ids, stored)
    tail_tokens = objective.vocab_size - (ids >= 0).sum(-1, keepdim=True)
    log_tail = log_complement(log_p)
    if teacher.tail == "renormalize":
        norm = torch.logsumexp(log_p, -1, keepdim=True)
        # A row without an entry has nothing to rescale: all in the tail, it says nothing.
        log_tail = torch.where(norm == -torch.inf, 0.0, -torch.inf).to(log_tail.dtype)
        log_p = torch.where(norm == -torch.inf, log_p, log_p - norm)
    log_tail = log_tail.masked_fill(tail_tokens == 0, -torch.inf)
    ratio = teacher.temperature / objective.temperature
    known = None
    if teacher.tail_log_partition is not None:
        known = log_partition(teacher, rows, objective.temperature)
    if ratio != 1 or known is not None:
        log_p, log_tail = at_temperature(
            log_p, log_tail, tail_tokens, ratio, known, teacher.tail_at_temperature
        )
    return SparseRows(ids, log_p.to(dtype), log_tail.to(dtype), teacher.tail)


def densify(sparse: SparseRows, vocab_size: int, first: int, columns: int) -> Tensor:
    """Log-probs [R, columns], from token ``first`` on, where the tail is spread evenly over the
    other tokens of the vocabulary."""
    count = (vocab_size - (sparse.ids >= 0).sum(-1, keepdim=True)).to(sparse.log_p.dtype)
    fill = sparse.log_tail - count.clamp(min=1).log()
    # One column past the end takes the empty slots, and tokens outside the columns.
    dense = fill.expand(-1, columns + 1).clone()
    index = sparse.ids - first
    index = torch.where((sparse.ids < 0) | (index < 0) | (index >= columns), columns, index)
    return dense.scatter_(1, index, sparse.log_p)[:, :columns]


def outcome_terms(sparse: SparseRows, log_q: Tensor, objective: Objective) -> tuple[Tensor, Tensor]:
    """(value [R], d value / d z~ [R, K + 1]) on the outcomes: K stored tokens and the tail.

    log_q [R, K + 1] float64. With tail="drop" p holds raw masses and no distribution.
    """
    d, bound = objective.divergence, objective.min_logprob
    log_p = torch.cat([sparse.log_p, sparse.log_tail], -1).to(log_q.dtype)
    p, q = log_p.exp(), log_q.exp()
    if sparse.tail == "drop":
        p[:, -1] = 0
        phi, h = raw_terms(p, log_p, log_q, bound)
    else:
        head = head_mask(p, d.head_mass) if d.needs_head else None
        phi, h = bounded_terms(d, p, q, log_p, log_q, bound, head)
    return phi.sum(-1), h - q * h.sum(-1, keepdim=True)
