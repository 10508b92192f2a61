"""Texts as curation compares them: words and numbers, whatever their case, width and LaTeX."""

from __future__ import annotations

import re
import unicodedata

# scripts that are written without spaces between words: each letter counts as a word
_ALONE = (
    "\u0e00-\u0eff\u1000-\u109f\u1780-\u17ff\u3040-\u30ff\u3400-\u4dbf\u4e00-\u9fff\uf900-\ufaff"
    "\U00020000-\U0003ffff"
)
_LETTERS = {i: chr(i).lower() if chr(i).isalnum() else " " for i in range(128)}
_DIGITS = tuple("0123456789")
_SINGLE = re.compile(f"[{_ALONE}]")
_ANY = re.compile(rf"[{_ALONE}]|[^\W\d_{_ALONE}]+|\d")
_SPACED = re.compile(r"[^\W\d_]+|\d")
OPERATORS = "+-*/=<>%"
_TOKENS = re.compile(rf"[{_ALONE}]|[^\W\d_{_ALONE}]+|\d+|[{re.escape(OPERATORS)}]")
# how a formula looks, not what it says
_LOOK = re.compile(
    r"\\(?:left|right|[bB]ig+[lr]?|displaystyle|textstyle|text(?:bf|it|rm)?|math[a-z]+|mbox|hbox"
    r"|operatorname|quad|qquad|boxed|times|cdot|ast|div|leq?|geq?|lt|gt|[dtc]?frac)(?![a-zA-Z])"
    r"|\\[,;:! ]"
)
_FRACTION = re.compile(r"\\[dtc]?frac\s*(?:\{([^{}\\]*)\}|(\d))\s*(?:\{([^{}\\]*)\}|(\d))")
_THOUSANDS = re.compile(r"(?<=\d)(?:,|\{,\}|\\,)(?=\d{3}(?!\d))")
_SIGNS = {
    **dict.fromkeys(map(ord, "\u2212\u2010\u2011\u2012\u2013\u2014\ufe63"), "-"),
    **dict.fromkeys(map(ord, "\u00d7\u00b7\u22c5\u2217"), "*"),
    **dict.fromkeys(map(ord, "\u00f7\u2215\u2044"), "/"),
    ord("\u2264"): "<=",
    ord("\u2265"): ">=",
    **dict.fromkeys((0xAD, *range(0x200B, 0x2010), *range(0x2060, 0x2065), 0xFEFF)),  # unseen
}
_COMMANDS = re.compile(r"\\(times|cdot|ast|div|leq?|geq?|lt|gt)(?![a-zA-Z])")
_MEANS = {
    **dict.fromkeys(("times", "cdot", "ast"), "*"),
    **dict.fromkeys(("le", "leq"), "<="),
    **dict.fromkeys(("ge", "geq"), ">="),
    "div": "/",
    "lt": "<",
    "gt": ">",
}


def plain(text: str) -> str:
    """A text in its common form: half-width, plain signs for operators, no spacing of LaTeX.

    The case is left as it is.
    """
    if not text.isascii():
        text = unicodedata.normalize("NFKC", text.translate(_SIGNS)).translate(_SIGNS)
    if "\\" in text:
        text = _FRACTION.sub(r"\1\2/\3\4", text)
        text = _COMMANDS.sub(lambda found: _MEANS[found[1]], _THOUSANDS.sub("", text))
        text = _LOOK.sub(" ", text)
    elif "," in text:
        text = _THOUSANDS.sub("", text)
    return text


def words(text: str) -> list[str]:
    """Lower-case words and digits; letters of scripts without spaces one by one."""
    if "\\" in text:
        text = _LOOK.sub(" ", text)
    if text.isascii():
        text = text.translate(_LETTERS)
        for digit in _DIGITS:
            if digit in text:
                text = text.replace(digit, f" {digit} ")
        return text.split()
    text = unicodedata.normalize("NFKC", text.translate(_SIGNS)).casefold()
    return (_ANY if _SINGLE.search(text) else _SPACED).findall(text)


def tokens(text: str) -> list[str]:
    """The words with the operators between them; a hyphen between two words is none."""
    found = _TOKENS.findall(plain(text).casefold())
    return [
        token
        for i, token in enumerate(found)
        if token != "-" or not (_is_word(found[i - 1 : i]) and _is_word(found[i + 1 : i + 2]))
    ]


