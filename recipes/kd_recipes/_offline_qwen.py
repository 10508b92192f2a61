"""A world of R1 and Qwen small enough for a CPU: true tokenizers, true architecture, tiny weights.

The teacher speaks R1-Distill's tokens and template, the student Qwen2.5's; both are
``Qwen2ForCausalLM`` with lm_heads of 152,064 and 151,936 rows, as their large relatives have. Only
their bodies are tiny, and they know one thing: the sums of the quickstart.

Their weights (``r1_to_qwen_models.safetensors``, 2 MB) hold rows for the few tokens that occur in
such sums and one row for all the others together. A model in which 151,000 rows are equal has the
same loss as one row whose logit is raised by log(151,000); so ``make_models`` trains in the small
form, which takes minutes, and ``expand`` writes the same model in the large form, exactly.
"""

from __future__ import annotations

import json
import math
import random
import sys
from functools import lru_cache
from pathlib import Path
from typing import TYPE_CHECKING, Any

from kd.progress import Progress
from kd_recipes import _arithmetic as arithmetic

if TYPE_CHECKING:
    from torch import Tensor

OFFLINE, OFFLINE_QWEN = "offline", "offline-qwen"
WEIGHTS = Path(__file__).with_name("r1_to_qwen_models.safetensors")
LIVE = 151_665
R1_TEMPLATE = (
    "{{ bos_token }}{% for message in messages %}{% if message['role'] == 'user' %}"
    "<｜User｜>{{ message['content'] }}{% elif message['role'] == 'assistant' %}"
    # as the published one does: what was thought is deleted from the conversation
    "<｜Assistant｜>{{ message['content'].split('</think>')[-1] }}{{ eos_token }}"
    "{% else %}{{ message['content'] }}{% endif %}{% endfor %}"
    "{% if add_generation_prompt %}<｜Assistant｜>{% endif %}"
)
SIZES: dict[str, dict[str, Any]] = {
    "teacher": {"hidden": 128, "layers": 4, "rows": 152_064, "family": "r1-distill"},
    "student": {"hidden": 64, "layers": 4, "rows": 151_936, "family": "qwen2.5"},
    # for KD between two Qwens: the student's body, trained on all sums, with the 7B's lm_head
    "qwen-teacher": {"hidden": 64, "layers": 4, "rows": 152_064, "family": "qwen2.5"},
}
# The shipped teacher is the quickstart's, its tokens moved to R1's and trained for 600 such steps.
STEPS = {"teacher": 3000, "student": 1000, "qwen-teacher": 700}


@lru_cache(maxsize=3)
def tokenizer(side: str) -> Any:
    """The tokenizer of one of ``SIZES``, with its chat template."""
    from kd.traces import CHATML
    from kd.vocab import qwen_tokenizer

    made = qwen_tokenizer(SIZES[side]["family"])
    made.chat_template = R1_TEMPLATE if side == "teacher" else CHATML
    made.padding_side = "left"
    return made


def folder_of(name: str, side: str, folder: Path) -> str:
    """The name itself, or where the tiny model that it means is written.

    Args:
        name: "offline", "offline-qwen", or any other model.
        side: which of the tiny models "offline" means: "student" or "teacher".
        folder: of the stage that needs it.
    """
    if name not in (OFFLINE, OFFLINE_QWEN):
        return name
    write_model("qwen-teacher" if name == OFFLINE_QWEN else side, folder / side)
    return str(folder / side)


def write_model(side: str, folder: Path) -> None:
    """One of the tiny models as a transformers folder with its tokenizer."""
    from safetensors import safe_open
    from transformers.utils import logging

    logging.disable_progress_bar()
    with safe_open(WEIGHTS, "pt") as file:
        state = {
            name.removeprefix(f"{side}."): file.get_tensor(name).float()
            for name in file.keys()
            if name.startswith(f"{side}.")
        }
        ids = json.loads(file.metadata()[side])
    expand(side, state, ids).save_pretrained(folder)
    tokenizer(side).save_pretrained(folder)


