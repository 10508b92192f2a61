"""What every implementation of a benchmark is made of: inputs, a step, its answer."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

Inputs = dict[str, Tensor]
Answer = tuple[Tensor, dict[str, Tensor]]
Step = Callable[[], Answer]
LINEAR_LEAVES = ("hidden", "weight")


def leaves(inputs: Inputs, names: tuple[str, ...]) -> dict[str, Tensor]:
    return {name: inputs[name].detach().requires_grad_() for name in names}


def with_gradients(loss: Tensor, wanted: dict[str, Tensor]) -> Answer:
    found = torch.autograd.grad(loss, list(wanted.values()))
    return loss.detach(), dict(zip(wanted, found, strict=True))
