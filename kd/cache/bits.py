"""Integers in as few bits as they need, packed and unpacked in vectorised code.

Two layouts, both little-endian (bit b of a stream is bit b % 8 of its byte b // 8):

fixed width w: value j takes bits j*w to (j+1)*w - 1, its lowest bit first. Values come in groups
    of 8, so that a group is exactly w bytes; the last group is filled up with zeros.
unary: value v is v zeros and a one; the stream is filled up to a byte with zeros.
"""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

Bytes = NDArray[np.uint8]
GROUP = 8
MAX_WIDTH = 25  # a value lies within 4 bytes, wherever it starts


def width_of(largest: int) -> int:
    """Bits that hold every integer from 0 to ``largest``; at least 1."""
    return max(1, int(largest).bit_length())


def groups(count: int) -> int:
    return -(-count // GROUP)


def pack_fixed(values: NDArray[np.integer], width: int) -> Bytes:
    """Values [E] below 2**width as groups(E) * width bytes."""
    padded = np.zeros(groups(len(values)) * GROUP, np.uint32)
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


def ones(packed: Bytes) -> NDArray[np.int64]:
    """The positions of all one bits, ascending."""
    return np.flatnonzero(np.unpackbits(packed, bitorder="little").view(np.bool_))


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
