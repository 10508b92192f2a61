"""How rows become bytes. Every codec turns the same rows into named byte streams and back."""

from __future__ import annotations

import math
from typing import Any, Protocol

import numpy as np
import torch
from numpy.typing import NDArray

from kd.cache.bits import (
    Stream,
    decode_prefix,
    encode_prefix,
    fixed_stream,
    fixed_values,
    prefix_cost,
    starts,
    width_of,
)
from kd.cache.rows import Rows, row_sums
from kd.cache.streams import (
    ID_STREAMS,
    Side,
    Streams,
    decode_ids,
    decode_integers,
    encode_ids,
    encode_integers,
)

Entries = tuple[NDArray[np.int32], NDArray[np.float32]]  # ids [E] and log-probs [E]
# The tail's mass: 8 bits of its log-odds, from 1.2e-7 to 0.9997; 255 is none.
TAIL_LOW, TAIL_STEP, NO_TAIL = -15.9, 23.9 / 254, 255
LEVELS = 110  # steps of sqrt(p) from 0 to 1 in the codec "compact", up to WIDE tokens a row
MAX_LEVELS = 1 << 16
WIDE = 66  # 64, and the text's own token and one more
FLOOR_STEP = 1 / 8  # nats
FP8_LARGEST = 448.0  # of float8_e4m3fn


class Codec(Protocol):
    """A way to store rows. ``name`` is what the manifest calls it."""

    name: str
    streams: tuple[str, ...]
    tables: tuple[str, ...]

    def encode(self, rows: Rows, side: Side) -> Streams:
        """The streams of these rows; params and tables go into ``side``."""
        ...

    def decode(self, parts: Streams, rows: Rows, side: Side) -> Entries:
        """Ids and log-probs of rows of which ``lengths`` and ``counts`` are known."""
        ...


# --- the mass of a row ----------------------------------------------------------------------------


def encode_tail(mass: NDArray[np.float64]) -> NDArray[np.uint8]:
    """The code of what each row's probabilities leave to one."""
    tail = np.clip(1 - mass, 1e-12, 1 - 1e-12)
    code = np.rint((np.log(tail) - np.log1p(-tail) - TAIL_LOW) / TAIL_STEP)
    return np.where(tail < 1.2e-7, NO_TAIL, np.clip(code, 0, NO_TAIL - 1)).astype(np.uint8)


def _log_mass_of_codes() -> NDArray[np.float32]:
    """log(1 - tail) for each of the 256 codes."""
    odds = TAIL_LOW + TAIL_STEP * np.arange(256)
    return np.where(np.arange(256) == NO_TAIL, 0.0, -np.log1p(np.exp(odds))).astype(np.float32)


LOG_MASS = _log_mass_of_codes()


def _scaled(
    logprobs: NDArray[np.float32],
    p: NDArray[np.float32],
    tails: NDArray[np.uint8],
    counts: NDArray[np.int32],
) -> NDArray[np.float32]:
    """``logprobs`` [E], p their exponentials, brought to the mass that each row's code says."""
    total = np.maximum(row_sums(p, counts), np.float32(1e-30))
    logprobs += np.repeat(LOG_MASS[tails] - np.log(total), counts)
    return np.minimum(logprobs, 0, out=logprobs)


def _row_stream(values: NDArray[np.uint8], width: int, rows: Rows) -> Stream:
    """One field of ``width`` bytes a row."""
    return values.reshape(-1), rows.bounds * width


# --- codecs ---------------------------------------------------------------------------------------


class Float32:
    """Lossless: ids at ceil(log2 V) bits in the order given, log-probs as float32."""

    name = "float32"
    streams: tuple[str, ...] = ("ids", "values")
    tables: tuple[str, ...] = ()

    def encode(self, rows: Rows, side: Side) -> Streams:
        values = np.ascontiguousarray(rows.logprobs, "<f4").view(np.uint8)
        return {
            "ids": fixed_stream(rows.ids, width_of(side.live_vocab - 1), rows.entry_bounds),
            "values": (values, rows.entry_bounds * 4),
        }

    def decode(self, parts: Streams, rows: Rows, side: Side) -> Entries:
        ids = fixed_values(parts["ids"][0], width_of(side.live_vocab - 1), rows.entry_bounds)
        return ids, np.array(parts["values"][0].view("<f4"), np.float32)


