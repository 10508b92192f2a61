"""Completions of many prompts from a local transformers model, greedy or sampled."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch


@torch.no_grad()
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
        end-of-sequence token; the prompt is not repeated.
    """
    if max_new_tokens < 1:
        raise ValueError(f"generate: max_new_tokens must be at least 1, got {max_new_tokens}.")
    if temperature < 0:
        raise ValueError(
            f"generate: temperature must be at least 0, got {temperature}. Use 0 for greedy."
        )
    encoded = [_encode(tokenizer, prompt, chat) for prompt in prompts]
    order = sorted(range(len(prompts)), key=lambda i: len(encoded[i]))
    sampling: dict[str, Any] = {"do_sample": False}
    if temperature > 0:
        sampling = {"do_sample": True, "temperature": temperature, "top_p": top_p, "top_k": 0}
    device = next(model.parameters()).device
    completions = [""] * len(prompts)
    was_training = model.training
    model.eval()
    try:
        with torch.random.fork_rng(devices=[device] if device.type == "cuda" else []):
            torch.manual_seed(seed)
            for start in range(0, len(order), batch_size):
                chosen = order[start : start + batch_size]
                rows = [encoded[i] for i in chosen]
                new = _complete(model, tokenizer, rows, max_new_tokens, sampling, device)
                for i, ids in zip(chosen, new, strict=True):
                    completions[i] = tokenizer.decode(ids)
                if progress is not None:
                    progress(start + len(chosen))
    finally:
        model.train(was_training)
    return completions


def _encode(tokenizer: Any, prompt: str, chat: bool) -> list[int]:
    if not chat:
        return list(tokenizer(prompt, add_special_tokens=False).input_ids)
    message = [{"role": "user", "content": prompt}]
    text = tokenizer.apply_chat_template(message, add_generation_prompt=True, tokenize=False)
    return list(tokenizer(text, add_special_tokens=False).input_ids)


def _complete(
    model: Any,
    tokenizer: Any,
    rows: list[list[int]],
    max_new_tokens: int,
    sampling: dict[str, Any],
    device: torch.device,
) -> list[list[int]]:
    longest = max(len(row) for row in rows)
    pad = tokenizer.pad_token_id if tokenizer.pad_token_id is not None else tokenizer.eos_token_id
    input_ids = torch.tensor([[pad] * (longest - len(row)) + row for row in rows], device=device)
    mask = torch.tensor(
        [[0] * (longest - len(row)) + [1] * len(row) for row in rows], device=device
    )
    output = model.generate(
        input_ids=input_ids,
        attention_mask=mask,
        max_new_tokens=max_new_tokens,
        pad_token_id=pad,
        eos_token_id=tokenizer.eos_token_id,
        use_cache=True,
        **sampling,
    )
    return [_until_end(ids, tokenizer.eos_token_id) for ids in output[:, longest:].tolist()]


def _until_end(ids: list[int], eos_token_id: int | None) -> list[int]:
    return ids[: ids.index(eos_token_id)] if eos_token_id in ids else ids
