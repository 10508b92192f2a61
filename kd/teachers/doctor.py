"""Does a cache hold what this teacher says about these sequences? Re-score samples and compare."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch
from torch import Tensor

from kd.cache import TeacherCache
from kd.cache.keys import token_array
from kd.cache.meta import side_by_side, unmet
from kd.teachers.identity import teacher_identity
from kd.teachers.logits import LogitSource

# A sampled row is noisy, a rounded one is not: nats below which a row agrees with the teacher.
AGREES = {"top_k": 0.05, "top_p": 0.05, "sampled": 2.0, "hybrid": 1.0}
TAIL_AGREES = 0.05
SHIFTS = (-2, -1, 0, 1, 2)


@dataclass
class Diagnosis:
    """What the doctor found.

    Attributes:
        problems: one line each; empty when the cache fits.
        divergence: mean KL of the stored tokens' probabilities from the teacher's, in nats, by
            shift: at s, row i is compared with the teacher's row i + s.
        tail_error: largest error of a stored tail's log-partition, in nats; None without any.
        scored: rows that were re-scored.
        found, wanted: of the given sequences, how many are in the cache, and how many there are.
    """

    problems: list[str] = field(default_factory=list)
    divergence: dict[int, float] = field(default_factory=dict)
    tail_error: float | None = None
    scored: int = 0
    found: int = 0
    wanted: int = 0

    @property
    def healthy(self) -> bool:
        return not self.problems

    def text(self) -> str:
        lines = [f"re-scored {self.scored:,} rows; mean divergence in nats by shift of the rows:"]
        lines += [f"  {shift:+d}  {value:.5f}" for shift, value in self.divergence.items()]
        if self.tail_error is not None:
            lines.append(f"stored tails differ by at most {self.tail_error:.4f} nats")
        if self.wanted:
            lines.append(f"training sequences in the cache: {self.found:,} of {self.wanted:,}")
        lines += [f"problem: {problem}" for problem in self.problems]
        return "\n".join([*lines, "healthy" if self.healthy else "NOT HEALTHY"])


def diagnose(
    cache: TeacherCache,
    model: Any = None,
    *,
    tokenizer: Any = None,
    sequences: Iterable[Any] = (),
    samples: int = 8,
) -> Diagnosis:
    """Compare a cache with the teacher, the tokenizer and the training sequences at hand.

    Args:
        cache: an open cache.
        model: the teacher; re-scores ``samples`` cached sequences. None skips that.
        tokenizer: the one training uses; compared with the cache's fingerprint.
        sequences: the training sequences' token ids; each should be in the cache.
        samples: how many cached sequences to re-score.

    Returns:
        What is wrong, in words: rows off by one, another teacher, another tokenizer, another
        template, truncated sequences.
    """
    found = Diagnosis()
    if model is not None:
        _identity(cache, model, found)
        _rescore(cache, model, samples, found)
    if tokenizer is not None:
        _tokenizer(cache, tokenizer, found)
    _coverage(cache, sequences, found)
    return found


def _identity(cache: TeacherCache, model: Any, found: Diagnosis) -> None:
    differing = unmet(cache.meta, {"teacher": teacher_identity(model)})
    differing = [item for item in differing if item[0] not in ("teacher.id", "teacher.attention")]
    if differing:
        found.problems.append("another teacher:\n" + side_by_side(differing, "the cache", "it"))


def _tokenizer(cache: TeacherCache, tokenizer: Any, found: Diagnosis) -> None:
    from kd.vocab import fingerprint_differences, tokenizer_fingerprint

    words = fingerprint_differences(cache.meta.tokenizer, tokenizer_fingerprint(tokenizer))
    if cache.meta.tokenizer and words:
        found.problems.append("another tokenizer: " + "; ".join(words))


@torch.inference_mode()
def _rescore(cache: TeacherCache, model: Any, samples: int, found: Diagnosis) -> None:
    source = LogitSource(model, cache.meta.live_vocab)
    totals = dict.fromkeys(SHIFTS, 0.0)
    weight = dict.fromkeys(SHIFTS, 0)
    for tokens in _spread(cache, samples):
        chunks = source.chunks([tokens])  # each is overwritten by the next
        logits = torch.cat([part.to("cpu", torch.float32, copy=True) for part in chunks])
        logp = (logits / cache.meta.temperature).log_softmax(-1)
        stored = cache.lookup(tokens)
        found.scored += len(tokens)
        if stored.tail_log_partition is not None:
            _tails(stored, logp, cache.meta.temperature, found)
        for shift in SHIFTS:
            rows = torch.arange(max(0, -shift), min(len(tokens), len(tokens) - shift))
            filled = rows[(stored.ids[rows] >= 0).any(-1)] if len(rows) else rows
            if len(filled):
                value = _divergence(
                    stored.ids[filled], stored.logprobs[filled], logp, filled, shift
                )
                totals[shift] += float(value.sum())
                weight[shift] += len(filled)
    found.divergence = {s: totals[s] / weight[s] for s in SHIFTS if weight[s]}
    if not found.divergence:
        return
    if (found.tail_error or 0.0) > TAIL_AGREES and found.divergence[0] <= AGREES["top_k"]:
        found.problems.append(
            f"stored tails differ from the teacher by {found.tail_error:.3f} nats (at most "
            f"{TAIL_AGREES} expected): another live vocabulary, or damaged values"
        )
    best = min(found.divergence, key=lambda s: (found.divergence[s], abs(s)))
    limit = AGREES[cache.meta.selection]
    if best != 0 and found.divergence[best] < 0.5 * found.divergence[0]:
        late = "early" if best > 0 else "late"
        found.problems.append(
            f"rows are {abs(best)} position(s) {late}: row i holds the teacher's row i {best:+d}. "
            "Row i must be the distribution for the token after token i"
        )
    elif found.divergence[0] > limit:
        found.problems.append(
            f"rows differ from the teacher by {found.divergence[0]:.3f} nats (at most {limit} "
            "expected): another teacher, temperature, dtype or damaged values"
        )


def _tails(stored: Any, logp: Tensor, temperature: float, found: Diagnosis) -> None:
    """Compare a sequence's stored tails with what the teacher leaves to them."""
    filled = (stored.ids >= 0).any(-1)
    outside = torch.cat([logp, torch.zeros(len(logp), 1)], 1)  # the last takes the empty slots
    outside.scatter_(1, torch.where(stored.ids < 0, logp.shape[1], stored.ids), -torch.inf)
    for number, t in enumerate(stored.tail_temperatures):
        real = (outside[:, :-1] * (temperature / t)).logsumexp(-1)
        error = (stored.tail_log_partition[:, number] - real).abs().nan_to_num(0.0)[filled]
        found.tail_error = max(found.tail_error or 0.0, float(error.max()) if len(error) else 0.0)


