"""Traces from a local transformers model: batched sampling, split into thought and answer."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

from kd.traces.templates import ChatTemplate, opened_thought
from kd.traces.trace import Trace, split_completion


@dataclass(frozen=True)
class Sampling:
    """How a teacher is sampled; the defaults are those of the R1 reports.

    Attributes:
        temperature: 0 is greedy decoding.
        top_p: nucleus sampling; 1 is off.
        max_new_tokens: a longer completion is cut and marked ``finish="length"``.
        seed: of the sampling.
    """

    temperature: float = 0.6
    top_p: float = 0.95
    max_new_tokens: int = 32_768
    seed: int = 0

    def __post_init__(self) -> None:
        if self.temperature < 0:
            raise ValueError(
                f"Sampling: temperature must be at least 0, got {self.temperature}. "
                "Use 0 for greedy decoding."
            )
        if not 0 < self.top_p <= 1:
            raise ValueError(
                f"Sampling: top_p must lie in (0, 1], got {self.top_p}. Use 1 to switch it off."
            )
        if self.max_new_tokens < 1:
            raise ValueError(
                f"Sampling: max_new_tokens must be at least 1, got {self.max_new_tokens}."
            )


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

    Yields:
        The traces, in the order they finish. ``metadata`` says "sample" (0 to n-1), "finish"
        ("stop" or "length"), "completion_tokens" and "prompt_tokens".
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
    jobs = sorted(
        ((i, k) for i in range(len(asked)) for k in range(n)), key=lambda job: len(encoded[job[0]])
    )
    done = 0
    for start in range(0, len(jobs), batch_size):
        chosen = jobs[start : start + batch_size]
        rows = [encoded[i] for i, _ in chosen]
        completions = _complete(model, tokenizer, rows, sampling, sampling.seed + start)
        for (i, k), (ids, finish) in zip(chosen, completions, strict=True):
            text = tokenizer.decode(ids, clean_up_tokenization_spaces=False)
            think, answer = split_completion(text, prefilled=bool(opened_thought(texts[i])))
            yield (
                asked[i]
                .replace(think=think, answer=answer)
                .note(
                    sample=k,
                    finish=finish,
                    prompt_tokens=len(encoded[i]),
                    completion_tokens=len(ids),
                )
            )
        done += len(chosen)
        if progress is not None:
            progress(done)


def _complete(
    model: Any, tokenizer: Any, rows: list[list[int]], sampling: Sampling, seed: int
) -> list[tuple[list[int], str]]:
    """Completions of one batch as (ids without the end token, finish)."""
    import torch

    device = next(model.parameters()).device
    ends = end_ids(model, tokenizer)
    pad = tokenizer.pad_token_id if tokenizer.pad_token_id is not None else tokenizer.eos_token_id
    if pad is None:
        pad = min(ends, default=0)
    longest = max(len(row) for row in rows)
    input_ids = torch.tensor([[pad] * (longest - len(row)) + row for row in rows], device=device)
    mask = torch.tensor([[0] * (longest - len(row)) + [1] * len(row) for row in rows])
    options: dict[str, Any] = {"do_sample": False}
    if sampling.temperature > 0:
        options = {
            "do_sample": True,
            "temperature": sampling.temperature,
            "top_p": sampling.top_p,
            "top_k": 0,
        }
    was_training = model.training
    model.eval()
    try:
        with (
            torch.no_grad(),
            torch.random.fork_rng(devices=[device] if device.type == "cuda" else []),
        ):
            torch.manual_seed(seed)
            output = model.generate(
                input_ids=input_ids,
                attention_mask=mask.to(device),
                max_new_tokens=sampling.max_new_tokens,
                pad_token_id=pad,
                eos_token_id=sorted(ends) or None,
                use_cache=True,
                **options,
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
