"""The header of a safetensors file, read without believing any of it.

It is parsed here and not by the safetensors package, because a shard may hold only the tensors that
the format names, in a header of at most 64 KiB; any reader of safetensors opens it.
"""

from __future__ import annotations

import json
import math
from collections.abc import Collection, Mapping
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


def parse(
    data: NDArray[np.uint8], allowed: Collection[str], optional: Collection[str]
) -> tuple[dict[str, str], dict[str, NDArray[Any]]]:
    """The metadata and the tensors of a file, as views of its bytes.

    Args:
        data: the whole file.
        allowed: names of the tensors it may hold; it must hold all that are not ``optional``.
        optional: names that may be absent.

    Raises:
        Damaged: whatever is wrong with it.
    """
    if len(data) < 8:
        raise Damaged("a header", f"{len(data)} bytes")
    length = int.from_bytes(data[:8].tobytes(), "little")
    if length > MAX_HEADER:
        raise Damaged(f"a header of at most {MAX_HEADER:,} bytes", f"{length:,}")
    if 8 + length > len(data):
        raise Damaged(f"{8 + length:,} bytes or more", f"{len(data):,}")
    try:
        header = json.loads(data[8 : 8 + length].tobytes())
        metadata = header.pop("__metadata__")
        if not isinstance(metadata, dict):
            raise TypeError
    except (ValueError, KeyError, TypeError, AttributeError, RecursionError):
        raise Damaged("a safetensors header with metadata", "other bytes") from None
    if not set(header) <= set(allowed) or not set(allowed) - set(header) <= set(optional):
        raise Damaged(f"the tensors {sorted(allowed)}", f"{sorted(header)[:12]}"[:300])
    entries = {name: _entry(name, item) for name, item in header.items()}
    body, end, tensors = data[8 + length :], 0, {}
    for name, (dtype, shape, start, stop) in sorted(entries.items(), key=lambda pair: pair[1][2:]):
        size = dtype.itemsize * math.prod(shape)
        if start != end or stop - start != size or stop > len(body):
            raise Damaged(
                f"{name} in bytes {end:,} to {end + size:,} of its data",
                f"{start:,} to {stop:,} of {len(body):,} bytes",
            )
        tensors[name], end = body[start:stop].view(dtype).reshape(shape), stop
    if end != len(body):
        raise Damaged(f"{end:,} bytes of data", f"{len(body):,}")
    return metadata, tensors


def _entry(name: str, item: Any) -> tuple[np.dtype[Any], tuple[int, ...], int, int]:
    try:
        dtype, shape = np.dtype(DTYPES[item["dtype"]]), tuple(item["shape"])
        start, stop = item["data_offsets"]
        if len(shape) > 2 or not all(whole(n) for n in (*shape, start, stop)):
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
