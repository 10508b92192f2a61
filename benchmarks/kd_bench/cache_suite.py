"""Writing a cache of teacher targets, and reading training batches from it.

The rows are of a power law at random ids, the worst case for a codec. What is written is read back
and compared: the value is the mean over tokens of the stored sum of p log p, and the error is that
of the probabilities and their ids.
"""

from __future__ import annotations

import tempfile
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from kd_bench.shapes import Shape
from kd_bench.steps import Answer, Inputs, Truth

BATCH = 4  # sequences that are read at once


def power_law_rows(
    rng: np.random.Generator, length: int, k: int, live: int
) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """tokens [L], ids [L, K] and log-probs [L, K] of one sequence; the rows hold 0.95 each."""
    tokens = rng.integers(0, live, length).astype(np.int32)
    wide = min(4 * k, live)
    ids = np.argsort(rng.random((length, wide)), 1)[:, :k] * (live // wide)
    ids += rng.integers(0, live // wide, ids.shape)
    exponent = rng.uniform(1.1, 2.2, (length, 1))
    logits = -exponent * np.log(np.arange(1, k + 1))
    log_p = logits - np.logaddexp.reduce(logits, 1, keepdims=True) + np.log(0.95)
    return tokens, ids.astype(np.int32), log_p.astype(np.float32)


def make(shape: Shape, dtype: torch.dtype) -> Inputs:
    """cache_tokens [S, L], cache_ids and cache_logprobs [S, L, K]."""
    rng = np.random.default_rng(0)
    count = max(1, shape.tokens // shape.length)
    rows = [power_law_rows(rng, shape.length, shape.top_k, shape.vocab) for _ in range(count)]
    names = ("cache_tokens", "cache_ids", "cache_logprobs")
    made = {
        name: torch.from_numpy(np.stack(part))
        for name, part in zip(names, zip(*rows, strict=True), strict=True)
    }
    return made | {"cache_vocab": torch.tensor([shape.vocab])}


def truth(divergence: str, inputs: Inputs) -> Truth:
    value, found = answer_of_rows(inputs["cache_ids"], inputs["cache_logprobs"])
    results = {name: tensor.double() for name, tensor in found.items()}
    return Truth(float(value), results, torch.zeros(0, dtype=torch.long))


def answer_of_rows(ids: Tensor, logprobs: Tensor) -> Answer:
    """What is compared of targets [..., K], whatever their order in a row."""
    ids, order = ids.flatten(0, -2).long().sort(-1)
    wide = logprobs.flatten(0, -2).double().gather(-1, order)
    p = wide.exp()
    value = torch.where(p > 0, p * wide, 0.0).sum(-1).mean()
    return value, {"probabilities": p, "ids": ids}


class Store:
    """One way to keep targets: writes a folder, and reads a batch of sequences from it."""

    def __init__(self, inputs: Inputs, codec: str) -> None:
        self.tokens = inputs["cache_tokens"].cpu()
        self.ids, self.logprobs = inputs["cache_ids"].cpu(), inputs["cache_logprobs"].cpu()
        self.vocab, self.codec = int(inputs["cache_vocab"]), codec

    def write(self, folder: Path) -> None:
        from kd.cache import CacheMeta, CacheWriter

        meta = CacheMeta(
            {"id": "simulated"},
            {},
            self.vocab,
            self.vocab,
            top_k=self.ids.shape[-1],
            codec=self.codec,
        )
        with CacheWriter(folder, meta) as writer:
            for tokens, ids, logprobs in zip(self.tokens, self.ids, self.logprobs, strict=True):
                writer.add(tokens.numpy(), ids.numpy(), logprobs.numpy())

    def open(self, folder: Path) -> Any:
        from kd.cache import TeacherCache

        return TeacherCache(folder)

    def read(self, opened: Any, at: Tensor) -> tuple[Tensor, Tensor]:
        found = opened.batch(list(self.tokens[at]), self.tokens.shape[1])
        return found.ids, found.logprobs


class TorchStore(Store):
    """torch.save of int32 ids and float32 log-probs, read through a memory map."""

    def write(self, folder: Path) -> None:
        torch.save({"ids": self.ids, "logprobs": self.logprobs}, folder / "targets.pt")

    def open(self, folder: Path) -> Any:
        return torch.load(folder / "targets.pt", mmap=True, weights_only=True)

    def read(self, opened: Any, at: Tensor) -> tuple[Tensor, Tensor]:
        return opened["ids"][at].long(), opened["logprobs"][at]


class Write:
    """Everything written into a new folder; ``check`` reads it back."""

    detail = ""

    def __init__(self, store: Store) -> None:
        self.store = store

    def __call__(self) -> Answer:
        with tempfile.TemporaryDirectory() as folder:
            self.store.write(Path(folder))
        return torch.zeros(()), {}

    def check(self) -> Answer:
        with tempfile.TemporaryDirectory() as name:
            self.store.write(Path(name))
            size = sum(path.stat().st_size for path in Path(name).rglob("*") if path.is_file())
            self.detail = f"{size / self.store.tokens.numel():.1f} bytes/token"
            everything = torch.arange(len(self.store.tokens))
            ids, logprobs = self.store.read(self.store.open(Path(name)), everything)
            return answer_of_rows(ids, logprobs)


class Read:
    """Every sequence once, in shuffled batches, from a cache that is open."""

    def __init__(self, store: Store) -> None:
        self.store, self.folder = store, tempfile.TemporaryDirectory()
        store.write(Path(self.folder.name))
        self.opened = store.open(Path(self.folder.name))
        order = torch.randperm(len(store.tokens), generator=torch.Generator().manual_seed(1))
        self.batches = order.split(BATCH)

    def __call__(self) -> Answer:
        for at in self.batches:
            self.store.read(self.opened, at)
        return torch.zeros(()), {}

    def check(self) -> Answer:
        ids, logprobs = torch.empty_like(self.store.ids), torch.empty_like(self.store.logprobs)
        for at in self.batches:
            found = self.store.read(self.opened, at)
            ids[at], logprobs[at] = found[0].to(ids.dtype), found[1]
        return answer_of_rows(ids, logprobs)


def build(suite: str, inputs: Inputs, codec: str) -> Write | Read:
    """A step of the suite; ``codec`` names one of kd's, or "torch"."""
    store = TorchStore(inputs, codec) if codec == "torch" else Store(inputs, codec)
    return Write(store) if suite == "cache-write" else Read(store)
