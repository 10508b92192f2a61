"""The torch backend: loss and gradient of a tile's rows, in blocks that stay in the cache.

A block is [R, V] student logits in the compute dtype. Each function returns the rows' losses [R]
and leaves in the block the gradient of the logits, scaled by the rows' weights.

On a CPU a thread takes whole blocks until none is left, with OpenMP off inside it: PyTorch splits
every operation over OpenMP's threads and waits for the last of them, and a loss is hundreds of such
waits, each a time slice of the scheduler's where another process holds a core. OpenMP's number of
threads belongs to the thread that sets it. It is set through OpenMP itself:
``torch.set_num_threads`` also changes what threads started later, anyone's, begin with.
"""

from __future__ import annotations

import ctypes
import functools
import math
import threading
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.utils import _python_dispatch as dispatch  # noqa: PLC2701  no public name tells

from kd.losses.divergences import bounded_terms, head_mask
from kd.losses.problem import NO_TRANSFORM, Backend, Objective, SparseRows, Tile, Transform
from kd.losses.sparse import densify, outcome_terms

WIDE_TEMPERATURE = 16.0
"""From here on, with every probability near 1 / V, dense divergences are taken in float64."""

BLOCK_ELEMENTS = 1 << 19
"""Elements of one row block per thread: student and teacher rows stay in the cache."""

Work = Callable[[int, int], None]
"""Computes rows first..last."""


# --- a tile, block by block ----------------------------------------------------------------------


def rows(tile: Tile) -> Tensor:
    """Losses [R] of a tile; the gradient of its raw logits goes into ``tile.gradient``."""
    student, gradient, vocab = tile.student, tile.gradient, tile.columns
    dtype = torch.float64 if student.dtype == torch.float64 else torch.float32
    counted, count = None, len(student)  # rows whose weight is not zero, where some are
    if tile.weight is not None and int(tile.weight.count_nonzero()) != count:
        counts = tile.weight != 0
        counted = counts.nonzero().squeeze(1)
        count = len(counted)
        if gradient is not None:
            gradient[~counts] = 0
    if gradient is not None and gradient.shape[1] != vocab:
        gradient[:, vocab:] = 0
    live = None if gradient is None else _columns(gradient, vocab)
    # Where the gradient's rows can hold the arithmetic, no other memory is touched.
    direct = live is not None and counted is None and live.dtype == dtype and live.is_contiguous()
    in_place = counted is None and _is_forward_kl_alone(tile, dtype)
    step = min(count, block_rows(vocab, student.device))
    parts: dict[int, Tensor] = {}  # losses by first row

    def begin() -> Work:
        memory: dict[str, Tensor] = {}  # this thread's blocks

        def block(side: str, size: int) -> Tensor:
            if side not in memory:
                memory[side] = student.new_empty((step, vocab), dtype=dtype)
            return memory[side] if size == step else memory[side][:size]

        def work(first: int, last: int) -> None:
            index: Any = slice(first, last) if counted is None else counted[first:last]
            whole, size = last - first == len(student), last - first

            def rows_of(given: Any) -> Any:
                return given if given is None or whole else given[index]

            raw = _columns(rows_of(student), vocab)
            z = rows_of(live) if direct else block("student", size)
            weight = None if gradient is None else rows_of(tile.weight)
            teacher = rows_of(tile.teacher)
            if isinstance(teacher, Tensor):
                teacher = _columns(teacher, vocab)
            if in_place:  # read where it lies: a copy of each side less
                loss = dense_forward_kl(raw, teacher, z, block("teacher", size))
                scale_(loss, tile.objective.kd_weight)
                if gradient is not None:
                    scale_(z, _column(weight, tile.objective.kd_weight))
            else:
                if isinstance(teacher, Tensor) and not (tile.scratch and teacher.dtype == dtype):
                    teacher = block("teacher", size).copy_(teacher)
                if z.data_ptr() != raw.data_ptr():
                    z.copy_(raw)
                loss = block_loss_(z, teacher, rows_of(tile.labels), weight, tile)
            parts[first] = loss
            if live is not None and not direct:
                live[index] = z.to(live.dtype)

        return work

    spread(count, step, begin, student.device)
    if len(parts) == 1:
        losses = parts[0]
    else:
        losses = torch.cat([student.new_zeros(0, dtype=dtype), *(parts[i] for i in sorted(parts))])
    if counted is None:
        return losses
    return losses.new_zeros(len(student)).index_copy_(0, counted, losses)


def _columns(logits: Tensor, vocab: int) -> Tensor:
    return logits if logits.shape[1] == vocab else logits[:, :vocab]


BACKEND = Backend(rows)


