"""The Triton backend: a tile's losses and the gradient of its raw logits from one kernel launch.

Masked rows of logits are skipped inside the kernel. Under TRITON_INTERPRET=1 it runs on CPU
tensors, for the tests. Nothing here waits for the device.
"""

from __future__ import annotations

import functools
import os
from typing import Any

import torch
from torch import Tensor

from kd.losses.divergences import head_mask
from kd.losses.problem import Backend, Objective, SparseRows, Tile, Transform
from kd.losses.sparse import densify


def available(where: str, like: Tensor, *, required: bool) -> bool:
    """Whether the Triton backend can compute this loss.

    Raises:
        RuntimeError: it was asked for by name and cannot run here.
    """
    reason = _unavailable(like)
    if reason is not None and required:
        raise RuntimeError(f"{where}: the Triton backend is unavailable: {reason}")
    return reason is None


def _unavailable(like: Tensor) -> str | None:
    if like.dtype not in (torch.bfloat16, torch.float16, torch.float32):
        return f"the student is {like.dtype}. Cast it, or use backend='torch'."
    on_cpu = f"the student is on {like.device}. Move it to a GPU, or use backend='torch'."
    if not like.is_cuda and not os.environ.get("TRITON_INTERPRET"):
        return on_cpu
    if not _triton_imports():
        return "triton is not installed. pip install 'kd-llm[gpu]', or use backend='torch'."
    from kd_kernels.launch import interpreting

    return None if like.is_cuda or interpreting() else on_cpu


def _triton_imports() -> bool:
    return torch.compiler.is_compiling() or _import_triton()


@functools.cache
def _import_triton() -> bool:
    try:
        import triton  # noqa: F401
    except ImportError:
        return False
    return True


def rows(tile: Tile) -> Tensor:
    """Losses [R] of a tile; the gradient of its raw logits goes into ``tile.gradient``."""
    from kd_kernels.dense import dense_rows
    from kd_kernels.sparse import sparse_rows

    aim, teacher = tile.objective, tile.teacher
    student = rowwise(tile.student)
    weight = tile.weight
    weight = student.new_ones(len(student)) if weight is None else weight
    numbers = kernel_numbers(aim)
    numbers["student_scale"], numbers["student_cap"] = final(tile.student_transform)
    labels, transform = tile.labels, tile.teacher_transform
    if isinstance(teacher, SparseRows) and teacher.tail == "uniform":
        teacher = densify(teacher, aim.vocab_size, 0, tile.columns)
        transform = (aim.temperature, None)  # they are at the temperature already
    if isinstance(teacher, SparseRows):
        heads, log_tail = None, teacher.log_tail
        if teacher.tail == "drop":
            numbers["divergence"] = "forward_kl_raw"
            log_tail = torch.full_like(log_tail, -torch.inf)
        if aim.divergence.needs_head:
            log_p = torch.cat([teacher.log_p, log_tail], -1)
            mask = head_mask(log_p.exp(), aim.divergence.head_mass)
            heads = log_p.masked_fill(mask == 0, torch.inf).amin(-1)
        return sparse_rows(
            student,
            teacher.ids,
            teacher.log_p,
            log_tail,
            weight.float(),
            heads,
            labels,
            tile.gradient,
            vocab=tile.columns,
            **numbers,
        )
    numbers["teacher_scale"], numbers["teacher_cap"] = final(transform)
    return dense_rows(
        student,
        None if teacher is None else rowwise(teacher),
        weight.float(),
        labels,
        tile.gradient,
        vocab=tile.columns,
        head_mass=aim.divergence.head_mass,
        **numbers,
    )


BACKEND = Backend(rows, wide=True, fused=True)


def rowwise(logits: Tensor) -> Tensor:
    """Logits whose rows a kernel can walk: unit stride between columns."""
    return logits if logits.shape[-1] < 2 or logits.stride(-1) == 1 else logits.contiguous()


def final(transform: Transform) -> tuple[float, float | None]:
    """Scale and cap as kernels take them."""
    scale, cap = transform
    return 1.0 if scale is None else scale, cap


def kernel_numbers(aim: Objective) -> dict[str, Any]:
    """What every launcher is told of a loss."""
    return dict(
        divergence=aim.divergence.kernel,
        temperature=aim.temperature,
        kd=aim.kd_weight,
        ce=aim.ce_weight,
        alpha=float(aim.divergence.alpha),
        beta=float(aim.divergence.beta),
        min_logprob=aim.min_logprob,
    )
