"""The functions, constants and operators with which an assertion is judged outside the sandbox;
whatever could fill the memory is bounded."""

from __future__ import annotations

import ast
import math
import operator
import re
from collections import Counter, OrderedDict, deque
from collections.abc import Callable
from fractions import Fraction
from typing import Any

from kd.traces.verifiers.code.values import bounded_decimal, same, spread

LARGEST = 10**6  # items of a sequence, bits of an integer, that a test may make here


def _of(make: Callable[[Any], Any]) -> Callable[..., Any]:
    """A set or mapping, when the hashes of its members do not collide."""

    def build(content: Any = ()) -> Any:
        pairs = make is dict and not isinstance(content, dict)
        spread([key for key, _ in content] if pairs else content)
        return make(content)

    return build


def _defaultdict(_: Any = None, content: Any = ()) -> Any:
    return _of(dict)(content)


def _fraction(*parts: Any) -> Fraction:
    if any(isinstance(part, str) and re.search(r"[eE]|\d{5000}", part) for part in parts):
        raise ValueError("Fraction: too large")
    return Fraction(*parts)


def _remainder(left: Any, right: Any) -> Any:
    if isinstance(left, (str, bytes, bytearray)):
        text = left if isinstance(left, str) else left.decode("latin-1")
        if re.search(r"\d{4}|\*", text):  # a width
            raise ValueError("format: too wide")
    return left % right


def _range(*bounds: int) -> range:
    made = range(*bounds)
    if len(made) > LARGEST:
        raise ValueError("range: too long")
    return made


PLAIN: dict[str, Callable[..., Any]] = {
    **{f.__name__: f for f in (abs, all, any, len, max, min, sorted, sum)},
    **{f.__name__: f for f in (bool, complex, float, int, list, tuple, deque)},
    **{f.__name__: _of(f) for f in (dict, frozenset, set, Counter, OrderedDict)},
    "Decimal": bounded_decimal,
    "Fraction": _fraction,
    "defaultdict": _defaultdict,
    "range": _range,
    "round": round,
    **{f"math.{name}": getattr(math, name) for name in ("isclose", "isnan", "isinf", "sqrt")},
    **{f"math.{name}": getattr(math, name) for name in ("floor", "ceil", "fabs", "log", "exp")},
    "isclose": math.isclose,
    **{f"collections.{f.__name__}": _of(f) for f in (Counter, OrderedDict)},
    "collections.deque": deque,
    "collections.defaultdict": _defaultdict,
    "fractions.Fraction": _fraction,
    "decimal.Decimal": bounded_decimal,
}
CONSTANTS = {f"math.{name}": getattr(math, name) for name in ("pi", "e", "inf", "nan", "tau")}
TYPES: dict[str, type] = {
    **{t.__name__: t for t in (bool, bytes, complex, dict, float, frozenset, int, list, set)},
    **{t.__name__: t for t in (str, tuple)},
}
KEYWORDS = ("rel_tol", "abs_tol", "start", "reverse", "ndigits")


def _product(left: Any, right: Any) -> Any:
    for many, times in ((left, right), (right, left)):
        if isinstance(times, int) and hasattr(many, "__len__") and len(many) * times > LARGEST:
            raise ValueError("product: too long")
    return left * right


def _power(base: Any, exponent: Any) -> Any:
    if isinstance(base, int) and isinstance(exponent, int):
        if abs(exponent) * max(1, base.bit_length()) > LARGEST:
            raise ValueError("power: too large")
    return base**exponent


OPERATORS: dict[type[ast.AST], Callable[..., Any]] = {
    ast.Add: operator.add,
    ast.Sub: operator.sub,
    ast.Mult: _product,
    ast.Div: operator.truediv,
    ast.FloorDiv: operator.floordiv,
    ast.Mod: _remainder,
    ast.Pow: _power,
    ast.BitOr: operator.or_,
    ast.BitAnd: operator.and_,
    ast.USub: operator.neg,
    ast.UAdd: operator.pos,
    ast.Not: operator.not_,
    ast.Eq: same,
    ast.NotEq: lambda left, right: not same(left, right),
    ast.Lt: operator.lt,
    ast.LtE: operator.le,
    ast.Gt: operator.gt,
    ast.GtE: operator.ge,
    ast.Is: lambda left, right: left is right or (type(left) is type(right) and left == right),
    ast.IsNot: lambda left, right: not OPERATORS[ast.Is](left, right),
    ast.In: lambda left, right: left in right,
    ast.NotIn: lambda left, right: left not in right,
}
