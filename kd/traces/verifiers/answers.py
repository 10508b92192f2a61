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

LONGEST = 20_000  # characters of a box or a statement
TAIL = 200_000  # characters of an answer that are looked at, from its end
BOXES = 16
LEADS = 24

_BOX = re.compile(r"\\(?:boxed|fbox|framebox)\s*")
_BARE = re.compile(
    r"-?\d[\d.,]*\d|-?\d|[A-Za-z](?![A-Za-z])|\\[a-z]*frac\s*\d\d|\\text\s*\{[^{}]*\}"
)
_JOIN = re.compile(
    r"[\s$,;()\[\]\\]*(?:and|or|und|oder|et|ou|sowie|y|或|和|以及|、)?[\s$,()\[\]\\*]*"
    r"(?:[A-Za-z](?:_\{?\w\}?)?\s*=[\s$]*)?"
)
_NAMES = (
    r"answer(?:\s+(?:to|for|of)\s[^.:!?\n]{1,80}?|\s+choice)?|result|r[ée]ponse(?:\s+finale"
    r"|\s+correcte)?|r[ée]sultat|antwort|ergebnis|respuesta(?:\s+(?:final|correcta))?"
    r"|resultado(?:\s+final)?|risposta|risultato|resposta|ответ"
)
_IS = (
    r"is|are|was|must\s+be|should\s+be|would\s+be|will\s+be|can\s+only\s+be|comes\s+to|becomes|est|sont"
    r"|ist|sind|lautet|lauten|es|son|è|é|="
)
_FILLER = re.compile(
    r"(?:[\s:：*_`>]|(?:therefore|thus|hence|then|so|simply|just|indeed|clearly|actually|really|also|now"
    r"|given\s+by|equal\s+to|exactly|donc|alors|also|somit|daher|entonces|por\s+tanto)\b)*",
    re.IGNORECASE,
)
_LEAD = re.compile(
    rf"####(?!#)|\b(?:solution|l[öo]sung|soluci[óo]n)s?[*_\s]*(?:\b(?:{_IS})(?![\w'])|:(?=[^\n]+\s*\Z))|\b(?:{_NAMES})\b[*_\s]*(?::|：|\b(?:{_IS})(?![\w'])|(?<==))"
    rf"|^[#>*_\s]*(?:final\s+)?(?:{_NAMES})[*_\s]*$"
    r"|(?:答案|答え|结果|結果|选项|解)\s*(?:应该|应当|就)?(?:是|为|為|は|：|:)",
    re.IGNORECASE | re.MULTILINE,
)
_EMPTY = re.compile(
    r"(?:clear|correct|right|wrong|obvious|as\s+follows|below|above|found|known|consistent|verified"
    r"|confirmed|unique|reasonable|unchanged|in\s+the|not(?!\s.*\bbut\b))\b",
    re.IGNORECASE,
)
_FAREWELL = re.compile(
    r"\W*(?:let\s+me\s+know|i\s+hope|hope\s+(?:this|that|it)|feel\s+free|if\s+you|would\s+you|do\s+you"
    r"|please|thank|don't\s+hesitate|happy\s+to|just\s+ask|note\s+that|note:|remember|good\s+luck"
    r"|n'h[ée]sit|dites|bonne\s+chance|wenn\s+sie|falls|ich\s+hoffe|espero|si\s+(?:tiene|vous)"
    r"|希望|如果你|如有|done\b|q\.?e\.?d|great|check(?:ing|\s+the)?\b[^=]*$)",
    re.IGNORECASE,
)
_FIRST_REASON = re.compile(
    r"^(?:since|because|as|given(?:\s+that)?|weil|da|comme|como)\s[^,]*(?:,\s*|，)(?=\S)",
    re.IGNORECASE,
)
_BECAUSE = re.compile(
    r",?\s+(?:because|since|which|so\s+that|where|given\s+that|considering|as\s+(?:the|it|we|they|this|a)"
    r"|weil|parce\s+que|porque|puisque)\b|[,，]?\s*因为",
    re.IGNORECASE,
)
_NOT = re.compile(
    r"(?:(?:,\s*|\(\s*|(?<=[\d$}])\s+)(?:and\s+|und\s+|et\s+|y\s+)?|\b(?:and|und|et|y)\s+)"
    r"(?:not|nicht|non|no)\s.*$"
    r"|(?:,\s*|\b)(?:rather\s+than|instead\s+of)\s.*$|，?(?:而不是|不是).*$",
    re.IGNORECASE | re.DOTALL,
)
_NOT_BUT = re.compile(r"^.*?\bnot\s.*?\bbut\s+(?:rather\s+)?", re.IGNORECASE | re.DOTALL)
_BULLET = re.compile(r"^\s*[-*•]\s+(?=\S)")
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
    if "\n" in text:
        text = _on_one_line(text)
    boxes = _boxes(text) if "box" in text else []
    if not boxes:
        said = _led(text) or last_sentence(text)
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
    return Statement(", ".join(stated), True, wider, _led(text[boxes[-1][1] :]))


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


