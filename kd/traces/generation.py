"""Completions of a local transformers model, in batches: as texts, and as traces."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from typing import Any

from kd.traces.counts import DropCounts, metered
from kd.traces.sampling import Sampling, only
from kd.traces.templates import ChatTemplate, opened_thought
from kd.traces.trace import Trace, split_completion


def generate_local(
    model: Any,
    tokenizer: Any,
    problems: Sequence[str | Trace],
    *,
    sampling: Sampling | None = None,
    n: int = 1,
    batch_size: int = 64,
    chat: bool = True,
    progress: Callable[[int], None] | None = None,
    report: DropCounts | None = None,
    stage: str = "generate",
) -> Iterator[Trace]:
    """Sample answers from a local model; problems of like length share a batch.

    Args:
        model: a transformers causal LM; it is put in eval mode while it generates.
        tokenizer: its tokenizer; padding goes to the left whatever it says itself.
        problems: prompts, or traces whose prompt, system, reference and so on are carried over.
        sampling: temperature, top-p, length and seed; the R1 defaults when None.
        n: samples for each problem.
        batch_size: samples decoded together.
        chat: wrap each prompt with the tokenizer's chat template; otherwise it is the text itself.
        progress: called with the number of samples done.
        report: takes the counts and the tokens.
        stage: the stage's name in the report.

    Yields:
        The traces, in the order they finish. ``metadata`` says "sample" (0 to n-1), "finish"
        ("stop" or "length"), "completion_tokens", "prompt_tokens" and "sampling", which is all
        that the model was sampled by: fields of its own ``generation_config`` are not applied
        (``kd.traces.overridden(model)`` names them).
    """
    sampling = sampling or Sampling()
    if n < 1:
        raise ValueError(f"generate_local: n must be at least 1, got {n}.")
    if batch_size < 1:
        raise ValueError(f"generate_local: batch_size must be at least 1, got {batch_size}.")
    asked = [Trace(item) if isinstance(item, str) else item for item in problems]
    template = ChatTemplate(tokenizer) if chat else None
    texts = [trace.prompt if template is None else template.text(trace) for trace in asked]
    encoded = [list(tokenizer(text, add_special_tokens=not chat).input_ids) for text in texts]
    for i, ids in enumerate(encoded):
        if not ids:
            raise ValueError(
                f"generate_local: problems must have at least one token, got {asked[i].prompt!r} "
                f"at {i}. Remove it or pass chat=True."
            )
    drawn = _draw(model, tokenizer, encoded, sampling, n, batch_size, progress)
    for i, k, ids, finish in drawn if report is None else metered(report.stage(stage), drawn):
        text = tokenizer.decode(ids, clean_up_tokenization_spaces=False)
        think, answer = split_completion(text, prefilled=bool(opened_thought(texts[i])))
        used = {"prompt_tokens": len(encoded[i]), "completion_tokens": len(ids)}
        if report is not None:
            counted = report.stage(stage)
            counted.keep()
            for name, count in used.items():
                counted.notes[name] = counted.notes.get(name, 0) + count
        trace = asked[i].replace(think=think, answer=answer)
        yield trace.note(sample=k, sampling=sampling.stated(), finish=finish, **used)


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
    completions = [""] * len(prompts)
    for i, _, ids, _ in _draw(model, tokenizer, encoded, sampling, 1, batch_size, progress):
        completions[i] = tokenizer.decode(ids)
    return completions


def _draw(
    model: Any,
    tokenizer: Any,
    encoded: Sequence[Sequence[int]],
    sampling: Sampling,
    n: int,
    batch_size: int,
    progress: Callable[[int], None] | None,
) -> Iterator[tuple[int, int, list[int], str]]:
    """n completions of each prompt as (prompt, sample, ids, finish), the shortest prompts first."""
    jobs = sorted(
        ((i, k) for i in range(len(encoded)) for k in range(n)),
        key=lambda job: len(encoded[job[0]]),
    )
    for start in range(0, len(jobs), batch_size):
        chosen = jobs[start : start + batch_size]
        rows = [encoded[i] for i, _ in chosen]
        completions = complete(model, tokenizer, rows, sampling, sampling.seed + start)
        for (i, k), (ids, finish) in zip(chosen, completions, strict=True):
            yield i, k, ids, finish
        if progress is not None:
            progress(start + len(chosen))


def complete(
    model: Any, tokenizer: Any, rows: Sequence[Sequence[int]], sampling: Sampling, seed: int
) -> list[tuple[list[int], str]]:
    """Completions of one batch of prompts, by ``sampling`` and nothing else.

    Args:
        model: a transformers causal LM; its own ``generation_config`` gives its end tokens alone.
        tokenizer: its tokenizer.
        rows: the prompts' ids.
        sampling: how to draw.
        seed: of this batch, in place of sampling's.

    Returns:
        For each prompt the ids without the end token, and "stop" or "length".
    """
    import torch

    device = next(model.parameters()).device
    ends = end_ids(model, tokenizer)
    pad = tokenizer.pad_token_id if tokenizer.pad_token_id is not None else tokenizer.eos_token_id
    if pad is None:
        pad = min(ends, default=0)
    longest = max(len(row) for row in rows)
    input_ids = torch.tensor([[pad] * (longest - len(row)) + list(row) for row in rows])
    mask = torch.tensor([[0] * (longest - len(row)) + [1] * len(row) for row in rows])
    config = sampling.local(ends, pad)
    was_training = model.training
    model.eval()
    try:
        with (
            torch.no_grad(),
            torch.random.fork_rng(devices=[device] if device.type == "cuda" else []),
            only(model, config),
        ):
            torch.manual_seed(seed)
            output = model.generate(
                input_ids=input_ids.to(device),
                attention_mask=mask.to(device),
                generation_config=config,
            )
    finally:
        model.train(was_training)
    return [_until(ids, ends) for ids in output[:, longest:].tolist()]


def end_ids(model: Any, tokenizer: Any) -> set[int]:
    """Every id that ends a turn: the tokenizer's and those of the model's generation config."""
    found: set[int] = set()
    config = getattr(model, "generation_config", None)
    for value in (tokenizer.eos_token_id, getattr(config, "eos_token_id", None)):
        if value is not None:
            found.update([value] if isinstance(value, int) else value)
    return found


def _until(ids: list[int], ends: set[int]) -> tuple[list[int], str]:
    for at, token in enumerate(ids):
        if token in ends:
            return ids[:at], "stop"
    return ids, "length"
