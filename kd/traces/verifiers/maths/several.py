"""Readers of lists, sets, tuples, intervals, unions and matrices."""

from __future__ import annotations

import re
from collections.abc import Callable

from kd.traces.verifiers.maths.expressions import Node, Unreadable, parse
from kd.traces.verifiers.maths.values import (
    EVERYTHING,
    Expression,
    Matrix,
    Named,
    Region,
    Several,
    Value,
    Word,
    all_but,
    as_interval,
)

_EITHER = re.compile(r"\\(?:pm|mp)(?![A-Za-z])")
MOST = 200  # items of a list
One = Callable[[str], Value]  # reads a part of a text
_CONNECTIVE = re.compile(
    r"\\text\s*\{\s*,?\s*(and|or|und|oder|et|ou|y|o)\s*\}|\\(lor|land)\b"
    r"|,?\s\b(and|or|und|oder|et|ou|(?<=\d\s)[yo](?=\s[-\d\\]|\s[a-z]\s*=))\b\s"
    r"|,?\s*(和|或|以及)\s*"
)


def split(text: str, separators: str) -> list[str]:
    """The parts between separators that stand in no bracket."""
    parts, depth, begin, at = [], 0, 0, 0
    while at < len(text):
        char = text[at]
        if char == "\\":
            at += 1
            depth += (text[at : at + 1] == "{") - (text[at : at + 1] == "}")
        elif char in "([{":
            depth += 1
        elif char in ")]}":
            depth -= 1
        elif char in separators and depth == 0:
            parts.append(text[begin:at])
            begin = at + 1
        at += 1
    return [part.strip() for part in (*parts, text[begin:])]


def _separator(match: re.Match[str]) -> str:
    name = next(group for group in match.groups() if group)
    return " ; " if name in ("and", "land", "und", "et", "y", "和", "以及") else " ∨ "


def read_connected(text: str, one: One) -> Value | None:
    spelled = _CONNECTIVE.sub(_separator, f"{text} ").strip()
    parts = [part for part in split(spelled, ",;∨") if part]
    if len(parts) < 2:
        return _plus_minus(text, one)
    if all(re.fullmatch(r"[A-Za-z '\-]+", part) for part in parts):
        return None  # words
    if len(parts) > MOST:
        raise Unreadable("a list too long")
    items = [one(part) for part in parts]
    if any(isinstance(item, Word) for item in items) and not all(
        isinstance(item, Word) for item in items
    ):
        raise Unreadable("words and numbers")
    regions = [item.value if isinstance(item, Named) else item for item in items]
    if all(isinstance(region, Region) for region in regions):
        names = {item.name for item in items if isinstance(item, Named)}
        if "∨" not in spelled or len(names) > 1:
            raise Unreadable("several conditions")
        spans = tuple(span for part in regions if isinstance(part, Region) for span in part.spans)
        return Named(names.pop(), Region(spans)) if names else Region(spans)
    if any(isinstance(region, Region) for region in regions) or any(
        isinstance(item, Expression) and item.node[:1] == ("sym",) and "mathbb" in item.node[1]
        for item in items
    ):
        raise Unreadable("a condition beside a value")
    return Several(tuple(items), "")


def _plus_minus(text: str, one: One) -> Value | None:
    count = len(_EITHER.findall(text))
    if count > 1:
        raise Unreadable("several signs")
    if not count:
        return None
    signs = [_EITHER.sub(sign, text) for sign in "+-"]
    name = re.match(r"[^=]*=", signs[0])
    sides = [re.sub(r"^[^=]*=\s*", "", side) if name else side for side in signs]
    items = tuple(one(side.strip().removeprefix("+")) for side in sides)
    return Several(items, "{}")


