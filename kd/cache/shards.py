"""One shard: a safetensors file of whole sequences, checked before a byte of it is believed.

The header is parsed here and not by the safetensors package, because a shard may hold only the
tensors that the format names, in a header of at most 64 KiB; any reader of safetensors opens it.
"""

from __future__ import annotations

import json
import mmap
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from kd.cache.bits import width_of
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
from kd.cache.keys import KEY_BYTES, key_of
from kd.cache.registry import CODECS

FORMAT = "kd-cache/1"
MAX_HEADER = 64 * 1024
DTYPES = {"U8": "u1", "U16": "<u2", "U32": "<u4", "I64": "<i8"}
NAMES = {np.dtype(code): name for name, code in DTYPES.items()}


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
        tensors["counts"] = counts.astype("<u2" if counts.max(initial=0) > 255 else "u1")
    width = width_of(options["live_vocab"] - 1)
    streams = {"tokens": fixed_stream(block.tokens, width, layout.rows)}
    side = Side(options)
    streams |= coder.encode(block.rows, layout, side)
    tensors |= {name: side.tables[name].astype("<u4") for name in coder.tables}
    for name, (data, offsets) in streams.items():
        tensors[name] = data
        tensors[f"{name}.offsets"] = offsets.astype("<u4" if offsets[-1] < 2**32 else "<i8")
    metadata = {
        "format": FORMAT,
        "cache_id": cache_id,
        "codec": codec,
        "sequences": str(len(block.lengths)),
        "rows": str(len(block.tokens)),
        "entries": str(len(block.rows.ids)),
        "row_entries": str(int(counts[0]) if same else -1),
        "params": json.dumps(side.params, sort_keys=True),
    }
    return _serialise(tensors, metadata)


def _serialise(tensors: Mapping[str, NDArray[Any]], metadata: Mapping[str, str]) -> bytes:
    """The safetensors layout: header length, JSON header, tensors; wide dtypes first, aligned."""
    order = sorted(tensors, key=lambda name: (-tensors[name].dtype.itemsize, name))
    header: dict[str, Any] = {"__metadata__": dict(metadata)}
    end = 0
    for name in order:
        data = tensors[name]
        start, end = end, end + data.nbytes
        header[name] = {
            "dtype": NAMES[data.dtype],
            "shape": list(data.shape),
            "data_offsets": [start, end],
        }
    text = json.dumps(header, sort_keys=True, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)
    parts = [len(text).to_bytes(8, "little"), text]
    return b"".join(parts + [np.ascontiguousarray(tensors[name]).tobytes() for name in order])


