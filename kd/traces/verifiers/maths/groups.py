"""Whether two lists, sets, regions or matrices are the same."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

from kd.traces.verifiers.maths.evaluating import close, same_expression, value
from kd.traces.verifiers.maths.expressions import Node, has, symbols
from kd.traces.verifiers.maths.values import (
    Expression,
    Matrix,
    Named,
    Region,
    Several,
    Value,
    as_interval,
)

Same = Callable[[Value, Value], "bool | None"]  # of items
Span = tuple[Any, Any, bool, bool]  # low, high, is low open, is high open


def same_several(reference: Value, answer: Value, same: Same) -> bool | None:
    if not (isinstance(reference, Several) and isinstance(answer, Several)):
        several, other = (
            (reference, answer) if isinstance(reference, Several) else (answer, reference)
        )
        if isinstance(several, Several) and _one_value(several, same):
            return same(several.items[0], other)
        ordered = isinstance(several, Several) and several.form == "()"
        vector = isinstance(other, Expression) and (symbols(other.node) or _complex(other.node))
        return None if vector and ordered else False
    for one, other in ((reference, answer), (answer, reference)):
        if one.form == "{}" and len(one.items) == 1 and other.form == "()":  # {(1, 2)}
            return same(one.items[0], other)
    left, right = list(reference.items), list(answer.items)
    ordered = "()" in (reference.form, answer.form)
    if "{}" in (reference.form, answer.form):
        left, right = _distinct(left, same), _distinct(right, same)
    if len(left) != len(right):
        return False
    named = _by_name(left, right, same)
    if named is not None:
        return named
    in_order = _all([same(a, b) for a, b in zip(left, right, strict=True)])
    names = [item.name for item in (*left, *right) if isinstance(item, Named)]
    named_tuple = ordered and len(names) == len(left) and names == sorted(set(names))
    if in_order or named_tuple or (reference.form == answer.form == "()"):
        return None if in_order and {reference.form, answer.form} == {"()", "{}"} else in_order
    matched = _matched(left, right, same)
    return None if matched and ordered else matched


def _one_value(several: Several, same: Same) -> bool:
    """{5}, or one value in several spellings: 1/2 or 0.5."""
    first, *others = several.items or (several,)
    alone = several.form == "{}" and len(several.items) == 1
    return alone or (several.form == "" and all(same(first, other) for other in others))


def _complex(node: Node) -> bool:
    return has(node, ("const", "i")) or node[0] == "binom"


def _by_name(left: list[Value], right: list[Value], same: Same) -> bool | None:
    """a = 1, b = 2 in any order; None where not every value has a name of its own."""
    sides = [{item.name: item.value for item in side if isinstance(item, Named)}
             for side in (left, right)]  # fmt: skip
    if sides[0].keys() != sides[1].keys() or not len(sides[0]) == len(left) == len(right):
        return None
    return _all([same(found, sides[1][name]) for name, found in sides[0].items()])


def _distinct(items: list[Value], same: Same) -> list[Value]:
    kept: list[Value] = []
    for item in items:
        if not any(same(item, other) for other in kept):
            kept.append(item)
    return kept


def _all(found: Sequence[bool | None]) -> bool | None:
    return False if False in found else None if None in found else True


def _matched(left: list[Value], right: list[Value], same: Same) -> bool | None:
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


def same_region(reference: Value, answer: Value) -> bool | None:
    if isinstance(reference, Expression) or isinstance(answer, Expression):
        return False
    left, right = _spans(reference), _spans(answer)
    if left is None or right is None:
        nodes = [side.spans for side in (reference, answer) if isinstance(side, Region)]
        if len(nodes) < 2:
            several = reference if isinstance(reference, Several) else answer
            return False if isinstance(several, Several) and several.form == "{}" else None
        return _same_ends(nodes[0], nodes[1])
    spans = [_merged(left), _merged(right)]
    if len(spans[0]) != len(spans[1]):
        return False
    return _all(
        [
            False if a[2:] != b[2:] else _all([close(a[0], b[0]), close(a[1], b[1])])
            for a, b in zip(*spans, strict=True)
        ]
    )


def _same_ends(left: Sequence[Any], right: Sequence[Any]) -> bool | None:
    """Intervals with letters for ends: one of each, end by end."""
    if len(left) != 1 or len(right) != 1:
        return None
    (low, high, *opened), (other_low, other_high, *other_opened) = left[0], right[0]
    ends = _all([same_expression(low, other_low), same_expression(high, other_high)])
    return ends if opened == other_opened else False if ends else None


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


def same_matrix(reference: Value, answer: Value) -> bool | None:
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
