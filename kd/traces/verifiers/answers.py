r"""What an answer says in the end: its last box, or what stands behind its last "the answer is".

One extractor for every verifier. It reads the styles of R1, QwQ, Qwen, Llama, DeepSeek and GPT:
boxes in all spellings, ``#### 42``, ``**Answer:** 42``, headings, ``<answer>`` tags, "The final
answer is: ...", the same in French, German, Spanish and Chinese, and else the last sentence that
is no farewell.
"""

from __future__ import annotations

import re
from dataclasses import dataclass

from kd.traces.verifiers.maths.plain import segments
from kd.traces.verifiers.phrases import LONGEST, last_sentence, led

TAIL = 200_000  # characters of an answer that are looked at, from its end
BOXES = 16

_BOX = re.compile(r"\\(?:boxed|fbox|framebox)\s*")
_BARE = re.compile(
    r"-?\d[\d.,]*\d|-?\d|[A-Za-z](?![A-Za-z])|\\[a-z]*frac\s*\d\d|\\text\s*\{[^{}]*\}"
)
_JOIN = re.compile(
    r"[\s$,;()\[\]\\]*(?:and|or|und|oder|et|ou|sowie|y|或|和|以及|、)?[\s$,()\[\]\\*]*"
    r"(?:[A-Za-z](?:_\{?\w\}?)?\s*=[\s$]*)?"
)
_TAGGED = re.compile(r"<answer>(.*?)</answer>", re.DOTALL | re.IGNORECASE)


@dataclass(frozen=True)
class Statement:
    """The final statement of an answer.

    Attributes:
        text: the content of the box, or the words of the statement.
        boxed: it stood in a box.
        wider: readings that take in more (every box, not the last one alone); they can only cast
            doubt on "wrong".
        later: a statement behind the box; where it says something else, nothing is decided.
        exclaimed: it is part of a sentence and ends on "!", which may be a factorial.
    """

    text: str
    boxed: bool = False
    wider: tuple[str, ...] = ()
    later: str = ""
    exclaimed: bool = False


def final_answer(answer: str) -> str:
    """The text of an answer's last statement; see the module. Empty for an empty answer."""
    return final_statement(answer).text


def final_statement(answer: str) -> Statement:
    """The last statement of an answer, and what casts doubt on it."""
    text = answer[-TAIL:].replace("\r\n", "\n")
    tagged = _TAGGED.findall(text) if "</answer>" in text.lower() else []
    if tagged and tagged[-1].strip():
        text = tagged[-1]
    if "\n" in text and ("$" in text or "\\" in text):
        text = _on_one_line(text)
    boxes = _boxes(text) if "box" in text else []
    if not boxes:
        said = led(text) or last_sentence(text)
        return Statement(said, exclaimed=said.endswith("!") and said != text.strip())
    joined = [boxes[-1]]
    for box in reversed(boxes[:-1]):
        between = text[box[1] : joined[0][0]]
        if len(between) > 60 or not _JOIN.fullmatch(between):
            break
        joined.insert(0, box)
    every = _distinct(boxes)
    stated = _distinct(joined)
    wider = (", ".join(every),) if len(every) > len(stated) else ()
    return Statement(", ".join(stated), True, wider, led(text[boxes[-1][1] :]))


def _on_one_line(text: str) -> str:
    """Formulas that run over several lines, on one each."""
    parts, at = [], 0
    for begin, end, _ in segments(text):
        parts += [text[at:begin], text[begin:end].replace("\n", " ")]
        at = end
    return "".join((*parts, text[at:]))


def last_boxed(text: str) -> str | None:
    r"""The content of the last box, braces balanced; None without one."""
    boxes = _boxes(text[-TAIL:])
    return boxes[-1][2] if boxes else None


def _distinct(boxes: list[tuple[int, int, str]]) -> list[str]:
    return list(dict.fromkeys(content for _, _, content in boxes))


def _boxes(text: str) -> list[tuple[int, int, str]]:
    """(begin, end, content) of the last boxes that are complete."""
    found = []
    for match in list(_BOX.finditer(text))[-BOXES:]:
        begin = match.end()
        if text[begin : begin + 1] == "{":
            stop = _closing(text, begin)
            content = text[begin + 1 : stop] if stop else ""
            stop += 1
        else:
            bare = _BARE.match(text, begin)
            content, stop = (bare.group(), bare.end()) if bare else ("", 0)
        if content.strip():
            percent = re.match(r"\s*\\?%", text[stop : stop + 8])
            sign = re.search(
                r"(?:^|[=$(:\s])(-\s*)$", text[max(0, match.start() - 6) : match.start()]
            )
            content = ("-" if sign else "") + content.strip() + ("%" if percent else "")
            found.append((match.start(), stop + (percent.end() if percent else 0), content))
    starts = [begin for begin, _, _ in found[1:]]
    outer = [start < box[1] for start, box in zip(starts, found, strict=False)]  # holds the next
    return [box for box, holds in zip(found, [*outer, False], strict=False) if not holds]


def _closing(text: str, begin: int) -> int:
    """Where the brace that opens at ``begin`` closes; 0 when it does not."""
    depth = 0
    for match in re.finditer(r"[{}]", text[begin : begin + LONGEST]):
        depth += 1 if match.group() == "{" else -1
        if depth == 0:
            return begin + match.start()
    return 0
