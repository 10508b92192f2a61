"""The oracle: every loss in float64, written as its definition and differentiated by autograd.

Naive on purpose. It walks row by row, materialises everything, and shares no arithmetic with the
fast backends: no log-space tricks, no hand-written gradient. Tests compare those with it.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

from kd.losses.divergences import Divergence
from kd.losses.inputs import Hidden, Student, Teacher, TopK


def logits_of(source: Tensor | Hidden, vocab_size: int) -> Tensor:
    """[N, vocab_size] float64 logits, live columns only."""
    if not isinstance(source, Hidden):
        return source.double()[:, :vocab_size]
    logits = source.hidden.double() @ source.weight.double().T
    if source.bias is not None:
        logits = logits + source.bias.double()
    if source.lora is not None:
        a, b, scaling = source.lora
        logits = logits + scaling * (source.hidden.double() @ a.double().T @ b.double().T)
    if source.logit_scale is not None:
        logits = logits * source.logit_scale
    if source.softcap is not None:
        logits = source.softcap * torch.tanh(logits / source.softcap)
    return logits[:, :vocab_size]


def softmax(logits: Tensor) -> Tensor:
    """Softmax of one row [V]; a logit of -inf is probability 0 and has no part in the graph."""
    finite = logits != -torch.inf
    index = finite.nonzero().squeeze(1)
    live = torch.exp(logits[index] - logits[index].max().detach())
    return torch.zeros_like(logits).index_copy(0, index, live / live.sum())


def x_log_y(x: Tensor, y: Tensor) -> Tensor:
    """x * log(y), 0 where x is 0."""
    counts = x != 0
    one = torch.ones_like(x)
    return torch.where(counts, x * torch.log(torch.where(counts, y, one)), torch.zeros_like(x))


def kl(a: Tensor, b: Tensor) -> Tensor:
    """KL(a || b) of two rows."""
    return (x_log_y(a, a) - x_log_y(a, b)).sum()


def kl_with_log_b(a: Tensor, log_b: Tensor) -> Tensor:
    """KL(a || b) from log b, for a floored teacher."""
    counts = a != 0
    zero = torch.zeros_like(a)
    return (x_log_y(a, a) - torch.where(counts, a * torch.where(counts, log_b, zero), zero)).sum()


def divergence_of(d: Divergence, p: Tensor, q: Tensor, floor: float | None) -> Tensor:
    """The divergence of one row, from its definition (design: kd.losses.divergences)."""
    log_p = p.log() if floor is None else p.log().clamp(min=floor)
    if d.name == "forward_kl":
        return kl(p, q)
    if d.name == "reverse_kl":
        return kl_with_log_b(q, log_p)
    if d.name == "jsd":
        m = d.beta * p + (1 - d.beta) * q
        return d.beta * kl(p, m) + (1 - d.beta) * kl(q, m)
    if d.name == "skew_forward_kl":
        return kl(p, d.alpha * p + (1 - d.alpha) * q)
    if d.name == "skew_reverse_kl":
        if d.alpha == 0:
            return kl_with_log_b(q, log_p)
        m = (1 - d.alpha) * p + d.alpha * q
        return kl(q, m.detach() if d.detach_mixture else m)
    if d.name == "total_variation":
        return 0.5 * (p - q).abs().sum()
    if d.name == "alpha_beta":
        return alpha_beta_of(d.alpha, d.beta, p, q, log_p)
    if d.name == "adaptive_kl":
        head = in_head(p, d.head_mass)
        head_gap = (p - q).abs()[head].sum().detach()
        tail_gap = (p - q).abs()[~head].sum().detach()
        if head_gap + tail_gap == 0:
            share = torch.tensor(0.5, dtype=p.dtype)
        else:
            share = head_gap / (head_gap + tail_gap)
        return share * kl(p, q) + (1 - share) * kl_with_log_b(q, log_p)
    raise AssertionError(d.name)


def power(x: Tensor, exponent: float) -> Tensor:
    """x ** exponent with a zero gradient where x is 0."""
    positive = x > 0
    safe = torch.where(positive, x, torch.ones_like(x))
    return torch.where(positive, safe**exponent, torch.zeros_like(x))


def alpha_beta_of(a: float, b: float, p: Tensor, q: Tensor, log_p: Tensor) -> Tensor:
    """ABKD's divergence and its limits at a = 0 and b = 0."""
    if b == 0:
        p_a, q_a = power(p, a), power(q, a)
        return (x_log_y(p_a, p_a) - x_log_y(p_a, q_a) - p_a + q_a).sum() / a**2
    if a == 0:
        q_b = power(q, b)
        return (kl_with_log_b(q_b, b * log_p) - q_b.sum() + power(p, b).sum()) / b**2
    both = power(p, a) * power(q, b)
    mixed = a / (a + b) * power(p, a + b) + b / (a + b) * power(q, a + b)
    return -(both - mixed).sum() / (a * b)


