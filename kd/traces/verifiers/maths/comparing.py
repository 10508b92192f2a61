"""Whether two values are the same; ``None`` where a careful reader could not say either."""

from __future__ import annotations

import re
from collections.abc import Sequence
from fractions import Fraction
from typing import Any

from kd.traces.verifiers.maths.codes import congruent
from kd.traces.verifiers.maths.equations import equations, proportion, same_equation
from kd.traces.verifiers.maths.evaluating import close, numbers, same_expression, value
from kd.traces.verifiers.maths.expressions import Node, has, symbols
from kd.traces.verifiers.maths.units import Unit
from kd.traces.verifiers.maths.values import (
    PERCENT,
    Coded,
    Expression,
    Matrix,
    Named,
    Region,
    Relation,
    Several,
    Value,
    Word,
    as_interval,
)
from kd.traces.verifiers.maths.words import same_words

Span = tuple[Any, Any, bool, bool]  # low, high, is low open, is high open
RADIANS = (("rad", 1),)
DEGREES = (("deg", 1),)


def same(reference: Value, answer: Value) -> bool | None:
    """Whether an answer states what the reference states.

    Raises:
        Unreadable: one of them has no value that can be worked with.
    """
    if reference == answer:
        return True
    if isinstance(reference, Word) or isinstance(answer, Word):
        both = isinstance(reference, Word) and isinstance(answer, Word)
        return same_words(reference.text, answer.text) if both else None  # type: ignore[union-attr]
    pair = equations(reference, answer)
    if pair is not None:
        return same_equation(*pair)
    if isinstance(reference, Named) or isinstance(answer, Named):
        return _same_named(reference, answer)
    if isinstance(reference, Relation) or isinstance(answer, Relation):
        return _same_inequality(reference, answer)
    if isinstance(reference, Expression) and isinstance(answer, Expression):
        return _same_quantity(reference, answer)
    if isinstance(reference, Coded) or isinstance(answer, Coded):
        return _same_code(reference, answer)
    if isinstance(reference, Matrix) or isinstance(answer, Matrix):
        return _same_matrix(reference, answer)
    if isinstance(reference, Region) or isinstance(answer, Region):
        return _same_region(reference, answer)
    return _same_several(reference, answer)


# --- numbers and terms ----------------------------------------------------------------------------


def _same_quantity(reference: Expression, answer: Expression) -> bool | None:
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
    words = [
        {re.sub(r"(?:es|s)$", "", word) for word in re.findall(r"[a-z]+", side.lower())}
        for side in (left, right)
    ]
    return words[0] <= words[1] or words[1] <= words[0]


# --- equations and inequalities -------------------------------------------------------------------


def _same_inequality(reference: Value, answer: Value) -> bool | None:
    if not (isinstance(reference, Relation) and isinstance(answer, Relation)):
        return None
    flip = {"<": ">", ">": "<", "\\le": "\\ge", "\\ge": "\\le", "\\ne": "\\ne", "=": "="}
    first = ("add", reference.left, ("neg", reference.right))
    second = ("add", answer.left, ("neg", answer.right))
    factor = proportion(first, second)
    if factor is not None:
        return reference.sign == (answer.sign if factor > 0 else flip[answer.sign])
    solved = reference.left[0] == "sym" and reference.left == answer.left
    if solved and reference.sign == answer.sign:
        return same_expression(reference.right, answer.right)
    return None


def _same_named(reference: Value, answer: Value) -> bool | None:
    """x = 3 against x = 3, 3, or y = 3."""
    if not isinstance(answer, Named):
        return same(reference.value, answer) if isinstance(reference, Named) else None
    if not isinstance(reference, Named):
        return same(reference, answer.value)
    left, right = reference.name, answer.name
    functions = [re.fullmatch(r"(\w+)\((\w)\)", name) for name in (left, right)]
    value_of = answer.value
    if functions[0] and functions[1] and functions[0][1] == functions[1][1]:
        if isinstance(value_of, Expression) and symbols(value_of.node) <= {functions[1][2]}:
            node = _rename(value_of.node, functions[1][2], functions[0][2])
            value_of = Expression(node, value_of.decimals, value_of.unit, value_of.label)
            left = right
    found = same(reference.value, value_of)
    if left and right and left != right and found:
        return None
    return found


