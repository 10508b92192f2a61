"""What the tail of cached targets does to training at another temperature than the capture's.

    python benchmarks/tail_temperature.py MODEL [--steps 24] [--output table.md]

MODEL is a folder of a causal LM with its tokenizer (SmolLM2-135M-Instruct in the committed table).
The student is a copy of it without a third of its layers, trained on Python's documentation at
temperature 2 from targets of several kinds; a row of the table is one kind:

    gradient     cosine of the first step's gradient with that from full logits at temperature 2
    held-out KL  KL(teacher, student) from full logits at temperature 1 after the steps

Below it: bytes a token of the cache with and without stored tails, and the capture's CPU time with
them over that without, in alternating pairs. The second table compares the tails that a loss gets
from the cache with those of full logits, over every row of the held-out text.
"""

from __future__ import annotations

import argparse
import copy
import pydoc_data.topics
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path

import torch

import kd
from kd.losses.sparse import log_partition
from kd.teachers import build_cache
from kd_bench import tables

TEMPERATURE, TOP_K, BATCH = 2.0, 64, 4


def blocks(tokenizer, length: int, count: int) -> list[torch.Tensor]:
    """Consecutive blocks of Python's language documentation."""
    text = "\n\n".join(pydoc_data.topics.topics[name] for name in sorted(pydoc_data.topics.topics))
    ids = torch.tensor(tokenizer(text)["input_ids"][: length * count])
    return list(ids.view(count, length))


def pruned(model):
    """A copy without the third of its layers in the middle; embeddings and lm_head are fixed."""
    student = copy.deepcopy(model)
    layers = student.model.layers
    first, number = len(layers) // 3, len(layers) // 3
    kept = [layer for at, layer in enumerate(layers) if not first <= at < first + number]
    student.model.layers = torch.nn.ModuleList(kept)
    student.config.num_hidden_layers = len(kept)
    student.get_input_embeddings().weight.requires_grad_(False)
    return student.train()


def teacher_logits(model, tokens: torch.Tensor) -> torch.Tensor:
    with torch.no_grad():
        return model(tokens, use_cache=False).logits.flatten(0, 1)


class Kind:
    """One kind of targets: a name, the loss's temperature and the targets of [B, L] tokens."""

    def __init__(self, name, temperature, targets):
        self.name, self.temperature, self.targets = name, temperature, targets

    def loss(self, student, tokens):
        logits = student(tokens, use_cache=False).logits.flatten(0, 1)
        return kd.distillation_loss(logits, self.targets(tokens), temperature=self.temperature)


def from_cache(cache, rule=None):
    def targets(tokens):
        found = cache.batch(list(tokens), tokens.shape[1])
        options = vars(found) if rule is None else {
            **vars(found), "tail_log_partition": None, "tail_temperatures": (),
            "tail_at_temperature": rule,
        }  # fmt: skip
        flat = {
            name: value.flatten(0, 1) if isinstance(value, torch.Tensor) else value
            for name, value in options.items()
        }
        return kd.TopK(**flat)

    return targets


def captures(model, sequences, folder: Path, pairs: int):
    """(cache at T = 1 with tails, cache at T = 2, bytes/token without and with, time ratios)."""
    options = {"top_k": TOP_K, "progress": False}
    ratios, sizes = [], {}
    for number in range(pairs):
        spent = {}
        for name, temperatures in (("without", None), ("with", "auto")):
            start = time.process_time()
            cache = build_cache(model, sequences, folder / f"{name}{number}",
                                tail_temperatures=temperatures, **options)  # fmt: skip
            spent[name] = time.process_time() - start
            sizes[name] = sum(entry.bytes for entry in cache.manifest.shards) / cache.tokens
        ratios.append(spent["with"] / spent["without"])
    other = build_cache(model, sequences, folder / "two", temperature=TEMPERATURE, **options)
    return cache, other, sizes, ratios


