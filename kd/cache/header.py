"""The header of a safetensors file, read without believing any of it.

It is parsed here and not by the safetensors package, because a shard may hold only the tensors that
the format names, in a header of at most 64 KiB; any reader of safetensors opens it.
"""

from __future__ import annotations

import json
import math
import os
import weakref
from collections.abc import Collection, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

MAX_HEADER = 64 * 1024
MAX_COUNT = 2**48  # of bytes, rows or entries in a shard
DTYPES = {"U8": "u1", "U16": "<u2", "U32": "<u4", "I64": "<i8"}
NAMES = {np.dtype(code): name for name, code in DTYPES.items()}


class Damaged(ValueError):
    """A shard breaks a rule: ``rule`` says which, ``got`` what was found."""

    def __init__(self, rule: str, got: str) -> None:
        super().__init__(f"must have {rule}, got {got}")
        self.rule, self.got = rule, got


def serialise(tensors: Mapping[str, NDArray[Any]], metadata: Mapping[str, str]) -> bytes:
    """The safetensors layout: header length, JSON header, tensors; wide dtypes first, aligned."""
    order = sorted(tensors, key=lambda name: (-tensors[name].dtype.itemsize, name))
    header: dict[str, Any] = {"__metadata__": dict(metadata)}
    end = 0
    for name in order:
        data = tensors[name]
        start, end = end, end + data.nbytes
        header[name] = {
            "dtype": NAMES[data.dtype],
            "shape": list(data.shape),
            "data_offsets": [start, end],
        }
    text = json.dumps(header, sort_keys=True, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)
    parts = [len(text).to_bytes(8, "little"), text]
    return b"".join(parts + [np.ascontiguousarray(tensors[name]).tobytes() for name in order])


class File:
    """The bytes of an open file, read where they are asked for.

    Not mapped into memory: a mapped file that another process cuts kills this one, where a read
    past its end is an error.
    """

    def __init__(self, path: Path) -> None:
        self._handle = os.open(path, os.O_RDONLY | os.O_CLOEXEC)
        weakref.finalize(self, os.close, self._handle)
        self.size = os.fstat(self._handle).st_size

    def read(self, start: int, stop: int) -> NDArray[np.uint8]:
        """Bytes start to stop.

        Raises:
            Damaged: the file holds fewer.
        """
        parts, at = [], start
        while at < stop and (part := os.pread(self._handle, stop - at, at)):
            parts.append(part)
            at += len(part)
        if at < stop:
            raise Damaged(
                f"{self.size:,} bytes, as when it was opened",
                f"{os.fstat(self._handle).st_size:,}: it was cut since",
            )
        return np.frombuffer(parts[0] if len(parts) == 1 else b"".join(parts), np.uint8)

    def parts(self, size: int = 1 << 22) -> Iterator[NDArray[np.uint8]]:
        """All of its bytes, some at a time."""
        for start in range(0, self.size, size):
            yield self.read(start, min(start + size, self.size))


@dataclass(frozen=True)
class Place:
    """Where a tensor lies in a file."""

    file: File
    dtype: np.dtype[Any]
    shape: tuple[int, ...]
    start: int

    def read(self, first: int = 0, last: int | None = None) -> NDArray[Any]:
        """Its entries first to last along the first dimension; all of them by default."""
        last = self.shape[0] if last is None else last
        row = self.dtype.itemsize * math.prod(self.shape[1:])
        data = self.file.read(self.start + first * row, self.start + last * row)
        return data.view(self.dtype).reshape(last - first, *self.shape[1:])


def parse(
    file: File, allowed: Collection[str], optional: Collection[str]
) -> tuple[dict[str, str], dict[str, Place]]:
    """The metadata of a file, and where its tensors are.

    Args:
        file: the whole file.
        allowed: names of the tensors it may hold; it must hold all that are not ``optional``.
        optional: names that may be absent.

    Raises:
        Damaged: whatever is wrong with it.
    """
    if file.size < 8:
        raise Damaged("a header", f"{file.size} bytes")
    length = int.from_bytes(file.read(0, 8).tobytes(), "little")
    if length > MAX_HEADER:
        raise Damaged(f"a header of at most {MAX_HEADER:,} bytes", f"{length:,}")
    if 8 + length > file.size:
        raise Damaged(f"{8 + length:,} bytes or more", f"{file.size:,}")
    try:
        header = json.loads(file.read(8, 8 + length).tobytes())
        metadata = header.pop("__metadata__")
        if not isinstance(metadata, dict):
            raise TypeError
    except Damaged:
        raise
    except (ValueError, KeyError, TypeError, AttributeError, RecursionError):
        raise Damaged("a safetensors header with metadata", "other bytes") from None
    if not set(header) <= set(allowed) or not set(allowed) - set(header) <= set(optional):
        raise Damaged(f"the tensors {sorted(allowed)}", f"{sorted(header)[:12]}"[:300])
    entries = {name: _entry(name, item) for name, item in header.items()}
    begin, end, places = 8 + length, 0, {}
    body = file.size - begin
    for name, (dtype, shape, start, stop) in sorted(entries.items(), key=lambda pair: pair[1][2:]):
        size = dtype.itemsize * math.prod(shape)
        if start != end or stop - start != size or stop > body:
            raise Damaged(
                f"{name} in bytes {end:,} to {end + size:,} of its data",
                f"{start:,} to {stop:,} of {body:,} bytes",
            )
        places[name], end = Place(file, dtype, shape, begin + start), stop
    if end != body:
        raise Damaged(f"{end:,} bytes of data", f"{body:,}")
    return metadata, places


def _entry(name: str, item: Any) -> tuple[np.dtype[Any], tuple[int, ...], int, int]:
    try:
        dtype, shape = np.dtype(DTYPES[item["dtype"]]), tuple(item["shape"])
        start, stop = item["data_offsets"]
        if not 1 <= len(shape) <= 2 or not all(whole(n) for n in (*shape, start, stop)):
            raise ValueError
    except (KeyError, TypeError, ValueError):
        raise Damaged(f"a valid entry for {name}", f"{item!r}"[:120]) from None
    return dtype, shape, start, stop


def whole(value: Any) -> bool:
    """Whether a JSON value is an integer from 0 to MAX_COUNT."""
    return type(value) is int and 0 <= value <= MAX_COUNT


def count_in(metadata: Mapping[str, Any], name: str) -> int:
    """A count of the metadata: decimal digits, perhaps with a minus sign."""
    text = metadata.get(name)
    if not isinstance(text, str) or len(text) > 15 or not text.removeprefix("-").isdecimal():
        raise Damaged(f"{name} as digits in its metadata", f"{text!r}"[:120])
    return int(text)