def _led(text: str) -> str:
    """What stands behind the last "answer is" and its like; empty without one."""
    found = list(_LEAD.finditer(text[-LONGEST:]))
    text = text[-LONGEST:]
    for lead in reversed(found[-LEADS:]):
        filler = _FILLER.match(text, lead.end())
        rest = text[filler.end() if filler else lead.end() :]
        if filler and "\n" in filler.group():
            rest = _BULLET.sub("", rest)
        if not rest or _EMPTY.match(rest):
            continue
        said = _trimmed(_sentence(rest))
        if said:
            return said
    return ""


def last_sentence(text: str) -> str:
    """The last sentence that is neither a farewell nor a rule."""
    lines = [line.strip() for line in text[-LONGEST:].splitlines()]
    lines = [line for line in lines if re.search(r"[^\W_]|[{}\\∅∞½√]", line)]
    for line in reversed([line for line in lines if not _FAREWELL.match(line)] or lines):
        sentences = _sentences(_BULLET.sub("", line) if len(lines) > 1 else line)
        while len(sentences) > 1 and (
            _FAREWELL.match(sentences[-1])
            or not re.search(r"[\w\\]", sentences[-1])
            or (re.fullmatch(r"(?:yes|correct|right|good)", sentences[-1], re.IGNORECASE)
                and re.search(r"\d", sentences[-2]))
        ):  # fmt: skip
            sentences.pop()
        return _trimmed(sentences[-1])
    return ""


def _sentences(line: str) -> list[str]:
    found = []
    while line.strip():
        sentence = _sentence(line)
        found.append(sentence)
        line = line.lstrip()[len(sentence) :].lstrip(" .!?。！？")
        if not sentence:
            break
    return [sentence for sentence in found if sentence] or [line]


def _sentence(text: str) -> str:
    """The first sentence of the first line; full stops in formulas and numbers do not end it."""
    line = text.lstrip().split("\n", 1)[0].rstrip()
    depth = dollars = 0
    for match in re.finditer(r"\\[()\[\]]|[{}$]|[.!?](?=[\s*_]|$)|[。！？]", line):
        sign = match.group()
        if sign in ("{", "\\(", "\\["):
            depth += 1
        elif sign in ("}", "\\)", "\\]"):
            depth -= 1
        elif sign == "$":
            dollars += 1
        elif sign in "。！？":
            return line[: match.start()]
        elif depth <= 0 and _ends(line, match.start(), dollars):
            rest = line[match.end() :]
            closing = re.match(r"[*_]+(?=\s|$)", rest)
            keep = "!" if sign == "!" and not rest.strip("*_ ") else ""
            return line[: match.start()] + keep + (closing.group() if closing else "")
    return line


def _ends(line: str, at: int, dollars: int) -> bool:
    head = line[:at]
    if dollars % 2 and re.search(r"\$\S*\$|\\", line[at:]):
        return False
    if re.search(
        r"(?:^|\W)(?:i\.e|e\.g|[ap]\.m|approx|ca|No|resp|bzw|d\.h|Jan|Feb|Mar|Apr|Aug|Sept?|Oct|Nov|Dec)$",
        head,
    ):
        return False
    return not re.fullmatch(r"[\W_]*[A-Za-z]", head) or at == len(line.rstrip()) - 1


def _trimmed(sentence: str) -> str:
    """A sentence without its reasons, what it denies, and its punctuation."""
    if re.search(r"\bnot\s.*\bbut\b", sentence, re.IGNORECASE):
        sentence = _NOT_BUT.sub("", sentence)
    else:
        denied = _NOT.search(sentence)
        if denied and re.search(r"\w", sentence[: denied.start()]):
            sentence = sentence[: denied.start()]
    sentence = _FIRST_REASON.sub("", sentence)
    reason = _BECAUSE.search(sentence)
    if reason and re.search(r"\w", sentence[: reason.start()]):
        sentence = sentence[: reason.start()]
    sentence = re.sub(r"\s*\(\s*(?:i\.e\.|that is|or |since|because)[^()]*\)\s*$", "", sentence)
    _, found, rest = sentence.rpartition("i.e.")
    sentence = (rest.lstrip(" ,") if found else sentence).strip().rstrip(".,;:。，；：").strip()
    return sentence.strip("*").rstrip(".,;:") if sentence.count("**") % 2 else sentence