def read_bracketed(text: str, one: One) -> Value | None:
    opened, closed = text[:1], text[-1:]
    if text.startswith("\\{") and text.endswith("\\}"):
        inner, opened = text[2:-2].strip(), "{"
    elif opened in "([]{" and closed in ")][}" and len(text) > 1:
        inner = text[1:-1].strip()
        if opened == "{" and closed != "}":
            return None
    else:
        return None
    if opened == "{" and not inner:
        return Several((), "{}") if text.startswith("\\{") else None
    if not _balanced(inner):
        return None
    if opened == "{" and text.startswith("\\{"):
        builder = re.fullmatch(r"\s*[A-Za-z]\s*(?:\\in\s*\\mathbb\s*\{R\})?\s*[|:]\s*(.*)", inner)
        if builder:
            return one(builder[1])
    parts = split(inner, ",;")
    if len(parts) == 1 and not (opened == "{" and text.startswith("\\{")):
        return _grid(parts, inner)
    if opened == "[" and closed == "]" and all(part.startswith("[") for part in parts):
        return _grid(parts, inner)
    if len(parts) == 2 and opened in "([]" and closed in ")][" and (opened + closed) != "()":
        low, high = parse(parts[0]), parse(parts[1])
        return Region(((low, high, opened != "[", closed != "]"),))
    if "" in parts or opened + closed not in ("()", "[]", "{}"):
        raise Unreadable("a list with an empty place, or brackets that do not match")
    if len(parts) > MOST:
        raise Unreadable("a list too long")
    return Several(tuple(one(part) for part in parts), "{}" if opened == "{" else "()")


def _balanced(text: str) -> bool:
    """Whether every bracket of a text closes inside it; kinds may be mixed, as in [0, 1)."""
    depth = 0
    for char in text:
        depth += (char in "([{") - (char in ")]}")
        if depth < 0:
            return False
    return depth == 0


def _grid(parts: list[str], inner: str) -> Value | None:
    rows = [re.fullmatch(r"\[(.*)\]", part) for part in parts]
    if not inner.startswith("[") or not all(rows):
        return None
    return Matrix(tuple(tuple(parse(cell) for cell in split(row[1], ",")) for row in rows if row))


def read_union(text: str, one: One) -> Value | None:
    if re.fullmatch(r"\\mathbb\s*\{?R\}?|(?:all )?real numbers|all reals?", text):
        return EVERYTHING
    if re.fullmatch(
        r"\\emptyset|(?:there (?:is|are) )?no (?:real )?(?:solutions?|such .*)|none|empty set",
        text,
        re.I,
    ):
        return Several((), "{}")
    without = re.fullmatch(
        r"\\mathbb\s*\{?R\}?\s*(?:\\setminus|\\backslash|-)\s*(\\\{.*\\\})", text
    )
    if without:
        points = read_bracketed(without[1], one)
        if (
            isinstance(points, Several)
            and len(points.items) == 1
            and isinstance(points.items[0], Expression)
        ):
            return all_but(points.items[0].node)
        raise Unreadable("a difference of sets")
    if "\\cup" not in text:
        return None
    spans: list[tuple[Node, Node, bool, bool]] = []
    found_parts = [one(part.strip()) for part in text.split("\\cup")]
    sets = [found for found in found_parts if isinstance(found, Several) and found.form == "{}"]
    if len(sets) == len(found_parts):
        return Several(tuple(item for part in sets for item in part.items), "{}")
    for found in found_parts:
        if isinstance(found, Several) and found.form == "()" and len(found.items) == 2:
            found = as_interval(found) or found
        if not isinstance(found, Region):
            raise Unreadable("a union of something else than intervals")
        spans += found.spans
    return Region(tuple(spans))


def read_matrix(text: str, one: One) -> Value | None:
    match = re.fullmatch(
        r"[\[(|]?\s*\\begin\s*\{([a-z]*matrix|array)\}\s*(?:\{[^{}]*\})?(.*?)"
        r"\\end\s*\{\1\}\s*[\])|]?",
        text,
        re.DOTALL,
    )
    if match is None:
        return None
    if match[1] in ("vmatrix",) or text[0] == "|":
        raise Unreadable("a determinant")
    rows = [row for row in re.split(r"\\\\|\\cr\b", match[2]) if row.strip()]
    made = tuple(tuple(parse(cell) for cell in row.split("&")) for row in rows)
    if len({len(row) for row in made}) != 1:
        raise Unreadable("rows of different lengths")
    return Matrix(made)
