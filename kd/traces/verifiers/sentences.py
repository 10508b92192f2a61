"""The part of a sentence that states the value: "So she makes $18 a day" is 18 dollars."""

from __future__ import annotations

import re
from collections.abc import Iterator

from kd.traces.verifiers.maths.expressions import LONGEST, Unreadable
from kd.traces.verifiers.maths.plain import segments
from kd.traces.verifiers.maths.reading import read
from kd.traces.verifiers.maths.values import Value, Word

_OPENING = re.compile(
    r"^(?:(?:so|hence|thus|therefore|then|finally|in total|in conclusion|altogether|it follows"
    r"|that|which gives|we (?:get|have|find|obtain|conclude)|i (?:get|got|found|obtain)|donc|also"
    r"|somit|daher|entonces|por lo tanto|因此|所以)(?:[,:\s]+|(?<=[以此])))+",
    re.IGNORECASE,
)
_COPULA = re.compile(
    r"(?:\b(?:is|are|was|were|be|equals?|makes?|gives?|becomes|to|est|sont|ist|sind|es|son|lautet)"
    r"\b(?!')|[:：]|是|为)"
)
_HEDGED = re.compile(
    r"\b(?:at (?:least|most)|more|less|fewer|than|between|not|no|never|over|under|up to|above|below"
    r"|only if|either|maybe|perhaps|might|could|unless|except|isn't|doesn't|cannot|wrong"
    r"|incorrect|minus|negative|plus|million|billion|thousand|hundred|dozen)\b",
    re.IGNORECASE,
)
_SMALL_WORDS = set(
    "of in on to per and ways for at as is if by a an the was are all out day men".split()
)
_WORKED = re.compile(
    r"(?<![\w.=<>])\\?[-$€£(\d][\d\s+\-*/×÷().,$€£%\\]*=[^=]+$"
)  # 5 + 10 = 15 dollars
_A_NUMBER = re.compile(
    r"(?:\\?[$€£]\s?)?(?<![\w.\\^_{])-?\d[\d,]*(?:\.\d+)?(?!\w)(?:\s*/\s*\d+)?(?:\s?\\?%)?"
)


def candidates(text: str) -> Iterator[str]:
    """A statement, then the parts of its sentence that may be all that is meant."""
    opening = _OPENING.match(text)
    text = text[opening.end() :].strip() if opening else text
    yield text
    if len(text) > LONGEST:
        return
    remark = re.search(r"\s*\([^()]*[A-Za-z]{3}[^()]*\)$", text)
    if remark and remark.start():
        text = text[: remark.start()]
        yield text
    formulas = segments(text)
    hidden = text
    for begin, end, _ in reversed(formulas):
        hidden = hidden[:begin] + "\0" * (end - begin) + hidden[end:]
    said = list(_COPULA.finditer(hidden))
    if said:
        yield text[said[-1].end() :].strip(" ,:")
    bold = re.findall(r"\*\*(.+?)\*\*", text)
    if bold:
        yield bold[-1]
    if formulas and not _HEDGED.search(hidden):
        first = len(formulas) - 1
        while first and re.fullmatch(
            r"[\s,;]*(?:and|or|und|oder|et|ou|y|o|和|或)?\s*",
            hidden[formulas[first - 1][1] : formulas[first][0]],
        ):
            first -= 1
        yield ", ".join(inside.strip() for _, _, inside in formulas[first:])
    worked = _WORKED.search(text)
    if worked and worked.start() and not formulas and not _HEDGED.search(text):
        yield worked.group()
    numbers = _A_NUMBER.findall(text)
    prose = re.search(r"[A-Za-z]{2}", text) and not re.search(
        r"[\\^*=+{}\[\]_!|<>≤≥]", text.replace("\\$", "")
    )
    if len(numbers) == 1 and prose and not formulas and not _HEDGED.search(text):
        after = re.match(r"\s*([^\W\d_]+)", text.partition(numbers[0])[2])
        if not after or len(after[1]) > 3 or after[1].lower() in _SMALL_WORDS:
            yield numbers[0]


def read_statement(text: str) -> tuple[Value, ...]:
    """The readings of the first part of a statement that has any.

    Raises:
        Unreadable: nothing of it can be read.
    """
    failed: Unreadable | None = None
    words: tuple[Value, ...] = ()
    for part in candidates(text):
        try:
            found = read(part)
        except Unreadable as error:
            failed = failed or error
            continue
        if not isinstance(found[0], Word):
            return found
        words += found
    if words:
        return words
    raise failed or Unreadable("empty")
