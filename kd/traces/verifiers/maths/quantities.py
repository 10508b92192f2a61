"""Readers of numbers with a unit, a currency, a percent sign, or words behind them."""

from __future__ import annotations

import re
from fractions import Fraction

from kd.traces.verifiers.maths.expressions import Unreadable, parse, symbols
from kd.traces.verifiers.maths.several import One
from kd.traces.verifiers.maths.units import Unit, read_unit
from kd.traces.verifiers.maths.values import PERCENT, Expression, Value

NOT_A_LABEL = re.compile(
    r"\b(?:or|and|more|less|than|not|least|most|over|under|times|dozen|hundred|thousand|million"
    r"|billion|trillion|plus|minus|squared|cubed|factorial|base|mod|modulo|percent|to|between"
    r"|through|negative|if|sin|cos|tan|ln|log|sqrt|pi|choose|half|halves|thirds?|quarters?|fourths?"
    r"|fifths?|sixths?|sevenths?|eighths?|ninths?|tenths?|points?|remainder|out|k|e|i|th|st|nd|rd)"
    r"\b",
    re.IGNORECASE,
)
SCALES = {
    "dozen": 12, "hundred": 100, "thousand": 10**3, "million": 10**6, "billion": 10**9,
    "trillion": 10**12,
}  # fmt: skip
_SCALE = re.compile(rf"^(-?[\d.]+) ({'|'.join(SCALES)})\b(.*)", re.IGNORECASE)
_STEP = re.compile(r"(\d+(?:\.\d+)?) ?([A-Za-z]+),?(?: and)?(?: |$)")
_LETTERS = r"((?:\\text\s*\{[^{}]*\}|[A-Za-z])(?:\s*\^\s*\d)?)"
_TAIL = re.compile(
    r"(.*?[\d)}\]!]|.*?\\pi)(?![eE][-+]?\d)\s*((?:\\text\s*\{[^{}]*\}|\\deg|[A-Za-z¤€£]).*)",
    re.DOTALL,
)
_PERCENT = re.compile(
    r"(.*\S)\s*(?:%|\\text\s*\{\s*(?:%|percent)\s*\}|percent|per cent|Prozent|pour cent)"
)
_RATE = re.compile(r"(?:\\text\s*\{\s*)?(\w+) (per .*|an? .*?|/ .*?)\}?")
_WORDS = re.compile(r"[A-Za-z][A-Za-z '\-./]*")


def read_quantity(text: str, one: One) -> Value | None:
    """$5, 50 %, 3 million, 10 m/s, 17 apples."""
    if not text:
        raise Unreadable("empty")
    if text[0] in "¤€£¥₹" or re.match(r"-\s*[¤€£]", text):
        return _price(text, one)
    percent = _PERCENT.fullmatch(text)
    if percent:
        return Expression(parse(percent[1]), decimals(percent[1]), PERCENT)
    spelled = _SCALE.sub(lambda m: f"{m[1]}*{SCALES[m[2].lower()]}{m[3]}", text)
    match = _TAIL.fullmatch(_one_spelling(spelled))
    if match is None:
        return Expression(parse(spelled)) if spelled != text and "\\" not in text else None
    head, tail = match[1].strip(), match[2].strip()
    if len(tail) == 1 and tail.isalpha() and not spelled[:-1].endswith(" "):
        return None  # 5m is five times m
    if tail.startswith("\\deg") and re.search(r"sin|cos|tan|cot|sec|csc", head):
        return None  # the degrees are the function's
    found = _measured(head, tail)
    if (
        found is None
        and re.fullmatch(r"[A-Za-z]+(?:/[A-Za-z]+)+(?:\^\d)?", tail)
        and " " in spelled
    ):
        raise Unreadable("an unknown unit, or letters")
    return found


def _one_spelling(text: str) -> str:
    """Units that LaTeX writes apart: micro, degrees Celsius, fractions of units."""
    text = re.sub(r"\\mu\s*(?=[A-Za-z]\b)", " u", text)
    text = re.sub(r"\\deg\s*(?:\\text\s*\{)?\s*([CF])\b\}?", r" deg\1", text)
    return re.sub(rf"(?<=\d)\s*\\frac\s*\{{{_LETTERS}\}}\s*\{{{_LETTERS}\}}", r" \1/\2", text)


def _price(text: str, one: One) -> Value | None:
    sign = text.lstrip("- ")[0]
    unit, rest = read_unit(sign), text.replace(sign, "", 1).strip()
    amount = one(rest)
    if not isinstance(amount, Expression):
        return None
    if amount.unit is not None and amount.unit != unit and _money(amount.unit):
        raise Unreadable("two currencies")
    behind = re.sub(r"^-?[\d.,]+\s*|\\text|[{}]", "", rest).strip()
    label = behind if amount.label or amount.unit not in (None, unit) else ""
    return Expression(amount.node, amount.decimals, unit, label)


def _measured(head: str, tail: str) -> Value | None:
    """A number and what stands behind it: a unit, or a few words."""
    rate = _RATE.fullmatch(tail)
    paid = read_unit(rate[1]) if rate else None
    unit, label = read_unit(tail), ""
    if rate and paid is not None and _money(paid):
        unit, label = paid, rate[2]
    elif unit is None:
        label = re.sub(r"\\text\s*\{([^{}]*)\}", r"\1", tail).strip()
        words = _WORDS.fullmatch(label) and re.match(r"\\text|[A-Za-z]{3}|[a-z]+ ", tail)
        if not words or NOT_A_LABEL.search(label) or len(label.split()) > 6:
            return None
    try:
        node = parse(head)
    except Unreadable:
        return None
    if symbols(node) and not tail.startswith("\\text"):
        return None
    return Expression(node, decimals(head), unit if unit and unit.of else None, label)


def _money(unit: Unit) -> bool:
    return len(unit.of) == 1 and unit.of[0] in {(name, 1) for name in ("USD", "EUR", "GBP")}


def read_compound(text: str, one: One) -> Value | None:
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


def decimals(text: str) -> int:
    match = re.fullmatch(r"[-+]?\d*\.(\d+)", text.strip())
    return len(match[1]) if match else 0
