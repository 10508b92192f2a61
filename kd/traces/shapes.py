r"""Records as users have them, recognised by their columns and brought to one form.

| shape | recognised by | who writes it |
|---|---|---|
| kd | prompt, think, answer | this library |
| conversations | conversations: [{from, value}] or [{role, content}], system | Bespoke-Stratos, OpenThoughts, OpenThoughts3, Sky-T1 |
| messages | messages: [{role, content[, reasoning_content]}] | Mixture-of-Thoughts, OpenR1-Math, OpenAI files |
| response | choices, or response.body.choices | DeepSeek and OpenAI API responses and batch files |
| curator | response_message + generic_request, or a reasoning column | Curator's cache and datasets |
| s1 | question + *_thinking_trajectory, thinking_trajectories, or ChatML text | s1K, s1K-1.1, s1K_tokenized |
| reasoning_content | reasoning_content + content | DeepSeek API answers written one per line |
| pair | prompt/response, instruction/output, question/solution, ... | everything else; LIMO |
"""  # noqa: E501

from __future__ import annotations

import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from kd.traces.columns import (
    ANSWERS,
    QUESTIONS,
    REASONING,
    REFERENCES,
    ROLES,
    ShapeError,
    conversation,
    first,
    make,
    rest_of,
    split_answer,
    text_of,
)
from kd.traces.trace import TEXT_FIELDS, Trace, split_completion

_CHATML = re.compile(
    r"<\|im_start\|>(\w+)\n?(.*?)(?:<\|im_end\|>|(?=<\|im_start\|>)|\Z)", re.DOTALL
)


@dataclass(frozen=True)
class Shape:
    """A kind of record.

    Attributes:
        name: as in the table above.
        matches: whether a record is of this kind.
        convert: makes the trace; raises ``ShapeError``.
    """

    name: str
    matches: Callable[[Mapping[str, Any]], bool]
    convert: Callable[[Mapping[str, Any]], Trace]


def normalise(record: Any) -> Trace:
    """Bring one record of any known shape to a trace.

    Args:
        record: a mapping of columns.

    Returns:
        The trace; columns that have no place of their own stay in ``metadata``, and
        ``metadata["shape"]`` says what the record was taken for.

    Raises:
        ShapeError: it fits no shape, or its content does not fit; with reason and detail.
    """
    if not isinstance(record, Mapping):
        raise ShapeError("not an object", f"a {type(record).__name__}")
    shape = next((shape for shape in SHAPES if shape.matches(record)), None)
    if shape is None:
        if record.get("error"):
            raise ShapeError("teacher failed", str(record["error"])[:200])
        missing = [key for key in (*QUESTIONS, *ANSWERS) if key in record]
        known = f"; of those, only {', '.join(missing)} is known" if missing else ""
        raise ShapeError("no known shape", f"keys {', '.join(map(str, record))}{known}")
    try:
        trace = shape.convert(record)
    except (AttributeError, KeyError, TypeError, IndexError) as error:
        raise ShapeError("malformed record", f"taken for {shape.name}: {error}") from error
    if not trace.prompt.strip():
        raise ShapeError("empty prompt", f"taken for {shape.name}")
    if shape.name == "kd":
        return trace
    if not trace.answer and not trace.think:
        raise ShapeError("empty answer", f"taken for {shape.name}")
    return trace.note(shape=shape.name)


def every_sample(record: Mapping[str, Any]) -> list[Mapping[str, Any]]:
    """One record per sample, where a record holds many (OpenR1-Math's ``generations``, the
    choices of an API response); otherwise the record alone."""
    generations = record.get("generations")
    question = first(record, QUESTIONS)
    if isinstance(generations, Sequence) and not isinstance(generations, str) and question:
        kept = {k: v for k, v in record.items() if k not in ("generations", "messages")}
        kept = {k: v for k, v in kept.items() if k != "solution"}
        reference = kept.pop("answer", "")
        rows: list[Mapping[str, Any]] = []
        for i, text in enumerate(generations):
            flags = {
                key: value[i]
                for key, value in kept.items()
                if isinstance(value, list) and len(value) == len(generations)
            }
            rows.append({**kept, **flags, "reference": reference, "response": text, "sample": i})
        return rows
    body = _body(record)
    choices = body.get("choices") if body else None
    if isinstance(choices, list) and len(choices) > 1:
        return [{**record, "choices": [choice], "sample": i} for i, choice in enumerate(choices)]
    return [record]


