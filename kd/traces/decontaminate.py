"""Removes what evaluation sets ask: whole questions, shared word runs and look-alikes, with the
evidence."""

from __future__ import annotations

import math
import re
from bisect import bisect, bisect_left
from collections import Counter
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from itertools import accumulate, chain
from typing import Any

from kd.traces.counts import DropCounts
from kd.traces.trace import Trace
from kd.traces.words import OPERATORS, plain, tokens, words

KEY = 4  # words that lead from a text to a question
STRIDE = 5  # words from one look at a thought to the next
COMMON = 32  # a key of more questions leads to none, but for the rarest of each question
PHRASE = 5  # words that several questions share are a phrase, and no question's own
SMALL = 8  # own pairs of the shortest question that has look-alikes
LEAST = 3  # words of the shortest question that is looked for inside a text
_SIGNS = re.escape(OPERATORS.replace("-", ""))
# the end of a sentence, or of a formula that does not go on
_CLOSED = r"(?:[)\]}$*]|\\[)\]])"
_STOP = r"(?:\Z|\n|[?!;:\"\u201d\u00bb\u3002\u2026]|[.,](?!\d)|'(?!\w))"
_ON = rf"[^\S\n]*[{_SIGNS}^/\\({{_'-]"
_END = rf"(?={_CLOSED}*[^\S\n]*=?[^\S\n]*{_STOP}|{_CLOSED}+(?!{_CLOSED}|{_ON}))"


@dataclass
class _Question:
    """A question's words; ``own[i]`` is the weight of those before i that it does not share."""

    words: list[str]
    own: list[int]
    first: int  # where its own words begin
    last: int  # and end
    pattern: re.Pattern[str] | None = None


