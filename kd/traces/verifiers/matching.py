"""Verifiers that compare a final answer with a reference: as text, number, letter or mathematics.

All read the answer with ``final_statement`` and the reference as a whole. What cannot be read
wholly, has two readings that disagree, or is equal only when rounded is "unknown", never a guess.
"""

from __future__ import annotations

import re
from dataclasses import dataclass
from fractions import Fraction
from typing import Any, ClassVar

from kd.traces.trace import Trace
from kd.traces.verifiers.answers import Statement, final_answer, final_statement
from kd.traces.verifiers.choices import LETTERS, chosen, reference_letter
from kd.traces.verifiers.maths.comparing import same
from kd.traces.verifiers.maths.evaluating import value
from kd.traces.verifiers.maths.expressions import Unreadable, symbols
from kd.traces.verifiers.maths.plain import plain
from kd.traces.verifiers.maths.reading import read
from kd.traces.verifiers.maths.values import PERCENT, Expression, Named, Value, Word
from kd.traces.verifiers.maths.words import same_words
from kd.traces.verifiers.phrases import last_sentence
from kd.traces.verifiers.sentences import candidates, read_statement
from kd.traces.verifiers.verdict import CORRECT, UNKNOWN, WRONG, Verdict

LONGEST_REFERENCE = 4_000
NO_LETTER = "no letter in the answer"
_PERCENT = re.compile(r"percent|%|per cent|pourcent|prozent|porcentaje|百分", re.IGNORECASE)


def _against(trace: Trace) -> Verdict | None:
    """What is said without reading: nothing to compare, or the reference word by word."""
    if not trace.reference.strip():
        return Verdict(UNKNOWN, "no reference")
    if len(trace.reference) > LONGEST_REFERENCE:
        return Verdict(UNKNOWN, "reference too long", detail=f"{len(trace.reference)} characters")
    if not trace.answer.strip():
        return Verdict(WRONG, "no answer")
    if trace.answer.strip() == trace.reference.strip():
        return Verdict(CORRECT)
    return None


def _reference(text: str) -> str:
    r"""A reference may itself be a worked solution that ends on ``#### 18`` or in a box."""
    return final_answer(text) if "####" in text or "box" in text else text.strip()


def _different(found: str, wanted: str, what: str) -> Verdict:
    return Verdict(WRONG, f"different {what}", detail=f"{found[:120]!r}, not {wanted[:120]!r}")


def compare(references: tuple[Value, ...], answers: tuple[Value, ...]) -> bool | None:
    """All readings of both; an answer's second reading counts where the reference has only one."""
    found = [[_same(left, right) for right in answers] for left in references]
    flat = {verdict for row in found for verdict in row}
    if len(flat) == 1:
        return flat.pop()
    if len(references) == 1 and True in flat:
        return True
    return None


def _same(left: Value, right: Value) -> bool | None:
    try:
        return same(left, right)
    except (Unreadable, RecursionError):
        return None


def _doubted(statement: Statement, judge: Any) -> Verdict:
    """The verdict on a statement, taken back where other statements of the answer disagree."""
    verdict: Verdict = judge(statement.text)
    if statement.exclaimed and judge(statement.text.rstrip("!")).status != verdict.status:
        return Verdict(UNKNOWN, "an exclamation or a factorial", detail=statement.text[:120])
    if statement.later:
        later = judge(statement.later)
        if {later.status, verdict.status} == {CORRECT, WRONG}:
            return Verdict(UNKNOWN, "two final statements", detail=statement.later[:120])
    if verdict.status == WRONG and any(judge(text).correct for text in statement.wider):
        return Verdict(UNKNOWN, "several boxes", detail=statement.wider[0][:120])
    return verdict


# --- the verifiers --------------------------------------------------------------------------------


@dataclass(frozen=True)
class Exact:
    """The final answer must be the reference as text.

    Case of words, spaces, Markdown, LaTeX wrappers and full stops do not count; signs, digits and
    the case of symbols do. Where one of both only holds the other ("48 + 23 is 71" and "71 cm"),
    or they are the same number in two spellings, it is unknown.
    """

    reads: ClassVar[tuple[str, ...]] = ()  # of metadata
    version: ClassVar[int] = 2

    def __call__(self, trace: Trace) -> Verdict:
        wanted = _reference(trace.reference)
        return _against(trace) or _doubted(
            final_statement(trace.answer), lambda text: self.judge(text, wanted)
        )

    def judge(self, text: str, wanted: str) -> Verdict:
        """The verdict on a final statement."""
        left, right = _bare(text), _bare(wanted)
        sides = {
            left,
            _bare(re.split(r"(?<![<>!=\\])=(?!=)", text)[-1]),
            *map(_bare, candidates(text)),
        }
        if right in sides:
            return Verdict(CORRECT)
        words = re.fullmatch(r"[^\W\d_ ][^\W\d_ '\-]*(?: [^\W\d_ '\-]+)*", right)
        if words and any(same_words(right, side) for side in sides):
            return Verdict(CORRECT)
        if left.casefold() == right.casefold():
            return Verdict(UNKNOWN, "differs in case", detail=text[:120])
        if any(
            re.search(rf"(?<![\w.+-]){re.escape(a)}(?![\w.])", b)
            for a, b in ((left, right), (right, left))
            if a
        ):
            return Verdict(UNKNOWN, "more or less than the reference", detail=text[:120])
        if right[:1].isdigit() or right[:1] in "-.\\" or left[:1] in "\\-.":
            try:
                if compare(read(wanted), read(text)) is not False:
                    return Verdict(UNKNOWN, "the same in another spelling", detail=text[:120])
            except Unreadable:
                pass
        return _different(text, wanted, "text")


