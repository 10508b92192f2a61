"""Filters: each looks at one trace and gives the reason to drop it, or None."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

from kd.traces.counts import DropCounts
from kd.traces.loops import loops
from kd.traces.trace import Trace, has_marks

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
_STATEMENT = re.compile(
    r"^\s*(?:def |class |import |from \w+ import|for .*:$|if .*:$|\w+ = \w|return )", re.MULTILINE
)
_LINE = re.compile(r"^[ \t]*#[^\n]*", re.MULTILINE)
_FENCE = re.compile(r"^\s{0,3}(`{3,}|~{3,})", re.MULTILINE)


def filter_stream(
    traces: Iterable[Trace], filters: Sequence[Filter], *, report: DropCounts, stage: str = "filter"
) -> Iterator[Trace]:
    """Pass on what no filter objects to; the first objection is the reason counted."""
    counted = report.stage(stage)
    for trace in traces:
        with counted.timed():
            reason = next((found for check in filters if (found := check(trace))), None)
        if reason is None:
            counted.keep()
            yield trace
        else:
            counted.drop(reason, trace)


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
                said = [str(turn.get("content")) for turn in trace.metadata.get("history", ())]
                asked = _asked("\n".join([trace.system, *said, trace.prompt]))
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
    if "#" in text or "//" in text or "/*" in text:
        text = _COMMENT.sub(" ", _without_blocks(text))
        if _STATEMENT.search(text):  # else "# ..." is a heading
            text = _LINE.sub(" ", text)
    return text


def _without_blocks(text: str) -> str:
    """A text without what stands between /* and */."""
    kept, at = [], 0
    while (begin := text.find("/*", at)) >= 0 and (end := text.find("*/", begin + 2)) >= 0:
        kept.append(text[at:begin])
        at = end + 2
    return " ".join([*kept, text[at:]])


def scripts(text: str) -> dict[str, int]:
    """Letters of each script but Latin that occur in a text."""
    if text.isascii():
        return {}
    counts = {name: len(pattern.findall(text)) for name, pattern in _SCRIPT.items()}
    return {name: count for name, count in counts.items() if count}
