"""Whether two numbers or terms with their units are the same."""

from __future__ import annotations

import re
from fractions import Fraction
from typing import Any

from kd.traces.verifiers.maths.evaluating import close, numbers, same_expression, value
from kd.traces.verifiers.maths.expressions import Node, symbols
from kd.traces.verifiers.maths.units import Unit
from kd.traces.verifiers.maths.values import PERCENT, Expression

RADIANS = (("rad", 1),)
DEGREES = (("deg", 1),)
_LITTLE = {"a", "an", "at", "by", "in", "of", "on", "to"}


def same_quantity(reference: Expression, answer: Expression) -> bool | None:
    left, right = reference.unit, answer.unit
    if (left or right) and symbols(reference.node) != symbols(answer.node):
        return None  # a unit, or a letter that stands for a number
    if PERCENT in (left, right) and left != right:
        return _same_percent(reference, answer)
    if left is not None and right is not None and left != right:
        return _convert(reference, answer, left, right)
    found = _same_number(reference, answer)
    if found is not True:
        angle = DEGREES in ((left or PERCENT).of, (right or PERCENT).of) and None in (left, right)
        return _turned(reference, answer) or found if angle else found
    if _unworked(answer.node) and reference.node[0] == "num":
        return None
    if reference.label and answer.label:
        return True if _alike(reference.label, answer.label) else None
    labelled = reference.label if left is None else answer.label
    return None if labelled and (right or left) is not None and left != right else True


def _unworked(node: Node) -> bool:
    """A sum that was not worked out: 48 + 23."""
    if node[0] == "add":
        return all(_unworked(part) or part[0] == "num" for part in node[1:])
    return node[0] == "neg" and (_unworked(node[1]) or node[1][0] == "num")


def _same_number(reference: Expression, answer: Expression) -> bool | None:
    found = same_expression(reference.node, answer.node)
    if found is False and _free_constant(reference.node):
        return _but_for_a_constant(reference.node, answer.node)
    if found is False and _rounded(reference, answer):
        return None
    return found


def _free_constant(node: Node) -> str:
    """The name of a constant of integration: the C of x^2 + C."""
    if node[0] != "add":
        return ""
    ends = [part[1] for part in node[1:] if part in (("sym", "C"), ("sym", "K"))]
    return ends[0] if ends else _free_constant(node[1])


def _but_for_a_constant(reference: Node, answer: Node) -> bool | None:
    """Whether two antiderivatives differ by a number; without a constant of its own: unsure."""
    names = sorted(symbols(reference) | symbols(answer))
    gaps = []
    for shift in range(1, 5):
        point = {name: Fraction(3 * shift + 2 * i + 1, 11) for i, name in enumerate(names)}
        point |= {"C": Fraction(0), "K": Fraction(0)}
        gaps.append(value(("add", reference, ("neg", answer)), point))
    if not all(close(gaps[0], gap) for gap in gaps[1:]):
        return False
    return True if _free_constant(answer) else None


def _rounded(reference: Expression, answer: Expression) -> bool:
    """Whether one is a decimal with fewer digits that the other rounds to, or is cut to."""
    if reference.decimals == answer.decimals or symbols(reference.node) | symbols(answer.node):
        return False
    pair = sorted((reference, answer), key=lambda side: side.decimals or 10**6)
    short, other = (value(side.node, {}) for side in pair)
    if not isinstance(short, Fraction) or not (isinstance(other, Fraction) or _is_real(other)):
        return False
    if isinstance(other, Fraction) and not pair[1].decimals and other.denominator == 1:
        return False
    step = Fraction(1, 10 ** pair[0].decimals)
    exact = (
        other if isinstance(other, Fraction) else Fraction(numbers().nstr(numbers().re(other), 60))
    )
    return abs(exact - short) < step and abs(short) > 0


def _is_real(number: Any) -> bool:
    return not getattr(number, "imag", 0) and abs(number) < 10**100


def _same_percent(reference: Expression, answer: Expression) -> bool | None:
    """12.5 % is 0.125; where the reference says percent, 12.5 is enough."""
    if any(side.unit not in (None, PERCENT) or side.label for side in (reference, answer)):
        return None
    share, plain = (reference, answer) if reference.unit == PERCENT else (answer, reference)
    hundredth = Expression(("div", share.node, ("num", Fraction(100))))
    if _same_number(hundredth, plain):
        return True
    same_digits = _same_number(share, plain)
    return same_digits if not same_digits or share is reference else None


def _convert(reference: Expression, answer: Expression, left: Unit, right: Unit) -> bool | None:
    if {left.of, right.of} == {DEGREES, RADIANS}:
        return _turned(reference, answer)
    if left.of != right.of:
        scales = {"degC", "degF", "K", "deg"}
        return None if {base for base, _ in left.of + right.of} <= scales else False
    sides = [
        Expression(("mul", side.node, ("num", side.unit.factor)))
        for side in (reference, answer)
        if side.unit is not None
    ]
    return same_expression(sides[0].node, sides[1].node)


def _turned(reference: Expression, answer: Expression) -> bool | None:
    """Degrees beside radians."""
    nodes = []
    for side in (reference, answer):
        turn = side.unit is not None and side.unit.of == DEGREES
        half = ("div", ("const", "pi"), ("num", Fraction(180)))
        nodes.append(("mul", side.node, half) if turn else side.node)
    return same_expression(nodes[0], nodes[1])


def _alike(left: str, right: str) -> bool:
    """Words behind numbers: the same, singular and plural, or one inside the other."""
    found = [re.findall(r"[a-z]+", side.lower()) for side in (left, right)]
    if any(len(word) < 3 and word not in _LITTLE for side in found for word in side):
        return "".join(left.split()) == "".join(right.split())  # a unit that is not known
    words = [{re.sub(r"(?:es|s)$", "", word) for word in side} for side in found]
    return words[0] <= words[1] or words[1] <= words[0]
