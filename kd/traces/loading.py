"""Traces out of files, data sets and lists of any known shape; what fits none is reported."""

from __future__ import annotations

import re
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any

from kd.traces.columns import ShapeError
from kd.traces.counts import DropCounts, StageCounts, metered
from kd.traces.files import table_rows
from kd.traces.records import BadRecord, expand, read_records
from kd.traces.shapes import every_sample, normalise, problem
from kd.traces.trace import Trace
from kd.traces.turns import call_names

_HUB = re.compile(r"^[\w.-]+/[\w.-]+(?::[\w.-]+)?(?:@[\w.\[\]:%-]+)?$")


def load(
    source: str | Path | Iterable[Any],
    *,
    report: DropCounts | None = None,
    stage: str = "load",
    name: str = "",
    domain: str = "",
    all_samples: bool = False,
    columns: Mapping[str, str] | None = None,
) -> Iterator[Trace]:
    """Load traces, one at a time.

    Args:
        source: a JSON-lines, JSON or Parquet file (JSON also as .gz or .zst), a folder of such, a
            data set of the Hugging Face hub as ``owner/name``, ``owner/name:config`` or
            ``owner/name@split`` (streamed), or any iterable of dicts, such as a
            ``datasets.Dataset``.
        report: takes the counts; a record that fits no shape is dropped with its index and keys.
            Its notes count the shapes, parts of messages that are not text, and called tools.
        stage: the stage's name in the report.
        name: the source's name for records that bring none; the file's or data set's by default.
        domain: likewise.
        all_samples: make one trace of each sample where a record holds several (OpenR1-Math's
            ``generations``, an API response's choices) instead of the one it recommends.
        columns: your column names to known ones, such as ``{"my_q": "prompt"}``.

    Returns:
        An iterator over the traces; ``metadata`` says the record's "index" and "shape".
    """
    counted = (report if report is not None else DropCounts()).stage(stage)
    labels = {"source": name, "domain": domain}
    return metered(counted, _load(source, counted, labels, all_samples, columns))


def _load(
    source: str | Path | Iterable[Any],
    counted: StageCounts,
    defaults: Mapping[str, str],
    all_samples: bool,
    columns: Mapping[str, str] | None,
) -> Iterator[Trace]:
    shapes: dict[str, int] = counted.notes.setdefault("shapes", {})
    for file, origin, index, record in located_records(source):
        where = {"index": index, **({"file": file} if file else {})}
        if isinstance(record, BadRecord):
            counted.drop(record.reason, where, record.detail)
            continue
        if columns and isinstance(record, Mapping):
            record = {columns.get(key, key): value for key, value in record.items()}
        rows = every_sample(record) if all_samples else [record]
        if not rows:
            counted.drop("no samples", where, "generations is empty")
        for row in rows:
            try:
                trace = normalise(row)
            except ShapeError as error:
                keys = ", ".join(map(str, row))[:300] if isinstance(row, Mapping) else ""
                counted.drop(error.reason, {**where, "keys": keys}, error.detail)
                _count(counted.notes.setdefault("tools", {}), error.names)
                continue
            _count(shapes, [str(trace.metadata.get("shape", "kd"))])
            _count(
                counted.notes.setdefault("tools", {}), call_names(trace.metadata.get("tool_calls"))
            )
            for part, number in trace.metadata.get("lost_parts", {}).items():
                _count(counted.notes.setdefault("lost_parts", {}), [part] * number)
            counted.keep()
            yield trace.replace(
                source=trace.source or defaults["source"] or origin,
                domain=trace.domain or defaults["domain"],
                metadata={"index": index, **trace.metadata},
            )


def questions(
    source: str | Path, columns: Mapping[str, str] | None = None
) -> Iterator[tuple[str, Trace | ShapeError]]:
    """Every question of a file or folder as a problem, or why there is none; with its place.

    Args:
        source: as for ``load``.
        columns: likewise.

    Returns:
        Pairs of "file:number" and the problem, or the error.
    """
    for file, _, index, record in located_records(source):
        found: Trace | ShapeError
        try:
            if isinstance(record, BadRecord):
                raise ShapeError(record.reason, record.detail)
            if columns and isinstance(record, Mapping):
                record = {columns.get(key, key): value for key, value in record.items()}
            found = problem(record)
        except ShapeError as error:
            found = error
        yield f"{file}:{index + 1}", found


def _count(counts: dict[str, int], names: Iterable[str]) -> None:
    for name in names:
        counts[name] = counts.get(name, 0) + 1


def located_records(source: str | Path | Iterable[Any]) -> Iterator[tuple[str, str, int, Any]]:
    """(file, name of the source, index, record) of every record."""
    if isinstance(source, (str, Path)):
        path = Path(source)
        if not path.exists() and isinstance(source, str) and _HUB.match(source):
            for index, record in enumerate(_hub(source)):
                yield source, source, index, record
            return
        if any((path / name).is_file() for name in ("state.json", "dataset_dict.json")):
            yield from _saved(path)
            return
        files = expand(path)
        for file in files:
            name = file.name.partition(".")[0]
            place = file.name if file == path else file.relative_to(path)
            try:
                for index, record in enumerate(read_records(file)):
                    yield str(place), name, index, record
            except ValueError as error:
                if files == [path]:
                    raise
                yield str(place), name, 0, BadRecord("file not read", str(error))
        return
    for index, record in enumerate(source):
        yield "", "", index, record


def _saved(folder: Path) -> Iterator[tuple[str, str, int, Any]]:
    """The records of a folder that ``datasets`` saved, of all its splits."""
    from datasets import load_from_disk

    found = load_from_disk(str(folder))
    for split, rows in found.items() if isinstance(found, dict) else [("", found)]:
        for index, record in enumerate(rows):
            yield split or folder.name, folder.name, index, record


def _hub(address: str) -> Iterable[Any]:
    from datasets import load_dataset

    name, _, split = address.partition("@")
    name, _, config = name.partition(":")
    try:
        found: Iterable[Any] = load_dataset(
            name, config or None, split=split or "train", streaming=True
        )
    except (OSError, ConnectionError) as error:
        raise OSError(
            f"load: source must be a file, or a data set of the hub within reach, got {address} "
            f"({str(error).strip().splitlines()[0][:120]}). Check the name and the network."
        ) from error
    return found


def to_dataset(traces: Iterable[Trace]) -> Any:
    """A ``datasets.Dataset`` of the traces; metadata becomes JSON text."""
    from datasets import Dataset

    return Dataset.from_list(list(table_rows(trace.to_dict() for trace in traces)))