def _bare(text: str, ends: str = ".,;:!") -> str:
    r"""A text without its wrapping and ends; spaces count between words only."""
    text = re.sub(r"\\text\s*\{([^{}]*)\}", r"\1", plain(text))
    text = " ".join(text.split()).strip("\"'` ").rstrip(ends).strip("\"'` ")
    return re.sub(r"(?<=\W) | (?=\W)", "", text)


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
        said = _against(trace)
        if said is not None:
            return said
        wanted = _reference(trace.reference)
        references = read_number(wanted)
        if references is None:
            return Verdict(UNKNOWN, "reference is not a number", detail=wanted[:120])
        percent = bool(_PERCENT.search(trace.prompt))
        return _doubted(
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
        return _different(text, wanted, "number")

    def _within(self, reference: Value, answer: Value) -> bool:
        sides = [side.value if isinstance(side, Named) else side for side in (reference, answer)]
        if not all(isinstance(side, Expression) and not symbols(side.node) for side in sides):
            return False
        if sides[0].unit != sides[1].unit and sides[1].unit is not None:  # type: ignore[union-attr]
            return False
        left, right = (value(side.node, {}) for side in sides)  # type: ignore[union-attr]
        if not (isinstance(left, Fraction) and isinstance(right, Fraction)):
            left, right = float(left), float(right)
        return bool(abs(left - right) <= type(left)(self.tolerance) * abs(left))


def read_number(text: str) -> tuple[Value, ...] | None:
    """The readings of a reference that is one number and nothing else, else None."""
    try:
        found = read(text)
    except Unreadable:
        return None
    made = tuple(side.value if isinstance(side, Named) else side for side in found)
    numbers = all(isinstance(side, Expression) and not symbols(side.node) for side in made)
    return made if numbers else None


@dataclass(frozen=True)
class Choice:
    """The letter the answer settles on must be the reference's letter.

    A reference is a letter, alone, in brackets, or before its option's text (``C. Paris``).

    Attributes:
        letters: the letters of the choices.
    """

    letters: str = LETTERS
    reads: ClassVar[tuple[str, ...]] = ()  # of metadata
    version: ClassVar[int] = 2

    def __call__(self, trace: Trace) -> Verdict:
        said = _against(trace)
        if said is not None:
            return said
        wanted = reference_letter(_reference(trace.reference), self.letters)
        if wanted is None:
            return Verdict(UNKNOWN, "reference is not a letter", detail=trace.reference[:120])
        verdict = _doubted(final_statement(trace.answer), lambda text: self.judge(text, wanted))
        for other in (last_sentence(trace.answer), trace.answer.strip().split("\n")[0][:20]):
            if verdict.reason == NO_LETTER:  # "An answer is hard to find. I pick E."
                verdict = self.judge(other, wanted)
        return verdict

    def judge(self, text: str, wanted: str) -> Verdict:
        """The verdict on a final statement."""
        found = chosen(text, self.letters)
        if found is None:
            return Verdict(UNKNOWN, NO_LETTER, detail=text[:120])
        return Verdict(CORRECT) if found == wanted else _different(found, wanted, "letter")


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
        said = _against(trace)
        if said is not None:
            return said
        wanted = _reference(trace.reference)
        try:
            references = read(wanted)
        except Unreadable:
            references = ()
        letter = reference_letter(wanted)
        percent = bool(_PERCENT.search(trace.prompt))
        return _doubted(
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
        if _bare(text, ".") == _bare(wanted, "."):
            return Verdict(CORRECT)
        if letter is not None:
            return Choice().judge(text, letter)
        if not references:
            return Verdict(UNKNOWN, "reference cannot be read", detail=wanted[:120])
        try:
            answers = read_statement(text)
        except Unreadable as error:
            return Verdict(UNKNOWN, "answer cannot be read", detail=f"{text[:120]!r}: {error}")
        answers = _asked_for_percent(answers) if percent else answers
        words = isinstance(answers[0], Word) and isinstance(references[0], Word)
        if words and any(_same(references[0], word) for word in answers):
            return Verdict(CORRECT)
        found = compare(references, answers[-1:] if words else answers)
        if found is None:
            return Verdict(
                UNKNOWN, "cannot be compared", detail=f"{text[:100]!r}, {wanted[:100]!r}"
            )
        return Verdict(CORRECT) if found else _different(text, wanted, "value")
