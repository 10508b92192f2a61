"""Traces to token ids of the student's chat template, without losing the thought."""

from __future__ import annotations

import re
import unicodedata
from collections.abc import Iterable, Iterator, Sequence
from typing import Any, NamedTuple

from kd.traces.generation import ends_in_open_thought, messages
from kd.traces.trace import R1, Tags, Trace
from kd.traces.yields import Tally, Yield, metered

IGNORE = -100
CHATML = (
    "{% for message in messages %}<|im_start|>{{ message['role'] }}\n{{ message['content'] }}"
    "<|im_end|>\n{% endfor %}{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)
_PROBE = "KDPROBEANSWER"
_BATCH = 256


class Rendered(NamedTuple):
    """Token ids and labels of one trace; ``labels`` is -100 on the prompt, else the id itself."""

    input_ids: list[int]
    labels: list[int]


class RenderError(ValueError):
    """A trace cannot be rendered; ``reason`` is the phrase that yields count."""

    def __init__(self, reason: str, message: str) -> None:
        super().__init__(message)
        self.reason = reason


class Renderer:
    """Renders traces for one tokenizer.

    The template writes the conversation up to the answer; thought and answer are then written
    by us (R1-Distill's template would delete the thought, others rewrite it), and the turn ends
    as the template ends it. A template that has already opened ``<think>`` gets no second one.
    Every rendered trace is decoded and parsed back; one that does not survive is an error.

    Args:
        tokenizer: the student's.
        tags: how a thought is written; ``R1`` (``<think>`` on lines of its own) by default,
            ``COMPACT`` without newlines, ``SKY_T1``, or your own.
        chat_template: used in place of the tokenizer's own.
        template_options: more arguments for the template, such as ``{"enable_thinking": True}``.

    Raises:
        ValueError: the tokenizer has no template or no end-of-sequence token, or pads with it.
    """

    def __init__(
        self,
        tokenizer: Any,
        *,
        tags: Tags = R1,
        chat_template: str | None = None,
        template_options: dict[str, Any] | None = None,
    ) -> None:
        self.tokenizer = tokenizer
        self.tags = tags
        self.options = dict(template_options or {})
        if chat_template is not None:
            self.options["chat_template"] = chat_template
        elif not getattr(tokenizer, "chat_template", None):
            raise ValueError(
                "Renderer: tokenizer must have a chat template, got none. Pass "
                "chat_template=kd.traces.CHATML or the model's own."
            )
        if tokenizer.eos_token_id is None:
            raise ValueError(
                "Renderer: tokenizer must have an end-of-sequence token, got None. "
                "Set tokenizer.eos_token to the token that ends a turn."
            )
        self.turn_end = self._turn_end()
        template = str(self.options.get("chat_template") or tokenizer.chat_template)
        tokens = sorted(_control_tokens(tokenizer, tags, template), key=len, reverse=True)
        self._special = re.compile("|".join(map(re.escape, tokens)))

    def __call__(self, trace: Trace, *, check: bool = True) -> Rendered:
        """Render one trace.

        Args:
            trace: with an answer.
            check: decode and parse the result, and compare it with the trace.

        Raises:
            RenderError: the trace cannot be rendered, or does not survive the round trip.
        """
        outcome = next(self.render_all([trace], check=check))
        if isinstance(outcome[1], RenderError):
            raise outcome[1]
        return outcome[1]

    def render_all(
        self, traces: Iterable[Trace], *, check: bool = True
    ) -> Iterator[tuple[Trace, Rendered | RenderError]]:
        """Every trace with its ids, or with the error that it met, in order."""
        batch: list[Trace] = []
        for trace in traces:
            batch.append(trace)
            if len(batch) == _BATCH:
                yield from self._batch(batch, check)
                batch = []
        if batch:
            yield from self._batch(batch, check)

    def texts(self, trace: Trace) -> tuple[str, str]:
        """The prompt's text and the completion's, which ends with the end of the turn."""
        self._refuse_special(trace)
        prompt = self._apply(messages(trace))
        written = self.tags.write(trace.think, trace.answer)
        if ends_in_open_thought(prompt):
            if not trace.think:
                # close the thought that the template has opened
                written = f"{self.tags.middle.lstrip()}{trace.answer}"
            elif written.startswith(self.tags.start.rstrip()):
                written = written[len(self.tags.start.rstrip()) :]
                written = written.lstrip("\n") if prompt[-1] == "\n" else written
        return prompt, written + self.turn_end

    def parse(self, prompt: str, completion: str) -> tuple[str, str]:
        """Read (think, answer) back from a rendered text."""
        text = completion.removesuffix(self.turn_end)
        opened = self.tags.start.strip()
        middle = self.tags.middle.strip()
        if not ends_in_open_thought(prompt) and not text.startswith(opened):
            return "", text
        think, found, answer = text.removeprefix(opened).partition(middle)
        if not found:
            return think.strip(), ""
        return think.strip(), answer.strip().removesuffix(self.tags.end.strip()).strip()

    def _batch(
        self, traces: Sequence[Trace], check: bool
    ) -> Iterator[tuple[Trace, Rendered | RenderError]]:
        outcomes: list[Rendered | RenderError | None] = [None] * len(traces)
        ready: list[int] = []
        texts: list[str] = []
        for i, trace in enumerate(traces):
            try:
                texts.extend(self.texts(trace))
                ready.append(i)
            except RenderError as error:
                outcomes[i] = error
        encoded = self.tokenizer(texts, add_special_tokens=False).input_ids if texts else []
        back: list[str] = []
        if check and ready:
            back = self.tokenizer.batch_decode(
                encoded[1::2], skip_special_tokens=False, clean_up_tokenization_spaces=False
            )
        for at, i in enumerate(ready):
            prompt, completion = encoded[2 * at], encoded[2 * at + 1]
            labels = [IGNORE] * len(prompt) + list(completion)
            outcome: Rendered | RenderError = Rendered([*prompt, *completion], labels)
            if check:
                outcome = self._checked(traces[i], texts[2 * at], back[at]) or outcome
            outcomes[i] = outcome
        for trace, made in zip(traces, outcomes, strict=True):
            assert made is not None
            yield trace, made

    def _checked(self, trace: Trace, prompt: str, decoded: str) -> RenderError | None:
        wanted = (_canonical(trace.think), _canonical(trace.answer))
        think, answer = self.parse(prompt, decoded)
        if (_canonical(think), _canonical(answer)) == wanted:
            return None
        lost = "thought" if _canonical(think) != wanted[0] else "answer"
        return RenderError(
            f"round trip lost the {lost}",
            f"render: trace must survive tokenising and parsing, got {decoded[:80]!r} back for "
            f"{trace.answer[:40]!r}. Choose other tags or check the tokenizer's vocabulary.",
        )

    def _refuse_special(self, trace: Trace) -> None:
        if not trace.answer.strip():
            raise RenderError(
                "empty answer", "render: trace must have an answer, got an empty one."
            )
        for name in ("system", "prompt", "think", "answer"):
            found = self._special.search(getattr(trace, name))
            if found:
                raise RenderError(
                    "special token in the text",
                    f"render: {name} must not contain special tokens, got {found.group()!r} at "
                    f"character {found.start()}. Drop the record or escape the token.",
                )

    def _apply(self, conversation: list[dict[str, str]], generation: bool = True) -> str:
        try:
            return str(
                self.tokenizer.apply_chat_template(
                    conversation, add_generation_prompt=generation, tokenize=False, **self.options
                )
            )
        except Exception as error:  # jinja's own errors: a template may refuse a role or an order
            raise RenderError(
                "chat template refused",
                f"render: trace must fit the chat template, got {type(error).__name__}: {error}. "
                "Pass another chat_template, or drop the system message.",
            ) from error

    def _turn_end(self) -> str:
        """What ends an answer: the template's own mark, and always the end-of-sequence token."""
        asked = {"role": "user", "content": "1"}
        whole = self._apply([asked, {"role": "assistant", "content": _PROBE}], generation=False)
        tail = whole.rpartition(_PROBE)[2] if _PROBE in whole else ""
        eos = self.tokenizer.eos_token
        if eos in tail:
            return tail[: tail.index(eos) + len(eos)]
        return tail.rstrip() + eos


def render(trace: Trace, tokenizer: Any, **options: Any) -> Rendered:
    """Render one trace: ``input_ids, labels = render(trace, tokenizer)``.

    Args:
        trace: with an answer.
        tokenizer: the student's.
        **options: of ``Renderer``: tags, chat_template, ... For many traces make one ``Renderer``.

    Returns:
        ``input_ids`` and ``labels``: -100 on the prompt, the ids themselves on thought, answer
        and end of turn. Labels are not shifted; the training collator does that.
    """
    return Renderer(tokenizer, **options)(trace)


def render_stream(
    traces: Iterable[Trace],
    renderer: Renderer,
    *,
    report: Yield,
    stage: str = "render",
    max_tokens: int | None = None,
    check: bool = True,
) -> Iterator[tuple[Trace, Rendered]]:
    """Render many traces; those that cannot be are dropped and counted.

    Args:
        traces: what to render.
        renderer: for the student's tokenizer.
        report: takes the counts, and the token counts as notes.
        stage: the stage's name in the report.
        max_tokens: longer ones are dropped, never cut.
        check: the round trip of every trace.
    """
    tally = report.stage(stage)
    return metered(tally, _rendered(traces, renderer, tally, max_tokens, check))


def _rendered(
    traces: Iterable[Trace],
    renderer: Renderer,
    tally: Tally,
    max_tokens: int | None,
    check: bool,
) -> Iterator[tuple[Trace, Rendered]]:
    notes = tally.notes
    for key in ("tokens", "trained_tokens"):
        notes.setdefault(key, 0)
    for trace, outcome in renderer.render_all(traces, check=check):
        if isinstance(outcome, RenderError):
            tally.drop(outcome.reason, trace, str(outcome))
        elif max_tokens is not None and len(outcome.input_ids) > max_tokens:
            tally.drop(
                f"longer than {max_tokens} tokens", trace, f"{len(outcome.input_ids)} tokens"
            )
        else:
            tally.keep()
            notes["tokens"] += len(outcome.input_ids)
            notes["trained_tokens"] += len(outcome.labels) - outcome.labels.count(IGNORE)
            yield trace, outcome


def _canonical(text: str) -> str:
    """Tokenizers may normalise (Qwen's composes characters), and our tags trim the ends."""
    text = text.strip()
    return text if text.isascii() else unicodedata.normalize("NFC", text)


def _control_tokens(tokenizer: Any, tags: Tags, template: str) -> set[str]:
    """Tokens a text must not contain: every special one, the tags of the thought, and what the
    template writes that is one token (R1-Distill's ``<｜User｜>`` is added, but not special)."""
    special = {str(token) for token in tokenizer.all_special_tokens}
    for token in getattr(tokenizer, "added_tokens_decoder", {}).values():
        if token.special or str(token.content) in template:
            special.add(str(token.content))
    for part in (tags.start, tags.middle):
        special.update(part.split())
    return {token for token in special if token}