def _divergence(ids: Tensor, logprobs: Tensor, logp: Tensor, rows: Tensor, shift: int) -> Tensor:
    """Per row, the KL of the stored tokens and the tail from the teacher's, [n]."""
    teacher = logp[rows + shift].gather(1, ids.clamp(min=0)).masked_fill(ids < 0, -torch.inf)
    p, q = logprobs.double(), teacher.double()
    terms = torch.where(ids >= 0, p.exp() * (p - q.clamp(min=-60)), 0.0).sum(-1)
    left_p = (1 - p.exp().sum(-1)).clamp(min=1e-7)
    left_q = (1 - q.exp().sum(-1)).clamp(min=1e-7)
    return terms + left_p * (left_p / left_q).log()


def _spread(cache: TeacherCache, samples: int) -> list[Any]:
    """Evenly spread cached sequences."""
    step = max(1, len(cache) // max(samples, 1))
    chosen = [tokens for number, tokens in enumerate(cache.sequences()) if number % step == 0]
    return chosen[:samples]


def _coverage(cache: TeacherCache, sequences: Iterable[Any], found: Diagnosis) -> None:
    """Training sequences that are not in the cache, and why: truncated, or changed from where."""
    missing: list[Any] = []
    for sequence in sequences:
        found.wanted += 1
        if sequence in cache:
            found.found += 1
        elif len(missing) < 20:
            missing.append(token_array(sequence, "diagnose"))
    if not missing:
        return
    cached = list(cache.sequences())
    words = {_compare(tokens, cached): None for tokens in missing}
    found.problems.append(
        f"{found.wanted - found.found} of {found.wanted} training sequences are not in the cache: "
        + "; ".join(words)
    )


def _compare(tokens: Any, cached: list[Any]) -> str:
    """How a missing sequence relates to the cached one that it shares most of its start with."""
    best, shared = None, -1
    for other in cached:
        n = min(len(tokens), len(other))
        differing = np.flatnonzero(tokens[:n] != other[:n])
        same = int(differing[0]) if len(differing) else n
        if same > shared:
            best, shared = other, same
    if best is None or shared == 0:
        return "never captured, or another template or tokenizer from the first token on"
    if shared == len(best):
        return f"truncated at the capture (cached up to token {shared} of {len(tokens)})"
    if shared == len(tokens):
        return f"truncated since the capture (to {shared} of {len(best)} tokens)"
    return f"changed since the capture from token {shared} on (template or text)"
