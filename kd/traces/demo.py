"""The whole pipeline on one machine in a minute: reasoning-gym, a tiny teacher, a report page."""

from __future__ import annotations

import json
import random
from pathlib import Path
from typing import Any

from kd.traces.agreement import compare
from kd.traces.dedupe import exact_duplicates
from kd.traces.files import write_traces
from kd.traces.filters import Lint, filter_stream
from kd.traces.generation import generate_local
from kd.traces.packing import efficiency, pack
from kd.traces.rendering import Renderer
from kd.traces.report import write_report
from kd.traces.rows import render_stream
from kd.traces.sampling import Sampling
from kd.traces.selecting import best_of_n
from kd.traces.trace import COMPACT, Trace
from kd.traces.verifiers import Maths, Numeric, ReasoningGym, Verifier, gym_problems
from kd.traces.yields import Yield

TEMPLATE = (
    "{% for message in messages %}{{ message['content'] }}"
    "{% if message['role'] == 'assistant' %}<eos>{% endif %}{% endfor %}"
)
SPECIAL = ["<pad>", "<eos>", "<think>", "</think>"]
CAPACITY = 256


def run_demo(folder: str | Path, *, problems: int = 400, steps: int = 600, seed: int = 0) -> Path:
    """Train a tiny teacher on worked sums, let it answer reasoning-gym's chain_sum, keep what
    its scorer accepts, render and pack it, and write the page.

    Args:
        folder: takes traces.jsonl, counts.json and report.html.
        problems: asked twice each.
        steps: the teacher's training steps; fewer make more wrong answers.
        seed: of everything.

    Returns:
        The page.
    """
    folder = Path(folder)
    asked = _problems(problems, seed)
    held_out = {trace.prompt for trace in asked}
    tokenizer = _tokenizer()
    teacher = _train(tokenizer, held_out, steps, seed)
    report = Yield()
    sampling = Sampling(temperature=1.0, top_p=1.0, max_new_tokens=24, seed=seed)
    told: dict[str, Any] = {"n": 2, "batch_size": 128, "report": report}
    answered = list(generate_local(teacher, tokenizer, asked, sampling=sampling, **told))
    linted = list(filter_stream(answered, [Lint(need_think=True)], report=report, stage="lint"))
    verifiers: dict[str, Verifier] = {"gym": ReasoningGym(), "numeric": Numeric(), "maths": Maths()}
    correct = compare(linted, verifiers, workers=1 + (problems > 100), report=report)
    unique = list(exact_duplicates(correct, report=report))
    chosen = best_of_n(unique, report=report)
    renderer = Renderer(tokenizer, tags=COMPACT)
    rendered = list(render_stream(chosen, renderer, report=report, max_tokens=CAPACITY))
    packs = list(pack((ids for _, ids in rendered), CAPACITY))
    report["render"].notes["fullness"] = round(efficiency(packs, CAPACITY), 4)
    write_traces(folder / "traces.jsonl", (trace for trace, _ in rendered))
    (folder / "counts.json").write_text(json.dumps(report.to_dict(), indent=1))
    print(report.table())
    print(f"packed into {len(packs)} rows of {CAPACITY}: {report['render'].notes}")
    title = "Traces of a tiny teacher on reasoning-gym's chain_sum"
    return write_report(folder / "report.html", report, (t for t, _ in rendered), title=title)


def _problems(count: int, seed: int) -> list[Trace]:
    made = gym_problems(
        "chain_sum", count, seed, min_terms=2, max_terms=3, min_digits=1, max_digits=1
    )
    return [trace.replace(prompt=_short(trace.prompt)) for trace in made]


def _short(question: str) -> str:
    """The sum alone: "... 4 - 8 + 7 =" to "4-8+7="."""
    kept = "".join(c for c in question if c in "0123456789+-=")
    return kept.lstrip("+-=")[-12:]


def _worked(prompt: str) -> tuple[str, str]:
    values = [int(part) for part in prompt.rstrip("=").replace("-", "+-").split("+") if part]
    lines = []
    while len(values) > 1:
        values[:2] = [values[0] + values[1]]
        lines.append(str(values[0]) + "".join(f"{value:+d}" for value in values[1:]))
    return ";".join(lines), str(values[0])


def _tokenizer() -> Any:
    from tokenizers import Regex, Tokenizer, decoders, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    vocabulary = {token: i for i, token in enumerate([*SPECIAL, *"0123456789+-=;"])}
    backend = Tokenizer(models.WordLevel(vocabulary, unk_token=None))
    backend.pre_tokenizer = pre_tokenizers.Split(Regex(r"[\s\S]"), behavior="isolated")
    backend.decoder = decoders.Fuse()
    made = PreTrainedTokenizerFast(
        tokenizer_object=backend,
        pad_token="<pad>",
        eos_token="<eos>",
        clean_up_tokenization_spaces=False,
        extra_special_tokens=["<think>", "</think>"],
    )
    made.chat_template = TEMPLATE
    return made


def _train(tokenizer: Any, held_out: set[str], steps: int, seed: int) -> Any:
    """A Qwen2 of 0.2M parameters on fresh worked sums, none of them in ``held_out``."""
    import torch
    from transformers import Qwen2Config, Qwen2ForCausalLM

    torch.manual_seed(seed)
    config = Qwen2Config(
        vocab_size=len(tokenizer),
        hidden_size=96,
        intermediate_size=256,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=4,
        max_position_embeddings=64,
        tie_word_embeddings=True,
        pad_token_id=0,
        eos_token_id=1,
        bos_token_id=None,
        initializer_range=0.05,
    )
    model = Qwen2ForCausalLM(config)
    optimizer = torch.optim.AdamW(model.parameters(), lr=3e-3)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, 3e-3, total_steps=max(2, steps))
    renderer = Renderer(tokenizer, tags=COMPACT)
    rng = random.Random(seed)
    for _ in range(steps):
        batch: list[Trace] = []
        while len(batch) < 64:
            digits = [str(rng.randrange(1, 10)) for _ in range(rng.choice((2, 3, 3)))]
            prompt = digits[0] + "".join(rng.choice("+-") + digit for digit in digits[1:]) + "="
            if prompt not in held_out:
                batch.append(Trace(prompt, *_worked(prompt)))
        rows = [out for _, out in renderer.render_all(batch, check=False) if isinstance(out, tuple)]
        longest = max(len(row.input_ids) for row in rows)
        input_ids = torch.tensor([r.input_ids + [0] * (longest - len(r.input_ids)) for r in rows])
        labels = torch.tensor([r.labels + [-100] * (longest - len(r.labels)) for r in rows])
        loss = model(input_ids=input_ids, labels=labels).loss
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        schedule.step()
    return model.eval()
