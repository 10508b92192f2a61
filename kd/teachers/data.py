"""The sequences of a data set, as training will look them up, and what is recorded of them."""

from __future__ import annotations

import hashlib
from collections.abc import Iterable, Iterator
from itertools import islice
from pathlib import Path
from typing import Any

from kd.cache import TeacherCache
from kd.cache.manifest import NAME
from kd.traces import AnyRenderer, DropCounts, render_rows
from kd.traces.rows import rendered_before

CHUNK = 1 << 22


def token_ids(items: Iterable[Any], tokenizer: Any) -> Iterator[Any]:
    """Token ids of sequences that are ids already, or records that have to be rendered.

    Args:
        items: what ``kd.traces.render_rows`` takes; ids pass through.
        tokenizer: for the others; None where there are none.

    Raises:
        kd.traces.RenderError: a record cannot be rendered.
    """
    renderer = None if tokenizer is None else AnyRenderer(tokenizer)
    return (row.input_ids for row in render_rows(items, renderer))


class TrainingData:
    """A data set's token ids, made as ``kd traces render`` makes them; can be read again.

    Args:
        path: what ``kd.traces.load`` reads, or a folder saved by ``datasets``; rows are traces,
            ``messages``, ``text``, or ``input_ids`` (padded and packed ones are taken apart).
        tokenizer: of teacher and student; None where the rows are ids.
        limit: only the first so many sequences.
        max_tokens: longer ones are dropped and counted, as ``kd traces render`` does.
        **options: of ``kd.traces.Renderer``: date, tags, template_options.

    Attributes:
        report: what the last reading kept and dropped, by reason.
    """

    def __init__(
        self,
        path: str,
        tokenizer: Any,
        *,
        limit: int | None = None,
        max_tokens: int | None = None,
        **options: Any,
    ) -> None:
        self.path, self.limit, self.max_tokens = path, limit, max_tokens
        self.report = DropCounts()
        self.renderer = None if tokenizer is None else AnyRenderer(tokenizer, **options)

    def __iter__(self) -> Iterator[list[int]]:
        self.report = DropCounts()
        if self.renderer is not None:
            self.renderer.forget()
        most = self.max_tokens
        rows = render_rows(self.path, self.renderer, report=self.report, max_tokens=most)
        return (row.input_ids for row in islice(rows, self.limit))

    def source(self) -> dict[str, Any]:
        """What a cache's manifest says of it: name, digest of its files, and its rendering."""
        path = Path(self.path)
        state = hashlib.sha256()
        for file in [path] if path.is_file() else sorted(path.rglob("*")):
            if file.is_file():
                with file.open("rb") as data:
                    while part := data.read(CHUNK):
                        state.update(part)
        if not path.exists():  # of the hub
            state.update(self.path.encode())
        way = rendered_before(self.path)
        if way is None:
            way = {} if self.renderer is None else self.renderer.facts()
        name = path.name if path.exists() else self.path
        return {"data": name, "digest": state.hexdigest()[:32], "rendering": way}

    def refuse_if_other(self, cache: str) -> None:
        """Refuse to add this to a cache of something else without being told to.

        Nothing is refused where the cache was captured from this, where it is unfinished and does
        not say what it is of, or where it holds every sequence of this.

        Raises:
            ValueError: with the names and counts of both.
        """
        if not (Path(cache) / NAME).exists():
            return
        present = TeacherCache(cache, partial=True, duplicates="first")
        known, mine = present.manifest.sources, self.source()
        unsaid = present.manifest.open_writers and not known
        if mine in known or unsaid or not len(present):
            return
        total = new = 0
        for ids in self:
            total, new = total + 1, new + (ids not in present)
        if not new:
            return
        names = ", ".join(str(entry.get("data")) for entry in known) or "data it does not name"
        same = [entry for entry in known if entry.get("digest") == mine["digest"]]
        how = ""
        if same:
            how = (
                f" It was rendered otherwise: {same[0].get('rendering')}, and is here with "
                f"{mine['rendering']}."
            )
        raise ValueError(
            f"kd cache build: {cache} holds {len(present):,} sequences of {names}; {mine['data']} "
            f"has {total:,}, of which {new:,} are not among them.{how} Pass --append to add them "
            "to it, or name another --output."
        )

    def summary(self) -> str:
        """What was dropped and what the chat template added, in words; empty where nothing was."""
        counted = self.report.stage("render")
        lines = [self.report.table()] if counted.dropped else []
        lines += self.renderer.remarks() if self.renderer is not None else []
        return "".join(f"{line}\n" for line in lines)
