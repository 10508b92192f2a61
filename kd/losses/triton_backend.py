"""The Triton backend: fused row kernels on a GPU, with the torch backend's interface.

A tile of student logits, the caller's own or one chunk of a projection, goes through one kernel
that gives row losses and, in the same launch, the gradient of the raw logits. Masked rows of logits
are skipped inside the kernel; those of a projection are packed out before the first matmul, which
takes the backend's one host sync. Under TRITON_INTERPRET=1 it runs on CPU tensors, for the tests.
"""

from __future__ import annotations

import dataclasses
import functools
from typing import Any

import torch
from torch import Tensor

from kd.losses.divergences import Divergence, head_mask
from kd.losses.inputs import Hidden, TopK
from kd.losses.rows import Objective, SparseRows, canonical_sparse, densify
from kd.losses.torch_backend import (
    Gradients,
    Needs,
    Problem,
    Projection,
    _scatter_rows,
    _take,
    room,
)


def chosen(where: str, backend: str, like: Tensor) -> bool:
    """Whether the Triton backend computes this loss.

    Raises:
        RuntimeError: it was asked for by name and cannot run here.
    """
    if backend not in ("triton", "auto"):
        return False
    reason = _unavailable(like)
    if reason is not None and backend == "triton":
        raise RuntimeError(f"{where}: backend='triton' must be able to run here, got {reason}")
    return reason is None and (backend == "triton" or like.is_cuda)


def _unavailable(like: Tensor) -> str | None:
    if like.dtype not in (torch.bfloat16, torch.float16, torch.float32):
        return f"a {like.dtype} student. Cast it, or use backend='torch'."
    if not _triton_imports():
        return "no triton. pip install 'kd-llm[gpu]', or use backend='torch'."
    from kd_kernels.rows import interpreting

    if not like.is_cuda and not interpreting():
        return f"a tensor on {like.device}. Move it to a GPU, or use backend='torch'."
    return None


def _triton_imports() -> bool:
    return torch.compiler.is_compiling() or _import_triton()


@functools.cache
def _import_triton() -> bool:
    try:
        import triton  # noqa: F401
    except ImportError:
        return False
    return True


def counted(problem: Problem, weight: Tensor) -> Problem:
    """The problem with the rows of a projection that count, which are packed for its matmuls.

    A graph has no number of rows to pack: there, masked rows go through the matmuls as zeros.
    """
    if not isinstance(problem.student, Projection) or torch.compiler.is_compiling():
        return problem
    rows = weight.nonzero().squeeze(1)  # waits for the device: the number of rows that count
    return dataclasses.replace(problem, rows=None if len(rows) == len(weight) else rows)


def run(problem: Problem, weight: Tensor, needs: Needs | None) -> tuple[Tensor, Gradients]:
    """As ``torch_backend.run``; rows of weight zero do not count."""
    from kd_kernels.linear import chunk_tokens

    if isinstance(problem.student, Projection):
        return _run_projection(problem, problem.student, weight, needs)
    logits = problem.student
    gradient = None
    if needs is not None:
        gradient = logits if problem.overwrite else torch.empty_like(logits)
    losses = torch.zeros(len(logits), dtype=torch.float32, device=logits.device)
    step = len(logits)
    if isinstance(problem.teacher, Hidden) or _is_uniform(problem.teacher):
        step = chunk_tokens(len(logits), problem.objective.vocab_size * 4, logits.device)
    for start in range(0, len(logits), max(1, step)):
        block = slice(start, start + step)
        losses[block] = _tile_losses(
            problem,
            _rowwise(logits[block]),
            (1.0, None),
            block,
            weight[block],
            None if gradient is None else gradient[block],
        )
    return losses, Gradients(logits=gradient)


def _rowwise(logits: Tensor) -> Tensor:
    """Logits whose rows a kernel can walk: unit stride between columns."""
    return logits if logits.shape[-1] < 2 or logits.stride(-1) == 1 else logits.contiguous()


def _is_uniform(teacher: Any) -> bool:
    return isinstance(teacher, TopK) and teacher.tail == "uniform"


def kernel_divergence(divergence: Divergence) -> str:
    """The name of a divergence's branch in ``kd_kernels.algebra.terms``."""
    name, alpha, beta = divergence.name, divergence.alpha, divergence.beta
    if name == "skew_forward_kl" and alpha == 0:
        return "forward_kl"
    if name == "skew_reverse_kl" and alpha == 0:
        return "reverse_kl"
    if name == "skew_reverse_kl" and divergence.detach_mixture:
        return "skew_reverse_kl_detached"
    if name == "alpha_beta" and beta == 0:
        return "alpha_beta_forward"
    if name == "alpha_beta" and alpha == 0:
        return "alpha_beta_reverse"
    return name


def _row_loss(objective: Objective) -> Any:
    from kd_kernels.rows import RowLoss

    return RowLoss(
        divergence=kernel_divergence(objective.divergence),
        vocab=objective.vocab_size,
        alpha=objective.divergence.alpha,
        beta=objective.divergence.beta,
        head_mass=objective.divergence.head_mass,
        temperature=objective.temperature,
        kd=objective.kd_weight,
        ce=objective.ce_weight,
        min_logprob=objective.min_logprob,
    )