class Compact:
    """About 3 bits a value: sqrt(p) in steps of 1 / levels, coded above the row's least level.

    A step of 1/N in sqrt(p) adds at most about K / (6 N**2) nats of KL to a row of K tokens,
    whatever their probabilities; 110 keeps 64 tokens below 1e-3, and ``default_options`` takes more
    for wider rows. Level 0 (p below 2.5e-5) stands for the mean of the row's entries at that level.
    Rows are scaled to the stored mass.
    """

    name = "compact"
    streams: tuple[str, ...] = (*ID_STREAMS, "levels.unary", "levels.bits", "heads", "floors")
    tables: tuple[str, ...] = ("ranks",)

    def encode(self, rows: Rows, side: Side) -> Streams:
        streams, order = encode_ids(rows, side)
        n, counts, row = levels_of(side), rows.counts, rows.row_of_entry
        p = np.exp(rows.logprobs[order].astype(np.float64))
        level = np.minimum(np.rint(np.sqrt(p) * n), n).astype(np.int64)
        least = np.full(len(counts), 63, np.int64)
        np.minimum.at(least, row, level)
        excess = level - least[row]
        sizes = np.stack(
            [row_sums(prefix_cost(excess, k, "exponential"), counts) for k in range(4)]
        )
        k = sizes.argmin(0)
        unary, bits = encode_prefix(excess, k[row], "exponential", rows.entry_bounds)
        heads = np.stack([encode_tail(row_sums(p, counts)), (least << 2 | k).astype(np.uint8)], 1)
        with_zeros = (least == 0) & (counts > 0)
        zero = level == 0
        mean = np.bincount(row[zero], p[zero], len(counts)) / np.maximum(
            np.bincount(row[zero], minlength=len(counts)), 1
        )
        floors = np.clip(np.rint(-np.log(np.maximum(mean, 1e-300)) / FLOOR_STEP), 0, 255)
        return {
            **streams,
            "levels.unary": unary,
            "levels.bits": bits,
            "heads": _row_stream(heads, 2, rows),
            "floors": (floors[with_zeros].astype(np.uint8), starts(with_zeros)[rows.bounds]),
        }

    def decode(self, parts: Streams, rows: Rows, side: Side) -> Entries:
        ids, counts = decode_ids(parts, rows, side), rows.counts
        heads = parts["heads"][0].reshape(-1, 2)
        k = np.repeat((heads[:, 1] & 3).astype(np.int32), counts)
        least = (heads[:, 1] >> 2).astype(np.int32)
        level = decode_prefix(
            parts["levels.unary"], parts["levels.bits"], k, "exponential", rows.entry_bounds
        )
        level += np.repeat(least, counts)
        p_of, log_p_of = self._tables(side)
        p, logprobs = p_of.take(level, mode="clip"), log_p_of.take(level, mode="clip")
        with_zeros = (least == 0) & (counts > 0)
        if with_zeros.any():
            code = np.zeros(len(counts), np.float32)
            code[with_zeros] = parts["floors"][0]
            at = np.flatnonzero(level == 0)
            logprobs[at] = np.repeat(-FLOOR_STEP * code, counts)[at]
            p[at] = np.exp(logprobs[at])
        return ids, _scaled(logprobs, p, heads[:, 0], counts)

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
    levels = side.meta.codec_options.get("levels", LEVELS)
    if not isinstance(levels, int) or not 8 <= levels <= MAX_LEVELS:
        raise ValueError(
            f"CacheMeta: codec_options['levels'] must be an integer from 8 to {MAX_LEVELS}, got "
            f"{levels!r}."
        )
    return levels


class Log8:
    """8 bits a value: the distance from the row's best log-prob, finer near it."""

    name = "log8"
    streams: tuple[str, ...] = (*ID_STREAMS, "values", "heads", "tails")
    tables: tuple[str, ...] = ("ranks",)

    def encode(self, rows: Rows, side: Side) -> Streams:
        streams, order = encode_ids(rows, side)
        counts, row = rows.counts, rows.row_of_entry
        logprobs = rows.logprobs[order].astype(np.float64)
        best, worst = np.full(len(counts), -np.inf), np.full(len(counts), np.inf)
        np.maximum.at(best, row, logprobs)
        np.minimum.at(worst, row, logprobs)
        span = np.where(counts > 0, np.minimum(best - worst, 6e4), 0).astype("<f2")
        # A half-float's rounding must not put the least value out of reach.
        wide = np.maximum(span.astype(np.float64), 1e-6)
        depth = np.clip((best[row] - logprobs) / wide[row], 0, 1)
        tail = encode_tail(row_sums(np.exp(logprobs), counts))
        return {
            **streams,
            "values": (np.rint(255 * np.sqrt(depth)).astype(np.uint8), rows.entry_bounds),
            "heads": _row_stream(span.view(np.uint8), 2, rows),
            "tails": _row_stream(tail, 1, rows),
        }

    def decode(self, parts: Streams, rows: Rows, side: Side) -> Entries:
        ids = decode_ids(parts, rows, side)
        span = np.array(parts["heads"][0]).view("<f2").astype(np.float32)
        code = parts["values"][0].astype(np.float32)
        logprobs = code * code
        logprobs *= np.repeat(-span / np.float32(255**2), rows.counts)
        return ids, _scaled(logprobs, np.exp(logprobs), parts["tails"][0], rows.counts)


