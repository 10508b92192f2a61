"""Rows to a batch: pads on the right, looks up the teacher, and shifts; nothing else ever shifts.

In a batch, row i of a sequence predicts the token after token i: ``shift_labels[i]`` is that token
(transformers' name for aligned labels) and ``teacher_ids[i]``, ``teacher_logprobs[i]`` are the
teacher's distribution for it. The last token of a document predicts nothing, also where another
document follows it in the same row.
"""

from __future__ import annotations

import operator
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from kd.training.objective import Objective
from kd.training.rows import IGNORE, read_row
from kd.training.teachers import Document, Teachers


@dataclass
class DistillationCollator:
    """Collates rows of {input_ids, labels[, weights][, lengths]} into a batch for ``Objective``.

    ``labels`` of a row are Hugging Face's: the row's own tokens, not shifted, -100 where nothing is
    trained. ``weights`` (numbers or a mask, per token) may be in some rows only; a row without
    counts 1 a token. Padding that a row brings along, with its ``attention_mask``, is taken away.

    A row with ``lengths`` is a pack: so many documents behind each other. Each is looked up in
    the cache by itself, and the batch has ``position_ids`` instead of an attention mask, by which
    transformers keeps documents apart.

    Attributes:
        pad_token_id: fills input_ids; padding is never attended to or trained on.
        cache: the ``Objective``, whose teachers' caches are looked up; or a
            ``kd.cache.TeacherCache`` or ``HiddenCache`` (anything with ``batch(sequences,
            length)``), a ``Teacher``, a list of them, or None. With teachers by domain a row has
            a ``domain`` (a pack: ``domains``, one a document).
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

    def __post_init__(self) -> None:
        try:
            given = operator.index(self.pad_token_id)
        except TypeError:
            given = -1
        if given < 0 or isinstance(self.pad_token_id, bool):
            raise ValueError(
                "DistillationCollator: pad_token_id must be a token's number, got "
                f"{type(self.pad_token_id).__name__} {str(self.pad_token_id):.60}. Pass "
                "tokenizer.pad_token_id, or tokenizer.eos_token_id where that is None: padding is "
                "never trained on."
            )
        self.pad_token_id = given
        if isinstance(self.cache, Objective):
            self.cache = self.cache.teacher
        Teachers.of(self.cache)  # refuses what is no teacher before the first batch

    def __call__(self, rows: Sequence[Mapping[str, Any]]) -> dict[str, Tensor]:
        """A batch [B, L]: input_ids, shift_labels, attention_mask or position_ids, and more.

        Raises:
            ValueError: naming the row and the column that is missing or contradicts another.
        """
        teachers = Teachers.of(self.cache)
        read = [read_row(row, number) for number, row in enumerate(rows)]
        longest = max(len(row.input_ids) for row in read)
        length = -(-longest // self.pad_to_multiple_of) * self.pad_to_multiple_of
        shape = (len(read), length)
        input_ids = torch.full(shape, self.pad_token_id, dtype=torch.long)
        labels = torch.full(shape, IGNORE, dtype=torch.long)
        weights = torch.zeros(shape)
        documents: list[Document] = []  # (row, where it starts, its tokens, its domain)
        for i, row in enumerate(read):
            size = len(row.input_ids)
            input_ids[i, :size] = row.input_ids
            labels[i, : size - 1] = row.labels[1:]
            weights[i, : size - 1] = 1.0 if row.weights is None else row.weights[1:]
            start = 0
            for number, count in enumerate(row.lengths):
                domain = -1 if teachers is None else teachers.domain_of(rows[i], number)
                documents.append((i, start, row.input_ids[start : start + count], domain))
                self._check_length(documents[-1])
                start += count
                labels[i, start - 1] = IGNORE
        batch = {"input_ids": input_ids, "shift_labels": labels}
        if any(row.weights is not None for row in read):
            batch["weights"] = weights
        if any(row.packed for row in read):
            batch["position_ids"] = _positions(shape, documents)
        elif self.attention_mask:
            sizes = torch.tensor([len(row.input_ids) for row in read])
            batch["attention_mask"] = (torch.arange(length) < sizes[:, None]).long()
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


def default_collator(model: Any, processing_class: Any = None) -> DistillationCollator:
    """A collator with the pad token of a tokenizer, or else of a model's own configuration."""
    tokenizer = getattr(processing_class, "tokenizer", processing_class)
    config = getattr(model, "config", None)
    places = (tokenizer, getattr(model, "generation_config", None), config)
    for place in places:
        found = getattr(place, "pad_token_id", None)
        if isinstance(found, int) and found >= 0:
            return DistillationCollator(found)
    raise ValueError(
        "DistillationTrainer: data_collator must be given where neither processing_class nor the "
        "model's configuration has a pad token, got none. Pass processing_class=tokenizer, or "
        "data_collator=DistillationCollator(pad_token_id); the end-of-text token will do, as "
        "padding is never trained on."
    )


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
