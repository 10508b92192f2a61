"""Integers in as few bits as they need, packed and unpacked in vectorised code.

All little-endian (bit b of a stream is bit b % 8 of its byte b // 8):

fixed width w: value j takes bits j*w to (j+1)*w - 1, its lowest bit first. Values come in groups
    of 8, so that a group is exactly w bytes; the last group is filled up with zeros.
prefix code: a value v with parameter k is written in two streams. With the quotient u = v >> k:

    rice:        c = u;                    k bits of v
    exponential: c = floor(log2(u + 1));   c + k bits of v - ((2**c - 1) << k)

    c goes into the unary stream (c zeros and a one), the bits into the other one. Rice codes suit
    geometric values (gaps between evenly spread ids), exponential Golomb codes those with long
    tails (gaps between ids ranked by frequency). Decoding finds the ones of the unary stream,
    which gives all c at once and with them where each value's bits lie.
"""

from __future__ import annotations

from typing import Any

import numpy as np
from numpy.typing import NDArray

Bytes = NDArray[np.uint8]
Stream = tuple[Bytes, NDArray[np.int64]]  # bytes, and where each sequence's part starts
GROUP = 8
MAX_WIDTH = 25  # a value lies within 4 bytes, wherever it starts
MODES = ("rice", "exponential")
JUDGED = 1 << 14  # values that a prefix code's parameter is chosen on


def starts(sizes: NDArray[np.integer]) -> NDArray[np.int64]:
    """Where parts of these sizes start when laid end to end, and where the last one ends."""
    out = np.zeros(len(sizes) + 1, np.int64)
    np.cumsum(sizes, out=out[1:])
    return out


# --- fixed width ----------------------------------------------------------------------------------


def width_of(largest: int) -> int:
    """Bits that hold every integer from 0 to ``largest``; at least 1."""
    return max(1, int(largest).bit_length())


