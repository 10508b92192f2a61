"""Records of other tools' files: Parquet, Arrow and JSON lines, in folders at any depth."""

from __future__ import annotations

import json
import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np

SUFFIXES = (".parquet", ".arrow", ".jsonl")


def records(source: str | os.PathLike[str]) -> Iterator[Any]:
    """The rows of a file, or of every such file in a folder and the folders in it, by name.

    Raises:
        FileNotFoundError: there is no such file, naming what is there.
        ValueError: a line that is not JSON.
    """
    path = Path(source)
    if path.is_dir():
        files = [item for item in sorted(path.rglob("*")) if item.suffix in SUFFIXES]
        files = [item for item in files if item.is_file() and _is_shown(item, path)]
        if not files:
            inside = ", ".join(sorted(item.name for item in path.iterdir())[:6]) or "none"
            raise FileNotFoundError(
                f"import_cache: {path} must hold {', '.join(SUFFIXES)} files, got {inside}."
            )
        for item in files:
            yield from records(item)
    elif path.suffix == ".parquet":
        import pyarrow.parquet

        with pyarrow.parquet.ParquetFile(path) as file:
            for batch in file.iter_batches(batch_size=16):
                yield from _rows_of(batch)
    elif path.suffix == ".arrow":  # as datasets' save_to_disk writes them
        import pyarrow

        with pyarrow.ipc.open_stream(path) as stream:
            for batch in stream:
                yield from _rows_of(batch)
    else:
        with open(path, encoding="utf-8-sig") as lines:
            for number, line in enumerate(lines, 1):
                if line.strip():
                    try:
                        yield json.loads(line)
                    except (ValueError, RecursionError) as error:
                        raise ValueError(
                            f"import_cache: line {number} of {path} must be JSON, got "
                            f"{error!s:.200}."
                        ) from None


def _is_shown(path: Path, folder: Path) -> bool:
    """Not in .cache and the like, where the Hub's client keeps what is not finished."""
    return not any(part.startswith(".") for part in path.relative_to(folder).parts)


def _rows_of(batch: Any) -> Iterator[dict[str, Any]]:
    """Rows of an Arrow batch; lists of numbers, also of one length each, as arrays."""
    for row in range(batch.num_rows):
        yield {
            name: _plain(column[row])
            for name, column in zip(batch.schema.names, batch.columns, strict=True)
        }


def _plain(scalar: Any) -> Any:
    """An Arrow value; numbers are taken from its buffers, without a Python object for each."""
    import pyarrow.types as kinds

    if not scalar.is_valid or not _is_list(scalar.type):
        return scalar.as_py()
    values, widths = scalar.values, []
    while _is_list(values.type) and values.null_count == 0:
        lengths = np.unique(values.value_lengths().to_numpy(zero_copy_only=False))
        if len(lengths) > 1:  # rows that differ
            return scalar.as_py()
        widths.append(int(lengths[0]) if len(lengths) else 0)
        values = values.flatten()
    number = kinds.is_integer(values.type) or kinds.is_floating(values.type)
    if not number or values.null_count:
        return scalar.as_py()
    return values.to_numpy(zero_copy_only=False).reshape(len(scalar.values), *widths)


def _is_list(kind: Any) -> bool:
    import pyarrow.types as kinds

    return bool(kinds.is_list(kind) or kinds.is_large_list(kind) or kinds.is_fixed_size_list(kind))
