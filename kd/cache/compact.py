"""The compact codecs: ids as coded gaps, values in a few bits or as counts of draws.

Rows are sorted by rank, where rank is the id, or the id's place in a table of the shard's most
frequent ids followed by all others in ascending order. The gaps between a row's ranks go through
the prefix code of ``kd.cache.prefix``.
"""

from __future__ import annotations

import math
from typing import Any

import numpy as np
from numpy.typing import NDArray

from kd.cache import prefix
from kd.cache.codecs import Layout, Rows, Side, Stream, Streams, starts

IDS = ("gaps.unary", "gaps.bits")
TABLE_SIZES = (1 << 8, 1 << 10, 1 << 12, 1 << 14, 1 << 16)
SAMPLE_ROWS = 1024
# The tail's mass: 8 bits of its log-odds, from 1.2e-7 to 0.9997; 255 is none.
TAIL_LOW, TAIL_STEP, NO_TAIL = -15.9, 23.9 / 254, 255
LEVELS = 110  # steps of sqrt(p) from 0 to 1 in the codec "compact", up to WIDE tokens a row
MAX_LEVELS = 1 << 16
WIDE = 66  # 64, and the text's own token and one more
FLOOR_STEP = 1 / 8  # nats


# --- ids ------------------------------------------------------------------------------------------


def encode_ids(rows: Rows, layout: Layout, side: Side) -> tuple[Streams, NDArray[np.int64]]:
    """The gaps' streams, and the order [E] in which the entries are stored."""
    table = frequent_ids(rows, side.live_vocab)
    side.tables["ranks"] = table
    rank = ranking(table, side.live_vocab)[1][rows.ids]
    row = np.repeat(np.arange(len(rows.counts), dtype=np.int64), rows.counts)
    order = np.argsort(row * side.live_vocab + rank, kind="stable")
    gaps = gaps_of(rank[order], rows.counts)
    picked = gaps[: int(rows.counts[: 4 * SAMPLE_ROWS].sum())]
    mode, k = prefix.best_parameter(picked)
    side.params.update(gap_mode=mode, gap_k=k)
    unary, bits = prefix.encode(gaps, k, mode, layout.entries)
    return {"gaps.unary": unary, "gaps.bits": bits}, order


def decode_ids(
    parts: Streams, counts: NDArray[np.int32], layout: Layout, side: Side
) -> NDArray[np.int32]:
    """The ids [E] in the order in which they were stored."""
    k, mode = int(side.params["gap_k"]), str(side.params["gap_mode"])
    gaps = prefix.decode(parts["gaps.unary"], parts["gaps.bits"], k, mode, layout.entries)
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


def frequent_ids(rows: Rows, live_vocab: int) -> NDArray[np.uint32]:
    """The table that makes the shard smallest, itself included: the most frequent ids, or none."""
    seen = np.bincount(rows.ids, minlength=live_vocab)
    order = np.argsort(-seen, kind="stable").astype(np.uint32)
    distinct = int((seen > 0).sum())
    some = _some_rows(rows)
    scale = len(rows.ids) / max(len(some.ids), 1)
    row = np.repeat(np.arange(len(some.counts), dtype=np.int64), some.counts)
    best, smallest = 0, np.inf
    for size in (0, *TABLE_SIZES):
        if size > max(distinct, 0) or size * 32 > 4 * len(rows.ids):
            break
        rank = ranking(order[:size], live_vocab)[1][some.ids]
        ordered = np.sort(row * live_vocab + rank) - row * live_vocab
        gaps = gaps_of(ordered, some.counts)
        mode, k = prefix.best_parameter(gaps)
        bits = float(prefix.cost(gaps, k, mode).sum()) * scale + 32 * size
        if bits < smallest:
            best, smallest = size, bits
    return order[:best]


