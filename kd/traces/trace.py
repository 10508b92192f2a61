"""The record every stage passes on, and the text forms of a thought that it is split from."""

from __future__ import annotations

import hashlib
import json
import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from typing import Any

TEXT_FIELDS = ("prompt", "think", "answer", "system", "source", "domain", "reference")


@dataclass(frozen=True)
class Trace:
    """A question, what a teacher thought about it, and what it answered.

    A question that has not been answered yet is a trace with empty ``think`` and ``answer``.

    Attributes:
        prompt: the user's message.
        think: the reasoning, without its tags.
        answer: what the user is shown.
        system: the system message, if any.
        source: where the record came from; mixing weighs sources.
        domain: "math", "code", ...
        reference: the known right answer, for the verifiers; empty where there is none.
        metadata: anything else that JSON can hold (verdict, tests, token counts, ...).
    """

    prompt: str
    think: str = ""
    answer: str = ""
    system: str = ""
    source: str = ""
    domain: str = ""
    reference: str = ""
    metadata: Mapping[str, Any] = field(default_factory=dict, hash=False)

    def __post_init__(self) -> None:
        for name in TEXT_FIELDS:
            value = getattr(self, name)
            if not isinstance(value, str):
                raise TypeError(
                    f"Trace: {name} must be text, got {type(value).__name__}. "
                    "Convert it, or put it into metadata."
                )
        if not isinstance(self.metadata, Mapping):
            raise TypeError(
                f"Trace: metadata must be a mapping, got {type(self.metadata).__name__}. "
                "Pass a dict that JSON can hold."
            )

    @property
    def id(self) -> str:
        """A digest of what was asked and answered; equal content has an equal id anywhere."""
        digest = hashlib.blake2b(digest_size=16)
        for part in (self.system, self.prompt, self.think, self.answer):
            encoded = part.encode("utf-8", "surrogatepass")
            digest.update(len(encoded).to_bytes(8, "little"))
            digest.update(encoded)
        return digest.hexdigest()

    def replace(self, **changes: Any) -> Trace:
        """A copy with some fields changed."""
        return Trace(**{**vars(self), **changes})

    def note(self, **entries: Any) -> Trace:
        """A copy whose metadata also holds these entries."""
        return self.replace(metadata={**self.metadata, **entries})

    def to_dict(self) -> dict[str, Any]:
        """A dict that JSON can hold; ``Trace.from_dict`` reads it back."""
        plain: dict[str, Any] = {name: getattr(self, name) for name in TEXT_FIELDS}
        plain["metadata"] = dict(self.metadata)
        return plain

    @classmethod
    def from_dict(cls, record: Mapping[str, Any]) -> Trace:
        """Read what ``to_dict`` made; metadata may also be JSON text, as Parquet files hold it."""
        metadata = record.get("metadata") or {}
        if isinstance(metadata, str):
            metadata = json.loads(metadata)
        texts: dict[str, Any] = {name: record.get(name) for name in TEXT_FIELDS}
        texts = {name: "" if text is None else text for name, text in texts.items()}
        return cls(metadata=metadata, **texts)


@dataclass(frozen=True)
class Tags:
    """How a thought and its answer are written as one text.

    Attributes:
        start: before the thought.
        middle: between the thought and the answer.
        end: after the answer.
    """

    start: str
    middle: str
    end: str = ""

    def write(self, think: str, answer: str) -> str:
        """The completion a student learns; an answer without a thought is written alone."""
        if not think:
            return answer
        return f"{self.start}{think}{self.middle}{answer}{self.end}"


R1 = Tags("<think>\n", "\n</think>\n\n")
COMPACT = Tags("<think>", "</think>")
SKY_T1 = Tags(
    "<|begin_of_thought|>\n\n",
    "\n\n<|end_of_thought|>\n\n<|begin_of_solution|>\n\n",
    "\n\n<|end_of_solution|>",
)
TAGS = {"r1": R1, "compact": COMPACT, "sky_t1": SKY_T1}
# (opens a thought, closes it); what a lone tag of another family means is for lint to say
MARKS = (
    ("<think>", "</think>"),
    ("<|begin_of_thought|>", "<|end_of_thought|>"),
    ("<thinking>", "</thinking>"),
    ("<thought>", "</thought>"),
    ("<reasoning>", "</reasoning>"),
    ("[THINK]", "[/THINK]"),
    ("<seed:think>", "</seed:think>"),
    ("\u25c1think\u25b7", "\u25c1/think\u25b7"),
    ("<|START_THINKING|>", "<|END_THINKING|>"),
    ("<unused94>thought", "<unused95>"),
    ("Here is my thought process:", "Here is my response:"),
    ("Here are my reasoning steps:", "[BEGIN FINAL RESPONSE]"),
)
# what may enclose the answer after a thought
ENCLOSURES = (
    ("<|begin_of_solution|>", "<|end_of_solution|>"),
    ("<answer>", "</answer>"),
    ("<output>", "</output>"),
    ("<response>", "</response>"),
    ("<solution>", "</solution>"),
    ("<|START_RESPONSE|>", "<|END_RESPONSE|>"),
    ("", "[END FINAL RESPONSE]"),
)
CHANNEL, MESSAGE = "<|channel|>", "<|message|>"
_ENDS = re.compile(r"<\|(?:end|return|start)\|>(?:assistant)?")
# any of these in a text that has been split is a mark that nobody has understood
_LEFT = re.compile(
    r"</?(?:[a-z]{1,20}[:_]){0,3}(?:think(?:ing)?|thoughts?|reasoning|rationale|scratch_?pad|monologue"
    r"|reflection|answer)>|<\|?/?(?:[a-z]{1,20}_){0,3}(?:channel|unused9[45])\|?>"
    r"|<\|/?(?:[a-z]{1,20}_){0,3}(?:think(?:ing)?|thoughts?|solution|response)\|>"
    "|\\[/?think\\]|\u25c1/?think\u25b7",
    re.IGNORECASE,
)
_TAG = re.compile(r"\s*<(think|thinking|thought|reasoning)>", re.IGNORECASE)


