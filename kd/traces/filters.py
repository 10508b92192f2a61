"""Filters: each looks at one trace and gives the reason to drop it, or None."""

from __future__ import annotations

import re
import zlib
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

from kd.traces.trace import Trace, has_marks
from kd.traces.yields import Yield

Filter = Callable[[Trace], str | None]
_SCRIPTS = {
    "han": "\u3400-\u4dbf\u4e00-\u9fff\uf900-\ufaff",
    "kana": "\u3040-\u30ff",
    "hangul": "\uac00-\ud7af\u1100-\u11ff",
    "cyrillic": "\u0400-\u04ff",
    "arabic": "\u0600-\u06ff",
    "hebrew": "\u0590-\u05ff",
    "devanagari": "\u0900-\u097f",
    "thai": "\u0e00-\u0e7f",
}
_LATIN = re.compile("[A-Za-z\u00c0-\u024f]")
_SCRIPT = {name: re.compile(f"[{span}]") for name, span in _SCRIPTS.items()}
_LANGUAGES = {
    "han": ("chinese", "mandarin", "cantonese", "hanzi", "pinyin", "kanji", "中文", "汉语", "漢字"),
    "kana": ("japanese", "kanji", "hiragana", "katakana", "日本語", "日语"),
    "hangul": ("korean", "hangul", "한국어", "韩语"),
    "cyrillic": ("russian", "ukrainian", "bulgarian", "serbian", "cyrillic", "俄语"),
    "arabic": ("arabic", "persian", "farsi", "urdu", "阿拉伯语"),
    "hebrew": ("hebrew", "yiddish", "希伯来语"),
    "devanagari": ("hindi", "sanskrit", "nepali", "marathi", "devanagari", "印地语"),
    "thai": ("thai ", "thai.", "thai:", "thai?", "泰语"),
}
_TRANSLATE = re.compile(
    r"translat(?!.{0,40}\b(?:units?|axis|graph|vector|triangle|parabola))|翻译|翻譯|翻訳|訳して|번역|перевед|перевод|ترجم|anuvad|अनुवाद|แปล|transliterat|multilingual"
    r"|(?:other|foreign|different|several|multiple) languages?"
)
_EUROPE = re.compile(
    "英|法语|法文|德语|德文|西班牙|translat|english|영어|불어|англ|франц|немец|испан|翻|訳|번역|перев"
    "|अंग्रेज|อังกฤษ|แปล|אנגל|إنجليز|انجليز|ترجم"
)
_CODE = re.compile(r"^\s{0,3}(`{3,}|~{3,}).*?(?:^\s{0,3}\1|\Z)|`[^`\n]*`", re.MULTILINE | re.DOTALL)
_COMMENT = re.compile(
    r"(?:^|(?<=\s)|(?<=;))//.*$|(?<=\S)[ \t]+#.*$|/\*.*?\*/", re.MULTILINE | re.DOTALL
)
_CYCLE = 4  # lines in turn
_WORD = re.compile(r"[^\W\d_]{2,}|[\u3040-\u30ff\u3400-\u9fff\uac00-\ud7af\u0e00-\u0e7f]")
_COMMAND = re.compile(r"\\[a-zA-Z]+(?:\{[a-z]*\})?")
# rows: of Markdown, LaTeX, lists of lists, cells between tabs
_ROW = re.compile(r"^\||\|$|&.*\\\\|\t|^[\[{].*[\]}],?$")
_FENCE = re.compile(r"^\s{0,3}(`{3,}|~{3,})", re.MULTILINE)


def filter_stream(
    traces: Iterable[Trace], filters: Sequence[Filter], *, report: Yield, stage: str = "filter"
) -> Iterator[Trace]:
    """Pass on what no filter objects to; the first objection is the reason counted."""
    tally = report.stage(stage)
    for trace in traces:
        with tally.timed():
            reason = next((found for check in filters if (found := check(trace))), None)
        if reason is None:
            tally.keep()
            yield trace
        else:
            tally.drop(reason, trace)


