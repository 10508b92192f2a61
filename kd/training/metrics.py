"""What a distillation run says about itself: loss parts, agreement with the teacher, its mass."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

import kd
from kd.heads import dense_logits
from kd.training.batches import Target, per_token
from kd.training.objective import Objective
from kd.training.rows import aligned_labels

THINK, ANSWER, DIGIT = 1, 2, 4
CLASSES = {"think": THINK, "answer": ANSWER, "digit": DIGIT}
ENDS_OF_THOUGHT = ("</think>", "<|end_of_thought|>")
MAX_TOKENS = 1 << 16  # a step's classes cost a few milliseconds of Python
NAMES: tuple[str, ...] = ("tokens", "ce", "kd", "taught", "top1", "sparse", "mass")
NAMES += tuple(f"{part}_{name}" for name in CLASSES for part in ("kd", "tokens"))
MAX_ROWS = 2048  # agreement needs an argmax over the vocabulary: enough rows for two digits
BLOCK = 256


class StepMetrics:
    """Sums over the trained tokens of the steps that are logged, additive over microbatches.

    Attributes:
        sums: float64, in the order of ``NAMES``.
    """

    def __init__(self) -> None:
        self.sums = torch.zeros(len(NAMES), dtype=torch.float64)

    def observe(self, objective: Objective, student: kd.Hidden, targets: dict[str, Any]) -> None:
        """Add one microbatch: student rows [N, H] and their targets."""
        rows = (targets["shift_labels"] != -100).nonzero().squeeze(1)[:MAX_ROWS]
        if rows.numel() == 0:
            return
        taken = per_token(targets, lambda values: values.index_select(0, rows))
        taken.pop("weights", None)  # the log has plain means over tokens
        student = dataclasses.replace(student, hidden=student.hidden.index_select(0, rows))
        found = dict.fromkeys(NAMES, 0.0)
        found["tokens"] = float(rows.numel())
        found["ce"] = kd.cross_entropy(
            student,
            taken["shift_labels"],
            vocab_size=objective.vocab_size,
            backend=objective.backend,
            reduction="sum",
        ).item()
        if objective.soft:
            found |= _soft_parts(objective, student, taken)
        self.sums += torch.tensor([found[name] for name in NAMES], dtype=torch.float64)

    def summary(self, reduce: Callable[[Tensor], Tensor] | None = None) -> dict[str, float]:
        """Means per trained token, and start again.

        Args:
            reduce: sums a tensor over all ranks; every rank must call ``summary`` then.
        """
        sums = self.sums if reduce is None else reduce(self.sums)
        self.sums = torch.zeros_like(self.sums)
        total = dict(zip(NAMES, sums.tolist(), strict=True))
        if total["tokens"] == 0:
            return {}
        found = {"ce": total["ce"] / total["tokens"]}
        if total["taught"]:
            found["kd"] = total["kd"] / total["taught"]
            found["teacher_top1_agreement"] = total["top1"] / total["taught"]
        if total["sparse"]:
            found["teacher_mass"] = total["mass"] / total["sparse"]
        for name in CLASSES:
            if total[f"tokens_{name}"]:
                found[f"kd_{name}"] = total[f"kd_{name}"] / total[f"tokens_{name}"]
        return {key: value if math.isfinite(value) else math.nan for key, value in found.items()}


def _soft_parts(
    objective: Objective, student: kd.Hidden, taken: dict[str, Any]
) -> dict[str, float]:
    """Divergences without weights or T**2, by class of token; agreement; mass covered."""
    soft = dataclasses.replace(objective, kd_weight=1.0, ce_weight=0.0, scale_by_t2=False)
    each = soft.loss(student, taken, reduction="none").double()
    found = {"kd": each.sum().item(), "taught": 0.0, "top1": 0.0, "sparse": 0.0, "mass": 0.0}
    taught = torch.zeros_like(each, dtype=torch.bool)
    best = top_tokens(student, objective.vocab_size)
    for target, rows in objective.targets(taken):
        rows = torch.ones_like(taught) if rows is None else rows
        if isinstance(target, kd.TopK):
            rows = rows & (target.ids >= 0).any(-1)  # a sequence that was skipped has none
            found["sparse"] += float(rows.sum())
            found["mass"] += target.logprobs[rows].double().exp().sum().item()
        same = (top_tokens(target, objective.vocab_size) == best).squeeze(-1)
        found["top1"] += float((same & rows).sum())
        found["taught"] += float(rows.sum())
        taught |= rows
    found["kd"] = each[taught].sum().item() if found["taught"] else 0.0
    kinds = taken.get("token_class")
    if kinds is not None:
        for name, bit in CLASSES.items():
            mine = taught & ((kinds & bit) > 0)
            found[f"kd_{name}"] = each[mine].sum().item()
            found[f"tokens_{name}"] = float(mine.sum())
    return found


def top_tokens(source: Target, vocab_size: int | None, k: int = 1) -> Tensor:
    """The k likeliest tokens of every row, [N, <= k]; -1 where a sparse row has none.

    [N, V] is never made from hidden states.
    """
    if isinstance(source, kd.TopK):
        best = source.logprobs.topk(min(k, source.logprobs.shape[-1]), dim=-1)
        return source.ids.gather(-1, best.indices).masked_fill(best.values == -math.inf, -1)
    if isinstance(source, kd.Hidden):
        parts = [
            top_tokens(dense_logits(dataclasses.replace(source, hidden=part)), vocab_size, k)
            for part in source.hidden.split(BLOCK)
        ]
        return torch.cat(parts)
    logits = source[..., :vocab_size]
    return logits.argmax(-1, keepdim=True) if k == 1 else logits.topk(k).indices


class TokenClasses:
    """Classes of a batch's labels, from their text: the marker may be cut into tokens anyhow.

    Args:
        tokenizer: with ``decode``; each token is decoded once.
        ends_of_thought: texts that close the thoughts. What comes after the last of them in a
            document is the answer; a document without one has neither class.
    """

    def __init__(self, tokenizer: Any, ends_of_thought: Sequence[str] = ENDS_OF_THOUGHT) -> None:
        self.tokenizer, self.ends = tokenizer, tuple(ends_of_thought)
        self._texts: dict[int, str] = {}

    def __call__(self, batch: Mapping[str, Any]) -> Tensor:
        """[B, L] sums of THINK or ANSWER and DIGIT; 0 for tokens that are not trained."""
        labels = aligned_labels(batch, "TokenClasses").cpu()
        positions = batch.get("position_ids")
        kinds = torch.zeros(labels.shape, dtype=torch.uint8)
        if labels.numel() > MAX_TOKENS:
            labels = labels[: max(1, MAX_TOKENS // labels.shape[1])]
        for row, tokens in enumerate(labels.tolist()):
            starts = [0]
            if positions is not None:
                starts = (positions[row] == 0).nonzero().squeeze(1).tolist() or [0]
            for start, stop in zip(starts, [*starts[1:], len(tokens)], strict=True):
                kinds[row, start:stop] = torch.tensor(
                    self._document(tokens[start:stop]), dtype=torch.uint8
                )
        return kinds.to(batch["shift_labels"].device)

    def _document(self, labels: list[int]) -> list[int]:
        texts = [self._text(token) if token >= 0 else "" for token in labels]
        text = "".join(texts)
        end = max(
            (at + len(marker) for marker in self.ends if (at := text.rfind(marker)) >= 0),
            default=-1,
        )
        kinds, start = [], 0
        for token, part in zip(labels, texts, strict=True):
            kind = 0
            if token >= 0:
                if end >= 0:
                    kind = THINK if start < end else ANSWER
                if any(letter.isdigit() for letter in part):
                    kind |= DIGIT
            kinds.append(kind)
            start += len(part)
        return kinds

    def _text(self, token: int) -> str:
        found = self._texts.get(token)
        if found is None:
            found = self._texts[token] = self.tokenizer.decode([token])
        return found
