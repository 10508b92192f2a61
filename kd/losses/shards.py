"""Vocabulary shards in torch: a rank's part of its rows' sums, and how the parts make a row.

``statistics``, ``sums`` and ``gradient_`` see one rank's columns and are what a backend provides
(kd.losses.triton_shards has the other one); ``merge`` sees every rank's numbers and no columns.

A statistic is kept with the peak it is relative to, so nothing overflows or underflows: the ranks'
sums meet at the largest peak, in float64.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator

import torch
from torch import Tensor

from kd.losses.divergences import bounded_terms
from kd.losses.rows import WIDE_TEMPERATURE, Objective, add_at_ids_, hide_at_ids_
from kd.losses.torch_backend import block_rows, compute_dtype

STATISTICS = 7
"""Student peak and sum, teacher peak and sum, reference and mean of the gap, sum at T = 1."""
UNIT = 1.0
"""Logits here are in nats."""


@dataclasses.dataclass(frozen=True)
class Tile:
    """One rank's columns of some rows: raw logits, of which scale and cap make the final ones."""

    student: Tensor  # [R, live]
    teacher: Tensor | None  # [R, live]
    weight: Tensor  # [R], zero where a row does not count
    labels: Tensor | None  # [R] columns of this shard, -1 where the label is another rank's
    objective: Objective
    student_transform: tuple[float | None, float | None] = (None, None)
    teacher_transform: tuple[float | None, float | None] = (None, None)


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
    z = raw.to(compute_dtype(raw.dtype), copy=True)
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
    step = block_rows(tile.student.shape[1], tile.student.device)
    for start in range(0, len(tile.student), step):
        yield slice(start, start + step)


def _mass(z: Tensor) -> tuple[Tensor, Tensor]:
    """(peak [R], exp(z - peak) [R, live]); a row of -inf has a mass of zero."""
    peak = z.amax(-1)
    return peak, torch.exp(z - peak.clamp(min=torch.finfo(z.dtype).min).unsqueeze(1))


def _times(weight: Tensor, factor: Tensor) -> Tensor:
    return torch.where(weight == 0, torch.zeros_like(factor), weight * factor)


def statistics(tile: Tile, *, gap: str, hard: bool, ids: Tensor | None = None) -> Tensor:
    """[R, 7] of this shard; ``ids`` [R, K] are columns to leave out, -1 for none.

    gap: the mean gap to take: "forward" (teacher - student under the teacher), "reverse" (student
    - teacher under the student), "neither", or "" where there is no teacher.
    """
    temperature, dtype = tile.objective.temperature, compute_dtype(tile.student.dtype)
    found = tile.student.new_zeros((len(tile.student), STATISTICS), dtype=dtype)
    found[:, 0] = found[:, 2] = -torch.inf
    if tile.student.shape[1] == 0:
        return found
    for rows in _blocks(tile):
        s, _ = final_logits(tile.student[rows], tile.student_transform, temperature)
        if ids is not None:
            hide_at_ids_(s, ids[rows])
        found[rows, 0], s_mass = _mass(s)
        found[rows, 1] = s_mass.sum(-1)
        if hard:
            peak = found[rows, :1].clamp(min=torch.finfo(dtype).min)
            found[rows, 6] = torch.exp((s - peak) * temperature).sum(-1)
        if tile.teacher is None:
            continue
        t, _ = final_logits(tile.teacher[rows], tile.teacher_transform, temperature)
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
    mean = _times(mass, gap - reference).sum(-1, keepdim=True) / total
    return torch.cat([reference, torch.where(total == 0, 0.0, mean)], -1)


def sums(tile: Tile, numbers: Numbers) -> Tensor:
    """[R, 2]: this shard's sums of phi and of h."""
    dtype = compute_dtype(tile.student.dtype)
    found = tile.student.new_zeros((len(tile.student), 2), dtype=dtype)
    if tile.student.shape[1]:
        for rows in _blocks(tile):
            _, _, phi, h = _terms(tile, numbers, rows)
            found[rows, 0], found[rows, 1] = phi.sum(-1), h.sum(-1)
    return found


def _terms(tile: Tile, numbers: Numbers, rows: slice) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """(log q, log p, phi, h) of a block."""
    objective = tile.objective
    assert tile.teacher is not None
    s, _ = final_logits(tile.student[rows], tile.student_transform, objective.temperature)
    t, _ = final_logits(tile.teacher[rows], tile.teacher_transform, objective.temperature)
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


def gradient_(
    out: Tensor, tile: Tile, numbers: Numbers, coefficient: Tensor, *, kind: str, hard: bool
) -> None:
    """Write the weighted gradient of this shard's raw logits into ``out`` [R, >= live].

    kind: the divergence as kernels name it, "none", or "tail", where h_sum is the (weighted)
    gradient of the tail's log-sum-exp. ``out`` may be the student's logits.
    """
    objective, live = tile.objective, tile.student.shape[1]
    out[:, live:] = 0
    if live == 0:
        return
    for rows in _blocks(tile):
        temperature = objective.temperature
        s, slope = final_logits(tile.student[rows], tile.student_transform, temperature)
        dtype = s.dtype
        weight = coefficient[rows].unsqueeze(1).to(dtype)
        from_top = s - numbers.s_top[rows].to(dtype)
        if kind == "tail":
            g = numbers.h_sum[rows].to(dtype) * torch.exp(from_top - numbers.s_log[rows].to(dtype))
        elif kind == "none":
            g = torch.zeros_like(s)
        else:
            g = _soft_gradient(tile, numbers, rows, kind)
            g *= weight * (objective.kd_weight / temperature)
        if hard:
            assert tile.labels is not None
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
        s, _ = final_logits(tile.student[rows], tile.student_transform, temperature)
        assert tile.teacher is not None
        t, _ = final_logits(tile.teacher[rows], tile.teacher_transform, temperature)
        dtype = s.dtype
        gap = (s - t).sub_(numbers.shift[rows].to(dtype))
        q = (s.sub_(numbers.s_top[rows].to(dtype)).sub_(numbers.s_log[rows].to(dtype))).exp_()
        return _times(q, gap) - q * numbers.h_sum[rows].to(dtype)
    log_q, log_p, _, h = _terms(tile, numbers, rows)
    if kind == "forward_kl" and plain:
        return log_q.exp() - log_p.exp()
    return h - log_q.exp() * numbers.h_sum[rows].to(h.dtype)


def normaliser(peak: Tensor, total: Tensor, unit: float) -> tuple[Tensor, Tensor, Tensor]:
    """(top [R, 1], log-sum above it [R, 1], each rank's share [R, ranks]) in float64."""
    peak, total = peak.double(), total.double()
    top = peak.amax(-1, keepdim=True).clamp(min=-1e30)
    mass = _times(total, torch.exp((peak - top) * unit))
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
        mean_gap = _times(t_share, reference + mean).sum(-1, keepdim=True)
        value = unit * (mean_gap + (s_top - t_top) + (s_log - t_log))
    elif gap == "reverse":
        mean_gap = _times(s_share, reference + mean).sum(-1, keepdim=True)
        value = unit * (mean_gap + (t_top - s_top) + (t_log - s_log))
        shift = reference.gather(1, s_share.nan_to_num(-1.0).argmax(-1, keepdim=True))
        h_sum = unit * _times(s_share, (reference - shift) + mean).sum(-1, keepdim=True)
    hard_mass = _times(hard, torch.exp((peak - s_top) * (unit * temperature)))
    hard_log = hard_mass.sum(-1, keepdim=True).log() / unit
    return value, Numbers(s_top, s_log, t_top, t_log, h_sum, shift, hard_log)