@dataclass(frozen=True)
class Lint:
    """The form of a trace: one thought, an answer, an end, no loops.

    A trace that lost a part of its message (an image), or that ends in a call of a tool, is not
    what was said.

    Attributes:
        need_think: drop traces without a thought.
        longest: characters of thought and answer together; a 5 MB trace is an accident.
        repeats: a line, or a period at the end of the text, may occur so often in a row.
        fences: drop answers with a code block that never ends.
    """

    need_think: bool = False
    longest: int = 1_000_000
    repeats: int = 12
    fences: bool = True

    def __call__(self, trace: Trace) -> str | None:
        if len(trace.think) + len(trace.answer) > self.longest:
            return f"longer than {self.longest} characters"
        if trace.metadata.get("finish") == "length":
            return "truncated"
        if trace.metadata.get("lost_parts"):
            return "parts that are not text"
        if trace.metadata.get("tool_calls"):
            return "tool call"
        if not trace.answer.strip():
            return "empty answer"
        if self.need_think and not trace.think.strip():
            return "empty think"
        if has_marks(trace.think) or has_marks(trace.answer):
            return "nested or second think tag"
        if self.fences and len(_FENCE.findall(trace.answer)) % 2:
            return "unterminated code fence"
        if loops(trace.think, self.repeats) or loops(trace.answer, self.repeats):
            return "repetition loop"
        return None


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
    # of a text that ends in circles, the last few letters come again and again
    if len(text) >= 200 and text[-2000:].count(text[-16:]) >= 6 and _circles(text, repeats):
        return True
    if len(text) >= 4000:
        sample = text[-100_000:].encode("utf-8", "replace")
        if len(zlib.compress(sample, 1)) * 30 < len(sample):
            prose = "\n".join(line for line in text.split("\n") if _patience(line) < 10)
            return len(prose) >= 4000
    return False


def _bare(text: str) -> bool:
    """Whether there are no words and no equations in it: digits, signs, LaTeX."""
    return "=" not in text and _WORD.search(_COMMAND.sub("", text)) is None


def _patience(cycle: str) -> int:
    """How much longer than prose a cycle may go on: rows are equal by nature, words often."""
    lines = cycle.strip().split("\n")
    if _bare(cycle) or all(_ROW.search(line.strip()) for line in lines):
        return 10
    return 4 if all(line.strip().isalnum() and line.isascii() for line in lines) else 1


def _circles(text: str, repeats: int) -> bool:
    """Whether a text of 200 characters or more ends in one period, ``repeats`` times in a row."""
    period = _period(text[-2000:], repeats)
    if not period:
        return False
    cycle = text[-period:]
    if not _bare(cycle):
        need = max(200, repeats * _patience(cycle) * period)
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
        if i + 1 >= 200 and period > 2 and i + 1 >= repeats * period:
            return period
    return 0


@dataclass(frozen=True)
class Tokens:
    """Bounds on the length of thought and answer in the student's tokens.

    Attributes:
        tokenizer: the student's.
        least: fewer tokens are dropped.
        most: more tokens are dropped.
    """

    tokenizer: Any
    least: int = 0
    most: int | None = None

    def __call__(self, trace: Trace) -> str | None:
        text = f"{trace.think}\n{trace.answer}"
        if self.most is not None and len(text) > 40 * self.most:
            return f"longer than {self.most} tokens"
        count = len(self.tokenizer(text, add_special_tokens=False).input_ids)
        if count < self.least:
            return f"shorter than {self.least} tokens"
        if self.most is not None and count > self.most:
            return f"longer than {self.most} tokens"
        return None


@dataclass(frozen=True)
class OneLanguage:
    """Thought and answer stay in the scripts of the prompt, and of languages that it names.

    Code may have comments in any language, and what a translation is made of is not looked at.

    Attributes:
        share: letters of other scripts allowed among all letters of a text.
    """

    share: float = 0.02

    def __call__(self, trace: Trace) -> str | None:
        texts = [text for text in (trace.think, trace.answer) if not text.isascii()]
        if not texts:
            if trace.think.isascii() and scripts(trace.prompt) and not _LATIN.search(trace.prompt):
                letters = len(_LATIN.findall(_prose(trace.think)))
                if letters > 40 and not _EUROPE.search(trace.prompt):
                    return "other language than the prompt"
            return None
        asked: set[str] | None = None
        for text in texts:
            found = scripts(_prose(text))
            if not found:
                continue
            if asked is None:
                asked = _asked(f"{trace.system}\n{trace.prompt}")
            total = sum(found.values()) + len(_LATIN.findall(text))
            foreign = sum(count for name, count in found.items() if name not in asked)
            if foreign > max(2, self.share * total):
                return "language mixing"
        return None


def _asked(text: str) -> set[str]:
    """The scripts that a prompt is written in or asks for; all, where it asks to translate."""
    found = set(scripts(text))
    lower = text.lower()
    for name, words in _LANGUAGES.items():
        if any(word in lower for word in words):
            found |= {"han", "kana"} if name == "kana" else {name}
    return set(_SCRIPTS) if _TRANSLATE.search(lower) else found


def _prose(text: str) -> str:
    """A text without its code: fenced, between backquotes, or a comment behind a statement."""
    if "`" in text:
        text = _CODE.sub(" ", text)
    return _COMMENT.sub(" ", text) if "#" in text or "//" in text or "/*" in text else text


def scripts(text: str) -> dict[str, int]:
    """Letters of each script but Latin that occur in a text."""
    if text.isascii():
        return {}
    counts = {name: len(pattern.findall(text)) for name, pattern in _SCRIPT.items()}
    return {name: count for name, count in counts.items() if count}
