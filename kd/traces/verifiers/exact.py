"""The verifier that compares a final answer with its reference as text."""

from __future__ import annotations

import re
from dataclasses import dataclass
from typing import ClassVar

from kd.traces.trace import Trace
from kd.traces.verifiers.answers import final_statement
from kd.traces.verifiers.judging import against, bare, different, doubted, reference_of
from kd.traces.verifiers.maths.comparing import compare
from kd.traces.verifiers.maths.expressions import Unreadable
from kd.traces.verifiers.maths.reading import read
from kd.traces.verifiers.maths.words import same_words
from kd.traces.verifiers.sentences import candidates
from kd.traces.verifiers.verdict import CORRECT, UNKNOWN, Verdict

_EQUALS = re.compile(r"(?<![<>!=\\])=(?!=)")


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
        wanted = reference_of(trace.reference)
        return against(trace, texts=True) or doubted(
            final_statement(trace.answer), lambda text: self.judge(text, wanted)
        )

    def judge(self, text: str, wanted: str) -> Verdict:
        """The verdict on a final statement."""
        left, right = bare(text), bare(wanted)
        sides = {
            left,
            bare(_EQUALS.split(text)[-1]),
            *map(bare, candidates(text)),
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
        return different(text, wanted, "text")
