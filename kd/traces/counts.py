"""What every stage took in, kept and dropped, by reason, with examples of each reason."""

from __future__ import annotations

import html
import threading
import time
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any, TypeVar

from kd.traces.trace import Trace

T = TypeVar("T")

EXAMPLES = 3
EXCERPT = 400


# the beginning of a reason, and what to do where it leaves nothing
CURES = (
    ("no known shape", "Name your columns: --column MINE=prompt --column MINE=response."),
    ("question without an answer", "Answer them first: kd traces generate."),
    ("request without its response", "Join requests and responses by their custom_id."),
    ("response without its prompt", "Join requests and responses by their custom_id."),
    ("several answers", "Take each of them: --all-samples."),
    ("not JSON", "Write one JSON object a line."),
    ("unknown: no reference", "Name the column of right answers: load --column MINE=reference."),
    ("error", "Look at the examples: kd traces report."),
    ("empty think", "Load traces with thoughts, or leave out --need-think."),
    ("empty answer", "Answer them first (kd traces generate), or raise --max-new-tokens."),
    ("truncated", "Generate again with more --max-new-tokens."),
    ("longer than", "Raise --max-tokens."),
    ("in ", "All of it is in the evaluation sets: use other data."),
    ("", "Look at the examples: kd traces report."),
)


# notes that count by name, and what they are called in the table
COUNTED = {"lost_parts": "part that is not text", "tools": "tool called"}


@dataclass
class StageCounts:
    """One stage's counts; ``seen == kept + the sum of dropped`` at any time.

    Attributes:
        seen: records that came in.
        kept: records passed on.
        dropped: reason to count.
        examples: reason to a few excerpts of dropped records, each with the detail of its drop.
        seconds: time spent in the stage.
        notes: other figures of the stage, such as token counts.
    """

    seen: int = 0
    kept: int = 0
    dropped: dict[str, int] = field(default_factory=dict)
    examples: dict[str, list[dict[str, Any]]] = field(default_factory=dict)
    seconds: float = 0.0
    notes: dict[str, Any] = field(default_factory=dict)

    def keep(self, count: int = 1) -> None:
        """Count records that go on."""
        self.seen += count
        self.kept += count

    def drop(self, reason: str, record: Trace | Mapping[str, Any], detail: str = "") -> None:
        """Count a record that ends here.

        Args:
            reason: a short fixed phrase, the same for every record dropped for it.
            record: the trace, or what is known of a record that never became one.
            detail: what was special about this record; kept with the example.
        """
        self.seen += 1
        self.dropped[reason] = self.dropped.get(reason, 0) + 1
        examples = self.examples.setdefault(reason, [])
        if len(examples) < EXAMPLES:
            examples.append({"detail": detail[:EXCERPT], **excerpt(record)})

    @contextmanager
    def timed(self) -> Iterator[None]:
        """Add the time spent inside to ``seconds``."""
        started = time.perf_counter()
        try:
            yield
        finally:
            took = time.perf_counter() - started
            self.seconds += took
            _INNER.seconds += took

    def to_dict(self) -> dict[str, Any]:
        """A dict that JSON can hold."""
        return {
            "in": self.seen,
            "kept": self.kept,
            "dropped": dict(sorted(self.dropped.items(), key=lambda item: (-item[1], item[0]))),
            "examples": self.examples,
            "seconds": round(self.seconds, 3),
            "notes": self.notes,
        }


