"""What codecs share: named byte streams, what they know of a shard beside them, ids as gaps.

A stream holds one part per sequence, each part a whole number of bytes, so that sequences can be
read, copied and dropped one by one, and many parts can be decoded in one go.

Rows are sorted by rank, where rank is the id, or the id's place in a table of the shard's most
frequent ids followed by all others in ascending order. The gaps between a row's ranks go through
the prefix code of ``kd.cache.bits``.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

import numpy as np
from numpy.typing import NDArray

from kd.cache.bits import (
    Stream,
    best_parameter,
    decode_prefix,
    encode_prefix,
    prefix_cost,
    starts,
)
from kd.cache.meta import CacheMeta
from kd.cache.rows import Rows

Streams = dict[str, Stream]
ID_STREAMS = ("gaps.unary", "gaps.bits")
TABLE_SIZES = (1 << 8, 1 << 10, 1 << 12, 1 << 14, 1 << 16)
SAMPLE_ROWS = 1024


@dataclass
class Side:
    """What a codec knows of a shard beside its streams.

    meta: of the cache; params: small JSON values chosen for this shard; tables: arrays chosen for
    this shard; memory: whatever decoding wants to keep.
    """

    meta: CacheMeta
    params: dict[str, Any] = field(default_factory=dict)
    tables: dict[str, NDArray[np.uint32]] = field(default_factory=dict)
    memory: dict[str, Any] = field(default_factory=dict)

    @property
    def live_vocab(self) -> int:
        return self.meta.live_vocab


def encode_integers(
    name: str,
    param: str,
    values: NDArray[np.integer],
    bounds: NDArray[np.int64],
    side: Side,
    judged: NDArray[np.integer] | None = None,
) -> Streams:
    """The streams ``NAME.unary`` and ``NAME.bits`` of values [E] in one prefix code.

    The code is the best for ``judged`` (all values by default); it goes into ``side.params``.
    """
    mode, k = best_parameter(values if judged is None else judged)
    side.params.update({f"{param}_mode": mode, f"{param}_k": k})
    unary, bits = encode_prefix(values, k, mode, bounds)
    return {f"{name}.unary": unary, f"{name}.bits": bits}


def decode_integers(
    name: str, param: str, parts: Streams, bounds: NDArray[np.int64], side: Side
) -> NDArray[np.int32]:
    """The inverse of ``encode_integers``."""
    mode, k = str(side.params[f"{param}_mode"]), int(side.params[f"{param}_k"])
    return decode_prefix(parts[f"{name}.unary"], parts[f"{name}.bits"], k, mode, bounds)


# --- ids ------------------------------------------------------------------------------------------


def encode_ids(rows: Rows, side: Side) -> tuple[Streams, NDArray[np.int64]]:
    """The gaps' streams, and the order [E] in which the entries are stored."""
    table = _frequent_ids(rows, side.live_vocab)
    side.tables["ranks"] = table
    rank = ranking(table, side.live_vocab)[1][rows.ids]
    order = np.argsort(rows.row_of_entry * side.live_vocab + rank, kind="stable")
    gaps = gaps_of(rank[order], rows.counts)
    judged = gaps[: int(rows.counts[: 4 * SAMPLE_ROWS].sum())]
    return encode_integers("gaps", "gap", gaps, rows.entry_bounds, side, judged), order


def decode_ids(parts: Streams, rows: Rows, side: Side) -> NDArray[np.int32]:
    """The ids [E] in the order in which they were stored."""
    gaps, counts = decode_integers("gaps", "gap", parts, rows.entry_bounds, side), rows.counts
    gaps += 1
    if len(counts) and (counts == counts[0]).all():
        rank = np.cumsum(gaps.reshape(len(counts), -1), axis=1, dtype=np.int32).reshape(-1)
        rank -= 1
    else:
        total = np.cumsum(gaps, dtype=np.int64)
        before = np.concatenate([np.zeros(1, np.int64), total])[starts(counts)[:-1]]
        rank = (total - np.repeat(before, counts) - 1).astype(np.int32)
    if len(side.tables["ranks"]) == 0:
        return rank
    if "id_at" not in side.memory:
        side.memory["id_at"] = ranking(side.tables["ranks"], side.live_vocab)[0]
    return side.memory["id_at"].take(rank, mode="clip")


def gaps_of(rank: NDArray[np.integer], counts: NDArray[np.int32]) -> NDArray[np.int64]:
    """Ranks that ascend within each row as differences, less one; the first as it is."""
    gaps: NDArray[Any] = np.diff(rank.astype(np.int64), prepend=-1) - 1
    first = starts(counts)[:-1][counts > 0]
    gaps[first] = rank[first]
    return gaps


def ranking(
    table: NDArray[np.uint32], live_vocab: int
) -> tuple[NDArray[np.int32], NDArray[np.int32]]:
    """The id at each rank [V] and the rank of each id [V]: the table first, the others after."""
    others = np.ones(live_vocab, np.bool_)
    others[table] = False
    id_at = np.concatenate([table.astype(np.int32), np.flatnonzero(others).astype(np.int32)])
    rank = np.empty(live_vocab, np.int32)
    rank[id_at] = np.arange(live_vocab, dtype=np.int32)
    return id_at, rank


def _frequent_ids(rows: Rows, live_vocab: int) -> NDArray[np.uint32]:
    """The table that makes the shard smallest, itself included: the most frequent ids, or none.

    Sizes are estimated on evenly spread rows.
    """
    seen = np.bincount(rows.ids, minlength=live_vocab)
    order = np.argsort(-seen, kind="stable").astype(np.uint32)
    kept = np.zeros(len(rows.counts), np.bool_)
    kept[:: -(-len(rows.counts) // SAMPLE_ROWS) or 1] = True
    counts, ids = rows.counts[kept], rows.ids[kept[rows.row_of_entry]]
    row = np.repeat(np.arange(len(counts), dtype=np.int64), counts)
    scale = len(rows.ids) / max(len(ids), 1)
    best, smallest = 0, np.inf
    for size in (0, *TABLE_SIZES):
        if size > int((seen > 0).sum()) or size * 32 > 4 * len(rows.ids):
            break
        rank = ranking(order[:size], live_vocab)[1][ids]
        gaps = gaps_of(np.sort(row * live_vocab + rank) - row * live_vocab, counts)
        mode, k = best_parameter(gaps)
        bits = float(prefix_cost(gaps, k, mode).sum()) * scale + 32 * size
        if bits < smallest:
            best, smallest = size, bits
    return order[:best]
