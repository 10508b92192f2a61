"""What the verifiers of answers share: what needs no reading, and what casts doubt on a verdict."""

from __future__ import annotations

import re
from collections.abc import Callable

from kd.traces.trace import Trace
from kd.traces.verifiers.answers import Statement, final_answer
from kd.traces.verifiers.maths.plain import plain
from kd.traces.verifiers.verdict import CORRECT, UNKNOWN, WRONG, Verdict

LONGEST_REFERENCE = 4_000
_WORKED = ("####", "\\boxed", "\\fbox")


def against(trace: Trace, *, texts: bool = False) -> Verdict | None:
    """What needs no reading: nothing to compare, or (of ``texts``) the reference word by word."""
    if not trace.reference.strip():
        return Verdict(UNKNOWN, "no reference")
    if len(trace.reference) > LONGEST_REFERENCE:
        return Verdict(UNKNOWN, "reference too long", detail=f"{len(trace.reference)} characters")
    if not trace.answer.strip():
        return Verdict(WRONG, "no answer")
    if texts and trace.answer.strip() == trace.reference.strip():
        return Verdict(CORRECT)
    return None


def reference_of(text: str) -> str:
    r"""A reference may itself be a worked solution that ends on ``#### 18`` or in a box."""
    return final_answer(text) if any(mark in text for mark in _WORKED) else text.strip()


def different(found: str, wanted: str, what: str) -> Verdict:
    return Verdict(WRONG, f"different {what}", detail=f"{found[:120]!r}, not {wanted[:120]!r}")


def bare(text: str, ends: str = ".,;:!") -> str:
    r"""A text without its wrapping and ends; spaces count between words only."""
    text = re.sub(r"\\text\s*\{([^{}]*)\}", r"\1", plain(text))
    text = " ".join(text.split()).strip("\"'` ").rstrip(ends).strip("\"'` ")
    return re.sub(r"(?<=\W) | (?=\W)", "", text)


def doubted(statement: Statement, judge: Callable[[str], Verdict]) -> Verdict:
    """The verdict on a statement, taken back where other statements of the answer disagree."""
    verdict = judge(statement.text)
    if statement.exclaimed and judge(statement.text.rstrip("!")).status != verdict.status:
        return Verdict(UNKNOWN, "an exclamation or a factorial", detail=statement.text[:120])
    if statement.later:
        later = judge(statement.later)
        if {later.status, verdict.status} == {CORRECT, WRONG}:
            return Verdict(UNKNOWN, "two final statements", detail=statement.later[:120])
    if verdict.status == WRONG and any(judge(text).correct for text in statement.wider):
        return Verdict(UNKNOWN, "several boxes", detail=statement.wider[0][:120])
    return verdict
