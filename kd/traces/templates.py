"""A chat template held still: one date, one answer to one question, every message kept whole."""

from __future__ import annotations

import hashlib
import json
import os
import re
from collections.abc import Mapping, Sequence
from itertools import pairwise
from typing import Any

from kd.traces.clock import DATE, clock
from kd.traces.conversations import (
    Frame,
    Piece,
    RenderError,
    filled,
    function_names,
    located,
    lost,
    messages,
    names_of,
    tools_of,
)
from kd.traces.trace import MARKS, Tags, Trace

# Digits: no template changes their case, cuts or strips them, and no template writes them itself.
_PROBES = "9021{:06d}7043"
_PROBE = re.compile(r"9021(\d{6})7043")
_ANSWER = 999_999
# <|im_end|>, <｜User｜>, <|turn>
BARRED = r"<\|[^|<>\s]+\|>|<｜[^｜<>\s]+｜>|<\|\w+>|<\w+\|>|\[\|\w+\|\]"
# </think>, [INST], <<SYS>>, ◁think▷: control where the template itself writes it, else text
MARK = re.compile(BARRED + r"|</?\w+>|\[/?[A-Z][A-Z_]+\]|<</?[A-Z]+>>|◁/?\w+▷")
_THOUGHT = re.compile(r"\b(thoughts?|thinking|reasoning)\b", re.IGNORECASE)
_RANDOM = re.compile(r"\|\s*random\b|\blipsum\s*\(")


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
        self._given, self._frames = chat_template, dict[str, Frame]()
        self.source = self._source(None)
        self._clock = clock(date)
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

    def prompt(self, trace: Trace) -> tuple[list[Piece], Frame]:
        """Everything before the completion, in pieces, and the conversation's frame.

        Raises:
            RenderError: the template refuses the conversation, or loses or changes a message.
        """
        conversation, tools = messages(trace), tools_of(trace)
        frame = self._frame(conversation, tools)
        text = self.apply(conversation, tools=tools) + frame.header
        contents = [str(turn["content"]) for turn in conversation]
        names = names_of(conversation)
        for shown in (contents, [content.strip() for content in contents]):  # many templates trim
            pieces = filled(frame, shown, names)
            if "".join(piece.text for piece in pieces) == text:
                return pieces, frame
        return located(text, contents, names), frame

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
        asked = _turn("user", 0)
        whole = self.apply([asked, _turn("assistant", _ANSWER)], generation=False)
        tail = whole.rpartition(answer)[2] if answer in whole else ""
        eos = str(self.tokenizer.eos_token)
        if eos in tail:
            return tail[: tail.index(eos) + len(eos)]
        alone = self.apply([asked], generation=False)
        if alone == self.apply([asked]):  # perhaps a header is written, asked for or not
            opening = MARK.findall(alone.partition(str(asked["content"]))[0])
            mark = next((mark for mark in reversed(opening) if mark in tail), None)
            tail = tail.partition(mark)[0] if mark else tail
        return tail.rstrip() + eos

    def tags(self) -> Tags | None:
        """How the template itself writes the thought of an answer, where it takes one at all."""
        asked: list[dict[str, Any]] = [_turn("user", 0)]
        thought, answer = _PROBES.format(_ANSWER - 1), _PROBES.format(_ANSWER)
        said = {**_turn("assistant", _ANSWER), "reasoning_content": thought}
        try:
            prompt = self.apply(asked)
            whole = self.apply([*asked, said], generation=False)
            lead = self._frame(asked, None).lead
        except RenderError:
            return None
        before, found, rest = whole.partition(thought)
        middle, answered, _ = rest.partition(answer)
        opened = opened_thought(prompt)
        base = prompt.rstrip().removesuffix(opened) if opened else prompt
        if not found or not answered or not before.startswith(base):
            return None
        return Tags(before[len(base) :].removeprefix(lead), middle)

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

    def _frame(self, conversation: list[dict[str, Any]], tools: Any) -> Frame:
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
        around = self._before_answer(shape, text, tools)
        frame = Frame(found[::2], list(map(int, found[1::2])), *around)
        names = names_of(conversation)
        for i, name in enumerate(names):
            if i not in frame.order:
                raise lost(name, "leaves it out")
        turns = [i for i in frame.order if names[i] != "system"]  # which may stand anywhere
        for before, after in pairwise(turns):
            if before >= after:
                raise lost(names[after], "writes it twice" if before == after else "moves it")
        own = "".join(frame.parts)
        for called in function_names([conversation, tools]):
            if called not in own:
                raise lost(f"tool {called}", "leaves it out")
        if len(self._frames) < 4096:  # traces with tools of their own may each have a shape
            self._frames[key] = frame
        return frame

    def _before_answer(
        self, shape: list[dict[str, Any]], prompt: str, tools: Any
    ) -> tuple[str, str, str]:
        """(header, lead, bare) of a frame, from the conversation with an answer."""
        try:
            ignored = self.apply(shape, False, tools) == prompt
            answered = self.apply([*shape, _turn("assistant", _ANSWER)], False, tools)
        except RenderError:  # it refuses what only asks
            answered = ""
        before, answer, _ = answered.partition(_PROBES.format(_ANSWER))
        if not answer or not before.startswith(prompt):
            try:  # as after one question alone
                plain = self._frame([_turn("user", 0)], None) if len(shape) > 1 else None
            except RenderError:
                plain = None
            return ("", plain.lead, plain.bare) if plain else ("", "", "")
        bare = before[len(prompt) :]
        marks = [bare.index(mark) for pair in MARKS for mark in pair[:2] if mark in bare]
        lead = bare[: min(marks)] if marks else bare  # thoughts are ours to write
        if opened_thought(prompt):
            return "", "", bare if marks else ""
        if ignored and lead.strip():
            return lead, "", bare[len(lead) :]
        return "", lead, bare


def opened_thought(text: str) -> str:
    """The tag with which a rendered prompt opens a thought, as newer R1 templates do; or ''."""
    end = text.rstrip()
    return next((start for start, *_ in MARKS if end.endswith(start)), "")


def closed_thought(text: str) -> bool:
    """Whether the end of a prompt holds a thought that is over (Qwen3 without thinking), or one
    of a form that is not known."""
    end = text.rstrip()
    return any(end.endswith(close) for _, close, *_ in MARKS) or bool(_THOUGHT.search(end))


def _turn(role: str, number: int) -> dict[str, str]:
    return {"role": role, "content": _PROBES.format(number)}
