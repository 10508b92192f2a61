"""The kinds of value that a short text may state; ``read`` of reading.py makes them."""

from __future__ import annotations

from dataclasses import dataclass
from fractions import Fraction

from kd.traces.verifiers.maths.expressions import Node
from kd.traces.verifiers.maths.units import Unit

PERCENT = Unit(Fraction(1, 100), (("%", 1),))


@dataclass(frozen=True)
class Expression:
    """A number or a term, with a unit or the words that stand behind it ("apples")."""

    node: Node
    decimals: int = 0  # digits behind the point of a decimal number
    unit: Unit | None = None
    label: str = ""


@dataclass(frozen=True)
class Several:
    """Values in brackets: "()" is ordered, "{}" is a set, "" a list without any."""

    items: tuple[Value, ...]
    form: str


@dataclass(frozen=True)
class Region:
    """Intervals of the real line: (low, high, low is open, high is open)."""

    spans: tuple[tuple[Node, Node, bool, bool], ...]


@dataclass(frozen=True)
class Named:
    """A value with the name it was given: ``x = 3``, ``f(x) = x^2``."""

    name: str
    value: Value


@dataclass(frozen=True)
class Relation:
    """An equation or inequality that is no bound of one unknown: both sides."""

    sign: str
    left: Node
    right: Node


@dataclass(frozen=True)
class Matrix:
    rows: tuple[tuple[Node, ...], ...]


@dataclass(frozen=True)
class Coded:
    """A "clock", "date", "ratio", "based" number or "residue", by its parts."""

    kind: str
    parts: tuple[object, ...]


@dataclass(frozen=True)
class Word:
    text: str


Value = Expression | Several | Region | Named | Relation | Matrix | Coded | Word
INFINITE, MINUS_INFINITE = ("const", "inf"), ("neg", ("const", "inf"))
EVERYTHING = Region(((MINUS_INFINITE, INFINITE, True, True),))


def as_interval(pair: Several) -> Region | None:
    """(a, b) as an open interval."""
    if pair.form != "()" or len(pair.items) != 2:
        return None
    low, high = pair.items
    if isinstance(low, Expression) and isinstance(high, Expression):
        return Region(((low.node, high.node, True, True),))
    return None


def all_but(point: Node) -> Region:
    return Region(((MINUS_INFINITE, point, True, True), (point, INFINITE, True, True)))
