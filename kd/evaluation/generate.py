"""Completions of many prompts from a local transformers model, greedy or sampled."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

from kd.traces import Sampling, Trace, complete
from kd.traces.templates import ChatTemplate


def generate(
    model: Any,
    tokenizer: Any,
    prompts: Sequence[str],
    *,
    max_new_tokens: int,
    temperature: float = 0.0,
    top_p: float = 1.0,
    batch_size: int = 64,
    seed: int = 0,
    chat: bool = False,
    progress: Callable[[int], None] | None = None,
) -> list[str]:
    """Complete every prompt; prompts of like length share a batch.

    Args:
        model: a causal LM; it is put in eval mode while this runs.
        tokenizer: a transformers tokenizer; padding goes to the left whatever it says itself.
        prompts: texts, or user messages when ``chat``.
        max_new_tokens: at most so many tokens are generated.
        temperature: 0 is greedy decoding.
        top_p: nucleus sampling; 1 is off.
        batch_size: prompts decoded together.
        seed: of the sampling.
        chat: wrap each prompt with the tokenizer's chat template as a user's message.
        progress: called with the number of prompts done.

    Returns:
        The completions in the order of the prompts, special tokens kept except padding and the
        end of the turn; the prompt is not repeated.
    """
    sampling = Sampling(temperature, top_p, max_new_tokens, seed)
    template = ChatTemplate(tokenizer) if chat else None
    texts = [prompt if template is None else template.text(Trace(prompt)) for prompt in prompts]
    encoded = [list(tokenizer(text, add_special_tokens=False).input_ids) for text in texts]
    order = sorted(range(len(prompts)), key=lambda i: len(encoded[i]))
    completions = [""] * len(prompts)
    for start in range(0, len(order), batch_size):
        chosen = order[start : start + batch_size]
        rows = [encoded[i] for i in chosen]
        new = complete(model, tokenizer, rows, sampling, seed + start)
        for i, (ids, _) in zip(chosen, new, strict=True):
            completions[i] = tokenizer.decode(ids)
        if progress is not None:
            progress(start + len(chosen))
    return completions
