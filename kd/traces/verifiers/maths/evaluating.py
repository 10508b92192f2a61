"""Whether two expressions are the same: exact fractions, else 100 digits at several points.

Two different expressions that agree on 60 digits at eight random points do not occur; that they
differ at one point is a proof. What is neither (rounded decimals, values too large to tell apart,
identities that hold for positive values only) is ``None``.
"""

from __future__ import annotations

import math
import random
import threading
from fractions import Fraction
from typing import Any

from kd.traces.verifiers.maths.expressions import Node, Unreadable, has, symbols

DIGITS = 100
EXACT_BITS = 20_000
LARGEST_BITS = 100_000
WHOLE = frozenset("nkmNMjpq")  # letters that often stand for integers
_SCALE = 10**12


class _Lazy(threading.local):
    context: Any = None


_LAZY = _Lazy()


def numbers() -> Any:
    """This thread's own mpmath, with ``DIGITS`` digits: a context changes its own precision."""
    if _LAZY.context is None:
        import mpmath

        _LAZY.context = mpmath.MPContext()
        _LAZY.context.dps = DIGITS
    return _LAZY.context


_NO_VALUE = (
    ArithmeticError, ValueError, TypeError, RecursionError,
    KeyError,  # an unknown without a value
)  # fmt: skip


def real(number: Any) -> Any:
    """A number of mpmath, also where it was a fraction."""
    if isinstance(number, Fraction):
        return numbers().mpf(number.numerator) / number.denominator
    return number


def value(node: Node, names: dict[str, Fraction], base: str = "e") -> Any:
    """A tree's value: a ``Fraction`` where it is exact, else a number of mpmath.

    Args:
        node: the tree.
        names: values of its unknowns.
        base: of a logarithm without one: "e" or "10".

    Raises:
        Unreadable: it has no value, or one too large to work with.
    """
    try:
        found = _Evaluation(names, base).of(node)
        if isinstance(found, Fraction) or not found or numbers().mag(found) > -150:
            return found
        return _zero_or_small(node, names, base, found)
    except _NO_VALUE as error:
        raise Unreadable(str(error)[:60] or "no value") from None


def _zero_or_small(node: Node, names: dict[str, Fraction], base: str, found: Any) -> Any:
    """What is left of sin(pi) vanishes with more digits; 10^-90 times the root of 2 does not."""
    context = numbers()
    try:
        context.dps = 3 * DIGITS
        again = _Evaluation(names, base).of(node)
    finally:
        context.dps = DIGITS
    return Fraction(0) if abs(again) < abs(found) * context.mpf(10) ** -50 else found


class _Evaluation:
    def __init__(self, names: dict[str, Fraction], base: str) -> None:
        self.names, self.base, self.mp = names, base, numbers()

    def of(self, node: Node) -> Any:
        kind = node[0]
        if kind == "num":
            return self.bounded(node[1])
        if kind == "sym":
            return self.names[node[1]]
        if kind == "const":
            return self.constant(node[1])
        parts = [self.of(part) for part in node[1:]]
        if kind != "neg" and any(self.mp.isinf(x) for x in parts if not isinstance(x, Fraction)):
            raise Unreadable("infinity in a sum")
        operation: Any = getattr(self, kind, self.function)
        return self.bounded(operation(*parts, kind=kind))

    def bounded(self, number: Any) -> Any:
        """The number, refused when it is too large, and rounded when it is exact but long."""
        if isinstance(number, Fraction):
            bits = max(number.numerator.bit_length(), number.denominator.bit_length())
            if bits > LARGEST_BITS:
                raise Unreadable("a value too large")
            return number if bits <= EXACT_BITS else real(number)
        if not self.mp.isfinite(number):
            if self.mp.isinf(number) and not isinstance(number, self.mp.mpc):
                return number
            raise Unreadable("no value")
        if number and abs(self.mp.mag(number)) > LARGEST_BITS:
            raise Unreadable("a value too large")
        return number

    def constant(self, name: str) -> Any:
        if name == "i":
            return self.mp.mpc(0, 1)
        if name == "base":
            return self.mp.e if self.base == "e" else Fraction(10)
        return +{"pi": self.mp.pi, "e": self.mp.e, "inf": self.mp.inf}[name]

    def add(self, a: Any, b: Any, kind: str) -> Any:
        return a + b if _exact(a, b) else real(a) + real(b)

    def mul(self, a: Any, b: Any, kind: str) -> Any:
        return a * b if _exact(a, b) else real(a) * real(b)

    def div(self, a: Any, b: Any, kind: str) -> Any:
        if not b:
            raise ZeroDivisionError("division by zero")
        return a / b if _exact(a, b) else real(a) / real(b)

    def neg(self, a: Any, kind: str) -> Any:
        return -a

    def pow(self, a: Any, b: Any, kind: str) -> Any:
        if isinstance(b, Fraction) and abs(b) > _SCALE:
            raise Unreadable("an exponent too large")
        if _exact(a, b) and b.denominator == 1:
            bits = max(a.numerator.bit_length(), a.denominator.bit_length()) * abs(b.numerator)
            if not a and b <= 0:
                raise ZeroDivisionError("0 to the power of 0")
            if bits <= EXACT_BITS:
                return a ** int(b)
        base, exponent = real(a), real(b)
        if base and abs(self.mp.mag(base)) + self.mp.mag(exponent or 1) > 60 + LARGEST_BITS:
            raise Unreadable("a value too large")
        if exponent and self.mp.mag(exponent) > 40:
            raise Unreadable("an exponent too large")
        return base**exponent

    def root(self, degree: Any, a: Any, kind: str) -> Any:
        if not (isinstance(degree, Fraction) and degree.denominator == 1 and 1 < degree <= 1000):
            return self.pow(a, 1 / degree, kind="pow")
        if isinstance(a, Fraction):
            if a >= 0:
                sides = [_whole_root(n, int(degree)) for n in (a.numerator, a.denominator)]
                if None not in sides:
                    return Fraction(sides[0] or 0, sides[1] or 1)
            elif degree % 2:
                return -self.root(degree, -a, kind="root")
        return self.mp.root(real(a), int(degree))

    def fact(self, a: Any, kind: str) -> Any:
        if isinstance(a, Fraction) and a.denominator == 1 and 0 <= a <= 1_500:
            return Fraction(math.factorial(int(a)))
        if abs(a) > 10_000 or (isinstance(a, Fraction) and a.denominator == 1 and a < 0):
            raise Unreadable("a factorial out of bounds")
        return self.mp.factorial(real(a))

    def binom(self, a: Any, b: Any, kind: str) -> Any:
        if _exact(a, b) and a.denominator == b.denominator == 1 and 0 <= b and 0 <= a <= 1_500:
            return Fraction(math.comb(int(a), int(b)))
        if abs(a) > 10_000 or abs(b) > 10_000:
            raise Unreadable("a binomial out of bounds")
        return self.mp.binomial(real(a), real(b))

    def abs(self, a: Any, kind: str) -> Any:
        return abs(a)

    def floor(self, a: Any, kind: str) -> Any:
        return Fraction(math.floor(a)) if isinstance(a, Fraction) else self.mp.floor(a)

    def ceil(self, a: Any, kind: str) -> Any:
        return Fraction(math.ceil(a)) if isinstance(a, Fraction) else self.mp.ceil(a)

    def log(self, base: Any, a: Any, kind: str) -> Any:
        if not a or not base or base == 1:
            raise ZeroDivisionError("no logarithm")
        return self.mp.log(real(a)) / self.mp.log(real(base))

    def function(self, a: Any, kind: str) -> Any:
        number = real(a)
        if kind in ("exp", "sinh", "cosh", "tanh") and abs(number) > 50_000:
            raise Unreadable("an argument too large")
        if number and self.mp.mag(number) > 4_000:
            raise Unreadable("an argument too large")
        if kind == "ln" and not number:
            raise ZeroDivisionError("no logarithm")
        return getattr(self.mp, kind)(number)


