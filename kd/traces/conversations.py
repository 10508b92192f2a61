"""A conversation and its parts in a rendered text: which message is where, and which is lost."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

from kd.traces.trace import Trace


class RenderError(ValueError):
    """A trace cannot be rendered; ``reason`` is the phrase that drops are counted by."""

    def __init__(self, reason: str, message: str) -> None:
        super().__init__(message)
        self.reason = reason


class Piece(NamedTuple):
    """A part of a text: a message ("system", "prompt", ...), or the template's own ("")."""

    who: str
    text: str


class Frame(NamedTuple):
    """What the template writes around the messages of a conversation of one shape."""

    parts: list[str]  # one more than messages; the text before, between and after them
    order: list[int]  # the messages in the order in which they are shown
    header: str  # what stands before an answer, where add_generation_prompt does not write it
    lead: str  # what every completion begins with: a space, or a mark of its channel
    bare: str  # what an answer without a thought begins with: that, and perhaps an empty thought


def messages(trace: Trace) -> list[dict[str, Any]]:
    """The messages before the answer: system, earlier turns, prompt."""
    made: list[dict[str, Any]] = []
    if trace.system:
        made.append({"role": "system", "content": trace.system})
    for i, turn in enumerate(trace.metadata.get("history") or ()):
        if not isinstance(turn, Mapping) or not {"role", "content"} <= turn.keys():
            raise RenderError(
                "earlier turn without role or content",
                f"render: history[{i}] must be {{'role': ..., 'content': ...}}, got {turn!r:.80}.",
            )
        made.append({**turn, "role": str(turn["role"]), "content": str(turn["content"] or "")})
    return [*made, {"role": "user", "content": trace.prompt}]


def tools_of(trace: Trace) -> list[Any] | None:
    """The functions that a trace's conversation may call, as templates take them.

    Raises:
        RenderError: ``metadata["tools"]`` is something else.
    """
    tools = trace.metadata.get("tools")
    if isinstance(tools, str) and tools.strip():
        try:
            tools = json.loads(tools)
        except ValueError:
            tools = [tools]  # refused below, with what it is
    if tools and not (isinstance(tools, list) and all(isinstance(one, Mapping) for one in tools)):
        raise RenderError(
            "tools that are no functions",
            "render: metadata['tools'] must be a list of functions (JSON schemas), got "
            f"{tools!r:.80}. Give them so, or call the column otherwise.",
        )
    return list(tools) if tools else None


def names_of(conversation: Sequence[Mapping[str, Any]]) -> list[str]:
    """What errors call the messages."""
    first = int(bool(conversation) and conversation[0]["role"] == "system")
    names = ["system"] * first
    names += [f"history[{i}]" for i in range(len(conversation) - first - 1)]
    return [*names, "prompt"]


def filled(frame: Frame, contents: Sequence[str], names: Sequence[str]) -> list[Piece]:
    pieces = [Piece("", frame.parts[0])]
    for i, part in zip(frame.order, frame.parts[1:], strict=True):
        pieces += [Piece(names[i], contents[i]), Piece("", part)]
    return [*pieces, Piece("", frame.header)]


def located(text: str, contents: Sequence[str], names: Sequence[str]) -> list[Piece]:
    """Pieces of a text whose template branches on what the messages say, by looking for them.

    Raises:
        RenderError: a message is not there, word for word.
    """
    spans: list[tuple[int, int, str]] = []
    for i in sorted(range(len(contents)), key=lambda i: -len(contents[i])):
        content = contents[i].strip()
        at = text.find(content)
        while any(at < end and start < at + len(content) for start, end, _ in spans):
            at = text.find(content, at + 1)
            if at < 0:
                break
        if at < 0:
            shown = content.casefold() in text.casefold()
            raise lost(names[i], "writes it in another case" if shown else "changes or cuts it")
        spans.append((at, at + len(content), names[i]))
    pieces, here = [], 0
    for start, end, name in sorted(spans):
        pieces += [Piece("", text[here:start]), Piece(name, text[start:end])]
        here = end
    return [*pieces, Piece("", text[here:])]


def lost(name: str, how: str) -> RenderError:
    kind = "an earlier turn" if name.startswith("history") else f"the {name.partition(' ')[0]}"
    return RenderError(
        f"chat template loses {kind}",
        f"render: {name} must be shown by the chat template as it is, got a template that {how}. "
        "Pass another chat_template (kd.traces.CHATML), or take it out of the trace.",
    )


def function_names(value: Any) -> set[str]:
    """The names of tools, and of the calls in earlier turns."""
    if isinstance(value, Mapping):
        own = value.get("function", value if "parameters" in value else None)
        name = own.get("name") if isinstance(own, Mapping) else None
        rest = [item for key, item in value.items() if key not in ("content", "parameters")]
        return function_names(rest) | ({name} if isinstance(name, str) else set())
    if isinstance(value, list):
        return set().union(*map(function_names, value)) if value else set()
    return set()
