"""Reading speed, capture overhead and the share of a training step, measured on this machine.

    python benchmarks/bench_cache.py --model FOLDER    with capture and training steps of it
    python benchmarks/bench_cache.py                   reading alone

Prints Markdown (`--output FILE` also writes it). build_cache encodes and writes shards in a thread
of its own beside torch's `--threads`. Reading is the median of repeated runs. Overhead compares
build_cache, opening and closing included, with the model's bare forward of the same batches:
pairs run right after one another, and the median of the pairs' ratios counts; all are shown. Shards
are small there (1,024 tokens), so that encoding runs beside the forward as in a long capture.
"""

from __future__ import annotations

import argparse
import statistics
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

import numpy as np
import torch

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from kd.cache import CacheMeta, CacheWriter, TeacherCache  # noqa: E402

QWEN = 151_936
TOKENS = 2048  # captured; a real capture is longer, and its fixed costs weigh less


def timed(function: Callable[[], object]) -> float:
    start = time.perf_counter()
    function()
    return time.perf_counter() - start


def both_times(function: Callable[[], object]) -> tuple[float, float]:
    """Wall-clock seconds, and seconds of CPU in all threads."""
    wall, cpu = time.perf_counter(), time.process_time()
    function()
    return time.perf_counter() - wall, time.process_time() - cpu


def median(function: Callable[[], object], repeats: int) -> float:
    function()
    return statistics.median(timed(function) for _ in range(repeats))


