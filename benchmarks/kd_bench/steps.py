"""What every implementation of a benchmark is made of: inputs, a step, its answer."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable

import torch
from torch import Tensor

Inputs = dict[str, Tensor]
Answer = tuple[Tensor, dict[str, Tensor]]
Step = Callable[[], Answer]
LINEAR_LEAVES = ("hidden", "weight")


@dataclasses.dataclass(frozen=True)
class Implementation:
    """One way to compute a suite's answer.

    The step that ``build`` makes may have a method ``check``, which gives the answer to be compared
    where a timed step has none; or ``errors``, which compares by itself; and a text ``detail``.
    """

    name: str
    suites: tuple[str, ...]
    build: Callable[[str, str, Inputs], Step]
    package: str | None = None  # whose version is reported; None: part of torch or kd
    divergences: tuple[str, ...] = ()  # empty: all
    copies: float = 1.0  # [N, V] float32 tensors alive at once, for the memory guard
    note: str = ""
    needs_gpu: bool = False  # Triton kernels: on a CPU they would run in an interpreter
    missing: str = ""  # said where the package is not installed

    def takes(self, suite: str, divergence: str) -> bool:
        name = divergence.partition("(")[0]
        return suite in self.suites and (not self.divergences or name in self.divergences)


@dataclasses.dataclass
class Truth:
    """The oracle's answer on the first rows: a value, and gradients by name."""

    value: float
    gradients: dict[str, Tensor]
    ids: Tensor  # rows of the lm_head's gradient that are kept


def is_floor(name: str) -> bool:
    """Whether a row is bare work that nobody can avoid; its numbers mean nothing."""
    return name.startswith(("matmuls", "bare "))


def answer_of(step: Step) -> Answer:
    """What is compared with the truth: a step's own answer, or that of its ``check``."""
    return getattr(step, "check", step)()


def leaves(inputs: Inputs, names: tuple[str, ...]) -> dict[str, Tensor]:
    return {name: inputs[name].detach().requires_grad_() for name in names}


def with_gradients(loss: Tensor, wanted: dict[str, Tensor]) -> Answer:
    found = torch.autograd.grad(loss, list(wanted.values()))
    return loss.detach(), dict(zip(wanted, found, strict=True))
