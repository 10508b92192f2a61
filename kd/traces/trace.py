"""The record every stage passes on, and the text forms of a thought that it is split from."""

from __future__ import annotations

import dataclasses
import hashlib
import json
from collections.abc import Mapping
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
        return dataclasses.replace(self, **changes)

    def note(self, **entries: Any) -> Trace:
        """A copy whose metadata also holds these entries."""
        return dataclasses.replace(self, metadata={**self.metadata, **entries})

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
        texts = {name: record.get(name) or "" for name in TEXT_FIELDS}
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
# (opens a thought, closes it, opens the answer, closes it); the last two may be missing in a text
MARKS = (
    ("<think>", "</think>", "", ""),
    (
        "<|begin_of_thought|>",
        "<|end_of_thought|>",
        "<|begin_of_solution|>",
        "<|end_of_solution|>",
    ),
    ("<thinking>", "</thinking>", "", ""),
    ("<reasoning>", "</reasoning>", "<answer>", "</answer>"),
)
ALL_MARKS = tuple(mark for marks in MARKS for mark in marks if mark)


def split_completion(text: str, *, prefilled: bool = False) -> tuple[str, str]:
    """Split what a model wrote into (think, answer).

    The thought ends at the *first* closing tag; anything that does not fit (a second tag, a
    missing one) stays in the texts, where ``lint`` finds and names it.

    Args:
        text: the completion, with ``<think>``, ``<|begin_of_thought|>``, ``<thinking>`` or
            ``<reasoning>`` tags, or with none.
        prefilled: the prompt already opened the thought (newer R1 templates do), so that the
            text starts inside it.

    Returns:
        The two texts, stripped. Without any tag the whole text is the answer; a thought that
        never ends has an empty answer.
    """
    for start, close, answer_start, answer_end in MARKS:
        opened, closed = text.find(start), text.find(close)
        if opened < 0 and closed < 0:
            continue
        begin = 0
        if opened >= 0 and not 0 <= closed < opened:
            # words before the tag stay in the thought, tag and all, for lint to see
            begin = 0 if text[:opened].strip() else opened + len(start)
            closed = text.find(close, opened)
        if closed < 0:
            return text[begin:].strip(), ""
        answer = text[closed + len(close) :].strip()
        return text[begin:closed].strip(), _unwrap(answer, answer_start, answer_end)
    return (text.strip(), "") if prefilled else ("", text.strip())


def _unwrap(answer: str, start: str, end: str) -> str:
    if start and answer.startswith(start):
        answer = answer[len(start) :]
        if answer.rstrip().endswith(end):
            answer = answer.rstrip()[: -len(end)]
    return answer.strip()
