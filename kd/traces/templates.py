"""A chat template held still: one date, one answer to one question, every message kept whole."""

from __future__ import annotations

import datetime
import hashlib
import json
import os
import re
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

from kd.traces.trace import MARKS, Trace

DATE = "2026-01-01"  # what a template that asks for today's date is told
# Digits: no template changes their case, cuts or strips them, and no template writes them itself.
_PROBES = "9021{:06d}7043"
_PROBE = re.compile(r"9021(\d{6})7043")
_ANSWER = 999_999
_CODES = (
    "%d %e %b %B %m %y %Y %a %A %w %u %j %H %I %p %M %S %f %Z %z %U %W %V %G %x %X %c %D %F %T "
    "%-d %-m %-H %-I %-M %-S %-j"
).split()
_RANDOM = re.compile(r"\|\s*random\b|\blipsum\s*\(")


class RenderError(ValueError):
    """A trace cannot be rendered; ``reason`` is the phrase that yields count."""

    def __init__(self, reason: str, message: str) -> None:
        super().__init__(message)
        self.reason = reason


class Piece(NamedTuple):
    """A part of a text: a message ("system", "prompt", ...), or the template's own ("")."""

    who: str
    text: str


class _Frame(NamedTuple):
    """What the template writes around the messages of a conversation of one shape."""

    parts: list[str]  # one more than messages; the text before, between and after them
    order: list[int]  # the messages in the order in which they are shown
    header: str  # what stands before an answer, where add_generation_prompt does not write it