def block_rows(vocab: int, device: torch.device) -> int:
    """Rows of a block: of one thread's, or of what all of PyTorch's threads share."""
    sharing = 1
    if device.type != "cpu":
        sharing = 64
    elif threads(device) == 1:
        sharing = torch.get_num_threads()
    return max(1, BLOCK_ELEMENTS * sharing // max(1, vocab))


def _column(weight: Tensor | None, factor: float) -> Tensor | float:
    """Rows' weights times a number, to multiply a block with."""
    if weight is None:
        return factor
    return (weight if factor == 1 else weight * factor).unsqueeze(1)


def _is_forward_kl_alone(tile: Tile, dtype: torch.dtype) -> bool:
    """Whether a CPU's rows have forward KL at temperature 1 and no other term, in one dtype."""
    aim, teacher = tile.objective, tile.teacher
    return (
        isinstance(teacher, Tensor)
        and teacher.device.type == "cpu"
        and tile.student.dtype == teacher.dtype == dtype
        and tile.labels is None
        and aim.divergence.name == "forward_kl"
        and (aim.temperature, aim.min_logprob) == (1, None)
        and tile.student_transform == tile.teacher_transform == NO_TRANSFORM
    )


# --- the arithmetic of a block -------------------------------------------------------------------


def block_loss_(
    z: Tensor,
    teacher: Tensor | SparseRows | None,
    labels: Tensor | None,
    weight: Tensor | None,
    tile: Tile,
) -> Tensor:
    """Row losses [R]; z [R, V] raw logits become weight * d loss / d raw logits.

    teacher: [R, V] raw logits (scratch), sparse rows, or None for cross-entropy alone. weight [R]
    (None is one) is applied to the gradient and not to the losses.
    """
    slope = None
    if tile.student_transform != NO_TRANSFORM:
        slope = finish_(z, tile.student_transform)
    if isinstance(teacher, Tensor) and tile.teacher_transform != NO_TRANSFORM:
        finish_(teacher, tile.teacher_transform)
    column = 1.0 if weight is None else weight.unsqueeze(1)
    loss = final_loss_(z, teacher, labels, column, tile.objective)
    if slope is not None:
        z.mul_(slope)
    if tile.student_transform[0] is not None:
        z.mul_(tile.student_transform[0])
    return loss


def finish_(z: Tensor, transform: Transform) -> Tensor | None:
    """Raw logits become final ones; returns the cap's slope, where there is a cap."""
    scale, cap = transform
    if scale is not None:
        z.mul_(scale)
    if cap is None:
        return None
    z.div_(cap).tanh_()
    slope = 1 - z.square()
    z.mul_(cap)
    return slope


def final_loss_(
    z: Tensor,
    teacher: Tensor | SparseRows | None,
    labels: Tensor | None,
    weight: Tensor | float,
    aim: Objective,
) -> Tensor:
    """The same of final logits; weight is a number or [R, 1]."""
    if teacher is None:
        if labels is None:
            z.zero_()
            return z.new_zeros(len(z))
        return aim.ce_weight * cross_entropy_(z, labels, aim.ce_weight * weight)
    temperature = aim.temperature
    sparse = isinstance(teacher, SparseRows) and teacher.tail != "uniform"
    if sparse and temperature == 1:  # one softmax for both parts
        return sparse_loss_(z, teacher, labels, weight, aim)  # type: ignore[arg-type]
    hard = z.clone() if labels is not None else None
    scale_(z, 1 / temperature)
    if sparse:
        loss = sparse_loss_(z, teacher, None, weight / temperature, aim)  # type: ignore[arg-type]
    else:
        if isinstance(teacher, SparseRows):
            teacher = densify(teacher, aim.vocab_size, 0, aim.vocab_size)
        else:
            scale_(teacher, 1 / temperature)
        loss = aim.kd_weight * dense_divergence_(z, teacher, aim)
        scale_(z, weight * (aim.kd_weight / temperature))
    if labels is None or hard is None:
        return loss
    loss = loss + aim.ce_weight * cross_entropy_(hard, labels, aim.ce_weight * weight)
    z.add_(hard)
    return loss


def softmax_and_log_sum_(logits: Tensor) -> tuple[Tensor, Tensor]:
    """Overwrite rows with their softmax; returns their peak and log(sum(exp(z - peak))), [R, 1].

    Kept apart because their sum, the log-sum-exp, is rounded to the logits' size.
    """
    peak = logits.amax(-1, keepdim=True)
    torch.softmax(logits, -1, out=logits)
    return peak, -logits.amax(-1, keepdim=True).log()


def dense_forward_kl(student: Tensor, teacher: Tensor, gradient: Tensor, spare: Tensor) -> Tensor:
    """Forward KL's row losses; gradient becomes q - p, spare is scratch.

    All [R, V]; gradient may be the student and spare the teacher. The value is sum p * (t - s - c)
    + log(Z_s / Z_t), c the difference of the peaks and Z each row's normaliser relative to its
    peak: nothing is rounded to the size of the logits.
    """
    offset = teacher.amax(-1, keepdim=True) - student.amax(-1, keepdim=True)
    p = torch.softmax(teacher, -1)
    apart = torch.sub(teacher, student, out=spare)
    if float(offset.abs().amax()) > 1:  # sum(p) is 1 to 1e-7 only, which would multiply it
        apart.sub_(offset)
        offset = torch.zeros_like(offset)
    gap = apart.mul_(p).sum(-1)
    q = torch.softmax(student, -1, out=gradient)
    q_peak, p_peak = q.amax(-1, keepdim=True), p.amax(-1, keepdim=True)
    normalisers = torch.log(p_peak / q_peak) - offset
    gradient.sub_(p)
    if not math.isfinite(float(gap.sum())):  # -inf logits: 0 * inf above
        gap = apart.masked_fill_(p == 0, 0.0).sum(-1)
    return gap + normalisers.view(-1)


def dense_divergence_(student: Tensor, teacher: Tensor, aim: Objective) -> Tensor:
    """Row losses of any divergence; student becomes dD/dz, teacher is scratch.

    Both are [R, V] logits already divided by the temperature. Of a high one p and q are so close
    that a term is a difference of two in float32's last digits: taken in float64.
    """
    d = aim.divergence
    if aim.temperature >= WIDE_TEMPERATURE and student.dtype != torch.float64:
        wide = student.double()
        loss = dense_divergence_(wide, teacher.double(), aim)
        student.copy_(wide)
        return loss.to(student.dtype)
    if d.name == "forward_kl" and aim.min_logprob is None:
        return dense_forward_kl(student, teacher, student, teacher)
    ties = d.name == "total_variation"  # decided by a softmax, which is closer than its logarithm
    if ties:
        q, p = torch.softmax(student, -1), torch.softmax(teacher, -1)
    log_q = torch.log_softmax(student, -1, out=student)
    log_p = torch.log_softmax(teacher, -1, out=teacher)
    if not ties:
        q, p = log_q.exp(), log_p.exp()
    head = head_mask(p, d.head_mass) if d.needs_head else None
    phi, h = bounded_terms(d, p, q, log_p, log_q, aim.min_logprob, head)
    torch.addcmul(h, q, h.sum(-1, keepdim=True), value=-1, out=student)
    return phi.sum(-1)


def sparse_loss_(
    z: Tensor,
    sparse: SparseRows,
    labels: Tensor | None,
    weight: Tensor | float,
    aim: Objective,
) -> Tensor:
    """Row losses against K stored tokens and a tail; z [R, V], logits / T, becomes the gradient.

    The K+1 outcomes have logits z~ = (z at ids, log-sum-exp of the others), so that every
    divergence is the dense one on [R, K+1], and a gradient on the tail's logit reaches token j of
    the tail times softmax_j over the tail. Exact where the student saturates: nothing is 1 - sum.
    labels: cross-entropy at the same temperature, on the same outcomes.
    """
    target = z.gather(1, labels.unsqueeze(1)) if labels is not None else None
    top = z.gather(1, sparse.ids.clamp(min=0)).masked_fill_(sparse.ids < 0, -torch.inf)  # [R, K]
    hide_at_ids_(z, sparse.ids)
    tail_peak, tail_log_sum = softmax_and_log_sum_(z)  # z is the tail's softmax from here on
    no_tail = tail_peak == -torch.inf
    if bool(no_tail.any()):
        z.masked_fill_(no_tail, 0.0)
        tail_log_sum = tail_log_sum.masked_fill(no_tail, 0.0)
    # Relative to the row's largest logit: differences of logits are all but exact, while a
    # log-sum-exp of the logits' own size is rounded to it.
    peak = torch.maximum(top.amax(-1, keepdim=True), tail_peak)
    peak = peak.clamp(min=torch.finfo(peak.dtype).min)
    outcomes = torch.cat([top - peak, (tail_peak - peak) + tail_log_sum], -1)
    log_q = torch.log_softmax(outcomes.double(), -1)  # K + 1 numbers: free
    value, g = outcome_terms(sparse, log_q, aim)
    loss, g = aim.kd_weight * value.to(z.dtype), aim.kd_weight * g.to(z.dtype)
    if target is not None:
        lse = peak + torch.logsumexp(outcomes, -1, keepdim=True)
        loss = loss + aim.ce_weight * (lse - target).view(-1)
        g = g + aim.ce_weight * log_q.to(z.dtype).exp()
    g = g * weight
    z.mul_(g[:, -1:])
    add_at_ids_(z, sparse.ids, g[:, :-1])
    if labels is not None:
        add_at_labels_(z, labels, -aim.ce_weight * weight)
    return loss


def cross_entropy_(logits: Tensor, labels: Tensor, weight: Tensor | float) -> Tensor:
    """Negative log-likelihoods [R]; the logits become their gradient times ``weight``."""
    target = logits.gather(1, labels.unsqueeze(1))
    peak, log_sum = softmax_and_log_sum_(logits)
    scale_(logits, weight)
    add_at_labels_(logits, labels, -weight)
    return (peak - target + log_sum).view(-1)


def hide_at_ids_(logits: Tensor, ids: Tensor) -> None:
    """logits[r, ids[r]] = -inf in place, skipping empty slots."""
    keep = ids >= 0
    if bool(keep.all()):
        logits.scatter_(1, ids, -torch.inf)
    else:
        row, slot = keep.nonzero(as_tuple=True)
        logits[row, ids[row, slot]] = -torch.inf


def add_at_labels_(block: Tensor, labels: Tensor, values: Tensor | float) -> None:
    """block[r, labels[r]] += values, a number or [R, 1], in place."""
    index = labels.unsqueeze(1)
    if not isinstance(values, Tensor):
        values = block.new_full(index.shape, values)
    block.scatter_add_(1, index, values)


def add_at_ids_(block: Tensor, ids: Tensor, values: Tensor) -> None:
    """block[r, ids[r, k]] += values[r, k] in place, skipping empty slots."""
    block.scatter_add_(1, ids.clamp(min=0), values.masked_fill(ids < 0, 0.0))


def scale_(block: Tensor, factor: Tensor | float) -> None:
    """block *= factor, a number or [R, 1], in place; one pass less where it is one."""
    if isinstance(factor, Tensor) or factor != 1:
        block.mul_(factor)


# --- blocks of rows on threads of their own -------------------------------------------------------


@functools.cache
def _openmp() -> Any:
    """The process's OpenMP library, or None where it is not to be found."""
    try:
        library = ctypes.CDLL(None)
        library.omp_set_num_threads.restype = None
    except (AttributeError, OSError, TypeError):
        return None
    return library


def _alone() -> bool:
    """Switch OpenMP off in this thread; whether PyTorch takes it for switched off."""
    torch.get_num_threads()  # PyTorch's own first look, which would set it again
    _openmp().omp_set_num_threads(1)
    return torch.get_num_threads() == 1


def threads(device: torch.device) -> int:
    """Threads that blocks of rows may be spread over; 1 where PyTorch's own are to be used."""
    if (
        device.type != "cpu"
        or torch.compiler.is_compiling()
        or dispatch._get_current_dispatch_mode_stack()
    ):
        return 1
    return torch.get_num_threads() if _openmp() is not None else 1


def spread(count: int, step: int, begin: Callable[[], Work], device: torch.device) -> None:
    """Rows 0..count in blocks of ``step`` rows, each given to one of the threads.

    begin: called once in every thread; what it returns computes blocks and may keep memory that
    is the thread's own. This thread works too and is left as it was. The first error is raised.
    """
    starts = range(0, count, max(1, step))
    several = min(threads(device), len(starts)) if len(starts) > 1 else 1
    if several < 2:
        work = begin()
        for first in starts:
            work(first, min(first + step, count))
        return
    waiting = iter(starts)
    lock, errors = threading.Lock(), []  # type: ignore[var-annotated]
    inference = torch.is_inference_mode_enabled()

    def blocks() -> None:
        work = begin()
        while not errors:
            with lock:
                first = next(waiting, None)
            if first is None:
                return
            work(first, min(first + step, count))

    def helper() -> None:
        try:
            with torch.inference_mode(inference), torch.no_grad():
                if _alone():
                    blocks()
        except BaseException as error:
            errors.append(error)

    helpers = [threading.Thread(target=helper, daemon=True) for _ in range(several - 1)]
    before, started = torch.get_num_threads(), []
    try:
        for thread in helpers if _alone() else ():
            try:
                thread.start()
            except RuntimeError:  # no more threads: those that there are do the work
                break
            started.append(thread)
        blocks()
    except BaseException as error:
        errors.insert(0, error)
    finally:
        _openmp().omp_set_num_threads(before)
        for thread in started:
            thread.join()
    if errors:
        raise errors[0]
