"""One shard: a safetensors file of whole sequences, checked before a byte of it is believed."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from kd.cache import tails
from kd.cache.bits import GROUP, Stream, fixed_stream, fixed_values, starts, width_of
from kd.cache.codecs import CODECS
from kd.cache.header import Damaged, File, Place, count_in, parse, serialise, whole
from kd.cache.keys import KEY_BYTES, key_of
from kd.cache.manifest import ShardEntry, safe_path, version_of
from kd.cache.meta import CacheMeta
from kd.cache.rows import Rows
from kd.cache.streams import Side

# What decoding bytes that no encoder wrote can raise.
DECODING = (ValueError, TypeError, LookupError, ArithmeticError, AssertionError, MemoryError)


def encode_shard(rows: Rows, meta: CacheMeta) -> bytes:
    """The bytes of a shard; the same rows, with their tokens, give the same bytes."""
    assert rows.tokens is not None
    coder, counts, bounds, side = CODECS[meta.codec], rows.counts, rows.bounds, Side(meta)
    keys = [key_of(rows.tokens[a:b]) for a, b in zip(bounds, bounds[1:], strict=False)]
    same = len(counts) > 0 and bool((counts == counts[0]).all())
    tensors: dict[str, NDArray[Any]] = {
        "keys": np.frombuffer(b"".join(keys), np.uint8).reshape(-1, KEY_BYTES),
        "lengths": rows.lengths.astype("<u4"),
    }
    if not same:
        most = int(counts.max(initial=0))
        tensors["counts"] = counts.astype(
            "u1" if most < 1 << 8 else "<u2" if most < 1 << 16 else "<u4"
        )
    streams = {"tokens": fixed_stream(rows.tokens, width_of(meta.live_vocab - 1), bounds)}
    streams |= coder.encode(rows, side)
    if rows.tails is not None:
        streams |= tails.encode_tails(rows, tails.tail_codes(coder.name, streams, rows), side)
    if rows.realised is not None:
        streams |= tails.encode_realised(rows, side)
    tensors |= {name: side.tables[name].astype("<u4") for name in coder.tables}
    for name, (data, offsets) in streams.items():
        tensors[name] = data
        tensors[f"{name}.offsets"] = offsets.astype("<u4" if offsets[-1] < 2**32 else "<i8")
    metadata = {
        "format": f"kd-cache/{version_of(meta)}",
        "cache_id": meta.cache_id,
        "codec": meta.codec,
        "sequences": str(len(rows.lengths)),
        "rows": str(len(counts)),
        "entries": str(len(rows.ids)),
        "row_entries": str(int(counts[0]) if same else -1),
        "params": json.dumps(side.params, sort_keys=True),
    }
    return serialise(tensors, metadata)


def entry_of(name: str, data: bytes, rows: Rows) -> ShardEntry:
    """A shard's line in the manifest."""
    return ShardEntry(
        name=name,
        bytes=len(data),
        sha256=hashlib.sha256(data).hexdigest(),
        sequences=len(rows.lengths),
        rows=len(rows.counts),
        entries=len(rows.ids),
        slots=int(rows.counts.max(initial=0)),
    )


def open_listed(folder: Path, entry: ShardEntry, meta: CacheMeta) -> Shard:
    """The shard that a manifest's entry speaks of.

    Raises:
        FileNotFoundError, ValueError: it is not there, of another size, or another shard.
    """
    path = safe_path(folder, entry.name)
    fix = f"restore it, or run kd cache verify --repair {folder} and the capture again."
    if not path.exists():
        raise FileNotFoundError(
            f"kd.cache: shard {entry.name} must be in {folder}, got no such file: {fix}"
        )
    size = path.stat().st_size
    if size != entry.bytes:
        raise ValueError(
            f"kd.cache: shard {entry.name} must have {entry.bytes:,} bytes, got {size:,}. It is "
            f"truncated or foreign: {fix}"
        )
    shard = Shard(path, meta)
    mine = (shard.sequences, shard.rows, shard.entries)
    listed = (entry.sequences, entry.rows, entry.entries)
    if mine != listed:
        raise ValueError(
            f"kd.cache: shard {entry.name} must hold (sequences, rows, entries) = {listed}, got "
            f"{mine}. It was swapped with another: run kd cache verify {folder}."
        )
    return shard


