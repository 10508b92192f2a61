"""What the columns of other people's records are called, and how their values are read."""

from __future__ import annotations

import ast
import json
import re
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from kd.traces.trace import Trace, split_completion

ROLES = {
    **dict.fromkeys(("user", "human", "prompter"), "user"),
    **dict.fromkeys(("assistant", "gpt", "model", "bot", "chatgpt", "bing"), "assistant"),
    **dict.fromkeys(("system", "developer"), "system"),
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
_PLACED = {*SOURCES, *DOMAINS}
KNOWN = {*TURNS, *SYSTEMS, *REASONING, *QUESTIONS, *SAMPLES, *REFERENCES, *DOMAINS, *SOURCES}
_TEXTS = ("content", "value", "text", "parts", "message")  # of a turn
_SPOKEN = ("text", "input_text", "output_text")
_LABEL = re.compile(
    r"[\w.+/-]{0,31}[a-z0-9_]|(?:no|not|without|detailed) [a-z]+(?: on| off)?", re.A
)
_STORED = re.compile(r"\s*[\[{]")


class ShapeError(ValueError):
    """A record cannot become a trace.

    Attributes:
        reason: the phrase that yields count.
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
        elif isinstance(value, (int, float)):
            value = repr(value)
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
    if not isinstance(value, list):
        return Content(text_of(value, column))
    found = Content()
    for i, part in enumerate(value):
        if isinstance(part, str):
            part = {"text": f"\n{part}" if i else part}
        if not isinstance(part, Mapping):
            raise ShapeError("content is not text", f"{column} holds a {type(part).__name__}")
        kind = str(part.get("type") or ("text" if "text" in part else "part"))
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
        text = value.strip().lower()
        return len(text) <= 2 or _LABEL.fullmatch(text) is not None
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
        if isinstance(value, (str, int, float)) and given(value):
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
    try:
        return ast.literal_eval(value.strip())
    except (ValueError, SyntaxError, MemoryError, RecursionError):
        return value


def are_turns(value: Any) -> bool:
    """Whether these are the turns of a conversation: objects that say who speaks."""
    return (
        isinstance(value, list)
        and bool(value)
        and all(isinstance(turn, Mapping) and ("role" in turn or "from" in turn) for turn in value)
    )


def role_of(turn: Mapping[str, Any]) -> str:
    """Who speaks: "user", "assistant", "system", "tool", or "" for anybody else."""
    return ROLES.get(str(first(turn, ("role", "from"))).strip().lower(), "")


def turns_of(value: Any, column: str) -> list[Any]:
    """The turns of a column: a list, a dict of lists, or either as JSON text."""
    value = stored(value)
    if isinstance(value, Mapping):
        inner = next((value[name] for name in TURNS if name in value), None)
        if inner is not None:
            return turns_of(inner, column)
        columns = {key: stored(held) for key, held in value.items() if held is not None}
        sizes = {len(held) if isinstance(held, list) else -1 for held in columns.values()}
        if len(sizes) != 1 or -1 in sizes:
            keys = ", ".join(map(str, value))
            raise ShapeError(
                "no turns", f"{column} is an object of {keys}, not lists of one length"
            )
        return [dict(zip(columns, row, strict=True)) for row in zip(*columns.values(), strict=True)]
    if isinstance(value, (list, tuple)):
        return [stored(turn) for turn in value]
    raise ShapeError("no turns", f"{column} is {type(value).__name__}: {value!r:.80}")


def conversation(record: Mapping[str, Any], column: str) -> Trace:
    """The last question and its answer; earlier turns go to ``metadata["history"]``."""
    turns = turns_of(record[column], column)
    if not turns:
        raise ShapeError("no turns", f"{column} is empty")
    system = text_of(first(record, SYSTEMS), "system")
    said: list[tuple[str, Content, Mapping[str, Any]]] = []
    for i, turn in enumerate(turns):
        role, content = _turn(turn, f"{column}[{i}]")
        if role == "system" and i == 0:
            if system and content.text and system.strip() != content.text.strip():
                raise ShapeError("two system messages", f"{system[:80]!r}, {content.text[:80]!r}")
            system = content.text or system
        else:
            said.append((role, content, turn))
    roles, gold = [role for role, _, _ in said], ["answer"]
    if roles and roles[-1] == "user" and given(first(record, ANSWERS)):
        # the turns end with the question, and the answer has a column of its own
        answer = {"content": first(record, ANSWERS), "reasoning": thought_of(record)[1]}
        said.append(("assistant", _turn({"role": "assistant", **answer}, "answer")[1], answer))
        roles, gold = [*roles, "assistant"], []
    _refuse(roles, said)
    (_, asked, _), (_, answered, last) = said[-2:]
    think, answer_text = split_answer(answered.text, answered.thought)
    history = [
        {"role": role, "content": held.text if role == "user" else split_completion(held.text)[1]}
        for role, held, _ in said[:-2]
    ]
    reference = reference_of(record, *gold)[1]
    rest = rest_of(record, column, "generations", *SYSTEMS, *QUESTIONS, *ANSWERS)
    if history:
        rest["history"] = history
    if answered.calls:
        rest["tool_calls"] = last.get("tool_calls") or answered.calls
    if any(held.lost for _, held, _ in said):
        rest["lost_parts"] = dict(sum((Counter(held.lost) for _, held, _ in said), Counter()))
    return make(record, asked.text, think, answer_text, rest, system=system, reference=reference)


def _turn(turn: Any, where: str) -> tuple[str, Content]:
    if not isinstance(turn, Mapping):
        raise ShapeError("turn is not an object", f"{where} is {type(turn).__name__}")
    role = role_of(turn)
    if not role:
        raise ShapeError("unknown role", f"{where} is by {first(turn, ('role', 'from'))!r}")
    thought = thought_of(turn)[1]
    calls = stored(first(turn, ("tool_calls", "function_call")))
    if not thought and not calls and not any(name in turn for name in _TEXTS):
        raise ShapeError("turn without text", f"{where} has {', '.join(map(str, turn))}")
    content = content_of(first(turn, _TEXTS), where)
    if thought:
        content.thought = thought
    content.calls += call_names(calls)
    if not content.text and given(turn.get("refusal")):
        raise ShapeError("refusal", text_of(turn["refusal"], where)[:200])
    return role, content


def call_names(calls: Any) -> list[str]:
    """The names of the tools that an assistant's turn calls."""
    found = []
    for call in calls if isinstance(calls, list) else [calls] if calls else []:
        inner = call.get("function", call) if isinstance(call, Mapping) else call
        found.append(str(inner.get("name", "?") if isinstance(inner, Mapping) else inner))
    return found


def _refuse(roles: Sequence[str], said: Sequence[tuple[str, Content, Mapping[str, Any]]]) -> None:
    """Refuse what is not question and answer in turn; tools are counted by their names."""
    names = [name for _, held, _ in said for name in held.calls]
    inner = [name for _, held, _ in said[:-1] for name in held.calls]
    if "tool" in roles or inner:
        names = names or [str(turn.get("name") or role) for role, _, turn in said if role == "tool"]
        raise ShapeError("tool turns", f"{' '.join(roles)}; {', '.join(names)}", names)
    if roles and roles[-1] == "user":
        raise ShapeError("question without an answer", " ".join(roles))
    if roles != ["user", "assistant"] * (len(roles) // 2) or not roles:
        raise ShapeError("mixed roles", " ".join(roles) or "only a system message")
    asked, answered = said[-2][1], said[-1][1]
    if asked.lost and not asked.text.strip():
        raise ShapeError("content is not text", f"the question is {', '.join(asked.lost)}")
    if not answered.text.strip() and not answered.thought.strip():
        if answered.calls:
            raise ShapeError("tool call without an answer", ", ".join(names), names)
        if answered.lost:
            raise ShapeError("content is not text", f"the answer is {', '.join(answered.lost)}")


def split_answer(text: str, thought: str) -> tuple[str, str]:
    """(think, answer) of a text whose thought may stand beside it, in it, or in both places."""
    thought = thought.strip()
    if not thought:
        return split_completion(text)
    inside, answer = split_completion(text)
    return (thought, answer) if inside == thought else (thought, text.strip())


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
    plain = (str, int, float, bool, list, dict)
    return {k: v for k, v in record.items() if k not in used and isinstance(v, plain)}
