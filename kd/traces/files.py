"""Traces into JSON-lines and Parquet files, one at a time; a file appears whole or not at all."""

from __future__ import annotations

import gzip
import json
import warnings
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import IO, Any

from kd.files import whole_file
from kd.traces.trace import TEXT_FIELDS, Trace

_ROWS = 256


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

    What JSON cannot hold is written as its text, bytes as their number. A lone surrogate, which
    no file can hold, is written as U+FFFD; how many rows had one is a warning at the end.

    Args:
        path: where.
        rows: dicts; all with the same keys for Parquet.
        text_columns: always text in Parquet, even where the first rows hold none; every dict
            column becomes JSON text there.
    """
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    lines = _Lines()
    with whole_file(path) as temporary:
        if path.name.endswith(".parquet"):
            count = _write_parquet(temporary, rows, text_columns, lines)
        elif path.name.endswith(".jsonl.gz"):
            with gzip.open(temporary, "wb", compresslevel=3) as packed:
                count = lines.write(packed, rows)
        elif path.name.endswith((".jsonl", ".ndjson")):
            with temporary.open("wb") as file:
                count = lines.write(file, rows)
        else:
            raise ValueError(
                f"write: path must end with .jsonl, .jsonl.gz or .parquet, got {path.name}."
            )
    if lines.mended:
        warnings.warn(
            f"write: text must be Unicode, got lone surrogates in {lines.mended:,} of {count:,} "
            f"rows of {path.name}: written as U+FFFD.",
            stacklevel=2,
        )
    return count


class _Lines:
    """Rows as JSON text; ``mended`` counts those that no encoding could hold as they were."""

    def __init__(self) -> None:
        self.mended = 0

    def text(self, row: Any) -> str:
        written = json.dumps(row, ensure_ascii=False, separators=(",", ":"), default=_described)
        try:
            written.encode("utf-8")
        except UnicodeEncodeError:
            self.mended += 1
            written = whole_text(written)
        return written

    def write(self, file: IO[bytes] | gzip.GzipFile, rows: Iterable[dict[str, Any]]) -> int:
        count = 0
        for row in rows:
            file.write(self.text(row).encode("utf-8") + b"\n")
            count += 1
        return count

    def flat(self, row: dict[str, Any]) -> dict[str, Any]:
        """A row for a table: dicts as JSON text."""
        texts = {k: v for k, v in row.items() if isinstance(v, str) and not v.isascii()}
        mended = {k: whole_text(v) for k, v in texts.items()}
        before, flat = self.mended, {**row, **mended}
        flat = {k: self.text(v) if isinstance(v, dict) else v for k, v in flat.items()}
        self.mended = before + (self.mended > before or mended != texts)
        return flat


def table_rows(rows: Iterable[dict[str, Any]]) -> Iterator[dict[str, Any]]:
    """Rows as a table can hold them: dicts as JSON text, no lone surrogates."""
    lines = _Lines()
    return (lines.flat(row) for row in rows)


def whole_text(text: str) -> str:
    """A text whose halves of surrogate pairs are joined, and those without another U+FFFD."""
    return text.encode("utf-16", "surrogatepass").decode("utf-16", "replace")


def _described(value: Any) -> str:
    return f"<{len(value):,} bytes>" if isinstance(value, bytes) else str(value)


def _write_parquet(
    path: Path, rows: Iterable[dict[str, Any]], texts: tuple[str, ...], lines: _Lines
) -> int:
    import pyarrow
    from pyarrow import parquet

    writer: Any = None
    count = 0
    try:
        for chunk in _chunks(rows, _ROWS):
            flat = [lines.flat(row) for row in chunk]
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