class Shard:
    """A shard on disk, memory-mapped; its schema is checked when it is opened.

    Args:
        path: the file.
        options: the codec's options, with ``live_vocab``.
        codec: the codec that the manifest names.
        cache_id: the identity it must belong to.
    """

    def __init__(self, path: Path, codec: str, options: Mapping[str, Any], cache_id: str) -> None:
        self.path, self.options, self.side = path, options, Side(options)
        self.codec: Codec = CODECS[codec]
        with open(path, "rb") as file:
            size = file.seek(0, 2)
            if size < 8:
                raise self._wrong("a header", f"{size} bytes")
            self.data = np.frombuffer(mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ), "u1")
        self.metadata, self.tensors = self._parse()
        self._check_metadata(cache_id)
        self.keys = self.tensors["keys"]
        self.lengths = self.tensors["lengths"].astype(np.int64)
        self._rows = starts(self.lengths)
        self._check_shapes()

    def _wrong(self, rule: str, got: str) -> ValueError:
        return ValueError(
            f"kd.cache: shard {self.path.name} must have {rule}, got {got}. It is damaged or not a "
            f"shard of this cache: kd cache verify {self.path.parent} lists what is wrong; delete "
            "it and run the capture again."
        )

    def _parse(self) -> tuple[dict[str, str], dict[str, NDArray[Any]]]:
        length = int.from_bytes(self.data[:8].tobytes(), "little")
        if length > MAX_HEADER:
            raise self._wrong(f"a header of at most {MAX_HEADER:,} bytes", f"{length:,}")
        if 8 + length > len(self.data):
            raise self._wrong(f"{8 + length:,} bytes or more", f"{len(self.data):,}")
        try:
            header = json.loads(self.data[8 : 8 + length].tobytes())
            metadata = header.pop("__metadata__")
            if not isinstance(metadata, dict):
                raise TypeError
        except (ValueError, KeyError, TypeError, AttributeError, RecursionError):
            raise self._wrong("a safetensors header with metadata", "other bytes") from None
        body, end, tensors = self.data[8 + length :], 0, {}
        allowed = {"keys", "lengths", "counts", *self.codec.tables}
        for name in ("tokens", *self.codec.streams):
            allowed |= {name, f"{name}.offsets"}
        if not set(header) <= allowed or not allowed - set(header) <= {"counts"}:
            raise self._wrong(f"the tensors {sorted(allowed)}", f"{sorted(header)[:12]}")
        for name, item in sorted(header.items(), key=lambda pair: _start_of(pair[1])):
            try:
                dtype, shape = np.dtype(DTYPES[item["dtype"]]), tuple(item["shape"])
                start, stop = item["data_offsets"]
                size = dtype.itemsize
                for dimension in shape:
                    if not isinstance(dimension, int) or dimension < 0:
                        raise ValueError
                    size *= dimension
            except (KeyError, TypeError, ValueError):
                raise self._wrong(f"a valid entry for {name}", f"{item!r}"[:120]) from None
            if start != end or stop - start != size or stop > len(body):
                raise self._wrong(
                    f"{name} in bytes {end:,} to {end + size:,} of its data",
                    f"{start!r} to {stop!r} of {len(body):,} bytes",
                )
            tensors[name], end = body[start:stop].view(dtype).reshape(shape), stop
        if end != len(body):
            raise self._wrong(f"{end:,} bytes of data", f"{len(body):,}")
        return metadata, tensors

    def _check_metadata(self, cache_id: str) -> None:
        if self.metadata.get("format") != FORMAT:
            raise self._wrong(f"format {FORMAT}", repr(self.metadata.get("format")))
        if self.metadata.get("cache_id") != cache_id:
            raise self._wrong(f"cache_id {cache_id}", repr(self.metadata.get("cache_id")))
        if self.metadata.get("codec") != self.codec.name:
            raise self._wrong(f"codec {self.codec.name}", repr(self.metadata.get("codec")))
        try:
            self.sequences = int(self.metadata["sequences"])
            self.rows = int(self.metadata["rows"])
            self.entries = int(self.metadata["entries"])
            self._row_entries = int(self.metadata["row_entries"])
            self.side.params = dict(json.loads(self.metadata["params"]))
        except (KeyError, TypeError, ValueError):
            raise self._wrong("its counts in its metadata", repr(self.metadata)[:200]) from None

    def _check_shapes(self) -> None:
        if self.keys.shape != (self.sequences, KEY_BYTES) or self.keys.dtype != np.uint8:
            raise self._wrong(f"keys [{self.sequences}, {KEY_BYTES}]", str(self.keys.shape))
        if self.lengths.shape != (self.sequences,) or int(self._rows[-1]) != self.rows:
            raise self._wrong(
                f"{self.rows} rows in {self.sequences} sequences",
                f"{int(self._rows[-1])} in {len(self.lengths)}",
            )
        for name in self.codec.tables:
            table = self.side.tables[name] = self.tensors[name]
            if table.ndim != 1 or (len(table) and int(table.max()) >= self.side.live_vocab):
                raise self._wrong(f"{name} of ids below {self.side.live_vocab}", "others")
        counts = self.tensors.get("counts")
        if (counts is None) != (self._row_entries >= 0):
            raise self._wrong("counts exactly when rows differ", f"{self._row_entries}")
        if counts is not None and counts.shape != (self.rows,):
            raise self._wrong(f"counts [{self.rows}]", str(counts.shape))
        for name in ("tokens", *self.codec.streams):
            offsets, data = self.tensors[f"{name}.offsets"], self.tensors[name]
            shapes_ok = offsets.shape == (self.sequences + 1,) and data.ndim == 1
            if (
                not shapes_ok
                or int(offsets[-1]) != len(data)
                or offsets[0] != 0
                or (offsets[1:] < offsets[:-1]).any()
            ):
                raise self._wrong(f"{name}.offsets that end at {len(data)}", str(offsets.shape))

    def counts_of(self, sequences: Sequence[int]) -> NDArray[np.int32]:
        """Entries of each row of these sequences, [n] int32."""
        rows = int(sum(self.lengths[s] for s in sequences))
        if self._row_entries >= 0:
            return np.full(rows, self._row_entries, np.int32)
        counts, bounds = self.tensors["counts"], self._rows
        return _joined(counts[bounds[s] : bounds[s + 1]] for s in sequences).astype(np.int32)

    def part(self, name: str, sequences: Sequence[int]) -> Stream:
        """A stream's bytes for these sequences, end to end, and where each one's start."""
        data, offsets = self.tensors[name], self.tensors[f"{name}.offsets"]
        at = [(int(offsets[s]), int(offsets[s + 1])) for s in sequences]
        sizes = np.array([stop - start for start, stop in at], np.int64)
        return _joined(data[start:stop] for start, stop in at), starts(sizes)

    def read(self, sequences: Sequence[int]) -> Rows:
        """Decode these sequences' rows, in this order."""
        counts = self.counts_of(sequences)
        layout = Layout.of(self.lengths[list(sequences)], counts)
        parts = {name: self.part(name, sequences) for name in self.codec.streams}
        return self.codec.decode(parts, counts, layout, self.side)

    def tokens_of(self, sequences: Sequence[int]) -> NDArray[np.int32]:
        """The token ids of these sequences, end to end."""
        width = width_of(self.options["live_vocab"] - 1)
        bounds = starts(self.lengths[list(sequences)])
        return fixed_values(self.part("tokens", sequences)[0], width, bounds)

    def block(self, sequences: Sequence[int]) -> Block:
        """These sequences with all they hold."""
        return Block(self.tokens_of(sequences), self.lengths[list(sequences)], self.read(sequences))


def _start_of(item: Any) -> int:
    try:
        return int(item["data_offsets"][0])
    except (KeyError, TypeError, ValueError, IndexError):
        return 0


def _joined(parts: Iterable[NDArray[Any]]) -> NDArray[Any]:
    found = list(parts)
    return found[0] if len(found) == 1 else np.concatenate(found)
