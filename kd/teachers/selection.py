"""From a chunk of logits to the few tokens of each row that are kept, and what they stand for.

top_k    the k likeliest tokens; the rest is the tail ("bucket").
top_p    the fewest tokens that hold probability p, at most k; the rest is the tail ("bucket").
sampled  tokens drawn from the distribution itself, each with (times drawn) / draws: unbiased, as
         a forward KL is linear in the teacher ("drop").
hybrid   the m likeliest exactly, and draws among the others that share their mass: unbiased
         with less variance ("drop").

Source: Anshumann et al. 2025, "Sparse Logit Sampling", ACL 2025, for ``sampled``.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

NAMES = ("top_k", "top_p", "sampled", "hybrid")
METHODS = ("independent", "systematic")
PILE = 32
CACHED_BYTES = 5 * 2**18  # of float32 log-probs that are worked on at a time (measured)


@dataclass(frozen=True)
class Selection:
    """Which tokens of a row are kept.

    Attributes:
        name: "top_k", "top_p", "sampled" or "hybrid".
        top_k: the most tokens a row can hold; for hybrid, those kept exactly are among them.
        top_p: probability to hold (top_p).
        draws: tokens drawn from each row (sampled and hybrid).
        exact: the likeliest tokens kept as they are (hybrid).
        method: "independent" draws, or "systematic" ones (evenly spaced from one random start:
            the same expectation, every count within one of its expectation).
        seed: of the draws; they depend on it and on the sequence's tokens alone.
    """

    name: str = "top_k"
    top_k: int = 32
    top_p: float = 0.98
    draws: int = 50
    exact: int = 8
    method: str = "independent"
    seed: int = 0

    def __post_init__(self) -> None:
        rules = (
            (self.name in NAMES, "name", f"one of {', '.join(NAMES)}", self.name),
            (self.top_k >= 1, "top_k", "at least 1", self.top_k),
            (0 < self.top_p <= 1, "top_p", "above 0 and at most 1", self.top_p),
            (self.draws >= 1, "draws", "at least 1", self.draws),
            (self.exact >= 1, "exact", "at least 1", self.exact),
            (self.method in METHODS, "method", f"one of {', '.join(METHODS)}", self.method),
        )
        for holds, name, rule, got in rules:
            if not holds:
                raise ValueError(f"Selection: {name} must be {rule}, got {got!r}.")

    def slots(self, live_vocab: int) -> int:
        """The most tokens a row can hold."""
        most = {"sampled": self.draws, "hybrid": self.exact + self.draws}.get(self.name)
        return self.top_k if most is None else min(most, live_vocab)

    def options(self) -> dict[str, Any]:
        """What a cache records beside the name."""
        drawn: dict[str, Any] = {"draws": self.draws, "method": self.method, "seed": self.seed}
        found: dict[str, dict[str, Any]] = {
            "top_k": {},
            "top_p": {"top_p": self.top_p},
            "sampled": drawn,
            "hybrid": {**drawn, "exact": self.exact},
        }
        return found[self.name]

    @property
    def random(self) -> bool:
        return self.name in ("sampled", "hybrid")

    def rows(
        self,
        logits: Tensor,
        temperature: float,
        uniforms: Tensor | None = None,
        powers: Sequence[float] = (),
    ) -> tuple[Tensor, Tensor, Tensor]:
        """The kept tokens of each row, and what they leave out at other temperatures.

        Args:
            logits: [C, V] over the live vocabulary, any floating dtype; -inf is probability zero.
            temperature: divides the logits.
            uniforms: [C, draws] float64 in [0, 1), for the selections that draw.
            powers: M times temperature / t; none for the selections that draw.

        Returns:
            ids [C, K] int64, -1 in empty slots; log-probs [C, K] float32, -inf there; tails [C, M]
            float32: log(sum over the tokens that are not kept of p ** power), -inf without any.
        """
        if not self.random:
            ids, logprobs, tails = top_k_rows(logits, self.top_k, temperature, powers)
            if self.name == "top_k":
                return ids, logprobs, tails
            p = logprobs.double().exp()
            outside = p.cumsum(-1) - p >= self.top_p  # before this token the rest was enough
            left = logprobs.masked_fill(~outside, -torch.inf)
            for column, power in enumerate(powers):
                more = torch.logsumexp(left * power, -1)
                tails[:, column] = torch.logaddexp(tails[:, column], more)
            return ids.masked_fill(outside, -1), logprobs.masked_fill(outside, -torch.inf), tails
        assert uniforms is not None and not powers
        none = logits.new_empty(len(logits), 0, dtype=torch.float32)
        log_p = torch.log_softmax(logits.double() / temperature, -1)
        if self.name == "sampled":
            return *self._drawn(log_p.exp(), uniforms), none
        ids, logprobs, _ = top_k_rows(logits, self.exact, temperature)
        rest = log_p.exp().scatter(1, ids.clamp(min=0), 0.0)
        left = rest.sum(1, keepdim=True)
        others, drawn = self._drawn(rest, uniforms)
        drawn = drawn + left.log().float()
        others = others.masked_fill(left <= 1e-12, -1)
        drawn = drawn.masked_fill(others < 0, -torch.inf)
        return torch.cat([ids, others], 1), torch.cat([logprobs, drawn], 1), none

    def realised(
        self, logits: Tensor, following: Tensor, ids: Tensor, logprobs: Tensor, temperature: float
    ) -> Tensor:
        """Log-probs [C] float32 of the tokens that followed, from logits [C, V].

        following [C] their ids; ids and logprobs [C, K] what ``rows`` made of the logits: the
        likeliest token's entry has the row's normaliser in it.
        """
        at = following[:, None]
        if self.random:
            return torch.log_softmax(logits.double() / temperature, -1).gather(1, at)[:, 0].float()
        mine = logits.gather(1, at)
        best = logits.gather(1, ids[:, :1].clamp(min=0))
        apart = (mine.float() - best.float()) / temperature
        return (apart + logprobs[:, :1]).clamp(max=0)[:, 0]

    def uniforms(self, rows: int, key: bytes) -> Tensor:
        """Numbers in [0, 1) for a sequence's rows [rows, draws], the same in every run."""
        seed = int.from_bytes(key[:8], "little") ^ (self.seed * 0x9E3779B97F4A7C15)
        generator = torch.Generator().manual_seed(seed % 2**63)
        if self.method == "independent":
            return torch.rand(rows, self.draws, generator=generator, dtype=torch.float64)
        start = torch.rand(rows, 1, generator=generator, dtype=torch.float64)
        return (torch.arange(self.draws) + start) / self.draws

    def _drawn(self, weights: Tensor, uniforms: Tensor) -> tuple[Tensor, Tensor]:
        """Distinct drawn ids [C, draws], -1 where fewer, and log(times / draws)."""
        ends = weights.cumsum(1)
        aim = uniforms.to(ends.device) * ends[:, -1:]
        ids = torch.searchsorted(ends, aim, right=True).clamp_(max=weights.shape[1] - 1)
        ids = ids.sort(1).values
        new = torch.ones_like(ids, dtype=torch.bool)
        new[:, 1:] = ids[:, 1:] != ids[:, :-1]
        group = new.cumsum(1) - 1
        times = torch.zeros_like(ids).scatter_add_(1, group, torch.ones_like(ids))
        distinct = torch.full_like(ids, -1).scatter_(1, group, ids)
        return distinct, (times / self.draws).log().float()


