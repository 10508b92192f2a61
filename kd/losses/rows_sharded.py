"""Rows across ranks that hold parts of the vocabulary: what crosses, and what follows from it.

One SUM all-reduce of a few numbers a row makes every rank's statistics everyone's: each rank adds
into its own slot, so no MAX goes before it, nothing overflows, underflows or rounds on the way, and
every rank combines the same numbers in the same order. What only one rank has (the student's logits
at stored tokens and labels) is added beside the slots. A rank's own part: kd.losses.columns.
"""

from __future__ import annotations

import dataclasses
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from kd.losses.columns import (
    IN_TORCH,
    Columns,
    Numbers,
    by_kernels,
    compute_dtype,
    final_logits,
    times,
)
from kd.losses.problem import Backend, SparseRows, Tile
from kd.losses.rows_torch import WIDE_TEMPERATURE
from kd.losses.sparse import densify, outcome_terms


@dataclasses.dataclass(frozen=True)
class Shard:
    """Which columns are this rank's: tokens first..first + live of the vocabulary."""

    group: Any
    rank: int
    ranks: int
    first: int
    live: int
    reduce_hidden: bool

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


def backend(shard: Shard, on_triton: bool) -> Backend:
    """A backend for one loss; what crossed ranks in a forward without gradients is kept, so that
    its backward needs no collective but the hidden states' own."""
    kept: dict[int, Known] = {}
    parts = by_kernels() if on_triton else IN_TORCH

    def rows(tile: Tile) -> Tensor:
        tile, sparse, label = _of_this_rank(tile, shard)
        known = kept.get(tile.first)
        if known is None:
            known = solve(tile, sparse, label, shard, parts)
        if tile.gradient is None:
            kept[tile.first] = known
        else:
            tile_gradient_(tile, known, parts)
        return known.losses

    return Backend(rows, wide=on_triton, fused=on_triton)


def _of_this_rank(tile: Tile, shard: Shard) -> tuple[Tile, SparseRows | None, Tensor | None]:
    """(the tile with this rank's columns alone, a sparse teacher's rows, labels as token ids)."""
    teacher, transform, sparse = tile.teacher, tile.teacher_transform, None
    if isinstance(teacher, SparseRows):
        sparse, teacher = teacher, None
        if sparse.tail == "uniform":  # log-probs, which are at the temperature already
            teacher = densify(sparse, tile.objective.vocab_size, shard.first, shard.live)
            transform, sparse = (tile.objective.temperature, None), None
    label = None if tile.labels is None else tile.labels.long()
    weight = tile.student.new_ones(len(tile.student)) if tile.weight is None else tile.weight
    local = dataclasses.replace(
        tile,
        student=tile.student[:, : shard.live],
        teacher=None if teacher is None else teacher[:, : shard.live],
        labels=None if label is None else shard.columns(label),
        weight=weight,
        teacher_transform=transform,
    )
    return local, sparse, label


def solve(
    tile: Tile, sparse: SparseRows | None, label: Tensor | None, shard: Shard, parts: Columns
) -> Known:
    """The losses of a tile's rows, across ranks. label [R] token ids where they enter the loss."""
    assert tile.weight is not None
    if label is None:
        owned = tile.weight.new_zeros((len(tile.weight), 0))
    else:
        assert tile.labels is not None
        owned = _picked(tile, tile.labels.unsqueeze(1))[0]
    if sparse is not None:
        known = _solve_sparse(tile, sparse, shard, parts, label, owned)
    else:
        known = _solve_dense(tile, shard, parts, owned)
    return dataclasses.replace(known, losses=known.losses.masked_fill(tile.weight == 0, 0.0))


def normaliser(peak: Tensor, total: Tensor, unit: float) -> tuple[Tensor, Tensor, Tensor]:
    """(top [R, 1], log-sum above it [R, 1], each rank's share [R, ranks]) in float64."""
    peak, total = peak.double(), total.double()
    top = peak.amax(-1, keepdim=True).clamp(min=-1e30)
    mass = times(total, torch.exp((peak - top) * unit))
    whole = mass.sum(-1, keepdim=True)
    return top, whole.log() / unit, mass / whole


