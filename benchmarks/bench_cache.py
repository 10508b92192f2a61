"""Teacher targets on disk: writing a cache, and reading training batches from it.

What is written is read back and compared with float64 before it is timed: the error is that of the
stored probabilities. The rows are of a power law at random ids, the worst case
for a codec.
"""

from __future__ import annotations

import functools
import tempfile
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from kd.cache import CacheMeta, CacheWriter, TeacherCache
from kd_bench.suite import (
    SMOKE_MODELS,
    Answer,
    Implementation,
    Inputs,
    Problem,
    Shape,
    Step,
    Suite,
    Truth,
)

READ_AT_ONCE = 4  # sequences


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


def make_targets(problem: Problem) -> Inputs:
    """tokens [S, L], ids and logprobs [S, L, K]."""
    rng, s = np.random.default_rng(0), problem.shape
    count = max(1, s.tokens // s.length)
    rows = [power_law_rows(rng, s.length, s.top_k, s.vocab) for _ in range(count)]
    parts = (torch.from_numpy(np.stack(part)) for part in zip(*rows, strict=True))
    return dict(zip(("tokens", "ids", "logprobs"), parts, strict=True))


def answer_of_rows(ids: Tensor, logprobs: Tensor) -> Answer:
    """Of targets [..., K], whatever their order in a row: mean sum of p log p; p and ids."""
    ids, order = ids.flatten(0, -2).long().sort(-1)
    wide = logprobs.flatten(0, -2).double().gather(-1, order)
    p = wide.exp()
    value = torch.where(p > 0, p * wide, 0.0).sum(-1).mean()
    return value, {"probabilities": p, "ids": ids}


def exact_targets(problem: Problem, inputs: Inputs) -> Truth:
    value, results = answer_of_rows(inputs["ids"], inputs["logprobs"])
    return Truth(float(value), {name: tensor.double() for name, tensor in results.items()})


class Store:
    """One way to keep targets: writes a folder, and reads a batch of sequences from it."""

    def __init__(self, problem: Problem, inputs: Inputs, codec: str) -> None:
        self.inputs = {name: tensor.cpu() for name, tensor in inputs.items()}
        self.vocab, self.codec = problem.shape.vocab, codec

    def write(self, folder: Path) -> None:
        options = {"top_k": self.inputs["ids"].shape[-1], "codec": self.codec}
        meta = CacheMeta({"id": "simulated"}, {}, self.vocab, self.vocab, **options)
        with CacheWriter(folder, meta) as writer:
            for row in zip(*self.inputs.values(), strict=True):
                writer.add(*(tensor.numpy() for tensor in row))

    def open(self, folder: Path) -> Any:
        return TeacherCache(folder)

    def read(self, opened: Any, at: Tensor, packed: bool = False) -> tuple[Tensor, Tensor]:
        tokens = self.inputs["tokens"][at]
        if packed:
            found = opened.packed([list(tokens)], tokens.numel())
        else:
            found = opened.batch(list(tokens), tokens.shape[1])
        shape = (*tokens.shape, -1)
        return found.ids.view(shape), found.logprobs.view(shape)


class TorchStore(Store):
    """torch.save of int32 ids and float32 log-probs, read through a memory map."""

    def write(self, folder: Path) -> None:
        torch.save(self.inputs, folder / "targets.pt")

    def open(self, folder: Path) -> Any:
        return torch.load(folder / "targets.pt", mmap=True, weights_only=True)

    def read(self, opened: Any, at: Tensor, packed: bool = False) -> tuple[Tensor, Tensor]:
        return opened["ids"][at].long(), opened["logprobs"][at]


class Write(Step):
    """Everything written into a new folder; ``check`` reads it back."""

    def __init__(self, store: Store) -> None:
        self.store = store

    def __call__(self) -> Answer:
        with tempfile.TemporaryDirectory() as folder:
            self.store.write(Path(folder))
        return torch.zeros(()), {}

    def check(self) -> Answer:
        tokens = self.store.inputs["tokens"]
        with tempfile.TemporaryDirectory() as name:
            self.store.write(Path(name))
            size = sum(path.stat().st_size for path in Path(name).rglob("*") if path.is_file())
            self.detail = f"{size / tokens.numel():.1f} bytes/token"
            return answer_of_rows(
                *self.store.read(self.store.open(Path(name)), torch.arange(len(tokens)))
            )


class Read(Step):
    """Every sequence once, in shuffled batches, from a cache that is open."""

    def __init__(self, store: Store, packed: bool) -> None:
        self.store, self.packed, self.folder = store, packed, tempfile.TemporaryDirectory()
        store.write(Path(self.folder.name))
        self.opened = store.open(Path(self.folder.name))
        order = torch.Generator().manual_seed(1)
        batches = torch.randperm(len(store.inputs["tokens"]), generator=order)
        self.batches = batches.split(READ_AT_ONCE)

    def __call__(self) -> Answer:
        for at in self.batches:
            self.store.read(self.opened, at, self.packed)
        return torch.zeros(()), {}

    def check(self) -> Answer:
        found = [self.store.read(self.opened, at, self.packed) for at in self.batches]
        order = torch.cat(self.batches).argsort()
        return answer_of_rows(*(torch.cat(side)[order] for side in zip(*found, strict=True)))


def build_store(codec: str, problem: Problem, inputs: Inputs) -> Step:
    store = (TorchStore if codec == "torch" else Store)(problem, inputs, codec)
    if problem.suite.name == "cache-write":
        return Write(store)
    return Read(store, packed=problem.suite.name == "cache-read-packed")


# --- the suites -----------------------------------------------------------------------------------


def cache_suite(name: str, *codecs: tuple[str, str, str]) -> Suite:
    made = [
        Implementation(who, functools.partial(build_store, codec), note=note, approximate=True)
        for who, codec, note in codecs
    ]
    return Suite(
        name,
        inputs=make_targets,
        truth=exact_targets,
        implementations=tuple(made),
        memory=lambda problem, _: 40 * problem.shape.tokens * problem.shape.top_k,
        bytes=lambda shape, itemsize: 12 * shape.tokens * shape.top_k,
        error_name="error of p",
    )


OURS = (("kd", "compact", ""), ("kd log8", "log8", ""), ("kd float32", "float32", "lossless"))
PLAIN = ("pytorch", "torch", "torch.save and a memory map")
WRITE = cache_suite("cache-write", *OURS, PLAIN)
READ = cache_suite("cache-read", *OURS, PLAIN)
PACKED = cache_suite("cache-read-packed", *OURS)
CACHE = Shape("qwen2.5-ids,k=64", 8192, 151_936, 0, 0, 64, length=512)


def problems(device: str, tokens: int | None, smoke: bool) -> list[Problem]:
    """What a run measures; ``tokens`` is of the losses alone."""
    return [Problem(suite, SMOKE_MODELS if smoke else CACHE) for suite in (WRITE, READ, PACKED)]


def test_cache(row, measure):
    measure(row)
