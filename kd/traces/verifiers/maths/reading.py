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
from kd.traces.verifiers.maths.expressions import LONGEST, Node, Unreadable, parse, symbols
from kd.traces.verifiers.maths.numerals import SMALL, number, ungrouped, with_points
from kd.traces.verifiers.maths.plain import plain
from kd.traces.verifiers.maths.relations import read_relation
from kd.traces.verifiers.maths.several import (
    One,
    read_bracketed,
    read_connected,
    read_matrix,
    read_union,
)
from kd.traces.verifiers.maths.units import Unit, read_unit
from kd.traces.verifiers.maths.values import PERCENT, Expression, Value, Word

_CJK = "\u3040-\u30ff\u4e00-\u9fff"
_HEDGE = re.compile(
    r"^(?:approximately|about|around|roughly|nearly|ca\.|environ|etwa|\\approx|=)\s*", re.IGNORECASE
)
_NOT_A_LABEL = re.compile(
    r"\b(?:or|and|more|less|than|not|least|most|over|under|times|half|dozen|hundred|thousand|million|billion"
    r"|trillion|plus|minus|squared|cubed|factorial|base|mod|percent|to|between|through|negative|if|"
    r"sin|cos|tan|ln|log|sqrt|pi|choose|modulo|half|halves|thirds?|quarters?|fourths?|fifths?|sixths?|sevenths?|eighths?|ninths?|tenths?|points?|remainder|out|k|e|i|th|st|nd|rd)\b",
    re.IGNORECASE,
)
_SCALES = {
    "dozen": 12, "hundred": 100, "thousand": 10**3, "million": 10**6, "billion": 10**9,
    "trillion": 10**12,
}  # fmt: skip
_SCALE = re.compile(rf"^(-?[\d.]+) ({'|'.join(_SCALES)})\b(.*)", re.IGNORECASE)
_STEP = re.compile(r"(\d+(?:\.\d+)?) ?([A-Za-z]+),?(?: and)?(?: |$)")
_LETTERS = r"((?:\\text\s*\{[^{}]*\}|[A-Za-z])(?:\s*\^\s*\d)?)"
_TAIL = re.compile(
    r"(.*?[\d)}\]!]|.*?\\pi)(?![eE][-+]?\d)\s*((?:\\text\s*\{[^{}]*\}|\\deg|[A-Za-z¤€£]).*)",
    re.DOTALL,
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


def _quantity(text: str, one: One) -> Value | None:
    if not text:
        raise Unreadable("empty")
    if text[0] in "¤€£¥₹" or re.match(r"-\s*[¤€£]", text):
        unit = read_unit(text.lstrip("- ")[0])
        rest = text.replace(text.lstrip("- ")[0], "", 1).strip()
        amount = one(rest)
        if isinstance(amount, Expression):
            behind = re.sub(r"^-?[\d.,]+\s*|\\text|[{}]", "", rest).strip()
            if amount.unit is not None and amount.unit.of != (unit and unit.of):
                if _money(amount.unit):
                    raise Unreadable("two currencies")
            label = behind if amount.label or amount.unit not in (None, unit) else ""
            return Expression(amount.node, amount.decimals, unit, label)
        return None
    percent = re.fullmatch(
        r"(.*\S)\s*(?:%|\\text\s*\{\s*(?:%|percent)\s*\}|percent|per cent|Prozent|pour cent)", text
    )
    if percent:
        return Expression(parse(percent[1]), _decimals(percent[1]), PERCENT)
    given, text = text, _SCALE.sub(lambda m: f"{m[1]}*{_SCALES[m[2].lower()]}{m[3]}", text)
    text = re.sub(r"\\mu\s*(?=[A-Za-z]\b)", " u", text)
    text = re.sub(r"\\deg\s*(?:\\text\s*\{)?\s*([CF])\b\}?", r" deg\1", text)
    text = re.sub(rf"(?<=\d)\s*\\frac\s*\{{{_LETTERS}\}}\s*\{{{_LETTERS}\}}", r" \1/\2", text)
    match = _TAIL.fullmatch(text)
    if match is None:
        return Expression(parse(text)) if text != given and "\\" not in text else None
    head, tail = match.group(1).strip(), match.group(2).strip()
    if not tail.startswith("\\") and len(tail) == 1 and not text[:-1].endswith(" "):
        return None  # 5m is five times m
    if tail.startswith("\\deg") and re.search(r"sin|cos|tan|cot|sec|csc", head):
        return None  # the degrees are the function's
    rate = re.fullmatch(r"(\\text\s*\{\s*)?(\w+) (per .*|an? .*?|/ .*?)\}?", tail)
    paid = read_unit(rate[2]) if rate else None
    if rate and paid is not None and _money(paid):
        return Expression(parse(head), _decimals(head), paid, rate[3])
    unit = read_unit(tail)
    label = ""
    if unit is None:
        label = re.sub(r"\\text\s*\{([^{}]*)\}", r"\1", tail).strip()
        long = re.fullmatch(r"[A-Za-z][A-Za-z '\-./]*", label) and re.match(
            r"\\text|[A-Za-z]{3}|[a-z]+ ", tail
        )
        if not long or _NOT_A_LABEL.search(label) or len(label.split()) > 6:
            return None
    try:
        node = parse(head)
    except Unreadable:
        return None
    if symbols(node) and not tail.startswith("\\text"):
        return None
    if unit is not None and not unit.of:
        unit = None
    return Expression(node, _decimals(head), unit, label)


def _money(unit: Unit) -> bool:
    return len(unit.of) == 1 and unit.of[0] in {(name, 1) for name in ("USD", "EUR", "GBP")}


def _compound(text: str, one: One) -> Value | None:
    """2 hours 30 minutes: units of one kind, each smaller than the one before."""
    parts = _STEP.findall(text)
    if len(parts) < 2 or _STEP.sub("", text).strip():
        return None
    total, units = Fraction(0), [read_unit(name) for _, name in parts]
    for (amount, _), unit in zip(parts, units, strict=True):
        if unit is None or unit.of != (units[0] or unit).of:
            return None
        total += Fraction(amount) * unit.factor
    factors = [unit.factor for unit in units if unit]
    if factors != sorted(factors, reverse=True) or len(set(factors)) < len(factors):
        return None
    return Expression(("num", total / factors[0]), 0, units[0])


def _decimals(text: str) -> int:
    match = re.fullmatch(r"[-+]?\d*\.(\d+)", text.strip())
    return len(match[1]) if match else 0


def _word(text: str, one: One) -> Value | None:
    words = re.sub(r"\\text\s*\{([^{}]*)\}", r"\1", text).strip(" .!\"'()")
    if words.lower() in SMALL:
        return Expression(("num", Fraction(SMALL.index(words.lower()))))
    count = re.fullmatch(r"([a-z]+) ([a-z]+)(?: \(.*\))?", words)
    if count and count[1] in SMALL and count[2] in _SCALES:
        return one(f"{SMALL.index(count[1])} {count[2]}")
    if count and count[1] in SMALL and not _NOT_A_LABEL.search(count[2]):
        node: Node = ("num", Fraction(SMALL.index(count[1])))
        return Expression(node, 0, read_unit(count[2]), count[2])
    if re.fullmatch(r"[^\W\d_][^\W\d_ '\-.&,]*(?:[ '\-.&,]+[^\W\d_]+)*\.?", words) and (
        len(words) > 2 or text.isupper() or text.istitle() or "\\text" in text or not text.isascii()
        or words.lower() in ("no", "up", "on", "or")
    ):  # fmt: skip
        return None if words in ("pi", "infinity", "sqrt") else Word(words)
    return None


def _term(text: str, one: One) -> Value | None:
    return Expression(parse(text), _decimals(text))


_READERS: tuple[Callable[[str, One], Value | None], ...] = (
    _code,
    read_matrix,
    read_union,
    _word,
    _compound,
    read_bracketed,
    read_connected,
    read_relation,
    _quantity,
    _term,
)
