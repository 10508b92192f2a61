"""Whether two equations have the same solutions."""

from __future__ import annotations

import re
from fractions import Fraction
from typing import Any

from kd.traces.verifiers.maths.evaluating import close, numbers, real, same_expression, value
from kd.traces.verifiers.maths.expressions import Node, Unreadable, symbols
from kd.traces.verifiers.maths.values import Expression, Named, Relation, Value


def _as_equation(side: Value) -> tuple[Node, Node] | None:
    if isinstance(side, Relation) and side.sign == "=":
        return side.left, side.right
    if isinstance(side, Named) and isinstance(side.value, Expression) and side.value.unit is None:
        name, node = side.name, side.value.node
        if re.fullmatch(r"\\?[A-Za-z]+(?:_\w)?", name) and symbols(node):
            return ("sym", name), node
    return None


def equations(
    reference: Value, answer: Value
) -> tuple[tuple[Node, Node], tuple[Node, Node]] | None:
    left, right = _as_equation(reference), _as_equation(answer)
    return (left, right) if left and right else None


def same_equation(left: tuple[Node, Node], right: tuple[Node, Node]) -> bool | None:
    """Both sides differ by the same but for a constant factor; or one's root is not the other's."""
    first, second = (("add", a, ("neg", b)) for a, b in (left, right))
    if symbols(first) != symbols(second):
        return False if symbols(first) and symbols(second) else None
    if proportion(first, second) is not None:
        return True
    solved = left[0][0] == right[0][0] == "sym" and left[0] == right[0]
    if solved and left[0][1] not in symbols(left[1]) | symbols(right[1]):
        return same_expression(left[1], right[1])
    return False if _different_roots(first, second, sorted(symbols(first))) else None


def proportion(first: Node, second: Node) -> float | None:
    """The constant that one term is of the other, as far as there is one."""
    names = sorted(symbols(first) | symbols(second))
    ratios: list[Any] = []
    for shift in range(1, 6):
        point = {
            name: Fraction(7 * shift + 3 * i + 1, 11 + shift + i) for i, name in enumerate(names)
        }
        try:
            over, under = value(first, point), value(second, point)
        except Unreadable:
            continue
        if over and under:
            exact = isinstance(over, Fraction) and isinstance(under, Fraction)
            ratios.append(over / under if exact else real(over) / real(under))
    if len(ratios) < 3 or not all(close(ratios[0], ratio) for ratio in ratios[1:]):
        return None
    return float(ratios[0]) if not getattr(ratios[0], "imag", 0) else None


def _different_roots(first: Node, second: Node, names: list[str]) -> bool:
    """Whether a root of the first is clearly no root of the second, and the other way round."""
    for name in names:
        point = {other: Fraction(5 + 2 * i, 7) for i, other in enumerate(names)}

        def at(x: Any, node: Node, point: dict[str, Any] = point, name: str = name) -> Any:
            return real(value(node, {**point, name: Fraction(float(x))}))

        for node, other in ((first, second), (second, first)):
            try:
                root = numbers().findroot(lambda x, node=node: at(x, node), 1.3, maxsteps=60)  # type: ignore[misc]
                if abs(at(root, other)) > 1e-3 and abs(at(root, node)) < 1e-9:
                    return True
            except (ValueError, ZeroDivisionError, TypeError):
                continue
    return False
