"""How well a model predicts given tokens, and how close it is to a teacher's cached targets."""

from __future__ import annotations

import dataclasses
import math
import statistics
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

import kd
from kd.heads import dense_logits, final_hidden
from kd.losses import Hidden
from kd.losses.sparse import covers

ROWS = 512  # rows whose logits exist at a time
BINS = 10


@dataclass(frozen=True)
class Likelihood:
    """Negative log-likelihoods of sequences, in nats.

    Attributes:
        nats: summed over the predicted tokens of each sequence.
        tokens: how many those are.
    """

    nats: tuple[float, ...]
    tokens: tuple[int, ...]

    @property
    def mean(self) -> float:
        """Nats per token."""
        return sum(self.nats) / sum(self.tokens)

    @property
    def perplexity(self) -> float:
        return math.exp(min(self.mean, 700.0))

    @property
    def interval(self) -> tuple[float, float]:
        """A 95 % interval of the perplexity over sequences like these (delta method)."""
        n, mean = len(self.nats), self.mean
        if n < 2:
            return math.nan, math.nan
        residuals = [a - mean * b for a, b in zip(self.nats, self.tokens, strict=True)]
        error = statistics.stdev(residuals) * math.sqrt(n) / sum(self.tokens)
        return math.exp(mean - 1.96 * error), math.exp(min(mean + 1.96 * error, 700.0))


@dataclass(frozen=True)
class Closeness:
    """How close a student is to a teacher on the teacher's cached rows.

    Attributes:
        tokens: rows compared.
        kl: mean KL(teacher || student) over the cached tokens and their tail, in nats.
        top1: share of rows in which both like the same token best.
        calibration: mean gap between the student's probability of its likeliest token and the
            teacher's for that token, over ten bins of the student's confidence (the expected
            calibration error, with the teacher in place of the truth).
        bins: (student's mean confidence, teacher's mean probability, rows) of each filled bin.
    """

    tokens: int
    kl: float
    top1: float
    calibration: float
    bins: tuple[tuple[float, float, int], ...]


def likelihood(
    model: Any,
    rows: Sequence[Any],
    *,
    batch_size: int = 8,
    vocab_size: int | None = None,
    progress: Callable[[int], None] | None = None,
    observe: Callable[[Hidden, Tensor, list[Tensor], int | None], None] | None = None,
) -> Likelihood:
    """The likelihood of token sequences; the logits of a batch are never all in memory.

    Args:
        model: a causal LM.
        rows: 1-D token ids, or {"input_ids", "labels"} where -100 marks what does not count.
        batch_size: sequences in a forward pass.
        vocab_size: live tokens; the padded rows of the lm_head take no part.
        progress: called with the number of sequences done.
        observe: called with each batch's hidden rows, aligned labels [B, L], sequences, vocab_size.
    """
    pairs = [_tokens_and_labels(row) for row in rows]
    if not any(int((labels[1:] != -100).sum()) for _, labels in pairs):
        raise ValueError(
            "likelihood: rows must hold at least one token to predict, got none. Sequences need "
            "two tokens, and labels that are not all -100."
        )
    nats, tokens = [0.0] * len(pairs), [0] * len(pairs)
    order = sorted(range(len(pairs)), key=lambda i: len(pairs[i][0]))
    done = 0
    for start in range(0, len(order), batch_size):
        chosen = order[start : start + batch_size]
        student, lengths = hidden_rows(model, [pairs[i][0] for i in chosen])
        labels = torch.full(student.hidden.shape[:2], -100)
        for at, i in enumerate(chosen):
            labels[at, : lengths[at] - 1] = pairs[i][1][1:]
        flat = dataclasses.replace(student, hidden=student.hidden.flatten(0, 1))
        wanted = labels.flatten().to(flat.hidden.device)
        with torch.no_grad():
            loss = kd.cross_entropy(flat, wanted, vocab_size=vocab_size, reduction="none")
        loss = loss.view(len(chosen), -1)
        if observe is not None:
            observe(student, labels, [pairs[i][0] for i in chosen], vocab_size)
        for at, i in enumerate(chosen):
            nats[i] = float(loss[at].double().sum())
            tokens[i] = int((labels[at] != -100).sum())
        done += len(chosen)
        if progress is not None:
            progress(done)
    kept = [i for i in range(len(pairs)) if tokens[i]]
    return Likelihood(tuple(nats[i] for i in kept), tuple(tokens[i] for i in kept))