class Shard:
    """A shard on disk, open; its schema is checked when it is opened, its rows when they are read.

    Args:
        path: the file.
        meta: of the cache that it must belong to.

    Attributes:
        keys: [S, 16] uint8; lengths: [S] int64.
        sequences, rows, entries: how many it holds.
    """

    def __init__(self, path: Path, meta: CacheMeta) -> None:
        self.path, self.meta, self.side = path, meta, Side(meta)
        self.codec = CODECS[meta.codec]
        self.row_streams = self.codec.streams
        self.row_streams += tails.STREAMS if meta.tail_temperatures else ()
        self.streams = ("tokens", *self.row_streams)
        self.streams += tails.REALISED_STREAMS if meta.realised else ()
        self.file = File(path)
        self._offsets: dict[str, NDArray[np.int64]] = {}
        allowed = {"keys", "lengths", "counts", *self.codec.tables, *self.streams}
        allowed |= {f"{name}.offsets" for name in self.streams}
        try:
            self.metadata, self.places = parse(self.file, allowed, ("counts",))
            self._check_metadata()
            self.keys = self._small("keys", (self.sequences, KEY_BYTES), "u1")
            self.lengths = self._small("lengths", (self.sequences,), "<u4").astype(np.int64)
            self._bounds = starts(self.lengths)
            self._check_shapes()
            self._check_sizes()
        except Damaged as error:
            raise self._wrong(error.rule, error.got) from None

    @property
    def key_list(self) -> list[bytes]:
        """The keys of its sequences, in their order."""
        data = self.keys.tobytes()
        return [data[i : i + KEY_BYTES] for i in range(0, len(data), KEY_BYTES)]

    def check_digest(self, sha256: str) -> None:
        """Compare the SHA-256 of the whole file with what the manifest says.

        Raises:
            ValueError: naming the shard and both digests.
        """
        found = hashlib.sha256()
        try:
            for part in self.file.parts():
                found.update(part.data)
        except Damaged as error:
            raise self._wrong(error.rule, error.got) from None
        if found.hexdigest() != sha256:
            raise ValueError(
                f"kd.cache: shard {self.path.name} must have SHA-256 {sha256}, got "
                f"{found.hexdigest()}. Its data changed on disk: restore it, or run kd cache "
                f"verify --repair {self.path.parent} and the capture again."
            )

    def read(self, sequences: Sequence[int], *, check: bool = True, complete: bool = False) -> Rows:
        """Decode these sequences' rows, in this order.

        Args:
            sequences: their places in the shard.
            check: look at every id and value.
            complete: with their tokens, and what the teacher gave them, where that is stored.
        """
        chosen, counts = self.lengths[list(sequences)], self._counts_of(sequences)
        rows = Rows(chosen, counts, np.zeros(0, np.int32), np.zeros(0, np.float32))
        parts = {name: self.part(name, sequences) for name in self.row_streams}
        try:
            with np.errstate(all="ignore"):  # the rows are looked at below
                rows.ids, rows.logprobs = self.codec.decode(parts, rows, self.side)
                if self.meta.tail_temperatures:
                    codes = tails.tail_codes(self.codec.name, parts, rows)
                    rows.tails = tails.decode_tails(parts, rows.bounds, codes, self.side)
        except DECODING as error:
            found = f"{error!s:.200}" or type(error).__name__
            raise self._wrong("rows that can be decoded", found) from None
        if check and not self.meta.hidden:
            self._check_rows(rows, int(rows.entry_bounds[-1]))
        if complete:
            rows.tokens = self.tokens_of(sequences)
            rows.realised = self.realised_of(sequences) if self.meta.realised else None
        return rows

    def realised_of(self, sequences: Sequence[int]) -> NDArray[np.float32]:
        """Log-probs of the tokens that followed, of these sequences' rows, end to end."""
        parts = {name: self.part(name, sequences) for name in tails.REALISED_STREAMS}
        bounds = starts(self.lengths[list(sequences)])
        try:
            return tails.decode_realised(parts, bounds, self.side)
        except DECODING as error:
            found = f"{error!s:.200}" or type(error).__name__
            raise self._wrong("realised tokens that can be decoded", found) from None

    def tokens_of(self, sequences: Sequence[int]) -> NDArray[np.int32]:
        """The token ids of these sequences, end to end."""
        live, bounds = self.side.live_vocab, starts(self.lengths[list(sequences)])
        tokens = fixed_values(self.part("tokens", sequences)[0], width_of(live - 1), bounds)
        if len(tokens) and int(tokens.max()) >= live:
            raise self._wrong(f"tokens below {live:,}", f"{int(tokens.max()):,}")
        return tokens

    def part(self, name: str, sequences: Sequence[int]) -> Stream:
        """A stream's bytes for these sequences, end to end, and where each one's start."""
        offsets = self._offsets[name]
        sizes = np.array([offsets[s + 1] - offsets[s] for s in sequences], np.int64)
        return self._joined(name, offsets, sequences), starts(sizes)

    # --- checks -----------------------------------------------------------------------------------

    def _wrong(self, rule: str, got: str) -> ValueError:
        return ValueError(
            f"kd.cache: shard {self.path.name} must have {rule}, got {got}. It is damaged or not a "
            f"shard of this cache: kd cache verify {self.path.parent} lists what is wrong; delete "
            "it and run the capture again."
        )

    def _check_metadata(self) -> None:
        meta = self.meta
        form = f"kd-cache/{version_of(meta)}"
        expected = {"format": form, "cache_id": meta.cache_id, "codec": meta.codec}
        for name, wanted in expected.items():
            if self.metadata.get(name) != wanted:
                raise Damaged(f"{name} {wanted}", f"{self.metadata.get(name)!r}"[:120])
        self.sequences = count_in(self.metadata, "sequences")
        self.rows = count_in(self.metadata, "rows")
        self.entries = count_in(self.metadata, "entries")
        self._row_entries = count_in(self.metadata, "row_entries")
        try:
            self.side.params = dict(json.loads(self.metadata["params"]))
            known = all(isinstance(v, str) or whole(v) for v in self.side.params.values())
        except (KeyError, TypeError, ValueError, RecursionError):
            known = False
        if not known:
            raise Damaged("params in its metadata", f"{self.metadata.get('params')!r}"[:120])

    def _check_shapes(self) -> None:
        if int(self.lengths.min(initial=1)) < 1:
            raise Damaged(f"{self.sequences} lengths above 0", "0")
        if int(self._bounds[-1]) != self.rows:
            raise Damaged(f"{self.rows} rows", f"{int(self._bounds[-1])}")
        live = self.side.live_vocab
        for name in self.codec.tables:
            size = self.places[name].shape[0]
            if size > live:
                raise Damaged(f"{name} of ids below {live:,}", f"{size:,} of them")
            table = self.side.tables[name] = self._small(name, (size,), "<u4")
            if size and int(table.max()) >= live:
                raise Damaged(f"{name} of ids below {live:,}", f"{int(table.max()):,}")
        for name in self.streams:
            offsets = self._small(f"{name}.offsets", (self.sequences + 1,), "<u4", "<i8")
            place, at = self.places[name], offsets.astype(np.int64)
            if (
                (len(place.shape), place.dtype) != (1, np.dtype("u1"))
                or int(at[-1]) != place.shape[0]
                or at[0] != 0
                or (at[1:] < at[:-1]).any()
            ):
                raise Damaged(f"{name}.offsets that end at {place.shape[0]}", f"{int(at[-1])}")
            self._offsets[name] = at

    def _check_sizes(self) -> None:
        """Counts are backed by bytes, so that nothing is allocated on a false promise."""
        width = width_of(self.side.live_vocab - 1)
        held = np.diff(self._offsets["tokens"])
        if (held != -(-self.lengths // GROUP) * width).any():
            raise Damaged(
                f"tokens of {width} bits for {self.rows} rows", f"{int(held.sum())} bytes"
            )
        same = "counts" not in self.places
        if same != (self._row_entries >= 0):
            raise Damaged("counts exactly when rows differ", f"{self._row_entries}")
        if self.meta.hidden:
            return
        found = self._row_entries * self.rows
        if not same:
            found = int(self._small("counts", (self.rows,), "u1", "<u2", "<u4").sum(dtype=np.int64))
        if found != self.entries:
            raise Damaged(f"{self.entries:,} entries in its rows", f"{found:,}")

    def _check_rows(self, rows: Rows, entries: int) -> None:
        """One pass over the ids and one over the log-probs: that is what reading can afford."""
        if not len(rows.ids) == len(rows.logprobs) == entries:
            got = f"{len(rows.ids):,} and {len(rows.logprobs):,}"
            raise self._wrong(f"{entries:,} ids and log-probs in these rows", got)
        if entries == 0:
            return
        largest = int(rows.ids.view(np.uint32).max())  # a negative id is a large one
        if largest >= self.side.live_vocab:
            raise self._wrong(f"ids below {self.side.live_vocab:,}", f"{largest:,}")
        if not rows.logprobs.max() <= 0:  # NaN is the maximum wherever there is one
            raise self._wrong("log-probabilities of at most 0", f"{rows.logprobs.max()}")

    # --- bytes ------------------------------------------------------------------------------------

    def _small(self, name: str, shape: tuple[int, ...], *dtypes: str) -> NDArray[Any]:
        """A tensor that is kept in memory, once its shape is that of what it describes."""
        place = self.places[name]
        if place.shape != shape or place.dtype not in map(np.dtype, dtypes):
            raise Damaged(f"{name} {list(shape)}", f"{place.dtype} {list(place.shape)}")
        return place.read()

    def _counts_of(self, sequences: Sequence[int]) -> NDArray[np.int32]:
        """Entries of each row of these sequences, [n] int32."""
        if self._row_entries >= 0:
            return np.full(int(self.lengths[list(sequences)].sum()), self._row_entries, np.int32)
        return self._joined("counts", self._bounds, sequences).astype(np.int32)

    def _joined(
        self, name: str, bounds: NDArray[np.int64], sequences: Sequence[int]
    ) -> NDArray[Any]:
        """What a tensor holds for these sequences, end to end; neighbours are read in one go."""
        place: Place = self.places[name]
        spans: list[tuple[int, int]] = []
        for s in sequences:
            start, stop = int(bounds[s]), int(bounds[s + 1])
            if spans and spans[-1][1] == start:
                spans[-1] = (spans[-1][0], stop)
            else:
                spans.append((start, stop))
        try:
            parts = [place.read(start, stop) for start, stop in spans]
        except Damaged as error:
            raise self._wrong(error.rule, error.got) from None
        return parts[0] if len(parts) == 1 else np.concatenate([place.read(0, 0), *parts])
