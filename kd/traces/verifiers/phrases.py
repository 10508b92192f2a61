"""Sentences that state an answer: behind "the answer is" in several languages, or the last one."""

from __future__ import annotations

import re

LONGEST = 20_000  # characters of a box or a statement
LEADS = 24

_NAMES = (
    r"answer(?:\s+(?:to|for|of)\s[^.:!?\n]{1,80}?|\s+choice)?|result|r[ée]ponse(?:\s+finale"
    r"|\s+correcte)?|r[ée]sultat|antwort|ergebnis|respuesta(?:\s+(?:final|correcta))?"
    r"|resultado(?:\s+final)?|risposta|risultato|resposta|ответ"
)
_IS = (
    r"is|are|was|must\s+be|should\s+be|would\s+be|will\s+be|can\s+only\s+be|comes\s+to|becomes"
    r"|est|sont|ist|sind|lautet|lauten|es|son|è|é|="
)
_FILLER = re.compile(
    r"(?:[\s:：*_`>]|(?:therefore|thus|hence|then|so|simply|just|indeed|clearly|actually|really"
    r"|also|now|given\s+by|equal\s+to|exactly|donc|alors|also|somit|daher|entonces|por\s+tanto)\b)*",
    re.IGNORECASE,
)
_KEYS = re.compile(
    "####|answer|solution|result|réponse|reponse|résultat|antwort|lösung|losung|ergebnis"
    "|respuesta|solución|solucion|risposta|risultato|resposta|ответ|答案|答え|结果|結果|选项|解"
)
_NAMED = re.compile(rf"(?:{_NAMES})\b[*_\s]*(?::|：|\b(?:{_IS})(?![\w'])|(?<==))", re.IGNORECASE)
_SOLVED = re.compile(  # "Solution:" may open the work as well as close it
    rf"(?:solution|l[öo]sung|soluci[óo]n)s?[*_\s]*(?:\b(?:{_IS})(?![\w'])|:(?=[^\n]+\s*\Z))",
    re.IGNORECASE,
)
_CHINESE = re.compile(r"(?:答案|答え|结果|結果|选项|解)\s*(?:应该|应当|就)?(?:是|为|為|は|：|:)")
_HEADING = re.compile(rf"[#>*_\s]*(?:final\s+)?(?:{_NAMES})[*_\s]*", re.IGNORECASE)
_EMPTY = re.compile(
    r"(?:(?:clear|correct|right|wrong|obvious|as\s+follows|below|above|found|known|consistent"
    r"|verified|confirmed|unique|reasonable|unchanged)\b(?=\s*(?:[.,;:!*]|$|and|because|since|with|for))"
    r"|in\s+the\b|not\b(?!\s.*\bbut\b))",
    re.IGNORECASE | re.MULTILINE,
)
_FAREWELL = re.compile(
    r"\W*(?:let\s+me\s+know|i\s+hope|hope\s+(?:this|that|it)|feel\s+free"
    r"|if\s+you(?:\s+(?:have|need|want|would|are|like)|'d)\b|would\s+you|do\s+you|please|thank|don't\s+hesitate|happy\s+to|just\s+ask|note\s+that|note:|remember|good\s+luck"
    r"|n'h[ée]sit|dites|bonne\s+chance|wenn\s+sie|falls|ich\s+hoffe|espero|si\s+(?:tiene|vous)"
    r"|希望|如果你|如有|done\b|q\.?e\.?d|great|check(?:ing|\s+the)?\b[^=]*$)",
    re.IGNORECASE,
)
_FIRST_REASON = re.compile(
    r"^(?:since|because|as|given(?:\s+that)?|weil|da|comme|como)\s[^,]*(?:,\s*|，)(?=\S)",
    re.IGNORECASE,
)
_BECAUSE = re.compile(
    r",?\s+(?:because|since|which|so\s+that|where|given\s+that|considering"
    r"|as\s+(?:the|it|we|they|this|a)|weil|parce\s+que|porque|puisque)\b|[,，]?\s*因为",
    re.IGNORECASE,
)
_NOT = re.compile(
    r"(?:(?:,\s*|\(\s*|(?<=[\d$}])\s+)(?:and\s+|und\s+|et\s+|y\s+)?|\b(?:and|und|et|y)\s+)"
    r"(?:not|nicht|non|no)\s.*$"
    r"|(?:,\s*|\b)(?:rather\s+than|instead\s+of)\s.*$|，?(?:而不是|不是).*$",
    re.IGNORECASE | re.DOTALL,
)
_NOT_BUT = re.compile(r"^.*?\bnot\s.*?\bbut\s+(?:rather\s+)?", re.IGNORECASE | re.DOTALL)
_ABBREVIATED = re.compile(
    r"(?:^|\W)(?:i\.e|e\.g|[ap]\.m|approx|ca|No|resp|bzw|d\.h|Jan|Feb|Mar|Apr|Aug|Sept?|Oct|Nov"
    r"|Dec)$"
)
_BULLET = re.compile(r"^\s*[-*•]\s+(?=\S)")


def led(text: str) -> str:
    """What stands behind the last "answer is" and its like; empty without one."""
    text = text[-LONGEST:]
    lower = text.lower()
    if len(lower) != len(text):  # a letter whose small form is longer
        lower = text
    for key in reversed(list(_KEYS.finditer(lower))[-LEADS:]):
        end = _lead_end(text, key.start())
        if not end:
            continue
        filler = _FILLER.match(text, end)
        rest = text[filler.end() if filler else end :]
        if filler and "\n" in filler.group():
            rest = _BULLET.sub("", rest)
        if not rest or (text[end - 1] not in ":：" and _EMPTY.match(rest)):
            continue
        said = trimmed(sentence_of(rest))
        if said:
            return said
    return ""


def _lead_end(text: str, at: int) -> int:
    """Where a lead that has its key word at a position ends; 0 when it is none."""
    if text.startswith("####", at):
        return 0 if text[at + 4 : at + 5] == "#" or text[at - 1 : at] == "#" else at + 4
    if text[at].isascii() and text[at - 1 : at].isalnum():
        return 0
    for pattern in (_NAMED, _SOLVED, _CHINESE):
        found = pattern.match(text, at)
        if found:
            return found.end()
    begin, end = text.rfind("\n", 0, at) + 1, text.find("\n", at)
    end = len(text) if end < 0 else end
    return end if _HEADING.fullmatch(text, begin, end) else 0


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
        return trimmed(sentences[-1])
    return text.strip().rpartition("\n")[2][-LONGEST:]


def _sentences(line: str) -> list[str]:
    found = []
    while line.strip():
        sentence = sentence_of(line)
        found.append(sentence)
        line = line.lstrip()[len(sentence) :].lstrip(" .!?。！？")
        if not sentence:
            break
    return [sentence for sentence in found if sentence] or [line]


def sentence_of(text: str) -> str:
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
            if sign == "!" and re.match(r"\s*[=≠<>≤≥≈+*/×÷·-]", rest):  # a factorial
                continue
            closing = re.match(r"[*_]+(?=\s|$)", rest)
            keep = "!" if sign == "!" and not rest.strip("*_ ") else ""
            return line[: match.start()] + keep + (closing.group() if closing else "")
    return line


def _ends(line: str, at: int, dollars: int) -> bool:
    head = line[:at]
    if dollars % 2 and re.search(r"\$\S*\$|\\", line[at:]):
        return False
    if _ABBREVIATED.search(head):
        return False
    return not re.fullmatch(r"[\W_]*[A-Za-z]", head) or at == len(line.rstrip()) - 1


def trimmed(sentence: str) -> str:
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
