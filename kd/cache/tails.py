"""What a row holds beside its tokens: the tail at other temperatures, and the token that followed.

The tail's log-partition at a few temperatures takes three to four bytes a row.

A(t) = log(sum over the ids that are not stored of p ** (temperature / t)), at the M temperatures of
``meta.tail_temperatures``. It is smooth in 1 / t, so that a reader has the tail's mass at any
temperature between (FORMAT.md). In steps of 1 / 448 nats, each value is predicted from the tail at
the cache's own temperature, as the codec stores it, and from the values coded before it, by a
linear function that the shard carries; what is left goes through a prefix code.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray

from kd.cache.bits import decode_prefix, encode_prefix, prefix_cost, starts
from kd.cache.codecs import NO_TAIL, TAIL_LOW, TAIL_STEP, encode_tail
from kd.cache.rows import Rows
from kd.cache.streams import Side, Streams, decode_integers, encode_integers

# From 1 to 4, in 1 / t near Chebyshev's points: half the error of even ones.
DEFAULT = tuple(16 / n for n in (16, 15, 13, 10, 7, 5, 4))
STREAMS = ("partition.unary", "partition.bits")
REALISED_STREAMS = ("realised.unary", "realised.bits")
STEPS = 448  # a nat
FRACTION = 16  # bits behind the point of a predictor's coefficients
LARGEST = 1 << 23  # of a value in steps: 18,725 nats
STEPS_NEXT = 64  # a nat, of the token that followed
IMPOSSIBLE = 1 << 16  # level of a probability of zero; others are at least e**-1024

ODDS = TAIL_LOW + TAIL_STEP * np.minimum(np.arange(256), NO_TAIL - 1)
LOG_TAIL = np.rint(-np.log1p(np.exp(-ODDS)) * STEPS).astype(np.int64)  # of a byte, in steps


def coding_order(number: int) -> list[int]:
    """The columns as they are coded: both ends, then the middles of what lies between."""
    found = [0, number - 1] if number > 1 else [0]
    spans = [(0, number - 1)]
    for first, last in spans:
        middle = (first + last) // 2
        if first < middle:
            found.append(middle)
            spans += [(first, middle), (middle, last)]
    return found


def tail_codes(codec: str, parts: Streams, rows: Rows) -> NDArray[np.uint8]:
    """The byte of each row's tail [N]: the codec's own, or what it would be of lossless rows."""
    if codec == "compact":
        return parts["heads"][0].reshape(-1, 2)[:, 0]
    if codec == "log8":
        return parts["tails"][0]
    return encode_tail(rows.mass)


def encode_tails(rows: Rows, codes: NDArray[np.uint8], side: Side) -> Streams:
    """The streams of ``rows.tails``; predictors and code parameters go into ``side.params``.

    codes [N]: the codec's own byte for each row's tail.
    """
    assert rows.tails is not None
    tails = rows.tails
    none = (tails == -np.inf).any(1)
    levels = np.where(none[:, None], 0, np.rint(np.clip(tails, -1e4, 1e4) * STEPS))
    levels = levels.astype(np.int64)
    order = coding_order(tails.shape[1])
    values = np.zeros_like(levels)
    parameters: list[int] = []
    for place, column in enumerate(order):
        before = np.concatenate([LOG_TAIL[codes][:, None], levels[:, order[:place]]], 1)
        line = _fitted(before[~none], levels[~none, column])
        left = levels[:, column] - _predicted(before, line)
        coded = np.where(left < 0, -2 * left - 1, 2 * left)
        if place == 0:  # 0 says that the row has no tail
            coded += 1
        values[:, place] = np.where(none, 0, coded)
        k = _parameter(values[:, place])
        parameters += [k, *line]
    side.params["partition"] = " ".join(map(str, parameters))
    k_of = np.array([_split(parameters, place)[0] for place in range(len(order))])
    every_k, bounds = np.tile(k_of, len(values)), rows.bounds * len(order)
    unary, bits = encode_prefix(values.reshape(-1), every_k, "exponential", bounds)
    return {STREAMS[0]: unary, STREAMS[1]: bits}


def decode_tails(
    parts: Streams, bounds: NDArray[np.int64], codes: NDArray[np.uint8], side: Side
) -> NDArray[np.float32]:
    """[N, M] from the streams; -inf in rows without a tail."""
    number = len(side.meta.tail_temperatures)
    rows, order = int(bounds[-1]), coding_order(number)
    parameters = [int(word) for word in str(side.params["partition"]).split()]
    if len(parameters) != _first(number) or max(map(abs, parameters)) >= 1 << 40:
        raise ValueError(f"params.partition must be of {number} temperatures")
    split = [_split(parameters, place) for place in range(number)]
    k_of = np.array([k for k, _ in split])
    every_k, unary, bits = np.tile(k_of, rows).astype(np.int32), *(parts[name] for name in STREAMS)
    values = decode_prefix(unary, bits, every_k, "exponential", bounds * number)
    coded = np.asarray(values, np.int64).reshape(rows, number)
    none = coded[:, 0] == 0
    coded[:, 0] = np.maximum(coded[:, 0] - 1, 0)
    left = np.where(coded % 2 == 1, -(coded + 1) // 2, coded // 2)
    levels = np.zeros((rows, number), np.int64)
    for place, column in enumerate(order):
        before = np.concatenate([LOG_TAIL[codes][:, None], levels[:, order[:place]]], 1)
        levels[:, column] = left[:, place] + _predicted(before, split[place][1])
    levels[none] = 0
    if (np.abs(levels) > LARGEST).any():
        raise ValueError("a tail's log-partition is out of range")
    tails = (levels / STEPS).astype(np.float32)
    tails[none] = -np.inf
    return tails


def _first(place: int) -> int:
    """Where the parameters of the place-th value start: a value has 3 and one for each before."""
    return place * (place + 5) // 2


def _split(parameters: Sequence[int], place: int) -> tuple[int, list[int]]:
    """(k, [constant, coefficients of the codec's tail and the values before]) of a value."""
    k, *line = parameters[_first(place) : _first(place + 1)]
    return k, line


def _predicted(before: NDArray[np.int64], line: Sequence[int]) -> NDArray[np.int64]:
    total = np.full(len(before), line[0], np.int64)
    for column, coefficient in enumerate(line[1:]):
        total += before[:, column] * coefficient
    return total >> FRACTION


def _fitted(before: NDArray[np.int64], wanted: NDArray[np.int64]) -> list[int]:
    """The line through a shard's own values, in integers, so that every reader rounds alike."""
    if not len(wanted):
        return [0] * (before.shape[1] + 1)
    known = np.concatenate([np.ones((len(before), 1)), before.astype(np.float64)], 1)
    line = np.linalg.lstsq(known, wanted.astype(np.float64), rcond=None)[0]
    scaled = np.clip(np.rint(line * 2**FRACTION), -(2.0**39), 2.0**39)
    scaled[0] += 2 ** (FRACTION - 1)  # the shift rounds down
    return [int(value) for value in scaled]


def _parameter(values: NDArray[np.int64]) -> int:
    widest = 1 + int(values.max(initial=0)).bit_length()
    sizes = [int(prefix_cost(values, k, "exponential").sum()) for k in range(widest)]
    return int(np.argmin(sizes))


def add_entries(
    tails: NDArray[np.float32],
    logprobs: NDArray[np.float32],
    row: NDArray[np.integer],
    powers: Sequence[float],
) -> NDArray[np.float32]:
    """The tails once entries [E] of rows ``row`` [E] are no longer stored but part of them.

    powers [M]: temperature / t of each column.
    """
    out: NDArray[Any] = tails.astype(np.float64)
    for column, power in enumerate(powers):
        np.logaddexp.at(out[:, column], row, logprobs.astype(np.float64) * power)
    return out.astype(np.float32)


# --- the token that followed ----------------------------------------------------------------------


def encode_realised(rows: Rows, side: Side) -> Streams:
    """The streams of ``rows.realised``: the log-prob of the token that followed, in about a byte.

    In steps of 1 / 64 nats through a prefix code: what a row's top-k may leave out, the teacher's
    likelihood of the text itself.
    """
    assert rows.realised is not None
    values = rows.realised
    levels = np.rint(-np.nan_to_num(values.astype(np.float64), nan=0.0, neginf=-1e9) * STEPS_NEXT)
    levels = np.where(values == -np.inf, IMPOSSIBLE, np.minimum(levels, IMPOSSIBLE - 1))
    coded = np.where(np.isnan(values), 0, 1 + levels).astype(np.int64)
    return encode_integers("realised", "realised", coded, rows.bounds, side)


def decode_realised(parts: Streams, bounds: NDArray[np.int64], side: Side) -> NDArray[np.float32]:
    """[N] log-probs from the streams, NaN where nothing followed."""
    levels = decode_integers("realised", "realised", parts, bounds, side).astype(np.int64) - 1
    if len(levels) and int(levels.max()) > IMPOSSIBLE:
        raise ValueError("a realised token's log-prob is out of range")
    values = (-levels / STEPS_NEXT).astype(np.float32)
    values[levels == IMPOSSIBLE] = -np.inf
    values[levels < 0] = np.nan
    return values


def keep_top(rows: Rows, k: int, powers: Sequence[float] = ()) -> Rows:
    """The k likeliest entries of every row, likeliest first; the others go to its tail.

    powers: temperature / t of each column of ``rows.tails``.
    """
    row = rows.row_of_entry
    order = np.lexsort((-rows.logprobs, row))
    rank = np.arange(len(row)) - np.repeat(starts(rows.counts)[:-1], rows.counts)
    kept, left = order[rank < k], order[rank >= k]
    tails = rows.tails
    if tails is not None:
        tails = add_entries(tails, rows.logprobs[left], row[left], powers)
    counts = np.minimum(rows.counts, k)
    return Rows(rows.lengths, counts, rows.ids[kept], rows.logprobs[kept], tails)
