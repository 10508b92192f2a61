"""What the columns of other people's records are called, and how their values are read."""

from __future__ import annotations

import ast
import json
import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from numbers import Number
from typing import Any

from kd.traces.trace import Trace, split_completion

ROLES = {
    **dict.fromkeys(("user", "human", "prompter", "用户"), "user"),
    **dict.fromkeys(("assistant", "gpt", "model", "bot", "ai", "chatgpt", "bing"), "assistant"),
    **dict.fromkeys(("system", "developer", "系统"), "system"),
    "助手": "assistant",
    **dict.fromkeys(("tool", "function", "observation", "ipython", "environment"), "tool"),
    **dict.fromkeys(("tool_response", "tool_result", "function_response"), "tool"),
    **dict.fromkeys(("tool_call", "function_call"), "tool"),
}
TURNS = ("messages", "conversations", "conversation", "dialogue", "dialog", "turns", "chat")
SYSTEMS = ("system", "system_prompt", "system_message")
REASONING = (
    "reasoning_content",
    "reasoning",
    "thinking",
    "think",
    "thought",
    "thoughts",
    "reasoning_details",
    "deepseek_reasoning",
    "model_reasoning",
    "reasoning_trace",
    "chain_of_thought",
    "complex_cot",
)
QUESTIONS = (
    "prompt",
    "question",
    "problem",
    "instruction",
    "query",
    "input",
    "inputs",
    "user",
    "human",
)
ANSWERS = (
    "response",
    "completion",
    "output",
    "content",
    "deepseek_solution",
    "generated_solution",
    "model_answer",
    "llm_response",
    "solution",
    "answer",
    "attempt",
    "generation",
    "assistant",
    "gpt",
    "targets",
)
SAMPLES = ("generations", "responses", "completions", "outputs", "samples", *ANSWERS)
REFERENCES = (
    "reference",
    "expected_answer",
    "ground_truth",
    "gold",
    "final_answer",
    "ground_truth_solution",
    "reference_answer",
    "gold_answer",
    "gold_standard_solution",
    "correct_answer",
    "gts",
)
# where verl and others keep the reference: in a column of its own kind
NESTED = ("reward_model", "verification_info", "extra_info")
DOMAINS = ("domain", "problem_type", "subject", "category", "cot_type", "ability")
SOURCES = ("source", "source_type", "dataset", "data_source")
_PICTURES = ("<image>", "<video>", "<audio>")  # where a file beside the text belongs
_PLACED = {*SOURCES, *DOMAINS}
KNOWN = {*TURNS, *SYSTEMS, *REASONING, *QUESTIONS, *SAMPLES, *REFERENCES, *DOMAINS, *SOURCES}
_TEXTS = ("content", "value", "text", "parts", "message")  # of a turn
_SPOKEN = ("text", "input_text", "output_text")
_LABEL = re.compile(
    r"[\w.+/-]{0,31}[a-z0-9_]|(?:no|not|without|detailed) [a-z]+(?: on| off)?"
    r"|[a-z]+ (?:on|off|enabled|disabled|mode|budget)|[开关是否无]|开启|关闭|启用|禁用",
    re.A,
)
_PYTHON = re.compile(r"'(?:role|from)'")
_STORED = re.compile(r"\s*[\[{]")


class ShapeError(ValueError):
    """A record cannot become a trace.

    Attributes:
        reason: the phrase that drops are counted by.
        detail: what was special about this record.
        names: what else is counted by name: the tools that were called.
    """

    def __init__(self, reason: str, detail: str = "", names: Iterable[str] = ()) -> None:
        super().__init__(f"{reason}: {detail}" if detail else reason)
        self.reason = reason
        self.detail = detail
        self.names = tuple(names)


@dataclass
class Content:
    """What was read of one message: its text, its thought, and what is neither, by its kind."""

    text: str = ""
    thought: str = ""
    lost: dict[str, int] = field(default_factory=dict)
    calls: list[str] = field(default_factory=list)


def given(value: Any) -> bool:
    """Whether a column says something: 0 and False do, null, NaN and blank text do not."""
    if isinstance(value, str):
        return bool(value) and not value.isspace()
    if isinstance(value, (list, dict, tuple)):
        return bool(value)
    return value is not None and value == value


def first(record: Mapping[str, Any], names: Iterable[str]) -> Any:
    """The first of some columns that says something, else ""."""
    return next((record[name] for name in names if name in record and given(record[name])), "")


def text_of(value: Any, column: str) -> str:
    """Text as it must be: not another type, and encodable."""
    if not isinstance(value, str):
        if isinstance(value, list):
            value = _joined(value, column)
        elif isinstance(value, bytes):
            try:
                value = value.decode("utf-8")
            except UnicodeDecodeError as error:
                raise ShapeError("invalid UTF-8", f"{column}: {error}") from None
        elif not given(value):
            return ""
        elif isinstance(value, Number):
            value = str(value)
        else:
            raise ShapeError("content is not text", f"{column} is a {type(value).__name__}")
    if not value.isascii():
        try:
            value.encode("utf-8")
        except UnicodeEncodeError as error:
            raise ShapeError("invalid UTF-8", f"{column}: {error}") from None
    return value


