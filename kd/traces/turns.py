"""How a conversation is read: its turns, who speaks in them, and what cannot become a trace."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence
from typing import Any

from kd.traces.columns import (
    ANSWERS,
    QUESTIONS,
    ROLES,
    SYSTEMS,
    TURNS,
    Content,
    ShapeError,
    content_of,
    first,
    given,
    make,
    reference_of,
    rest_of,
    split_answer,
    stored,
    text_of,
    thought_of,
)
from kd.traces.trace import Trace, split_completion

_TEXTS = ("content", "value", "text", "parts", "message")  # of a turn


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
        answer = {"content": first(record, ANSWERS)}
        said.append(("assistant", _turn({"role": "assistant", **answer}, "answer")[1], answer))
        roles, gold = [*roles, "assistant"], []
    _refuse(roles, said)
    (_, asked, _), (_, answered, last) = said[-2:]
    think, answer_text = split_answer(answered.text, answered.thought)
    beside, thought = thought_of(record)
    if not think and len(said) == 2:  # a thought beside the only answer is its
        think, answer_text = split_answer(answered.text, thought)
    history = [
        {"role": role, "content": held.text if role == "user" else split_completion(held.text)[1]}
        for role, held, _ in said[:-2]
    ]
    reference = reference_of(record, *gold)[1]
    used = beside if think == thought.strip() else ""
    rest = rest_of(record, column, used, "generations", *SYSTEMS, *QUESTIONS, *ANSWERS)
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
