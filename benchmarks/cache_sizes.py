"""Bytes per token and added KL of every codec and selection, beside DistillKit's compressor.

    python benchmarks/cache_sizes.py --model FOLDER      real logits of that model, on Python's docs
    python benchmarks/cache_sizes.py                     without a model: simulated logits alone

Prints Markdown. Bytes are those of the shard files over their tokens, input tokens, keys and
headers included. KL is that of the K + 1 outcomes (stored tokens and tail), lossless against
decoded, in nats. DistillKit's rows are computed here from its published format: 8-byte tokens,
ids at ceil(log2 V) bits, values as its settings say; its KL is that of the same K + 1 outcomes.
"""

from __future__ import annotations

import argparse
import math
import pydoc_data.topics
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import torch

from kd.cache import CacheMeta
from kd.cache.bits import width_of
from kd.cache.codecs import CODECS, FLOOR_STEP, LEVELS, encode_tail
from kd.cache.rows import Rows
from kd.cache.shards import encode_shard
from kd.cache.streams import Side, encode_ids, gaps_of, ranking
from kd.teachers.selection import Selection
from kd_bench import tables

QWEN = 151_936
STORED = 512  # likeliest tokens of each row kept for the comparison
# README of DistillKit: the configuration recommended there, and the one of its quick start.
DISTILLKIT = {
    "recommended": (128, 16, 2, (0, 1, 2, 3, 4, "sqrt"), False),
    "quick start": (128, 32, 4, (0, 1, 2), True),
    "recommended, k=64": (64, 16, 2, (0, 1, 2, 3, 4, "sqrt"), False),
}