def _is_word(tokens: list[str]) -> bool:
    return not tokens or (len(tokens[0]) > 1 and tokens[0].isalpha())


# words that turn one problem into another; the rest of a sentence may be said in many ways
_TURNS = frozenset(
    "not no never without except more less fewer greater smaller larger least most fewest maximum "
    "minimum maximize minimize largest smallest greatest highest lowest longest shortest first "
    "last before after above below inside outside increase decrease increasing decreasing even "
    "odd positive negative prime composite sum difference product quotient remainder ratio mean "
    "median mode range area perimeter volume circumference radius diameter sine cosine tangent "
    "sin cos tan log ln union intersection left right up down east west north south clockwise "
    "only exactly neither nor none cannot or true false "
    "add subtract multiply divide plus minus times divided squared cubed root half "
    "double twice triple thrice zero one two three four five six seven eight nine ten eleven "
    "twelve thirteen fourteen fifteen sixteen seventeen eighteen nineteen twenty thirty forty "
    "fifty sixty seventy eighty ninety hundred thousand million billion dozen second third fourth "
    "fifth day days hour hours minute minutes week weeks month months year years".split()
)
# what a sentence begins with when it is no name
_STARTS = frozenset(
    "a an the what which who whose when where why how is are was were do does did can could will "
    "would should may let find compute determine calculate evaluate simplify solve prove show give "
    "given suppose assume consider if in on at for from of to by with as and or but so then there "
    "this that these those it its he she they we you your my our his her their each every all some "
    "any both write express factor expand graph draw state name list please answer return put "
    "use using explain note hint here now also however after before while since because add "
    "implement create define describe choose select complete convert estimate problem".split()
)
_ENGLISH = frozenset(
    "the a an of is are to in and what how many much if for that with find on be it his her".split()
)
_CARRIED = re.compile(
    rf"\\[a-zA-Z]+|\d+(?:\.\d+)?(?:\s?[A-Za-z\u00b0]+)?|(?<=[\d)\]}}])\s*[-/]|[-/]\s*(?=[\d(\\])|(?<=\b[A-Za-z])\s*[-/]"
    rf"\s*(?=[A-Za-z]\b)|[^\w\s.,;:!?'\"`´\u2018-\u201f()\[\]{{}}$\\/*_~-]|\*(?!\*)|/|[A-Za-z]+|[^\W\d_{_ALONE}]+|[{_ALONE}]"
)
_STOPS = ".?!:;,。？！：；，"
_DRESS = re.compile(r"^[ \t]*#+[ \t]|\*\*|\$|\\[()\[\]]", re.MULTILINE)  # headings, bold, formulas
_NUMBERED = re.compile(
    r"\s*(?:(?:problem|question|exercise|q)\W{0,2})?\d+\s*[.):]\s+", re.IGNORECASE
)
# numerals and the signs of sums in Chinese and Japanese; of other letters there, all count alike
_CHINESE = frozenset(
    "零一二三四五六七八九十百千万亿两半加减乘除和差积商大小多少最不奇偶正负质合长短高低前后左右"
)


def carried(text: str) -> list[str]:
    """What makes a problem this one and no other, in order: its numbers and their units, signs and
    variables, names, and words such as "not" or "largest"; of a language other than English (and
    Chinese, in part) every word; and whole lines that are no sentences: data, code, grids. A
    number in front of the problem is not its own."""
    text = _DRESS.sub("", plain(text))
    numbered = _NUMBERED.match(text)
    begin = numbered.end() if numbered else 0
    found = [match[0].strip() for match in _CARRIED.finditer(text, begin)]
    letters = [word.lower() for word in found if len(word) > 1 and word.isalpha()]
    foreign = len(letters) >= 8 and 10 * sum(map(_ENGLISH.__contains__, letters)) < len(letters)
    marks = [mark for word in found if (mark := _mark(word, foreign))]
    lines = [line.rstrip() for line in text.split("\n")] if "\n" in text else []
    return marks + [line for line in lines if line and line[-1] not in _STOPS]


def _mark(word: str, foreign: bool) -> str:
    """A word as far as it makes a problem, else nothing."""
    lower = word.lower()
    if not word.isalpha():
        return lower.replace(" ", "")
    if len(word) == 1:
        return word if (word not in "aAI" if word.isascii() else word in _CHINESE) else ""
    if lower in _TURNS or (word[0].isupper() and lower not in _STARTS):
        return lower
    return lower if foreign else ""
