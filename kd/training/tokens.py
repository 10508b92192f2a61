"""Which trained tokens are thoughts, which are the answer, and which hold digits."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from kd.training.alignment import aligned_labels

THINK, ANSWER, DIGIT = 1, 2, 4
ENDS_OF_THOUGHT = ("</think>", "<|end_of_thought|>")
MAX_TOKENS = 1 << 16  # a step's classes cost a few milliseconds of Python


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
                found = (positions[row] == 0).nonzero().squeeze(1)
                starts = found.tolist() or [0]
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
