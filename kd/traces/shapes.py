r"""Records as users have them, recognised by their columns and brought to one form.

| shape | recognised by | who writes it |
|---|---|---|
| kd | prompt, think, answer | this library |
| conversations | conversations: [{from, value}] or [{role, content}], system | Bespoke-Stratos, OpenThoughts, OpenThoughts3, Sky-T1, ShareGPT |
| messages | messages: [{role, content[, reasoning_content]}], or a bare list of turns | Mixture-of-Thoughts, OpenR1-Math, OpenAI files |
| response | choices, or response.body.choices | DeepSeek and OpenAI API responses and batch files |
| curator | response_message + generic_request, or a reasoning column | Curator's cache and datasets |
| s1 | question + *_thinking_trajectory, thinking_trajectories, or ChatML text | s1K, s1K-1.1, s1K_tokenized |
| pair | prompt/response, instruction/output, question/solution, input/output, ...; the prompt may be a list of turns | Alpaca, LIMO, Llama-Nemotron, everything else |
| problem | a question and its reference without an answer | verl and other RL sets |

Turns may be a dict of lists or JSON text. Names of columns are known in any case.
"""  # noqa: E501

from __future__ import annotations

import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

from kd.traces.columns import (
    ANSWERS,
    KNOWN,
    QUESTIONS,
    REFERENCES,
    SAMPLES,
    SYSTEMS,
    TURNS,
    ShapeError,
    first,
    given,
    is_label,
    make,
    reference_of,
    rest_of,
    split_answer,
    stored,
    text_of,
    thought_of,
)
from kd.traces.responses import body_of, curator, response
from kd.traces.trace import TEXT_FIELDS, Trace, split_completion
from kd.traces.turns import are_turns, conversation, role_of, turns_of

_CHATML = re.compile(
    r"<\|im_start\|>(\w+)\n?(.*?)(?:<\|im_end\|>|(?=<\|im_start\|>)|\Z)", re.DOTALL
)


# what JSON makes; anything else may be an array
_TYPES = {str, int, float, bool, list, dict, type(None)}


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
    record = _plain(record)
    shape = next((shape for shape in SHAPES if shape.matches(record)), None)
    if shape is None:
        raise _unknown(record)
    try:
        trace = shape.convert(record)
    except (AttributeError, KeyError, TypeError, IndexError) as error:
        raise ShapeError("malformed record", f"taken for {shape.name}: {error}") from error
    if not trace.prompt.strip():
        raise ShapeError("empty prompt", f"taken for {shape.name}")
    if shape.name == "kd":
        return trace
    if not trace.answer and not trace.think and shape.name != "problem":
        raise ShapeError("empty answer", f"taken for {shape.name}")
    return trace.note(shape=shape.name)


def _plain(record: Any) -> Mapping[str, Any]:
    """A record as a mapping: unpacked from JSON text, a bare list of turns, or ``row``; known
    columns in lower case, arrays as lists."""
    record = stored(record)
    if are_turns(record):
        return {"messages": record}
    if isinstance(record, Mapping) and isinstance(record.get("row"), Mapping):
        record = record["row"]  # the Hub's rows API
    if not isinstance(record, Mapping):
        raise ShapeError("not an object", f"a {type(record).__name__}")
    names = {key: key.lower() for key in record if isinstance(key, str) and not key.islower()}
    names = {key: name for key, name in names.items() if name in KNOWN}
    if names:
        taken = set(record)
        record = {
            names[key] if key in names and names[key] not in taken else key: value
            for key, value in record.items()
        }
    if not _TYPES.issuperset(map(type, record.values())):
        record = {k: v.tolist() if hasattr(v, "tolist") else v for k, v in record.items()}
    held = next((name for name in SAMPLES[:5] if _texts(record.get(name))), "")
    if held and len(record[held]) == 1 and "response" not in record:
        record = {**record, "response": record[held][0]}
    return record


