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

from kd.cache.bits import starts
from kd.cache.keys import KeyIndex, describe, key_of, token_array
from kd.cache.manifest import Manifest, read_manifest
from kd.cache.meta import CacheMeta, side_by_side, unmet
from kd.cache.rows import Rows
from kd.cache.shards import Shard, open_listed
from kd.cache.tails import keep_top

MAX_OPEN = 256


@dataclass(frozen=True)
class SparseTargets:
    """A teacher's sparse distributions: the fields of ``kd.TopK``.

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


class CacheReader:
    """What caches of every tier share: opening, checks, finding and decoding sequences.

    Arguments are those of ``TeacherCache``.
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
        if on_missing not in ("error", "skip"):
            raise ValueError(
                f"TeacherCache: on_missing must be 'error' or 'skip', got {on_missing!r}."
            )
        self.on_missing, self.skipped = on_missing, 0
        self.path, self.verify, self.top_k = Path(path), verify, top_k
        self.manifest: Manifest = read_manifest(self.path)
        self.meta: CacheMeta = self.manifest.meta
        self._check_expected(expect, allow)
        self._check_tier()
        self._check_top_k(top_k)
        if self.manifest.open_writers and not partial:
            raise ValueError(
                f"TeacherCache: the capture of {self.path} must have ended, got writers of rank "
                f"{self.manifest.open_writers} that are at work or were stopped. Run the capture "
                "again (it continues), or open with partial=True."
            )
        self._shards: OrderedDict[int, Shard] = OrderedDict()
        self._verified: set[int] = set()
        self._guard = threading.RLock()
        shards = (self.shard(i, verify=False) for i in range(len(self.manifest.shards)))
        self._index = KeyIndex([(np.array(shard.keys), shard.lengths) for shard in shards])
        if duplicates != "first":
            self._index.refuse_duplicates([entry.name for entry in self.manifest.shards])

    def __len__(self) -> int:
        return len(self._index)

    def __contains__(self, input_ids: Any) -> bool:
        return self._index.find(key_of(token_array(input_ids, "TeacherCache"))) is not None

    def __getstate__(self) -> dict[str, Any]:
        return {**self.__dict__, "_shards": OrderedDict(), "_guard": None}

    def __setstate__(self, state: dict[str, Any]) -> None:
        self.__dict__.update(state)
        self._guard = threading.RLock()

    @property
    def tokens(self) -> int:
        """Tokens in the cache."""
        return sum(entry.rows for entry in self.manifest.shards)

    def shard(self, number: int, *, verify: bool | None = None) -> Shard:
        """A shard, open; its checksum is compared once in this process.

        Args:
            number: its place in ``manifest.shards``.
            verify: as the cache was opened when None.
        """
        with self._guard:
            shard = self._shards.get(number)
            if shard is None:
                shard = open_listed(self.path, self.manifest.shards[number], self.meta)
                self._shards[number] = shard
                if len(self._shards) > MAX_OPEN:  # each holds a file descriptor
                    self._shards.popitem(last=False)
            else:
                self._shards.move_to_end(number)
            if (self.verify if verify is None else verify) and number not in self._verified:
                shard.check_digest(self.manifest.shards[number].sha256)
                self._verified.add(number)
        return shard

    def sequences(self) -> Iterator[NDArray[np.int32]]:
        """The token ids of every sequence, in the order of the shards."""
        for number in range(len(self.manifest.shards)):
            shard = self.shard(number)
            for sequence in range(shard.sequences):
                yield shard.tokens_of([sequence])

    def blocks(self, at_a_time: int = 256, shards: Sequence[int] | None = None) -> Iterator[Rows]:
        """Everything in the cache, or in some shards, so many sequences at a time."""
        for number in range(len(self.manifest.shards)) if shards is None else shards:
            shard = self.shard(number)
            for first in range(0, shard.sequences, at_a_time):
                yield shard.read(
                    range(first, min(first + at_a_time, shard.sequences)), complete=True
                )

    def missing(self, sequences: Sequence[Any]) -> list[int]:
        """Positions of the sequences that are not in the cache."""
        return [i for i, sequence in enumerate(sequences) if sequence not in self]

    def realised(self, input_ids: Any) -> Tensor:
        """What the teacher gave the text itself: the log-prob of the token after each, [L] float32.

        To 1 / 128 of a nat, at the cache's temperature, whether or not the token is among its
        row's; -inf where it was impossible, NaN in the last row, where nothing follows.

        Raises:
            ValueError: the cache does not store them.
            KeyError: when the sequence is not in the cache.
        """
        if not self.meta.realised:
            raise ValueError(
                f"{type(self).__name__}.realised: {self.path} must store the log-probs of the "
                "tokens that followed, got meta.realised=False. Capture again with this version; "
                "imported rows hold them only among their top-k."
            )
        tokens = token_array(input_ids, f"{type(self).__name__}.realised")
        place = self._place(tokens)
        if place is None:
            return torch.full((len(tokens),), torch.nan)
        return torch.from_numpy(self.shard(place[0]).realised_of([place[1]]))

    def content_digest(self) -> str:
        """SHA-256 over every sequence's tokens and rows, whatever shard or order they are in."""
        parts = []
        for rows in self.blocks(at_a_time=1):
            assert rows.tokens is not None
            state = hashlib.sha256(rows.tokens.tobytes())
            for data in (rows.counts, rows.ids, rows.logprobs, rows.tails, rows.realised):
                if data is not None:
                    state.update(np.ascontiguousarray(data).tobytes())
            parts.append(state.digest())
        return hashlib.sha256(b"".join(sorted(parts))).hexdigest()

    # --- for the tiers ----------------------------------------------------------------------------

    def rows_of(self, sequences: list[NDArray[np.int32]]) -> Rows:
        """Decode sequences, shard by shard, and bring them into the order asked for."""
        places = [self._place(tokens) for tokens in sequences]
        by_shard: dict[int, list[int]] = {}
        for i, place in enumerate(places):
            if place is not None:
                by_shard.setdefault(place[0], []).append(i)
        if len(by_shard) == 1 and None not in places:
            ((number, _),) = by_shard.items()
            return self.shard(number).read([place[1] for place in places if place])
        tails = len(self.meta.tail_temperatures)
        parts = [Rows.empty([len(tokens)], tails) for tokens in sequences]
        for number, members in by_shard.items():
            chosen = [place[1] for place in (places[i] for i in members) if place]
            for i, rows in zip(members, self.shard(number).read(chosen).split(), strict=True):
                parts[i] = rows
        return Rows.joined([Rows.empty([], tails), *parts])

    def packed_places(
        self, packs: Sequence[Sequence[Any]], length: int
    ) -> tuple[list[NDArray[np.int32]], NDArray[np.int64]]:
        """The packs' sequences, one after another, and where their rows lie in [B * length]."""
        where = f"{type(self).__name__}.batch"
        found = [[token_array(item, where) for item in pack] for pack in packs]
        used = [sum(len(tokens) for tokens in pack) for pack in found]
        if max(used, default=0) > length:
            raise ValueError(
                f"{where}: length must be at least that of the longest row ({max(used)}), got "
                f"{length}. Truncating would cut targets: truncate before the capture instead."
            )
        places = [np.arange(n) + row * length for row, n in enumerate(used)]
        sequences = [tokens for pack in found for tokens in pack]
        return sequences, np.concatenate([*places, np.zeros(0, np.int64)])

    def _place(self, tokens: NDArray[np.int32]) -> tuple[int, int] | None:
        """(shard, position in it) of a sequence; None where it is skipped."""
        found = self._index.find(key_of(tokens))
        if found is None and self.on_missing == "skip":
            self.skipped += 1
            return None
        if found is None:
            raise KeyError(
                f"TeacherCache: a sequence must be in the cache {self.path}, got "
                f"{describe(tokens)}. {self._index.why_missing(tokens)} "
                "cache.missing(sequences) lists them; on_missing='skip' trains without their "
                "targets."
            )
        shard, sequence, length = found
        if length != len(tokens):
            raise ValueError(
                f"TeacherCache: sequence {describe(tokens)} must have {len(tokens)} rows, got "
                f"{length} in {self.manifest.shards[shard].name}. The shard is damaged: run kd "
                f"cache verify {self.path}."
            )
        return shard, sequence

    def _check_expected(
        self, expect: CacheMeta | Mapping[str, Any] | None, allow: Sequence[str]
    ) -> None:
        found = [] if expect is None else unmet(self.meta, expect)
        found = [item for item in found if item[0].partition(".")[0] not in tuple(allow)]
        if found:
            raise ValueError(
                f"TeacherCache: the cache {self.path} must match what is expected, got\n"
                f"{side_by_side(found, 'the cache', 'expected')}\n"
                "Capture a cache with these settings, or expect what the cache has."
            )

    def _check_tier(self) -> None:
        """Refuse a cache whose rows this class does not read; this one looks at no row."""

    def _check_top_k(self, top_k: int | None) -> None:
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


