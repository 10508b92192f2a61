"""Capturing a teacher's targets, beside the bare forward of the same batches.

The truth is the float64 log-softmax of the model's float32 logits on the first tokens; the error is
the largest of a stored probability.
"""

from __future__ import annotations

import tempfile
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from kd_bench.models import make_model
from kd_bench.shapes import Shape
from kd_bench.steps import Answer, Inputs, Truth

BATCH_TOKENS = 1024
CHECKED = 8  # tokens of the first sequence


def make(shape: Shape, dtype: torch.dtype) -> Inputs:
    """capture_tokens [S, L], and what the model is made of."""
    g = torch.Generator().manual_seed(0)
    count = max(1, shape.tokens // shape.length)
    tokens = torch.randint(3, shape.vocab, (count, shape.length), generator=g)
    size = torch.tensor([shape.teacher_hidden, shape.layers, shape.vocab, shape.top_k])
    return {
        "capture_tokens": tokens,
        "capture_size": size,
        "capture_like": torch.zeros(1).to(dtype),
    }


def model_of(inputs: Inputs) -> torch.nn.Module:
    hidden, layers, vocab, _ = inputs["capture_size"].tolist()
    like = inputs["capture_like"]
    return make_model(hidden, layers, vocab, 0, like.dtype).to(like.device).eval()


def truth(divergence: str, inputs: Inputs) -> Truth:
    model = model_of(inputs).float()
    with torch.inference_mode():
        logits = model(input_ids=inputs["capture_tokens"][:1, :CHECKED], use_cache=False).logits[0]
        logprobs = torch.log_softmax(logits.double(), -1).clone()
    none = torch.zeros(0, dtype=torch.long)
    return Truth(float(logprobs.amax(-1).mean()), {"logprobs": logprobs}, none)


class Capture:
    """One way to turn sequences into stored targets: ``build_cache``."""

    def __init__(self, inputs: Inputs) -> None:
        self.tokens, self.model = inputs["capture_tokens"], model_of(inputs)
        self.vocab, self.top_k = inputs["capture_size"].tolist()[2:]

    def batches(self) -> tuple[Tensor, ...]:
        return self.tokens.split(max(1, BATCH_TOKENS // self.tokens.shape[1]))

    def store(self, tokens: Tensor, folder: Path) -> None:
        from kd.teachers import build_cache

        build_cache(
            self.model,
            [np.asarray(row, np.int32) for row in tokens.cpu()],
            folder,
            top_k=self.top_k,
            live_vocab=self.vocab,
            batch_tokens=BATCH_TOKENS,
            progress=False,
        )

    def first(self, folder: Path) -> tuple[Tensor, Tensor]:
        from kd.cache import TeacherCache

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
    """The model's logits of every batch, and nothing else: the floor."""

    def __call__(self) -> Answer:
        with torch.inference_mode():
            for batch in self.batches():
                self.model(input_ids=batch, use_cache=False)
        return torch.zeros(()), {}


class PlainCapture(Capture):
    """Logits, log-softmax and top-k of a whole batch at once, then torch.save."""

    def store(self, tokens: Tensor, folder: Path) -> None:
        kept = []
        with torch.inference_mode():
            for batch in tokens.split(max(1, BATCH_TOKENS // tokens.shape[1])):
                logits = self.model(input_ids=batch, use_cache=False).logits
                top = torch.log_softmax(logits.float(), -1).topk(self.top_k)
                kept.append((top.indices.int().cpu(), top.values.cpu()))
        ids, logprobs = (torch.cat(side) for side in zip(*kept, strict=True))
        torch.save({"ids": ids, "logprobs": logprobs}, folder / "targets.pt")

    def first(self, folder: Path) -> tuple[Tensor, Tensor]:
        found = torch.load(folder / "targets.pt", weights_only=True)
        return found["ids"][0].long(), found["logprobs"][0]
