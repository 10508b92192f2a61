"""Rows across ranks: what crosses, and the losses and gradients that follow from it.

One SUM all-reduce of a few numbers a row makes every rank's statistics everyone's: each rank adds
into its own slot, so no MAX goes before it, nothing overflows, underflows or rounds on the way, and
every rank combines the same numbers in the same order. What only one rank has (the student's logits
at stored tokens and labels) is added beside the slots.
"""

from __future__ import annotations

import dataclasses
from types import ModuleType
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from kd.losses.rows import WIDE_TEMPERATURE, SparseRows, sparse_terms
from kd.losses.shards import Numbers, Tile, final_logits, merge, normaliser
from kd.losses.torch_backend import Problem, compute_dtype
from kd.losses.triton_backend import kernel_divergence


@dataclasses.dataclass(frozen=True)
class Shard:
    """Which columns are this rank's: tokens first..first + live of the vocabulary."""

    group: Any
    rank: int
    ranks: int
    first: int
    live: int

    def columns(self, ids: Tensor) -> Tensor:
        """Token ids as columns of this shard, -1 where they are another's."""
        local = ids - self.first
        return torch.where((local >= 0) & (local < self.live) & (ids >= 0), local, -1)

    def all_reduce(self, values: Tensor) -> Tensor:
        """The sum over ranks, in place."""
        dist.all_reduce(values, group=self.group)
        return values

    def exchange(self, stats: Tensor, owned: Tensor) -> tuple[Tensor, Tensor]:
        """([R, ranks, 7] of every rank, owned summed) in one SUM all-reduce.

        stats [R, 7] go to this rank's slot; owned [R, C] holds numbers of which one rank has each.
        """
        size = stats.shape[1]
        buffer = stats.new_zeros((len(stats), self.ranks * size + owned.shape[1]))
        buffer[:, self.rank * size : (self.rank + 1) * size] = stats
        buffer[:, self.ranks * size :] = owned
        self.all_reduce(buffer)
        slots, owned = buffer.split([self.ranks * size, owned.shape[1]], -1)
        return slots.reshape(-1, self.ranks, size), owned


@dataclasses.dataclass(frozen=True)
class Known:
    """What is left of a tile's forward for its backward: [R]-sized numbers, no columns."""

    losses: Tensor  # [R]
    numbers: Numbers
    columns: Tensor | None = None  # [R, K] stored tokens of this shard, -1 elsewhere
    soft: Tensor | None = None  # [R, K + 1] d loss / d z~
    hard: Tensor | None = None  # [R, K] softmax at T = 1, less one at the label


@dataclasses.dataclass(frozen=True)
class Sharded:
    """A loss over shards: the problem of this rank's columns, and how rows count."""

    problem: Problem  # vocab_size in the objective is the whole vocabulary's
    weight: Tensor  # [N]
    shard: Shard
    backend: ModuleType
    reduce_hidden: bool


def solve(tile: Tile, sparse: SparseRows | None, sharded: Sharded, label: Tensor | None) -> Known:
    """The losses of a tile's rows, across ranks. label [R] token ids where they enter the loss."""
    unit = sharded.backend.UNIT
    if label is None:
        owned = tile.weight.new_zeros((len(tile.weight), 0))
    else:
        assert tile.labels is not None
        owned = _picked(tile, tile.labels.unsqueeze(1))[0]
    if sparse is not None:
        known = _solve_sparse(tile, sparse, sharded, label, owned)
    else:
        known = _solve_dense(tile, sharded, owned, unit)
    return dataclasses.replace(known, losses=known.losses.masked_fill(tile.weight == 0, 0.0))


def _solve_dense(tile: Tile, sharded: Sharded, owned: Tensor, unit: float) -> Known:
    objective, backend, shard = tile.objective, sharded.backend, sharded.shard
    gap = ""
    if tile.teacher is not None:
        kind = kernel_divergence(objective.divergence)
        names = {"forward_kl": "forward", "reverse_kl": "reverse"}
        plain = objective.min_logprob is None and objective.temperature < WIDE_TEMPERATURE
        gap = names.get(kind, "neither") if plain else "neither"
    stats = backend.statistics(tile, gap=gap, hard=owned.shape[1] > 0)
    every, label_logit = shard.exchange(stats, owned.to(stats.dtype) / unit)
    value, numbers = merge(every, gap=gap, temperature=objective.temperature, unit=unit)
    if gap == "neither":
        value, h_sum = shard.all_reduce(backend.sums(tile, numbers)).double().split(1, -1)
        numbers = dataclasses.replace(numbers, h_sum=h_sum)
    loss = torch.zeros_like(numbers.s_top) if value is None else objective.kd_weight * value
    if owned.shape[1]:
        above = (numbers.s_top - label_logit) * objective.temperature + numbers.hard_log
        loss = loss + (objective.ce_weight * unit) * above
    return Known(loss.squeeze(1).to(stats.dtype), numbers)


