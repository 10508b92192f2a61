"""Removes what evaluation sets ask: shared word runs and look-alikes, with the evidence."""

from __future__ import annotations

import re
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any

from kd.traces.trace import Trace
from kd.traces.yields import Yield

_WORDS = re.compile(r"\w+")


def words(text: str) -> list[str]:
    """Lower-case words and numbers; punctuation does not count."""
    return _WORDS.findall(text.lower())


@dataclass
class Evaluations:
    """An index of evaluation questions.

    Attributes:
        n: words in a run that is enough to be a leak (open-r1 uses 8).
        fuzzy: share of a record's or question's word pairs in common, from which they are alike.
    """

    n: int = 8
    fuzzy: float = 0.8
    texts: list[tuple[str, int, str]] = field(default_factory=list)
    _runs: dict[str, int] = field(default_factory=dict)
    _whole: dict[str, int] = field(default_factory=dict)
    _pairs: dict[tuple[str, str], list[int]] = field(default_factory=dict)
    _sizes: list[int] = field(default_factory=list)

    def add(self, name: str, questions: Iterable[str]) -> Evaluations:
        """Index the questions of a set."""
        for number, question in enumerate(questions):
            at = len(self.texts)
            self.texts.append((name, number, question))
            found = words(question)
            self._whole.setdefault(" ".join(found), at)
            for i in range(len(found) - self.n + 1):
                self._runs.setdefault(" ".join(found[i : i + self.n]), at)
            pairs = set(zip(found, found[1:], strict=False))
            self._sizes.append(len(pairs))
            for pair in pairs:
                self._pairs.setdefault(pair, []).append(at)
        return self

    def match(self, text: str) -> dict[str, Any] | None:
        """The first leak in a text: kind, set, number, question, and what they share."""
        found = words(text)
        if not found:
            return None
        at = self._whole.get(" ".join(found))
        if at is not None:
            return self._evidence("exact", at, " ".join(found)[:300], 1.0)
        for i in range(len(found) - self.n + 1):
            run = " ".join(found[i : i + self.n])
            at = self._runs.get(run)
            if at is not None:
                return self._evidence(f"{self.n}-gram", at, run, 1.0)
        return self._alike(found)

    def _alike(self, found: Sequence[str]) -> dict[str, Any] | None:
        if len(found) > 2000:
            return None
        pairs = set(zip(found, found[1:], strict=False))
        shared: dict[int, int] = {}
        for pair in pairs:
            for at in self._pairs.get(pair, ())[:500]:
                shared[at] = shared.get(at, 0) + 1
        for at, count in shared.items():
            score = count / max(1, len(pairs) + self._sizes[at] - count)
            if score >= self.fuzzy and self._sizes[at] >= 4:
                return self._evidence("fuzzy", at, " ".join(found)[:300], round(score, 3))
        return None

    def _evidence(self, kind: str, at: int, shared: str, score: float) -> dict[str, Any]:
        name, number, question = self.texts[at]
        return {
            "kind": kind,
            "set": name,
            "number": number,
            "question": question[:500],
            "shared": shared,
            "score": score,
        }


def decontaminate(
    traces: Iterable[Trace],
    evaluations: Evaluations,
    *,
    report: Yield,
    evidence: list[dict[str, Any]] | None = None,
    fields: Sequence[str] = ("prompt",),
    stage: str = "decontaminate",
) -> Iterator[Trace]:
    """Drop traces that ask, or quote, an evaluation question.

    Args:
        traces: what to look through.
        evaluations: the index.
        report: takes the counts, by evaluation set and kind.
        evidence: takes one row per dropped trace: its id and index, the field, and the match.
        fields: of the trace, looked through; add "think" and "answer" to be strict.
        stage: the stage's name in the report.
    """
    tally = report.stage(stage)
    for number, trace in enumerate(traces):
        found = None
        with tally.timed():
            for name in fields:
                found = evaluations.match(getattr(trace, name))
                if found:
                    break
        if not found:
            tally.keep()
            yield trace
            continue
        detail = f"{found['set']} {found['number']}: {found['shared']}"
        tally.drop(f"in {found['set']} ({found['kind']})", trace, detail)
        if evidence is not None:
            row = {"record": number, "id": trace.id, "field": name, "prompt": trace.prompt[:500]}
            evidence.append({**row, **found})
