"""Units of measurement, as far as answers need them: what converts into what."""

from __future__ import annotations

import re
from dataclasses import dataclass
from fractions import Fraction

Dimensions = tuple[tuple[str, int], ...]


@dataclass(frozen=True)
class Unit:
    """A factor to the base units and their powers; what it measures is ``of``."""

    factor: Fraction
    of: Dimensions


# name: factor, base
_LINEAR: dict[str, tuple[Fraction, str]] = {}


def _add(names: str, factor: int | str | Fraction, base: str) -> None:
    for name in names.split():
        _LINEAR[name] = (Fraction(factor), base)


_PREFIXES = {
    "n": "1/1000000000", "u": "1/1000000", "m": "1/1000", "c": "1/100", "d": "1/10", "k": "1000",
    "M": "1000000", "h": "100", "G": "1000000000",
}  # fmt: skip
_LONG = {
    "nano": "n",
    "micro": "u",
    "milli": "m",
    "centi": "c",
    "deci": "d",
    "kilo": "k",
    "mega": "M",
}
_SI = {"m": "meter metre", "g": "gram gramme", "s": "second", "L": "liter litre", "l": "",
       "N": "newton", "J": "joule", "W": "watt", "Pa": "pascal", "Hz": "hertz", "V": "volt",
       "mol": "mole", "eV": "", "B": "byte"}  # fmt: skip
for _short, _names in _SI.items():
    _base = "L" if _short == "l" else _short
    _add(_short, 1, _base)
    for _prefix, _factor in _PREFIXES.items():
        _add(_prefix + _short, _factor, _base)
    for _name in _names.split():
        _add(f"{_name} {_name}s", 1, _base)
        for _long, _prefix in _LONG.items():
            _add(f"{_long}{_name} {_long}{_name}s", _PREFIXES[_prefix], _base)
for _gone in (
    "hm",
    "hs",
    "hN",
    "hJ",
    "hW",
    "hV",
    "hB",
    "ha",
    "dN",
    "cs",
    "ds",
    "dg",
    "cN",
    "mB",
    "cB",
    "dB",
    "MB",
    "GB",
    "min",
):
    _LINEAR.pop(_gone, None)
_add("sec secs", 1, "s")
_add("min mins minute minutes Minuten", 60, "s")
_add("h hr hrs hour hours Stunden heures horas", 3600, "s")
_add("day days", 86400, "s")
_add("week weeks", 604800, "s")
_add("inch inches", "254/10000", "m")
_add("ft foot feet", "3048/10000", "m")
_add("yd yard yards", "9144/10000", "m")
_add("mi mile miles", "1609344/1000", "m")
_add("lb lbs pound pounds", "45359237/100000", "g")
_add("oz ounce ounces", "45359237/1600000", "g")
_add("kcal", 4184, "J")
_add("USD dollar dollars ¤", 1, "USD")
_add("cent cents ¢", "1/100", "USD")
_add("EUR euro euros €", 1, "EUR")
_add("GBP £", 1, "GBP")
_add("yen JPY ¥", 1, "JPY")
_add("rupee rupees Rs INR ₹", 1, "INR")
_add("year years yr yrs", 1, "year")
_add("month months", 1, "month")
_add(r"deg \deg degree degrees Grad", 1, "deg")
_add("rad radian radians", 1, "rad")
_add("ohm ohms", 1, "ohm")
_add("kelvin K", 1, "K")
_add("unit units", 1, "")
_add("degC Celsius", 1, "degC")
_add("degF Fahrenheit", 1, "degF")
_add("acre acres", 1, "acre")
_add("gallon gallons gal", 1, "gallon")
# what is made of others
_MADE: dict[str, tuple[Fraction, dict[str, int]]] = {
    "L": (Fraction(1, 1000), {"m": 3}),
    "mph": (Fraction("1609344/3600000"), {"m": 1, "s": -1}),
    "kph": (Fraction(1000, 3600), {"m": 1, "s": -1}),
    "kmh": (Fraction(1000, 3600), {"m": 1, "s": -1}),
    "N": (Fraction(1000), {"g": 1, "m": 1, "s": -2}),
    "J": (Fraction(1000), {"g": 1, "m": 2, "s": -2}),
    "W": (Fraction(1000), {"g": 1, "m": 2, "s": -3}),
    "Pa": (Fraction(1000), {"g": 1, "m": -1, "s": -2}),
    "Hz": (Fraction(1), {"s": -1}),
    "hectare": (Fraction(10_000), {"m": 2}),
    "ha": (Fraction(10_000), {"m": 2}),
}
_POWERS = {"square": 2, "sq": 2, "cubic": 3, "cu": 3, "squared": 2, "cubed": 3}
_TOKEN = re.compile(r"([A-Za-zµ¤€£¥₹¢]+|\\deg)\.?\s*(?:\^\s*\{?\s*(-?[1-9])\s*\}?)?|([/*])|\s+")


def read_unit(text: str) -> Unit | None:
    """The unit a text names wholly (``km/h``, ``square meters``, ``m^2``), else None."""
    words = re.sub(r"\\text\s*\{([^{}]*)\}", r" \1 ", text)
    words = re.sub(r"\\frac\s*\{([^{}]*)\}\s*\{([^{}]*)\}", r"\1/\2", words)
    words = re.sub(r"\b(?:degrees?|deg) (?=Celsius|Fahrenheit)", "", words)
    words = re.sub(r"/\s*\(([^()]*)\)", lambda m: "/" + "/".join(m[1].split()), words)
    words = re.sub(r"\bper\b", "/", words).replace("µ", "u").strip()
    factor, powers, sign, pending, last = Fraction(1), dict[str, int](), 1, 1, ""
    at = 0
    while at < len(words):
        match = _TOKEN.match(words, at)
        if match is None:
            return None
        at = match.end()
        name, power, operator = match.groups()
        if operator:
            sign = -1 if operator == "/" else sign
            continue
        if not name:
            continue
        if name in ("squared", "cubed") and last:
            more = _POWERS[name] - 1
            factor *= _scaled(last) ** (sign * more)
            _raise(powers, last, sign * more)
            continue
        if name in _POWERS:
            pending = _POWERS[name]
            continue
        if name not in _LINEAR and name not in _MADE:
            return None
        exponent = sign * int(power or 1) * pending
        factor *= _scaled(name) ** exponent
        _raise(powers, name, exponent)
        last, pending = name, 1
    if not last or pending != 1:
        return None
    return Unit(factor, tuple(sorted((base, n) for base, n in powers.items() if n)))


def _parts(name: str) -> tuple[Fraction, dict[str, int]]:
    if name in _LINEAR:
        factor, base = _LINEAR[name]
        if base in _MADE:
            made, of = _MADE[base]
            return factor * made, of
        return factor, {base: 1} if base else {}
    return _MADE[name]


def _scaled(name: str) -> Fraction:
    return _parts(name)[0]


def _raise(powers: dict[str, int], name: str, exponent: int) -> None:
    for base, n in _parts(name)[1].items():
        powers[base] = powers.get(base, 0) + n * exponent
