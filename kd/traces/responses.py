"""What APIs answer, and what is made of their answers on the way: files of batches, Curator."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from kd.traces.columns import QUESTIONS, ShapeError, first, rest_of, stored
from kd.traces.trace import Trace
from kd.traces.turns import conversation


def response(record: Mapping[str, Any]) -> Trace:
    body = body_of(record)
    assert body is not None
    choices = body["choices"]
    if not isinstance(choices, list) or not choices or not isinstance(choices[0], Mapping):
        raise ShapeError("response without choices", f"choices is {choices!r:.80}")
    message = choices[0].get("message")
    if not isinstance(message, Mapping):
        raise ShapeError("response without a message", f"choice has {', '.join(choices[0])}")
    asked = stored(first(record, ("messages", "request", *QUESTIONS)) or body.get("messages"))
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
    turns = [{"role": "user", "content": asked}, turn]
    trace = conversation({**record, "messages": turns}, "messages")
    return trace.replace(metadata={**trace.metadata, **rest})


def curator(record: Mapping[str, Any]) -> Trace:
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


def body_of(record: Mapping[str, Any]) -> Mapping[str, Any] | None:
    """The API response inside a record: the record itself, its ``response`` or that one's body."""
    for found in (record, stored(record.get("response"))):
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
