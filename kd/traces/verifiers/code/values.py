"""Results of untrusted programs, read from what runner.py wrote and compared by value.

Nothing here trusts what it reads: it builds values of the standard types only, and whatever cannot
be read raises ``Unreadable``, which counts against the program that wrote it.
"""

from __future__ import annotations

import datetime
import json
import math
import re
from collections import Counter, OrderedDict, deque
from collections.abc import Callable, Iterable, Iterator
from decimal import Decimal
from fractions import Fraction
from typing import Any

SHORT = 5  # decimals from which on a wanted float is taken as rounded
_NUMBER = re.compile(r"[-+]?\d{1,40}\.\d{1,40}(?:[eE][-+]?\d{1,3})?")
LONG = 10_000  # digits of a fraction
LARGEST = 10**6  # items of a range
COLLISIONS = 64  # equal hashes in one set; more are an attack on whoever builds it


class Unreadable(ValueError):
    """What a program wrote stands for no value."""


class Opaque:
    """A result of a type that is not a standard one; equal to nothing."""

    def __init__(self, kind: str, text: str) -> None:
        self.kind, self.text = kind, text

    def __repr__(self) -> str:
        return self.text or f"<{self.kind}>"


class Iterated(Opaque):
    """A result that can be gone through once, such as a generator: its items, and equal to
    nothing itself."""

    def __init__(self, items: list[Any]) -> None:
        super().__init__("iterator", "an iterator")
        self.items = items

    def __iter__(self) -> Iterator[Any]:
        return iter(self.items)


# what a hostile result may raise where it is read, compared or shown
RAISED = (
    *(ArithmeticError, AttributeError, LookupError, MemoryError),
    *(RecursionError, TypeError, ValueError),
)


def read(line: str) -> Any:
    """The JSON of one answer.

    Raises:
        Unreadable: it is not JSON, too deep, or holds a number that is too long.
    """
    try:
        return json.loads(line)
    except RAISED as error:
        raise Unreadable(f"{type(error).__name__}: {error}"[:200]) from None


def decode(code: Any) -> Any:
    """The value that ``runner.encode`` wrote.

    Raises:
        Unreadable: it wrote no such thing.
    """
    try:
        return _decode(code)
    except RAISED as error:
        raise Unreadable(f"{type(error).__name__}: {error}"[:200]) from None


def _decode(code: Any) -> Any:
    if code is None or isinstance(code, (bool, int, str)):
        return code
    kind, *parts = code
    return _READERS[kind](*parts)


def _items(make: Callable[[list[Any]], Any]) -> Callable[[list[Any]], Any]:
    return lambda parts: make([_decode(part) for part in parts])


def _hashed(make: Callable[[Any], Any]) -> Callable[[list[Any]], Any]:
    return _items(lambda values: make(spread(values)))


def _pairs(make: Callable[[Any], Any]) -> Callable[[list[Any]], Any]:
    def build(parts: list[Any]) -> Any:
        both = [(_decode(key), _decode(value)) for key, value in parts]
        spread([key for key, _ in both])
        return make(dict(both))

    return build


def spread(values: Iterable[Any]) -> list[Any]:
    """The values, when a set of them can be made: numbers that are equal modulo 2^61 - 1 have one
    hash, and a set of many such takes for ever."""
    listed = list(values)
    if len(listed) > COLLISIONS:
        different = Counter(hash(value) for value in {repr(v): v for v in listed}.values())
        if max(different.values()) > COLLISIONS:
            raise Unreadable("the hashes of its values collide")
    return listed


def _range(*parts: Any) -> Any:
    made = range(*map(_decode, parts))
    return made if len(made) <= LARGEST else Opaque("range", repr(made))


def _fraction(top: str, bottom: str) -> Fraction:
    if len(top) + len(bottom) > LONG:
        raise Unreadable("a fraction of too many digits")
    return Fraction(int(top, 16), int(bottom, 16))


def bounded_decimal(text: Any = 0) -> Any:
    """A Decimal; one whose exponent is huge equals nothing."""
    made = Decimal(text)
    # as an integer it would not fit into memory
    small = not made.is_finite() or abs(made.adjusted()) < 10_000
    return made if small else Opaque("Decimal", str(made)[:80])