def tail_errors(model, cache, held_out) -> str:
    """A table of temperatures: how far the stored tails' mass is from that of full logits."""
    rows = []
    for temperature in (1.0, 1.25, 1.5, 2.0, 2.5, 3.0, 3.5, 4.0):
        logs, masses = [], []
        for tokens in held_out:
            targets = from_cache(cache)(tokens)
            log_p = torch.log_softmax(teacher_logits(model, tokens).double(), -1) / temperature
            top = log_p.gather(-1, targets.ids).logsumexp(-1)
            exact = log_p.scatter(-1, targets.ids, -torch.inf).logsumexp(-1)
            stored = log_partition(targets, slice(None), temperature).squeeze(-1)
            logs.append((stored - exact).abs())
            masses.append((torch.sigmoid(stored - top) - torch.sigmoid(exact - top)).abs())
        log, mass = torch.cat(logs), torch.cat(masses)
        numbers = (log.max(), mass.mean(), mass.quantile(0.99), mass.max())
        rows.append([f"{temperature:g}", *(f"{float(n):.1e}" for n in numbers)])
    return tables.markdown(["T", "log-mass, max", "probability, mean", "99 %", "max"], rows)


def gradient(student, kind, tokens) -> torch.Tensor:
    trained = [p for p in student.parameters() if p.requires_grad]
    found = torch.autograd.grad(kind.loss(student, tokens), trained)
    return torch.cat([g.flatten() for g in found]).double()  # float32 sums lose a percent


def trained_kl(student, kind, model, batches, held_out) -> float:
    trained = [p for p in student.parameters() if p.requires_grad]
    optimizer = torch.optim.AdamW(trained, lr=3e-4)
    for tokens in batches:
        kind.loss(student, tokens).backward()
        optimizer.step()
        optimizer.zero_grad()
    with torch.no_grad():
        each = [kd.forward_kl(student(tokens, use_cache=False).logits.flatten(0, 1),
                              teacher_logits(model, tokens)) for tokens in held_out]  # fmt: skip
    return float(torch.stack(each).mean())


def compared(args) -> Iterator[str]:
    """The kinds of targets side by side, what the tails cost, and how exact they are."""
    from transformers import AutoModelForCausalLM, AutoTokenizer

    model = AutoModelForCausalLM.from_pretrained(args.model, dtype=torch.float32).eval()
    tokenizer = AutoTokenizer.from_pretrained(args.model)
    number = args.steps * BATCH
    rows = blocks(tokenizer, args.length, number + 2 * BATCH)
    batches = list(torch.stack(rows[:number]).split(BATCH))
    held_out = list(torch.stack(rows[number:]).split(BATCH))
    start = pruned(model)
    with tempfile.TemporaryDirectory() as folder:
        one, two, sizes, ratios = captures(model, rows, Path(folder), args.pairs)
        kinds = (
            Kind("full logits, T = 2", TEMPERATURE, lambda tokens: teacher_logits(model, tokens)),
            Kind("captured at 2, T = 2", TEMPERATURE, from_cache(two)),
            Kind("captured at 1, stored tails, T = 2", TEMPERATURE, from_cache(one)),
            Kind("captured at 1, T = 1", 1.0, from_cache(one)),
            *(
                Kind(f"captured at 1, T = 2, `{rule}`", TEMPERATURE, from_cache(one, rule))
                for rule in ("spread", "one_outcome")
            ),
        )
        exact = gradient(start, kinds[0], batches[0])
        found = []
        for kind in kinds:
            mine = gradient(start, kind, batches[0])
            cosine = float(mine @ exact / (mine.norm() * exact.norm()))
            final = trained_kl(copy.deepcopy(start), kind, model, batches, held_out)
            found.append([kind.name, f"{cosine:.3f}", f"{final:.3f}"])
        yield tables.markdown(["targets", "gradient", "held-out KL"], found)
        shown = ", ".join(f"{ratio:.3f}" for ratio in sorted(ratios))
        yield (
            f"\n{args.steps} steps of {BATCH} x {args.length} tokens, k = {TOP_K}, codec compact. "
            f"Bytes a token without and with stored tails: {sizes['without']:.2f} and "
            f"{sizes['with']:.2f}. CPU time of the capture with over without: {shown}.\n"
        )
        yield tail_errors(model, one, held_out)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("model", help="a folder of a causal LM with its tokenizer")
    parser.add_argument("--steps", type=int, default=24)
    parser.add_argument("--length", type=int, default=128, help="tokens of a row")
    parser.add_argument("--pairs", type=int, default=3, help="captures with and without tails")
    parser.add_argument("--output", type=Path, help="write the tables here too")
    torch.manual_seed(0)
    args = parser.parse_args()
    tables.show(compared(args), args.output)


if __name__ == "__main__":
    main()