class Counts:
    """Draws with replacement: each id with how often it was drawn, exact."""

    name = "counts"
    streams: tuple[str, ...] = (*ID_STREAMS, "counts.unary", "counts.bits")
    tables: tuple[str, ...] = ("ranks",)

    def encode(self, rows: Rows, side: Side) -> Streams:
        streams, order = encode_ids(rows, side)
        drawn = np.exp(rows.logprobs[order].astype(np.float64)) * self._draws(side)
        times = np.rint(drawn).astype(np.int64)
        if (np.abs(drawn - times) > 1e-3).any() or (times < 1).any():
            raise ValueError(
                "CacheWriter: codec 'counts' must store probabilities that are multiples of "
                f"1 / draws ({self._draws(side)}), got {drawn[np.abs(drawn - times).argmax()]} "
                "draws. Use codec 'float32' or 'log8' for other values."
            )
        return streams | encode_integers("counts", "count", times - 1, rows.entry_bounds, side)

    def decode(self, parts: Streams, rows: Rows, side: Side) -> Entries:
        ids = decode_ids(parts, rows, side)
        times = decode_integers("counts", "count", parts, rows.entry_bounds, side)
        if "log" not in side.memory:
            draws = self._draws(side)
            side.memory["log"] = np.log(np.arange(1, draws + 1) / draws).astype(np.float32)
        return ids, side.memory["log"].take(times, mode="clip")

    def _draws(self, side: Side) -> int:
        draws = side.meta.selection_options.get("draws")
        if not isinstance(draws, int) or not 1 <= draws <= 2**20:
            raise ValueError(
                "CacheMeta: codec 'counts' must have selection_options['draws'], an integer of at "
                f"least 1, got {draws!r}. It stores how often each token was drawn."
            )
        return draws


class HiddenBF16:
    """Hidden states, 2 bytes a value: bfloat16, exact for a bfloat16 teacher."""

    name = "hidden_bf16"
    streams: tuple[str, ...] = ("hidden",)
    tables: tuple[str, ...] = ()

    def encode(self, rows: Rows, side: Side) -> Streams:
        values = torch.from_numpy(rows.logprobs).bfloat16().view(torch.uint8).numpy()
        return {"hidden": (values, rows.entry_bounds * 2)}

    def decode(self, parts: Streams, rows: Rows, side: Side) -> Entries:
        packed = np.array(parts["hidden"][0]).view("<u2").astype(np.uint32) << 16
        return np.zeros(0, np.int32), packed.view(np.float32)


class HiddenFP8:
    """Hidden states, 1 byte a value: float8 (e4m3fn) times a float32 scale for each row."""

    name = "hidden_fp8"
    streams: tuple[str, ...] = ("hidden", "scales")
    tables: tuple[str, ...] = ()

    def encode(self, rows: Rows, side: Side) -> Streams:
        values = torch.from_numpy(rows.logprobs).view(len(rows.counts), -1)
        scale = values.abs().amax(1, keepdim=True).clamp(min=1e-30) / FP8_LARGEST
        packed = (values / scale).to(torch.float8_e4m3fn).view(torch.uint8).numpy()
        return {
            "hidden": (packed.reshape(-1), rows.entry_bounds),
            "scales": _row_stream(scale.numpy().astype("<f4").view(np.uint8), 4, rows),
        }

    def decode(self, parts: Streams, rows: Rows, side: Side) -> Entries:
        packed = torch.from_numpy(np.array(parts["hidden"][0])).view(torch.float8_e4m3fn)
        scales = np.array(parts["scales"][0]).view("<f4")
        values = packed.float().numpy().reshape(len(rows.counts), -1) * scales[:, None]
        return np.zeros(0, np.int32), values.reshape(-1).astype(np.float32)


_ALL: tuple[Any, ...] = (Float32(), Log8(), Compact(), Counts(), HiddenBF16(), HiddenFP8())
CODECS: dict[str, Codec] = {codec.name: codec for codec in _ALL}