class ChatTemplate:
    """A tokenizer's chat template, applied so that equal traces give equal texts on every day.

    Args:
        tokenizer: a transformers tokenizer.
        chat_template: used in place of the tokenizer's own.
        options: more arguments for the template, such as ``{"enable_thinking": True}``.
        date: "YYYY-MM-DD", the day that ``strftime_now`` tells the template, at midnight.

    Raises:
        ValueError: there is no template, ``date`` is none, or the template is random.
    """

    def __init__(
        self,
        tokenizer: Any,
        *,
        chat_template: str | None = None,
        options: Mapping[str, Any] | None = None,
        date: str = DATE,
    ) -> None:
        if chat_template is None and not getattr(tokenizer, "chat_template", None):
            raise ValueError(
                "Renderer: tokenizer must have a chat template, got none. Pass "
                "chat_template=kd.traces.CHATML or the model's own."
            )
        self.tokenizer, self.options = tokenizer, dict(options or {})
        self._given, self._frames = chat_template, dict[str, _Frame]()
        self.source = self._source(None)
        self._clock = _clock(date)
        self.date = date if "strftime_now" in self.source else None
        self._refuse_random()
        self.default_system = self._default_system()

    def facts(self) -> dict[str, Any]:
        """What the rendered text depends on beside the traces, as JSON can hold it."""
        return {
            "template": hashlib.sha256(self.source.encode()).hexdigest()[:16],
            "date": self.date,
            "default_system": self.default_system,
            "options": self.options,
        }

    def prompt(self, trace: Trace) -> tuple[list[Piece], str]:
        """Everything before the answer, in pieces, and the white space that answers begin with.

        Raises:
            RenderError: the template refuses the conversation, or loses or changes a message.
        """
        conversation, tools = messages(trace), trace.metadata.get("tools") or None
        frame = self._frame(conversation, tools)
        header = frame.header if frame.header.strip() else ""
        lead = "" if header else frame.header
        text = self.apply(conversation, tools=tools) + header
        contents = [str(turn["content"]) for turn in conversation]
        names = _names(conversation)
        for shown in (contents, [content.strip() for content in contents]):  # many templates trim
            pieces = [*_filled(frame, shown, names), Piece("", header)]
            if "".join(piece.text for piece in pieces) == text:
                return pieces, lead
        return _found(text, contents, names), lead

    def text(self, trace: Trace) -> str:
        """Everything before the answer."""
        return "".join(piece.text for piece in self.prompt(trace)[0])

    def apply(
        self, conversation: Sequence[Mapping[str, Any]], generation: bool = True, tools: Any = None
    ) -> str:
        """The template's text of a conversation, ready for an answer if ``generation``."""
        source = self._source(tools)
        if "strftime_now" in source:
            source = self._clock + source
        try:
            return str(
                self.tokenizer.apply_chat_template(
                    list(conversation),
                    tools=tools,
                    chat_template=source,
                    add_generation_prompt=generation,
                    tokenize=False,
                    **self.options,
                )
            )
        except Exception as error:  # jinja's own errors: a template may refuse a role or an order
            raise RenderError(
                "chat template refused",
                f"render: trace must fit the chat template, got {type(error).__name__}: {error}. "
                "Pass another chat_template, or drop the system message.",
            ) from error

    def turn_end(self) -> str:
        """What ends an answer: the template's own mark, and always the end-of-sequence token."""
        answer = _PROBES.format(_ANSWER)
        asked = [{"role": "user", "content": "1"}, {"role": "assistant", "content": answer}]
        whole = self.apply(asked, generation=False)
        tail = whole.rpartition(answer)[2] if answer in whole else ""
        eos = str(self.tokenizer.eos_token)
        if eos in tail:
            return tail[: tail.index(eos) + len(eos)]
        return tail.rstrip() + eos

    def words(self) -> str:
        """Everything the template may write itself: its source, and a conversation in it."""
        said = [_turn("user", 0), _turn("assistant", 1), _turn("user", 2)]
        try:
            return self.source + self.apply(said)
        except RenderError:  # one question alone is what it takes
            return self.source + self.apply(said[:1])

    def _source(self, tools: Any) -> str:
        found = getattr(self.tokenizer, "get_chat_template", None)
        if found is None:
            return str(self._given or self.tokenizer.chat_template)
        return str(found(self._given, tools=tools))

    def _refuse_random(self) -> None:
        texts = {self.apply([_turn("user", 0)]) for _ in range(8)}
        if len(texts) > 1 or _RANDOM.search(self.source):
            raise ValueError(
                "Renderer: a chat template must give one text for one conversation, got "
                f"{sorted(texts)[:2]} from a template that draws at random or reads a clock. "
                "A cache of such texts would never be found again: pass another chat_template."
            )

    def _default_system(self) -> str:
        """What the template says in the system's name where a trace has no system message."""
        try:
            told = self.apply([_turn("system", 0), _turn("user", 1)])
            untold = self.apply([_turn("user", 1)])
        except RenderError:  # it takes no system message, and so has no default in its place
            return ""
        question = _PROBES.format(1)
        told, untold = told.partition(question)[0], untold.partition(question)[0]
        start = len(os.path.commonprefix([told, untold]))
        end = len(os.path.commonprefix([told[::-1], untold[::-1]]))
        return untold[start : len(untold) - end].strip()

    def _frame(self, conversation: list[dict[str, Any]], tools: Any) -> _Frame:
        """The frame of such a conversation; every message must be shown in it.

        Raises:
            RenderError: one is not.
        """
        shape = [{**turn, "content": _PROBES.format(i)} for i, turn in enumerate(conversation)]
        key = json.dumps([shape, tools], sort_keys=True, default=str)
        if key in self._frames:
            return self._frames[key]
        text = self.apply(shape, tools=tools)
        found = _PROBE.split(text)
        frame = _Frame(found[::2], list(map(int, found[1::2])), self._header(shape, text, tools))
        for i, name in enumerate(_names(conversation)):
            if i not in frame.order:
                raise _lost(name, "leaves it out")
        own = "".join(frame.parts)
        for called in _function_names([conversation, tools]):
            if called not in own:
                raise _lost(f"tool {called}", "leaves it out")
        if len(self._frames) < 4096:  # traces with tools of their own may each have a shape
            self._frames[key] = frame
        return frame

    def _header(self, shape: list[dict[str, Any]], prompt: str, tools: Any) -> str:
        try:
            if self.apply(shape, generation=False, tools=tools) != prompt:
                return ""
            answered = self.apply([*shape, _turn("assistant", _ANSWER)], False, tools)
        except RenderError:  # it refuses what only asks
            return ""
        before, answer, _ = answered.partition(_PROBES.format(_ANSWER))
        return before[len(prompt) :] if answer and before.startswith(prompt) else ""


