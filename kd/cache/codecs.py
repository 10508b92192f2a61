"""How rows become bytes. Every codec turns the same flat rows into named byte streams and back.

A stream holds one part per sequence, each part a whole number of bytes, so that sequences can be
read, copied and dropped one by one, and many parts can be decoded in one go.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, Protocol

import numpy as np
from numpy.typing import NDArray

from kd.cache.bits import GROUP, Bytes, pack_fixed, unpack_fixed, width_of


@dataclass
class Rows:
    """Sparse distributions of many tokens, one after another.

    counts [N] int32: entries of each row; ids [E] int32; logprobs [E] float32, natural logarithms
    of probabilities over the live vocabulary; tails [N, M] float32 or None: see kd.cache.tails;
    realised [N] float32 or None: log-probs of the tokens that followed, NaN where none did.
    """

    counts: NDArray[np.int32]
    ids: NDArray[np.int32]
    logprobs: NDArray[np.float32]
    tails: NDArray[np.float32] | None = None
    realised: NDArray[np.float32] | None = None

    def cut(self, rows: slice, entries: slice) -> Rows:
        """Some rows with their entries."""
        tails = None if self.tails is None else self.tails[rows]
        realised = None if self.realised is None else self.realised[rows]
        return Rows(self.counts[rows], self.ids[entries], self.logprobs[entries], tails, realised)


@dataclass
class Layout:
    """How the rows are divided into sequences.

    rows [S + 1] and entries [S + 1]: where each sequence's rows and entries start, and the end.
    """

    rows: NDArray[np.int64]
    entries: NDArray[np.int64]

    @classmethod
    def of(cls, lengths: NDArray[np.integer], counts: NDArray[np.integer]) -> Layout:
        """From the rows of each sequence [S] and the entries of each row [N]."""
        rows = starts(lengths)
        return cls(rows, starts(counts)[rows])


Stream = tuple[Bytes, NDArray[np.int64]]  # bytes, and where each sequence's part starts
Streams = dict[str, Stream]


@dataclass
class Side:
    """What a codec knows of a shard beside its streams.

    options: of the cache, ``live_vocab`` among them; params: small JSON values chosen for this
    shard; tables: arrays chosen for this shard; memory: whatever decoding wants to keep.
    """

    options: Mapping[str, Any]
    params: dict[str, Any] = field(default_factory=dict)
    tables: dict[str, NDArray[np.uint32]] = field(default_factory=dict)
    memory: dict[str, Any] = field(default_factory=dict)

    @property
    def live_vocab(self) -> int:
        return int(self.options["live_vocab"])


class Codec(Protocol):
    """A way to store rows. ``name`` is what the manifest calls it."""

    name: str
    streams: tuple[str, ...]
    tables: tuple[str, ...]

    def encode(self, rows: Rows, layout: Layout, side: Side) -> Streams:
        """The streams of these rows; params and tables go into ``side``."""
        ...

    def decode(
        self, parts: Streams, counts: NDArray[np.int32], layout: Layout, side: Side
    ) -> Rows: ...


def starts(sizes: NDArray[np.integer]) -> NDArray[np.int64]:
    """Where parts of these sizes start when laid end to end, and where the last one ends."""
    out = np.zeros(len(sizes) + 1, np.int64)
    np.cumsum(sizes, out=out[1:])
    return out


def fixed_stream(values: NDArray[np.integer], width: int, bounds: NDArray[np.int64]) -> Stream:
    """Values [E] packed at a fixed width, each sequence filled up to a whole group of 8."""
    sizes = np.diff(bounds)
    whole = -(-sizes // GROUP) * GROUP
    if (whole != sizes).any():
        room = np.zeros(int(whole.sum()), np.uint32)
        room[_spread(sizes, whole)] = values
        values = room
    return pack_fixed(values, width), starts(whole // GROUP * width)


def fixed_values(packed: Bytes, width: int, bounds: NDArray[np.int64]) -> NDArray[np.int32]:
    """The inverse of ``fixed_stream`` for parts laid end to end."""
    values = unpack_fixed(packed, width)
    sizes = np.diff(bounds)
    whole = -(-sizes // GROUP) * GROUP
    if len(values) != int(whole.sum()):
        raise ValueError(
            f"kd.cache: a shard's stream must hold {int(whole.sum()):,} values, got "
            f"{len(values):,}. The shard is damaged: run kd cache verify."
        )
    return values if len(values) == int(bounds[-1]) else values[_spread(sizes, whole)]


def _spread(sizes: NDArray[np.int64], whole: NDArray[np.int64]) -> NDArray[np.int64]:
    """Where each of sum(sizes) values lies once every part is filled up to its whole size."""
    shift = np.repeat(starts(whole - sizes)[:-1], sizes)
    return np.arange(len(shift)) + shift


class Float32:
    """Lossless: ids at ceil(log2 V) bits in the order given, log-probs as float32."""

    name = "float32"
    streams: tuple[str, ...] = ("ids", "values")

    tables: tuple[str, ...] = ()

    def encode(self, rows: Rows, layout: Layout, side: Side) -> Streams:
        values = np.ascontiguousarray(rows.logprobs, "<f4").view(np.uint8)
        return {
            "ids": fixed_stream(rows.ids, width_of(side.live_vocab - 1), layout.entries),
            "values": (values, layout.entries * 4),
        }

    def decode(self, parts: Streams, counts: NDArray[np.int32], layout: Layout, side: Side) -> Rows:
        ids = fixed_values(parts["ids"][0], width_of(side.live_vocab - 1), layout.entries)
        return Rows(counts, ids, np.array(parts["values"][0].view("<f4"), np.float32))