def _kd(record: Mapping[str, Any]) -> Trace:
    texts = {name: text_of(record.get(name), name) for name in TEXT_FIELDS}
    try:
        return Trace.from_dict({**record, **texts})
    except (TypeError, ValueError) as error:
        raise ShapeError("bad metadata", str(error)) from None


def _response(record: Mapping[str, Any]) -> Trace:
    body = _body(record)
    assert body is not None
    choices = body["choices"]
    if not isinstance(choices, list) or not choices or not isinstance(choices[0], Mapping):
        raise ShapeError("response without choices", f"choices is {choices!r:.80}")
    message = choices[0].get("message")
    if not isinstance(message, Mapping):
        raise ShapeError("response without a message", f"choice has {', '.join(choices[0])}")
    asked = first(record, ("messages", "request", *QUESTIONS)) or body.get("messages")
    if isinstance(asked, Mapping):
        asked = asked.get("body", asked).get("messages")
    rest = rest_of(record, "choices", "response", "messages", "request", "object", *QUESTIONS)
    rest["finish"] = choices[0].get("finish_reason")
    usage = body.get("usage")
    if isinstance(usage, Mapping):
        rest |= {k: usage[k] for k in ("prompt_tokens", "completion_tokens") if k in usage}
    turn = {**message, "role": "assistant"}
    if isinstance(asked, list):
        trace = conversation({**record, "messages": [*asked, turn]}, "messages")
        return trace.replace(metadata={**trace.metadata, **rest})
    if not asked:
        raise ShapeError("response without its prompt", f"keys {', '.join(map(str, record))}")
    thought = text_of(first(message, REASONING), "reasoning_content")
    think, answer = split_answer(text_of(message.get("content"), "content"), thought)
    return make(record, text_of(asked, "prompt"), think, answer, rest)


def _curator(record: Mapping[str, Any]) -> Trace:
    """A line of Curator's response cache."""
    request = record["generic_request"]
    asked = request.get("messages") if isinstance(request, Mapping) else None
    if not isinstance(asked, list):
        raise ShapeError("response without its prompt", "generic_request has no messages")
    if record.get("response_errors"):
        raise ShapeError("teacher failed", str(record["response_errors"])[:200])
    said = record["response_message"]
    turn = said if isinstance(said, Mapping) else {"content": said}
    row = request.get("original_row")
    row = {k: v for k, v in row.items() if k not in QUESTIONS} if isinstance(row, Mapping) else {}
    row["messages"] = [*asked, {**turn, "role": "assistant"}]
    trace = conversation(row, "messages")
    return trace.note(finish=record.get("finish_reason"))


def _s1(record: Mapping[str, Any]) -> Trace:
    question = text_of(record.get("question"), "question")
    if "thinking_trajectories" in record:
        thoughts = record["thinking_trajectories"]
        think = thoughts[0] if isinstance(thoughts, list) and thoughts else ""
        answer = record.get("attempt")
    else:
        who = "deepseek" if record.get("deepseek_thinking_trajectory") else "gemini"
        think, answer = record.get(f"{who}_thinking_trajectory"), record.get(f"{who}_attempt")
    reference = first(record, (*REFERENCES, "answer", "solution"))
    dropped = [key for key in record if "traject" in key or "attempt" in key]
    rest = rest_of(record, *dropped, "text", *QUESTIONS, *ANSWERS, "metadata")
    think, answer = text_of(think, "thinking trajectory"), text_of(answer, "attempt")
    return make(record, question, think.strip(), answer.strip(), rest, reference=reference)


def _chatml(record: Mapping[str, Any]) -> Trace:
    """s1K_tokenized: one ChatML text whose answer has turns named think and answer."""
    parts: dict[str, str] = {}
    for role, content in _CHATML.findall(text_of(record["text"], "text")):
        if role in parts:
            raise ShapeError("mixed roles", f"a second {role} turn in text")
        parts[role] = content.strip()
    if "user" not in parts or not ({"answer", "assistant"} & parts.keys()):
        raise ShapeError("mixed roles", f"text has turns {', '.join(parts)}")
    answer = parts.get("answer", "").removeprefix("Answer:").strip()
    if "think" in parts:
        think = parts["think"]
    else:
        think, answer = split_completion(parts["assistant"])
    reference = first(record, (*REFERENCES, "answer", "solution"))
    rest = rest_of(record, "text", *QUESTIONS, *ANSWERS)
    system = parts.get("system", "")
    return make(record, parts["user"], think, answer, rest, system=system, reference=reference)


