"""One rank's columns of a vocabulary in shards: its part of its rows' sums, then its gradient.

``statistics``, ``sums`` and ``gradient_`` of a tile, in torch; ``kernels`` has the same three by
Triton. What lies between crosses ranks (kd.losses.rows_sharded).

A statistic is kept with the peak it is relative to, so nothing overflows or underflows: the ranks'
sums meet at the largest peak, in float64. A tile's labels are columns of this shard here, -1 where
the label is another rank's.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import Tensor

from kd.losses.divergences import bounded_terms
from kd.losses.problem import Tile
from kd.losses.rows_torch import WIDE_TEMPERATURE, add_at_ids_, block_rows, hide_at_ids_
from kd.losses.rows_triton import final, kernel_numbers, rowwise

STATISTICS = 7
"""Student peak and sum, teacher peak and sum, reference and mean of the gap, sum at T = 1."""


def compute_dtype(raw: Tensor) -> torch.dtype:
    return torch.float64 if raw.dtype == torch.float64 else torch.float32


@dataclasses.dataclass(frozen=True)
class Columns:
    """The three functions of a backend, and the unit of its logits in nats."""

    statistics: Callable[..., Tensor]
    sums: Callable[..., Tensor]
    gradient_: Callable[..., None]
    unit: float


@dataclasses.dataclass(frozen=True)
class Numbers:
    """What every rank knows of each row, [R, 1] each, in the backend's unit.

    softmax of the student is exp(unit * ((z - s_top) - s_log)), the teacher's likewise, and the
    student's at temperature 1 exp(unit * ((z - s_top) * T - hard_log)).
    """

    s_top: Tensor
    s_log: Tensor
    t_top: Tensor
    t_log: Tensor
    h_sum: Tensor  # nats
    shift: Tensor
    hard_log: Tensor

    def stacked(self, dtype: torch.dtype) -> Tensor:
        found = [getattr(self, f.name) for f in dataclasses.fields(self)]
        return torch.cat([*found, self.s_log - self.t_log], -1).to(dtype)


def final_logits(
    raw: Tensor, transform: tuple[float | None, float | None], temperature: float
) -> tuple[Tensor, Tensor | None]:
    """(final logits / T in the compute dtype, d final / d raw but for T where it is not 1)."""
    scale, cap = transform
    z = raw.to(compute_dtype(raw), copy=True)
    slope = None
    if scale is not None:
        z.mul_(scale)
    if cap is not None:
        z.div_(cap).tanh_()
        slope = 1 - z.square()
        z.mul_(cap)
    if scale is not None:
        slope = torch.full_like(z, scale) if slope is None else slope * scale
    return z.mul_(1 / temperature), slope


def _blocks(tile: Tile) -> Iterator[slice]:
    step = block_rows(max(1, tile.columns), tile.student.device)
    for start in range(0, len(tile.student), step):
        yield slice(start, start + step)


def _mass(z: Tensor) -> tuple[Tensor, Tensor]:
    """(peak [R], exp(z - peak) [R, live]); a row of -inf has a mass of zero."""
    peak = z.amax(-1)
    return peak, torch.exp(z - peak.clamp(min=torch.finfo(z.dtype).min).unsqueeze(1))


def times(weight: Tensor, factor: Tensor) -> Tensor:
    return torch.where(weight == 0, torch.zeros_like(factor), weight * factor)


def statistics(tile: Tile, *, gap: str = "", ids: Tensor | None = None) -> Tensor:
    """[R, 7] of this shard; ``ids`` [R, K] are columns to leave out, -1 for none.

    gap: the mean gap to take: "forward" (teacher - student under the teacher), "reverse" (student
    - teacher under the student), "neither", or "" where there is no teacher.
    """
    temperature, dtype = tile.objective.temperature, compute_dtype(tile.student)
    found = tile.student.new_zeros((len(tile.student), STATISTICS), dtype=dtype)
    found[:, 0] = found[:, 2] = -torch.inf
    if tile.columns == 0:
        return found
    for rows in _blocks(tile):
        s, _ = final_logits(tile.student[rows, : tile.columns], tile.student_transform, temperature)
        if ids is not None:
            hide_at_ids_(s, ids[rows])
        found[rows, 0], s_mass = _mass(s)
        found[rows, 1] = s_mass.sum(-1)
        if tile.labels is not None:
            peak = found[rows, :1].clamp(min=torch.finfo(dtype).min)
            found[rows, 6] = torch.exp((s - peak) * temperature).sum(-1)
        if not isinstance(tile.teacher, Tensor):
            continue
        t, _ = final_logits(tile.teacher[rows, : tile.columns], tile.teacher_transform, temperature)
        found[rows, 2], t_mass = _mass(t)
        found[rows, 3] = t_mass.sum(-1)
        if gap == "forward":
            found[rows, 4:6] = _mean_gap(t, s, t_mass)
        elif gap == "reverse":
            found[rows, 4:6] = _mean_gap(s, t, s_mass)
    return found


def _mean_gap(mine: Tensor, other: Tensor, mass: Tensor) -> Tensor:
    """[R, 2]: the gap at my largest logit, and the mean gap beyond it under my mass."""
    gap = mine - other
    reference = gap.gather(1, mine.argmax(-1, keepdim=True))
    reference = torch.where(reference.isfinite(), reference, torch.zeros_like(reference))
    total = mass.sum(-1, keepdim=True)
    mean = times(mass, gap - reference).sum(-1, keepdim=True) / total
    return torch.cat([reference, torch.where(total == 0, 0.0, mean)], -1)


def sums(tile: Tile, numbers: Numbers) -> Tensor:
    """[R, 2]: this shard's sums of phi and of h."""
    dtype = compute_dtype(tile.student)
    found = tile.student.new_zeros((len(tile.student), 2), dtype=dtype)
    if tile.columns:
        for rows in _blocks(tile):
            _, _, phi, h = _terms(tile, numbers, rows)
            found[rows, 0], found[rows, 1] = phi.sum(-1), h.sum(-1)
    return found