def make_cache(
    path: Path, codec: str, count: int, length: int, k: int, live: int = QWEN
) -> list[np.ndarray]:
    """A cache of power-law rows at random ids; returns its sequences."""
    rng = np.random.default_rng(0)
    meta = CacheMeta({"id": "simulated"}, {}, live, live, top_k=k, codec=codec)
    sequences = []
    with CacheWriter(path, meta) as writer:
        for _ in range(count):
            tokens = rng.integers(0, live, length).astype(np.int32)
            ids = np.argsort(rng.random((length, 4 * k)), 1)[:, :k] * (live // (4 * k))
            ids += rng.integers(0, live // (4 * k), ids.shape)
            exponent = rng.uniform(1.1, 2.2, (length, 1))
            logits = -exponent * np.log(np.arange(1, k + 1))
            log_p = logits - np.logaddexp.reduce(logits, 1, keepdims=True) + np.log(0.95)
            writer.add(tokens, ids, log_p.astype(np.float32))
            sequences.append(tokens)
    return sequences


def reading(repeats: int) -> None:
    say("\n| codec | batch | tokens/s/core, k=64 | bytes/token |\n|---|---|---|---|")
    for codec in ("compact", "log8", "float32"):
        with tempfile.TemporaryDirectory() as folder:
            sequences = make_cache(Path(folder), codec, 64, 512, 64)
            cache = TeacherCache(folder)
            size = sum(entry.bytes for entry in cache.manifest.shards) / cache.tokens
            order = np.random.default_rng(1).permutation(64)
            for batch in (4, 16):
                chosen = [sequences[i] for i in order[:batch]]
                seconds = median(lambda c=chosen, t=cache: t.batch(c, 512), repeats)
                rate = batch * 512 / seconds
                say(f"| {codec} | {batch} x 512, padded | {rate:,.0f} | {size:.1f} |")
            packs = [[sequences[i] for i in order[j : j + 4]] for j in (0, 4)]
            seconds = median(lambda c=packs, t=cache: t.packed(c, 2048), repeats)
            say(f"| {codec} | 2 x 2048, packed | {2 * 2048 / seconds:,.0f} | {size:.1f} |")


def capture(model_folder: str, repeats: int, ks: list[int]) -> None:
    import pydoc_data.topics

    from transformers import AutoModelForCausalLM, AutoTokenizer

    from kd.teachers import build_cache
    from kd.teachers.build import batches

    model = AutoModelForCausalLM.from_pretrained(model_folder, dtype=torch.bfloat16).eval()
    tokenizer = AutoTokenizer.from_pretrained(model_folder)
    tokens = tokenizer("\n".join(pydoc_data.topics.topics.values()))["input_ids"]
    sequences = [np.array(tokens[i : i + 256]) for i in range(0, TOKENS, 256)]

    def bare() -> None:
        with torch.inference_mode():
            for batch in batches(sequences, 1024, None, None):
                model(input_ids=torch.from_numpy(np.stack(batch)).long(), use_cache=False)

    def whole(k: int) -> None:
        with tempfile.TemporaryDirectory() as folder:
            build_cache(
                model, sequences, folder, top_k=k, batch_tokens=1024, shard_tokens=1024,
                live_vocab=len(tokenizer), progress=False,
            )  # fmt: skip

    say(
        f"\n| capture of {TOKENS:,} tokens | bare forward, s | build_cache, s | overhead: median "
        "(all pairs) | in CPU time: median (all) |\n|---|---|---|---|---|"
    )
    for k in ks:
        whole(k)  # warm
        pairs = []
        for number in range(repeats):  # each goes first in turn
            first, second = (bare, lambda k=k: whole(k))[:: 1 - 2 * (number % 2)]
            pair = both_times(first), both_times(second)
            pairs.append(pair[:: 1 - 2 * (number % 2)])
            print(f"pair {number}: (wall, CPU) s bare, capture: {pairs[-1]}", file=sys.stderr)
        seconds = [statistics.median(side[0] for side in sides) for sides in zip(*pairs)]  # noqa: B905
        shown = []
        for kind in (0, 1):
            extra = sorted(100 * (mine[kind] / base[kind] - 1) for base, mine in pairs)
            listed = ", ".join(f"{value:+.1f}" for value in extra)
            shown.append(f"{statistics.median(extra):+.1f} % ({listed})")
        say(f"| k={k} | {seconds[0]:.2f} | {seconds[1]:.2f} | {shown[0]} | {shown[1]} |")


def step(model_folder: str, repeats: int) -> None:
    """A student's training step (forward, sparse loss on hidden states, backward, AdamW) beside
    reading its batch from the cache; the student is the model, and its first two layers."""
    from transformers import AutoModelForCausalLM

    import kd

    say(
        "\n| student | batch | step, ms | reading its targets, ms | reading / step |\n"
        "|---|---|---|---|---|"
    )
    for layers in (None, 2):
        model = AutoModelForCausalLM.from_pretrained(model_folder, dtype=torch.bfloat16).train()
        if layers is not None:
            model.model.layers = model.model.layers[:layers]
        optimizer = torch.optim.AdamW(model.parameters(), lr=0.0)
        vocabulary = model.config.vocab_size
        with tempfile.TemporaryDirectory() as folder:
            sequences = make_cache(Path(folder), "compact", 16, 256, 64, vocabulary)
            cache = TeacherCache(folder)
            tokens = torch.from_numpy(np.stack(sequences[:4])).long()

            def train(model=model, optimizer=optimizer, cache=cache, tokens=tokens) -> None:
                found = cache.batch(list(tokens), 256)
                hidden = model.model(input_ids=tokens).last_hidden_state
                teacher = kd.TopK(found.ids, found.logprobs, found.tail, found.temperature)
                loss = kd.distillation_loss(kd.Hidden(hidden, model.lm_head.weight), teacher)
                loss.backward()
                optimizer.step()
                optimizer.zero_grad()

            whole = median(train, repeats)
            read = median(lambda c=cache, t=tokens: c.batch(list(t), 256), 5 * repeats)
        name = f"{sum(p.numel() for p in model.parameters()) / 1e6:.0f} M parameters"
        say(f"| {name} | 4 x 256 | {1e3 * whole:,.0f} | {1e3 * read:.2f} | {read / whole:.2%} |")


LINES: list[str] = []


def say(text: str) -> None:
    print(text, flush=True)
    LINES.append(text)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--model", help="folder of a causal LM, such as SmolLM2-135M-Instruct")
    parser.add_argument("--repeats", type=int, default=7)
    parser.add_argument("--threads", type=int, default=1, help="of torch")
    parser.add_argument("--top-k", type=int, nargs="+", default=[64], help="of the captures")
    parser.add_argument("--only", choices=["reading", "capture", "step"])
    parser.add_argument("--output", type=Path, help="also write the Markdown there")
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    from kd.bench import machine

    say(f"{machine.line_of(machine.machine_info('cpu'))}")
    if args.only in (None, "reading"):
        reading(args.repeats)
    if args.model and args.only in (None, "capture"):
        capture(args.model, args.repeats, args.top_k)
    if args.model and args.only in (None, "step"):
        step(args.model, max(1, args.repeats // 2))
    if args.output:
        args.output.parent.mkdir(parents=True, exist_ok=True)
        args.output.write_text("\n".join(LINES) + "\n")


if __name__ == "__main__":
    main()