def _joined(parts: list[Any], column: str) -> str:
    """The text of a list of parts, where there is nothing but text in it."""
    if len(parts) > 1 and all(isinstance(part, str) for part in parts):
        raise ShapeError("content is not text", f"{column} is a list of {len(parts)} texts")
    found = content_of(parts, column)
    if found.lost or found.calls:
        kinds = ", ".join(sorted({*found.lost, *found.calls}))
        raise ShapeError("content is not text", f"{column} has {kinds}")
    return found.text


def content_of(value: Any, column: str) -> Content:
    """A message's content: text, or a list of parts of which text and thoughts are kept."""
    if isinstance(value, Mapping):  # a part alone, or the parts of a ChatGPT export
        value = value["parts"] if "parts" in value else [value]
    if not isinstance(value, list):
        return Content(text_of(value, column))
    found = Content()
    for i, part in enumerate(value):
        if isinstance(part, str):
            part = {"text": f"\n{part}" if i else part}
        if not isinstance(part, Mapping):
            raise ShapeError("content is not text", f"{column} holds a {type(part).__name__}")
        kind = str(part.get("type") or ("text" if {"text", "content"} & part.keys() else "part"))
        if kind in _SPOKEN and part.get("thought") is not True:
            said = part.get("text", part.get("content"))
            found.text += text_of(said.get("value") if isinstance(said, Mapping) else said, column)
        elif kind in _SPOKEN or kind.startswith(("thinking", "reasoning")):
            found.thought += text_of(
                first(part, ("thinking", "text", "content", "summary")), column
            )
        elif kind in ("tool_use", "tool_call", "function_call"):
            found.calls.append(str(part.get("name", kind)))
        else:
            found.lost[kind] = found.lost.get(kind, 0) + 1
    return found


def is_label(value: Any) -> bool:
    """Whether a column that is named like a thought holds a flag: "off", true, "high", {...}."""
    if isinstance(value, str):
        return _LABEL.fullmatch(value.strip().lower()) is not None
    if isinstance(value, Mapping):
        return is_label(first(value, ("text", "content")) or "off")
    return not isinstance(value, (list, bytes))


def thought_of(record: Mapping[str, Any]) -> tuple[str, str]:
    """(column, text) of a record's thought; both empty where there is only a label, or nothing."""
    for name in REASONING:
        if name in record and given(record[name]) and not is_label(record[name]):
            found = content_of(record[name], name)
            return name, found.text or found.thought
    return "", ""


def reference_of(record: Mapping[str, Any], *more: str) -> tuple[str, str]:
    """(column, text) of a record's right answer; what is no text or number stays in metadata."""
    for name in (*REFERENCES, *more):
        if name not in record:
            continue
        value = record[name]
        if isinstance(value, list) and len(value) == 1:
            value = value[0]
        if isinstance(value, (str, Number)) and given(value):
            return name, text_of(value, "reference").strip()
    for name in NESTED:
        inside = stored(record[name]) if name in record else None
        if isinstance(inside, Mapping):
            found = reference_of({key: inside.get(key) for key in REFERENCES})[1]
            if found:
                return "", found
    return "", ""


def stored(value: Any) -> Any:
    """A column's value, read where it is stored as JSON (or Python's) text."""
    if not isinstance(value, str) or not _STORED.match(value):
        return value
    try:
        return json.loads(value)
    except (ValueError, RecursionError):
        pass
    if not _PYTHON.search(value):
        return value
    try:
        return ast.literal_eval(value.strip())
    except (ValueError, SyntaxError, MemoryError, RecursionError):
        return value


def split_answer(text: str, thought: str) -> tuple[str, str]:
    """(think, answer) of a text whose thought may stand beside it, in it, or in both places."""
    inside, answer = split_completion(text)
    if not given(thought):
        return inside, answer
    alone, rest = split_completion(thought)  # the thought with its tags
    thought = alone if alone and not rest else thought.strip()
    return (thought, answer) if inside in ("", thought) else (thought, text.strip())


def make(
    record: Mapping[str, Any],
    prompt: str,
    think: str,
    answer: str,
    rest: dict[str, Any],
    *,
    system: str = "",
    reference: str = "",
) -> Trace:
    """The trace of what a shape has found; other columns go to its metadata."""
    source, domain = first(record, SOURCES), first(record, DOMAINS)
    source, domain = (label if isinstance(label, str) else "" for label in (source, domain))
    pictures = sum(prompt.count(mark) for mark in _PICTURES) if "<" in prompt else 0
    if pictures and "lost_parts" not in rest:
        rest["lost_parts"] = {"image, video or audio": pictures}
    return Trace(
        prompt=prompt.strip(),
        think=think,
        answer=answer,
        system=system.strip(),
        reference=reference,
        source=source,
        domain=domain,
        metadata={k: v for k, v in rest.items() if k not in _PLACED or v not in (source, domain)},
    )


def rest_of(record: Mapping[str, Any], *used: str) -> dict[str, Any]:
    """The columns that have no place of their own in a trace."""
    return {k: v for k, v in record.items() if k not in used and v is not None}
