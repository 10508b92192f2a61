"""Texts as curation compares them: words and numbers, whatever their case, width and LaTeX."""

from __future__ import annotations

import re
import unicodedata
from functools import lru_cache

# scripts that are written without spaces between words: each letter counts as a word
_ALONE = (
    "\u0e00-\u0eff\u1000-\u109f\u1780-\u17ff\u3040-\u30ff\u3400-\u4dbf\u4e00-\u9fff\uf900-\ufaff"
    "\U00020000-\U0003ffff"
)
# small letters and digits stay; all else in ASCII parts words
_LETTERS = bytes(ord(chr(i).lower()) if i < 128 and chr(i).isalnum() else 32 for i in range(256))
_DIGITS = tuple("0123456789")
_OTHER = re.compile(r"([^\x00-\x7f]+)")
_RUN = re.compile(rf"[{_ALONE}]|[^\W\d_{_ALONE}]+|\d")
_ACCENTS = re.compile("[\u0300-\u036f]+")
_UNSEEN = "\u00ad\u200b\u200c\u200d\u200e\u200f\u2060\ufe0f\ufeff"
OPERATORS = "+-*=<>%"  # a fraction has many forms: its bar is none
_TOKENS = re.compile(rf"[{_ALONE}]|[^\W\d_{_ALONE}]+|\d+|[{re.escape(OPERATORS)}]")
# commands of LaTeX that say how a formula looks, or stand for a sign that is no word
_COMMAND_NAMES = (
    "left right big bigl bigr bigg Big Bigl Bigr Bigg displaystyle textstyle text textbf textit "
    "textrm mathrm mathbf mathit mathsf mathcal mathbb mathfrak mathop mbox hbox operatorname quad "
    "qquad boxed limits nolimits times cdot ast div le leq ge geq lt gt frac dfrac tfrac cfrac"
).split()
_SILENT = sorted((f"\\{name}" for name in _COMMAND_NAMES), key=len, reverse=True)
_LOOK = re.compile(rf"\\(?:{'|'.join(_COMMAND_NAMES)})(?![a-zA-Z])|\\[,;:! ]")
_FRACTION = re.compile(r"\\[dtc]?frac\s*(?:\{([^{}\\]*)\}|(\d))\s*(?:\{([^{}\\]*)\}|(\d))")
_THOUSANDS = re.compile(r"(?<=\d)(?:,|\{,\}|\\,)(?=\d{3}(?!\d))")
_SIGNS = {
    **dict.fromkeys(map(ord, "\u2212\u2010\u2011\u2012\u2013\u2014\ufe63"), "-"),
    **dict.fromkeys(map(ord, "\u00d7\u00b7\u22c5\u2217"), "*"),
    **dict.fromkeys(map(ord, "\u00f7\u2215\u2044"), "/"),
    ord("\u2264"): "<=",
    ord("\u2265"): ">=",
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
    """A text in its common form: half-width, no accents, plain signs for operators, no spacing of
    LaTeX. The case is left as it is."""
    if not text.isascii():
        text = _decomposed(text.translate(_SIGNS)).translate(_SIGNS)
    if "\\" in text:
        text = _FRACTION.sub(r"\1\2/\3\4", text)
        text = _COMMANDS.sub(lambda found: _MEANS[found[1]], _THOUSANDS.sub("", text))
        text = _LOOK.sub(" ", text)
    elif "," in text:
        text = _THOUSANDS.sub("", text)
    return text


def _decomposed(text: str) -> str:
    """Letters without their accents and width, and nothing that is not seen."""
    apart = unicodedata.normalize("NFKD", text)
    if apart != unicodedata.normalize("NFKC", text):
        apart = _ACCENTS.sub("", apart)
    for letter in _UNSEEN:
        if letter in apart:
            apart = apart.replace(letter, "")
    return apart


@lru_cache(maxsize=4)  # one stage after another reads the same trace
def words(text: str) -> list[str]:
    """Lower-case words and digits; letters of scripts without spaces one by one. The list is kept:
    it is not to be changed."""
    if text.isascii():
        return _split(text)
    found: list[str] = []
    for i, part in enumerate(_OTHER.split(_decomposed(text))):
        found += _RUN.findall(part.casefold()) if i % 2 else _split(part)
    return found


def _split(text: str) -> list[str]:
    """The words of an ASCII text."""
    if "\\" in text:
        for command in _SILENT:
            if command in text:
                text = text.replace(command, " ")
    text = text.encode("ascii").translate(_LETTERS).decode("ascii")
    for digit in _DIGITS:
        if digit in text:
            text = text.replace(digit, f" {digit} ")
    return text.split()


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
_PIECES = re.compile(
    rf"[A-Za-z]+|\d+(?:\.\d+)?|\\[a-zA-Z]+|[{_ALONE}]|[^\W\d_{_ALONE}]+"
    r"|\*(?!\*)|[^\w\s.,;:!?'\"`\u00b4\u2018-\u201f()\[\]{}$\\*_~]"
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
    text = plain(text)
    if "#" in text or "*" in text or "$" in text or "\\" in text:
        text = _DRESS.sub("", text)
    numbered = _NUMBERED.match(text)
    found = _PIECES.findall(text, numbered.end() if numbered else 0)
    letters = [word for word in found if len(word) > 1 and word.isalpha()]
    foreign = len(letters) >= 8 and 10 * sum(x in _ENGLISH for x in letters) < len(letters)
    marks, counted = [], False  # whether a number comes before
    for i, word in enumerate(found):
        if len(word) == 1 and word.isalpha():
            if word not in "aAI" if word.isascii() else word in _CHINESE:
                marks.append(word)
        elif word.islower() and word.isalpha():
            if counted or foreign or word in _TURNS:
                marks.append(word)
        elif word != "-" or not (_is_word(found[i - 1 : i]) and _is_word(found[i + 1 : i + 2])):
            lower = word.lower()  # a hyphen between two words is none
            if foreign or lower in _TURNS or lower not in _STARTS:
                marks.append(lower)
        counted = word[0].isdecimal()
    lines = [line.rstrip() for line in text.split("\n")] if "\n" in text else []
    return marks + [line for line in lines if line and line[-1] not in _STOPS]
