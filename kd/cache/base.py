"""Opening a cache of any tier: checks, finding sequences by their tokens, decoding them."""

from __future__ import annotations

import hashlib
import os
import threading
from collections import OrderedDict
from collections.abc import Iterator, Mapping, Sequence
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
from kd.cache.writer import join_rows, shard_options

MAX_OPEN = 256


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
        on_missing: a sequence that is not in the cache is an "error", or "skip": its rows are
            empty, so that they add nothing to the loss, and ``skipped`` counts it.
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
    ) -> None:
        if on_missing not in ("error", "skip"):
            raise ValueError(
                f"TeacherCache: on_missing must be 'error' or 'skip', got {on_missing!r}."
            )
        self.on_missing, self.skipped = on_missing, 0
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
        return torch.from_numpy(self.checked_shard(place[0]).realised_of([place[1]]))

    def content_digest(self) -> str:
        """SHA-256 over every sequence's tokens and rows, whatever shard or order they are in."""
        parts = []
        for tokens in self.sequences():
            rows = self._rows([tokens])
            followed = self.realised(tokens).numpy() if self.meta.realised else None
            state = hashlib.sha256(tokens.tobytes())
            for data in (rows.counts, rows.ids, rows.logprobs, rows.tails, followed):
                if data is not None:
                    state.update(np.ascontiguousarray(data).tobytes())
            parts.append(state.digest())
        return hashlib.sha256(b"".join(sorted(parts))).hexdigest()

    def _rows(self, sequences: list[NDArray[np.int32]]) -> Rows:
        """Decode sequences, shard by shard, and bring them into the order asked for."""
        places = [self._place(tokens) for tokens in sequences]
        by_shard: dict[int, list[int]] = {}
        for i, place in enumerate(places):
            if place is not None:
                by_shard.setdefault(place[0], []).append(i)
        if len(by_shard) == 1 and None not in places:
            ((number, _),) = by_shard.items()
            return self.checked_shard(number).read([place[1] for place in places if place])
        parts = [self._no_rows(len(tokens)) for tokens in sequences]
        for number, members in by_shard.items():
            chosen = [place[1] for place in (places[i] for i in members) if place]
            rows = self.checked_shard(number).read(chosen)
            row_at = starts(np.array([len(sequences[i]) for i in members]))
            entry_at = starts(rows.counts)[row_at]
            for j, i in enumerate(members):
                entries = slice(int(entry_at[j]), int(entry_at[j + 1]))
                parts[i] = rows.cut(slice(int(row_at[j]), int(row_at[j + 1])), entries)
        return join_rows([self._no_rows(0), *parts])

    def _no_rows(self, number: int) -> Rows:
        """Rows that hold nothing."""
        temperatures = self.meta.tail_temperatures
        tails = np.zeros((number, len(temperatures)), np.float32) if temperatures else None
        return Rows(
            np.zeros(number, np.int32), np.zeros(0, np.int32), np.zeros(0, np.float32), tails
        )

    def _place(self, tokens: NDArray[np.int32]) -> tuple[int, int] | None:
        """(shard, position in it) of a sequence; None where it is skipped."""
        found = self._index.find(key_of(tokens))
        if found is None and self.on_missing == "skip":
            self.skipped += 1
            return None
        if found is None:
            raise KeyError(
                f"TeacherCache: a sequence must be in the cache {self.path}, got "
                f"{describe(tokens)}. {self._why_missing(tokens)} cache.missing(sequences) lists "
                "them; on_missing='skip' trains without their targets."
            )
        shard, sequence, length = found
        if length != len(tokens):
            raise ValueError(
                f"TeacherCache: sequence {describe(tokens)} must have {len(tokens)} rows, got "
                f"{length} in {self.manifest.shards[shard].name}. The shard is damaged: run kd "
                f"cache verify {self.path}."
            )
        return shard, sequence

    def _why_missing(self, tokens: NDArray[np.int32]) -> str:
        """The likely cause, from the part of a sequence that is stored."""
        part = self._index.part(tokens)
        if part is None:
            return (
                "Its tokens changed since the capture (template, tokenizer, truncation), or it "
                "was not captured."
            )
        start, stop = part
        ids = set(tokens[:start].tolist()) | set(tokens[stop:].tolist())
        if start or len(ids) == 1:
            return (
                f"It is padded: tokens {start} to {stop - 1} of it are in the cache, the others "
                f"are id {', '.join(map(str, sorted(ids)))}. Pass sequences without padding: "
                "[row[mask.bool()] for row, mask in zip(input_ids, attention_mask)]."
            )
        return (
            f"Its first {stop} tokens are in the cache as a sequence of their own. Where it is a "
            "pack, pass its documents (cache.packed, or rows with lengths to the collator); "
            "otherwise it was cut before the capture, or something was added to it since."
        )

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
        found = self._shard(number).digest()
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
