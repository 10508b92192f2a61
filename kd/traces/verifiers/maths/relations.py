"""Readers of equations, inequalities and memberships."""

from __future__ import annotations

import re

from kd.traces.verifiers.maths.expressions import Node, Unreadable, parse, symbols
from kd.traces.verifiers.maths.several import One
from kd.traces.verifiers.maths.values import (
    INFINITE,
    MINUS_INFINITE,
    Expression,
    Named,
    Region,
    Relation,
    Value,
    all_but,
)

_SIGNS = re.compile(r"\\(?:le|ge|ne|approx|in)(?![A-Za-z])|[<>=]")


def read_relation(text: str, one: One) -> Value | None:
    signs = [match.group() for match in _SIGNS.finditer(text)]
    if not signs:
        return None
    parts = [part.strip() for part in _SIGNS.split(text)]
    if signs[0] == "\\in" and len(signs) == 1 and re.fullmatch(r"\w|\([\w, ]+\)", parts[0]):
        return one(parts[1])
    if set(signs) <= {"=", "\\approx"}:
        return _equation(parts, one)
    if "=" in signs or "\\approx" in signs or "\\in" in signs or "" in parts:
        raise Unreadable("signs of several kinds")
    nodes = [parse(part) for part in parts]
    return _bound(signs, nodes)


def _equation(parts: list[str], one: One) -> Value:
    left, right = parts[0], parts[-1]
    if not right or not left:
        raise Unreadable("an equation without a side")
    name = re.sub(r"\s", "", left)
    name = re.sub(r"\\text\{(.*?)\}", r"\1", name)
    if re.fullmatch(r"\([A-Za-z](?:,[A-Za-z])+\)", name) or re.fullmatch(
        r"[A-Za-z][A-Za-z ]{2,40}", left
    ):
        return Named("" if name[0] != "(" else name, one(right))
    plain_name = re.fullmatch(r"\\?[A-Za-z]+'*(?:_\{?\w+\}?)?'*(?:\([^()]*\))?", name)
    if plain_name and (len(name) < 3 or not name.isalpha()):
        return Named(name, one(right))
    if plain_name:
        return Named("", one(right))
    try:
        first = parse(left)
    except Unreadable:
        return Named("", one(right)) if re.match(r"\\text", left) else _fail("an unreadable side")
    value = one(right)
    if not symbols(first):
        if isinstance(value, Expression) and value.node[0] == "sym":
            return Named(value.node[1], one(left))
        if not (isinstance(value, Expression) and symbols(value.node)):
            return value
    if not isinstance(value, Expression) or value.unit is not None or len(parts) > 2:
        raise Unreadable("an equation of several parts")
    return Relation("=", first, value.node)


def _fail(why: str) -> Value:
    raise Unreadable(why)


def _bound(signs: list[str], nodes: list[Node]) -> Value:
    """Inequalities: a region of one unknown where the other sides are constant."""
    middle = [node for node in nodes if symbols(node)]
    if len(middle) != 1 or middle[0][0] != "sym":
        if len(signs) == 1:
            return Relation(signs[0], nodes[0], nodes[1])
        raise Unreadable("a chain of inequalities")
    at = nodes.index(middle[0])
    if signs == ["\\ne"]:
        return all_but(nodes[1 - at])
    if "\\ne" in signs or len(nodes) > 3 or (len(nodes) == 3 and at != 1):
        raise Unreadable("a chain of inequalities")
    low, high, low_open, high_open = MINUS_INFINITE, INFINITE, True, True
    for i, sign in enumerate(signs):
        rising = sign in ("<", "\\le")
        bound, is_open = nodes[i if i < at else i + 1], sign in "<>"
        if rising == (i < at):  # bound < x, or x > bound
            if low != MINUS_INFINITE:
                raise Unreadable("a chain of inequalities")
            low, low_open = bound, is_open
        else:
            if high != INFINITE:
                raise Unreadable("a chain of inequalities")
            high, high_open = bound, is_open
    return Region(((low, high, low_open, high_open),))
