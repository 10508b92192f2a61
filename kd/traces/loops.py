"""Whether a text goes round in circles, and is not just a table, a matrix or a long number."""

from __future__ import annotations

import re
import zlib

_CYCLE = 4  # lines in turn
_NUMBER = re.compile(r"^\d+[.):]\s+(?=\S)")  # of an item in a list
_WORD = re.compile(
    "[^\\W\\d_]{2,}|[\u0e00-\u0e7f\u3040-\u30ff\u3400-\u9fff\uac00-\ud7af\U0001f300-\U0001faff]"
)
_COMMAND = re.compile(r"\\(?!boxed)[a-zA-Z]+(?:\{[a-z]*\})?")
# rows: of Markdown, LaTeX, HTML, lists of lists, cells between tabs, commas or many spaces
_ROW = re.compile(
    r"^\||\|$|&.*\\\\|^</?t[rdh]\b|\t|\S {2,}\S|^[\[{].*[\]}],?$|^[^\s,;]+(?:[,;][^\s,;]*)+$"
)


def loops(text: str, repeats: int = 12) -> bool:
    """Whether a text goes round in circles: a line, or up to four lines in turn, again and again;
    a period at its end; or so little in it that it packs to a thirtieth. Linear in the text.

    Rows of tables and matrices, and digits, may be equal: ten times as many count, and digits in
    a row from 10,000 characters.
    """
    runs, recent = [0] * _CYCLE, [""] * _CYCLE
    for line in text.split("\n"):
        line = line.strip()
        if not line:
            continue
        if line[0].isdecimal():
            line = _NUMBER.sub("", line)
        for back in range(_CYCLE):
            if line != recent[-1 - back]:
                runs[back] = 0
                continue
            runs[back] += 1
            if runs[back] >= (repeats - 1) * (back + 1) and len(line) > 2:
                cycle = "\n".join(recent[-1 - back :])
                if runs[back] >= (repeats * _patience(cycle) - 1) * (back + 1):
                    return True
        recent = [*recent[1:], line]
    return _around(text, repeats) or _packs(text)


def _around(text: str, repeats: int) -> bool:
    """Whether a period is repeated, at the end or within: of a text that goes in circles a few
    letters come again and again, so that looking at some is enough."""
    for begin in (*range(0, len(text) - 200, 400), max(0, len(text) - 800)):
        window = text[begin : begin + 800]
        mark = window[:16]
        if len(mark.strip()) >= 8 and window.count(mark) >= 6:
            end = begin + window.rfind(mark) + 16
            if _circles(text[max(0, end - 20_000) : end], repeats):
                return True
    # long periods are looked for at the end alone
    return len(text) >= 200 and text[-2000:].count(text[-16:]) >= 6 and _circles(text, repeats)


def _packs(text: str) -> bool:
    """Whether there is so little in a text that it packs to a thirtieth."""
    if len(text) >= 4000:
        sample = text[-100_000:].encode("utf-8", "replace")
        if len(zlib.compress(sample, 1)) * 30 < len(sample):
            prose = "\n".join(line for line in text.split("\n") if not _is_row(line.strip()))
            return len(prose) >= 4000
    return False


def _is_row(line: str) -> bool:
    """Whether a line is one of a table, a matrix, or a list of values."""
    cells = line.split()
    return (
        _bare(line)
        or _ROW.search(line) is not None
        or ("=" not in line and len(_WORD.findall(line)) * 3 <= len(cells))
    )


def _bare(text: str) -> bool:
    """Whether there are no words and no equations in it: digits, signs, LaTeX."""
    return "=" not in text and _WORD.search(_COMMAND.sub("", text)) is None


def _patience(cycle: str) -> int:
    """How much longer than prose a cycle may go on: rows are equal by nature, words often."""
    lines = cycle.strip().split("\n")
    if all(_is_row(line.strip()) for line in lines):
        return 10
    return 4 if all(line.strip().isalnum() and line.isascii() for line in lines) else 1


def _circles(text: str, repeats: int) -> bool:
    """Whether a text of 200 characters or more ends in one period, ``repeats`` times in a row."""
    period = _period(text[-2000:], repeats)
    if not period:
        return False
    cycle = text[-period:]
    if "\n" in cycle:  # whole lines, wherever the cycle begins
        cycle = "\n".join((cycle * 2).split("\n")[1:-1])
    if not _bare(cycle):
        need = max(200 if period > 3 else 400, repeats * _patience(cycle) * period)
    else:
        need = 10_000
    return len(text) >= need and text[-need:-period] == text[-need + period :]


def _period(text: str, repeats: int) -> int:
    """The period in which a text ends, 200 characters or ``repeats`` times long; 0 for none
    (found from the end by the borders of its prefixes, as Knuth, Morris and Pratt do)."""
    backwards = text[::-1]
    border = [0] * len(text)
    k = 0
    for i in range(1, len(backwards)):
        while k and backwards[i] != backwards[k]:
            k = border[k - 1]
        k += backwards[i] == backwards[k]
        border[i] = k
        period = i + 1 - k
        if i + 1 >= 200 and i + 1 >= repeats * period:
            return period
    return 0
