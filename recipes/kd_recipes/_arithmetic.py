"""The quickstart's world: sums of one-digit numbers, solved one step per line, in any order.

A problem is ``4-8+7+0=``. A worked solution replaces two neighbours by their sum, line by line,
and picks the neighbours at random: ``-4+7+0;3+0;3`` and ``4-1+0;3+0;3`` are both right. A teacher
trained on such solutions therefore spreads its probability over several valid next steps, and
that is what its logits can tell a student which one sampled trace cannot.

Everything is plain transformers: the tokenizer is a ``PreTrainedTokenizerFast`` of single
characters with R1's ``<think>`` tags, the models are ``Qwen2ForCausalLM`` built from a config.
"""

from __future__ import annotations

import random
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

from kd.progress import Progress

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerFast, Qwen2ForCausalLM

    from kd.traces import Trace

SPECIAL = ["<pad>", "<eos>", "<think>", "</think>"]
CHARACTERS = list("0123456789+-=;")
# The thinking stays in the text: R1's own template deletes it from assistant turns.
CHAT_TEMPLATE = (
    "{% for message in messages %}{{ message['content'] }}"
    "{% if message['role'] == 'assistant' %}<eos>{% endif %}{% endfor %}"
)
OPERATORS = "+-"


def tokenizer() -> PreTrainedTokenizerFast:
    """The 18-token character tokenizer, made in memory: nothing is downloaded."""
    from tokenizers import Regex, Tokenizer, decoders, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    vocabulary = {token: i for i, token in enumerate(SPECIAL + CHARACTERS)}
    backend = Tokenizer(models.WordLevel(vocabulary, unk_token=None))
    backend.pre_tokenizer = pre_tokenizers.Split(Regex(r"[\s\S]"), behavior="isolated")
    backend.decoder = decoders.Fuse()
    made = PreTrainedTokenizerFast(
        tokenizer_object=backend,
        pad_token="<pad>",
        eos_token="<eos>",
        padding_side="left",
        clean_up_tokenization_spaces=False,
        extra_special_tokens=["<think>", "</think>"],
    )
    made.chat_template = CHAT_TEMPLATE
    return made


def problem(rng: random.Random) -> str:
    """One problem of 2 to 4 one-digit terms, such as ``4-8+7=``; mostly the longer ones."""
    count = rng.choices((2, 3, 4), weights=(1, 7, 12))[0]
    digits = [str(rng.randrange(10)) for _ in range(count)]
    return digits[0] + "".join(rng.choice(OPERATORS) + digit for digit in digits[1:]) + "="


def problems(count: int, seed: int, exclude: set[str] | frozenset[str] = frozenset()) -> list[str]:
    """``count`` different problems, none of them in ``exclude``; the same for the same seed."""
    rng = random.Random(f"problems-{seed}")
    found: dict[str, None] = {}
    attempts = 0
    while len(found) < count:
        attempts += 1
        if attempts > 200 * count + 1000:
            raise ValueError(
                f"problems: count must be at most the number of different problems, got {count}. "
                "Ask for fewer problems."
            )
        made = problem(rng)
        if made not in exclude:
            found[made] = None
    return list(found)


def terms(text: str) -> list[int]:
    """The signed terms of ``4-8+7`` or ``4-8+7=``: [4, -8, 7]."""
    signed = text.rstrip("=").replace("-", "+-")
    return [int(part) for part in signed.split("+") if part]


def write(values: list[int]) -> str:
    return str(values[0]) + "".join(f"{value:+d}" for value in values[1:])


def answer(question: str) -> str:
    """The exact answer, computed without any model."""
    return str(sum(terms(question)))


def solve(question: str, rng: random.Random, random_order: bool = True) -> str:
    """A worked solution: the lines of thought, joined by ``;``, the last one being the answer."""
    values = terms(question)
    lines = []
    while len(values) > 1:
        i = rng.randrange(len(values) - 1) if random_order else 0
        values[i : i + 2] = [values[i] + values[i + 1]]
        lines.append(write(values))
    return ";".join(lines)


