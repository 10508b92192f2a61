"""Where a sequence lies: a sorted array of keys, 28 bytes a sequence."""

from __future__ import annotations

import hashlib
from collections.abc import Sequence

import numpy as np
from numpy.typing import NDArray

from kd.cache.keys import KEY_BYTES, key_of


class KeyIndex:
    """Finds (shard, position in the shard, length) of a 16-byte key by binary search.

    Args:
        shards: for each shard, keys [S, 16] uint8 and lengths [S].
    """

    def __init__(self, shards: Sequence[tuple[NDArray[np.uint8], NDArray[np.integer]]]) -> None:
        sizes = [len(keys) for keys, _ in shards]
        joined = np.concatenate([*(keys for keys, _ in shards), np.zeros((0, 16), np.uint8)])
        lengths = [part.astype(np.int32) for _, part in shards]
        self._lengths = np.concatenate([*lengths, np.zeros(0, np.int32)])
        words = np.ascontiguousarray(joined).view(">u8").astype(np.uint64)  # [S, 2]
        order = np.lexsort((words[:, 1], words[:, 0]))
        self._high, self._low = words[order, 0], words[order, 1]
        first = np.zeros(len(sizes) + 1, np.int64)
        np.cumsum(sizes, out=first[1:])
        self._first, self._order = first, order

    def __len__(self) -> int:
        return len(self._high)

    def find(self, key: bytes) -> tuple[int, int, int] | None:
        high = np.uint64(int.from_bytes(key[:8], "big"))
        low = np.uint64(int.from_bytes(key[8:], "big"))
        at = int(np.searchsorted(self._high, high))
        while at < len(self._high) and self._high[at] == high:
            if self._low[at] == low:
                number = int(self._order[at])
                return (*self._locate(number), int(self._lengths[number]))
            at += 1
        return None

    def part(self, tokens: NDArray[np.int32]) -> tuple[int, int] | None:
        """(start, stop) of the longest stored sequence that these tokens begin with, or that is
        left without a run of one id before it; for messages, as it hashes every part."""
        state, best = hashlib.sha256(), 0
        for stop in range(1, len(tokens) + 1):
            state.update(tokens[stop - 1 : stop].tobytes())
            if self.find(state.digest()[:KEY_BYTES]) is not None:
                best = stop
        if best:
            return 0, best
        other = np.flatnonzero(tokens != tokens[0])
        run = int(other[0]) if len(other) else len(tokens)
        for start in range(run, 0, -1):
            ends = np.flatnonzero(tokens[start:] != tokens[-1])
            stops = {len(tokens), *(start + int(ends[-1]) + i for i in (1, 2) if len(ends))}
            for stop in sorted(stops, reverse=True):
                if self.find(key_of(tokens[start:stop])) is not None:
                    return start, stop
        return None

    def _locate(self, number: int) -> tuple[int, int]:
        shard = int(np.searchsorted(self._first, number, side="right")) - 1
        return shard, number - int(self._first[shard])

    def refuse_duplicates(self, names: Sequence[str]) -> None:
        """Raise when a sequence is stored twice, naming the shards."""
        same = (self._high[1:] == self._high[:-1]) & (self._low[1:] == self._low[:-1])
        if same.any():
            at = int(np.flatnonzero(same)[0])
            places = [self._locate(int(self._order[i])) for i in (at, at + 1)]
            shown = ", ".join(f"{names[shard]} (sequence {i})" for shard, i in sorted(places))
            raise ValueError(
                f"TeacherCache: a sequence must be stored once, got {int(same.sum())} stored "
                f"twice, the first in {shown}. Run kd cache merge to drop the copies."
            )