def _terms(tile: Tile, numbers: Numbers, rows: slice) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """(log q, log p, phi, h) of a block."""
    objective = tile.objective
    assert isinstance(tile.teacher, Tensor)
    s, _ = final_logits(
        tile.student[rows, : tile.columns], tile.student_transform, objective.temperature
    )
    t, _ = final_logits(
        tile.teacher[rows, : tile.columns], tile.teacher_transform, objective.temperature
    )
    dtype = torch.float64 if objective.temperature >= WIDE_TEMPERATURE else s.dtype
    gap = s.to(dtype) - t.to(dtype)
    log_q = s.to(dtype).sub_(numbers.s_top[rows].to(dtype)).sub_(numbers.s_log[rows].to(dtype))
    log_p = t.to(dtype).sub_(numbers.t_top[rows].to(dtype)).sub_(numbers.t_log[rows].to(dtype))
    # Closer than the difference of the two, each of which is rounded to its own size.
    gap -= (numbers.s_top - numbers.t_top + numbers.s_log - numbers.t_log)[rows].to(dtype)
    log_p = torch.where(gap.abs() < 1, log_q - gap, log_p)
    phi, h = bounded_terms(
        objective.divergence, log_p.exp(), log_q.exp(), log_p, log_q, objective.min_logprob
    )
    return log_q, log_p, phi, h


