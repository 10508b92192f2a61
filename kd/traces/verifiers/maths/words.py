"""Whether two answers in words are the same."""

from __future__ import annotations

import re

_SUBJECT = re.compile(r"^(?:it|this|that|the \w+)(?: (?:is|are|was))? (?!not\b)", re.IGNORECASE)
_ARTICLE = re.compile(r"^(?:the|an?)\s+(?=\w{2})", re.IGNORECASE)
_AND = re.compile(r"\s*(?:[,;&]|\band\b)\s*(?:and\s+)?")
_OPPOSITES = ({"yes", "no"}, {"true", "false"}, {"even", "odd"}, {"left", "right"})


def same_words(left: str, right: str) -> bool | None:
    """Words, of which case and small differences of form do not count; symbols' case does."""
    lists = [_AND.split(side) for side in (left, right)]
    if len(lists[0]) == len(lists[1]) > 1:
        return _same_lists(*lists)
    if bool(_SUBJECT.match(left)) != bool(_SUBJECT.match(right)):
        left, right = (_SUBJECT.sub("", side) or side for side in (left, right))
    first, second = (re.findall(r"[\w']+", _ARTICLE.sub("", side)) for side in (left, right))
    if first == second:
        return True
    if len(first) == len(second) and all(map(_same_word, first, second)):
        return True
    apart = [pair for pair in zip(first, second, strict=False) if pair[0] != pair[1]]
    if len(first) == len(second) and len(apart) == 1:
        if all(re.fullmatch(r"[IVX]+|\d+", word) for word in apart[0]):
            return False  # Quadrant II, Quadrant III
    lower = [{word.lower() for word in side} for side in (first, second)]
    if any(pair == lower[0] | lower[1] for pair in _OPPOSITES):
        return False
    heads = [side[0].lower() if side else "" for side in (first, second)]
    if set(heads) <= {"yes", "no"} and "" not in heads:
        return heads[0] == heads[1]
    if lower[0] <= lower[1] or lower[1] <= lower[0]:
        return None
    joined = ["".join(side).lower() for side in (first, second)]
    initials = ["".join(word[0] for word in side).lower() for side in (first, second)]
    if initials[0] == joined[1] or initials[1] == joined[0]:
        return None
    short = min(joined, key=len)
    if (
        sorted(joined[0]) == sorted(joined[1])
        and len(short) < 6
        and "".join(first + second).islower()
    ):
        return None  # a product of the same letters
    prefix = len(short) > 3 and joined[0][:4] == joined[1][:4]
    if prefix or min(map(len, joined)) < 3:
        return None
    return False


def _same_lists(left: list[str], right: list[str]) -> bool | None:
    """Several words in any order; what is left on both sides decides, where it is one each."""
    rest = list(right)
    missing = []
    for word in left:
        same = next((other for other in rest if same_words(word, other)), None)
        if same is None:
            missing.append(word)
        else:
            rest.remove(same)
    if not missing:
        return True
    return same_words(missing[0], rest[0]) if len(missing) == 1 else None


def _same_word(left: str, right: str) -> bool:
    """Equal but for case; short words and those of mixed case may be symbols: their case counts."""
    if left == right:
        return True
    words = all(w.isalpha() and (w.islower() or w.istitle() or w.isupper()) for w in (left, right))
    long = len(left) > 2 or left.lower() in ("no", "is", "of")
    return words and long and left.lower() == right.lower()
