"""Loss and gradient of a block of rows, in place: the arithmetic of the torch backend.

A block is [R, V] compute-dtype student logits, small enough to stay in cache. Each function
returns the rows' losses [R] and leaves in the block the gradient with respect to the *raw* logits,
scaled by the row's coefficient. Nothing here knows where logits come from or where gradients go.
"""

from __future__ import annotations

import dataclasses

import torch
from torch import Tensor

from kd.losses.divergences import Divergence, bounded_terms, head_mask, raw_terms
from kd.losses.inputs import TopK, merge_duplicates
from kd.losses.tails import at_temperature, log_complement, log_partition

WIDE_TEMPERATURE = 16.0
"""From here on, with every probability near 1 / V, dense divergences are taken in float64."""


@dataclasses.dataclass(frozen=True)
class Objective:
    """What a row's loss is: kd_weight * divergence(T) + ce_weight * cross-entropy."""

    divergence: Divergence
    temperature: float
    kd_weight: float  # T**2 included where asked for
    ce_weight: float
    vocab_size: int
    min_logprob: float | None


@dataclasses.dataclass
class SparseRows:
    """A sparse teacher's rows, canonical: unique ids, at the loss temperature.

    ids [R, K] with -1 in empty slots; log_p [R, K]; log_tail [R, 1]; tail the mode.
    """

    ids: Tensor
    log_p: Tensor
    log_tail: Tensor
    tail: str

    def __getitem__(self, rows: slice) -> SparseRows:
        return SparseRows(self.ids[rows], self.log_p[rows], self.log_tail[rows], self.tail)


def canonical_sparse(
    teacher: TopK, rows: Tensor | slice, objective: Objective, dtype: torch.dtype
) -> SparseRows:
    """Merge duplicates, split off the tail and move to the loss temperature."""
    ids = teacher.ids[rows].long()
    stored = teacher.logprobs[rows]
    stored = stored if stored.dtype == torch.float64 else stored.float()
    ids, log_p = merge_duplicates(ids, stored)
    tail_tokens = objective.vocab_size - (ids >= 0).sum(-1, keepdim=True)
    log_tail = log_complement(log_p)
    if teacher.tail == "renormalize":
        norm = torch.logsumexp(log_p, -1, keepdim=True)
        # A row without an entry has nothing to rescale: all in the tail, it says nothing.
        log_tail = torch.where(norm == -torch.inf, 0.0, -torch.inf).to(log_tail.dtype)
        log_p = torch.where(norm == -torch.inf, log_p, log_p - norm)
    log_tail = log_tail.masked_fill(tail_tokens == 0, -torch.inf)
    ratio = teacher.temperature / objective.temperature
    known = log_partition(teacher, rows, objective.temperature)
    log_p, log_tail = at_temperature(
        log_p, log_tail, tail_tokens, ratio, known, teacher.tail_at_temperature
    )
    return SparseRows(ids, log_p.to(dtype), log_tail.to(dtype), teacher.tail)


def densify(sparse: SparseRows, vocab_size: int) -> Tensor:
    """Log-probs [R, V] of a sparse teacher whose tail is spread evenly over the other tokens."""
    count = (vocab_size - (sparse.ids >= 0).sum(-1, keepdim=True)).to(sparse.log_p.dtype)
    fill = sparse.log_tail - count.clamp(min=1).log()
    # One column past the end takes the empty slots.
    dense = fill.expand(-1, vocab_size + 1).clone()
    index = torch.where(sparse.ids < 0, vocab_size, sparse.ids)
    return dense.scatter_(1, index, sparse.log_p)[:, :vocab_size]


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
    if bool((offset.abs() > 1).any()):  # sum(p) is 1 to 1e-7 only, which would multiply it
        apart.sub_(offset)
        offset = torch.zeros_like(offset)
    gap = apart.mul_(p).sum(-1)
    q = torch.softmax(student, -1, out=gradient)
    q_peak, p_peak = q.amax(-1, keepdim=True), p.amax(-1, keepdim=True)
    normalisers = -offset - torch.log(q_peak / p_peak)
    gradient.sub_(p)
    if not bool(gap.isfinite().all()):  # -inf logits: 0 * inf above
        gap = apart.masked_fill_(p == 0, 0.0).sum(-1)
    return gap + normalisers.view(-1)


