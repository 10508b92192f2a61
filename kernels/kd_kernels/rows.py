"""What the launchers of row kernels share: logits as arguments, and how rows may be read."""

from __future__ import annotations

import contextlib
import dataclasses
import functools
from collections.abc import Iterator

import torch
import triton
from torch import Tensor

LOG2E = 1.4426950408889634
INTERPRETING = bool(triton.knobs.runtime.interpret)  # as kernels are decorated, so it stays
WIDE_TEMPERATURE = 16.0
"""Above it a divergence is below 1e-2 nats and float32 loses its digits; taken in float64, which
a card for graphics runs at a sixty-fourth."""
DTYPES = (torch.bfloat16, torch.float16, torch.float32)


@dataclasses.dataclass(frozen=True)
class Logits:
    """Raw logits [N, width] of which the final ones are cap * tanh(scale * raw / cap)."""

    tensor: Tensor
    scale: float = 1.0
    cap: float | None = None

    def __post_init__(self) -> None:
        if self.tensor.dtype not in DTYPES:
            raise TypeError(
                f"kd_kernels: logits must be bfloat16, float16 or float32, got "
                f"{self.tensor.dtype}. Cast them, or use backend='torch'."
            )
        if self.tensor.ndim != 2 or (self.tensor.shape[1] > 1 and self.tensor.stride(1) != 1):
            raise ValueError(
                "kd_kernels: logits must be [N, V] with unit column stride, got shape "
                f"{tuple(self.tensor.shape)}, strides {self.tensor.stride()}. Call .contiguous()."
            )

    def to_log2(self, temperature: float) -> tuple[float, float]:
        """(inner, outer) of kd_kernels.algebra.to_log2."""
        if self.cap is None:
            return 0.0, self.scale * LOG2E / temperature
        return self.scale / self.cap, self.cap * LOG2E / temperature


@dataclasses.dataclass(frozen=True)
class RowLoss:
    """What a row's loss is: kd * D(teacher, student at T) + ce * cross-entropy at T = 1."""

    divergence: str  # a branch of kd_kernels.algebra.terms, or "none"
    vocab: int
    alpha: float = 0.0
    beta: float = 0.0
    head_mass: float = 0.5
    temperature: float = 1.0
    kd: float = 1.0
    ce: float = 0.0
    min_logprob: float | None = None  # nats

    @property
    def wide(self) -> bool:
        """Whether p and q are so close that their terms are taken in float64."""
        return self.temperature >= WIDE_TEMPERATURE


@dataclasses.dataclass(frozen=True)
class Target:
    """What kernels are compiled for: "cuda" with its compute capability, "hip", "interpreter"."""

    kind: str
    arch: int = 0


_pretended: list[Target] = []


@contextlib.contextmanager
def compiling_for(target: Target) -> Iterator[None]:
    """Launchers choose as they would on ``target``: to compile kernels where it is not at hand."""
    _pretended.append(target)
    try:
        yield
    finally:
        _pretended.pop()


def target_of(device: torch.device) -> Target:
    """The target of kernels on a device."""
    if _pretended:
        return _pretended[-1]
    if interpreting():
        return Target("interpreter")
    return _detect(device.index if device.index is not None else torch.cuda.current_device())


@functools.cache
def _detect(index: int) -> Target:
    if torch.version.hip is not None:
        return Target("hip")
    major, minor = torch.cuda.get_device_capability(index)
    return Target("cuda", 10 * major + minor)


def interpreting() -> bool:
    """Whether Triton kernels run in its interpreter, on CPU tensors."""
    return INTERPRETING


def row_limit(tensor: Tensor, vocab: int) -> int:
    """Where reading a row of vocab tokens ends: its last whole vector, if the row holds that.

    A multiple of 16 keeps 128-bit loads whole where rows are aligned; the columns past vocab are
    read and not used.
    """
    rounded = -(-vocab // 16) * 16
    aligned = tensor.stride(0) % 16 == 0 and tensor.shape[1] >= rounded
    return rounded if aligned else vocab
