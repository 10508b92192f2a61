"""One shard: a safetensors file of whole sequences, checked before a byte of it is believed."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from kd.cache import realised, tails
from kd.cache.bits import GROUP, width_of
from kd.cache.codecs import (
    Codec,
    Layout,
    Rows,
    Side,
    Stream,
    fixed_stream,
    fixed_values,
    starts,
)
from kd.cache.header import Damaged, File, Place, count_in, parse, serialise, whole
from kd.cache.keys import KEY_BYTES, key_of
from kd.cache.manifest import version_of
from kd.cache.registry import CODECS

# What decoding bytes that no encoder wrote can raise.
DECODING = (ValueError, TypeError, LookupError, ArithmeticError, AssertionError, MemoryError)


@dataclass
class Block:
    """Whole sequences with their rows: what goes into a shard and comes out of one.

    tokens [N] int32, one a row; lengths [S] int64; rows the N distributions.
    """

    tokens: NDArray[np.int32]
    lengths: NDArray[np.int64]
    rows: Rows


def encode_shard(block: Block, codec: str, options: Mapping[str, Any], cache_id: str) -> bytes:
    """The bytes of a shard; the same block gives the same bytes.

    Args:
        block: the sequences.
        codec: a name from CODECS.
        options: the codec's options, with ``live_vocab``.
        cache_id: the identity of the cache it belongs to.
    """
    coder, counts = CODECS[codec], block.rows.counts
    layout = Layout.of(block.lengths, counts)
    keys = [key_of(block.tokens[a:b]) for a, b in zip(layout.rows, layout.rows[1:], strict=False)]
    same = len(counts) > 0 and bool((counts == counts[0]).all())
    tensors: dict[str, NDArray[Any]] = {
        "keys": np.frombuffer(b"".join(keys), np.uint8).reshape(-1, KEY_BYTES),
        "lengths": block.lengths.astype("<u4"),
    }
    if not same:
        most = int(counts.max(initial=0))
        tensors["counts"] = counts.astype(
            "u1" if most < 1 << 8 else "<u2" if most < 1 << 16 else "<u4"
        )
    width = width_of(options["live_vocab"] - 1)
    streams = {"tokens": fixed_stream(block.tokens, width, layout.rows)}
    side = Side(options)
    streams |= coder.encode(block.rows, layout, side)
    if block.rows.tails is not None:
        codes = tails.tail_codes(coder.name, streams, block.rows)
        streams |= tails.encode_tails(block.rows.tails, codes, layout, side)
    if block.rows.realised is not None:
        streams |= realised.encode_realised(block.rows.realised, layout, side)
    tensors |= {name: side.tables[name].astype("<u4") for name in coder.tables}
    for name, (data, offsets) in streams.items():
        tensors[name] = data
        tensors[f"{name}.offsets"] = offsets.astype("<u4" if offsets[-1] < 2**32 else "<i8")
    metadata = {
        "format": format_of(block.rows.realised is not None, block.rows.tails is not None),
        "cache_id": cache_id,
        "codec": codec,
        "sequences": str(len(block.lengths)),
        "rows": str(len(block.tokens)),
        "entries": str(len(block.rows.ids)),
        "row_entries": str(int(counts[0]) if same else -1),
        "params": json.dumps(side.params, sort_keys=True),
    }
    return serialise(tensors, metadata)


def format_of(realised: bool, tails: bool) -> str:
    return f"kd-cache/{version_of(realised, tails)}"


class Shard:
    """A shard on disk, open; its schema is checked when it is opened, its rows when they are read.

    Args:
        path: the file.
        options: the codec's options, with ``live_vocab``.
        codec: the codec that the manifest names.
        cache_id: the identity it must belong to.
    """

    def __init__(self, path: Path, codec: str, options: Mapping[str, Any], cache_id: str) -> None:
        self.path, self.options, self.side = path, options, Side(options)
        self.codec: Codec = CODECS[codec]
        self.tails = int(options.get("tail_temperatures", 0))  # values of a row
        self.realised = bool(options.get("realised", False))
        self.row_streams = (*self.codec.streams, *(tails.STREAMS if self.tails else ()))
        self.streams = (*self.row_streams, *(realised.STREAMS if self.realised else ()))
        self.file = File(path)
        self._offsets: dict[str, NDArray[np.int64]] = {}
        try:
            self.metadata, self.places = self._parse()
            self._check_metadata(cache_id)
            self.keys = self._small("keys", (self.sequences, KEY_BYTES), "u1")
            self.lengths = self._small("lengths", (self.sequences,), "<u4").astype(np.int64)
            self._rows = starts(self.lengths)
            self._check_shapes()
        except Damaged as error:
            raise self._wrong(error.rule, error.got) from None

    def _wrong(self, rule: str, got: str) -> ValueError:
        return ValueError(
            f"kd.cache: shard {self.path.name} must have {rule}, got {got}. It is damaged or not a "
            f"shard of this cache: kd cache verify {self.path.parent} lists what is wrong; delete "
            "it and run the capture again."
        )

    def digest(self) -> str:
        """The SHA-256 of the whole file."""
        found = hashlib.sha256()
        try:
            for part in self.file.parts():
                found.update(part.data)
        except Damaged as error:
            raise self._wrong(error.rule, error.got) from None
        return found.hexdigest()

    def _small(self, name: str, shape: tuple[int, ...], *dtypes: str) -> NDArray[Any]:
        """A tensor that is kept in memory, once its shape is that of what it describes."""
        place = self.places[name]
        if place.shape != shape or place.dtype not in map(np.dtype, dtypes):
            raise Damaged(f"{name} {list(shape)}", f"{place.dtype} {list(place.shape)}")
        return place.read()

    def _parse(self) -> tuple[dict[str, str], dict[str, Place]]:
        allowed = {"keys", "lengths", "counts", *self.codec.tables}
        for name in ("tokens", *self.streams):
            allowed |= {name, f"{name}.offsets"}
        return parse(self.file, allowed, ("counts",))

    def _check_metadata(self, cache_id: str) -> None:
        form = format_of(self.realised, bool(self.tails))
        expected = {"format": form, "cache_id": cache_id, "codec": self.codec.name}
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
        if int(self._rows[-1]) != self.rows:
            raise Damaged(f"{self.rows} rows", f"{int(self._rows[-1])}")
        live = self.side.live_vocab
        for name in self.codec.tables:
            size = self.places[name].shape[0]
            if size > live:
                raise Damaged(f"{name} of ids below {live:,}", f"{size:,} of them")
            table = self.side.tables[name] = self._small(name, (size,), "<u4")
            if size and int(table.max()) >= live:
                raise Damaged(f"{name} of ids below {live:,}", f"{int(table.max()):,}")
        for name in ("tokens", *self.streams):
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
        self._check_sizes()

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
        if self.codec.name.startswith("hidden"):
            return
        found = self._row_entries * self.rows
        if not same:
            found = int(self._small("counts", (self.rows,), "u1", "<u2", "<u4").sum(dtype=np.int64))
        if found != self.entries:
            raise Damaged(f"{self.entries:,} entries in its rows", f"{found:,}")

    def counts_of(self, sequences: Sequence[int]) -> NDArray[np.int32]:
        """Entries of each row of these sequences, [n] int32."""
        rows = int(sum(self.lengths[s] for s in sequences))
        if self._row_entries >= 0:
            return np.full(rows, self._row_entries, np.int32)
        return self._joined("counts", self._rows, sequences).astype(np.int32)

    def part(self, name: str, sequences: Sequence[int]) -> Stream:
        """A stream's bytes for these sequences, end to end, and where each one's start."""
        offsets = self._offsets[name]
        sizes = np.array([offsets[s + 1] - offsets[s] for s in sequences], np.int64)
        return self._joined(name, offsets, sequences), starts(sizes)

    def _joined(
        self, name: str, bounds: NDArray[np.int64], sequences: Sequence[int]
    ) -> NDArray[Any]:
        """What a tensor holds for these sequences, end to end; neighbours are read in one go."""
        place, spans = self.places[name], []  # type: ignore[var-annotated]
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

    def realised_of(self, sequences: Sequence[int]) -> NDArray[np.float32]:
        """Log-probs of the tokens that followed, of these sequences' rows, end to end."""
        bounds = starts(self.lengths[list(sequences)])
        parts = {name: self.part(name, sequences) for name in realised.STREAMS}
        try:
            return realised.decode_realised(parts, Layout(bounds, bounds), self.side)
        except DECODING as error:
            found = f"{error!s:.200}" or type(error).__name__
            raise self._wrong("realised tokens that can be decoded", found) from None

    def read(self, sequences: Sequence[int], *, check: bool = True) -> Rows:
        """Decode these sequences' rows, in this order, without what followed; ``check`` looks at
        every id and value."""
        counts = self.counts_of(sequences)
        layout = Layout.of(self.lengths[list(sequences)], counts)
        parts = {name: self.part(name, sequences) for name in self.row_streams}
        try:
            with np.errstate(all="ignore"):  # the rows are looked at below
                rows = self.codec.decode(parts, counts, layout, self.side)
                if self.tails:
                    codes = tails.tail_codes(self.codec.name, parts, rows)
                    rows.tails = tails.decode_tails(parts, self.tails, codes, layout, self.side)
        except DECODING as error:
            found = f"{error!s:.200}" or type(error).__name__
            raise self._wrong("rows that can be decoded", found) from None
        if check and not self.codec.name.startswith("hidden"):
            self._check_rows(rows, int(layout.entries[-1]))
        return rows

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

    def tokens_of(self, sequences: Sequence[int]) -> NDArray[np.int32]:
        """The token ids of these sequences, end to end."""
        width = width_of(self.options["live_vocab"] - 1)
        bounds = starts(self.lengths[list(sequences)])
        tokens = fixed_values(self.part("tokens", sequences)[0], width, bounds)
        if len(tokens) and int(tokens.max()) >= self.side.live_vocab:
            raise self._wrong(f"tokens below {self.side.live_vocab:,}", f"{int(tokens.max()):,}")
        return tokens

    def block(self, sequences: Sequence[int], *, check: bool = True) -> Block:
        """These sequences with all they hold."""
        rows = self.read(sequences, check=check)
        if self.realised:
            rows.realised = self.realised_of(sequences)
        return Block(self.tokens_of(sequences), self.lengths[list(sequences)], rows)