def messages(trace: Trace) -> list[dict[str, Any]]:
    """The messages before the answer: system, earlier turns, prompt."""
    made: list[dict[str, Any]] = []
    if trace.system:
        made.append({"role": "system", "content": trace.system})
    for turn in trace.metadata.get("history", ()):
        made.append({**turn, "role": str(turn["role"]), "content": str(turn["content"] or "")})
    return [*made, {"role": "user", "content": trace.prompt}]


def opened_thought(text: str) -> str:
    """The tag with which a rendered prompt opens a thought, as newer R1 templates do; or ''."""
    end = text.rstrip()
    return next((start for start, *_ in MARKS if end.endswith(start)), "")


def closed_thought(text: str) -> bool:
    """Whether a rendered prompt ends with a thought that is over (Qwen3 without thinking)."""
    end = text.rstrip()
    return any(end.endswith(close) for _, close, *_ in MARKS)


def _turn(role: str, number: int) -> dict[str, str]:
    return {"role": role, "content": _PROBES.format(number)}


def _names(conversation: Sequence[Mapping[str, Any]]) -> list[str]:
    """What errors call the messages."""
    first = int(bool(conversation) and conversation[0]["role"] == "system")
    names = ["system"] * first
    names += [f"history[{i}]" for i in range(len(conversation) - first - 1)]
    return [*names, "prompt"]


def _filled(frame: _Frame, contents: Sequence[str], names: Sequence[str]) -> list[Piece]:
    pieces = [Piece("", frame.parts[0])]
    for i, part in zip(frame.order, frame.parts[1:], strict=True):
        pieces += [Piece(names[i], contents[i]), Piece("", part)]
    return pieces


def _found(text: str, contents: Sequence[str], names: Sequence[str]) -> list[Piece]:
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
            raise _lost(names[i], "writes it in another case" if shown else "changes or cuts it")
        spans.append((at, at + len(content), names[i]))
    pieces, here = [], 0
    for start, end, name in sorted(spans):
        pieces += [Piece("", text[here:start]), Piece(name, text[start:end])]
        here = end
    return [*pieces, Piece("", text[here:])]


def _lost(name: str, how: str) -> RenderError:
    kind = "an earlier turn" if name.startswith("history") else f"the {name.partition(' ')[0]}"
    return RenderError(
        f"chat template loses {kind}",
        f"render: {name} must be shown by the chat template as it is, got a template that {how}. "
        "Pass another chat_template (kd.traces.CHATML), or take it out of the trace.",
    )


def _function_names(value: Any) -> set[str]:
    """The names of tools, and of the calls in earlier turns."""
    if isinstance(value, Mapping):
        own = value.get("function", value if "parameters" in value else None)
        name = own.get("name") if isinstance(own, Mapping) else None
        rest = [item for key, item in value.items() if key not in ("content", "parameters")]
        return _function_names(rest) | ({name} if isinstance(name, str) else set())
    if isinstance(value, list):
        return set().union(*map(_function_names, value)) if value else set()
    return set()


def _clock(date: str) -> str:
    """A macro in place of ``strftime_now``: transformers passes no functions to templates."""
    try:
        day = datetime.datetime.strptime(date, "%Y-%m-%d")
    except (TypeError, ValueError):
        raise ValueError(f"Renderer: date must be a day like 2026-01-31, got {date!r}.") from None
    codes = "".join(f"|replace('{code}', '{day.strftime(code)}')" for code in _CODES)
    # The end of the line is the template's own first line's start: Jinja trims it.
    return "{% macro strftime_now(format) %}{{ format" + codes + " }}{% endmacro %}\n"