def _rename(node: Node, old: str, new: str) -> Node:
    if node == ("sym", old):
        return ("sym", new)
    return tuple(_rename(part, old, new) if isinstance(part, tuple) else part for part in node)


# --- codes ----------------------------------------------------------------------------------------


def _same_code(reference: Value, answer: Value) -> bool | None:
    if not (isinstance(reference, Coded) and isinstance(answer, Coded)):
        return _code_and_number(reference, answer)
    if {reference.kind, answer.kind} == {"clock", "ratio"}:
        reference, answer = _as_ratio(reference), _as_ratio(answer)
    if reference.kind != answer.kind:
        return None
    left, right = reference.parts, answer.parts
    if reference.kind == "date":
        return left == right
    if reference.kind == "clock":
        return _same_clock(left, right)
    if reference.kind == "based":
        if left[1] == right[1]:
            return left[0] == right[0]
        return None if left[2] is None or right[2] is None or left[2] == right[2] else False
    nodes: Sequence[Any] = left
    others: Sequence[Any] = right
    if reference.kind == "ratio":
        if len(nodes) != len(others):
            return False
        if all(same_expression(a, b) for a, b in zip(nodes, others, strict=True)):
            return True
        crossed = [
            same_expression(("mul", nodes[0], b), ("mul", others[0], a))
            for a, b in zip(nodes, others, strict=True)
        ]
        return None if all(crossed) else False
    if not same_expression(nodes[1], others[1]):
        return False
    return congruent(nodes[0], others[0], nodes[1])


def _as_ratio(code: Coded) -> Coded:
    """5:12 is a time of day, or a ratio where it stands beside one."""
    if code.kind == "ratio":
        return code
    hour, minute = code.parts[:2]
    return Coded("ratio", (("num", Fraction(hour)), ("num", Fraction(minute))))  # type: ignore[call-overload]


def _same_clock(left: Sequence[Any], right: Sequence[Any]) -> bool | None:
    def minutes(parts: Sequence[Any]) -> int:
        hour = parts[0] % 12 + 12 * (parts[3] == "p") if parts[3] else parts[0]
        return int(3600 * hour + 60 * parts[1] + parts[2])

    if left[:3] == right[:3] and "" in (left[3], right[3]):
        return True
    return minutes(left) == minutes(right)


def _code_and_number(reference: Value, answer: Value) -> bool | None:
    code, other = (reference, answer) if isinstance(reference, Coded) else (answer, reference)
    if not isinstance(code, Coded) or not isinstance(other, Expression) or symbols(other.node):
        return None
    number = value(other.node, {})
    if code.kind == "residue":
        nodes: Any = code.parts
        return None if congruent(nodes[0], other.node, nodes[1]) is not False else False
    if code.kind == "based":
        digits, _, worth = code.parts
        text = str(number) if isinstance(number, Fraction) else ""
        return None if text == digits or number == worth else False
    return None


# --- lists, regions, matrices ---------------------------------------------------------------------


def _same_several(reference: Value, answer: Value) -> bool | None:
    if not (isinstance(reference, Several) and isinstance(answer, Several)):
        several, other = (
            (reference, answer) if isinstance(reference, Several) else (answer, reference)
        )
        if isinstance(several, Several) and _one_value(several):
            return same(several.items[0], other)
        ordered = isinstance(several, Several) and several.form == "()"
        vector = isinstance(other, Expression) and (symbols(other.node) or _complex(other.node))
        return None if vector and ordered else False
    left, right = list(reference.items), list(answer.items)
    ordered = "()" in (reference.form, answer.form)
    if "{}" in (reference.form, answer.form):
        left, right = _distinct(left), _distinct(right)
    if len(left) != len(right):
        return False
    named = _by_name(left, right)
    if named is not None:
        return named
    in_order = _all([same(a, b) for a, b in zip(left, right, strict=True)])
    if in_order or (reference.form == answer.form == "()"):
        return None if in_order and {reference.form, answer.form} == {"()", "{}"} else in_order
    matched = _matched(left, right)
    return None if matched and ordered else matched