class DropCounts:
    """The stages of a pipeline in order, each with its counts.

    Example:
        >>> report = DropCounts()
        >>> lint = report.stage("lint")
        >>> lint.keep(9)
        >>> lint.drop("empty answer", Trace("1+1=?", "two"))
        >>> report["lint"].seen, report["lint"].dropped
        (10, {'empty answer': 1})
    """

    def __init__(self) -> None:
        self.stages: dict[str, StageCounts] = {}

    def stage(self, name: str) -> StageCounts:
        """The stage of this name, appended when it is new."""
        return self.stages.setdefault(name, StageCounts())

    def __getitem__(self, name: str) -> StageCounts:
        return self.stages[name]

    @property
    def seen(self) -> int:
        """Records the first stage took in."""
        return next(iter(self.stages.values())).seen if self.stages else 0

    @property
    def kept(self) -> int:
        """Records the last stage passed on."""
        return list(self.stages.values())[-1].kept if self.stages else 0

    @property
    def dropped(self) -> dict[str, int]:
        """Reason to count over all stages."""
        total: dict[str, int] = {}
        for counted in self.stages.values():
            for reason, count in counted.dropped.items():
                total[reason] = total.get(reason, 0) + count
        return total

    def merge(self, other: DropCounts) -> DropCounts:
        """Add another's counts: stages of the same name add up, new ones are appended."""
        for name, theirs in other.stages.items():
            ours = self.stage(name)
            ours.seen += theirs.seen
            ours.kept += theirs.kept
            ours.seconds += theirs.seconds
            for reason, count in theirs.dropped.items():
                ours.dropped[reason] = ours.dropped.get(reason, 0) + count
            for reason, examples in theirs.examples.items():
                mine = ours.examples.setdefault(reason, [])
                mine.extend(examples[: EXAMPLES - len(mine)])
            ours.notes = _add_notes(ours.notes, theirs.notes)
        return self

    def to_dict(self) -> dict[str, Any]:
        """A dict that JSON can hold; ``DropCounts.from_dict`` reads it back."""
        return {name: counted.to_dict() for name, counted in self.stages.items()}

    @classmethod
    def from_dict(cls, record: Mapping[str, Any]) -> DropCounts:
        """Read what ``to_dict`` made."""
        made = cls()
        for name, entry in record.items():
            made.stages[name] = StageCounts(
                seen=entry["in"],
                kept=entry["kept"],
                dropped=dict(entry["dropped"]),
                examples={reason: list(rows) for reason, rows in entry["examples"].items()},
                seconds=entry.get("seconds", 0.0),
                notes=dict(entry.get("notes", {})),
            )
        return made

    def table(self) -> str:
        """The counts as aligned text, one line per stage and one per reason below it."""
        lines = [f"{'stage':<34}{'in':>9}{'kept':>9}{'dropped':>9}{'kept %':>8}{'per s':>9}"]
        for name, counted in self.stages.items():
            share = f"{100 * counted.kept / counted.seen:.1f}" if counted.seen else "-"
            rate = f"{counted.seen / counted.seconds:,.0f}" if counted.seconds > 0 else "-"
            gone = counted.seen - counted.kept
            lines.append(
                f"{name:<34}{counted.seen:>9,}{counted.kept:>9,}{gone:>9,}{share:>8}{rate:>9}"
            )
            for reason, count in counted.to_dict()["dropped"].items():
                lines.append(f"  - {reason:<48}{count:>9,}")
            for pair, counts in counted.notes.get("agreement", {}).items():
                lines.append(f"  = {pair + ' agree, %':<48}{100 * agreed(counts):>9.1f}")
            for key, words in COUNTED.items():
                for name, count in counted.notes.get(key, {}).items():
                    lines.append(f"  = {f'{words}: {name}':<48}{count:>9,}")
            for source, entry in counted.notes.get("sources", {}).items():
                if entry.get("times", 0) > 1:
                    lines.append(f"  = {source + ' repeated, times':<48}{entry['times']:>9.2f}")
        return "\n".join(lines)

    def cure(self) -> str:
        """What to do about the commonest reason of the stage that let nothing through."""
        empty = [counted for counted in self.stages.values() if counted.seen and not counted.kept]
        if not empty:
            return "Check that the input holds records."
        reasons = sorted(empty[0].dropped.items(), key=lambda item: -item[1])
        for reason, count in reasons[:1]:
            advice = next((text for start, text in CURES if reason.startswith(start)), CURES[-1][1])
            return f"{count:,} of {empty[0].seen:,}: {reason}. {advice}"
        return CURES[-1][1]

    def __str__(self) -> str:
        return self.table()

    def _repr_html_(self) -> str:
        return f"<pre>{html.escape(self.table())}</pre>"


def agreed(counts: Mapping[str, int]) -> float:
    """The share of traces that two verifiers give one status, of ``compare``'s counts."""
    same = sum(n for pair, n in counts.items() if len(set(pair.split(" / "))) == 1)
    return same / max(1, sum(counts.values()))


class _Inner(threading.local):
    seconds = 0.0  # measured by the stages that the one being timed reads from


_INNER = _Inner()


def metered(counted: StageCounts, stream: Iterable[T]) -> Iterator[T]:
    """Pass a stage's output on, and count the time that it takes to make it.

    Stages are generators that read one another, so that the time of a step holds those of all
    stages before it: what they have counted themselves is taken off.
    """
    iterator = iter(stream)
    while True:
        outer, _INNER.seconds = _INNER.seconds, 0.0
        started = time.perf_counter()
        try:
            item = next(iterator)
        except StopIteration:
            return
        finally:
            took = time.perf_counter() - started
            counted.seconds += max(0.0, took - _INNER.seconds)
            _INNER.seconds = outer + took
        yield item


def _add_notes(ours: Mapping[str, Any], theirs: Mapping[str, Any]) -> dict[str, Any]:
    """Numbers add up, lists are joined, dicts go down a level; anything else is replaced."""
    merged = dict(ours)
    for key, value in theirs.items():
        held = merged.get(key)
        if isinstance(held, dict) and isinstance(value, Mapping):
            merged[key] = _add_notes(held, value)
        elif isinstance(held, list) and isinstance(value, list):
            merged[key] = held + value
        elif _number(held) and _number(value):
            merged[key] = held + value
        else:
            merged[key] = value
    return merged


def _number(value: Any) -> bool:
    return isinstance(value, (int, float)) and not isinstance(value, bool)


def excerpt(record: Trace | Mapping[str, Any]) -> dict[str, Any]:
    """A short readable form of a record: long texts lose their middle."""
    if isinstance(record, Trace):
        entries: Mapping[str, Any] = {
            "prompt": record.prompt,
            "think": record.think,
            "answer": record.answer,
            "reference": record.reference,
            "source": record.source,
            **{key: record.metadata[key] for key in ("index", "file") if key in record.metadata},
        }
    else:
        entries = record
    return {key: _shorten(value) for key, value in entries.items() if value not in ("", None)}


def _shorten(value: Any) -> Any:
    if isinstance(value, (int, float, bool)):
        return value
    text = value if isinstance(value, str) else str(value)[: 4 * EXCERPT]
    text = text.encode("utf-8", "replace").decode("utf-8") if not text.isascii() else text
    if len(text) <= EXCERPT:
        return text
    return (
        f"{text[: EXCERPT // 2]} [... {len(text) - EXCERPT} characters ...] {text[-EXCERPT // 2 :]}"
    )
