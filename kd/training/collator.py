"""Rows to a batch: pads on the right, looks up the teacher, and shifts; nothing else ever shifts.

In a batch, row i of a sequence predicts the token after token i: ``shift_labels[i]`` is that token
(transformers' name for aligned labels) and ``teacher_ids[i]``, ``teacher_logprobs[i]`` are the
teacher's distribution for it. The last token of a document predicts nothing, also where another
document follows it in the same row.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from kd.training.alignment import IGNORE
from kd.training.teachers import Document, Teachers


@dataclass
class DistillationCollator:
    """Collates rows of {input_ids, labels[, weights][, lengths]} into a batch for ``Objective``.

    A row with ``lengths`` is a pack: so many documents behind each other. Each is looked up in
    the cache by itself, and the batch has ``position_ids`` instead of an attention mask, by which
    transformers keeps documents apart.

    Attributes:
        pad_token_id: fills input_ids; padding is never trained on.
        cache: a ``kd.cache.TeacherCache`` or ``HiddenCache`` (anything with
            ``batch(sequences, length)``), a ``Teacher``, a list of them, or None. With teachers by
            domain a row has a ``domain`` (a pack: ``domains``, one a document).
        pad_to_multiple_of: rounds the length up, for tensor cores.
        attention_mask: leave the mask out of the batch when False. With padding on the right and
            causal attention no real token sees padding, so a decoder gives the same answer
            without it, and faster.
        max_length: longest document the student can read; longer ones are refused. The trainer
            fills it in from the model.
    """

    pad_token_id: int
    cache: Any = None
    pad_to_multiple_of: int = 1
    attention_mask: bool = True
    max_length: int | None = None

    def __call__(self, rows: Sequence[Mapping[str, Any]]) -> dict[str, Tensor]:
        sequences = [_tensor(row["input_ids"], torch.long) for row in rows]
        longest = max(len(ids) for ids in sequences)
        length = -(-longest // self.pad_to_multiple_of) * self.pad_to_multiple_of
        shape = (len(rows), length)
        input_ids = torch.full(shape, self.pad_token_id, dtype=torch.long)
        labels = torch.full(shape, IGNORE, dtype=torch.long)
        weights = torch.zeros(shape) if "weights" in rows[0] else None
        teachers = Teachers.of(self.cache)
        documents: list[Document] = []  # (row, where it starts, its tokens, its domain)
        for i, (row, ids) in enumerate(zip(rows, sequences, strict=True)):
            target = _tensor(row["labels"], torch.long)
            if len(target) != len(ids):
                raise ValueError(
                    "DistillationCollator: labels must be as long as input_ids, got "
                    f"{len(target)} and {len(ids)}. Mask tokens with -100 instead of dropping them."
                )
            input_ids[i, : len(ids)] = ids
            labels[i, : len(ids) - 1] = target[1:]
            if weights is not None:
                weights[i, : len(ids) - 1] = _tensor(row["weights"], torch.float)[1:]
            start = 0
            for number, size in enumerate(_lengths(row, len(ids))):
                domain = -1 if teachers is None else teachers.domain_of(row, number)
                documents.append((i, start, ids[start : start + size], domain))
                self._check_length(documents[-1])
                labels[i, start + size - 1] = IGNORE
                start += size
        batch = {"input_ids": input_ids, "shift_labels": labels}
        if weights is not None:
            batch["weights"] = weights
        if any("lengths" in row for row in rows):
            batch["position_ids"] = _positions(shape, documents)
        elif self.attention_mask:
            lengths = torch.tensor([len(ids) for ids in sequences])
            batch["attention_mask"] = (torch.arange(length) < lengths[:, None]).long()
        if teachers is not None:
            batch |= teachers.cached(shape, documents)
        return batch

    def _check_length(self, document: Document) -> None:
        row, _, tokens, _ = document
        if self.max_length is not None and len(tokens) > self.max_length:
            raise ValueError(
                f"DistillationCollator: a document must have at most {self.max_length} tokens, the "
                f"student's context, got {len(tokens)} in row {row} of the batch (it starts with "
                f"{tokens[:8].tolist()}). Filter or truncate the traces, or raise the model's "
                "max_position_embeddings or RoPE scaling."
            )


def _lengths(row: Mapping[str, Any], size: int) -> list[int]:
    lengths = [int(length) for length in row.get("lengths", (size,))]
    if sum(lengths) != size or min(lengths) < 1:
        raise ValueError(
            "DistillationCollator: lengths must be positive and add up to the row's "
            f"{size} tokens, got {lengths}. Take them from the Pack."
        )
    return lengths


def _positions(shape: tuple[int, int], documents: Sequence[Document]) -> Tensor:
    """Positions that start at 0 in every document; the padding is a document of its own."""
    positions = torch.arange(shape[1]).repeat(shape[0], 1)
    ends = [0] * shape[0]
    for i, start, tokens, _ in documents:
        positions[i, start : start + len(tokens)] = torch.arange(len(tokens))
        ends[i] = start + len(tokens)
    for i, end in enumerate(ends):
        positions[i, end:] = torch.arange(shape[1] - end)
    return positions


def _tensor(values: Any, dtype: torch.dtype) -> Tensor:
    return torch.as_tensor(values, dtype=dtype)