def closeness(
    model: Any,
    cache: Any,
    rows: Sequence[Any],
    *,
    batch_size: int = 8,
    vocab_size: int | None = None,
    progress: Callable[[int], None] | None = None,
) -> tuple[Likelihood, Closeness]:
    """Compare a student with the teacher whose targets for these rows are cached.

    Args:
        model: the student.
        cache: a ``TeacherCache`` that holds every row.
        rows: as for ``likelihood``; only tokens with a label count.
        batch_size: sequences in a forward pass.
        vocab_size: live tokens; the cache's own number by default.
        progress: called with the number of sequences done.

    Returns:
        The likelihood of the rows, from the same forward passes, and the closeness.
    """
    found: list[Tensor] = []

    def beside(student: Hidden, labels: Tensor, sequences: list[Tensor], live: int | None) -> None:
        targets = cache.batch(sequences, student.hidden.shape[1])
        wanted = (labels != -100) & (targets.ids >= 0).any(-1)
        where = wanted.flatten().nonzero().squeeze(1)
        rows = {
            name: getattr(targets, name).flatten(0, 1)[where].to(student.hidden.device)
            for name in ("ids", "logprobs", "tail_log_partition")
            if getattr(targets, name) is not None
        }
        flat = student.hidden.flatten(0, 1)[where.to(student.hidden.device)]
        part = dataclasses.replace(student, hidden=flat)
        found.append(_rows_beside(part, dataclasses.replace(targets, **rows), live))

    live = vocab_size or cache.meta.live_vocab
    likely = likelihood(
        model, rows, batch_size=batch_size, vocab_size=live, progress=progress, observe=beside
    )
    return likely, _summary(torch.cat(found))


def hidden_rows(model: Any, sequences: Sequence[Tensor]) -> tuple[Hidden, list[int]]:
    """The last hidden states [B, L, H] of padded sequences with the lm_head, and their lengths."""
    device = next(model.parameters()).device
    lengths = [len(ids) for ids in sequences]
    limit = getattr(model.config, "max_position_embeddings", None)
    if limit is not None and max(lengths) > limit:
        raise ValueError(
            f"evaluation: sequences must have at most the model's {limit} tokens, got "
            f"{max(lengths)}. Cut them, or evaluate a model with a longer context."
        )
    input_ids = torch.zeros(len(sequences), max(lengths), dtype=torch.long)
    for row, ids in zip(input_ids, sequences, strict=True):
        row[: len(ids)] = ids
    was_training = model.training
    model.eval()
    try:
        student = final_hidden(model, input_ids=input_ids.to(device))
    finally:
        model.train(was_training)
    return student, lengths


def _rows_beside(student: Hidden, targets: Any, live: int | None) -> Tensor:
    """[N, 4]: KL, same top token, the student's confidence, the teacher's for that token.

    The KL is taken at temperature 1, or at the cache's own where its tail at 1 is not known.
    """
    ids, logprobs = targets.ids, targets.logprobs
    known = covers(targets.tail_temperatures, 1.0)
    with torch.no_grad():
        kl = kd.forward_kl(
            student,
            kd.TopK(**vars(targets)),
            temperature=1.0 if known else targets.temperature,
            vocab_size=live,
            reduction="none",
        )
        best = ids.gather(-1, logprobs.argmax(-1, keepdim=True)).squeeze(-1)
        parts = []
        for start in range(0, len(ids), ROWS):
            stop = start + ROWS
            part = dataclasses.replace(student, hidden=student.hidden[start:stop])
            logits = dense_logits(part)[:, :live].float()
            confidence, token = logits.log_softmax(-1).max(-1)
            same = (token == best[start:stop]).float()
            hit = ids[start:stop] == token[:, None]
            theirs = torch.where(hit, logprobs[start:stop].exp(), 0.0).sum(-1)
            parts.append(torch.stack([kl[start:stop], same, confidence.exp(), theirs], -1))
    return torch.cat(parts).cpu() if parts else torch.zeros(0, 4)


def _summary(rows: Tensor) -> Closeness:
    if not len(rows):
        raise ValueError(
            "closeness: rows must hold at least one token with a label and a cached target, got "
            "none. Evaluate on the sequences that the cache was built from."
        )
    rows = rows.double()
    number = (rows[:, 2] * BINS).long().clamp(max=BINS - 1)
    bins, gap = [], 0.0
    for index in range(BINS):
        inside = rows[number == index]
        if len(inside):
            student, teacher = float(inside[:, 2].mean()), float(inside[:, 3].mean())
            bins.append((student, teacher, len(inside)))
            gap += abs(student - teacher) * len(inside) / len(rows)
    mean = rows.mean(0)
    return Closeness(len(rows), float(mean[0]), float(mean[1]), gap, tuple(bins))


def _tokens_and_labels(row: Any) -> tuple[Tensor, Tensor]:
    if isinstance(row, dict):
        ids = torch.as_tensor(row["input_ids"], dtype=torch.long)
        return ids, torch.as_tensor(row.get("labels", row["input_ids"]), dtype=torch.long)
    ids = torch.as_tensor(row, dtype=torch.long)
    return ids, ids