def _unknown(record: Mapping[str, Any]) -> ShapeError:
    """Why a record is of no shape, in the words that help to mend it."""
    keys = f"keys {', '.join(map(str, record))}"[:300]
    said = record.get("response")
    body = said.get("body") if isinstance(said, Mapping) else None
    failed = record.get("error") or (body.get("error") if isinstance(body, Mapping) else None)
    if failed:
        return ShapeError("teacher failed", str(failed)[:200])
    known = [key for key in (*QUESTIONS, *ANSWERS) if key in record]
    if {"chosen", "rejected"} <= record.keys():
        return ShapeError("preference pair", f"{keys}; name the column to learn from as response")
    many = next((name for name in SAMPLES if _texts(record.get(name))), "")
    if many and given(first(record, QUESTIONS)):
        return ShapeError(
            "several answers", f"{many} holds {len(record[many])}; ask for all samples"
        )
    if given(first(record, QUESTIONS)):
        return ShapeError("question without an answer", keys)
    if isinstance(record.get("body"), Mapping) and "messages" in record["body"]:
        return ShapeError("request without its response", keys)
    detail = f"; of those, only {', '.join(known)} is known" if known else ""
    return ShapeError("no known shape", keys + detail)


def every_sample(record: Any) -> list[Any]:
    """One record per sample, where a record holds many (OpenR1-Math's ``generations``, any list
    of answers, the choices of an API response); otherwise the record alone."""
    if not isinstance(record, Mapping):
        return [record]
    name = next((name for name in SAMPLES if _texts(record.get(name))), "")
    if name and given(first(record, QUESTIONS)):
        held = record[name]
        kept = {k: v for k, v in record.items() if k not in (name, "messages", "solution")}
        reference = kept.pop("answer", "")
        rows: list[Mapping[str, Any]] = []
        for i, text in enumerate(held):
            flags = {
                key: value[i]
                for key, value in kept.items()
                if isinstance(value, list) and len(value) == len(held)
            }
            rows.append({**kept, **flags, "reference": reference, "response": text, "sample": i})
        return rows
    body = body_of(record)
    choices = body.get("choices") if body else None
    if isinstance(choices, list) and len(choices) > 1:
        return [{**record, "choices": [choice], "sample": i} for i, choice in enumerate(choices)]
    return [record]


def _texts(value: Any) -> bool:
    return isinstance(value, list) and all(isinstance(text, str) for text in value)


def _kd(record: Mapping[str, Any]) -> Trace:
    texts = {name: text_of(record.get(name), name) for name in TEXT_FIELDS}
    try:
        return Trace.from_dict({**record, **texts})
    except (TypeError, ValueError) as error:
        raise ShapeError("bad metadata", str(error)) from None


def _s1(record: Mapping[str, Any]) -> Trace:
    question = text_of(record.get("question"), "question")
    if "thinking_trajectories" in record:
        thoughts = record["thinking_trajectories"]
        think = thoughts[0] if isinstance(thoughts, list) and thoughts else ""
        answer = record.get("attempt")
    else:
        who = "deepseek" if record.get("deepseek_thinking_trajectory") else "gemini"
        think, answer = record.get(f"{who}_thinking_trajectory"), record.get(f"{who}_attempt")
    reference = reference_of(record, "answer", "solution")[1]
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
    reference = reference_of(record, "answer", "solution")[1]
    rest = rest_of(record, "text", *QUESTIONS, *ANSWERS)
    system = parts.get("system", "")
    return make(record, parts["user"], think, answer, rest, system=system, reference=reference)


def _pair(record: Mapping[str, Any]) -> Trace:
    asked = next((key for key in QUESTIONS if given(record.get(key))), "")
    if not asked:
        raise ShapeError("empty prompt", f"keys {', '.join(map(str, record))}")
    key = next((key for key in ANSWERS if given(record.get(key))), "")
    value = record.get(key)
    if isinstance(value, list) and len(value) > 1 and _texts(value):
        raise ShapeError("several answers", f"{key} holds {len(value)}; ask for all samples")
    column, thought = thought_of(record)
    spoken = _turns_in(record[asked])
    said = _turns_in(value) if spoken or not isinstance(value, str) else []
    if spoken or said:
        # a list of turns on one side or on both (verl, TRL, Nemotron)
        turns = spoken or [{"role": "user", "content": record[asked]}]
        alone = {"role": "assistant", "content": value}
        kept = {k: v for k, v in record.items() if k not in (asked, key)}
        return conversation({**kept, "messages": [*turns, *(said or [alone])]}, "messages")
    prompt = text_of(record[asked], asked)
    more = next((key for key in ("input", "context") if given(record.get(key))), "")
    if asked == "instruction" and more:  # Alpaca, Dolly
        prompt = f"{prompt}\n\n{text_of(record[more], more)}"
    think, answer = split_answer(text_of(value, key), thought)
    used, reference = reference_of(record, *(("answer",) if key != "answer" else ()))
    rest = rest_of(record, *SYSTEMS, column, asked, key, used)
    system = text_of(first(record, SYSTEMS), "system")
    return make(record, prompt, think, answer, rest, system=system, reference=reference)