def _pair(record: Mapping[str, Any]) -> Trace:
    present = [key for key in QUESTIONS if record.get(key) is not None]
    asked = next((key for key in present if record[key]), present[0])
    question = record[asked]
    if isinstance(question, list):  # TRL's conversational prompt and completion
        said = record.get("completion")
        said = said if isinstance(said, list) else [{"role": "assistant", "content": said}]
        return conversation({**record, "messages": [*question, *said]}, "messages")
    prompt = text_of(question, asked)
    if asked == "instruction" and record.get("input"):
        prompt = f"{prompt}\n\n{text_of(record['input'], 'input')}"
    key = next(key for key in ANSWERS if record.get(key) is not None)
    thought = text_of(first(record, REASONING), "reasoning")
    think, answer = split_answer(text_of(record[key], key), thought)
    gold = (*REFERENCES, *(("answer",) if key != "answer" else ()))
    reference = first(record, gold)
    used = next((name for name in gold if record.get(name)), key)
    rest = rest_of(record, "system", *REASONING, asked, key, used)
    system = text_of(record.get("system"), "system")
    return make(record, prompt, think, answer, rest, system=system, reference=reference)


def _body(record: Mapping[str, Any]) -> Mapping[str, Any] | None:
    """The API response inside a record: the record itself, its ``response`` or that one's body."""
    for found in (record, record.get("response")):
        if isinstance(found, Mapping):
            body = found.get("body", found)
            if isinstance(body, Mapping) and _choices(body):
                return body
    return None


def _choices(body: Mapping[str, Any]) -> bool:
    """Whether these are an API's choices, not those of a multiple-choice question."""
    choices = body.get("choices")
    if not isinstance(choices, list):
        return False
    if not choices:
        return body.get("object") == "chat.completion"
    return isinstance(choices[0], Mapping) and "message" in choices[0]


def _is_pair(record: Mapping[str, Any]) -> bool:
    return all(any(record.get(key) is not None for key in keys) for keys in (QUESTIONS, ANSWERS))


def problem(record: Any) -> Trace:
    """A question to be answered: its prompt, system message and reference, whatever answers
    the record already has.

    Raises:
        ShapeError: there is no question in it.
    """
    if not isinstance(record, Mapping):
        raise ShapeError("not an object", f"a {type(record).__name__}")
    for column in ("messages", "conversations"):
        turns = record.get(column)
        if isinstance(turns, list) and turns and isinstance(turns[-1], Mapping):
            said = str(turns[-1].get("role", turns[-1].get("from"))).lower()
            if ROLES.get(said) == "user":
                turns = [*turns, {"role": "assistant", "content": "-"}]
            return conversation({**record, column: turns}, column).replace(think="", answer="")
    question = text_of(first(record, QUESTIONS), "prompt")
    if not question.strip():
        raise ShapeError("empty prompt", f"keys {', '.join(map(str, record))}")
    reference = first(record, (*REFERENCES, "answer", "solution"))
    rest = rest_of(record, "system", *QUESTIONS, *REFERENCES, "answer", "solution", "metadata")
    metadata = record.get("metadata")
    rest |= metadata if isinstance(metadata, Mapping) else {}
    system = text_of(record.get("system"), "system")
    return make(record, question, "", "", rest, system=system, reference=reference)


SHAPES = (
    Shape("kd", lambda r: {"prompt", "think", "answer"} <= r.keys(), _kd),
    Shape("response", lambda r: _body(r) is not None, _response),
    Shape("curator", lambda r: {"response_message", "generic_request"} <= r.keys(), _curator),
    Shape(
        "conversations",
        lambda r: r.get("conversations") is not None,
        lambda r: conversation(r, "conversations"),
    ),
    Shape(
        "messages", lambda r: r.get("messages") is not None, lambda r: conversation(r, "messages")
    ),
    Shape(
        "s1",
        lambda r: "question" in r and any("thinking_trajector" in str(key) for key in r),
        _s1,
    ),
    Shape("s1", lambda r: isinstance(r.get("text"), str) and "<|im_start|>" in r["text"], _chatml),
    Shape("pair", _is_pair, _pair),
)
