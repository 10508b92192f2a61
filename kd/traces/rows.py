"""Rows to capture and to train on, from whatever a data set holds: one way for both."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from itertools import groupby, islice
from pathlib import Path
from typing import Any

from kd.traces.columns import ANSWERS, QUESTIONS, TURNS, ShapeError
from kd.traces.conversations import RenderError
from kd.traces.counts import DropCounts, StageCounts, metered
from kd.traces.documents import documents
from kd.traces.loading import located_records
from kd.traces.records import BadRecord
from kd.traces.rendering import Renderer
from kd.traces.shapes import normalise
from kd.traces.tokens import IGNORE, Rendered, plain
from kd.traces.trace import Tags, Trace
from kd.traces.turns import are_turns

_BATCH = 256
_ASKED = (*TURNS, "choices", "generic_request", *QUESTIONS, *ANSWERS)
Item = Trace | str | list[Rendered] | RenderError
Outcome = tuple[Any, Rendered | RenderError]


class AnyRenderer:
    """A ``Renderer`` that is made when the first trace comes: texts need no chat template.

    Args:
        tokenizer: a transformers tokenizer.
        **options: of ``Renderer``.
    """

    def __init__(self, tokenizer: Any, **options: Any) -> None:
        self.tokenizer, self._options = tokenizer, options
        self._made: Renderer | None = None

    @property
    def full(self) -> Renderer:
        if self._made is None:
            self._made = Renderer(self.tokenizer, **self._options)
        return self._made

    def facts(self) -> dict[str, Any]:
        """Those of the ``Renderer``; none where there is no chat template that can be used."""
        try:
            return self.full.facts()
        except ValueError:  # a trace will raise it again, a text needs no template
            return {}

    def remarks(self) -> list[str]:
        """What the chat template added to the traces, in words."""
        return [] if self._made is None else self._made.remarks()

    def forget(self) -> None:
        """Start counting again what the chat template adds."""
        if self._made is not None:
            self._made.seen.clear()
            self._made.rendered = 0

    def render_all(
        self, items: Iterable[Trace | str]
    ) -> Iterator[tuple[Trace | str, Rendered | RenderError]]:
        """As ``Renderer.render_all``."""
        for kind, group in groupby(items, key=type):
            if kind is not str:
                yield from self.full.render_all(group)
                continue
            for text in group:
                try:
                    yield text, plain(self.tokenizer, str(text))
                except RenderError as error:
                    yield text, error


def rendered_before(source: str | Path) -> dict[str, Any] | None:
    """What the rows of a data set say of how they were rendered; None where they are to be."""
    record = next((record for *_, record in located_records(source)), None)
    if not isinstance(record, Mapping) or record.get("input_ids") is None:
        return None
    return {"date": record["date"]} if record.get("date") else {}


def as_recorded(facts: Mapping[str, Any]) -> dict[str, Any]:
    """Options of a ``Renderer`` that make the texts of another one again.

    Args:
        facts: what ``Renderer.facts`` said, as a cache's manifest or a report holds it; or {}.
    """
    options: dict[str, Any] = {}
    if facts.get("date"):
        options["date"] = facts["date"]
    if facts.get("tags"):
        options["tags"] = Tags(*facts["tags"])
    if facts.get("options"):
        options["template_options"] = facts["options"]
    return options


def render(trace: Trace, tokenizer: Any, **options: Any) -> Rendered:
    """Render one trace: ``input_ids, labels = render(trace, tokenizer)``.

    Args:
        trace: with an answer.
        tokenizer: the student's.
        **options: of ``Renderer``: tags, chat_template, ... For many traces make one ``Renderer``.

    Returns:
        ``input_ids`` and ``labels``: -100 on the prompt, the ids themselves on thought, answer
        and end of turn. Labels are not shifted; the training collator does that.
    """
    return Renderer(tokenizer, **options)(trace)


def render_stream(
    traces: Iterable[Trace],
    renderer: Renderer,
    *,
    report: DropCounts,
    stage: str = "render",
    max_tokens: int | None = None,
    check: bool = True,
) -> Iterator[tuple[Trace, Rendered]]:
    """Render many traces; those that cannot be are dropped and counted.

    Args:
        traces: what to render.
        renderer: for the student's tokenizer.
        report: takes the counts; tokens, the template's facts and what it added are notes.
        stage: the stage's name in the report.
        max_tokens: longer ones are dropped, never cut.
        check: the round trip of every trace.
    """
    counted = report.stage(stage)
    outcomes = renderer.render_all(traces, check=check)
    return metered(counted, _kept(outcomes, renderer, counted, max_tokens))


def render_rows(
    source: str | Path | Iterable[Any],
    renderer: Renderer | AnyRenderer | None,
    *,
    report: DropCounts | None = None,
    stage: str = "render",
    max_tokens: int | None = None,
) -> Iterator[Rendered]:
    """Rows of ids and labels from any data set: what is captured, and what is trained on.

    Args:
        source: what ``kd.traces.load`` reads, a folder saved by ``datasets``, or records. A
            record is a ``Trace``; of a known shape (a trace, ``messages``, prompt and response);
            {"text": ...} or a text, which is tokenised as it is; or token ids, bare or as
            {"input_ids": ...}, whose padding (``attention_mask``) is taken off and whose pack
            (``lengths``, or ``position_ids`` that start again) is taken apart.
        renderer: of the tokenizer whose ids are wanted; None where the source holds ids alone.
        report: takes the counts; without one, the first record that cannot be rendered is an
            error.
        stage: the stage's name in the report.
        max_tokens: longer rows are dropped, never cut.

    Raises:
        ValueError: a row of ids contradicts itself, or there is text and no renderer.
        RenderError: without ``report``: the first record that cannot be rendered.
    """
    outcomes = _outcomes(_items(source), renderer)
    if report is None:
        for _, outcome in outcomes:
            if isinstance(outcome, RenderError):
                raise outcome
            yield outcome
        return
    counted = report.stage(stage)
    for _, rendered in metered(counted, _kept(outcomes, renderer, counted, max_tokens)):
        yield rendered


def _kept(
    outcomes: Iterable[Outcome],
    renderer: Renderer | AnyRenderer | None,
    counted: StageCounts,
    most: int | None,
) -> Iterator[tuple[Any, Rendered]]:
    """Those that were rendered, the others counted."""
    notes = counted.notes
    for key in ("tokens", "trained_tokens"):
        notes.setdefault(key, 0)
    for item, outcome in outcomes:
        shown = item if isinstance(item, (Trace, Mapping)) else {"text": str(item)}
        if isinstance(outcome, RenderError):
            counted.drop(outcome.reason, shown, str(outcome))
        elif most is not None and len(outcome.input_ids) > most:
            counted.drop(f"longer than {most} tokens", shown, f"{len(outcome.input_ids)} tokens")
        else:
            counted.keep()
            notes["tokens"] += len(outcome.input_ids)
            notes["trained_tokens"] += len(outcome.labels) - outcome.labels.count(IGNORE)
            yield item, outcome
    if renderer is not None:
        notes["template"] = renderer.facts()
        notes["remarks"] = renderer.remarks()


def _outcomes(
    items: Iterable[tuple[Any, Item]], renderer: Renderer | AnyRenderer | None
) -> Iterator[Outcome]:
    """Every record with its ids (a pack's documents one by one), or its error, in order."""
    stream = iter(items)
    while batch := list(islice(stream, _BATCH)):
        texts = [item for _, item in batch if isinstance(item, (Trace, str))]
        if texts and renderer is None:
            raise ValueError(
                "render_rows: records must have input_ids where there is no tokenizer, got "
                f"{texts[0]!r:.80}. Name a tokenizer that the teacher and the student share."
            )
        made = renderer.render_all(texts) if renderer is not None else iter(())
        for record, item in batch:
            if isinstance(item, list):
                yield from ((record, document) for document in item)
            elif isinstance(item, RenderError):
                yield record, item
            else:
                yield next(made)


def _items(source: str | Path | Iterable[Any]) -> Iterator[tuple[Any, Item]]:
    """Every record with what is to be rendered of it."""
    for file, _, index, record in located_records(source):
        where = f"record {index} of {file or 'the data'}"
        record = {"messages": record} if are_turns(record) else record
        shown = record if isinstance(record, (Trace, Mapping)) else {"index": index}
        if isinstance(record, BadRecord):
            yield shown, RenderError(record.reason, f"{where}: {record.reason}: {record.detail}")
        elif isinstance(record, (Trace, str)):
            yield shown, record
        elif not isinstance(record, Mapping):
            yield shown, [Rendered(record, record)]  # ids, or refused by who takes them for such
        elif record.get("input_ids") is not None:
            yield shown, documents(record, where)
        elif isinstance(record.get("text"), str) and not any(record.get(k) for k in _ASKED):
            yield shown, record["text"]
        else:
            try:
                yield shown, normalise(record)
            except ShapeError as error:
                keys = ", ".join(map(str, record))[:200]
                words = (
                    f"{where} must be a trace, messages, a text or input_ids, got {keys}: {error}."
                )
                yield shown, RenderError(error.reason, words)
