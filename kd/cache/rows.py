"""The rows of whole sequences: what goes into a shard and comes out of one."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import numpy as np
from numpy.typing import NDArray

from kd.cache.bits import starts


@dataclass
class Rows:
    """The distributions of S sequences of N tokens in all, one after another.

    lengths [S] int64: rows of each sequence; counts [N] int32: entries of each row; ids [E] int32
    and logprobs [E] float32: the entries, natural logarithms of probabilities over the live
    vocabulary (in a hidden-state cache no ids, and E hidden values); tails [N, M] float32 or None:
    see kd.cache.tails; realised [N] float32 or None: log-probs of the tokens that followed, NaN
    where none did; tokens [N] int32, or None where they were not read.
    """

    lengths: NDArray[np.int64]
    counts: NDArray[np.int32]
    ids: NDArray[np.int32]
    logprobs: NDArray[np.float32]
    tails: NDArray[np.float32] | None = None
    realised: NDArray[np.float32] | None = None
    tokens: NDArray[np.int32] | None = None

    @classmethod
    def empty(cls, lengths: Sequence[int], tails: int) -> Rows:
        """Rows that hold nothing, with ``tails`` values each."""
        number = sum(lengths)
        return cls(
            np.array(lengths, np.int64),
            np.zeros(number, np.int32),
            np.zeros(0, np.int32),
            np.zeros(0, np.float32),
            np.zeros((number, tails), np.float32) if tails else None,
        )

    @classmethod
    def joined(cls, parts: Sequence[Rows]) -> Rows:
        """All of them; an optional field is there where every part has it."""
        found: dict[str, Any] = {}
        for name in cls.__dataclass_fields__:
            values = [getattr(part, name) for part in parts]
            missing = any(value is None for value in values)
            found[name] = None if missing else np.concatenate(values)
        return cls(**found)

    @cached_property
    def bounds(self) -> NDArray[np.int64]:
        """Where each sequence's rows start, and the end, [S + 1]."""
        return starts(self.lengths)

    @cached_property
    def entry_bounds(self) -> NDArray[np.int64]:
        """Where each sequence's entries start, and the end, [S + 1]."""
        return starts(self.counts)[self.bounds]

    @cached_property
    def row_of_entry(self) -> NDArray[np.int64]:
        """The row of each entry, [E]."""
        return np.repeat(np.arange(len(self.counts)), self.counts)

    @property
    def mass(self) -> NDArray[np.float64]:
        """The probability that each row's entries hold, [N]."""
        return row_sums(np.exp(self.logprobs.astype(np.float64)), self.counts)

    def split(self) -> list[Rows]:
        """One ``Rows`` for each sequence."""
        parts = []
        for i, (a, b) in enumerate(zip(self.bounds, self.bounds[1:], strict=False)):
            entries = slice(self.entry_bounds[i], self.entry_bounds[i + 1])
            optional: list[Any] = [
                None if values is None else values[a:b]
                for values in (self.tails, self.realised, self.tokens)
            ]
            lengths, counts = self.lengths[i : i + 1], self.counts[a:b]
            parts.append(
                Rows(lengths, counts, self.ids[entries], self.logprobs[entries], *optional)
            )
        return parts


def row_sums(values: NDArray, counts: NDArray[np.int32]) -> NDArray:
    """Sums over each row's entries [N]; 0 for rows without any."""
    if len(counts) and (counts == counts[0]).all():
        return values.reshape(len(counts), -1).sum(1)
    return np.bincount(
        np.repeat(np.arange(len(counts)), counts), weights=values, minlength=len(counts)
    ).astype(values.dtype)