def asked(
    count: int, seed: int = 0, exclude: set[str] | frozenset[str] = frozenset()
) -> list[Trace]:
    """``problems`` that wait for an answer; nobody is trained on those of seed 0."""
    from kd.traces import Trace

    questions = problems(count, seed, exclude)
    return [Trace(question, reference=answer(question), domain="math") for question in questions]


def solved(
    model: Any,
    tokenizer: Any,
    count: int,
    held_out: int,
    *,
    max_new_tokens: int,
    batch_size: int,
    report: Any = None,
) -> Iterator[Trace]:
    """A teacher solves problems, once each, at temperature 1.

    Args:
        model: the teacher.
        tokenizer: its own.
        count: how many problems.
        held_out: so many problems of seed 0 are left for the tests.
        max_new_tokens: of a solution.
        batch_size: problems solved side by side.
        report: of ``kd.traces``: takes the counts.
    """
    from kd.traces import Sampling, generate_local

    waiting = asked(count, seed=1, exclude=set(problems(max(held_out, 1), seed=0)))
    sampling = Sampling(temperature=1.0, top_p=1.0, max_new_tokens=max_new_tokens)
    with Progress("the teacher solves problems", len(waiting)) as bar:
        yield from generate_local(
            model,
            tokenizer,
            waiting,
            sampling=sampling,
            batch_size=batch_size,
            progress=bar.to,
            report=report,
        )


def model(hidden: int, layers: int, seed: int, **options: Any) -> Qwen2ForCausalLM:
    """A randomly initialised Qwen2 with heads of 32 and a feed-forward of 2.75 times hidden.

    Args:
        hidden: width.
        layers: depth.
        seed: of the weights.
        **options: of ``Qwen2Config``; by default they fit ``tokenizer``.
    """
    import torch
    from transformers import Qwen2Config, Qwen2ForCausalLM

    settings: dict[str, Any] = {
        "vocab_size": len(SPECIAL) + len(CHARACTERS),
        "hidden_size": hidden,
        "intermediate_size": hidden * 11 // 4,
        "num_hidden_layers": layers,
        "num_attention_heads": max(1, hidden // 32),
        "num_key_value_heads": max(1, hidden // 32),
        "max_position_embeddings": 64,
        "tie_word_embeddings": True,
        "pad_token_id": 0,
        "eos_token_id": 1,
        "bos_token_id": None,
        "use_cache": False,
        "initializer_range": 0.05,
    }
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        return Qwen2ForCausalLM(Qwen2Config(**{**settings, **options}))


def encode(tokenizer: Any, question: str, solution: str) -> dict[str, list[int]]:
    """A worked solution as a training row: the problem is not trained on."""
    result = solution.rpartition(";")[2]
    prompt = tokenizer(question).input_ids
    completion = tokenizer(f"<think>{solution}</think>{result}<eos>").input_ids
    return {"input_ids": prompt + completion, "labels": [-100] * len(prompt) + completion}


def teach(
    model: Any,
    folder: Path,
    steps: int,
    *,
    rng: random.Random,
    held_out: set[str],
    random_order: bool = True,
    **arguments: Any,
) -> None:
    """Train a model on fresh worked solutions, 64 a step.

    Args:
        model: changed in place.
        folder: of the checkpoints.
        steps: of the optimiser.
        rng: draws problems and solutions.
        held_out: problems that it never sees.
        random_order: of the steps of a solution.
        **arguments: more of ``kd.training.fit``.
    """
    from datasets import Dataset

    from kd.training import DistillationCollator, fit

    made, rows = tokenizer(), list[dict[str, list[int]]]()
    with Progress("writing worked solutions", 64 * steps) as bar:
        while len(rows) < 64 * steps:
            question = problem(rng)
            if question not in held_out:
                rows.append(encode(made, question, solve(question, rng, random_order)))
                bar.advance()
    collator = DistillationCollator(made.pad_token_id, attention_mask=False)
    with Progress("training the teacher", 1.0) as bar:
        fit(
            model,
            Dataset.from_list(rows),
            folder,
            collator=collator,
            steps=steps,
            batch_size=64,
            report=bar.to,
            **arguments,
        )