def real_rows(folder: str, count: int) -> tuple[np.ndarray, np.ndarray, int, torch.Tensor]:
    """ids, log-probs [N, STORED] of a model on Python's documentation; V; some whole rows."""
    from transformers import AutoModelForCausalLM, AutoTokenizer

    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.bfloat16).eval()
    tokenizer = AutoTokenizer.from_pretrained(folder)
    text = "\n".join(pydoc_data.topics.topics.values())
    tokens = tokenizer(text, return_tensors="pt")["input_ids"][0]
    blocks = tokens[: len(tokens) // 256 * 256].view(-1, 256)
    chosen = blocks[torch.linspace(0, len(blocks) - 1, count).long()]
    ids, logprobs, whole = [], [], []
    with torch.inference_mode():
        for block in chosen:
            logp = model(input_ids=block[None]).logits[0].float().log_softmax(-1)
            top = logp.topk(STORED)
            ids.append(top.indices.numpy())
            logprobs.append(top.values.numpy())
            whole.append(logp[::16])
    return np.concatenate(ids), np.concatenate(logprobs), logp.shape[-1], torch.cat(whole)


def simulated_rows(count: int) -> tuple[np.ndarray, np.ndarray]:
    """Rows of a heavy-tailed distribution over QWEN tokens at random ids."""
    rng = np.random.default_rng(0)
    ids, logprobs = [], []
    for _ in range(count):
        exponent = rng.uniform(1.1, 2.2)  # p of rank r is about r ** -exponent
        logits = -exponent * np.log(np.arange(1, QWEN + 1)) + 0.3 * rng.standard_normal(QWEN)
        log_p = np.sort(logits - np.logaddexp.reduce(logits))[::-1]
        logprobs.append(log_p[:STORED])
        ids.append(rng.choice(QWEN, STORED, replace=False))
    return np.stack(ids), np.stack(logprobs).astype(np.float32)


def sharpened(logprobs: np.ndarray, temperature: float) -> np.ndarray:
    """Rows at a lower temperature, normalised over the stored tokens: a surer teacher."""
    scaled = logprobs.astype(np.float64) / temperature
    return (scaled - np.logaddexp.reduce(scaled, axis=1, keepdims=True)).astype(np.float32)


def added_kl(ids, logprobs, found_ids, found_logprobs) -> np.ndarray:
    """KL per row of lossless rows [N, K] against decoded ones."""
    n, k = logprobs.shape
    mine, theirs = np.argsort(ids, 1), np.argsort(found_ids.reshape(n, k), 1)
    a = np.take_along_axis(logprobs, mine, 1).astype(np.float64)
    b = np.take_along_axis(found_logprobs.reshape(n, k), theirs, 1).astype(np.float64)
    return kl_of(a, b)


def kl_of(a: np.ndarray, b: np.ndarray) -> np.ndarray:
    left = np.maximum(1 - np.exp(a).sum(1), 1e-7)
    right = np.maximum(1 - np.exp(b).sum(1), 1e-7)
    return (np.exp(a) * (a - b)).sum(1) + left * np.log(left / right)


def meta_of(live: int, codec: str, **options) -> CacheMeta:
    return CacheMeta({"id": "-"}, {}, live, live, top_k=1, codec=codec, **options)


def rows_of(ids, logprobs) -> Rows:
    """[N, K] entries as rows of sequences of 256 tokens."""
    n, k = ids.shape
    tokens = np.resize(ids[:, 0], n).astype(np.int32)
    entries = ids.reshape(-1).astype(np.int32), logprobs.reshape(-1)
    return Rows(np.full(n // 256, 256), np.full(n, k, np.int32), *entries, tokens=tokens)


def ours(ids, logprobs, live: int, codec: str, k: int) -> tuple[float, float, float]:
    """bytes/token, mean and largest KL of a codec."""
    n = len(ids) // 256 * 256
    ids, logprobs = ids[:n, :k], logprobs[:n, :k]
    rows = rows_of(ids, logprobs)
    size = len(encode_shard(rows, meta_of(live, codec)))
    side = Side(meta_of(live, codec))
    found = CODECS[codec].decode(CODECS[codec].encode(rows, side), rows, side)
    kl = added_kl(ids, logprobs, *found)
    return size / n, float(kl.mean()), float(kl.max())


def entropy(values: np.ndarray, given: np.ndarray | None = None) -> float:
    """Empirical entropy in bytes, summed over all values, each given its class."""
    given = np.zeros(len(values), np.int64) if given is None else given.astype(np.int64)
    _, pairs = np.unique(given << 32 | values.astype(np.int64), return_counts=True)
    _, classes = np.unique(given, return_counts=True)
    bits = (classes * np.log2(classes)).sum() - (pairs * np.log2(pairs)).sum()
    return float(bits) / 8


def ideal(ids, logprobs, live: int, k: int) -> float:
    """bytes/token of an ideal order-0 coder of what "compact" stores: gaps between ranks, levels
    given the row's least level, tails and floors, with input tokens and keys as they are."""
    n = len(ids) // 256 * 256
    rows, side = rows_of(ids[:n, :k], logprobs[:n, :k]), Side(meta_of(live, "compact"))
    order = encode_ids(rows, side)[1]
    rank = ranking(side.tables["ranks"], live)[1][rows.ids]
    p = np.exp(rows.logprobs[order].astype(np.float64)).reshape(n, k)
    level = np.rint(np.sqrt(p) * LEVELS).astype(np.int64)
    least = level.min(1)
    mean = np.where(level == 0, p, 0).sum(1) / np.maximum((level == 0).sum(1), 1)
    floors = np.rint(-np.log(mean[least == 0]) / FLOOR_STEP)
    total = entropy(gaps_of(rank[order], rows.counts)) + 4 * len(side.tables["ranks"])
    total += entropy((level - least[:, None]).reshape(-1), np.repeat(least, k))
    total += entropy(encode_tail(p.sum(1))) + entropy(least) + entropy(floors)
    return total / n + width_of(live - 1) / 8 + 20 / 256


def theirs(logprobs: np.ndarray, live: int, setting: str) -> tuple[float, float, float]:
    """bytes/token and KL of one of DistillKit's settings (no rows above one in sum are mended)."""
    k, exact, width, terms, delta = DISTILLKIT[setting]
    values = torch.from_numpy(logprobs[:, :k].copy()).double()
    work = values.clone()
    if delta:
        work[:, 1:] = values[:, 1:] - values[:, :-1]
    kept = work[:, :exact].to(torch.bfloat16 if width == 2 else torch.float32).double()
    at = torch.arange(k - exact, dtype=torch.float64)
    basis = torch.stack([at.sqrt() if t == "sqrt" else at**t for t in terms], -1)
    fit = torch.linalg.lstsq(basis, work[:, exact:].T).solution.float().double()
    decoded = torch.cat([kept, (basis @ fit).T], 1)
    if delta:
        decoded = decoded.cumsum(1)
    size = 8 + -(-k * math.ceil(math.log2(live)) // 8) + exact * width + 4 * len(terms)
    # As its loss has it: values are renormalised where they pass one in sum.
    over = decoded.logsumexp(1, keepdim=True).clamp(min=-1e-7) + 1e-7
    kl = kl_of(values.numpy(), (decoded - over.clamp(min=0)).numpy())
    return float(size), float(kl.mean()), float(kl.max())


def sampled(whole: torch.Tensor, live: int, draws: int) -> tuple[float, float]:
    """bytes/token and distinct ids of the sampled selection on whole rows [N, V]."""
    n = len(whole) // 16 * 16
    choose = Selection("sampled", draws=draws)
    parts = []
    for start in range(0, n, 64):
        chunk = whole[start : start + 64]
        parts.append(
            choose.rows(chunk, 1.0, choose.uniforms(len(chunk), bytes([start % 256] * 16)))
        )
    ids = torch.cat([part[0][:n] for part in parts])[:n].numpy()
    logprobs = torch.cat([part[1] for part in parts])[:n].numpy()
    used = ids >= 0
    rows = Rows(
        np.full(n // 16, 16),
        used.sum(1).astype(np.int32),
        ids[used].astype(np.int32),
        logprobs[used],
        tokens=ids[:, 0].astype(np.int32),
    )
    drawn = {"selection": "sampled", "selection_options": {"draws": draws}}
    data = encode_shard(rows, meta_of(live, "counts", **drawn))
    return len(data) / n, float(used.sum(1).mean())


def least_bytes(k: int, live: int) -> float:
    """log2 of the number of sets of k ids out of V, in bytes: no coder of uniform ids does less."""
    choose = math.lgamma(live + 1) - math.lgamma(k + 1) - math.lgamma(live - k + 1)
    return choose / math.log(2) / 8


def measured(args: argparse.Namespace) -> Iterator[str]:
    """Every codec and setting on every kind of rows; then the sampled selection of a model's."""
    rng, cases, whole = np.random.default_rng(0), [], None
    if args.model:
        ids, logprobs, live, whole = real_rows(args.model, args.blocks)
        spread = ids.astype(np.int64) * QWEN // live + rng.integers(0, QWEN // live, ids.shape)
        uniform = np.stack([rng.choice(QWEN, STORED, replace=False) for _ in ids])
        cases += [
            (f"real logits, V = {live:,}", ids, logprobs, live),
            ("real logits, ids spread over Qwen's V", spread, logprobs, QWEN),
            ("real logits, uniform ids (worst case)", uniform, logprobs, QWEN),
            ("sharpened (T = 0.6), uniform ids", uniform, sharpened(logprobs, 0.6), QWEN),
        ]
    cases.append(("simulated power law, uniform ids", *simulated_rows(2048), QWEN))
    rows = []
    for name, ids, logprobs, live in cases:
        mass, best = np.exp(logprobs[:, :64]).sum(1).mean(), np.exp(logprobs[:, 0]).mean()
        rows.append([f"**{name}** (top-64 holds {mass:.3f}, top-1 {best:.2f})", *[""] * 4])
        found = {f"kd {codec}, k=64": ours(ids, logprobs, live, codec, 64)
                 for codec in ("compact", "log8", "float32")}  # fmt: skip
        found["kd compact, k=128"] = ours(ids, logprobs, live, "compact", 128)
        found |= {f"DistillKit {name}": theirs(logprobs, live, name) for name in DISTILLKIT}
        rows += [["", n, f"{size:.1f}", f"{mean:.1e}", f"{most:.1e}"]
                 for n, (size, mean, most) in found.items()]  # fmt: skip
        size = f"{ideal(ids, logprobs, live, 64):.1f}"
        rows.append(["", "an ideal order-0 coder of what compact stores", size, "as compact", ""])
    yield f"numpy {np.__version__}, torch {torch.__version__}\n"
    columns = ["rows", "stored", "bytes/token", "added KL, mean", "added KL, max"]
    yield tables.markdown(columns, rows, text=["stored"])
    if whole is not None:
        yield "\n" + sampled_table(whole)
    yield f"\nLeast for 64 uniform ids of {QWEN:,}: {least_bytes(64, QWEN):.1f} bytes, ids alone."


def sampled_table(whole: torch.Tensor) -> str:
    live, g = whole.shape[1], torch.Generator().manual_seed(0)
    wide = torch.full((len(whole), QWEN), -torch.inf)
    wide[:, torch.randperm(QWEN, generator=g)[:live]] = whole
    rows = []
    for name, given, vocabulary in (("real", whole, live), ("random Qwen ids", wide, QWEN)):
        for draws in (25, 50, 100):
            size, distinct = sampled(given, vocabulary, draws)
            rows.append([name, draws, f"{distinct:.1f}", f"{size:.1f}"])
    columns = ["sampled (`counts`)", "draws", "distinct ids", "bytes/token"]
    return tables.markdown(columns, rows)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--model", help="folder of a causal LM, such as SmolLM2-135M-Instruct")
    parser.add_argument("--blocks", type=int, default=32, help="blocks of 256 tokens")
    parser.add_argument("--output", type=Path, help="also write the Markdown there")
    args = parser.parse_args()
    torch.set_num_threads(1)
    tables.show(measured(args), args.output)


if __name__ == "__main__":
    main()