_READERS: dict[str, Callable[..., Any]] = {
    "int": lambda text: int(text, 16),
    "float": float,
    "list": _items(list),
    "tuple": _items(tuple),
    "set": _hashed(set),
    "frozenset": _hashed(frozenset),
    "deque": _items(deque),
    "Counter": _pairs(Counter),
    "OrderedDict": _pairs(OrderedDict),
    "dict": _pairs(dict),
    "complex": lambda real, imaginary: complex(float(real), float(imaginary)),
    "bytes": bytes.fromhex,
    "bytearray": bytearray.fromhex,
    "range": _range,
    "Fraction": _fraction,
    "Decimal": bounded_decimal,
    "datetime": datetime.datetime.fromisoformat,
    "date": datetime.date.fromisoformat,
    "time": datetime.time.fromisoformat,
    "timedelta": datetime.timedelta,
    "iterator": _items(Iterated),
    "object": Opaque,
}


def same(found: Any, wanted: Any, *, json_like: bool = False) -> bool:
    """Whether two values are equal as Python's ``==`` has it, floats up to ``close``.

    Args:
        found: what a program returned.
        wanted: what it should.
        json_like: the wanted value comes from JSON, which writes tuples and deques as lists and
            keys as text.
    """
    if json_like and isinstance(found, (tuple, deque)):
        found = list(found)
    if isinstance(wanted, (float, complex)) or isinstance(found, (float, complex)):
        return close(found, wanted)
    if isinstance(wanted, (list, tuple)) and isinstance(found, (list, tuple)):
        alike = isinstance(found, list) == isinstance(wanted, list)
        pairs = zip(found, wanted, strict=False)
        return (
            alike
            and len(found) == len(wanted)
            and all(same(left, right, json_like=json_like) for left, right in pairs)
        )
    if isinstance(wanted, dict) and isinstance(found, dict):
        return _same_mapping(found, wanted, json_like)
    return bool(found == wanted)


def _same_mapping(found: dict[Any, Any], wanted: dict[Any, Any], json_like: bool) -> bool:
    if found == wanted:  # a Counter knows that a count of 0 is none
        return True
    if isinstance(found, OrderedDict) and isinstance(wanted, OrderedDict):
        if list(found) != list(wanted):
            return False
    if json_like and not all(isinstance(key, str) for key in found):
        found = {json.loads(json.dumps({key: 0})).popitem()[0]: found[key] for key in found}
    return found.keys() == wanted.keys() and all(
        same(found[key], wanted[key], json_like=json_like) for key in wanted
    )


def close(found: Any, wanted: Any) -> bool:
    """Whether a number is the wanted one: within a relative 1e-9 and an absolute 1e-5 (or the
    noise of large floats), or rounding to it where it is written with five to fourteen decimals.
    A wanted integer has to be met exactly.

    >>> close(0.1 + 0.2, 0.3), close(1 / 3, 0.33333), close(1e6, 1e6 + 1), close(3, 3.0)
    (True, True, False, True)
    """
    if found == wanted:
        return True
    if isinstance(found, complex) and isinstance(wanted, complex):
        return close(found.real, wanted.real) and close(found.imag, wanted.imag)
    numbers = (int, float, Fraction, Decimal)
    if not isinstance(found, numbers) or not isinstance(wanted, numbers):
        return False
    if isinstance(wanted, int) or isinstance(found, int):
        return False
    left, right = float(found), float(wanted)
    if not math.isfinite(left) or not math.isfinite(right):
        return False
    tolerance = min(1e-9 * abs(right), max(1e-5, 1e-13 * abs(right)))
    written = repr(right)
    decimals = 0 if "e" in written else len(written.partition(".")[2])
    if SHORT <= decimals < 15:
        tolerance = max(tolerance, 0.5000001 * 10.0**-decimals)
    return abs(left - right) <= tolerance


def shown(value: Any, most: int = 80) -> str:
    """A value for a message, whatever it is."""
    try:
        text = value if isinstance(value, str) else repr(value)
    except RAISED:  # too deep, or an integer of too many digits
        text = f"a {type(value).__name__} that is too large to show"
    return text if len(text) <= most else text[:most] + "..."


def same_output(found: str, wanted: str) -> bool:
    """Equal line by line, but for spaces and empty lines at the ends of both; numbers that are
    wanted with a point may be written otherwise (1.50, 1.4999999999)."""
    left, right = ([line.split() for line in text.strip().splitlines()] for text in (found, wanted))
    if left == right:
        return True
    if list(map(len, left)) != list(map(len, right)):
        return False
    words = [
        pair
        for one, other in zip(left, right, strict=True)
        for pair in zip(one, other, strict=True)
    ]
    return all(one == other or _same_number(one, other) for one, other in words)


def _same_number(found: str, wanted: str) -> bool:
    if not _NUMBER.fullmatch(wanted) or not re.fullmatch(
        r"[-+]?[\d.]{1,80}(?:[eE][-+]?\d+)?", found
    ):
        return False
    try:
        return close(float(found), float(wanted))
    except ValueError:
        return False