def gradient_(tile: Tile, numbers: Numbers, *, kind: str) -> None:
    """Write the weighted gradient of this shard's raw logits into ``tile.gradient``.

    kind: the divergence as kernels name it, "none", or "tail", where h_sum is the (weighted)
    gradient of the tail's log-sum-exp.
    """
    objective, live, out = tile.objective, tile.columns, tile.gradient
    assert out is not None and tile.weight is not None
    out[:, live:] = 0
    if live == 0:
        return
    for rows in _blocks(tile):
        temperature = objective.temperature
        s, slope = final_logits(
            tile.student[rows, : tile.columns], tile.student_transform, temperature
        )
        dtype = s.dtype
        weight = tile.weight[rows].unsqueeze(1).to(dtype)
        from_top = s - numbers.s_top[rows].to(dtype)
        if kind == "tail":
            g = numbers.h_sum[rows].to(dtype) * torch.exp(from_top - numbers.s_log[rows].to(dtype))
        elif kind == "none":
            g = torch.zeros_like(s)
        else:
            g = _soft_gradient(tile, numbers, rows, kind)
            g *= weight * (objective.kd_weight / temperature)
        if tile.labels is not None:
            share = torch.exp(from_top * temperature - numbers.hard_log[rows].to(dtype))
            label = tile.labels[rows].unsqueeze(1)
            add_at_ids_(share, label, -torch.ones_like(weight))
            g += share * (objective.ce_weight * weight)
        if slope is not None:
            g *= slope
        out[rows, :live] = g.masked_fill_(tile.weight[rows].unsqueeze(1) == 0, 0.0)


def _soft_gradient(tile: Tile, numbers: Numbers, rows: slice, kind: str) -> Tensor:
    """d divergence / d (logits at the temperature) of a block."""
    plain = tile.objective.min_logprob is None and tile.objective.temperature < WIDE_TEMPERATURE
    if kind == "reverse_kl" and plain:
        # With the gap at the row's top taken out, as a collapsed row's gradient must not cancel.
        temperature = tile.objective.temperature
        s, _ = final_logits(tile.student[rows, : tile.columns], tile.student_transform, temperature)
        assert isinstance(tile.teacher, Tensor)
        t, _ = final_logits(tile.teacher[rows, : tile.columns], tile.teacher_transform, temperature)
        dtype = s.dtype
        gap = (s - t).sub_(numbers.shift[rows].to(dtype))
        q = (s.sub_(numbers.s_top[rows].to(dtype)).sub_(numbers.s_log[rows].to(dtype))).exp_()
        return times(q, gap) - q * numbers.h_sum[rows].to(dtype)
    log_q, log_p, _, h = _terms(tile, numbers, rows)
    if kind == "forward_kl" and plain:
        return log_q.exp() - log_p.exp()
    return h - log_q.exp() * numbers.h_sum[rows].to(h.dtype)


IN_TORCH = Columns(statistics, sums, gradient_, unit=1.0)


def by_kernels() -> Columns:
    """The same by Triton, which keeps logits in log2 units."""
    from kd_kernels import shards

    def shared(tile: Tile) -> dict[str, Any]:
        return dict(
            vocab=tile.columns,
            temperature=tile.objective.temperature,
            student_final=final(tile.student_transform),
            teacher_final=final(tile.teacher_transform),
        )

    def sides(tile: Tile) -> tuple[Tensor, Any]:
        return rowwise(tile.student), None if tile.teacher is None else rowwise(tile.teacher)  # type: ignore[arg-type]

    def of_statistics(tile: Tile, *, gap: str = "", ids: Tensor | None = None) -> Tensor:
        hard = tile.labels is not None
        assert tile.weight is not None
        return shards.shard_statistics(
            *sides(tile), tile.weight, gap=gap, hard=hard, ids=ids, **shared(tile)
        )

    def of_sums(tile: Tile, numbers: Numbers) -> Tensor:
        options = kernel_numbers(tile.objective) | shared(tile)
        options = {name: v for name, v in options.items() if name not in ("kd", "ce")}
        stacked = numbers.stacked(torch.float32)
        assert tile.weight is not None
        return shards.shard_sums(*sides(tile), stacked, tile.weight, **options)

    def of_gradient(tile: Tile, numbers: Numbers, *, kind: str) -> None:
        options = kernel_numbers(tile.objective) | shared(tile) | {"divergence": kind}
        assert tile.gradient is not None and tile.weight is not None
        shards.shard_gradient_(
            tile.gradient,
            *sides(tile),
            numbers.stacked(torch.float32),
            tile.weight.float(),
            labels=tile.labels,
            **options,
        )

    return Columns(of_statistics, of_sums, of_gradient, unit=math.log(2))
