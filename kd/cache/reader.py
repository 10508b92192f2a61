"""Read a cache: random access by a sequence's tokens, decoded straight into batches."""

from __future__ import annotations

import hashlib
import os
import threading
from collections import OrderedDict
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from kd.cache.codecs import Rows, starts
from kd.cache.index import KeyIndex
from kd.cache.keys import describe, key_of, token_array
from kd.cache.manifest import Manifest, ShardEntry, read_manifest, safe_path
from kd.cache.meta import CacheMeta, side_by_side, unmet
from kd.cache.shards import Block, Shard
from kd.cache.writer import shard_options

MAX_OPEN = 256


@dataclass(frozen=True)
class SparseTargets:
    """A teacher's sparse distributions, as ``kd.TopK`` takes them.

    Attributes:
        ids: [L, K] or [B, L, K] int64; -1 is an empty slot.
        logprobs: the same shape, float32, natural logarithms; -inf in empty slots.
        tail: what the probability outside the stored tokens means.
        temperature: the one the log-probabilities were captured at.
    """

    ids: Tensor
    logprobs: Tensor
    tail: str
    temperature: float


class CacheReader:
    """What caches of every tier share: opening, checks, finding and decoding sequences.

    Cheap to open and to send to DataLoader workers.

    Args:
        path: the cache's folder.
        expect: what the cache has to be: a CacheMeta, or a mapping of the fields that matter,
            such as {"temperature": 2.0, "tokenizer": tokenizer_fingerprint(tokenizer)}. Anything
            else is refused with both sides shown.
        allow: fields of ``expect`` that may differ after all, such as ("teacher",).
        verify: compare a shard's SHA-256 with the manifest when it is first read.
        partial: open a cache whose capture has not ended.
        duplicates: a sequence stored twice is an "error", or its "first" copy is used.
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
    ) -> None:
        self.path, self.verify = Path(path), verify
        self.manifest: Manifest = read_manifest(self.path)
        self.meta: CacheMeta = self.manifest.meta
        if expect is not None:
            self._check_expected(expect, tuple(allow))
        if self.manifest.open_writers and not partial:
            raise ValueError(
                f"TeacherCache: the capture of {self.path} must have ended, got writers of rank "
                f"{self.manifest.open_writers} that are at work or were stopped. Run the capture "
                "again (it continues), or open with partial=True."
            )
        self._shards: OrderedDict[int, Shard] = OrderedDict()
        self._verified: set[int] = set()
        self._guard = threading.RLock()
        for entry in self.manifest.shards:
            self._check_size(entry)
        shards = (self._shard(i) for i in range(len(self.manifest.shards)))
        self._index = KeyIndex([(np.array(shard.keys), shard.lengths) for shard in shards])
        if duplicates != "first":
            self._index.refuse_duplicates([entry.name for entry in self.manifest.shards])

    def __len__(self) -> int:
        return len(self._index)

    def __contains__(self, input_ids: Any) -> bool:
        return self._index.find(key_of(token_array(input_ids, "TeacherCache"))) is not None

    def __getstate__(self) -> dict[str, Any]:
        state = dict(self.__dict__)
        state.update(_shards=OrderedDict(), _guard=None)
        return state

    def __setstate__(self, state: dict[str, Any]) -> None:
        self.__dict__.update(state)
        self._guard = threading.RLock()

    @property
    def tokens(self) -> int:
        """Tokens in the cache."""
        return sum(entry.rows for entry in self.manifest.shards)

    def sequences(self) -> Iterator[NDArray[np.int32]]:
        """The token ids of every sequence, in the order of the shards."""
        for number in range(len(self.manifest.shards)):
            shard = self.checked_shard(number)
            for sequence in range(shard.sequences):
                yield shard.tokens_of([sequence])

    def blocks(self, at_a_time: int = 256, shards: Sequence[int] | None = None) -> Iterator[Block]:
        """Everything in the cache, or in some shards, in blocks of sequences."""
        for number in range(len(self.manifest.shards)) if shards is None else shards:
            shard = self.checked_shard(number)
            for first in range(0, shard.sequences, at_a_time):
                yield shard.block(range(first, min(first + at_a_time, shard.sequences)))

    def missing(self, sequences: Sequence[Any]) -> list[int]:
        """Positions of the sequences that are not in the cache."""
        return [i for i, sequence in enumerate(sequences) if sequence not in self]

    def content_digest(self) -> str:
        """SHA-256 over every sequence's tokens and rows, whatever shard or order they are in."""
        parts = []
        for tokens in self.sequences():
            rows = self._rows([tokens])
            state = hashlib.sha256(tokens.tobytes())
            for data in (rows.counts, rows.ids, rows.logprobs):
                state.update(np.ascontiguousarray(data).tobytes())
            parts.append(state.digest())
        return hashlib.sha256(b"".join(sorted(parts))).hexdigest()

    def _rows(self, sequences: list[NDArray[np.int32]]) -> Rows:
        """Decode sequences, shard by shard, and bring them into the order asked for."""
        places = [self._place(tokens) for tokens in sequences]
        by_shard: dict[int, list[int]] = {}
        for i, (shard, _) in enumerate(places):
            by_shard.setdefault(shard, []).append(i)
        if len(by_shard) == 1:
            return self.checked_shard(places[0][0]).read([sequence for _, sequence in places])
        parts: list[Rows | None] = [None] * len(places)
        for number, members in by_shard.items():
            rows = self.checked_shard(number).read([places[i][1] for i in members])
            row_at = starts(np.array([len(sequences[i]) for i in members]))
            entry_at = starts(rows.counts)[row_at]
            for j, i in enumerate(members):
                a, b = int(entry_at[j]), int(entry_at[j + 1])
                counts = rows.counts[row_at[j] : row_at[j + 1]]
                parts[i] = Rows(counts, rows.ids[a:b], rows.logprobs[a:b])
        kept = [part for part in parts if part is not None]
        if not kept:
            return Rows(np.zeros(0, np.int32), np.zeros(0, np.int32), np.zeros(0, np.float32))
        return Rows(
            np.concatenate([part.counts for part in kept]),
            np.concatenate([part.ids for part in kept]),
            np.concatenate([part.logprobs for part in kept]),
        )

    def _place(self, tokens: NDArray[np.int32]) -> tuple[int, int]:
        found = self._index.find(key_of(tokens))
        if found is None:
            raise KeyError(
                f"TeacherCache: a sequence must be in the cache {self.path}, got "
                f"{describe(tokens)}. Its tokens changed since the capture (template, tokenizer, "
                "truncation), or it was not captured: cache.missing(sequences) counts them."
            )
        shard, sequence, length = found
        if length != len(tokens):
            raise ValueError(
                f"TeacherCache: sequence {describe(tokens)} must have {len(tokens)} rows, got "
                f"{length} in {self.manifest.shards[shard].name}. The shard is damaged: run kd "
                f"cache verify {self.path}."
            )
        return shard, sequence

    def _shard(self, number: int) -> Shard:
        with self._guard:
            shard = self._shards.get(number)
            if shard is None:
                entry = self.manifest.shards[number]
                path = safe_path(self.path, entry.name)
                meta = self.meta
                shard = Shard(path, meta.codec, shard_options(meta), meta.cache_id)
                self._check_counts(entry, shard)
                self._shards[number] = shard
                if len(self._shards) > MAX_OPEN:  # every mapping holds a file descriptor
                    self._shards.popitem(last=False)
            else:
                self._shards.move_to_end(number)
        return shard

    def checked_shard(self, number: int) -> Shard:
        """A shard whose checksum was compared, once in this process."""
        shard = self._shard(number)
        if self.verify and number not in self._verified:
            with self._guard:
                self.check_shard(number)
                self._verified.add(number)
        return shard

    def check_shard(self, number: int) -> None:
        """Compare a shard's SHA-256 with the manifest's.

        Raises:
            ValueError: naming the shard and both digests.
        """
        entry = self.manifest.shards[number]
        found = hashlib.sha256(self._shard(number).data.data).hexdigest()
        if found != entry.sha256:
            raise ValueError(
                f"TeacherCache: shard {entry.name} must have SHA-256 {entry.sha256}, got {found}. "
                f"Its data changed on disk: restore it, or run kd cache verify --repair "
                f"{self.path} and the capture again."
            )

    def _check_counts(self, entry: ShardEntry, shard: Shard) -> None:
        mine = (shard.sequences, shard.rows, shard.entries)
        listed = (entry.sequences, entry.rows, entry.entries)
        if mine != listed:
            raise ValueError(
                f"TeacherCache: shard {entry.name} must hold (sequences, rows, entries) = "
                f"{listed}, got {mine}. It was swapped with another: run kd cache verify "
                f"{self.path}."
            )

    def _check_size(self, entry: ShardEntry) -> None:
        path = safe_path(self.path, entry.name)
        if not path.exists():
            raise FileNotFoundError(
                f"TeacherCache: shard {entry.name} must be in {self.path}, got no such file. "
                f"Restore it, or run kd cache verify --repair {self.path} and the capture again."
            )
        size = path.stat().st_size
        if size != entry.bytes:
            raise ValueError(
                f"TeacherCache: shard {entry.name} must have {entry.bytes:,} bytes, got {size:,}. "
                f"It is truncated or foreign: restore it, or run kd cache verify --repair "
                f"{self.path} and the capture again."
            )

    def _check_expected(self, expect: CacheMeta | Mapping[str, Any], allow: Sequence[str]) -> None:
        found = [
            item for item in unmet(self.meta, expect) if item[0].partition(".")[0] not in allow
        ]
        if found:
            raise ValueError(
                f"TeacherCache: the cache {self.path} must match what is expected, got\n"
                f"{side_by_side(found, 'the cache', 'expected')}\n"
                "Capture a cache with these settings, or expect what the cache has."
            )

    def _packed_places(
        self, packs: Sequence[Sequence[Any]], length: int
    ) -> tuple[list[list[NDArray[np.int32]]], list[int], NDArray[np.int64]]:
        """The packs' tokens, the rows each uses, and where their rows lie in [B * length]."""
        where = f"{type(self).__name__}.batch"
        found = [[token_array(item, where) for item in pack] for pack in packs]
        used = [sum(len(tokens) for tokens in pack) for pack in found]
        if max(used, default=0) > length:
            raise ValueError(
                f"{where}: length must be at least that of the longest row ({max(used)}), got "
                f"{length}. Truncating would cut targets: truncate before the capture instead."
            )
        places = [np.arange(n) + row * length for row, n in enumerate(used)]
        return found, used, np.concatenate([*places, np.zeros(0, np.int64)])


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
        top_k: int | None = None,
    ) -> None:
        super().__init__(
            path,
            expect=expect,
            allow=allow,
            verify=verify,
            partial=partial,
            duplicates=duplicates,
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
        rows = self._rows([tokens])
        ids = torch.full((len(tokens), self.k), -1, dtype=torch.int64)
        logprobs = torch.full((len(tokens), self.k), -torch.inf)
        self._fill(rows, np.arange(len(tokens)), ids, logprobs)
        return SparseTargets(ids, logprobs, self.meta.tail, self.meta.temperature)

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
        shape = (len(found), length, self.k)
        ids = torch.full(shape, -1, dtype=torch.int64)
        logprobs = torch.full(shape, -torch.inf)
        rows = self._rows([tokens for pack in found for tokens in pack])
        self._fill(rows, at, ids.view(-1, self.k), logprobs.view(-1, self.k))
        return SparseTargets(ids, logprobs, self.meta.tail, self.meta.temperature)

    def _fill(self, rows: Rows, at: NDArray[np.int64], ids: Tensor, logprobs: Tensor) -> None:
        """Put rows into [N, K] tensors at the given rows, the likeliest k where there are more."""
        if self._top_k is not None and int(rows.counts.max(initial=0)) > self._top_k:
            rows = keep_top(rows, self._top_k)
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


def keep_top(rows: Rows, k: int) -> Rows:
    """The k likeliest entries of every row, likeliest first."""
    row = np.repeat(np.arange(len(rows.counts)), rows.counts)
    order = np.lexsort((-rows.logprobs, row))
    rank = np.arange(len(row)) - np.repeat(starts(rows.counts)[:-1], rows.counts)
    kept = order[rank < k]
    return Rows(np.minimum(rows.counts, k), rows.ids[kept], rows.logprobs[kept])