def merge(
    stats: Tensor, *, gap: str, temperature: float, unit: float
) -> tuple[Tensor | None, Numbers]:
    """(value [R, 1] in nats where the gap gives it, the rows' numbers) of every rank's statistics.

    stats: [R, ranks, 7], the same on every rank, so the results are too.
    """
    peak, total, t_peak, t_total, reference, mean, hard = stats.double().unbind(-1)
    s_top, s_log, s_share = normaliser(peak, total, unit)
    s_log = s_log.masked_fill(s_log == -torch.inf, torch.nan)  # no token lives: no distribution
    zero = torch.zeros_like(s_top)
    t_top, t_log, t_share = (zero, zero, zero)
    if gap:
        t_top, t_log, t_share = normaliser(t_peak, t_total, unit)
        t_log = t_log.masked_fill(t_log == -torch.inf, torch.nan)
    value, h_sum, shift = None, zero, zero
    if gap == "forward":
        mean_gap = times(t_share, reference + mean).sum(-1, keepdim=True)
        value = unit * (mean_gap + (s_top - t_top) + (s_log - t_log))
    elif gap == "reverse":
        mean_gap = times(s_share, reference + mean).sum(-1, keepdim=True)
        value = unit * (mean_gap + (t_top - s_top) + (t_log - s_log))
        shift = reference.gather(1, s_share.nan_to_num(-1.0).argmax(-1, keepdim=True))
        h_sum = unit * times(s_share, (reference - shift) + mean).sum(-1, keepdim=True)
    hard_mass = times(hard, torch.exp((peak - s_top) * (unit * temperature)))
    hard_log = hard_mass.sum(-1, keepdim=True).log() / unit
    return value, Numbers(s_top, s_log, t_top, t_log, h_sum, shift, hard_log)


def _solve_dense(tile: Tile, shard: Shard, parts: Columns, owned: Tensor) -> Known:
    objective, unit = tile.objective, parts.unit
    gap = ""
    if tile.teacher is not None:
        kind = objective.divergence.kernel
        names = {"forward_kl": "forward", "reverse_kl": "reverse"}
        plain = objective.min_logprob is None and objective.temperature < WIDE_TEMPERATURE
        gap = names.get(kind, "neither") if plain else "neither"
    stats = parts.statistics(tile, gap=gap)
    every, label_logit = shard.exchange(stats, owned.to(stats.dtype) / unit)
    value, numbers = merge(every, gap=gap, temperature=objective.temperature, unit=unit)
    if gap == "neither":
        value, h_sum = shard.all_reduce(parts.sums(tile, numbers)).double().split(1, -1)
        numbers = dataclasses.replace(numbers, h_sum=h_sum)
    loss = torch.zeros_like(numbers.s_top) if value is None else objective.kd_weight * value
    if owned.shape[1]:
        above = (numbers.s_top - label_logit) * objective.temperature + numbers.hard_log
        loss = loss + (objective.ce_weight * unit) * above
    return Known(loss.squeeze(1).to(stats.dtype), numbers)


def _picked(tile: Tile, columns: Tensor) -> tuple[Tensor, Tensor]:
    """(logits at the temperature in nats, their slope) at columns [R, K], 0 where it is -1."""
    if tile.columns == 0:
        zeros = tile.student.new_zeros(columns.shape, dtype=compute_dtype(tile.student))
        return zeros, zeros
    raw = tile.student.gather(1, columns.clamp(min=0))
    z, slope = final_logits(raw, tile.student_transform, tile.objective.temperature)
    slope = torch.ones_like(z) if slope is None else slope
    return z.masked_fill(columns < 0, 0.0), slope.masked_fill(columns < 0, 0.0)


def _solve_sparse(
    tile: Tile,
    sparse: SparseRows,
    shard: Shard,
    parts: Columns,
    label: Tensor | None,
    owned: Tensor,
) -> Known:
    """K stored tokens and a tail: each rank's tail is a number, and the rest is O(N * K)."""
    objective, unit = tile.objective, parts.unit
    temperature = objective.temperature
    columns, stored = shard.columns(sparse.ids), sparse.ids.shape[1]
    stats = parts.statistics(tile, ids=columns)
    at_ids, _ = _picked(tile, columns)
    every, owned = shard.exchange(stats, torch.cat([at_ids, owned], -1).to(stats.dtype))
    at_ids = owned[:, :stored].double().masked_fill(sparse.ids < 0, -torch.inf)
    tail_top, tail_log, _ = normaliser(every[..., 0], every[..., 1], unit)
    tail_top = unit * tail_top  # nats from here on
    # Relative to the row's largest logit, as a log-sum-exp is rounded to its own size.
    peak = torch.maximum(at_ids.amax(-1, keepdim=True), tail_top)
    tail = (tail_top - peak) + unit * tail_log
    outcomes = torch.cat([at_ids - peak, tail], -1)
    log_q = torch.log_softmax(outcomes, -1)
    value, soft = (x.to(stats.dtype) for x in outcome_terms(sparse, log_q, objective))
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


def tile_gradient_(tile: Tile, known: Known, parts: Columns) -> None:
    """Write the gradient of sum(weight * losses) with respect to the tile's raw logits."""
    objective, out = tile.objective, tile.gradient
    assert out is not None and tile.weight is not None
    if known.columns is None:
        kind = "none"
        if tile.teacher is not None:
            kind = objective.divergence.kernel
        parts.gradient_(tile, known.numbers, kind=kind)
        return
    weight = tile.weight.double().unsqueeze(1)
    assert known.soft is not None
    soft = known.soft * (weight / objective.temperature)
    numbers = dataclasses.replace(known.numbers, h_sum=soft[:, -1:])
    _, slope = _picked(tile, known.columns)
    parts.gradient_(tile, numbers, kind="tail")
    if tile.columns == 0 or known.columns.shape[1] == 0:
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
