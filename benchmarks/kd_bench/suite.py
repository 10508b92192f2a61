"""What is compared: suites, the shapes they run at, and the implementations that take part."""

from __future__ import annotations

import contextlib
import dataclasses
import os
import sys
from collections.abc import Callable
from contextlib import AbstractContextManager
from typing import Any

import torch
from torch import Tensor

import kd

Inputs = dict[str, Tensor]
Answer = tuple[Tensor, dict[str, Tensor]]
DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}


@dataclasses.dataclass(frozen=True)
class Shape:
    """Sizes of one problem; the name says whose they are."""

    name: str
    tokens: int
    vocab: int
    student_hidden: int
    teacher_hidden: int
    top_k: int = 64
    layers: int = 0  # of the models, where the suite has some
    length: int = 0  # tokens of a sequence, where the suite has some

    def scaled(self, **sizes: int) -> Shape:
        """The same shape with some sizes changed and named."""
        letters = {"tokens": "N", "vocab": "V", "top_k": "K"}
        changed = ",".join(f"{letters.get(key, key)}={value}" for key, value in sizes.items())
        return dataclasses.replace(self, name=f"{self.name}:{changed}", **sizes)


QWEN = Shape("qwen2.5-0.5b<-1.5b", 512, 151_936, 896, 1536)
NARROW_HEADS = Shape("narrow-heads", 512, 151_936, 128, 256)
SMOKE = Shape("smoke", 24, 1000, 16, 24, 8)
SMOKE_MODELS = Shape("smoke-models", 64, 1000, 32, 64, 32, layers=1, length=32)


@dataclasses.dataclass
class Truth:
    """The oracle's answer: a value, and what else is compared, by name."""

    value: float
    results: dict[str, Tensor]
    ids: Tensor | None = None  # rows of the lm_head's gradient that are kept; all where None


class Step:
    """One timed step; made anew for each set of inputs.

    ``check`` gives the answer that is compared with the truth, where a timed step gives none;
    ``detail`` may say more for the table once it was called.
    """

    detail = ""

    def __init__(self, function: Callable[[], Answer] | None = None) -> None:
        self.function = function

    def __call__(self) -> Answer:
        assert self.function is not None
        return self.function()

    def check(self) -> Answer:
        return self()


@dataclasses.dataclass(frozen=True)
class Implementation:
    """One way to compute a suite's answer.

    Args:
        name: how the tables call it.
        build: (problem, inputs) to a ``Step``.
        package: whose version is reported; None: part of torch or kd.
        divergences: names it is asked for; empty: all.
        copies: [N, V] float32 tensors alive at once, for the memory guard.
        note: shown beside its row.
        approximate: its answer is another number by definition; errors are shown, not judged.
        needs_gpu: Triton kernels; on a CPU they would run in an interpreter.
        bare: the lower bound that the others' time is shown relative to; its numbers mean nothing.
    """

    name: str
    build: Callable[[Problem, Inputs], Step]
    package: str | None = None
    divergences: tuple[str, ...] = ()
    copies: float = 1.0
    note: str = ""
    approximate: bool = False
    needs_gpu: bool = False
    bare: bool = False

    def takes(self, problem: Problem) -> bool:
        return not self.divergences or problem.divergence.partition("(")[0] in self.divergences


def relative_errors(answer: Answer, truth: Truth) -> tuple[float, float]:
    """(value error, worst error of the results), each relative to the largest true value."""
    value, results = answer
    worst = 0.0
    for name, want in truth.results.items():
        got = results[name].cpu()
        if name == "weight" and truth.ids is not None:
            got = got[truth.ids]
        worst = max(worst, float((got.double() - want).abs().max() / want.abs().max()))
    return abs(float(value) - truth.value) / max(abs(truth.value), 1e-30), worst


@dataclasses.dataclass(frozen=True)
class Suite:
    """A question: its inputs, its true answer, and who may answer it.

    Args:
        name: what the tables call it.
        inputs: the tensors of a problem, on the CPU, from a fixed seed.
        few: of the inputs, what the check takes.
        truth: the oracle's answer to a problem with those few inputs.
        implementations: who takes part.
        flops, bytes: (shape), and (shape, itemsize): what no implementation can do without.
        memory: rough bytes of one implementation, for the guard.
        errors, error_name: how an answer is compared, and the column's name.
        any_divergence: whether ``--divergence`` applies.
        surroundings: what runs while it is measured.
    """

    name: str
    inputs: Callable[[Problem], Inputs]
    truth: Callable[[Problem, Inputs], Truth]
    implementations: tuple[Implementation, ...]
    memory: Callable[[Problem, Implementation], int]
    few: Callable[[Inputs], Inputs] = dict
    flops: Callable[[Shape], int] = lambda shape: 0
    bytes: Callable[[Shape, int], int] = lambda shape, itemsize: 0
    errors: Callable[[Answer, Truth], tuple[float, float]] = relative_errors
    error_name: str = "gradient error"
    any_divergence: bool = False
    surroundings: Callable[[], AbstractContextManager[Any]] = contextlib.nullcontext


@dataclasses.dataclass(frozen=True)
class Problem:
    """One group of rows: a suite at a shape, in a dtype, for a divergence."""

    suite: Suite
    shape: Shape
    dtype: str = "float32"
    divergence: str = "forward_kl"

    @property
    def name(self) -> str:
        return "/".join((self.suite.name, self.shape.name, self.dtype, self.divergence))

    @property
    def itemsize(self) -> int:
        return DTYPES[self.dtype].itemsize

    @property
    def bare(self) -> Implementation | None:
        """The lower bound that time is shown relative to."""
        return next((i for i in self.suite.implementations if i.bare), None)

    def entrants(self) -> list[Implementation]:
        """Who takes part; of a series over sizes, what a fitted exponent needs in minutes."""
        found = [i for i in self.suite.implementations if i.takes(self)]
        if self.shape.name.startswith("scaling"):
            found = [i for i in found if i.bare or i.name in ("kd", "pytorch")]
        return found


def parse_divergence(text: str) -> kd.Divergence:
    """A divergence from its printed form, such as ``forward_kl`` or ``jsd(0.5)``.

    Raises:
        ValueError: kd has none of that name.
    """
    name, _, arguments = text.partition("(")
    found = getattr(kd, name, None) if name in kd.__all__ else None
    if found is None:
        raise ValueError(f"--divergence: kd has no divergence called {name!r}.")
    if arguments:
        found = found(*(float(part) for part in arguments.rstrip(")").split(",")))
    if not isinstance(found, kd.Divergence):
        raise ValueError(f"--divergence: {text!r} needs its parameters, as in jsd(0.5).")
    return found


def unknown_divergence(peer: str, divergence: kd.Divergence) -> ValueError:
    """What an adapter raises for a divergence its peer does not have."""
    return ValueError(f"{peer} has no {divergence}: it must not be measured as another divergence.")


def add_peers_to_path() -> None:
    """Make the packages of ``KD_PEERS`` importable, after everything that is installed."""
    folders = os.environ.get("KD_PEERS", "").split(os.pathsep)
    sys.path += [folder for folder in folders if folder and folder not in sys.path]