def dense_divergence_(student: Tensor, teacher: Tensor, objective: Objective) -> Tensor:
    """Row losses of any divergence; student becomes dD/dz, teacher is scratch.

    Both are [R, V] logits already divided by the temperature. Of a high one p and q are so close
    that a term is a difference of two in float32's last digits: taken in float64.
    """
    d = objective.divergence
    if objective.temperature >= WIDE_TEMPERATURE and student.dtype != torch.float64:
        wide = student.double()
        loss = dense_divergence_(wide, teacher.double(), objective)
        student.copy_(wide)
        return loss.to(student.dtype)
    if d.name == "forward_kl" and objective.min_logprob is None:
        return dense_forward_kl(student, teacher, student, teacher)
    ties = d.name == "total_variation"  # decided by a softmax, which is closer than its logarithm
    if ties:
        q, p = torch.softmax(student, -1), torch.softmax(teacher, -1)
    log_q = torch.log_softmax(student, -1, out=student)
    log_p = torch.log_softmax(teacher, -1, out=teacher)
    if not ties:
        q, p = log_q.exp(), log_p.exp()
    head = head_mask(p, d.head_mass) if d.name == "adaptive_kl" else None
    phi, h = bounded_terms(d, p, q, log_p, log_q, objective.min_logprob, head)
    torch.addcmul(h, q, h.sum(-1, keepdim=True), value=-1, out=student)
    return phi.sum(-1)