def _tile_losses(
    problem: Problem,
    student: Tensor,
    transform: tuple[float | None, float | None],
    rows: Any,
    weight: Tensor,
    gradient: Tensor | None,
) -> Tensor:
    """Losses of a tile of raw student logits [R, width]; rows index the teacher and the labels.

    transform: (logit scale, soft cap) of the student.
    """
    from kd_kernels.operators import dense_rows
    from kd_kernels.rows import Logits

    objective, labels = problem.objective, problem.labels
    soft = problem.teacher if objective.kd_weight != 0 else None
    scale, cap = transform
    z = Logits(student, 1.0 if scale is None else scale, cap)
    if labels is not None and objective.ce_weight != 0:
        labels = labels[rows].long()  # rows of weight 0 may hold ignore_index: never read
    else:
        labels = None
    row_loss = _row_loss(objective)
    teacher = None
    if isinstance(soft, Hidden):
        hidden = soft.hidden[rows]
        teacher = Logits(_project_teacher(soft, hidden, objective.vocab_size), *_transform(soft))
    elif isinstance(soft, TopK):
        sparse = canonical_sparse(soft, rows, objective, torch.float32)
        if soft.tail != "uniform":
            return _sparse_tile(z, sparse, objective, row_loss, weight, labels, gradient)
        dense = densify(sparse, objective.vocab_size)
        teacher = Logits(dense, objective.temperature)  # already at the temperature
    elif soft is not None:
        teacher = Logits(_rowwise(soft[rows]))
    return dense_rows(
        student,
        None if teacher is None else teacher.tensor,
        weight.float(),
        labels,
        gradient,
        **dataclasses.asdict(row_loss),
        student_scale=z.scale,
        student_cap=z.cap,
        teacher_scale=1.0 if teacher is None else teacher.scale,
        teacher_cap=None if teacher is None else teacher.cap,
    )


def _sparse_tile(
    student: Any,
    sparse: SparseRows,
    objective: Objective,
    row_loss: Any,
    weight: Tensor,
    labels: Tensor | None,
    gradient: Tensor | None,
) -> Tensor:
    """Losses of a tile against K stored tokens and a tail."""
    from kd_kernels.operators import sparse_rows

    heads, log_tail = None, sparse.log_tail
    if sparse.tail == "drop":
        row_loss = dataclasses.replace(row_loss, divergence="forward_kl_raw")
        log_tail = torch.full_like(log_tail, -torch.inf)
    if objective.divergence.name == "adaptive_kl":
        log_p = torch.cat([sparse.log_p, log_tail], -1)
        mask = head_mask(log_p.exp(), objective.divergence.head_mass)
        heads = log_p.masked_fill(mask == 0, torch.inf).amin(-1)
    options = dataclasses.asdict(row_loss)
    options.pop("head_mass")  # what it decides is in heads
    return sparse_rows(
        student.tensor,
        sparse.ids,
        sparse.log_p,
        log_tail,
        weight.float(),
        heads,
        labels,
        gradient,
        **options,
        student_scale=student.scale,
        student_cap=student.cap,
    )


def _transform(source: Hidden | Projection) -> tuple[float, float | None]:
    return (1.0 if source.logit_scale is None else source.logit_scale), source.softcap


def _project_teacher(teacher: Hidden, hidden: Tensor, vocab: int) -> Tensor:
    """Raw teacher logits [R, vocab]; the kernel applies scale and cap."""
    from kd_kernels.linear import project

    pairs = [(hidden, teacher.weight)]
    if teacher.lora is not None:
        a, b, scaling = teacher.lora
        pairs.append((scaling * (hidden @ a.T), b))
    return project(tuple(pairs), teacher.bias, vocab)


def _run_projection(
    problem: Problem,
    student: Projection,
    weight: Tensor,
    needs: Needs | None,
) -> tuple[Tensor, Gradients]:
    from kd_kernels.linear import chunk_tokens, project

    vocab, rows = problem.objective.vocab_size, problem.rows
    first = student.pairs[0][0]
    count = len(first) if rows is None else len(rows)
    losses = torch.zeros(count, dtype=torch.float32, device=first.device)
    size = chunk_tokens(count, vocab * 10, first.device)
    wide = size < count or first.dtype == torch.float16
    grads = room(student, rows, needs, torch.float32 if wide else first.dtype)
    for start in range(0, count, size):
        stop = min(start + size, count)
        index = slice(start, stop) if rows is None else rows[start:stop]
        inputs = [_take(x, rows, start, stop) for x, _ in student.pairs]
        pairs = tuple((x, w) for x, (_, w) in zip(inputs, student.pairs, strict=True))
        logits = project(pairs, student.bias, vocab)
        dlogits = None
        if needs is not None:
            narrow = logits.dtype != first.dtype
            dlogits = torch.empty_like(logits, dtype=first.dtype) if narrow else logits
        losses[start:stop] = _tile_losses(
            problem, logits, (student.logit_scale, student.softcap), index, weight[index], dlogits
        )
        if dlogits is not None:
            _accumulate(student, grads, inputs, dlogits, start, rows)
        del logits, dlogits
    return _scatter_rows(losses, rows, len(first)), grads


def _accumulate(
    student: Projection,
    grads: Gradients,
    inputs: list[Tensor],
    dlogits: Tensor,
    start: int,
    rows: Tensor | None,
) -> None:
    """dX, dW and db of one chunk from the weighted gradient of its raw logits [c, vocab]."""
    from kd_kernels.linear import add_product

    stop, vocab = start + len(dlogits), dlogits.shape[1]
    for x, (_, w), dx, dw in zip(inputs, student.pairs, grads.inputs, grads.weights, strict=True):
        if dx is not None and rows is None:
            torch.mm(dlogits, w[:vocab], out=dx[start:stop])
        elif dx is not None:
            dx.index_copy_(0, rows[start:stop], dlogits @ w[:vocab])  # type: ignore[index]
        if dw is not None:
            if start == 0:
                dw[vocab:] = 0
            add_product(dw[:vocab], dlogits.T, x, add=start > 0)
    if grads.bias is not None:
        grads.bias[:vocab] += dlogits.sum(0, dtype=grads.bias.dtype)
