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
    """Whether a text goes round in circles: the same line again and again, a period at its end,
    or so little in it that it packs to a thirtieth. Linear in the text."""
    previous, run = "", 0
    for line in text.split("\n"):
        line = line.strip()
        if not line:
            continue
        run = run + 1 if line == previous else 1
        previous = line
        if run >= repeats and len(line) > 2:
            return True
    tail = text[-2000:]
    if len(tail) >= 200:
        packed = tail.encode("utf-8", "replace")
        if len(zlib.compress(packed, 1)) * 4 < len(packed) and _cycles(tail, repeats):
            return True
    if len(text) >= 4000:
        sample = text[-100_000:].encode("utf-8", "replace")
        return len(zlib.compress(sample, 1)) * 30 < len(sample)
    return False


def _cycles(text: str, repeats: int) -> bool:
    """Whether a text of 200 characters or more ends in one period, ``repeats`` times in a row
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
            return True
    return False


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
    """Thought and answer stay in the scripts of the prompt.

    Attributes:
        share: letters of other scripts allowed among all letters of a text.
    """

    share: float = 0.02

    def __call__(self, trace: Trace) -> str | None:
        texts = [text for text in (trace.think, trace.answer) if not text.isascii()]
        if not texts:
            if trace.think.isascii() and scripts(trace.prompt) and not _LATIN.search(trace.prompt):
                letters = len(_LATIN.findall(trace.think))
                return "other language than the prompt" if letters > 40 else None
            return None
        asked = set(scripts(trace.prompt))
        for text in texts:
            found = scripts(text)
            total = sum(found.values()) + len(_LATIN.findall(text))
            foreign = sum(count for name, count in found.items() if name not in asked)
            if foreign > max(2, self.share * total):
                return "language mixing"
        return None


def scripts(text: str) -> dict[str, int]:
    """Letters of each script but Latin that occur in a text."""
    if text.isascii():
        return {}
    counts = {name: len(pattern.findall(text)) for name, pattern in _SCRIPT.items()}
    return {name: count for name, count in counts.items() if count}
