"""Readers of times, dates, ratios, numbers in other bases, and residues."""

from __future__ import annotations

import re
from fractions import Fraction

from kd.traces.verifiers.maths.evaluating import value
from kd.traces.verifiers.maths.expressions import Node, Unreadable, parse, symbols
from kd.traces.verifiers.maths.numerals import SMALL, number
from kd.traces.verifiers.maths.values import Coded, Named, Value

_MONTHS = (
    "january february march april may june july august september october november december"
).split()


def read_clock(text: str) -> Value | None:
    text = re.sub(r"\\text\s*\{([^{}]*)\}", r"\1", text)
    match = re.fullmatch(
        r"(\d{1,2}):([0-5]\d)(?::([0-5]\d))?\s*(?:([ap])\.?\s?m\.?|h|uhr|o'clock)?",
        text.strip(),
        re.I,
    )
    if match is None or int(match[1]) > 24:
        return None
    return Coded(
        "clock", (int(match[1]), int(match[2]), int(match[3] or 0), (match[4] or "").lower())
    )


def read_ratio(text: str) -> Value | None:
    text = re.sub(r"^(\d+) to (\d+)$", r"\1:\2", text)
    if ":" not in text:
        return None
    parts = [number(part.strip()) for part in text.split(":")]
    if any(part is None for part in parts):
        return None
    return Coded("ratio", tuple(part.node for part in parts if part))


def read_date(text: str) -> Value | None:
    text = re.sub(r"\\text\s*\{([^{}]*)\}", r"\1", text)
    match = re.fullmatch(r"(\d{4})-(\d{1,2})-(\d{1,2})", text)
    if match:
        return Coded("date", (int(match[1]), int(match[2]), int(match[3])))
    word = r"([A-Za-z]{3,9})\.?"
    match = re.fullmatch(rf"{word} (\d{{1,2}})(?:st|nd|rd|th)?,? (\d{{4}})", text)
    month, day, year = (match[1], match[2], match[3]) if match else ("", "", "")
    if match is None:
        match = re.fullmatch(rf"(\d{{1,2}})(?:st|nd|rd|th|\.)?(?: of)? {word},? (\d{{4}})", text)
        if match is None:
            return None
        day, month, year = match[1], match[2], match[3]
    named = [i for i, name in enumerate(_MONTHS, 1) if name.startswith(month.lower())]
    return Coded("date", (int(year), named[0], int(day))) if named else None


def read_based(text: str) -> Value | None:
    text = re.sub(r"\\text\s*\{\s*([0-9A-F]+)\s*\}(?=\s*_)", r"\1", text)
    match = re.fullmatch(
        r"\(?\s*([0-9A-F]+)\s*\)?\s*_\s*\{?\s*(?:\\text\s*\{\s*(\w+)\s*\}|(\d{1,2}))\s*\}?",
        text,
    ) or re.fullmatch(
        r"\(?([0-9A-F]+)\)?,? \(?(?:\\text\s*\{)?\s*(?:in )?base\s*\}?\s*()(\w+)\)?",
        text,
    )
    if match is None or (not any(c.isdigit() for c in match[1]) and (match[3] or "") != "16"):
        return None
    base = match[2] or match[3]
    number = SMALL.index(base) if base in SMALL else int(base) if base.isdigit() else 0
    digits = match[1].lstrip("0") or "0"
    if not 2 <= number <= 36 or any(int(c, 36) >= number for c in digits):
        return Coded("based", (digits, number, None))
    return Coded("based", (digits, number, int(digits, number)))


def read_residue(text: str) -> Value | None:
    text = re.sub(r"\(\s*(?:\\text\s*\{)?\s*mod(?:ulo)?\b\s*\}?\s*([^()]*)\)", r"\\pmod \1", text)
    text = re.sub(r"\\bmod|\\text\s*\{\s*mod\s*\}|(?<![\\A-Za-z])mod(?:ulo)?\b", r"\\pmod ", text)
    head, found, modulus = text.partition("\\pmod")
    if not found or "\\pmod" in modulus:
        return None
    modulus = modulus.strip()
    if modulus[:1] == "(" and modulus[-1:] == ")":
        modulus = modulus[1:-1]
    *left, residue = re.split(r"\\equiv|=", head)
    parts, name = (parse(residue), parse(modulus)), ""
    for side in map(parse, left):
        if side[0] == "sym":
            name = side[1]
        elif symbols(side) or not congruent(side, *parts):
            raise Unreadable("a congruence to be solved")
    made = Coded("residue", parts)
    return Named(name, made) if name else made


def congruent(left: Node, right: Node, modulus: Node) -> bool | None:
    """Whether the modulus divides the difference; None where that is no number."""
    quotient = value(("div", ("add", left, ("neg", right)), modulus), {})
    return quotient.denominator == 1 if isinstance(quotient, Fraction) else None


READERS = (read_clock, read_ratio, read_date, read_based, read_residue)
