"""Tables as Markdown and CSV, for everything here that prints one."""

from __future__ import annotations

import csv
import io
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any


def markdown(
    columns: Sequence[str], rows: Iterable[Sequence[Any]], text: Sequence[str] = ()
) -> str:
    """A Markdown table; all but the first column and those named in ``text`` are numbers."""
    words = {columns[0], *text}
    marks = ["---" if column in words else "---:" for column in columns]
    lines = [columns, *rows]
    shown = ["| " + " | ".join(map(str, line)) + " |" for line in lines]
    return "\n".join([shown[0], "|" + "|".join(marks) + "|", *shown[1:]])


def comma_separated(columns: Sequence[str], rows: Iterable[Sequence[Any]]) -> str:
    """CSV with a header; None is empty, a float has six digits."""
    text = io.StringIO()
    writer = csv.writer(text, lineterminator="\n")
    writer.writerow(columns)
    for row in rows:
        writer.writerow([f"{cell:.6g}" if isinstance(cell, float) else cell for cell in row])
    return text.getvalue()


def show(lines: Iterable[str], path: Path | None = None) -> None:
    """Print lines as they come, and write them to ``path`` too."""
    kept = []
    for line in lines:
        print(line, flush=True)
        kept.append(line)
    if path is not None:
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text("\n".join(kept) + "\n")


def put_between(path: Path, whole: str, begin: str, end: str, text: str) -> str:
    """The ``whole`` of a file's text with what stands between two markers replaced.

    Raises:
        ValueError: the file does not hold the markers.
    """
    before, found, rest = whole.partition(begin)
    _, closed, after = rest.partition(end)
    if not found or not closed:
        raise ValueError(f"{path} must hold {begin} and {end}. Add them.")
    return f"{before}{begin}\n{text}\n{end}{after}"
