"""What launchers of row kernels share: how logits are given, and which schedule reads them.

S1, one read: the row in the registers of a thread-block cluster. sm_90 and later, Triton 3.8, rows
of whole 16-byte vectors, to 163,840 columns of a row pair and 262,144 of one row.
S2, two passes: everything else.

A third, rows split over blocks whose second phase finds them in the cache behind tickets, is not
here. What it could save: an H100 holds 2 to 4 rows of S2 a multiprocessor, 276 to 550 MB in flight
at 262,144 columns in bf16 on two sides, against 50 MB of L2, so that S2's second pass finds 9 to
18 % of a row there; it would keep 13 MB in flight and find it all, 6 bytes an element for 9.3 to
9.6. What it costs: blocks of one launch that wait for each other on a counter at every 32 kB, which
no count of instructions weighs and which the interpreter, running blocks in order, cannot fault.
Only Gemma's vocabulary with two dense sides, and GPUs before sm_90, would take it.
"""

from __future__ import annotations

import contextlib
import dataclasses
import functools
import logging
import math
from collections.abc import Iterator

import torch
import triton
from torch import Tensor

LOG2E = 1.4426950408889634
INTERPRETING = bool(triton.knobs.runtime.interpret)  # as kernels are decorated, so it stays
WIDE_TEMPERATURE = 16.0
"""From here on a divergence is below 1e-2 nats and float32 loses its digits; taken in float64,
which a card for graphics runs at a sixty-fourth."""
DTYPES = (torch.bfloat16, torch.float16, torch.float32)


def check_logits(*given: Tensor | None) -> None:
    """Refuse logits that kernels cannot read.

    Raises:
        TypeError: another dtype than bfloat16, float16 or float32.
        ValueError: not [N, V] with columns side by side.
    """
    for logits in given:
        if logits is None:
            continue
        if logits.dtype not in DTYPES:
            raise TypeError(
                f"kd_kernels: logits must be bfloat16, float16 or float32, got {logits.dtype}. "
                "Cast them, or use backend='torch'."
            )
        if logits.ndim != 2 or (logits.shape[1] > 1 and logits.stride(1) != 1):
            raise ValueError(
                "kd_kernels: logits must be [N, V] with unit column stride, got shape "
                f"{tuple(logits.shape)}, strides {logits.stride()}. Call .contiguous()."
            )


def to_log2(scale: float, cap: float | None, temperature: float) -> tuple[float, float]:
    """(inner, outer) of kd_kernels.algebra.to_log2, for final logits cap * tanh(scale * raw / cap)
    (scale * raw where there is no cap) divided by the temperature."""
    if cap is None:
        return 0.0, scale * LOG2E / temperature
    return scale / cap, cap * LOG2E / temperature


def log2_bound(min_logprob: float | None) -> float:
    """A lower bound in nats, in log2 units; -inf for none."""
    return -math.inf if min_logprob is None else min_logprob * LOG2E


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


log = logging.getLogger("kd_kernels")

CLUSTER_VERSION = (3, 8)
"""Triton 3.7 and earlier fail to compile reductions across a cluster (its PlanCTA pass)."""

CLUSTER_ARCHES = (90, 100, 103)
COLUMNS = 8192
"""Columns of one thread block: 8 warps of 32 threads with 32 columns each."""


@dataclasses.dataclass(frozen=True)
class OneRead:
    """A row in the registers of a cluster: thread blocks, warps in each, segments of columns."""

    blocks: int
    warps: int
    first: int
    second: int = 0


forced_shapes: list[OneRead | None] = []  # tests: a schedule in place of the choice


def one_read_shape(
    student: Tensor,
    teacher: Tensor | None,
    gradient: Tensor | None,
    vocab: int,
    target: Target,
    *,
    crowded: bool = False,
) -> OneRead | None:
    """The cluster for a row of ``vocab`` columns, or None where two passes must do.

    teacher: None where the row is the student's alone, which takes half the registers.
    crowded: the row needs more registers than a second segment leaves (hard labels at another
    temperature, with adaptive_kl or float32 logits).
    """
    if forced_shapes:
        return forced_shapes[-1]
    if target.kind != "cuda" or target.arch not in CLUSTER_ARCHES:
        return None
    version = tuple(int(part) for part in triton.__version__.split(".")[:2])
    if version < CLUSTER_VERSION:
        _say_once(f"triton {triton.__version__} has no cluster reductions (3.8 has): two passes")
        return None
    if not all(_whole_vectors(t) for t in (student, teacher, gradient) if t is not None):
        _say_once("rows are not aligned to 16 bytes: two passes")
        return None
    shape = single_shape(vocab) if teacher is None else cluster_shape(vocab)
    return None if shape is not None and shape.second and crowded else shape


def cluster_shape(vocab: int) -> OneRead | None:
    """The smallest cluster whose threads hold 32 (40 with a second segment) columns each.

    32 columns of student and teacher in float32 are 64 registers of a thread; past 163,840 columns
    (Gemma's 262,144) a cluster of 16 blocks, the largest there is, would spill.
    """
    if vocab <= 131_072:
        first = max(COLUMNS, triton.next_power_of_2(vocab))
        return OneRead(first // COLUMNS, 8, first)
    return OneRead(16, 8, 131_072, 32_768) if vocab <= 163_840 else None


def single_shape(vocab: int) -> OneRead | None:
    """The same for one row: 64 columns a thread, 80 with a second segment."""
    if vocab <= 131_072:
        first = max(COLUMNS, triton.next_power_of_2(vocab))
        return OneRead(max(1, first // (2 * COLUMNS)), 8, first)
    if vocab <= 163_840:
        return OneRead(8, 8, 131_072, 32_768)
    return OneRead(16, 8, 262_144) if vocab <= 262_144 else None


def _whole_vectors(tensor: Tensor) -> bool:
    """Whether every row starts on 16 bytes and holds whole 16-byte vectors."""
    size = tensor.dtype.itemsize
    start = tensor.storage_offset() * size if tensor.is_meta else tensor.data_ptr()
    return start % 16 == 0 and tensor.stride(0) % 16 == 0 and tensor.shape[1] * size % 16 == 0


@functools.cache
def _say_once(message: str) -> None:
    log.debug(message)


def zero_padding(gradient: Tensor, vocab: int, block: int) -> int:
    """Zero the columns past the last block; returns where the kernel's own writing ends."""
    covered = min(-(-vocab // block) * block, gradient.shape[1])
    gradient[:, covered:] = 0
    return covered


def two_pass_shape(student: Tensor, teacher: Tensor, target: Target) -> tuple[int, int, int]:
    """(block, columns a lane holds, warps)."""
    group = 16 // max(student.dtype.itemsize, teacher.dtype.itemsize)
    block = 64 if target.kind == "interpreter" else 4096
    return block, group, max(1, min(8, block // (32 * group)))
