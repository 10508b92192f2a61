"""Whether two values are the same; ``None`` where a careful reader could not say either."""

from __future__ import annotations

import re
from collections.abc import Sequence
from fractions import Fraction
from typing import Any

from kd.traces.verifiers.maths.amounts import same_quantity
from kd.traces.verifiers.maths.codes import congruent
from kd.traces.verifiers.maths.equations import equations, proportion, same_equation
from kd.traces.verifiers.maths.evaluating import same_expression, value
from kd.traces.verifiers.maths.expressions import Node, Unreadable, symbols
from kd.traces.verifiers.maths.groups import same_matrix, same_region, same_several
from kd.traces.verifiers.maths.values import (
    Coded,
    Expression,
    Matrix,
    Named,
    Region,
    Relation,
    Value,
    Word,
)
from kd.traces.verifiers.maths.words import same_words


def compare(references: tuple[Value, ...], answers: tuple[Value, ...]) -> bool | None:
    """All readings of both; an answer's second reading counts where the reference has only one."""
    found = [[_compared(left, right) for right in answers] for left in references]
    flat = {verdict for row in found for verdict in row}
    if len(flat) == 1:
        return flat.pop()
    if len(references) == 1 and True in flat:
        return True
    return None


def _compared(left: Value, right: Value) -> bool | None:
    try:
        return same(left, right)
    except (Unreadable, RecursionError):
        return None


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
        return same_quantity(reference, answer)
    if isinstance(reference, Coded) or isinstance(answer, Coded):
        return _same_code(reference, answer)
    if isinstance(reference, Matrix) or isinstance(answer, Matrix):
        return same_matrix(reference, answer)
    if isinstance(reference, Region) or isinstance(answer, Region):
        return same_region(reference, answer)
    return same_several(reference, answer, same)


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
    return Coded("ratio", tuple(("num", Fraction(str(part))) for part in code.parts[:2]))


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
