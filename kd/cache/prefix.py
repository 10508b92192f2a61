"""A prefix code for small integers that is decoded without a loop over them.

A value v with parameter k is written in two streams. With the quotient u = v >> k:

    rice:        c = u;                    k bits of v
    exponential: c = floor(log2(u + 1));   c + k bits of v - ((2**c - 1) << k)

c goes into the unary stream (c zeros and a one), the bits into the other one. Rice codes suit
geometric values (gaps between evenly spread ids), exponential Golomb codes those with long tails
(gaps between ids ranked by frequency). Decoding finds the ones of the unary stream, which gives
all c at once and with them where each value's bits lie.
"""

from __future__ import annotations

from typing import Any

import numpy as np
from numpy.typing import NDArray

from kd.cache.bits import (
    GROUP,
    MAX_WIDTH,
    Bytes,
    gather_bits,
    ones,
    scatter_bits,
    unpack_fixed,
)

Stream = tuple[Bytes, NDArray[np.int64]]  # bytes, and where each sequence's part starts
MODES = ("rice", "exponential")
JUDGED = 1 << 14  # values that a parameter is chosen on


def classes(values: NDArray[np.integer], k: NDArray[np.integer] | int, mode: str) -> NDArray:
    """c of each value, int64."""
    quotient = np.asarray(values, np.int64) >> k
    if mode == "rice":
        return quotient
    return np.frexp((quotient + 1).astype(np.float64))[1].astype(np.int64) - 1


def cost(values: NDArray[np.integer], k: int, mode: str) -> NDArray[np.int64]:
    """Bits of each value."""
    c = classes(values, k, mode)
    return c + 1 + k if mode == "rice" else 2 * c + 1 + k


def best_parameter(values: NDArray[np.integer]) -> tuple[str, int]:
    """The mode and k with the fewest bits in all, judged on evenly spread values.

    Where equal, the smaller k, and rice.
    """
    some = np.asarray(values)[:: -(-len(values) // JUDGED) or 1]
    # A rice code with a k far below the values' size would be absurdly long.
    least = max(0, int(some.mean() if len(some) else 0).bit_length() - 3)
    widest = 1 + int(values.max(initial=0)).bit_length()
    sizes = {
        (mode, k): int(cost(some, k, mode).sum())
        for mode in MODES
        for k in range(min(least, widest - 1) if mode == "rice" else 0, widest)
    }
    return min(sizes, key=lambda choice: (sizes[choice], MODES.index(choice[0]), choice[1]))


def encode(
    values: NDArray[np.integer],
    k: NDArray[np.integer] | int,
    mode: str,
    bounds: NDArray[np.int64],
) -> tuple[Stream, Stream]:
    """The unary stream and the bit stream of values [E]; ``bounds`` [S + 1] divide sequences."""
    k = np.broadcast_to(np.asarray(k, np.int64), values.shape)
    c = classes(values, k, mode)
    width = k if mode == "rice" else c + k
    rest = values - (c << k) if mode == "rice" else values - (((1 << c) - 1) << k)
    start, offsets = places(c + 1, bounds)
    bits = np.zeros(int(offsets[-1]) * 8, np.uint8)
    bits[start + c] = 1
    unary = np.packbits(bits, bitorder="little")
    start, inner = places(width, bounds)
    return (unary, offsets), (scatter_bits(rest, start, width, int(inner[-1])), inner)


def decode(
    unary: Stream,
    bits: Stream,
    k: NDArray[np.integer] | int,
    mode: str,
    bounds: NDArray[np.int64],
) -> NDArray[np.int32]:
    """The values [E] of sequences divided by ``bounds``; the inverse of ``encode``."""
    data, offsets = unary
    at = ones(data)
    if len(at) != int(bounds[-1]):
        raise ValueError(
            f"kd.cache: a shard's stream must hold {int(bounds[-1]):,} values, got {len(at):,}. "
            "The shard is damaged: run kd cache verify."
        )
    c = np.empty(len(at), np.int32)
    if len(at) == 0:
        return c
    c[0] = at[0]
    np.subtract(at[1:], at[:-1] + 1, out=c[1:], casting="unsafe")
    filled = np.flatnonzero(np.diff(bounds))
    first = bounds[:-1][filled]
    c[first] = at[first] - offsets[:-1][filled] * 8
    if mode == "rice" and np.ndim(k) == 0:
        return _with_low_bits(c, bits, int(k), bounds)
    if mode == "exponential":
        start, _ = places(c + k, bounds)
        low = gather_bits(bits[0], start, c + k)
        high = np.left_shift(np.left_shift(np.int32(1), c) - np.int32(1), k)
        return (high + low).astype(np.int32, copy=False)
    raise AssertionError(f"no such code: {mode} with {np.ndim(k)}-dimensional k")


def _with_low_bits(
    c: NDArray[np.int32], bits: Stream, k: int, bounds: NDArray[np.int64]
) -> NDArray[np.int32]:
    """Rice values from their quotients: all remainders have one width."""
    if k == 0:
        return c
    c <<= k
    if k <= MAX_WIDTH and not (bounds % GROUP).any():  # then the bits are whole groups
        low = unpack_fixed(bits[0], k)
    else:
        width = np.full(len(c), k, np.int32)
        low = gather_bits(bits[0], places(width, bounds)[0], width)
    c |= low
    return c


def places(
    width: NDArray[np.integer], bounds: NDArray[np.int64]
) -> tuple[NDArray[np.integer], NDArray[np.int64]]:
    """Where fields of these widths start, in bits, when every sequence starts at a byte.

    Returns:
        starts [E] in bits, and the sequences' offsets [S + 1] in bytes.
    """
    wide = int(width.sum(dtype=np.int64)) >= 2**31
    ends = np.cumsum(width, dtype=np.int64 if wide else np.int32)
    start: NDArray[Any] = ends - width.astype(ends.dtype, copy=False)
    before = np.zeros(len(bounds), np.int64)
    if len(ends):
        before[1:] = np.where(bounds[1:] > 0, ends[np.maximum(bounds[1:] - 1, 0)], 0)
    offsets = np.zeros(len(bounds), np.int64)
    np.cumsum(-(-np.diff(before) // 8), out=offsets[1:])
    if len(bounds) > 2:
        shift = (offsets[:-1] * 8 - before[:-1]).astype(ends.dtype)
        start += np.repeat(shift, np.diff(bounds))
    return start, offsets
