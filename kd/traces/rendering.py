"""Traces and texts to the token ids that are captured and trained on, without losing a thought."""

from __future__ import annotations

import json
import unicodedata
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import Any

from kd.traces.clock import DATE
from kd.traces.control import ControlTokens, special
from kd.traces.conversations import Piece, RenderError, messages, tools_of
from kd.traces.templates import ChatTemplate, closed_thought, opened_thought
from kd.traces.tokens import AS_IS, IGNORE, Rendered, border, encode, plain
from kd.traces.trace import R1, Tags, Trace

CHATML = (
    "{% for message in messages %}<|im_start|>{{ message['role'] }}\n{{ message['content'] }}"
    "<|im_end|>\n{% endfor %}{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)
_BATCH = 256


class Renderer:
    """Renders traces and plain texts for one tokenizer; ``kd cache build`` and training share it.

    The template writes the conversation up to the answer; thought and answer are then written
    by us (R1-Distill's template would delete the thought, others rewrite it), and the turn ends
    as the template ends it. A template that has already opened ``<think>`` gets no second one.
    Prompt and completion are tokenised as one text. Every rendered trace is decoded and parsed
    back; one that does not survive, or in which a control token is not the template's own, is an
    error.

    Args:
        tokenizer: the student's.
        tags: how a thought is written; ``R1`` (``<think>`` on lines of its own) by default,
            ``COMPACT`` without newlines, ``SKY_T1``, or your own. None: as the chat template
            writes it, or ``R1`` where it takes no thought.
        chat_template: used in place of the tokenizer's own.
        template_options: more arguments for the template, such as ``{"enable_thinking": True}``.
        date: the day, "YYYY-MM-DD", that a template is told which prints today's.

    Attributes:
        seen: how many traces had "thoughts", and how many the template gave a "default system
            prompt", "empty thoughts" or "trimmed messages".
        rendered: how many traces there were.

    Raises:
        ValueError: the tokenizer has no template or no end-of-sequence token, or the template
            draws at random.
    """

    def __init__(
        self,
        tokenizer: Any,
        *,
        tags: Tags | None = R1,
        chat_template: str | None = None,
        template_options: Mapping[str, Any] | None = None,
        date: str = DATE,
    ) -> None:
        self.tokenizer = tokenizer
        self.template = ChatTemplate(
            tokenizer, chat_template=chat_template, options=template_options, date=date
        )
        own = self.template.tags()
        self.tags = tags or own or R1
        self.own_tags = own if own != self.tags else None
        if tokenizer.eos_token_id is None:
            raise ValueError(
                "Renderer: tokenizer must have an end-of-sequence token, got None. "
                "Set tokenizer.eos_token to the token that ends a turn."
            )
        self.turn_end = self.template.turn_end()
        self.control = ControlTokens(tokenizer, self.tags, self.template.words() + self.turn_end)
        self.seen: Counter[str] = Counter()
        self.rendered = 0

    def facts(self) -> dict[str, Any]:
        """What ids depend on beside trace and tokenizer: the template's facts and the tags."""
        return {**self.template.facts(), "tags": list(vars(self.tags).values())}

    def remarks(self) -> list[str]:
        """What a user should know of the texts, in words: what the template added to them."""
        told, found = self.template, []
        if told.date and self.rendered:
            found.append(f"the chat template prints a date: it was told {told.date}")
        if self.seen["default system prompt"]:
            found.append(
                f"the chat template adds a system prompt to {self.seen['default system prompt']:,} "
                f"traces that have none: {told.default_system!r:.120}"
            )
        if self.seen["empty thoughts"]:
            found.append(
                "the chat template puts an empty thought before answers that have none: "
                f"{self.seen['empty thoughts']:,} traces"
            )
        if self.own_tags is not None and self.seen["thoughts"]:
            own, used = (f"{tags.start!r}...{tags.middle!r}" for tags in (self.own_tags, self.tags))
            found.append(
                f"the chat template itself writes a thought as {own}, and it was written as "
                f"{used}; --tags template (tags=None) does as the template"
            )
        if self.seen["trimmed messages"]:
            found.append(
                "the chat template takes white space off the ends of messages: "
                f"{self.seen['trimmed messages']:,} traces"
            )
        return found

    def __call__(self, item: Trace | str, *, check: bool = True) -> Rendered:
        """Render one trace, or one plain text (every token of it is trained).

        Args:
            item: a trace with an answer, or a text.
            check: decode and parse the result, and compare it with the trace.

        Raises:
            RenderError: the trace cannot be rendered, or does not survive the round trip.
        """
        outcome = next(self.render_all([item], check=check))[1]
        if isinstance(outcome, RenderError):
            raise outcome
        return outcome

    def render_all(
        self, items: Iterable[Trace | str], *, check: bool = True
    ) -> Iterator[tuple[Trace | str, Rendered | RenderError]]:
        """Every trace or text with its ids, or with the error that it met, in order."""
        batch: list[Trace | str] = []
        for item in items:
            batch.append(item)
            if len(batch) == _BATCH:
                yield from self._batch(batch, check)
                batch = []
        if batch:
            yield from self._batch(batch, check)

    def texts(self, trace: Trace) -> tuple[str, str]:
        """The prompt's text and the completion's, which ends with the end of the turn."""
        prompt, completion = self._pieces(trace)
        return _joined(prompt), _joined(completion)

    def parse(self, prompt: str, completion: str, lead: str = "") -> tuple[str, str]:
        """Read (think, answer) back from a rendered text; ``lead`` is what answers begin with."""
        text = completion.removesuffix(self.turn_end).lstrip()
        if not opened_thought(prompt):
            text = text.removeprefix(lead.strip())
        opened = self.tags.start.strip()
        middle = self.tags.middle.strip()
        if not opened_thought(prompt) and not text.lstrip().startswith(opened):
            return "", text
        think, found, answer = text.lstrip().removeprefix(opened).partition(middle)
        if not found:
            return think.strip(), ""
        return think.strip(), answer.strip().removesuffix(self.tags.end.strip()).strip()

    def _pieces(self, trace: Trace) -> tuple[list[Piece], list[Piece]]:
        """The prompt and the completion, each text with whose it is."""
        self._refuse_control(trace)
        prompt, frame = self.template.prompt(trace)
        text, tags, start = _joined(prompt), self.tags, self.tags.start
        opened = opened_thought(text)
        ours = opened or start.strip() in frame.bare or not closed_thought(frame.bare)
        lead = frame.bare if not trace.think and ours else frame.lead
        if opened and opened != start.strip():
            raise RenderError(
                "chat template opens a thought of another form",
                f"render: tags must open a thought as the chat template does, got {start.strip()!r}"
                f" and {opened!r}. Pass tags=kd.traces.R1, or another chat_template.",
            )
        if trace.think and not opened and closed_thought(prompt[-1].text or prompt[-2].text):
            raise RenderError(
                "chat template closes the thought",
                "render: a trace with a thought must have a chat template that lets it think, got "
                f"a prompt that ends with {text[-24:]!r}. Pass template_options="
                "{'enable_thinking': True}, or what the template calls it.",
            )
        if trace.think and lead.strip():
            if not tags.middle.rstrip().endswith(lead.strip()):
                raise RenderError(
                    "chat template marks the answer after a thought in its own way",
                    f"render: tags must end a thought as the chat template begins an answer, got "
                    f"{tags.middle!r} and {lead!r}. Pass kd.traces.Tags(start, middle) in which "
                    "middle ends with it.",
                )
            lead = ""
        if opened:
            start = start[len(start.rstrip()) :]
            start = start.lstrip("\n") if text.endswith("\n") else start
        answer = [Piece("answer", trace.answer)]
        if trace.think:
            thought = [Piece("", start), Piece("think", trace.think), Piece("", tags.middle)]
            answer = [*thought, *answer, Piece("", tags.end)]
        elif opened:  # close the thought that the template has opened, as it does or as we do
            lead = lead or tags.middle.lstrip()
        return prompt, [Piece("", lead), *answer, Piece("", self.turn_end)]

    def _refuse_control(self, trace: Trace) -> None:
        if not trace.answer.strip():
            raise RenderError(
                "empty answer", "render: trace must have an answer, got an empty one."
            )
        if trace.metadata.get("tool_calls"):
            raise RenderError(
                "tool call", "render: trace must end in its answer, got one that calls a tool."
            )
        said = [("think", trace.think), ("answer", trace.answer)]
        for i, turn in enumerate(messages(trace)):
            rest = {key: value for key, value in turn.items() if key not in ("role", "content")}
            said.append((f"the {turn['role']} message {i}", str(turn["content"])))
            said.append((f"the rest of message {i}", json.dumps(rest, ensure_ascii=False)))
        said.append(("tools", json.dumps(tools_of(trace), ensure_ascii=False)))
        for name, text in said:
            if not text.isascii():
                try:
                    text.encode()
                except UnicodeEncodeError as error:
                    raise RenderError(
                        "invalid UTF-8", f"render: {name} must be valid Unicode, got {error}."
                    ) from None
            found = self.control.find(text)
            if found:
                raise special(name, f"{found[0]!r} at character {found[1]}")

    def _batch(
        self, items: Sequence[Trace | str], check: bool
    ) -> Iterator[tuple[Trace | str, Rendered | RenderError]]:
        outcomes: list[Rendered | RenderError | None] = [None] * len(items)
        ready: list[tuple[int, list[Piece], list[Piece]]] = []
        for i, item in enumerate(items):
            try:
                if isinstance(item, str):
                    outcomes[i] = plain(self.tokenizer, item)
                else:
                    ready.append((i, *self._pieces(item)))
            except RenderError as error:
                outcomes[i] = error
        texts = [_joined(prompt) for _, prompt, _ in ready]
        texts += [_joined(prompt + completion) for _, prompt, completion in ready]
        encoded = encode(self.tokenizer, texts) if texts else []
        for (i, prompt, completion), alone, whole in zip(
            ready, encoded[: len(ready)], encoded[len(ready) :], strict=True
        ):
            item = items[i]
            assert isinstance(item, Trace)
            try:
                start = border(self.tokenizer, alone, whole)
                self.control.check(prompt + completion, whole)
                if check:
                    self._check_round_trip(item, prompt, completion, whole, start)
                outcomes[i] = Rendered(whole, [IGNORE] * start + whole[start:])
                self._note(item, prompt, completion[0].text)
            except RenderError as error:
                outcomes[i] = error
        for item, made in zip(items, outcomes, strict=True):
            assert made is not None
            yield item, made

    def _check_round_trip(
        self,
        trace: Trace,
        prompt: Sequence[Piece],
        completion: Sequence[Piece],
        ids: list[int],
        start: int,
    ) -> None:
        decoded = self.tokenizer.decode(ids[start:], **AS_IS)
        think, answer = self.parse(_joined(prompt), decoded, completion[0].text)
        lost = ""
        if _canonical(think) != _canonical(trace.think):
            lost = "thought"
        elif _canonical(answer) != _canonical(trace.answer):
            lost = "answer"
        else:
            shown = _canonical(self.tokenizer.decode(ids[:start], **AS_IS))
            lost = next((who for who, text in prompt if who and _canonical(text) not in shown), "")
        if lost:
            raise RenderError(
                f"round trip lost the {lost.partition('[')[0]}",
                "render: trace must survive tokenising and parsing, got "
                f"{decoded[:80]!r} back for {trace.answer[:40]!r}: the {lost} differs. Choose "
                "other tags or check the tokenizer's vocabulary.",
            )

    def _note(self, trace: Trace, prompt: Sequence[Piece], lead: str) -> None:
        self.rendered += 1
        self.seen["thoughts"] += bool(trace.think)
        if closed_thought(lead):
            self.seen["empty thoughts"] += 1
        if not trace.system and self.template.default_system:
            self.seen["default system prompt"] += 1
        shown = {piece.text for piece in prompt if piece.who}
        if any(str(turn["content"]) not in shown for turn in messages(trace)):
            self.seen["trimmed messages"] += 1


def _joined(pieces: Iterable[Piece]) -> str:
    return "".join(piece.text for piece in pieces)


def _canonical(text: str) -> str:
    """Tokenizers may normalise (Qwen's composes characters), and our tags trim the ends."""
    text = text.strip()
    return text if text.isascii() else unicodedata.normalize("NFC", text)
