"""Capturing a local model's targets: forward, selection, encoding and writing, beside the forward.

The truth is the float64 log-softmax of the model's float32 logits on the first tokens; the error is
the largest of a stored probability.
"""

from __future__ import annotations

import tempfile
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from kd.cache import TeacherCache
from kd.teachers import build_cache
from kd_bench.models import make_model, matmul_parameters
from kd_bench.suite import (
    DTYPES,
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

BATCH_TOKENS = 1024
CHECKED = 8  # tokens of the first sequence


def make_sequences(problem: Problem) -> Inputs:
    s, g = problem.shape, torch.Generator().manual_seed(0)
    size = (max(1, s.tokens // s.length), s.length)
    return {"tokens": torch.randint(3, s.vocab, size, generator=g)}


def teacher_of(problem: Problem, device: torch.device) -> torch.nn.Module:
    s = problem.shape
    return make_model(s.teacher_hidden, s.layers, s.vocab, 0, DTYPES[problem.dtype]).to(device)


def exact_capture(problem: Problem, inputs: Inputs) -> Truth:
    """The float64 log-softmax of the model's float32 logits on the first tokens."""
    model = teacher_of(problem, inputs["tokens"].device).float().eval()
    with torch.no_grad():
        logits = model(input_ids=inputs["tokens"][:1, :CHECKED], use_cache=False).logits[0]
    logprobs = torch.log_softmax(logits.double(), -1)
    return Truth(float(logprobs.amax(-1).mean()), {"logprobs": logprobs})


def capture_errors(answer: Answer, truth: Truth) -> tuple[float, float]:
    """Ids that are as likely as others may differ, and codecs keep p, not log p."""
    value, results = answer
    exact = truth.results["logprobs"].gather(1, results["ids"].cpu()).exp()
    worst = float((results["logprobs"].cpu().double().exp() - exact).abs().max())
    return abs(float(value) - truth.value) / abs(truth.value), worst


class Capture(Step):
    """Sequences turned into stored targets by ``kd.teachers.build_cache``."""

    def __init__(self, problem: Problem, inputs: Inputs) -> None:
        self.tokens, self.shape = inputs["tokens"], problem.shape
        self.model = teacher_of(problem, self.tokens.device).eval()

    def batches(self, tokens: Tensor) -> tuple[Tensor, ...]:
        return tokens.split(max(1, BATCH_TOKENS // tokens.shape[1]))

    def store(self, tokens: Tensor, folder: Path) -> None:
        sequences = [row.numpy().astype(np.int32) for row in tokens.cpu()]
        options = {"top_k": self.shape.top_k, "live_vocab": self.shape.vocab, "progress": False}
        build_cache(self.model, sequences, folder, batch_tokens=BATCH_TOKENS, **options)

    def first(self, folder: Path) -> tuple[Tensor, Tensor]:
        found = TeacherCache(folder).lookup(self.tokens[0])
        return found.ids, found.logprobs

    def __call__(self) -> Answer:
        with tempfile.TemporaryDirectory() as folder:
            self.store(self.tokens, Path(folder))
        return torch.zeros(()), {}

    def check(self) -> Answer:
        with tempfile.TemporaryDirectory() as folder:
            self.store(self.tokens[:1], Path(folder))
            ids, logprobs = (side[:CHECKED] for side in self.first(Path(folder)))
        return logprobs.amax(-1).mean(), {"ids": ids, "logprobs": logprobs}


class BareForward(Capture):
    """The model's logits of every batch, and nothing else."""

    def __call__(self) -> Answer:
        with torch.inference_mode():
            for batch in self.batches(self.tokens):
                self.model(input_ids=batch, use_cache=False)
        return torch.zeros(()), {}


class PlainCapture(Capture):
    """Logits, log-softmax and top-k of a whole batch at once, then torch.save."""

    def store(self, tokens: Tensor, folder: Path) -> None:
        kept = []
        with torch.inference_mode():
            for batch in self.batches(tokens):
                logits = self.model(input_ids=batch, use_cache=False).logits
                top = torch.log_softmax(logits.float(), -1).topk(self.shape.top_k)
                kept.append((top.indices.int().cpu(), top.values.cpu()))
        ids, logprobs = (torch.cat(side) for side in zip(*kept, strict=True))
        torch.save({"ids": ids, "logprobs": logprobs}, folder / "targets.pt")

    def first(self, folder: Path) -> tuple[Tensor, Tensor]:
        found = torch.load(folder / "targets.pt", weights_only=True)
        return found["ids"][0].long(), found["logprobs"][0]


def memory_needed(problem: Problem, implementation: Implementation) -> int:
    s = problem.shape
    weights = matmul_parameters(s.teacher_hidden, s.layers, s.vocab)
    return weights * problem.itemsize + 12 * min(s.tokens, BATCH_TOKENS) * s.vocab


CAPTURE = Suite(
    "capture",
    inputs=make_sequences,
    truth=exact_capture,
    implementations=(
        Implementation("kd", Capture, approximate=True),
        Implementation("bare forward", BareForward, bare=True, note="lower bound: logits alone"),
        Implementation("pytorch", PlainCapture),
    ),
    memory=memory_needed,
    flops=lambda s: 2 * s.tokens * matmul_parameters(s.teacher_hidden, s.layers, s.vocab),
    errors=capture_errors,
    error_name="error of p",
)
CAPTURED = Shape("qwen2-2x256", 1024, 151_936, 0, 256, 32, layers=2, length=128)
GPU_CAPTURED = Shape("qwen2-8x1536", 16_384, 151_936, 0, 1536, 64, layers=8, length=512)


def problems(device: str, tokens: int | None, smoke: bool) -> list[Problem]:
    """What a run measures; ``tokens`` is of the losses alone."""
    if smoke or device == "cpu":
        return [Problem(CAPTURE, SMOKE_MODELS if smoke else CAPTURED)]
    return [Problem(CAPTURE, GPU_CAPTURED, "bfloat16")]


def test_capture(row, measure):
    measure(row)
