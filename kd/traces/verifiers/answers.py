"""Verifiers that compare final answers as text, as numbers or as the letter of a choice."""

from __future__ import annotations

import re
from collections.abc import Callable
from dataclasses import dataclass
from fractions import Fraction

from kd.traces.trace import Trace
from kd.traces.verifiers.verdict import CORRECT, UNKNOWN, WRONG, Verdict

LONGEST_ANSWER = 20_000
LONGEST_NUMBER = 400
BOXES = 16  # unclosed ones looked at, from the end
_NUMBER = re.compile(
    r"(?<![\w.])[-+]?(?:\d{1,3}(?:,\d{3})+|\d+)?(?:\.\d+|(?<=\d)\.)?(?:[eE][-+]?\d{1,3})?"
    r"(?:\s*/\s*[-+]?\d+)?(?![\w])"
)
_LEAD = re.compile(
    r"(?:final answer|the answer|answer|therefore|thus|so)\s*(?:is|:|=)?\s*(?:option|choice)?\s*",
    re.IGNORECASE,
)


def last_boxed(text: str) -> str | None:
    r"""The content of the last complete ``\boxed{...}``, braces balanced; None without one."""
    text = text[-10 * LONGEST_ANSWER :]
    at = text.rfind("\\boxed{")
    for _ in range(BOXES):
        if at < 0:
            break
        depth, begin = 0, at + len("\\boxed{") - 1
        for i in range(begin, min(len(text), begin + LONGEST_ANSWER)):
            depth += (text[i] == "{") - (text[i] == "}")
            if depth == 0:
                return text[begin + 1 : i].strip()
        at = text.rfind("\\boxed{", 0, at)
    return None


def final_answer(answer: str) -> str:
    r"""What an answer ends on: its last ``\boxed{}``, else the text after its last "answer is"
    or "answer:", else its last line that is not empty."""
    answer = answer[-10 * LONGEST_ANSWER :]
    boxed = last_boxed(answer)
    if boxed is not None:
        return boxed
    lines = [line.strip() for line in answer.splitlines() if line.strip()]
    last = lines[-1] if lines else ""
    found = list(re.finditer(r"(?:answer\s*(?:is\s*:?|:)|####)\s*", last, re.IGNORECASE))
    tail = last[found[-1].end() :] if found else last
    return tail.strip().strip("*$` ").removesuffix(".").strip("*$` ")


def normalise(text: str) -> str:
    """Case, runs of spaces, and wrapping ``$``, ``*``, quotes and full stops do not count."""
    return " ".join(text.casefold().split()).strip("$*`\"'. ")


@dataclass(frozen=True)
class Exact:
    """The final answer must be the reference, character for character or as ``normalised``.

    Attributes:
        extract: finds the final answer in ``trace.answer``; None takes the whole answer.
        normalised: compare without case, runs of spaces and wrapping punctuation.
    """

    extract: Callable[[str], str] | None = None
    normalised: bool = False

    def __call__(self, trace: Trace) -> Verdict:
        if not trace.reference:
            return Verdict(UNKNOWN, "no reference")
        found = trace.answer if self.extract is None else self.extract(trace.answer)
        left, right = found.strip(), trace.reference.strip()
        if self.normalised:
            left, right = normalise(left), normalise(right)
        if not left:
            return Verdict(WRONG, "no answer")
        if left == right:
            return Verdict(CORRECT)
        return Verdict(WRONG, "different answer", detail=f"{left[:120]!r}, not {right[:120]!r}")


def parse_number(text: str) -> Fraction | None:
    """The number a text ends on, exactly: ``1,234``, ``-3.50``, ``2/3``, ``1e3``, ``50%``."""
    text = text[-4 * LONGEST_NUMBER :]
    text = re.sub(r"\\[dt]?frac\{([^{}]{1,50})\}\{([^{}]{1,50})\}", r"\1/\2", text)
    text = text.replace("\u2212", "-").replace("\\%", "%").replace("\\,", "").replace("{,}", ",")
    found = [match for match in _NUMBER.finditer(text) if any(c.isdigit() for c in match.group())]
    if not found or len(found[-1].group()) > LONGEST_NUMBER:
        return None
    over, _, under = found[-1].group().replace(",", "").replace(" ", "").partition("/")
    try:
        value = Fraction(over) / Fraction(under or 1)
    except (ValueError, ZeroDivisionError):
        return None
    return value / 100 if text[found[-1].end() :].lstrip().startswith("%") else value


@dataclass(frozen=True)
class Numeric:
    """The number the answer ends on must be the reference, exactly or within ``tolerance``.

    Attributes:
        tolerance: allowed difference, relative to the reference (absolute below 1).
    """

    tolerance: float = 0.0

    def __call__(self, trace: Trace) -> Verdict:
        if not trace.reference:
            return Verdict(UNKNOWN, "no reference")
        wanted = parse_number(trace.reference)
        if wanted is None:
            return Verdict(UNKNOWN, "reference is not a number", detail=trace.reference[:120])
        found = parse_number(final_answer(trace.answer))
        if found is None:
            return Verdict(WRONG, "no number in the answer")
        allowed = Fraction(self.tolerance) * max(Fraction(1), abs(wanted))
        if abs(found - wanted) <= allowed:
            return Verdict(CORRECT)
        return Verdict(WRONG, "different number", detail=f"{str(found)[:60]}, not {wanted!s:.60}")


@dataclass(frozen=True)
class Choice:
    """The letter the answer chooses must be the reference's letter.

    Attributes:
        letters: the letters of the choices.
    """

    letters: str = "ABCDEFGHIJ"

    def __call__(self, trace: Trace) -> Verdict:
        if not trace.reference:
            return Verdict(UNKNOWN, "no reference")
        wanted = self.letter(trace.reference)
        if wanted is None:
            return Verdict(UNKNOWN, "reference is not a choice", detail=trace.reference[:120])
        found = self.letter(final_answer(trace.answer)) or self.letter(trace.answer)
        if found is None:
            return Verdict(WRONG, "no choice in the answer")
        if found == wanted:
            return Verdict(CORRECT)
        return Verdict(WRONG, "different choice", detail=f"{found}, not {wanted}")

    def letter(self, text: str) -> str | None:
        r"""The letter a text chooses: ``C``, ``(C)``, ``C. Paris``, ``\text{C}``, "answer is C"."""
        text = text.strip()[-2_000:]
        any_letter = f"[{self.letters}{self.letters.lower()}]"
        text = re.sub(r"\\(?:text|mathrm|mathbf|textbf)\{([^{}]*)\}", r"\1", text)
        leading = re.match(rf"^[\s(*$]*({any_letter})(?:[\s.):*$]|$)", text)
        if leading and (len(text) < 4 or not leading.group(0).rstrip().isalpha()):
            return leading.group(1).upper()
        after = re.findall(rf"{_LEAD.pattern}[(*$]*({any_letter})\b", text, re.IGNORECASE)
        if after:
            return str(after[-1]).upper()
        bare = re.findall(rf"(?<![\w'])\(?([{self.letters}])\)(?!\w)", text)
        return bare[-1] if bare else None
