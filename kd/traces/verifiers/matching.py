"""Verifiers that read a final answer and its reference as a number, or as any mathematics.

What cannot be read wholly, has two readings that disagree, or is equal only when rounded is
"unknown", never a guess.
"""

from __future__ import annotations

import re
from dataclasses import dataclass
from fractions import Fraction
from typing import ClassVar

from kd.traces.trace import Trace
from kd.traces.verifiers.answers import final_statement
from kd.traces.verifiers.choices import Choice, reference_letter
from kd.traces.verifiers.judging import against, bare, different, doubted, reference_of
from kd.traces.verifiers.maths.comparing import compare
from kd.traces.verifiers.maths.evaluating import real, value
from kd.traces.verifiers.maths.expressions import Unreadable, symbols
from kd.traces.verifiers.maths.reading import read
from kd.traces.verifiers.maths.values import PERCENT, Expression, Named, Value, Word
from kd.traces.verifiers.sentences import read_statement
from kd.traces.verifiers.verdict import CORRECT, UNKNOWN, Verdict

_PERCENT = re.compile(r"percent|%|per cent|pourcent|prozent|porcentaje|百分", re.IGNORECASE)


@dataclass(frozen=True)
class Numeric:
    """The final answer must be the reference's number.

    A reference is a number in any spelling (``1,234``, ``3\\frac{1}{2}``, ``2^{10}``, ``10\\pi``,
    ``50 %``, ``5 km``); another one is refused: "unknown: reference is not a number".

    Attributes:
        tolerance: allowed difference, relative to the reference.
    """

    tolerance: float = 0.0
    reads: ClassVar[tuple[str, ...]] = ()  # of metadata
    version: ClassVar[int] = 2

    def __call__(self, trace: Trace) -> Verdict:
        said = against(trace)
        if said is not None:
            return said
        wanted = reference_of(trace.reference)
        references = read_number(wanted)
        if references is None:
            return Verdict(UNKNOWN, "reference is not a number", detail=wanted[:120])
        percent = bool(_PERCENT.search(trace.prompt))
        return doubted(
            final_statement(trace.answer),
            lambda text: self._judge(text, references, wanted, percent),
        )

    def _judge(
        self, text: str, references: tuple[Value, ...], wanted: str, percent: bool
    ) -> Verdict:
        try:
            answers = read_statement(text)
            answers = _asked_for_percent(answers) if percent else answers
        except Unreadable as error:
            return Verdict(UNKNOWN, "answer cannot be read", detail=f"{text[:120]!r}: {error}")
        if isinstance(answers[0], Word):
            return Verdict(UNKNOWN, "answer is not a number", detail=text[:120])
        found = compare(references, answers)
        if found is True or (self.tolerance and self._within(references[0], answers[0])):
            return Verdict(CORRECT)
        if found is None:
            return Verdict(
                UNKNOWN, "cannot be compared", detail=f"{text[:100]!r}, {wanted[:100]!r}"
            )
        return different(text, wanted, "number")

    def _within(self, reference: Value, answer: Value) -> bool:
        sides = [side.value if isinstance(side, Named) else side for side in (reference, answer)]
        if not all(isinstance(side, Expression) and not symbols(side.node) for side in sides):
            return False
        if sides[0].unit != sides[1].unit and sides[1].unit is not None:  # type: ignore[union-attr]
            return False
        left, right = (real(value(side.node, {})) for side in sides)  # type: ignore[union-attr]
        return bool(abs(left - right) <= real(Fraction(self.tolerance)) * abs(left))


def read_number(text: str) -> tuple[Value, ...] | None:
    """The readings of a reference that is one number and nothing else, else None."""
    try:
        found = read(text) if "\n" not in text else ()
    except Unreadable:
        return None
    made = tuple(side.value if isinstance(side, Named) else side for side in found)
    numbers = all(isinstance(side, Expression) and not symbols(side.node) for side in made)
    return made if numbers and made else None


def _asked_for_percent(answers: tuple[Value, ...]) -> tuple[Value, ...]:
    """Where the question asks for a percentage, 50 % may also be the reference's 50."""
    plain_numbers = (
        Expression(side.node, side.decimals)
        for side in answers
        if isinstance(side, Expression) and side.unit == PERCENT
    )
    return (*answers, *plain_numbers)


@dataclass(frozen=True)
class Maths:
    """The final answer must mean what the reference means.

    Numbers, units, percent, terms, equations, sets, tuples, intervals, matrices, residues, times,
    dates, letters of a choice and words; both sides are read wholly, or it is unknown. Bounded in
    time and memory: 9^9^9^9 and its like are "unknown".
    """

    reads: ClassVar[tuple[str, ...]] = ()  # of metadata
    version: ClassVar[int] = 2

    def __call__(self, trace: Trace) -> Verdict:
        said = against(trace, texts=True)
        if said is not None:
            return said
        wanted = reference_of(trace.reference)
        try:
            references = read(wanted)
        except Unreadable:
            references = ()
        letter = reference_letter(wanted) if re.search(r"[A-Z]|\(\w\)", wanted) else None
        percent = bool(_PERCENT.search(trace.prompt))
        return doubted(
            final_statement(trace.answer),
            lambda text: self._judge(text, wanted, references, letter, percent),
        )

    def _judge(
        self,
        text: str,
        wanted: str,
        references: tuple[Value, ...],
        letter: str | None,
        percent: bool,
    ) -> Verdict:
        if bare(text, ".") == bare(wanted, "."):
            return Verdict(CORRECT)
        if letter is not None:
            chosen = Choice().judge(text, letter)
            if chosen.correct and letter not in text and "(" not in wanted:
                return Verdict(UNKNOWN, "differs in case", detail=text[:120])
            return chosen
        if not references:
            return Verdict(UNKNOWN, "reference cannot be read", detail=wanted[:120])
        try:
            answers = read_statement(text)
        except Unreadable as error:
            return Verdict(UNKNOWN, "answer cannot be read", detail=f"{text[:120]!r}: {error}")
        answers = _asked_for_percent(answers) if percent else answers
        words = isinstance(answers[0], Word) and isinstance(references[0], Word)
        if words and any(compare(references, (word,)) for word in answers):
            return Verdict(CORRECT)
        found = compare(references, answers[-1:] if words else answers)
        if found is None:
            return Verdict(
                UNKNOWN, "cannot be compared", detail=f"{text[:100]!r}, {wanted[:100]!r}"
            )
        return Verdict(CORRECT) if found else different(text, wanted, "value")