def in_head(p: Tensor, head_mass: float) -> Tensor:
    """The smallest set of most probable outcomes with at least head_mass, ties included."""
    ordered = p.sort(descending=True).values
    reached = (ordered.cumsum(0) >= head_mass).nonzero()
    threshold = ordered[reached[0]] if len(reached) else ordered[-1]
    return p >= threshold


def sparse_row(teacher: TopK, row: int) -> dict[int, float]:
    """{token id: probability} of one row at the capture temperature, repeats summed."""
    masses: dict[int, float] = {}
    ids, logprobs = teacher.ids[row].tolist(), teacher.logprobs[row].double().tolist()
    for token, logprob in zip(ids, logprobs, strict=True):
        if token >= 0:
            masses[token] = masses.get(token, 0.0) + math.exp(logprob)
    return masses


def sparse_outcomes(
    teacher: TopK, row: int, q: Tensor, temperature: float
) -> tuple[Tensor, Tensor, bool]:
    """p and q over the outcomes of a sparse teacher's row: (p, q, whether a tail is among them)."""
    masses = sparse_row(teacher, row)
    ids = list(masses)
    p = torch.tensor([masses[i] for i in ids], dtype=torch.float64)
    rest = [j for j in range(len(q)) if j not in masses]
    resolution = torch.finfo(torch.float64).eps if teacher.logprobs.dtype == torch.float64 else 1e-7
    tail = max(1.0 - float(p.sum()), resolution) if rest else 0.0
    if teacher.tail == "renormalize":
        nothing = float(p.sum()) == 0  # says nothing: all in the tail
        p, tail = (p, 1.0) if nothing else (p / p.sum(), 0.0)
    ratio = teacher.temperature / temperature
    if ratio != 1:
        tail = len(rest) * (tail / len(rest)) ** ratio if rest else 0.0
        p = p**ratio
        total = p.sum() + tail
        p, tail = p / total, tail / float(total)
    if teacher.tail == "uniform":
        dense = torch.full_like(q, tail / len(rest) if rest else 0.0, requires_grad=False)
        dense = dense.detach().index_copy(0, torch.tensor(ids, dtype=torch.long), p)
        return dense, q, True
    p = torch.cat([p, torch.tensor([tail], dtype=torch.float64)])
    grouped = torch.cat([q[ids], q[rest].sum().reshape(1)])
    return p, grouped, bool(rest)


def soft_loss(
    d: Divergence, teacher: Teacher, row: int, q: Tensor, temperature: float, floor: float | None
) -> Tensor:
    """The divergence between one row of the teacher and the student's q [V] at a temperature."""
    if isinstance(teacher, TopK):
        p, q, has_tail = sparse_outcomes(teacher, row, q, temperature)
        if teacher.tail == "drop":
            return (x_log_y(p, p) - x_log_y(p, q))[:-1].sum()
        if not has_tail:
            p, q = p[:-1], q[:-1]
    else:
        p = softmax(logits_of(teacher, len(q))[row].detach() / temperature)
    return divergence_of(d, p, q, floor)


def per_token_loss(
    student: Student,
    teacher: Teacher | None,
    labels: Tensor | None,
    *,
    divergence: Divergence,
    temperature: float,
    kd_weight: float,
    ce_weight: float,
    ignore_index: int,
    vocab_size: int,
    floor: float | None,
) -> Tensor:
    """kd_weight * divergence + ce_weight * cross-entropy for each row, [N] float64.

    Differentiable in everything the student is made of. Rows whose label is ignored are zero.
    """
    logits = logits_of(student, vocab_size)
    losses = []
    for row in range(len(logits)):
        loss = logits.new_zeros(())
        if labels is None or labels[row] != ignore_index:
            if teacher is not None and kd_weight != 0:
                q = softmax(logits[row] / temperature)
                loss = kd_weight * soft_loss(divergence, teacher, row, q, temperature, floor)
            if labels is not None and ce_weight != 0:
                loss = loss - ce_weight * torch.log(softmax(logits[row])[labels[row]])
        losses.append(loss)
    return torch.stack(losses) if losses else logits.sum(-1)