class TeacherCache(CacheReader):
    """A cache of sparse targets on disk, read-only; cheap to open and to send to workers.

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

    def _check_tier(self) -> None:
        if self.meta.hidden:
            raise ValueError(
                f"TeacherCache: {self.path} must hold sparse targets, got hidden states. Open it "
                "with kd.cache.HiddenCache."
            )

    @property
    def k(self) -> int:
        """Slots of a row in every batch of this cache."""
        slots = max((entry.slots for entry in self.manifest.shards), default=0)
        return slots if self.top_k is None else min(slots, self.top_k)

    def lookup(self, input_ids: Any) -> SparseTargets:
        """The targets of one sequence, [L, K]: row i is for the token after token i.

        Raises:
            KeyError: when the sequence is not in the cache.
        """
        tokens = token_array(input_ids, "TeacherCache.lookup")
        return self._targets(self.rows_of([tokens]), np.arange(len(tokens)), (len(tokens),))

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
        sequences, at = self.packed_places(packs, length)
        return self._targets(self.rows_of(sequences), at, (len(packs), length))

    def _targets(self, rows: Rows, at: NDArray[np.int64], shape: tuple[int, ...]) -> SparseTargets:
        """Rows at the places ``at`` of a batch of ``shape``, the likeliest k of each."""
        meta, k = self.meta, self.k
        if self.top_k is not None and int(rows.counts.max(initial=0)) > self.top_k:
            rows = keep_top(
                rows, self.top_k, [meta.temperature / t for t in meta.tail_temperatures]
            )
        ids = torch.full((*shape, k), -1, dtype=torch.int64)
        logprobs = torch.full((*shape, k), -torch.inf)
        out_ids, out_logprobs = ids.view(-1, k).numpy(), logprobs.view(-1, k).numpy()
        if k and bool((rows.counts == k).all()):
            contiguous = len(at) > 0 and int(at[-1]) - int(at[0]) == len(at) - 1
            target: Any = slice(int(at[0]), int(at[0]) + len(at)) if contiguous else at
            out_ids[target] = rows.ids.reshape(-1, k)
            out_logprobs[target] = rows.logprobs.reshape(-1, k)
        else:
            slot = np.arange(len(rows.ids)) - np.repeat(starts(rows.counts)[:-1], rows.counts)
            flat = np.repeat(at * k, rows.counts) + slot
            out_ids.reshape(-1)[flat] = rows.ids
            out_logprobs.reshape(-1)[flat] = rows.logprobs
        tails = None
        if rows.tails is not None:
            tails = torch.zeros(*shape, rows.tails.shape[1])
            tails.view(-1, rows.tails.shape[1]).numpy()[at] = rows.tails
        return SparseTargets(
            ids, logprobs, meta.tail, meta.temperature, tails, tuple(meta.tail_temperatures)
        )
