"""Tokens that steer a model: those of the tokenizer and those that its chat template writes."""

from __future__ import annotations

import re
from collections.abc import Iterable, Sequence
from typing import Any

from kd.traces.conversations import Piece, RenderError
from kd.traces.templates import BARRED, MARK
from kd.traces.trace import Tags


class ControlTokens:
    """Finds control tokens in texts that must not contain any, and counts them in token ids.

    Control are the tokenizer's special tokens, those of its added tokens that look like one
    (``<|fim_prefix|>``) or are marks that the template writes, its marks that are several tokens
    (Llama 2's ``[INST]``), and the tags of a thought. Added words, and the line ends of Gemma's
    vocabulary, are text.

    Args:
        tokenizer: a transformers tokenizer.
        tags: of the thought.
        written: what the template may write.
    """

    def __init__(self, tokenizer: Any, tags: Tags, written: str) -> None:
        self.tokenizer = tokenizer
        special = set(map(str, tokenizer.all_special_tokens))
        added = getattr(tokenizer, "added_tokens_decoder", {})
        for token in added.values():
            text = str(token.content)
            marked = re.search(r"[<>\[\]|｜◁▷]", text) and text in written
            if token.special or marked or re.fullmatch(BARRED, text):
                special.add(text)
        for part in (tags.start, tags.middle, tags.end):
            special.update(part.split())
        special = {token for token in special if token.strip()}
        ids = {number for number, token in added.items() if str(token.content) in special}
        ids |= set(tokenizer.all_special_ids)
        self.ids = frozenset(map(int, ids)) - _unknown(tokenizer)
        names = sorted(special | set(MARK.findall(written)), key=len, reverse=True)
        self._names = re.compile("|".join(map(re.escape, names)))
        self._known: dict[str, list[int]] = {}

    def find(self, text: str) -> tuple[str, int] | None:
        """The first control token in a text and its place, by name; None where there is none."""
        found = self._names.search(text)
        return (found.group(), found.start()) if found else None

    def check(self, pieces: Sequence[Piece], ids: Sequence[int]) -> None:
        """Every control token must be the template's own, in its order."""
        segments, last = [""], True
        for who, text in pieces:
            if who:
                last = False
            elif last:
                segments[-1] += text
            else:
                segments.append(text)
                last = True
        if self.of_ids(ids) == self.of_segments(segments):
            return
        for who, text in pieces:
            token = self.hidden(text) if who else None
            if token:
                raise special(who, f"text that becomes {token!r}")
        raise special("a message", "text that becomes one together with what stands beside it")

    def hidden(self, text: str) -> str | None:
        """A control token that a text becomes although it does not spell it (normalisation,
        pieces of a vocabulary that stand for bytes)."""
        ids = self.of_ids(self.tokenizer(text, add_special_tokens=False).input_ids)
        return str(self.tokenizer.convert_ids_to_tokens(ids[0])) if ids else None

    def of_ids(self, ids: Iterable[int]) -> list[int]:
        """Those of the ids that are control tokens, in order."""
        return [i for i in ids if i in self.ids]

    def of_segments(self, segments: Sequence[str]) -> list[int]:
        """The control tokens of the template's own texts, each tokenised once."""
        found: list[int] = []
        for text in segments:
            if text not in self._known:
                if len(self._known) >= 4096:
                    self._known.clear()
                ids = self.tokenizer(text, add_special_tokens=False).input_ids
                self._known[text] = self.of_ids(ids)
            found += self._known[text]
        return found


def special(name: str, found: str) -> RenderError:
    return RenderError(
        "special token in the text",
        f"render: {name} must not contain special tokens, got {found}. Drop the record or escape "
        "the token.",
    )


def _unknown(tokenizer: Any) -> set[int]:
    """The id of text that a vocabulary does not have, unless it has another role as well."""
    number = getattr(tokenizer, "unk_token_id", None)
    roles = [
        getattr(tokenizer, f"{role}_token_id", None)
        for role in ("bos", "eos", "pad", "sep", "cls", "mask")
    ]
    return set() if number is None or number in roles else {int(number)}
