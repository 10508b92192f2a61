"""Rows to a batch: pads on the right, looks up the teacher, and shifts; nothing else ever shifts.

In a batch, row i of a sequence predicts the token after token i: ``labels[i]`` is that token and
``teacher_ids[i]``, ``teacher_logprobs[i]`` are the teacher's distribution for it.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

IGNORE = -100


@dataclass
class DistillationCollator:
    """Collates rows of {input_ids, labels[, weights]} into a batch for ``Objective``.

    Attributes:
        pad_token_id: fills input_ids; padding is never trained on.
        cache: a ``kd.cache.TeacherCache`` (anything with ``batch(sequences, length)``), or None.
        pad_to_multiple_of: rounds the length up, for tensor cores.
        attention_mask: leave the mask out of the batch when False. With padding on the right and
            causal attention no real token sees padding, so a decoder gives the same answer
            without it, and faster.
    """

    pad_token_id: int
    cache: Any = None
    pad_to_multiple_of: int = 1
    attention_mask: bool = True

    def __call__(self, rows: Sequence[Mapping[str, Any]]) -> dict[str, Tensor]:
        sequences = [_tensor(row["input_ids"], torch.long) for row in rows]
        longest = max(len(ids) for ids in sequences)
        length = -(-longest // self.pad_to_multiple_of) * self.pad_to_multiple_of
        shape = (len(rows), length)
        input_ids = torch.full(shape, self.pad_token_id, dtype=torch.long)
        labels = torch.full(shape, IGNORE, dtype=torch.long)
        weights = torch.zeros(shape) if "weights" in rows[0] else None
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
        batch = {"input_ids": input_ids, "labels": labels}
        if weights is not None:
            batch["weights"] = weights
        if self.attention_mask:
            lengths = torch.tensor([len(ids) for ids in sequences])
            batch["attention_mask"] = (torch.arange(length) < lengths[:, None]).long()
        if self.cache is not None:
            targets = self.cache.batch(sequences, length)
            batch["teacher_ids"] = targets.ids  # [B, L, K]
            batch["teacher_logprobs"] = targets.logprobs  # [B, L, K]
        return batch


def _tensor(values: Any, dtype: torch.dtype) -> Tensor:
    return torch.as_tensor(values, dtype=dtype)
