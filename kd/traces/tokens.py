"""From texts to ids: a prompt and its completion as one text, a plain text as it is."""

from __future__ import annotations

from typing import Any, NamedTuple

from kd.traces.conversations import RenderError

IGNORE = -100
AS_IS = {"skip_special_tokens": False, "clean_up_tokenization_spaces": False}


class Rendered(NamedTuple):
    """Token ids and labels of one trace; ``labels`` is -100 on the prompt, else the id itself."""

    input_ids: list[int]
    labels: list[int]


def plain(tokenizer: Any, text: str) -> Rendered:
    """A text as pre-training has it: with the special tokens that the tokenizer puts around a
    text, all of it trained. Those that it spells itself count: it may be a rendered conversation.

    Raises:
        RenderError: it is empty.
    """
    if not text.strip():
        raise RenderError("empty text", f"render: text must say something, got {text[:20]!r}.")
    ids = encode(tokenizer, [text], special=True)[0]
    begins, number = getattr(tokenizer, "bos_token", None), getattr(tokenizer, "bos_token_id", None)
    if begins and text.startswith(begins) and ids[:2] == [number, number]:
        ids = ids[1:]  # spelled in the text, and added to it
    return Rendered(ids, list(ids))


def encode(tokenizer: Any, texts: list[str], special: bool = False) -> list[list[int]]:
    found = tokenizer(texts, add_special_tokens=special, truncation=False, padding=False)
    return [list(ids) for ids in found.input_ids]


def border(tokenizer: Any, alone: list[int], whole: list[int]) -> int:
    """Where the completion starts in the ids of the whole text.

    Raises:
        RenderError: a token holds the prompt's end and the completion's start.
    """
    if whole[: len(alone)] == alone:
        return len(alone)
    pairs = enumerate(zip(alone, whole, strict=False))
    same = next((i for i, (one, other) in pairs if one != other), len(whole))
    wanted = tokenizer.decode(alone, **AS_IS)
    for start in range(same + 1, min(len(whole), 2 * len(alone) + 8)):
        if tokenizer.decode(whole[:start], **AS_IS) == wanted:
            return start
    raise RenderError(
        "a token holds the end of the prompt and the start of the completion",
        "render: prompt and completion must not share a token, got "
        f"{tokenizer.decode(whole[max(same - 2, 0) : same + 2], **AS_IS)!r} around the "
        "prompt's end. Pass tags or a chat_template that end with a special token, or strip "
        "the white space at the start of the answer.",
    )
