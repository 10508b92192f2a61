"""What the columns of other people's records are called, and how a conversation is read."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from kd.traces.trace import Trace, split_completion

ROLES = {
    **dict.fromkeys(("user", "human", "prompter"), "user"),
    **dict.fromkeys(("assistant", "gpt", "model", "bot", "chatgpt", "bing"), "assistant"),
    **dict.fromkeys(("system", "developer"), "system"),
}
REASONING = ("reasoning_content", "reasoning", "thinking", "think", "deepseek_reasoning")
QUESTIONS = ("prompt", "question", "problem", "instruction", "query", "input")
ANSWERS = (
    "response",
    "completion",
    "output",
    "content",
    "deepseek_solution",
    "solution",
    "answer",
    "attempt",
    "generation",
)
REFERENCES = (
    "reference",
    "expected_answer",
    "ground_truth",
    "gold",
    "final_answer",
    "ground_truth_solution",
)
DOMAINS = ("domain", "problem_type", "subject", "category", "cot_type")
SOURCES = ("source", "source_type", "dataset")


class ShapeError(ValueError):
    """A record cannot become a trace; ``reason`` is the phrase that yields count."""

    def __init__(self, reason: str, detail: str = "") -> None:
        super().__init__(f"{reason}: {detail}" if detail else reason)
        self.reason = reason
        self.detail = detail


def text_of(value: Any, column: str) -> str:
    """Text as it must be: not another type, and encodable."""
    if value is None:
        return ""
    if isinstance(value, list) and all(isinstance(part, Mapping) for part in value):
        kinds = {str(part.get("type")) for part in value}
        if kinds <= {"text"}:
            value = "".join(str(part.get("text", "")) for part in value)
        else:
            raise ShapeError("content is not text", f"{column} has {', '.join(sorted(kinds))}")
    if isinstance(value, bytes):
        try:
            value = value.decode("utf-8")
        except UnicodeDecodeError as error:
            raise ShapeError("invalid UTF-8", f"{column}: {error}") from None
    if isinstance(value, (int, float)) and not isinstance(value, bool):
        value = repr(value)
    if not isinstance(value, str):
        raise ShapeError("content is not text", f"{column} is a {type(value).__name__}")
    if not value.isascii():
        try:
            value.encode("utf-8")
        except UnicodeEncodeError as error:
            raise ShapeError("invalid UTF-8", f"{column}: {error}") from None
    return value


def conversation(record: Mapping[str, Any], column: str) -> Trace:
    """The last question and its answer; earlier turns go to ``metadata["history"]``."""
    turns = record[column]
    if not isinstance(turns, Sequence) or isinstance(turns, str) or not turns:
        raise ShapeError("no turns", f"{column} is {type(turns).__name__} of length 0")
    system = text_of(record.get("system"), "system")
    roles: list[str] = []
    texts: list[str] = []
    thoughts: list[str] = []
    for i, turn in enumerate(turns):
        if not isinstance(turn, Mapping):
            raise ShapeError("turn is not an object", f"{column}[{i}] is {type(turn).__name__}")
        said = turn.get("role", turn.get("from"))
        role = ROLES.get(str(said).strip().lower())
        if role is None:
            raise ShapeError("unknown role", f"{column}[{i}] is by {said!r}")
        if "content" not in turn and "value" not in turn and not first(turn, REASONING):
            raise ShapeError("turn without text", f"{column}[{i}] has {', '.join(map(str, turn))}")
        text = text_of(turn.get("content", turn.get("value")), f"{column}[{i}]")
        if role == "system" and i == 0:
            system = text
            continue
        roles.append(role)
        texts.append(text)
        thoughts.append(text_of(first(turn, REASONING), f"{column}[{i}] reasoning"))
    expected = ["user", "assistant"] * (len(roles) // 2)
    if roles != expected or not roles:
        raise ShapeError("mixed roles", " ".join(roles) or "only a system message")
    think, answer = split_answer(texts[-1], thoughts[-1])
    history = [
        {"role": role, "content": text if role == "user" else split_completion(text)[1]}
        for role, text in zip(roles[:-2], texts[:-2], strict=True)
    ]
    reference = first(record, (*REFERENCES, "answer"))
    rest = rest_of(record, column, "generations", "system", *QUESTIONS, *ANSWERS)
    if history:
        rest["history"] = history
    return make(record, texts[-2], think, answer, rest, system=system, reference=reference)


def split_answer(text: str, thought: str) -> tuple[str, str]:
    return (thought.strip(), text.strip()) if thought.strip() else split_completion(text)


def make(
    record: Mapping[str, Any],
    prompt: str,
    think: str,
    answer: str,
    rest: dict[str, Any],
    *,
    system: str = "",
    reference: Any = "",
) -> Trace:
    return Trace(
        prompt=prompt.strip(),
        think=think,
        answer=answer,
        system=system.strip(),
        source=_label(record, SOURCES),
        domain=_label(record, DOMAINS),
        reference=text_of(reference, "reference").strip(),
        metadata={k: v for k, v in rest.items() if k not in (*SOURCES[:2], *DOMAINS)},
    )


def _label(record: Mapping[str, Any], names: Sequence[str]) -> str:
    value = first(record, names)
    return value if isinstance(value, str) else ""


def first(record: Mapping[str, Any], names: Sequence[str]) -> Any:
    return next((record[name] for name in names if record.get(name)), "")


def rest_of(record: Mapping[str, Any], *used: str) -> dict[str, Any]:
    plain = (str, int, float, bool, list, dict)
    return {k: v for k, v in record.items() if k not in used and isinstance(v, plain)}