def _some_rows(rows: Rows) -> Rows:
    """Evenly spread rows to estimate sizes on."""
    step = -(-len(rows.counts) // SAMPLE_ROWS) or 1
    kept = np.zeros(len(rows.counts), np.bool_)
    kept[::step] = True
    entries = np.repeat(kept, rows.counts)
    return Rows(rows.counts[kept], rows.ids[entries], rows.logprobs[entries])


# --- the mass of a row ----------------------------------------------------------------------------


def row_sums(values: NDArray[Any], counts: NDArray[np.int32]) -> NDArray[Any]:
    """Sums over each row's entries [N]; 0 for rows without any."""
    if len(counts) and (counts == counts[0]).all():
        return values.reshape(len(counts), -1).sum(1)
    return np.bincount(
        np.repeat(np.arange(len(counts)), counts), weights=values, minlength=len(counts)
    ).astype(values.dtype)


def encode_tail(mass: NDArray[np.float64]) -> NDArray[np.uint8]:
    """The code of what each row's probabilities leave to one."""
    tail = np.clip(1 - mass, 1e-12, 1 - 1e-12)
    code = np.rint((np.log(tail) - np.log1p(-tail) - TAIL_LOW) / TAIL_STEP)
    return np.where(tail < 1.2e-7, NO_TAIL, np.clip(code, 0, NO_TAIL - 1)).astype(np.uint8)


def log_mass_of_codes() -> NDArray[np.float32]:
    """log(1 - tail) for each of the 256 codes."""
    odds = TAIL_LOW + TAIL_STEP * np.arange(256)
    return np.where(np.arange(256) == NO_TAIL, 0.0, -np.log1p(np.exp(odds))).astype(np.float32)


LOG_MASS = log_mass_of_codes()


def row_stream(values: NDArray[np.uint8], width: int, layout: Layout) -> Stream:
    """One field of ``width`` bytes a row."""
    return values.reshape(-1), layout.rows * width


def spread(values: NDArray[Any], counts: NDArray[np.int32]) -> NDArray[Any]:
    """A value of each row [N] repeated for its entries [E]."""
    return np.repeat(values, counts)


# --- codecs ---------------------------------------------------------------------------------------


class Compact:
    """About 3 bits a value: sqrt(p) in steps of 1 / levels, coded above the row's least level.

    A step of 1/N in sqrt(p) adds at most about K / (6 N**2) nats of KL to a row of K tokens,
    whatever their probabilities; 110 keeps 64 tokens below 1e-3, and ``default_options`` takes more
    for wider rows. Level 0 (p below 2.5e-5)
    stands for the mean of the row's entries at that level. Rows are scaled to the stored mass.
    """

    name = "compact"
    streams: tuple[str, ...] = (*IDS, "levels.unary", "levels.bits", "heads", "floors")
    tables: tuple[str, ...] = ("ranks",)

    def encode(self, rows: Rows, layout: Layout, side: Side) -> Streams:
        streams, order = encode_ids(rows, layout, side)
        n, counts = levels_of(side), rows.counts
        p = np.exp(rows.logprobs[order].astype(np.float64))
        level = np.minimum(np.rint(np.sqrt(p) * n), n).astype(np.int64)
        row = spread(np.arange(len(counts)), counts)
        least = np.full(len(counts), 63, np.int64)
        np.minimum.at(least, row, level)
        excess = level - spread(least, counts)
        sizes = np.stack(
            [row_sums(prefix.cost(excess, k, "exponential"), counts) for k in range(4)]
        )
        k = sizes.argmin(0)
        unary, bits = prefix.encode(excess, spread(k, counts), "exponential", layout.entries)
        heads = np.stack([encode_tail(row_sums(p, counts)), (least << 2 | k).astype(np.uint8)], 1)
        floored = (least == 0) & (counts > 0)
        zero = level == 0
        mean = np.bincount(row[zero], p[zero], len(counts)) / np.maximum(
            np.bincount(row[zero], minlength=len(counts)), 1
        )
        floors = np.clip(np.rint(-np.log(np.maximum(mean, 1e-300)) / FLOOR_STEP), 0, 255)
        return {
            **streams,
            "levels.unary": unary,
            "levels.bits": bits,
            "heads": row_stream(heads, 2, layout),
            "floors": (floors[floored].astype(np.uint8), starts(floored)[layout.rows]),
        }

    def decode(self, parts: Streams, counts: NDArray[np.int32], layout: Layout, side: Side) -> Rows:
        ids = decode_ids(parts, counts, layout, side)
        heads = parts["heads"][0].reshape(-1, 2)
        k = spread((heads[:, 1] & 3).astype(np.int32), counts)
        least = (heads[:, 1] >> 2).astype(np.int32)
        level = prefix.decode(
            parts["levels.unary"], parts["levels.bits"], k, "exponential", layout.entries
        )
        level += spread(least, counts)
        p_of, log_p_of = self._tables(side)
        p, logprobs = p_of.take(level, mode="clip"), log_p_of.take(level, mode="clip")
        floored = (least == 0) & (counts > 0)
        if floored.any():
            code = np.zeros(len(counts), np.float32)
            code[floored] = parts["floors"][0]
            at = np.flatnonzero(level == 0)
            logprobs[at] = spread(-FLOOR_STEP * code, counts)[at]
            p[at] = np.exp(logprobs[at])
        total = np.maximum(row_sums(p, counts), np.float32(1e-30))
        logprobs += spread(LOG_MASS[heads[:, 0]] - np.log(total), counts)
        return Rows(counts, ids, np.minimum(logprobs, 0, out=logprobs))

    def _tables(self, side: Side) -> tuple[NDArray[np.float32], NDArray[np.float32]]:
        if "levels" not in side.memory:
            p = (np.arange(levels_of(side) + 1) / levels_of(side)) ** 2
            log_p = np.log(np.maximum(p, 1e-30))
            side.memory["levels"] = p.astype(np.float32), log_p.astype(np.float32)
        return side.memory["levels"]


def default_options(codec: str, top_k: int) -> dict[str, int]:
    """The codec's options for rows of ``top_k`` tokens: what keeps "compact" below 1e-3 nats."""
    if codec != Compact.name or top_k <= WIDE:
        return {}
    return {"levels": math.ceil(math.sqrt(250 * top_k))}


def levels_of(side: Side) -> int:
    """The codec's option ``levels``, checked."""
    levels = side.options.get("levels", LEVELS)
    if not isinstance(levels, int) or not 8 <= levels <= MAX_LEVELS:
        raise ValueError(
            f"CacheMeta: codec_options['levels'] must be an integer from 8 to {MAX_LEVELS}, got "
            f"{levels!r}."
        )
    return levels


class Log8:
    """8 bits a value: the distance from the row's best log-prob, finer near it."""

    name = "log8"
    streams: tuple[str, ...] = (*IDS, "values", "heads", "tails")
    tables: tuple[str, ...] = ("ranks",)

    def encode(self, rows: Rows, layout: Layout, side: Side) -> Streams:
        streams, order = encode_ids(rows, layout, side)
        counts, logprobs = rows.counts, rows.logprobs[order].astype(np.float64)
        row = spread(np.arange(len(counts)), counts)
        best, worst = np.full(len(counts), -np.inf), np.full(len(counts), np.inf)
        np.maximum.at(best, row, logprobs)
        np.minimum.at(worst, row, logprobs)
        span = np.where(counts > 0, np.minimum(best - worst, 6e4), 0).astype("<f2")
        # A half-float's rounding must not put the least value out of reach.
        wide = np.maximum(span.astype(np.float64), 1e-6)
        depth = np.clip((spread(best, counts) - logprobs) / spread(wide, counts), 0, 1)
        code = np.rint(255 * np.sqrt(depth)).astype(np.uint8)
        tail = encode_tail(row_sums(np.exp(logprobs), counts))
        return {
            **streams,
            "values": (code, layout.entries),
            "heads": row_stream(span.view(np.uint8), 2, layout),
            "tails": row_stream(tail, 1, layout),
        }

    def decode(self, parts: Streams, counts: NDArray[np.int32], layout: Layout, side: Side) -> Rows:
        ids = decode_ids(parts, counts, layout, side)
        span = np.array(parts["heads"][0]).view("<f2").astype(np.float32)
        code = parts["values"][0].astype(np.float32)
        logprobs = code * code
        logprobs *= spread(-span / np.float32(255**2), counts)
        total = np.maximum(row_sums(np.exp(logprobs), counts), np.float32(1e-30))
        logprobs += spread(LOG_MASS[parts["tails"][0]] - np.log(total), counts)
        return Rows(counts, ids, np.minimum(logprobs, 0, out=logprobs))


class Counts:
    """Draws with replacement: each id with how often it was drawn, exact."""

    name = "counts"
    streams: tuple[str, ...] = (*IDS, "counts.unary", "counts.bits")
    tables: tuple[str, ...] = ("ranks",)

    def encode(self, rows: Rows, layout: Layout, side: Side) -> Streams:
        streams, order = encode_ids(rows, layout, side)
        drawn = np.exp(rows.logprobs[order].astype(np.float64)) * draws_of(side)
        times = np.rint(drawn).astype(np.int64)
        if (np.abs(drawn - times) > 1e-3).any() or (times < 1).any():
            raise ValueError(
                "CacheWriter: codec 'counts' must store probabilities that are multiples of "
                f"1 / draws ({draws_of(side)}), got {drawn[np.abs(drawn - times).argmax()]} "
                "draws. Use codec 'float32' or 'log8' for other values."
            )
        k = prefix.best_parameter(times - 1)
        side.params.update(count_mode=k[0], count_k=k[1])
        unary, bits = prefix.encode(times - 1, k[1], k[0], layout.entries)
        return {**streams, "counts.unary": unary, "counts.bits": bits}

    def decode(self, parts: Streams, counts: NDArray[np.int32], layout: Layout, side: Side) -> Rows:
        ids = decode_ids(parts, counts, layout, side)
        mode, k = str(side.params["count_mode"]), int(side.params["count_k"])
        times = prefix.decode(parts["counts.unary"], parts["counts.bits"], k, mode, layout.entries)
        draws = draws_of(side)
        if "log" not in side.memory:
            ratio = np.arange(1, draws + 1) / draws
            side.memory["log"] = np.log(ratio).astype(np.float32)
        return Rows(counts, ids, side.memory["log"].take(times, mode="clip"))


def draws_of(side: Side) -> int:
    """The selection's option ``draws``, checked."""
    draws = side.options.get("draws")
    if not isinstance(draws, int) or not 1 <= draws <= 2**20:
        raise ValueError(
            "CacheMeta: codec 'counts' must have selection_options['draws'], an integer of at "
            f"least 1, got {draws!r}. It stores how often each token was drawn."
        )
    return draws