def top_k_rows(
    logits: Tensor, top_k: int, temperature: float, powers: Sequence[float] = ()
) -> tuple[Tensor, Tensor, Tensor]:
    """The k likeliest tokens of each row and their log-probabilities over all, and the tails.

    Args:
        logits: [C, V] of any floating dtype; -inf is probability zero.
        top_k: how many.
        temperature: divides the logits.
        powers: M times temperature / t.

    Returns:
        ids [C, k] int64, -1 where fewer than k tokens have a probability; log-probs [C, k]
        float32, in descending order; tails [C, M] float32, made in the memory that the rows took.
    """
    logits, k = logits.detach(), min(top_k, logits.shape[1])
    if logits.device.type != "cpu":
        scaled = logits.float() if temperature == 1 else logits.float() / temperature
        logp = torch.log_softmax(scaled, 1)
        logprobs, ids = logp.topk(k, dim=1)
        tails = tails_(logp, ids, powers, scaled)
        return ids.masked_fill_(logprobs == -torch.inf, -1), logprobs, tails
    total, width = logits.shape
    rows = min(total, max(1, CACHED_BYTES // (4 * width)))
    ids = torch.empty(total, k, dtype=torch.int64)
    logprobs = torch.empty(total, k)
    tails = torch.empty(total, len(powers))
    scaled, logp = torch.empty(rows, width), torch.empty(rows, width)  # fresh ones cost as much
    for start in range(0, total, max(1, rows)):  # each part stays in the CPU's cache
        part = logits[start : start + rows]
        work, out = scaled[: len(part)].copy_(part), logp[: len(part)]
        if temperature != 1:
            work /= temperature
        torch.ops.aten._log_softmax.out(work, 1, False, out=out)
        found = top_entries(out, k)
        logprobs[start : start + rows], ids[start : start + rows] = found
        tails[start : start + rows] = tails_(out, found[1], powers, work)
    return ids.masked_fill_(logprobs == -torch.inf, -1), logprobs, tails


def tails_(logp: Tensor, ids: Tensor, powers: Sequence[float], work: Tensor) -> Tensor:
    """log(sum of p ** power) over the columns that are not in ``ids``, [C, M] float32.

    logp [C, V] float32 and work, of the same shape, are overwritten.
    """
    tails = logp.new_empty(len(logp), len(powers))
    if not powers:
        return tails
    logp.scatter_(1, ids, -torch.inf)
    peak = logp.amax(1, keepdim=True)
    peak.masked_fill_(peak == -torch.inf, 0.0)  # no tail: sums of zero
    logp.sub_(peak)  # the largest term of every sum is one
    for column, power in enumerate(powers):
        torch.mul(logp, power, out=work).exp_()
        tails[:, column] = work.sum(1).log_() + power * peak[:, 0]
    return tails


def top_entries(values: Tensor, k: int) -> tuple[Tensor, Tensor]:
    """``values.topk(k)`` of a contiguous [C, V], several times as fast on a CPU where V is large.

    The columns are dealt out to n piles of 32, column j to pile j % n; the k largest lie within
    the k piles that have the largest maxima.
    """
    rows, width = values.shape
    piles = width // PILE
    if piles < 4 * k:
        return values.topk(k, dim=1)
    folded = values.as_strided((rows, PILE, piles), (width, piles, 1))
    best = folded.amax(1).topk(k, dim=1, sorted=False).indices  # [C, k] piles
    inside = folded.gather(2, best[:, None, :].expand(-1, PILE, -1)).view(rows, -1)
    rest = values[:, PILE * piles :]  # columns that make no pile
    found = (torch.cat([inside, rest], 1) if rest.shape[1] else inside).topk(k, dim=1)
    place = found.indices
    columns = best.gather(1, place % k) + place // k * piles
    if rest.shape[1]:
        columns = torch.where(place < PILE * k, columns, place + PILE * (piles - k))
    return found.values, columns


def bad_rows(logits: Tensor) -> Tensor:
    """Rows [C] that are no distribution: a NaN, a +inf, or nothing above -inf."""
    return ~torch.isfinite(logits.amax(1))