def _picked(tile: Tile, columns: Tensor) -> tuple[Tensor, Tensor]:
    """(logits at the temperature in nats, their slope) at columns [R, K], 0 where it is -1."""
    if tile.student.shape[1] == 0:
        zeros = tile.weight.new_zeros(columns.shape, dtype=compute_dtype(tile.student.dtype))
        return zeros, zeros
    raw = tile.student.gather(1, columns.clamp(min=0))
    z, slope = final_logits(raw, tile.student_transform, tile.objective.temperature)
    slope = torch.ones_like(z) if slope is None else slope
    return z.masked_fill(columns < 0, 0.0), slope.masked_fill(columns < 0, 0.0)


def _solve_sparse(
    tile: Tile, sparse: SparseRows, sharded: Sharded, label: Tensor | None, owned: Tensor
) -> Known:
    """K stored tokens and a tail: each rank's tail is a number, and the rest is O(N * K)."""
    objective, backend, unit = tile.objective, sharded.backend, sharded.backend.UNIT
    temperature = objective.temperature
    columns, stored = sharded.shard.columns(sparse.ids), sparse.ids.shape[1]
    stats = backend.statistics(tile, gap="", hard=label is not None, ids=columns)
    at_ids, _ = _picked(tile, columns)
    every, owned = sharded.shard.exchange(stats, torch.cat([at_ids, owned], -1).to(stats.dtype))
    at_ids = owned[:, :stored].double().masked_fill(sparse.ids < 0, -torch.inf)
    tail_top, tail_log, _ = normaliser(every[..., 0], every[..., 1], unit)
    tail_top = unit * tail_top  # nats from here on
    # Relative to the row's largest logit, as a log-sum-exp is rounded to its own size.
    peak = torch.maximum(at_ids.amax(-1, keepdim=True), tail_top)
    tail = (tail_top - peak) + unit * tail_log
    outcomes = torch.cat([at_ids - peak, tail], -1)
    log_q = torch.log_softmax(outcomes, -1)
    value, soft = (x.to(stats.dtype) for x in _outcomes(sparse, log_q, tile))
    loss, soft = objective.kd_weight * value, objective.kd_weight * soft
    hard = None
    hard_log = torch.zeros_like(peak)
    if label is not None:
        peaks, _, _, _, _, _, hard_total = every.double().unbind(-1)
        tail_mass = hard_total * torch.exp((unit * peaks - peak) * temperature)
        tail_mass = torch.where(hard_total == 0, 0.0, tail_mass).sum(-1, keepdim=True)
        stored_mass = torch.exp((at_ids - peak) * temperature)
        hard_log = (tail_mass + stored_mass.sum(-1, keepdim=True)).log()
        above = (peak - owned[:, stored:].double()) * temperature + hard_log
        loss = loss + objective.ce_weight * above.squeeze(1).to(loss.dtype)
        hard = stored_mass / hard_log.exp() - (sparse.ids == label.unsqueeze(1)).double()
    zero = torch.zeros_like(peak)
    numbers = Numbers(peak / unit, tail / unit, zero, zero, zero, zero, hard_log / unit)
    return Known(loss, numbers, columns, soft, hard)


def _outcomes(sparse: SparseRows, log_q: Tensor, tile: Tile) -> tuple[Tensor, Tensor]:
    """(value [R], d value / d z~ [R, K + 1]) on the stored tokens and the tail."""
    log_p = torch.cat([sparse.log_p, sparse.log_tail], -1).to(log_q.dtype)
    p, q = log_p.exp(), log_q.exp()
    if sparse.tail == "drop":
        p[:, -1] = 0
    phi, h = sparse_terms(sparse.tail, p, q, log_p, log_q, tile.objective)
    return phi.sum(-1), h - q * h.sum(-1, keepdim=True)


def tile_gradient_(
    out: Tensor, tile: Tile, known: Known, coefficient: Tensor, backend: ModuleType, hard: bool
) -> None:
    """Write the gradient of sum(coefficient * losses) with respect to the tile's raw logits."""
    objective = tile.objective
    if known.columns is None:
        kind = "none"
        if tile.teacher is not None:
            kind = kernel_divergence(objective.divergence)
        backend.gradient_(out, tile, known.numbers, coefficient, kind=kind, hard=hard)
        return
    weight = coefficient.double().unsqueeze(1)
    assert known.soft is not None
    soft = known.soft * (weight / objective.temperature)
    numbers = dataclasses.replace(known.numbers, h_sum=soft[:, -1:])
    _, slope = _picked(tile, known.columns)
    backend.gradient_(out, tile, numbers, coefficient, kind="tail", hard=hard)
    if tile.student.shape[1] == 0 or known.columns.shape[1] == 0:
        return
    value = soft[:, :-1]
    if known.hard is not None:
        value = value + objective.ce_weight * weight * known.hard
    value = (value * slope).masked_fill(tile.weight.unsqueeze(1) == 0, 0.0).to(out.dtype)
    # Another shard's slots write to column 0 what belongs there: no host sync finds them.
    mine = known.columns >= 0
    at_zero = known.columns == 0
    first = torch.where(at_zero, value, torch.zeros_like(value)).sum(-1, keepdim=True)
    first = torch.where(at_zero.any(-1, keepdim=True), first, out[:, :1])
    out.scatter_(1, known.columns.clamp(min=0), torch.where(mine, value, first))
