"""Read a cache: random access by a sequence's tokens, decoded straight into batches."""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from kd.cache.base import CacheReader
from kd.cache.codecs import Rows, starts
from kd.cache.keys import token_array
from kd.cache.meta import CacheMeta
from kd.cache.tails import add_entries


@dataclass(frozen=True)
class SparseTargets:
    """A teacher's sparse distributions, as ``kd.TopK`` takes them.

    Attributes:
        ids: [L, K] or [B, L, K] int64; -1 is an empty slot.
        logprobs: the same shape, float32, natural logarithms; -inf in empty slots.
        tail: what the probability outside the stored tokens means.
        temperature: the one the log-probabilities were captured at.
        tail_log_partition: [L, M] or [B, L, M] float32, the tail at ``tail_temperatures``; 0 in
            padding. None in a cache that does not store it.
        tail_temperatures: M temperatures, or none.
    """

    ids: Tensor
    logprobs: Tensor
    tail: str
    temperature: float
    tail_log_partition: Tensor | None = None
    tail_temperatures: tuple[float, ...] = ()


class TeacherCache(CacheReader):
    """A cache of sparse targets on disk, read-only.

    Args:
        path: the cache's folder.
        expect: what the cache has to be: a CacheMeta, or a mapping of the fields that matter,
            such as {"temperature": 2.0, "tokenizer": tokenizer_fingerprint(tokenizer)}. Anything
            else is refused with both sides shown.
        allow: fields of ``expect`` that may differ after all, such as ("teacher",).
        verify: compare a shard's SHA-256 with the manifest when it is first read.
        partial: open a cache whose capture has not ended.
        duplicates: a sequence stored twice is an "error", or its "first" copy is used.
        on_missing: a sequence that is not in the cache is an "error", or "skip": its rows are
            empty, so that they add nothing to the loss, and ``skipped`` counts it.
        top_k: keep at most this many tokens a row, the likeliest.
    """

    def __init__(
        self,
        path: str | os.PathLike[str],
        *,
        expect: CacheMeta | Mapping[str, Any] | None = None,
        allow: Sequence[str] = (),
        verify: bool = True,
        partial: bool = False,
        duplicates: str = "error",
        on_missing: str = "error",
        top_k: int | None = None,
    ) -> None:
        super().__init__(
            path,
            expect=expect,
            allow=allow,
            verify=verify,
            partial=partial,
            duplicates=duplicates,
            on_missing=on_missing,
        )
        if self.meta.selection == "hidden":
            raise ValueError(
                f"TeacherCache: {self.path} must hold sparse targets, got hidden states. Open it "
                "with kd.cache.HiddenCache."
            )
        self.slots = max((entry.slots for entry in self.manifest.shards), default=0)
        self._top_k = self._check_top_k(top_k)

    @property
    def k(self) -> int:
        """Slots of a row in every batch of this cache."""
        return self.slots if self._top_k is None else min(self.slots, self._top_k)

    def lookup(self, input_ids: Any) -> SparseTargets:
        """The targets of one sequence, [L, K]: row i is for the token after token i.

        Raises:
            KeyError: when the sequence is not in the cache.
        """
        tokens = token_array(input_ids, "TeacherCache.lookup")
        return self._targets(self._rows([tokens]), np.arange(len(tokens)), (len(tokens),))

    def batch(self, sequences: Sequence[Any], length: int) -> SparseTargets:
        """Targets of several sequences, padded on the right: [B, length, K].

        Args:
            sequences: B one-dimensional integer sequences, unpadded.
            length: of a row of the batch; at least that of the longest sequence.

        Returns:
            Padding has ids of -1 and log-probs of -inf.
        """
        return self.packed([[sequence] for sequence in sequences], length)

    def packed(self, packs: Sequence[Sequence[Any]], length: int) -> SparseTargets:
        """Targets of packed rows: each row of the batch holds several sequences end to end.

        Args:
            packs: B lists of one-dimensional integer sequences, in their order in the row.
            length: of a row of the batch.
        """
        found, _, at = self._packed_places(packs, length)
        rows = self._rows([tokens for pack in found for tokens in pack])
        return self._targets(rows, at, (len(found), length))

    def _targets(self, rows: Rows, at: NDArray[np.int64], shape: tuple[int, ...]) -> SparseTargets:
        """Rows at the places ``at`` of a batch of ``shape``, the likeliest k of each."""
        meta, k = self.meta, self.k
        if self._top_k is not None and int(rows.counts.max(initial=0)) > self._top_k:
            rows = keep_top(
                rows, self._top_k, [meta.temperature / t for t in meta.tail_temperatures]
            )
        ids = torch.full((*shape, k), -1, dtype=torch.int64)
        logprobs = torch.full((*shape, k), -torch.inf)
        self._fill(rows, at, ids.view(-1, k), logprobs.view(-1, k))
        tails = None
        if rows.tails is not None:
            tails = torch.zeros(*shape, rows.tails.shape[1])
            tails.view(-1, rows.tails.shape[1]).numpy()[at] = rows.tails
        return SparseTargets(
            ids, logprobs, meta.tail, meta.temperature, tails, tuple(meta.tail_temperatures)
        )

    def _fill(self, rows: Rows, at: NDArray[np.int64], ids: Tensor, logprobs: Tensor) -> None:
        """Put rows into [N, K] tensors at the given rows."""
        k = self.k
        contiguous = len(at) > 0 and int(at[-1]) - int(at[0]) == len(at) - 1
        out_ids, out_logprobs = ids.numpy(), logprobs.numpy()
        if k and bool((rows.counts == k).all()):
            target: Any = slice(int(at[0]), int(at[0]) + len(at)) if contiguous else at
            out_ids[target] = rows.ids.reshape(-1, k)
            out_logprobs[target] = rows.logprobs.reshape(-1, k)
            return
        first = starts(rows.counts)[:-1]
        slot = np.arange(len(rows.ids)) - np.repeat(first, rows.counts)
        flat = np.repeat(at * k, rows.counts) + slot
        out_ids.reshape(-1)[flat] = rows.ids
        out_logprobs.reshape(-1)[flat] = rows.logprobs

    def _check_top_k(self, top_k: int | None) -> int | None:
        if top_k is not None and not 1 <= top_k <= self.meta.top_k:
            raise ValueError(
                f"TeacherCache: top_k must be from 1 to the cached {self.meta.top_k}, got {top_k}. "
                "A larger k needs a new capture."
            )
        if top_k is not None and self.meta.tail != "bucket" and top_k < self.meta.top_k:
            raise ValueError(
                f"TeacherCache: top_k must be left out for selection {self.meta.selection!r}, got "
                f"{top_k}. Dropping sampled tokens would bias them."
            )
        return top_k


def keep_top(rows: Rows, k: int, powers: Sequence[float] = ()) -> Rows:
    """The k likeliest entries of every row, likeliest first; the others go to its tail.

    powers: temperature / t of each column of ``rows.tails``.
    """
    row = np.repeat(np.arange(len(rows.counts)), rows.counts)
    order = np.lexsort((-rows.logprobs, row))
    rank = np.arange(len(row)) - np.repeat(starts(rows.counts)[:-1], rows.counts)
    kept, left = order[rank < k], order[rank >= k]
    tails = rows.tails
    if tails is not None:
        tails = add_entries(tails, rows.logprobs[left], row[left], powers)
    return Rows(np.minimum(rows.counts, k), rows.ids[kept], rows.logprobs[kept], tails)