def _one_value(several: Several) -> bool:
    """{5}, or one value in several spellings: 1/2 or 0.5."""
    first, *others = several.items or (several,)
    alone = several.form == "{}" and len(several.items) == 1
    return alone or (several.form == "" and all(same(first, other) for other in others))


def _complex(node: Node) -> bool:
    return has(node, ("const", "i")) or node[0] == "binom"


def _by_name(left: list[Value], right: list[Value]) -> bool | None:
    """a = 1, b = 2 in any order; None where not every value has a name of its own."""
    sides = [{item.name: item.value for item in side if isinstance(item, Named)}
             for side in (left, right)]  # fmt: skip
    if sides[0].keys() != sides[1].keys() or not len(sides[0]) == len(left) == len(right):
        return None
    return _all([same(found, sides[1][name]) for name, found in sides[0].items()])


def _distinct(items: list[Value]) -> list[Value]:
    kept: list[Value] = []
    for item in items:
        if not any(same(item, other) for other in kept):
            kept.append(item)
    return kept


def _all(found: Sequence[bool | None]) -> bool | None:
    return False if False in found else None if None in found else True


def _matched(left: list[Value], right: list[Value]) -> bool | None:
    """Whether each of the left has its own on the right, in any order."""
    rest, unsure = list(right), False
    for item in left:
        verdicts = [same(item, other) for other in rest]
        if True in verdicts:
            rest.pop(verdicts.index(True))
        elif None in verdicts:
            unsure = True
        else:
            return False
    return None if unsure else True


def _spans(side: Value) -> list[Span] | None:
    region = as_interval(side) if isinstance(side, Several) else side
    if not isinstance(region, Region):
        return None
    made = [
        (value(low, {}), value(high, {}), low_open, high_open)
        for low, high, low_open, high_open in region.spans
        if not symbols(low) | symbols(high)
    ]
    return made if len(made) == len(region.spans) else None


def _same_region(reference: Value, answer: Value) -> bool | None:
    if isinstance(reference, Expression) or isinstance(answer, Expression):
        return False
    left, right = _spans(reference), _spans(answer)
    if left is None or right is None:
        nodes = [side.spans for side in (reference, answer) if isinstance(side, Region)]
        if len(nodes) < 2:
            several = reference if isinstance(reference, Several) else answer
            return False if isinstance(several, Several) and several.form == "{}" else None
        return None
    spans = [_merged(left), _merged(right)]
    if len(spans[0]) != len(spans[1]):
        return False
    return _all(
        [
            False if a[2:] != b[2:] else _all([close(a[0], b[0]), close(a[1], b[1])])
            for a, b in zip(*spans, strict=True)
        ]
    )


def _merged(spans: list[Span]) -> list[Span]:
    """Spans in their order, those that touch or overlap as one."""
    made: list[Span] = []
    for span in sorted(spans, key=lambda span: (float(span[0]), span[2])):
        if made and _joined(made[-1], span):
            low, high, low_open, high_open = made[-1]
            if float(span[1]) > float(high) or (span[1] == high and high_open):
                high, high_open = span[1], span[3]
            made[-1] = (low, high, low_open, high_open)
        else:
            made.append(span)
    return made


def _joined(first: Span, second: Span) -> bool:
    if close(first[1], second[0]):
        return not (first[3] and second[2])
    return float(second[0]) < float(first[1])


def _same_matrix(reference: Value, answer: Value) -> bool | None:
    grids = [_rows(side) for side in (reference, answer)]
    if grids[0] is None or grids[1] is None:
        return False
    left, right = grids
    if not (isinstance(reference, Matrix) and isinstance(answer, Matrix)):
        if any(min(len(grid), len(grid[0])) > 1 for grid in grids):
            return False
        left, right = ([[cell for row in grid for cell in row]] for grid in grids)
    if [len(row) for row in left] != [len(row) for row in right]:
        return False
    return _all(
        [
            same_expression(a, b)
            for one, other in zip(left, right, strict=True)
            for a, b in zip(one, other, strict=True)
        ]
    )


def _rows(side: Value) -> Any:
    if isinstance(side, Matrix):
        return side.rows
    if isinstance(side, Several) and side.form == "()" and side.items:
        nodes = [item.node for item in side.items if isinstance(item, Expression)]
        return [nodes] if len(nodes) == len(side.items) else None
    return None