@dataclass
class Evaluations:
    """An index of evaluation questions.

    Runs of words that several questions share ("Put your final answer within") are nobody's own
    and do not count. A letter, a digit, and a letter of a script without spaces is half a word.

    Attributes:
        n: own words in a row that are enough to be a leak in a prompt (open-r1 uses 8).
        quoted: likewise in a thought or an answer, where more is said.
        fuzzy: share of a prompt's or question's own word pairs in common, from which they are
            alike.
    """

    n: int = 8
    fuzzy: float = 0.8
    quoted: int = 13
    texts: list[tuple[str, int, str]] = field(default_factory=list)
    _questions: list[_Question] = field(default_factory=list)
    _whole: dict[str, int] = field(default_factory=dict)
    _keys: dict[tuple[str, ...], list[tuple[int, int]]] = field(default_factory=dict)
    _short: bool = False  # whether there are keys of LEAST words
    _phrases: set[tuple[str, ...]] = field(default_factory=set)
    _pairs: dict[tuple[str, ...], list[int]] = field(default_factory=dict)
    _sets: list[set[tuple[str, ...]]] = field(default_factory=list)
    _sizes: list[int] = field(default_factory=list)

    def add(self, name: str, questions: Iterable[str]) -> Evaluations:
        """Index the questions of a set."""
        for number, question in enumerate(questions):
            self.texts.append((name, number, question))
        self._questions = []
        return self

    def match(self, text: str, *, asked: bool = True) -> dict[str, Any] | None:
        """The first leak in a text: kind, set, number, question, and what they share.

        Args:
            text: a prompt, a thought or an answer.
            asked: whether the text is a prompt: short questions and look-alikes are found in
                prompts alone.
        """
        if not self._questions:
            self._build()
        found = words(text)
        if not found:
            return None
        at = self._whole.get(" ".join(found), -1) if asked else -1
        if at >= 0 and tokens(text) == tokens(self.texts[at][2]):
            return self._evidence("exact", at, " ".join(found)[:300], 1.0)
        return self._inside(text, found, asked) or (self._alike(found) if asked else None)

    def _build(self) -> None:
        self._whole, self._keys, self._pairs, self._sets = {}, {}, {}, []
        asked = [words(question) for _, _, question in self.texts]
        for at, said in enumerate(asked):
            self._whole.setdefault(" ".join(said), at)
        different = [asked[at] for at in self._whole.values()]
        phrases = Counter(run for said in different for run in set(_runs(said, PHRASE)))
        often = max(3, len(different) // 100)
        few = len(different) / 2  # in a small set, what half of its questions share
        self._phrases = {run for run, n in phrases.items() if n >= often or 2 <= n >= few}
        self._questions = [self._question(said) for said in asked]
        keys = Counter(key for said in different for key in set(_runs(said, KEY)))
        for at, question in enumerate(self._questions):
            self._index(at, question, keys)
        self._sizes = sorted(len(pairs) for pairs in self._sets if len(pairs) >= SMALL)

    def _question(self, said: list[str]) -> _Question:
        shared = self._shared(said)
        weights = [0 if shared[i] else _weight(word) for i, word in enumerate(said)]
        mine = [i for i, weight in enumerate(weights) if weight] or [0]
        first, last = mine[0], mine[-1] + 1
        if last - first < LEAST:
            first, last = 0, len(said)
        return _Question(said, [0, *accumulate(weights)], first, last)

    def _shared(self, said: Sequence[str]) -> bytearray:
        """Which words are part of a phrase."""
        marks = bytearray(len(said))
        if self._phrases and not self._phrases.isdisjoint(_runs(said, PHRASE)):
            for i, run in enumerate(_runs(said, PHRASE)):
                if run in self._phrases:
                    marks[i : i + PHRASE] = b"\1" * PHRASE
        return marks

    def _index(self, at: int, question: _Question, counts: Counter[tuple[str, ...]]) -> None:
        said, own = question.words, question.own
        if LEAST <= len(said) < KEY or LEAST <= question.last - question.first < KEY:
            key = tuple(said[question.first : question.first + LEAST])
            self._keys.setdefault(key, []).append((at, question.first))
            self._short = True
        found = list(_runs(said, KEY))
        inside = range(question.first, question.last - KEY + 1)
        rarest = min(inside, key=lambda i: counts[found[i]], default=0)
        for i, key in enumerate(found):
            mine = own[i + KEY] > own[i] and counts[key] <= COMMON
            # a thought is probed at every STRIDE-th word: of so many keys in a row one is met
            if mine or abs(2 * (i - rarest) - 1) < STRIDE:
                self._keys.setdefault(key, []).append((at, i))
        marks = self._shared(said)
        pairs = {pair for i, pair in enumerate(_runs(said, 2)) if not (marks[i] or marks[i + 1])}
        self._sets.append(pairs)
        for pair in pairs:
            self._pairs.setdefault(pair, []).append(at)

    def _inside(self, text: str, found: list[str], asked: bool) -> dict[str, Any] | None:
        """A question within the text, or a run of its own words."""
        need, size = (self.n, LEAST) if asked else (self.quoted, KEY + STRIDE - 1)
        step = 1 if asked else STRIDE
        for length in (KEY, LEAST) if asked and self._short else (KEY,):
            probes = zip(*(found[i::step] for i in range(length)), strict=False)
            if self._keys.keys().isdisjoint(probes):
                continue
            for i in range(0, len(found) - length + 1, step):
                for at, offset in self._keys.get(tuple(found[i : i + length]), ()):
                    kind = self._extent(text, found, i, at, offset, need, size)
                    if kind:
                        return kind
        return None

    def _extent(
        self, text: str, found: list[str], i: int, at: int, offset: int, need: int, size: int
    ) -> dict[str, Any] | None:
        """How far text and question agree around a key, and whether that is enough."""
        question = self._questions[at]
        said = question.words
        back = 0
        while back < min(i, offset) and found[i - back - 1] == said[offset - back - 1]:
            back += 1
        ahead, most = 0, min(len(found) - i, len(said) - offset)
        while ahead < most and found[i + ahead] == said[offset + ahead]:
            ahead += 1
        begin, end = offset - back, offset + ahead
        shared = " ".join(said[begin:end])[:300]
        if question.own[end] - question.own[begin] >= 2 * need:
            return self._evidence(f"{need}-gram", at, shared, 1.0)
        whole = begin <= question.first and question.last <= end
        if whole and question.last - question.first >= size and self._asks(text, at):
            return self._evidence("question", at, shared, 1.0)
        return None

    def _asks(self, text: str, at: int) -> bool:
        """Whether a text holds a short question with its operators, up to its end."""
        question = self._questions[at]
        if question.pattern is None:
            count, kept = 0, []
            for token in tokens(self.texts[at][2]):
                # words have their digits one by one
                count += len(token) if token.isdecimal() else token not in OPERATORS
                if question.first < count <= question.last:
                    kept.append(token)
            question.pattern = _pattern(kept, plain(self.texts[at][2]).casefold())
        return question.pattern.search(plain(text).casefold()) is not None

    def _alike(self, found: Sequence[str]) -> dict[str, Any] | None:
        """A question that shares most of its own word pairs with the text."""
        if len(found) > 2000:
            return None
        pairs = self._own_pairs(found)
        needed = math.ceil(self.fuzzy * len(pairs) - 1e-9)
        near = bisect(self._sizes, len(pairs) / self.fuzzy) - bisect_left(self._sizes, needed)
        if near <= 0:  # no question is as long
            return None
        # as much in common as asked for means one of the rarest in common: the others need no look
        asking = sorted((self._pairs[pair] for pair in pairs if pair in self._pairs), key=len)
        if len(asking) < needed:
            return None
        for at in dict.fromkeys(chain.from_iterable(asking[: len(asking) - needed + 1])):
            theirs = self._sets[at]
            if len(theirs) < SMALL or needed > len(theirs):
                continue
            common = len(pairs & theirs)
            score = common / (len(pairs) + len(theirs) - common)
            if score >= self.fuzzy:
                return self._evidence("fuzzy", at, " ".join(found)[:300], round(score, 3))
        return None

    def _own_pairs(self, said: Sequence[str]) -> set[tuple[str, ...]]:
        """Neighbouring words, but for those in phrases."""
        marks = self._shared(said)
        runs = _runs(said, 2)
        if 1 not in marks:
            return set(runs)
        return {pair for i, pair in enumerate(runs) if not (marks[i] or marks[i + 1])}

    def _evidence(self, kind: str, at: int, shared: str, score: float) -> dict[str, Any]:
        name, number, question = self.texts[at]
        return {
            "kind": kind,
            "set": name,
            "number": number,
            "question": question[:500],
            "shared": shared,
            "score": score,
        }


def _runs(said: Sequence[str], size: int) -> Iterator[tuple[str, ...]]:
    return zip(*(said[i:] for i in range(size)), strict=False)


def _pattern(said: list[str], question: str) -> re.Pattern[str]:
    """Words and operators with anything but those between them; a sentence ends after them where
    one ends in the question."""
    while said and said[-1] in OPERATORS:
        said.pop()
    parts = ["(?<![a-z])" if said[0].isascii() and said[0].isalpha() else r"(?<!\d)"]
    for token, after in zip(said, [*said[1:], ""], strict=True):
        # between two words a hyphen is no operator; two numbers have something between them
        signs = _SIGNS if token.isalpha() and after.isalpha() else _SIGNS + "-"
        many = "+" if token.isdecimal() and after.isdecimal() else "*"
        parts.append(re.escape(token) + (rf"(?:[^\w{signs}]|_){many}" if after else ""))
    body = "".join(parts)
    return re.compile(body + (_END if re.search(body + _END, question) else r"(?![^\W_])"))


def _weight(word: str) -> int:
    """A word is 2; a letter, a digit or a letter of a script without spaces is 1."""
    return 1 if len(word) == 1 else 2


def decontaminate(
    traces: Iterable[Trace],
    evaluations: Evaluations,
    *,
    report: DropCounts,
    evidence: list[dict[str, Any]] | None = None,
    fields: Sequence[str] = ("prompt", "think", "answer"),
    stage: str = "decontaminate",
) -> Iterator[Trace]:
    """Drop traces that ask, or quote, an evaluation question.

    Args:
        traces: what to look through.
        evaluations: the index.
        report: takes the counts, by evaluation set and kind.
        evidence: takes one row per dropped trace: its id and index, the field, and the match.
        fields: of the trace, looked through.
        stage: the stage's name in the report.
    """
    counted = report.stage(stage)
    for number, trace in enumerate(traces):
        found = None
        with counted.timed():
            for name in fields:
                found = evaluations.match(getattr(trace, name), asked=name == "prompt")
                if found:
                    break
        if not found:
            counted.keep()
            yield trace
            continue
        detail = f"{found['set']} {found['number']}, {name}: {found['shared']}"
        counted.drop(f"in {found['set']} ({found['kind']})", trace, detail)
        if evidence is not None:
            row = {"record": number, "id": trace.id, "field": name, "prompt": trace.prompt[:500]}
            evidence.append({**row, **found})
