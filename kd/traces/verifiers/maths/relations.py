"""Readers of equations, inequalities and memberships."""

from __future__ import annotations

import re

from kd.traces.verifiers.maths.evaluating import same_expression
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
    Word,
    all_but,
)

_NAME = r"(?:\\?[A-Za-z]+|\\frac\{d\w?\}\{d\w\}|\\[a-z]+\{\w+\})"
_SIGNS = re.compile(r"\\(?:le|ge|ne|approx|in)(?![A-Za-z])|[<>=]")


def read_relation(text: str, one: One) -> Value | None:
    signs = [match.group() for match in _SIGNS.finditer(text)]
    if not signs:
        return None
    parts = [part.strip() for part in _SIGNS.split(text)]
    if signs[0] == "\\in" and len(signs) == 1 and re.fullmatch(r"\w|\([\w, ]+\)", parts[0]):
        return one(parts[1])
    if "\\approx" in signs:
        return _about(text, one)
    if set(signs) == {"="}:
        return _equation(parts, one)
    if "=" in signs or "\\in" in signs or "" in parts:
        raise Unreadable("signs of several kinds")
    return _bound(signs, [parse(part) for part in parts])


def _about(text: str, one: One) -> Value:
    """1/6 ≈ 0.17 states 1/6; x ≈ 0.17 has nothing better than 0.17."""
    exact, _, rounded = (part.strip() for part in text.partition("\\approx"))
    if re.fullmatch(rf"{_NAME}(?:_\{{?\w+\}}?)?(?:\([^()]*\))?", exact.replace(" ", "")):
        return Named(exact, one(rounded))
    one(rounded)
    return one(exact)


def _equation(parts: list[str], one: One) -> Value:
    left, right = parts[0], parts[-1]
    if "" in parts:
        raise Unreadable("an equation without a side")
    for middle in parts[1:-1]:
        _check_middle(middle, right)
    name = re.sub(r"\s", "", left)
    name = re.sub(r"\\text\{(.*?)\}", r"\1", name)
    if re.fullmatch(r"\([A-Za-z](?:,[A-Za-z])+\)", name) or re.fullmatch(
        r"[A-Za-z][A-Za-z ]{2,40}", left
    ):
        return Named("" if name[0] != "(" else name, one(right))
    inverse = r"(?:\^\{?-1\}?)?"
    if re.fullmatch(rf"{_NAME}'*(?:_\{{?\w+\}}?)?'*{inverse}(?:\([^()]*\))?", name):
        value = one(right)
        if name.isalpha() and len(name) > 1:  # AB = 5 is a length, pV = nRT an equation
            constant = not (isinstance(value, Expression) and symbols(value.node))
            if not isinstance(value, Word) and (constant or len(name) > 3):
                return Named("" if len(name) > 2 else name, value)
            return Relation("=", parse(left), parse(right))
        return Named(name, value)
    try:
        first = parse(left)
    except Unreadable:
        value = one(right)  # \lim_{x \to 0} x = 0
        if re.match(r"\\[A-Za-z]|m\\angle|\d+ [a-z]+$", left) and not _unknowns(value):
            return Named("", value)
        raise
    value = one(right)
    if not symbols(first):
        if isinstance(value, Expression) and value.node[0] == "sym":
            return Named(value.node[1], one(left))
        if not (isinstance(value, Expression) and symbols(value.node)):
            return value
    if not isinstance(value, Expression) or value.unit is not None:
        raise Unreadable("an equation of several parts")
    return Relation("=", first, value.node)


def _check_middle(middle: str, right: str) -> None:
    """The middle of a = b = c: no second name ("x = 3 y = 4"), no other number than the last."""
    node, last = parse(middle), parse(right)
    if re.search(r"[\s\d][A-Za-z](?:_\w)?$", middle):
        raise Unreadable("a second name in an equation")
    if not symbols(node) and not symbols(last) and same_expression(node, last) is not True:
        raise Unreadable("a chain that does not hold")


def _unknowns(value: Value) -> bool:
    return not isinstance(value, Expression) or bool(symbols(value.node))


def _bound(signs: list[str], nodes: list[Node]) -> Value:
    """Inequalities: a region of one unknown where the other sides are constant."""
    if len(nodes) == 2 and nodes[0][0] == "abs" and signs[0] in ("<", "\\le"):  # |x| < 1
        nodes, signs = [("neg", nodes[1]), nodes[0][1], nodes[1]], 2 * signs
    elif len(nodes) == 2 and nodes[0][0] == "abs" and signs[0] in (">", "\\ge"):
        if nodes[0][1][0] == "sym" and not symbols(nodes[1]):
            is_open = signs[0] == ">"
            below = (MINUS_INFINITE, ("neg", nodes[1]), True, is_open)
            return Named(nodes[0][1][1], Region((below, (nodes[1], INFINITE, is_open, True))))
    middle = [node for node in nodes if symbols(node)]
    if len(middle) != 1 or middle[0][0] != "sym":
        if len(signs) == 1:
            return Relation(signs[0], nodes[0], nodes[1])
        raise Unreadable("a chain of inequalities")
    at = nodes.index(middle[0])
    if signs == ["\\ne"]:
        return Named(middle[0][1], all_but(nodes[1 - at]))
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
    return Named(middle[0][1], Region(((low, high, low_open, high_open),)))
