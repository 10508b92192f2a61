"""The verifier of multiple choice: which letter an answer settles on."""

from __future__ import annotations

import re
from dataclasses import dataclass
from typing import ClassVar

from kd.traces.trace import Trace
from kd.traces.verifiers.answers import final_statement
from kd.traces.verifiers.judging import against, different, doubted, reference_of
from kd.traces.verifiers.maths.plain import plain
from kd.traces.verifiers.phrases import last_sentence
from kd.traces.verifiers.verdict import CORRECT, UNKNOWN, Verdict

LETTERS = "ABCDEFGHIJ"
NO_LETTER = "no letter in the answer"
_LONGEST = 600  # characters of a statement that names a letter
_UNWRAP = re.compile(r"\\text\s*\{([^{}]*)\}")
_WHOLE = re.compile(r"[\s\"'(\[*{]*([A-Za-z])[\s)\].:\"'*!,}]*")
_FIRST = re.compile(r"[\s(*]*(?:([A-Z])\s*[.:]|([A-Za-z])\s*\))\s*\S")
_NAMED = re.compile(
    r"(?:\b(?i:option|choice|answer|alternative|letter|choose|chose|pick|select|go with|only"
    r"|opci[óo]n|r[ée]ponse|antwort|respuesta|buchstabe)\b|[选選][择擇]?)[\s:*]*"
    r"(?:(?i:is|est|ist|es|la|die|der|the|option)\s+)*"
    r"\(?([A-Z])\)?(?![\w'])(?!\s+(?!is\b|are\b|fits?\b|works?\b|remains?\b|holds?\b)[a-z])"
)
_SUBJECT = re.compile(
    r"(?<![\w'])\(?([A-Z])\)?\s+(?:is|would be|must be)\s+(?:the\s+)?(?:correct|right|best|true)\b"
)
_PARENTHESES = re.compile(r"(?<![\w'])\(([A-Za-z])\)(?![\w'])")
_ALONE = re.compile(r"(?<![\w'=+\-*/^\\({\[$.&])([A-Z])(?![\w'({&])(?!\s*[=+\-*/^<>])")
_ARTICLE = re.compile(r"\s+(?!(?:and|or|nor|und|oder|et|ou)\b)[a-z]")  # "A triangle", "I think"
_DENIED = re.compile(
    r"\b(?:not|isn't|cannot be|wrong|incorrect|false|except|neither|nor|anything|everything"
    r"|nothing|other than|all but)\b",
    re.IGNORECASE,
)


def reference_letter(reference: str, letters: str = LETTERS) -> str | None:
    """The letter of a reference: ``C``, ``(C)``, ``C. Paris``; None where it is anything else."""
    text = _UNWRAP.sub(r"\1", plain(reference)).strip()
    whole = re.fullmatch(r"[(\[{]?\s*([A-Za-z])\s*[)\]}]?[.:]?", text)
    found = whole or re.match(r"[(\[]?([A-Z])[)\].:]\s+\S", text)
    letter = found.group(1).upper() if found else ""
    return letter if letter and letter in letters else None


def chosen(statement: str, letters: str = LETTERS) -> str | None:
    """The one letter that a statement names as its choice; articles and pronouns are none."""
    text = _UNWRAP.sub(r"\1", plain(statement[-_LONGEST:])).strip()
    for pattern in (_WHOLE.fullmatch, _FIRST.match):
        found = pattern(text)
        if found:
            letter = next(group for group in found.groups() if group).upper()
            return letter if letter in letters else None
    clause = re.split(r"\b(?:so|hence|thus|therefore)\b,?|[;；]|，所以|因此", text)[-1]
    text = clause if re.search(r"[A-Z]", clause) else text
    if _DENIED.search(text):
        return None
    for every in (_NAMED, _SUBJECT, _PARENTHESES):
        named = {letter.upper() for letter in every.findall(text)}
        if named:
            return _only(named, letters)
    alone = {
        match.group(1)
        for match in _ALONE.finditer(text)
        if match.group(1) not in "AI" or not _ARTICLE.match(text, match.end())
    }
    last = re.search(r"([A-Z])[\s.!*\"')]*$", text)
    return _only(alone, letters) if last and alone == {last.group(1)} else None


def _only(named: set[str], letters: str) -> str | None:
    letter = named.pop() if len(named) == 1 else ""
    return letter if letter and letter in letters else None


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
        said = against(trace)
        if said is not None:
            return said
        wanted = reference_letter(reference_of(trace.reference), self.letters)
        if wanted is None:
            return Verdict(UNKNOWN, "reference is not a letter", detail=trace.reference[:120])
        verdict = doubted(final_statement(trace.answer), lambda text: self.judge(text, wanted))
        for other in (last_sentence(trace.answer), trace.answer.strip().split("\n")[0][:20]):
            if verdict.reason == NO_LETTER:  # "An answer is hard to find. I pick E."
                verdict = self.judge(other, wanted)
        return verdict

    def judge(self, text: str, wanted: str) -> Verdict:
        """The verdict on a final statement."""
        found = chosen(text, self.letters)
        if found is None:
            return Verdict(UNKNOWN, NO_LETTER, detail=text[:120])
        return Verdict(CORRECT) if found == wanted else different(found, wanted, "letter")
