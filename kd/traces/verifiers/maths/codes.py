"""Readers of times, dates, ratios, numbers in other bases, and residues."""

from __future__ import annotations

import re

from kd.traces.verifiers.maths.expressions import parse
from kd.traces.verifiers.maths.numerals import SMALL, number
from kd.traces.verifiers.maths.values import Coded, Value

_MONTHS = "jan feb mar apr may jun jul aug sep oct nov dec".split()


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
    if month[:3].lower() not in _MONTHS:
        return None
    return Coded("date", (int(year), _MONTHS.index(month[:3].lower()) + 1, int(day)))


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
    _, _, residue = head.replace("\\equiv", "=").rpartition("=")
    return Coded("residue", (parse(residue), parse(modulus)))


READERS = (read_clock, read_ratio, read_date, read_based, read_residue)