def _exact(a: Any, b: Any) -> bool:
    return isinstance(a, Fraction) and isinstance(b, Fraction)


def _whole_root(number: int, degree: int) -> int | None:
    if degree == 2:
        root = math.isqrt(number)
    elif number.bit_length() < 900:
        root = round(number ** (1 / degree))
    else:
        return None
    return root if root**degree == number else None


def close(a: Any, b: Any) -> bool | None:
    """Whether two values are the same; None where 100 digits cannot say."""
    if _exact(a, b):
        return bool(a == b)
    mp = numbers()
    left, right = real(a), real(b)
    if mp.isinf(left) or mp.isinf(right):
        return bool(left == right)
    scale, apart = max(abs(left), abs(right)), abs(left - right)
    if not apart:
        return True if scale < mp.mpf(10) ** 40 else None
    if apart > scale * mp.mpf(10) ** -30:
        return False
    same = apart < scale * mp.mpf(10) ** -60
    return True if same and scale < mp.mpf(10) ** 40 else None


def same_expression(left: Node, right: Node) -> bool | None:
    """Whether two trees mean the same for all values of their unknowns."""
    if left == right:
        return True
    answers = {_same(left, right, base) for base in _bases(left, right)}
    return answers.pop() if len(answers) == 1 else None


def _bases(left: Node, right: Node) -> tuple[str, ...]:
    free = ("const", "base")
    return ("e", "10") if has(left, free) or has(right, free) else ("e",)


def _same(left: Node, right: Node, base: str) -> bool | None:
    names = sorted(symbols(left) | symbols(right))
    if not names:
        return close(value(left, {}, base), value(right, {}, base))
    rng = random.Random(7)
    positive = _agree(left, right, base, [_point(names, rng, 1) for _ in range(6)])
    if positive is None or positive:
        anywhere = _agree(left, right, base, [_point(names, rng, -1) for _ in range(4)])
        return True if positive and anywhere is not False else None
    if WHOLE & set(names):
        whole = [dict.fromkeys(names, Fraction(0)) for _ in range(4)]
        for point in whole:
            point.update({name: Fraction(rng.randint(1, 9)) for name in names})
        if _agree(left, right, base, whole) is not False:
            return None
    return False


def _point(names: list[str], rng: random.Random, sign: int) -> dict[str, Fraction]:
    made = {}
    for name in names:
        number = Fraction(rng.randint(_SCALE // 9, 4 * _SCALE), _SCALE)
        made[name] = number if sign > 0 or rng.random() < 0.2 else -number
    return made


def _agree(left: Node, right: Node, base: str, points: list[dict[str, Fraction]]) -> bool | None:
    """Whether both agree at the points that both are defined at, three at least."""
    found = 0
    for point in points:
        try:
            here = close(value(left, point, base), value(right, point, base))
        except Unreadable:
            continue
        if here is False:
            return False
        found += here is True
    return True if found >= 3 else None
