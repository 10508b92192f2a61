"""What a sequence is called in a cache, a hash of its token ids and of nothing else, and the index
that finds it: a sorted array of keys, 28 bytes a sequence."""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

from kd.cache.bits import starts

KEY_BYTES = 16


def token_array(input_ids: Any, where: str) -> NDArray[np.int32]:
    """Token ids [L] as int32, from a tensor, an array or a list.

    Raises:
        TypeError: for anything that is not integers.
        ValueError: unless they are one-dimensional, at least one, and from 0 to 2**31 - 1.
    """
    if isinstance(input_ids, torch.Tensor):
        input_ids = input_ids.detach().cpu().numpy()
    found = np.asarray(input_ids)
    if found.ndim != 1:
        raise ValueError(
            f"{where}: input_ids must be one-dimensional [L], got shape {found.shape}. "
            "Pass one sequence at a time, without padding."
        )
    if len(found) == 0:
        raise ValueError(
            f"{where}: input_ids must hold at least one token, got a sequence of zero length. "
            "Drop empty sequences."
        )
    if found.dtype.kind not in "iu":
        raise TypeError(f"{where}: input_ids must be integers, got {found.dtype}.")
    low, high = int(found.min()), 0 if found.dtype == np.int32 else int(found.max())
    if low < 0 or high > 2**31 - 1:
        raise ValueError(
            f"{where}: input_ids must be from 0 to 2**31 - 1, got {low if low < 0 else high}. "
            "-100 marks labels, not inputs."
        )
    return found.astype("<i4", copy=False)


def key_of(tokens: NDArray[np.int32]) -> bytes:
    """The first 16 bytes of SHA-256 over the ids as little-endian int32."""
    return hashlib.sha256(np.ascontiguousarray(tokens, "<i4").tobytes()).digest()[:KEY_BYTES]


def sequence_key(input_ids: Any) -> bytes:
    """The 16 bytes under which a sequence is found, whatever its position, batch or rank."""
    return key_of(token_array(input_ids, "sequence_key"))


def describe(tokens: NDArray[np.int32]) -> str:
    """A sequence for an error message: its key, length and first ids."""
    head = ", ".join(str(int(token)) for token in tokens[:6])
    dots = ", ..." if len(tokens) > 6 else ""
    return f"{key_of(tokens).hex()[:12]} ({len(tokens)} tokens: {head}{dots})"


class KeyIndex:
    """Finds (shard, position in the shard, length) of a 16-byte key by binary search.

    Args:
        shards: for each shard, keys [S, 16] uint8 and lengths [S].
    """

    def __init__(self, shards: Sequence[tuple[NDArray[np.uint8], NDArray[np.integer]]]) -> None:
        joined = np.concatenate([*(keys for keys, _ in shards), np.zeros((0, 16), np.uint8)])
        lengths = [part.astype(np.int32) for _, part in shards]
        self._lengths = np.concatenate([*lengths, np.zeros(0, np.int32)])
        words = np.ascontiguousarray(joined).view(">u8").astype(np.uint64)  # [S, 2]
        self._order = np.lexsort((words[:, 1], words[:, 0]))
        self._high, self._low = words[self._order, 0], words[self._order, 1]
        self._first = starts(np.array([len(keys) for keys, _ in shards], np.int64))

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

    def why_missing(self, tokens: NDArray[np.int32]) -> str:
        """The likely cause, from the part of a sequence that is stored."""
        part = self._part(tokens)
        if part is None:
            return (
                "Its tokens changed since the capture (template, tokenizer, truncation), or it "
                "was not captured."
            )
        start, stop = part
        ids = set(tokens[:start].tolist()) | set(tokens[stop:].tolist())
        if start or len(ids) == 1:
            return (
                f"It is padded: tokens {start} to {stop - 1} of it are in the cache, the others "
                f"are id {', '.join(map(str, sorted(ids)))}. Pass sequences without padding: "
                "[row[mask.bool()] for row, mask in zip(input_ids, attention_mask)]."
            )
        return (
            f"Its first {stop} tokens are in the cache as a sequence of their own. Where it is a "
            "pack, pass its documents (cache.packed, or rows with lengths to the collator); "
            "otherwise it was cut before the capture, or something was added to it since."
        )

    def _part(self, tokens: NDArray[np.int32]) -> tuple[int, int] | None:
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
