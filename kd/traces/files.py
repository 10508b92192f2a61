"""Records out of JSON-lines, JSON and Parquet files, and traces into them, one at a time."""

from __future__ import annotations

import gzip
import json
import os
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import IO, Any

from kd.traces.trace import TEXT_FIELDS, Trace

LONGEST_LINE = 256 * 2**20
SUFFIXES = (".jsonl", ".jsonl.gz", ".ndjson", ".json", ".parquet")
_ROWS = 256


class BadRecord:
    """A record that could not be read at all: ``reason``, ``detail``, and where it was."""

    def __init__(self, reason: str, detail: str) -> None:
        self.reason = reason
        self.detail = detail


def expand(path: str | Path) -> list[Path]:
    """The files of a path: itself, or the known ones in a folder, sorted.

    Raises:
        FileNotFoundError: nothing is there.
    """
    path = Path(path)
    if path.is_dir():
        found = sorted(file for file in path.rglob("*") if str(file).endswith(SUFFIXES))
        if not found:
            raise FileNotFoundError(
                f"load: {path} must hold {', '.join(SUFFIXES)} files, got none. Name a file."
            )
        return found
    if not path.exists():
        raise FileNotFoundError(f"load: path must exist, got {path}. Check its spelling.")
    return [path]


def read_records(path: str | Path) -> Iterator[Any]:
    """Every record of one file: a dict (or what else JSON held), or a ``BadRecord``.

    Raises:
        ValueError: the file as a whole cannot be read.
    """
    path = Path(path)
    name = path.name
    if name.endswith(".parquet"):
        yield from _parquet_records(path)
    elif name.endswith(".json"):
        yield from _json_records(path)
    elif name.endswith((".jsonl", ".ndjson")):
        with path.open("rb") as file:
            yield from _lines(file)
    elif name.endswith(".jsonl.gz"):
        with gzip.open(path, "rb") as packed:
            yield from _lines(packed)  # type: ignore[arg-type]
    else:
        raise ValueError(
            f"load: path must end with {', '.join(SUFFIXES)}, got {name}. Rename or convert it."
        )


def _lines(file: IO[bytes]) -> Iterator[Any]:
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
            yield _parse(line)


def _parse(line: bytes) -> Any:
    try:
        text = line.decode("utf-8")
    except UnicodeDecodeError as error:
        return BadRecord("invalid UTF-8", str(error))
    try:
        return json.loads(text)
    except (ValueError, RecursionError) as error:
        return BadRecord("not JSON", f"{type(error).__name__}: {error}; starts {text[:80]!r}")


def _json_records(path: Path) -> Iterator[Any]:
    whole = _parse(path.read_bytes())
    if isinstance(whole, BadRecord):
        # many files called .json are JSON lines
        with path.open("rb") as file:
            yield from _lines(file)
        return
    yield from whole if isinstance(whole, list) else [whole]


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
        for batch in file.iter_batches(batch_size=_ROWS):
            try:
                yield from batch.to_pylist()
            except UnicodeDecodeError:
                for i in range(batch.num_rows):
                    try:
                        yield batch.slice(i, 1).to_pylist()[0]
                    except UnicodeDecodeError as error:
                        yield BadRecord("invalid UTF-8", str(error))


def write_traces(path: str | Path, traces: Iterable[Trace]) -> int:
    """Write traces to a ``.jsonl``, ``.jsonl.gz`` or ``.parquet`` file, whole or not at all.

    Args:
        path: where; its ending says which format.
        traces: consumed one at a time.

    Returns:
        How many were written.
    """
    return write_rows(path, (trace.to_dict() for trace in traces), text_columns=TEXT_FIELDS)


def write_rows(
    path: str | Path, rows: Iterable[dict[str, Any]], *, text_columns: tuple[str, ...] = ()
) -> int:
    """Write dicts as ``write_traces`` does.

    Args:
        path: where.
        rows: dicts that JSON can hold; all with the same keys for Parquet.
        text_columns: always text in Parquet, even where the first rows hold none; every dict
            column becomes JSON text there.
    """
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    try:
        if path.name.endswith(".parquet"):
            count = _write_parquet(temporary, rows, text_columns)
        elif path.name.endswith(".jsonl.gz"):
            with gzip.open(temporary, "wt", encoding="utf-8", compresslevel=3) as packed:
                count = _write_lines(packed, rows)
        elif path.name.endswith((".jsonl", ".ndjson")):
            with temporary.open("w", encoding="utf-8") as file:
                count = _write_lines(file, rows)
        else:
            raise ValueError(
                f"write: path must end with .jsonl, .jsonl.gz or .parquet, got {path.name}."
            )
        os.replace(temporary, path)
    finally:
        temporary.unlink(missing_ok=True)
    return count


def _write_lines(file: IO[str], rows: Iterable[dict[str, Any]]) -> int:
    count = 0
    for row in rows:
        file.write(json.dumps(row, ensure_ascii=False, separators=(",", ":")) + "\n")
        count += 1
    return count


def _write_parquet(path: Path, rows: Iterable[dict[str, Any]], texts: tuple[str, ...]) -> int:
    import pyarrow
    from pyarrow import parquet

    writer: Any = None
    count = 0
    try:
        for chunk in _chunks(rows, _ROWS):
            flat = [
                {k: json.dumps(v) if isinstance(v, dict) else v for k, v in row.items()}
                for row in chunk
            ]
            table = pyarrow.Table.from_pylist(flat, schema=writer.schema if writer else None)
            if writer is None:
                for name in texts:
                    at = table.schema.get_field_index(name)
                    table = table.set_column(at, name, table[name].cast(pyarrow.string()))
                writer = parquet.ParquetWriter(path, table.schema, compression="zstd")
            writer.write_table(table)
            count += len(chunk)
        if writer is None:
            empty = pyarrow.table({name: pyarrow.array([], pyarrow.string()) for name in texts})
            writer = parquet.ParquetWriter(path, empty.schema)
    finally:
        if writer is not None:
            writer.close()
    return count


def _chunks(rows: Iterable[Any], size: int) -> Iterator[list[Any]]:
    chunk: list[Any] = []
    for row in rows:
        chunk.append(row)
        if len(chunk) == size:
            yield chunk
            chunk = []
    if chunk:
        yield chunk