def expand(side: str, state: dict[str, Tensor], ids: list[int]) -> Any:
    """A small-form model in Qwen's full vocabulary: the last row stands for every other id."""
    model = _model(side, SIZES[side]["rows"])
    name = "model.embed_tokens.weight"
    small = state[name]
    rows = small[-1].repeat(SIZES[side]["rows"], 1)
    rows[ids] = small[:-1]
    model.load_state_dict({**state, name: rows}, strict=False)
    model.tie_weights()
    return model


def _model(side: str, rows: int) -> Any:
    size, made = SIZES[side], tokenizer(side)
    return arithmetic.model(
        size["hidden"],
        size["layers"],
        seed=0,
        vocab_size=rows,
        max_position_embeddings=128,
        pad_token_id=None,
        eos_token_id=made.eos_token_id if rows > LIVE else None,
        bos_token_id=made.bos_token_id if rows > LIVE else None,
        use_cache=True,
    )


# --- how the weights were made --------------------------------------------------------------------


def make_models(file: Path) -> None:
    """Train all in the small form, and write the file: ten minutes or more on one core."""
    from safetensors.torch import save_file

    saved: dict[str, Tensor] = {}
    notes = {}
    for side, steps in STEPS.items():
        ids = _tokens_that_occur(side)
        state = _train_small(side, ids, steps)
        saved |= {f"{side}.{name}": value.half().contiguous() for name, value in state.items()}
        notes[side] = json.dumps(ids)
    save_file(saved, file, notes)


def _sequence(side: str, rng: random.Random, held_out: set[str]) -> tuple[list[int], int]:
    """A sequence to learn, and how many tokens of it are not trained on.

    All see their own template and solutions in any order. The student's base has never seen a sum
    of more than three numbers; most of those in the recipe have four.
    """
    longest = 3 if side == "student" else 4
    question = arithmetic.problem(rng)
    while question in held_out or len(arithmetic.terms(question)) > longest:
        question = arithmetic.problem(rng)
    made = tokenizer(side)
    solution = arithmetic.solve(question, rng).replace(";", "\n")
    prompt = made.apply_chat_template(
        [{"role": "user", "content": question}], add_generation_prompt=True, tokenize=False
    )
    answer = arithmetic.answer(question)
    text = f"<think>\n{solution}\n</think>\n\n{answer}{made.eos_token}"
    start = list(made(prompt, add_special_tokens=False).input_ids)
    return start + list(made(text, add_special_tokens=False).input_ids), len(start)


def _tokens_that_occur(side: str) -> list[int]:
    rng = random.Random("tokens")
    found: set[int] = set()
    for _ in range(3000):
        found.update(_sequence(side, rng, set())[0])
    return sorted(found)


def _train_small(side: str, ids: list[int], steps: int) -> dict[str, Tensor]:
    import torch

    small = {token: i for i, token in enumerate(ids)}
    model = _model(side, len(ids) + 1)
    others = torch.zeros(len(ids) + 1)
    others[-1] = math.log(LIVE - len(ids))  # one row stands for so many tokens
    optimizer = torch.optim.AdamW(model.parameters(), lr=2e-3, betas=(0.9, 0.98))
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, 2e-3, total_steps=steps)
    rng, held_out = random.Random(side), set(arithmetic.problems(1000, seed=0))
    with Progress(f"training the {side}", steps) as bar:
        for _ in range(steps):
            batch = [_sequence(side, rng, held_out) for _ in range(64)]
            length = max(len(tokens) for tokens, _ in batch)
            input_ids = torch.zeros(len(batch), length, dtype=torch.long)
            labels = torch.full((len(batch), length), -100)
            for row, target, (tokens, start) in zip(input_ids, labels, batch, strict=True):
                row[: len(tokens)] = torch.tensor([small[token] for token in tokens])
                target[start - 1 : len(tokens) - 1] = row[start : len(tokens)]
            logits = model(input_ids=input_ids, use_cache=False).logits.float() + others
            loss = torch.nn.functional.cross_entropy(logits.flatten(0, 1), labels.flatten())
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            schedule.step()
            bar.advance(1, f"(loss {loss.item():.3f})")
    state = dict(model.state_dict())
    state.pop("lm_head.weight")  # tied to the embedding
    return state


if __name__ == "__main__":
    make_models(Path(sys.argv[1]) if len(sys.argv) > 1 else WEIGHTS)
