"""Records out of JSON-lines, JSON and Parquet files, plain or packed, one at a time.

What a file is is read off its first bytes, not its name. Whatever cannot be read is a ``BadRecord``
in its place, so that nothing is lost without a count.
"""

from __future__ import annotations

import codecs
import io
import json
import re
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any

from kd.traces.columns import KNOWN, QUESTIONS, TURNS
from kd.traces.streams import BLOCK, Stream, blocks
from kd.traces.turns import are_turns

LONGEST_LINE = 256 * 2**20
PLAIN = (".jsonl", ".ndjson", ".json")
SUFFIXES = (
    *PLAIN,
    *(f"{name}{packed}" for packed in (".gz", ".zst") for name in PLAIN),
    ".parquet",
)
# data that a folder may hold and that is not read: counted rather than passed over
UNREAD = (".csv", ".tsv", ".arrow", ".gz", ".zst", ".bz2", ".xz", ".zip", ".tar", ".lz4")
WRAPPERS = ("data", "rows", "records", "instances", "examples", "train")
# the 32-bit mark begins with the 16-bit one
_MARKS = (
    (codecs.BOM_UTF32_LE, "utf-32-le"),
    (codecs.BOM_UTF32_BE, "utf-32-be"),
    (codecs.BOM_UTF16_LE, "utf-16-le"),
    (codecs.BOM_UTF16_BE, "utf-16-be"),
    (b"{\0", "utf-16-le"),
    (b"[\0", "utf-16-le"),
    (b'\0{\0"', "utf-16-be"),
    (b"\0[\0{", "utf-16-be"),
)
_ROWS = 256
_SHAPED = {*QUESTIONS, *TURNS}
_GAP = re.compile(r"[\s,]*")


class BadRecord:
    """A record that could not be read at all: ``reason``, ``detail``, and where it was."""

    def __init__(self, reason: str, detail: str) -> None:
        self.reason = reason
        self.detail = detail


def expand(path: str | Path) -> list[Path]:
    """The files of a path: itself, or those of a folder that hold data, sorted.

    Raises:
        FileNotFoundError: nothing is there.
    """
    path = Path(path)
    if path.is_dir():
        files = sorted(file for file in path.rglob("*") if file.is_file())
        if not any(_named(file, SUFFIXES) for file in files):
            raise FileNotFoundError(
                f"load: {path} must hold {', '.join(SUFFIXES)} files, got none. Name a file."
            )
        return [file for file in files if _named(file, (*SUFFIXES, *UNREAD))]
    if not path.exists():
        raise FileNotFoundError(f"load: path must exist, got {path}. Check its spelling.")
    return [path]


def _named(path: Path, suffixes: tuple[str, ...]) -> bool:
    return path.name.lower().endswith(suffixes)


def read_records(path: str | Path) -> Iterator[Any]:
    """Every record of one file: a dict (or what else JSON held), or a ``BadRecord``.

    Raises:
        ValueError: the file as a whole cannot be read.
    """
    path = Path(path)
    if not _named(path, SUFFIXES):
        raise ValueError(
            f"load: path must end with {', '.join(SUFFIXES)}, got {path.name}. Rename or convert "
            "it (pandas.read_csv(...).to_json(FILE, orient='records', lines=True))."
        )
    with path.open("rb") as file:
        magic = file.read(4)
        file.seek(0)
        if magic == b"PAR1" or _named(path, (".parquet",)):
            yield from _parquet_records(path)
            return
        stream = Stream(blocks(file, magic))
        yield from _text_records(io.BufferedReader(stream, BLOCK), stream)


def is_lines(path: str | Path) -> bool:
    """Whether a file is JSON lines as they are written here: not packed, UTF-8, no array."""
    path = Path(path)
    if not path.is_file() or not _named(path, (".jsonl", ".ndjson")):
        return False
    with path.open("rb") as file:
        return file.read(2) == b'{"'


def _text_records(file: io.BufferedReader, stream: Stream) -> Iterator[Any]:
    lines, first = _lines(file), True
    for line in lines:
        if isinstance(line, BadRecord):
            yield line
            continue
        found = list(parse(line))
        if stream.cut and not line.endswith(b"\n"):
            found = [value for value in found if not isinstance(value, BadRecord)]
        elif first and _goes_on(line, found):
            yield from _whole(line + b"".join(x for x in lines if isinstance(x, bytes)))
            break
        for value in found:
            yield from _unwrapped(value)
        first = False
    if stream.cut:
        yield BadRecord("file is cut", f"{stream.cut}; what follows is lost")


def _lines(file: io.BufferedReader) -> Iterator[bytes | BadRecord]:
    """Lines in UTF-8, whatever they are written in."""
    head = file.peek(4)[:4]
    encoding = next((name for mark, name in _MARKS if head.startswith(mark)), "")
    if encoding:
        # a lone surrogate is found later, in the one record that has it
        text = io.TextIOWrapper(file, encoding, errors="surrogatepass", newline="\n")
        try:
            for written in text:
                yield written.lstrip("\ufeff").encode("utf-8", "surrogatepass")
        except UnicodeDecodeError as error:
            yield BadRecord(f"invalid {encoding}", f"{error}; what follows is not read")
        return
    while line := file.readline(LONGEST_LINE):
        if len(line) == LONGEST_LINE and not line.endswith(b"\n"):
            size = len(line)
            while more := file.readline(LONGEST_LINE):
                size += len(more)
                if more.endswith(b"\n"):
                    break
            yield BadRecord("line too long", f"{size:,} bytes")
            continue
        if line.strip():
            yield line


