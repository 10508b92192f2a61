"""Reading speed, capture overhead and the share of a training step, measured on this machine.

    python benchmarks/bench_cache.py --model FOLDER    with capture overhead on that model
    python benchmarks/bench_cache.py                   reading alone

Prints Markdown. torch runs on one thread; build_cache encodes and writes shards in one of its own.
Timings are the median of repeated runs; overhead compares build_cache, opening and closing
included, with the bare forward of the same batches, interleaved.
"""

from __future__ import annotations

import argparse
import platform
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
TOKENS = 4096  # captured


def timed(function: Callable[[], object]) -> float:
    start = time.perf_counter()
    function()
    return time.perf_counter() - start


def median(function: Callable[[], object], repeats: int) -> float:
    function()
    return statistics.median(timed(function) for _ in range(repeats))


def make_cache(path: Path, codec: str, count: int, length: int, k: int) -> list[np.ndarray]:
    """A cache of power-law rows at random Qwen ids; returns its sequences."""
    rng = np.random.default_rng(0)
    meta = CacheMeta({"id": "simulated"}, {}, QWEN, QWEN, top_k=k, codec=codec)
    sequences = []
    with CacheWriter(path, meta) as writer:
        for _ in range(count):
            tokens = rng.integers(0, QWEN, length).astype(np.int32)
            ids = np.argsort(rng.random((length, 4 * k)), 1)[:, :k] * (QWEN // (4 * k))
            ids += rng.integers(0, QWEN // (4 * k), ids.shape)
            exponent = rng.uniform(1.1, 2.2, (length, 1))
            logits = -exponent * np.log(np.arange(1, k + 1))
            log_p = logits - np.logaddexp.reduce(logits, 1, keepdims=True) + np.log(0.95)
            writer.add(tokens, ids, log_p.astype(np.float32))
            sequences.append(tokens)
    return sequences


def reading(repeats: int) -> None:
    print("\n| codec | batch | tokens/s/core, k=64 | bytes/token |\n|---|---|---|---|")
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
                print(f"| {codec} | {batch} x 512, padded | {rate:,.0f} | {size:.1f} |")
            packs = [[sequences[i] for i in order[j : j + 4]] for j in (0, 4)]
            seconds = median(lambda c=packs, t=cache: t.packed(c, 2048), repeats)
            print(f"| {codec} | 2 x 2048, packed | {2 * 2048 / seconds:,.0f} | {size:.1f} |")


def capture(model_folder: str, repeats: int) -> None:
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
                model, sequences, folder, top_k=k, batch_tokens=1024,
                live_vocab=len(tokenizer), progress=False,
            )  # fmt: skip

    bare()
    times: dict[str, list[float]] = {"bare forward": [], "k=32": [], "k=64": []}
    for _ in range(repeats):
        times["bare forward"].append(timed(bare))
        times["k=32"].append(timed(lambda: whole(32)))
        times["k=64"].append(timed(lambda: whole(64)))
    base = statistics.median(times["bare forward"])
    print(f"\n| capture of {TOKENS:,} tokens | seconds | tokens/s | overhead |\n|---|---|---|---|")
    for name, values in times.items():
        seconds = statistics.median(values)
        extra = 100 * (seconds / base - 1)
        print(f"| {name} | {seconds:.2f} | {TOKENS / seconds:,.0f} | {extra:+.1f} % |")
    step(model)


def step(model: torch.nn.Module) -> None:
    """A training step's forward and backward beside reading its batch."""
    with tempfile.TemporaryDirectory() as folder:
        sequences = make_cache(Path(folder), "compact", 8, 256, 64)
        cache = TeacherCache(folder)
        read = median(lambda: cache.batch(sequences[:4], 256), 5)
    ids = torch.zeros(4, 256, dtype=torch.long)
    model.train()
    seconds = timed(lambda: model(input_ids=ids, labels=ids).loss.backward())
    print(
        f"\nReading a batch of 4 x 256 takes {1e3 * read:.1f} ms, {100 * read / seconds:.2f} % of "
        f"a plain training step's {seconds:.2f} s."
    )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--model", help="folder of a causal LM, such as SmolLM2-135M-Instruct")
    parser.add_argument("--repeats", type=int, default=7)
    parser.add_argument("--skip-reading", action="store_true", help="capture alone")
    args = parser.parse_args()
    torch.set_num_threads(1)
    print(f"{platform.processor() or platform.machine()}, torch {torch.__version__}, one thread")
    if not args.skip_reading:
        reading(args.repeats)
    if args.model:
        capture(args.model, max(1, args.repeats // 2))


if __name__ == "__main__":
    main()
