"""Reading speed, capture overhead and the share of a training step, measured on this machine.

    python benchmarks/bench_cache.py --model FOLDER    with capture and training steps of it
    python benchmarks/bench_cache.py                   reading alone

Prints Markdown (`--output FILE` also writes it). build_cache encodes and writes shards in a thread
of its own beside torch's `--threads`. Reading is the median of repeated runs. Overhead compares
build_cache, opening and closing included, with the model's bare forward of the same batches:
pairs run right after one another, and the median of the pairs' ratios counts; all are shown. The
one shard of so few tokens is encoded at the end; in a long capture that happens beside the forward.
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
from kd_bench.cache_suite import power_law_rows  # noqa: E402
from kd_bench.models import make_model  # noqa: E402

QWEN = 151_936
QWEN_SHAPE = "qwen2.5-0.5b-shape"
TOKENS = 4096  # captured


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
            tokens, ids, logprobs = power_law_rows(rng, length, k, live)
            writer.add(tokens, ids, logprobs)
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


def qwen_shaped() -> torch.nn.Module:
    """Random weights in the shape of Qwen2.5-0.5B, bfloat16: what a forward costs there."""
    return make_model(896, 24, QWEN, 0, torch.bfloat16, intermediate=4864, kv_heads=2).eval()


def capture(model_folder: str, repeats: int, ks: list[int], count: int) -> None:
    import pydoc_data.topics

    from transformers import AutoModelForCausalLM, AutoTokenizer

    from kd.teachers import build_cache
    from kd.teachers.build import batches

    if model_folder == QWEN_SHAPE:
        model, live = qwen_shaped(), QWEN
        tokens = np.random.default_rng(0).integers(0, live, count).tolist()
    else:
        model = AutoModelForCausalLM.from_pretrained(model_folder, dtype=torch.bfloat16).eval()
        tokenizer = AutoTokenizer.from_pretrained(model_folder)
        tokens = tokenizer("\n".join(pydoc_data.topics.topics.values()))["input_ids"]
        live = len(tokenizer)
    sequences = [np.array(tokens[i : i + 256]) for i in range(0, count, 256)]

    def bare() -> None:
        with torch.inference_mode():
            for batch in batches(sequences, 1024, None, None):
                model(input_ids=torch.from_numpy(np.stack(batch)).long(), use_cache=False)

    def whole(k: int) -> None:
        with tempfile.TemporaryDirectory() as folder:
            build_cache(
                model, sequences, folder, top_k=k, batch_tokens=1024,
                live_vocab=live, progress=False,
            )  # fmt: skip

    say(
        f"\n| capture of {count:,} tokens | bare forward, s | build_cache, s | overhead: median "
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
        name = f"{Path(model_folder).name}, k={k}"
        say(f"| {name} | {seconds[0]:.2f} | {seconds[1]:.2f} | {shown[0]} | {shown[1]} |")


def parts(repeats: int) -> None:
    """What capture does differently from a bare forward, in CPU time: the head's product in chunks
    into one buffer instead of at once, and the selection. The decoder is the same in both."""
    from kd.teachers.selection import top_k_rows

    say(
        "\n| lm_head | bare head, us/token | in chunks, us | selection k=64, us | in all, us |\n"
        "|---|---|---|---|---|"
    )
    for name, vocabulary, hidden_size in (
        ("SmolLM2-135M", 49_152, 576),
        ("Qwen2.5-0.5B", QWEN, 896),
    ):
        weight = torch.randn(vocabulary, hidden_size, dtype=torch.bfloat16)
        hidden = torch.randn(512, hidden_size).bfloat16()
        buffer = torch.empty(256, vocabulary, dtype=torch.bfloat16)
        taken: dict[str, list[float]] = {"bare": [], "chunked": [], "selection": []}
        with torch.inference_mode():
            for _ in range(repeats):
                bare = both_times(lambda h=hidden, w=weight: torch.nn.functional.linear(h, w))[1]
                chunked = selection = 0.0
                for part in hidden.split(256):
                    multiply = lambda p=part, w=weight, b=buffer: torch.mm(p, w.t(), out=b)  # noqa: E731
                    chunked += both_times(multiply)[1]
                    selection += both_times(lambda b=buffer: top_k_rows(b, 64, 1.0))[1]
                for kind, seconds in zip(taken, (bare, chunked, selection), strict=True):
                    taken[kind].append(1e6 * seconds / len(hidden))
        base, mine, kept = (statistics.median(values) for values in taken.values())
        shape = f"{name}: {vocabulary:,} x {hidden_size}"
        say(f"| {shape} | {base:.0f} | {mine:.0f} | {kept:.0f} | {mine + kept - base:+.0f} |")


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
    parser.add_argument("--model", help=f"folder of a causal LM, or {QWEN_SHAPE}: random weights")
    parser.add_argument("--repeats", type=int, default=7)
    parser.add_argument("--tokens", type=int, default=TOKENS, help="captured")
    parser.add_argument("--threads", type=int, default=1, help="of torch")
    parser.add_argument("--top-k", type=int, nargs="+", default=[64], help="of the captures")
    parser.add_argument("--only", choices=["reading", "parts", "capture", "step"])
    parser.add_argument("--output", type=Path, help="also write the Markdown there")
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    from kd_bench import machine

    say(f"{machine.line_of(machine.machine_info('cpu'))}")
    if args.only in (None, "reading"):
        reading(args.repeats)
    if args.only in (None, "parts"):
        parts(args.repeats)
    if args.model and args.only in (None, "capture"):
        capture(args.model, args.repeats, args.top_k, args.tokens)
    if args.model and args.only in (None, "step"):
        step(args.model, max(1, args.repeats // 2))
    if args.output:
        args.output.parent.mkdir(parents=True, exist_ok=True)
        args.output.write_text("\n".join(LINES) + "\n")


if __name__ == "__main__":
    main()
