r"""What a short text states: a number with its unit, a list, an interval, a matrix, a word, ...

``read`` returns every reading that a text has: ``2,5`` is a list of two numbers and a European
decimal. What has none raises ``Unreadable``; nothing is skipped on the way.
"""

from __future__ import annotations

import re
from collections.abc import Callable
from fractions import Fraction
from functools import lru_cache

from kd.traces.verifiers.maths import codes
from kd.traces.verifiers.maths.expressions import LONGEST, Node, Unreadable, parse
from kd.traces.verifiers.maths.numerals import SMALL, number, ungrouped, with_points
from kd.traces.verifiers.maths.plain import plain
from kd.traces.verifiers.maths.quantities import (
    NOT_A_LABEL,
    SCALES,
    decimals,
    read_compound,
    read_quantity,
)
from kd.traces.verifiers.maths.relations import read_relation
from kd.traces.verifiers.maths.several import (
    One,
    read_bracketed,
    read_connected,
    read_matrix,
    read_union,
)
from kd.traces.verifiers.maths.units import read_unit
from kd.traces.verifiers.maths.values import Expression, Value, Word

_CJK = "\u3040-\u30ff\u4e00-\u9fff"
_HEDGE = re.compile(
    r"^(?:approximately|about|around|roughly|nearly|ca\.|environ|etwa|\\approx|\\therefore|\\Rightarrow|=>|=)\s*",
    re.IGNORECASE,
)


def read(text: str) -> tuple[Value, ...]:
    """Every reading of a text, the likeliest first.

    Raises:
        Unreadable: none of it as a whole.
    """
    if len(text) > LONGEST:
        raise Unreadable("too long")
    return _read(text)


@lru_cache(4096)
def _read(text: str) -> tuple[Value, ...]:
    plain_number = number(text.strip())
    if plain_number is not None:
        return (plain_number,)
    tidy = plain(text).strip().rstrip(".;:,").strip()
    if tidy[:1] in "\"'" and tidy[-1:] == tidy[:1]:
        tidy = tidy[1:-1]
    tidy = re.sub(r"^(?:minus|negative) (?=\d)", "-", _HEDGE.sub("", tidy)).strip()
    whole = re.fullmatch(r"\\text\s*\{([^{}]*)\}\.?", tidy)
    if whole:
        tidy = whole.group(1).strip()
    if not tidy:
        raise Unreadable("empty")
    tidy = re.sub(rf"(?<=[\d}}])\s*(?![^\d]*[万亿億千百十分半])[{_CJK}]{{1,6}}$", "", tidy)
    tidy = re.sub(r"^(\d+) ?(?:st|nd|rd|th|\\text\s*\{\s*(?:st|nd|rd|th)\s*\})$", r"\1", tidy)
    readings = [_one(ungrouped(tidy))]
    decimal = with_points(tidy)
    if decimal != tidy:
        try:
            other = _one(decimal)
        except Unreadable:
            other = readings[0]
        if other not in readings:
            readings.append(other)
    return tuple(readings)


def _one(text: str) -> Value:
    plain_number = number(text)
    if plain_number is not None:
        return plain_number
    for reader in _READERS:
        found = reader(text, _part)
        if found is not None:
            return found
    raise Unreadable("no reading")


def _part(text: str) -> Value:
    return _one(ungrouped(text))


def _code(text: str, one: One) -> Value | None:
    for reader in codes.READERS:
        found = reader(text)
        if found is not None:
            return found
    return None


def _word(text: str, one: One) -> Value | None:
    words = re.sub(r"\\text\s*\{([^{}]*)\}", r"\1", text).strip(" .!\"'()")
    if words.lower() in SMALL:
        return Expression(("num", Fraction(SMALL.index(words.lower()))))
    count = re.fullmatch(r"([a-z]+) ([a-z]+)(?: \(.*\))?", words)
    if count and count[1] in SMALL and count[2] in SCALES:
        return one(f"{SMALL.index(count[1])} {count[2]}")
    if count and count[1] in SMALL and not NOT_A_LABEL.search(count[2]):
        node: Node = ("num", Fraction(SMALL.index(count[1])))
        return Expression(node, 0, read_unit(count[2]), count[2])
    letters = all(len(word) == 1 for word in re.findall(r"\w+", words))
    if "\\text" not in text and (letters or re.search(r"(?<!\w)\w\s*-|-\s*\w(?!\w)", text)):
        return None  # a - b, x y
    if re.fullmatch(r"[^\W\d_][^\W\d_ '\-.&,]*(?:[ '\-.&,]+[^\W\d_]+)*\.?", words) and (
        len(words) > 2 or text.isupper() or text.istitle() or "\\text" in text or not text.isascii()
        or words.lower() in ("no", "up", "on", "or")
    ):  # fmt: skip
        return None if words in ("pi", "infinity", "sqrt") else Word(words)
    return None


def _term(text: str, one: One) -> Value | None:
    return Expression(parse(text), decimals(text))


_READERS: tuple[Callable[[str, One], Value | None], ...] = (
    _code,
    read_matrix,
    read_union,
    _word,
    read_compound,
    read_bracketed,
    read_connected,
    read_relation,
    read_quantity,
    _term,
)
