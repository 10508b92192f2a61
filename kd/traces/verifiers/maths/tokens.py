"""The tokens of an expression: numbers, letters, commands and signs; nothing is skipped."""

from __future__ import annotations

import re

Token = tuple[str, str]  # kind ("number", "letter", "command", "sign") and text

FUNCTIONS = {
    "sin", "cos", "tan", "cot", "sec", "csc", "asin", "acos", "atan", "sinh", "cosh", "tanh",
    "ln", "log", "exp",
}  # fmt: skip
_PLAIN_WORDS = {**{name: name for name in FUNCTIONS}, "arcsin": "asin", "arccos": "acos"}
_PLAIN_WORDS |= {"arctan": "atan", "sqrt": "sqrt", "pi": "pi", "infinity": "infty", "inf": "infty"}
_NO_PRODUCT = set("is to of in at or no if so as by we it on an be am pm the and for are".split())
_TOKEN = re.compile(
    r"\s*(?:(?P<number>\d+(?:\.\d+)?|\.\d+)(?:[eE](?P<exponent>[-+]?\d{1,6})(?![\d.]))?"
    r"|\\(?P<command>[A-Za-z]+)|(?P<word>[A-Za-z]+)|(?P<sign>[-+*/^_()\[\]{}|!%',]))"
)


_REPEATING = re.compile(r"(\d{0,40})\.(\d{0,40})(?:\\overline\s*\{(\d{1,40})\}|\((\d{1,40})\))")


class Unreadable(ValueError):
    """A text that cannot be read wholly and in one way; the message says why."""


def tokens_of(text: str) -> list[Token]:
    tokens: list[Token] = []
    at, text = 0, _REPEATING.sub(_repeating, text.strip())
    while at < len(text):
        match = _TOKEN.match(text, at)
        if match is None:
            raise Unreadable(f"{text[at : at + 12]!r} is no algebra")
        at = match.end()
        kind = match.lastgroup or ""
        if match.group("number"):
            tokens.append(("number", match.group().strip()))
        elif kind == "word":
            word, spaced = match.group("word"), " " in text[match.start() - 1 : match.start("word")]
            spaced = spaced or text[at : at + 1] == " "
            long = len(word) > 2 and word not in _PLAIN_WORDS
            if spaced and (long or word.lower() in _NO_PRODUCT):
                raise Unreadable("words")
            tokens += _word(word)
        else:
            tokens.append((kind, match.group(kind)))
    return tokens


def _repeating(match: re.Match[str]) -> str:
    r"""0.1\overline{3} as a fraction."""
    whole, fixed, period = match[1] or "0", match[2], match[3] or match[4]
    over = int(whole + fixed + period) - int(whole + fixed)
    return rf"(\frac{{{over}}}{{{'9' * len(period) + '0' * len(fixed)}}})"


def _word(word: str) -> list[Token]:
    """A run of letters: a function's name, or a product of up to three letters."""
    if word in _PLAIN_WORDS:
        return [("command", _PLAIN_WORDS[word])]
    for name in ("arcsin", "arccos", "arctan", "sqrt", "sin", "cos", "tan", "ln", "log", "pi"):
        head, found, tail = word.partition(name)
        if found and len(head) <= 2 and len(tail) <= 1:
            letters = [("letter", letter) for letter in head]
            return [*letters, ("command", _PLAIN_WORDS[name]), *(("letter", x) for x in tail)]
    if len(word) <= 3:
        return [("letter", letter) for letter in word]
    raise Unreadable("words")