def has_marks(text: str) -> bool:
    """Whether a text holds a mark of a thought or of its answer, of any family."""
    marked = "<" in text or "[" in text or "\u25c1" in text
    return marked and _LEFT.search(text) is not None


def split_completion(text: str, *, prefilled: bool = False) -> tuple[str, str]:
    """Split what a model wrote into (think, answer).

    The family of tags that comes first counts, and the thought ends at its *first* closing tag;
    anything that does not fit (a second tag, a missing one) stays in the texts, where ``Lint``
    finds and names it.

    Args:
        text: the completion, with the tags of R1 and Qwen, Sky-T1, Mistral, Kimi, Seed, Cohere,
            ``<thinking>``, ``<thought>``, ``<reasoning>``, gpt-oss's channels, or with none.
        prefilled: the prompt already opened the thought (newer R1 templates do), so that the
            text starts inside it.

    Returns:
        The two texts, stripped. Without any tag the whole text is the answer; a thought that
        never ends has an empty answer.
    """
    if CHANNEL in text or (text.startswith("analysis") and "assistantfinal" in text):
        return _channels(text)
    found = [
        (min(at for at in places if at >= 0), marks, places)
        for marks in _candidates(text)
        if max(places := (text.find(marks[0]), text.find(marks[1]))) >= 0
    ]
    if not found:
        shouted = _TAG.match(text)
        if shouted:  # <THINK>, <Thought>: read as its lower case is
            name = shouted[1].lower()
            lower = re.sub(f"<(/?){name}>", rf"<\1{name}>", text, flags=re.IGNORECASE)
            if lower != text:
                return split_completion(lower)
        return (text.strip(), "") if prefilled else ("", text.strip())
    _, (start, close), (opened, closed) = min(found)
    begin = 0
    if opened >= 0 and not 0 <= closed < opened:
        # words before the tag stay in the thought, tag and all, for lint to see
        begin = 0 if text[:opened].strip() else opened + len(start)
        closed = text.find(close, opened)
    if closed < 0:
        return text[begin:].strip(), ""
    return text[begin:closed].strip(), _opened(text[closed + len(close) :].strip())


def _candidates(text: str) -> Iterable[tuple[str, str]]:
    """The families of tags that may come first in a text."""
    if "<" not in text and "[" not in text and "\u25c1" not in text and "Here " not in text[:8]:
        return ()
    begins = next((marks for marks in MARKS if text.startswith(marks[0])), None)
    return MARKS if begins is None else (begins,)


def _opened(answer: str) -> str:
    """An answer without the tags around it."""
    for start, end in ENCLOSURES:
        if answer[: len(start)].lower() == start.lower():
            inner = answer[len(start) :]
            ends = inner.lower().endswith(end.lower())
            return inner[: len(inner) - len(end)].strip() if ends else inner.strip()
    return answer


def _channels(text: str) -> tuple[str, str]:
    """gpt-oss's harmony text; where its special tokens were stripped, the words between remain."""
    if CHANNEL not in text:
        think, _, answer = text.removeprefix("analysis").partition("assistantfinal")
        return think.strip(), answer.strip()
    before, *parts = text.split(CHANNEL)
    thoughts, answers = [], [before.replace("<|start|>assistant", "")]
    for part in parts:
        name, found, said = part.partition(MESSAGE)
        end = _ENDS.search(said)
        body = said[: end.start()] if end else said
        after = _ENDS.sub("", said[end.start() :]).strip() if end else ""
        if name.strip() == "analysis" and found:
            thoughts.append(body.strip())
        elif name.strip() == "final" and found:
            answers.append(body.strip())
        else:  # a call of a tool: left as it is, for lint to see
            answers.append(CHANNEL + part)
            continue
        answers.append(after)
    return "\n\n".join(thoughts).strip(), "\n\n".join(filter(None, answers)).strip()