def sparse_divergence_(
    student: Tensor, sparse: SparseRows, objective: Objective
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Row losses against K stored tokens and a tail; student becomes the tail's softmax.

    The K+1 outcomes have logits z~ = (z at ids, log-sum-exp of the others), so that every
    divergence is the dense one on [R, K+1], and a gradient on the tail's logit reaches token j of
    the tail times softmax_j over the tail. Exact where the student saturates: nothing is 1 - sum.

    Returns (losses [R], d loss / d z~ [R, K+1], log q~ [R, K+1], log-sum-exp of the row [R, 1]).
    """
    empty = sparse.ids < 0
    index = sparse.ids.clamp(min=0)
    top = student.gather(1, index).masked_fill_(empty, -torch.inf)  # [R, K]
    hide_at_ids_(student, sparse.ids)
    tail_peak, tail_log_sum = softmax_and_log_sum_(student)
    no_tail = tail_peak == -torch.inf
    if bool(no_tail.any()):
        student.masked_fill_(no_tail, 0.0)
        tail_log_sum = tail_log_sum.masked_fill(no_tail, 0.0)
    # Relative to the row's largest logit: differences of logits are all but exact, while a
    # log-sum-exp of the logits' own size is rounded to it.
    peak = torch.maximum(top.amax(-1, keepdim=True), tail_peak)
    peak = peak.clamp(min=torch.finfo(peak.dtype).min)
    outcomes = torch.cat([top - peak, (tail_peak - peak) + tail_log_sum], -1)
    log_q = torch.log_softmax(outcomes.double(), -1)  # K + 1 numbers: free
    lse = peak + torch.logsumexp(outcomes, -1, keepdim=True)
    log_p = torch.cat([sparse.log_p, sparse.log_tail], -1).double()
    p, q = log_p.exp(), log_q.exp()
    if sparse.tail == "drop":
        p[:, -1] = 0
    phi, h = sparse_terms(sparse.tail, p, q, log_p, log_q, objective)
    g, dtype = h - q * h.sum(-1, keepdim=True), student.dtype
    return phi.sum(-1).to(dtype), g.to(dtype), log_q.to(dtype), lse


def sparse_terms(
    tail: str, p: Tensor, q: Tensor, log_p: Tensor, log_q: Tensor, objective: Objective
) -> tuple[Tensor, Tensor]:
    """phi and h of K + 1 outcomes; ``tail`` says whether p is a distribution or raw masses."""
    d = objective.divergence
    if tail == "drop":
        return raw_terms(p, log_p, log_q, objective.min_logprob)
    head = head_mask(p, d.head_mass) if d.name == "adaptive_kl" else None
    return bounded_terms(d, p, q, log_p, log_q, objective.min_logprob, head)


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


def cross_entropy_(logits: Tensor, labels: Tensor, weight: Tensor | float) -> Tensor:
    """Negative log-likelihoods [R]; the logits become their gradient times ``weight``."""
    target = logits.gather(1, labels.unsqueeze(1))
    peak, log_sum = softmax_and_log_sum_(logits)
    scale_(logits, weight)
    add_at_labels_(logits, labels, -weight)
    return (peak - target + log_sum).view(-1)


def sparse_rows_(
    student: Tensor,
    sparse: SparseRows,
    labels: Tensor | None,
    weight: Tensor | float,
    objective: Objective,
) -> Tensor:
    """Loss and gradient of rows with a sparse teacher, at one temperature for both parts.

    weight (a number or [R, 1]) multiplies the gradient alone. student: [R, V] logits / T becomes
    the gradient.
    """
    target = student.gather(1, labels.unsqueeze(1)) if labels is not None else None
    loss, g, log_q, lse = sparse_divergence_(student, sparse, objective)
    loss, g = objective.kd_weight * loss, objective.kd_weight * g
    if target is not None:  # cross-entropy's softmax, on the same K+1 outcomes
        loss = loss + objective.ce_weight * (lse - target).view(-1)
        g = g + objective.ce_weight * log_q.exp()
    g = g * weight
    student.mul_(g[:, -1:])
    add_at_ids_(student, sparse.ids, g[:, :-1])
    if labels is not None:
        add_at_labels_(student, labels, -objective.ce_weight * weight)
    return loss


def rows_loss_(
    student: Tensor,
    teacher: Tensor | SparseRows | None,
    labels: Tensor | None,
    weight: Tensor | None,
    objective: Objective,
    *,
    logit_scale: float | None = None,
    softcap: float | None = None,
) -> Tensor:
    """Row losses [R]; student [R, V] raw logits become weight * d loss / d raw logits.

    teacher: [R, V] final logits (scratch), sparse rows, or None for cross-entropy alone.
    labels [R] or None; weight [R] (None is one), applied to the gradient and not to the losses.
    """
    slope = None
    if logit_scale is not None:
        student.mul_(logit_scale)
    if softcap is not None:
        student.div_(softcap).tanh_()
        slope = 1 - student.square()
        student.mul_(softcap)
    hard = labels if labels is not None and objective.ce_weight != 0 else None
    soft = teacher if objective.kd_weight != 0 else None
    loss = _rows_final_(
        student, soft, hard, 1.0 if weight is None else weight.unsqueeze(1), objective
    )
    if slope is not None:
        student.mul_(slope)
    if logit_scale is not None:
        student.mul_(logit_scale)
    return loss


def _rows_final_(
    student: Tensor,
    teacher: Tensor | SparseRows | None,
    labels: Tensor | None,
    weight: Tensor | float,
    objective: Objective,
) -> Tensor:
    """rows_loss_ from final logits; weight a number or [R, 1]."""
    if teacher is None:
        if labels is None:
            student.zero_()
            return student.new_zeros(len(student))
        loss = cross_entropy_(student, labels, objective.ce_weight * weight)
        return objective.ce_weight * loss
    if isinstance(teacher, SparseRows) and teacher.tail == "uniform":
        log_p = densify(teacher, objective.vocab_size)
        return _rows_dense_(student, log_p, labels, weight, objective, teacher_scale=1.0)
    if isinstance(teacher, SparseRows):
        return _rows_sparse_(student, teacher, labels, weight, objective)
    return _rows_dense_(student, teacher, labels, weight, objective, 1 / objective.temperature)


def _rows_sparse_(student, sparse, labels, weight, objective):
    if objective.temperature == 1:
        return sparse_rows_(student, sparse, labels, weight, objective)
    hard = student.clone() if labels is not None else None
    student.mul_(1 / objective.temperature)
    loss = sparse_rows_(student, sparse, None, weight / objective.temperature, objective)
    return loss if hard is None else loss + _add_hard_(student, hard, labels, weight, objective)


def _rows_dense_(student, teacher, labels, weight, objective, teacher_scale):
    hard = student.clone() if labels is not None else None
    if objective.temperature != 1:
        student.mul_(1 / objective.temperature)
    if teacher_scale != 1:
        teacher.mul_(teacher_scale)
    loss = objective.kd_weight * dense_divergence_(student, teacher, objective)
    scale_(student, weight * (objective.kd_weight / objective.temperature))
    return loss if hard is None else loss + _add_hard_(student, hard, labels, weight, objective)


def _add_hard_(student, logits, labels, weight, objective):
    """Add cross-entropy at temperature 1, whose logits are scratch, to the gradient."""
    loss = cross_entropy_(logits, labels, objective.ce_weight * weight)
    student.add_(logits)
    return objective.ce_weight * loss