def _goes_on(line: bytes, found: list[Any]) -> bool:
    """Whether a line is the beginning of a value that is written over several lines."""
    bare = line.lstrip(codecs.BOM_UTF8 + b" \t")
    broken = len(found) == 1 and isinstance(found[0], BadRecord) and found[0].reason == "not JSON"
    return broken and (bare[:1] == b"[" or bare.strip() == b"{")


def _whole(data: bytes) -> Iterator[Any]:
    """A JSON array over many lines, or objects written over several lines each."""
    try:
        text = data.removeprefix(codecs.BOM_UTF8).decode("utf-8").strip()
    except UnicodeDecodeError as error:
        yield BadRecord("invalid UTF-8", str(error))
        return
    try:
        yield from _unwrapped(DECODER.decode(text))
    except (ValueError, RecursionError):
        for value in _sequence(text, text.startswith("[")):
            yield from _unwrapped(value)


def parse(line: bytes) -> Iterator[Any]:
    """The values of one line; several where an interrupted writer left out the line's end."""
    bare = line.strip().removeprefix(codecs.BOM_UTF8)
    if b"\0" in bare:
        filled, bare = len(bare), bare.strip(b"\0 \t\r\n")
        if len(bare) < filled:
            yield BadRecord("NUL bytes", f"{filled - len(bare):,} where records were")
        if b"\0" in bare:
            yield BadRecord("NUL bytes", f"inside a record that starts {bare[:80]!r}")
            return
        if not bare:
            return
    try:
        text = bare.decode("utf-8")
    except UnicodeDecodeError as error:
        yield BadRecord("invalid UTF-8", str(error))
        return
    try:
        yield DECODER.decode(text)
    except json.JSONDecodeError as error:
        if error.msg == "Extra data":
            yield from _sequence(text)
        else:
            yield BadRecord("not JSON", f"{error}; starts {text[:80]!r}")
    except _Repeated as error:
        yield BadRecord("duplicate keys", str(error))
    except (ValueError, RecursionError) as error:
        yield BadRecord("not JSON", f"{type(error).__name__}: {error}; starts {text[:80]!r}")


def _sequence(text: str, at: int = 0) -> Iterator[Any]:
    """JSON values that follow one another; after one that cannot be read, from the next line that
    begins as the first value did."""
    end = len(text.rstrip().removesuffix("]")) if at else len(text)
    at = _after(_GAP, text, at)
    line = text.rfind("\n", 0, at) + 1
    again = re.compile(f"\n(?={text[line:at] if text[line:at].isspace() else ''}[\\[{{])")
    while at < end:
        try:
            value, at = DECODER.raw_decode(text, at)
        except (ValueError, RecursionError) as error:
            found = again.search(text, at)
            upto = found.end() if found else end
            yield BadRecord(
                "not JSON", f"{error}; {upto - at:,} characters: {text[at : at + 80]!r}"
            )
            at = upto
        else:
            yield value
        at = _after(_GAP, text, at)


def _after(pattern: re.Pattern[str], text: str, at: int) -> int:
    found = pattern.match(text, at)
    return found.end() if found else at


class _Repeated(ValueError):
    """An object says two things under one name."""


def _object(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    made = dict(pairs)
    if len(made) < len(pairs):
        for key, value in pairs:
            if made[key] != value:
                raise _Repeated(f"{key} is both {value!r:.60} and {made[key]!r:.60}")
    return made


DECODER = json.JSONDecoder(object_pairs_hook=_object)


def _unwrapped(value: Any) -> Iterator[Any]:
    """The records of an array, or of an object that holds nothing but an array of them."""
    if isinstance(value, Mapping):
        name = next((name for name in WRAPPERS if name in value), "")
        inner = None if value.keys() & _SHAPED else value.get(name)
        if isinstance(inner, list) and inner and not are_turns(inner):
            yield from inner
            return
        if value and value.keys().isdisjoint(KNOWN) and _all_mappings(value.values()):
            yield from value.values()  # records by their names
            return
    elif isinstance(value, list) and value and not are_turns(value):
        if any(isinstance(row, Mapping) or are_turns(row) for row in value):
            yield from value
            return
    yield value


def _all_mappings(values: Iterable[Any]) -> bool:
    return all(isinstance(value, Mapping) and value.keys() & _SHAPED for value in values)


def _parquet_records(path: Path) -> Iterator[Any]:
    import pyarrow
    from pyarrow import parquet

    try:
        file = parquet.ParquetFile(path)
    except (pyarrow.ArrowInvalid, OSError) as error:
        raise ValueError(
            f"load: {path} must be a Parquet file, got {error}. Write or download it again."
        ) from None
    with file:
        for group in range(file.num_row_groups):
            rows, read = file.metadata.row_group(group).num_rows, 0
            try:
                for batch in file.iter_batches(batch_size=_ROWS, row_groups=[group]):
                    yield from _rows(batch)
                    read += batch.num_rows
            except (pyarrow.ArrowException, OSError) as error:
                for _ in range(rows - read):
                    yield BadRecord("damaged Parquet", f"row group {group}: {error}")


def _rows(batch: Any) -> Iterator[Any]:
    try:
        yield from batch.to_pylist()
    except UnicodeDecodeError:
        for i in range(batch.num_rows):
            try:
                yield batch.slice(i, 1).to_pylist()[0]
            except UnicodeDecodeError as error:
                yield BadRecord("invalid UTF-8", str(error))