def pack_fixed(values: NDArray[np.integer], width: int) -> Bytes:
    """Values [E] below 2**width as ceil(E / 8) * width bytes."""
    padded = np.zeros(-(-len(values) // GROUP) * GROUP, np.uint32)
    padded[: len(values)] = values
    bits = np.unpackbits(padded.astype("<u4").view(np.uint8), bitorder="little")
    return np.packbits(bits.reshape(-1, 32)[:, :width].reshape(-1), bitorder="little")


def unpack_fixed(packed: Bytes, width: int) -> NDArray[np.int32]:
    """The inverse of ``pack_fixed``: every value, those that fill the last group included."""
    count = len(packed) // width
    out = np.empty((count, GROUP), np.int32)
    if count == 0:
        return out.reshape(-1)
    if width == 8:
        return packed.astype(np.int32)
    if width == 16:
        return packed.view("<u2").astype(np.int32)
    # Each column is read as unaligned 32-bit words, one a group; 3 spare bytes let the last
    # group's words run past its end.
    room = np.empty(len(packed) + 4, np.uint8)
    room[: len(packed)] = packed
    room[len(packed) :] = 0
    mask = np.uint32((1 << width) - 1)
    word = np.empty(count, np.uint32)
    for j in range(GROUP):
        byte, shift = divmod(j * width, 8)
        column: NDArray[np.uint32] = np.ndarray((count,), "<u4", room, byte, (width,))
        np.right_shift(column, np.uint32(shift), out=word)
        np.bitwise_and(word, mask, out=out[:, j], casting="unsafe")
    return out.reshape(-1)


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
    _check_number(len(values), int(whole.sum()))
    return values if len(values) == int(bounds[-1]) else values[_spread(sizes, whole)]


def _spread(sizes: NDArray[np.int64], whole: NDArray[np.int64]) -> NDArray[np.int64]:
    """Where each of sum(sizes) values lies once every part is filled up to its whole size."""
    shift = np.repeat(starts(whole - sizes)[:-1], sizes)
    return np.arange(len(shift)) + shift


def _check_number(found: int, wanted: int) -> None:
    if found != wanted:
        raise ValueError(
            f"kd.cache: a shard's stream must hold {wanted:,} values, got {found:,}. The shard is "
            "damaged: run kd cache verify."
        )


# --- prefix code ----------------------------------------------------------------------------------


def gather_bits(
    packed: Bytes, start: NDArray[np.integer], width: NDArray[np.integer]
) -> NDArray[np.int32]:
    """Integers of ``width`` bits (at most 25) that start at any bit of a stream, lowest bit first.

    Args:
        packed: the stream.
        start, width: [E], in bits; widths of 0 give 0.
    """
    room = np.zeros(len(packed) + 4, np.uint8)
    room[: len(packed)] = packed
    # Every byte begins a 32-bit word of this overlapping view; numpy is faster on the copy.
    view: NDArray[np.uint32] = np.ndarray((len(packed) + 1,), "<u4", room, 0, (1,))
    found = np.ascontiguousarray(view, np.uint32).take(start >> 3, mode="clip")
    found >>= (start & 7).astype(np.uint32)
    found &= np.left_shift(np.uint32(1), width.astype(np.uint32)) - np.uint32(1)
    return found.view(np.int32)


def scatter_bits(
    values: NDArray[np.integer], start: NDArray[np.integer], width: NDArray[np.integer], size: int
) -> Bytes:
    """The inverse of ``gather_bits``: ``size`` bytes with the values' bits in their places."""
    bits = np.zeros(size * 8, np.uint8)
    for bit in range(int(width.max(initial=0))):
        used = np.flatnonzero(width > bit)
        bits[start[used] + bit] = (values[used] >> bit) & 1
    return np.packbits(bits, bitorder="little")


def _classes(values: NDArray[np.integer], k: NDArray[np.integer] | int, mode: str) -> NDArray:
    """c of each value, int64."""
    quotient = np.asarray(values, np.int64) >> k
    if mode == "rice":
        return quotient
    return np.frexp((quotient + 1).astype(np.float64))[1].astype(np.int64) - 1


def prefix_cost(values: NDArray[np.integer], k: int, mode: str) -> NDArray[np.int64]:
    """Bits of each value."""
    c = _classes(values, k, mode)
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
        (mode, k): int(prefix_cost(some, k, mode).sum())
        for mode in MODES
        for k in range(min(least, widest - 1) if mode == "rice" else 0, widest)
    }
    return min(sizes, key=lambda choice: (sizes[choice], MODES.index(choice[0]), choice[1]))


def encode_prefix(
    values: NDArray[np.integer],
    k: NDArray[np.integer] | int,
    mode: str,
    bounds: NDArray[np.int64],
) -> tuple[Stream, Stream]:
    """The unary stream and the bit stream of values [E]; ``bounds`` [S + 1] divide sequences."""
    k = np.broadcast_to(np.asarray(k, np.int64), values.shape)
    c = _classes(values, k, mode)
    width = k if mode == "rice" else c + k
    rest = values - (c << k) if mode == "rice" else values - (((1 << c) - 1) << k)
    start, offsets = _places(c + 1, bounds)
    bits = np.zeros(int(offsets[-1]) * 8, np.uint8)
    bits[start + c] = 1
    unary = np.packbits(bits, bitorder="little")
    start, inner = _places(width, bounds)
    return (unary, offsets), (scatter_bits(rest, start, width, int(inner[-1])), inner)


def decode_prefix(
    unary: Stream,
    bits: Stream,
    k: NDArray[np.integer] | int,
    mode: str,
    bounds: NDArray[np.int64],
) -> NDArray[np.int32]:
    """The values [E] of sequences divided by ``bounds``; the inverse of ``encode_prefix``."""
    data, offsets = unary
    at = np.flatnonzero(np.unpackbits(data, bitorder="little").view(np.bool_))  # all one bits
    _check_number(len(at), int(bounds[-1]))
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
        start, _ = _places(c + k, bounds)
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
        low = gather_bits(bits[0], _places(width, bounds)[0], width)
    c |= low
    return c


def _places(
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
    offsets = starts(-(-np.diff(before) // 8))
    if len(bounds) > 2:
        shift = (offsets[:-1] * 8 - before[:-1]).astype(ends.dtype)
        start += np.repeat(shift, np.diff(bounds))
    return start, offsets
