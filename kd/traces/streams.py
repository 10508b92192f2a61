"""The bytes of a file, unpacked where it is packed, as far as they go."""

from __future__ import annotations

import io
import zlib
from collections.abc import Iterator
from typing import IO, Any

BLOCK = 1 << 16


class Cut(Exception):
    """Packed data break off."""


class Stream(io.RawIOBase):
    """The unpacked bytes of a file; where packed data break off it ends, and ``cut`` says how."""

    def __init__(self, blocks: Iterator[bytes]) -> None:
        self._blocks = blocks
        self._rest = memoryview(b"")
        self.cut = ""

    def readable(self) -> bool:
        return True

    def readinto(self, buffer: Any) -> int:
        while not self._rest:
            try:
                self._rest = memoryview(next(self._blocks))
            except StopIteration:
                return 0
            except Cut as error:
                self.cut = str(error)
                return 0
        size = min(len(buffer), len(self._rest))
        buffer[:size] = self._rest[:size]
        self._rest = self._rest[size:]
        return size


def blocks(file: IO[bytes], magic: bytes) -> Iterator[bytes]:
    """A file's bytes in blocks; ``magic``, its first four, says how they are packed."""
    if magic.startswith(b"\x1f\x8b"):
        yield from _gunzipped(file)
    elif magic == b"\x28\xb5\x2f\xfd":
        import pyarrow

        packed = pyarrow.CompressedInputStream(pyarrow.PythonFile(file, mode="r"), "zstd")
        try:
            while block := packed.read(BLOCK):
                yield block
        except OSError as error:
            raise Cut(str(error)) from None
    else:
        while block := file.read(BLOCK):
            yield block


def _gunzipped(file: IO[bytes]) -> Iterator[bytes]:
    """All members of a gzip file; what comes before a fault is kept (``gzip`` would lose it)."""
    unpacker, inside = zlib.decompressobj(31), False
    while block := file.read(BLOCK):
        while block:
            before = unpacker.copy()
            try:
                data, inside = unpacker.decompress(block), True
            except zlib.error as error:
                for i in range(len(block)):
                    try:
                        yield before.decompress(block[i : i + 1])
                    except zlib.error:
                        break
                raise Cut(str(error)) from None
            yield data
            block = b""
            if unpacker.eof:
                block = unpacker.unused_data.lstrip(b"\0")
                unpacker, inside = zlib.decompressobj(31), False
    if inside:
        raise Cut("the packed data end early")