def _turns_in(value: Any) -> list[Any]:
    """The turns that a column holds instead of a text: a list of them, or one; else none."""
    held = stored(value)
    if isinstance(held, Mapping) and isinstance(first(held, ("role", "from")), list):
        held = turns_of(held, "turns")
    elif isinstance(held, Mapping) and "content" in held and not isinstance(value, str):
        held = [{"role": "assistant", **held}]
    elif isinstance(held, Mapping):
        held = [held]
    return held if are_turns(held) and all(map(role_of, held)) else []


def _is_pair(record: Mapping[str, Any]) -> bool:
    """Whether there is a column for the question and one for the answer, whatever is in them."""
    return any(key in record for key in QUESTIONS) and any(key in record for key in ANSWERS)


def _turn_column(record: Mapping[str, Any]) -> str:
    """The column of a conversation, if there is one."""
    for column in TURNS:
        value = record.get(column)
        # of "turns", "dialogue" and the like only what can be turns: they may be counts or texts
        if value is not None and (
            column in TURNS[:2] or isinstance(stored(value), (list, Mapping))
        ):
            return column
    return ""


def problem(record: Any) -> Trace:
    """A question to be answered: its prompt, system message and reference, whatever answers
    the record already has.

    Raises:
        ShapeError: there is no question in it.
    """
    record = _plain(record)
    if _is_ours(record):
        return _kd(record).replace(think="", answer="")
    body = record.get("body")  # a request of OpenAI's batch files
    record = {**record, **body} if isinstance(body, Mapping) and "messages" in body else record
    column = _turn_column(record)
    asked = next((key for key in QUESTIONS if given(record.get(key))), "")
    if not column and asked and _turns_in(record[asked]):
        column = asked
    if column:
        turns = turns_of(record[column], column)
        kept = {k: v for k, v in record.items() if k not in ANSWERS or k == column}
        if are_turns(turns) and role_of(turns[-1]) == "user":
            turns = [*turns, {"role": "assistant", "content": "-"}]
        reference = reference_of(record, "answer", "solution")[1]
        trace = conversation({**kept, "messages": turns}, "messages")
        return trace.replace(think="", answer="", reference=reference)
    question = text_of(record.get(asked), "prompt")
    if not question.strip():
        raise ShapeError("empty prompt", f"keys {', '.join(map(str, record))}")
    reference = reference_of(record, "answer", "solution")[1]
    rest = rest_of(record, *SYSTEMS, *QUESTIONS, *REFERENCES, "answer", "solution", "metadata")
    metadata = stored(record.get("metadata"))
    rest |= metadata if isinstance(metadata, Mapping) else {}
    system = text_of(first(record, SYSTEMS), "system")
    return make(record, question, "", "", rest, system=system, reference=reference)


def _is_ours(record: Mapping[str, Any]) -> bool:
    return {"prompt", "think", "answer", "metadata"} <= record.keys()


def _of_turns(column: str) -> Shape:
    return Shape(
        column,
        lambda record: column in record and _turn_column(record) == column,
        lambda record: conversation(record, column),
    )


SHAPES = (
    Shape(
        "kd",
        lambda r: (
            _is_ours(r) or ({"prompt", "think", "answer"} <= r.keys() and not is_label(r["think"]))
        ),
        _kd,
    ),
    Shape("response", lambda r: body_of(r) is not None, response),
    Shape("curator", lambda r: {"response_message", "generic_request"} <= r.keys(), curator),
    *map(_of_turns, TURNS),
    Shape(
        "s1",
        lambda r: "question" in r and any("thinking_trajector" in str(key) for key in r),
        _s1,
    ),
    Shape("s1", lambda r: isinstance(r.get("text"), str) and "<|im_start|>" in r["text"], _chatml),
    Shape("pair", _is_pair, _pair),
    Shape("problem", lambda r: given(first(r, QUESTIONS)) and bool(reference_of(r)[1]), problem),
)
