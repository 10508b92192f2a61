"""Decimal numbers as people write them: separators of thousands, decimal commas, small words."""

from __future__ import annotations

import re
from fractions import Fraction

from kd.traces.verifiers.maths.expressions import Node
from kd.traces.verifiers.maths.values import Expression

_NUMBER = re.compile(r"([-+]?)\s*(\d{1,3}(?:,\d{3})+|\d{1,40})?(\.\d{1,40})?")
_EUROPEAN = re.compile(
    r"(?<![\d.,])\d{1,3}(?:\.\d{3})+,\d+(?![\d.,])|(?<![\d.,])\d{1,3}(?:\.\d{3}){2,}(?![\d.,])"
)
_GROUPED = re.compile(r"(?<![\d.,])\d{1,3}(?:,\d{3})+(?![\d,])")
_SPACED = re.compile(r"(?<![\d.,/^_{] )(?<![\d.,/^_{])\d{1,3}(?: \d{3})+(?![\d]| \d|\s*/)")
_COMMA_DECIMAL = re.compile(r"(?<![\d.,])\d+,(?:\d{1,2}|\d{4,})(?![\d.,])")
SMALL = (
    "zero one two three four five six seven eight nine ten eleven twelve thirteen fourteen fifteen "
    "sixteen seventeen eighteen nineteen twenty"
).split()


def number(text: str) -> Expression | None:
    """A plain decimal number, the most frequent case."""
    match = _NUMBER.fullmatch(text)
    if match is None or not (match.group(2) or match.group(3)):
        return None
    sign, whole, rest = match.groups()
    value = Fraction((whole or "0").replace(",", "") + (rest or ""))
    node: Node = ("num", value)
    return Expression(("neg", node) if sign == "-" else node, max(0, len(rest or "") - 1))


def ungrouped(text: str) -> str:
    """Numbers without their separators of thousands."""
    text = _EUROPEAN.sub(lambda m: m.group().replace(".", "").replace(",", "."), text)
    text = _SPACED.sub(lambda m: m.group().replace(" ", ""), text)
    if text[:1] not in "([{" and not text.startswith("\\{"):
        text = _GROUPED.sub(lambda m: m.group().replace(",", ""), text)
    return text


def with_points(text: str) -> str:
    """A text whose commas are read as decimal points, where they can be: ``12,5``."""
    if re.search(r"[.(){}\[\]]", text):
        return text
    return _COMMA_DECIMAL.sub(lambda m: m.group().replace(",", "."), text)
