"""The oracle: every loss in float64, written as its definition and differentiated by autograd.

Naive on purpose. It walks row by row, materialises everything, and shares no arithmetic with the
fast backends: no hand-written gradient. Tests compare those with it. Probabilities come with their
logs, since exp underflows where logits are 745 apart and the log of what is left would be -inf.
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


def log_softmax(logits: Tensor) -> Tensor:
    """Log-softmax of one row [V]; a logit of -inf is probability 0, without part in the graph.

    A row of nothing else is no distribution: NaN.
    """
    index = (logits != -torch.inf).nonzero().squeeze(1)
    if len(index) == 0:
        return logits * torch.nan
    live = logits[index] - logits[index].max().detach()
    live = live - live.exp().sum().log()
    return torch.full_like(logits, -torch.inf).index_copy(0, index, live)


def exp(logs: Tensor) -> Tensor:
    """exp(logs), with a zero gradient where a log is -inf."""
    zero = logs == -torch.inf
    return torch.where(zero, 0.0, torch.exp(torch.where(zero, 0.0, logs)))


def x_log_y(x: Tensor, y: Tensor) -> Tensor:
    """x * log(y), 0 where x is 0."""
    counts = x != 0
    one = torch.ones_like(x)
    return torch.where(counts, x * torch.log(torch.where(counts, y, one)), torch.zeros_like(x))


def kl(a: Tensor, b: Tensor) -> Tensor:
    """KL(a || b) of two rows, sum(a * log(a / b) - a + b): neither has to sum to one."""
    return (x_log_y(a, a) - x_log_y(a, b) - a + b).sum()


def log_gap(a: Tensor, log_a: Tensor, log_b: Tensor) -> Tensor:
    """sum(a * (log a - log b)) from the logs, where b may have underflowed."""
    counts = a != 0
    zero = torch.zeros_like(a)
    return (a * (torch.where(counts, log_a, zero) - torch.where(counts, log_b, zero))).sum()


def kl_of_logs(log_a: Tensor, log_b: Tensor) -> Tensor:
    """KL(a || b) of two rows that need not sum to one, from their logs."""
    a = exp(log_a)
    return log_gap(a, log_a, log_b) - a.sum() + exp(log_b).sum()


def bounded(logs: Tensor, min_logprob: float | None) -> Tensor:
    """The logs, none below the bound, where they are constants."""
    return logs if min_logprob is None else logs.clamp(min=min_logprob)


def divergence_of(d: Divergence, log_p: Tensor, log_q: Tensor, min_logprob: float | None) -> Tensor:
    """The divergence of one row, from its definition (design: kd.losses.divergences).

    Both sides' log-probabilities are bounded first, and nothing is renormalised.
    """
    head = in_head(exp(log_p), d.head_mass) if d.name == "adaptive_kl" else None
    log_p, log_q = bounded(log_p, min_logprob), bounded(log_q, min_logprob)
    p, q = exp(log_p), exp(log_q)
    if d.name == "forward_kl":
        return kl_of_logs(log_p, log_q)
    if d.name == "reverse_kl":
        return kl_of_logs(log_q, log_p)
    if d.name == "jsd":
        m = d.beta * p + (1 - d.beta) * q
        return d.beta * kl(p, m) + (1 - d.beta) * kl(q, m)
    if d.name == "skew_forward_kl":
        if d.alpha == 0:
            return kl_of_logs(log_p, log_q)
        return kl(p, d.alpha * p + (1 - d.alpha) * q)
    if d.name == "skew_reverse_kl":
        if d.alpha == 0:
            return kl_of_logs(log_q, log_p)
        m = (1 - d.alpha) * p + d.alpha * q
        return kl(q, m.detach() if d.detach_mixture else m)
    if d.name == "total_variation":
        return 0.5 * (p - q).abs().sum()
    if d.name == "alpha_beta":
        return alpha_beta_of(d.alpha, d.beta, log_p, log_q)
    assert d.name == "adaptive_kl" and head is not None, d.name
    head_gap = (p - q).abs()[head].sum().detach()
    tail_gap = (p - q).abs()[~head].sum().detach()
    if head_gap + tail_gap == 0:
        share = torch.tensor(0.5, dtype=p.dtype)
    else:
        share = head_gap / (head_gap + tail_gap)
    return share * kl_of_logs(log_p, log_q) + (1 - share) * kl_of_logs(log_q, log_p)


def alpha_beta_of(a: float, b: float, log_p: Tensor, log_q: Tensor) -> Tensor:
    """ABKD's divergence and its limits at a = 0 and b = 0."""
    if b == 0:
        return kl_of_logs(a * log_p, a * log_q) / a**2
    if a == 0:
        return kl_of_logs(b * log_q, b * log_p) / b**2
    both = exp(a * log_p) * exp(b * log_q)
    mixed = a / (a + b) * exp((a + b) * log_p) + b / (a + b) * exp((a + b) * log_q)
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


def stored_tail(teacher: TopK, row: int, temperature: float) -> float | None:
    """The tail's sum of p ** (T_c / T) by the polynomial in 1 / T through the stored logs."""
    temperatures, stored = teacher.tail_temperatures, teacher.tail_log_partition
    if stored is None or not min(temperatures) <= temperature <= max(temperatures):
        return None
    values = stored[row].double().tolist()
    if -math.inf in values:
        return 0.0
    value = 0.0
    for i, t in enumerate(temperatures):
        term = values[i]
        for j, other in enumerate(temperatures):
            if j != i:
                term *= (1 / temperature - 1 / other) / (1 / t - 1 / other)
        value += term
    return math.exp(value)


def sparse_outcomes(
    teacher: TopK, row: int, log_q: Tensor, temperature: float
) -> tuple[Tensor, Tensor, bool]:
    """Logs of p and q over the outcomes of a sparse teacher's row, and whether one is a tail."""
    masses = sparse_row(teacher, row)
    ids = list(masses)
    p = torch.tensor([masses[i] for i in ids], dtype=torch.float64)
    rest = [j for j in range(len(log_q)) if j not in masses]
    resolution = torch.finfo(torch.float64).eps if teacher.logprobs.dtype == torch.float64 else 1e-7
    tail = max(1.0 - float(p.sum()), resolution) if rest else 0.0
    if teacher.tail == "renormalize":
        nothing = float(p.sum()) == 0  # says nothing: all in the tail
        p, tail = (p, 1.0) if nothing else (p / p.sum(), 0.0)
    ratio = teacher.temperature / temperature
    known = stored_tail(teacher, row, temperature) if rest and tail else None
    if ratio != 1:
        many = 1 if teacher.tail_at_temperature == "one_outcome" else max(len(rest), 1)
        tail = many * (tail / many) ** ratio if known is None else known
        p = p**ratio
        total = p.sum() + tail
        p, tail = p / total, tail / float(total)
    elif known and tail < 1e3 * resolution:
        tail = known
    if teacher.tail == "uniform":
        dense = torch.full_like(log_q, tail / len(rest) if rest else 0.0, requires_grad=False)
        dense = dense.detach().index_copy(0, torch.tensor(ids, dtype=torch.long), p)
        return dense.log(), log_q, True
    p = torch.cat([p, torch.tensor([tail], dtype=torch.float64)])
    live = [j for j in rest if log_q[j] != -torch.inf]
    log_rest = torch.logsumexp(log_q[live], 0) if live else log_q.new_tensor(-torch.inf)
    return p.log(), torch.cat([log_q[ids], log_rest.reshape(1)]), bool(rest)


def soft_loss(
    d: Divergence,
    teacher: Teacher,
    row: int,
    log_q: Tensor,
    temperature: float,
    min_logprob: float | None,
) -> Tensor:
    """The divergence between one row of the teacher and the student's log q [V]."""
    if isinstance(teacher, TopK):
        log_p, log_q, has_tail = sparse_outcomes(teacher, row, log_q, temperature)
        if teacher.tail == "drop" or not has_tail:
            log_p, log_q = log_p[:-1], log_q[:-1]
        if teacher.tail == "drop":
            return log_gap(exp(log_p), bounded(log_p, min_logprob), bounded(log_q, min_logprob))
    else:
        log_p = log_softmax(logits_of(teacher, len(log_q))[row].detach() / temperature)
    return divergence_of(d, log_p, log_q, min_logprob)


def per_token_loss(
    student: Student,
    teacher: Teacher | None,
    labels: Tensor | None,
    *,
    divergence: Divergence,
    temperature: float,
    kd_weight: float,
    ce_weight: float,
    counts: Tensor,
    vocab_size: int,
    min_logprob: float | None,
) -> Tensor:
    """kd_weight * divergence + ce_weight * cross-entropy for each row, [N] float64.

    Differentiable in everything the student is made of. counts [N]: False where a row's loss is
    zero whatever it holds.
    """
    logits = logits_of(student, vocab_size)
    losses = []
    for row in range(len(logits)):
        loss = logits[row, :0].sum()  # zero, with a graph
        if counts[row]:
            if teacher is not None and kd_weight != 0:
                log_q = log_softmax(logits[row] / temperature)
                soft = soft_loss(divergence, teacher, row, log_q, temperature, min_logprob)
                loss = loss + kd_weight * soft
            if labels is not None and ce_weight != 0:
                loss = loss - ce_weight * log_softmax(logits[row])[labels[row]]
        losses.append(loss)
    return torch.stack(losses) if losses else logits.sum(-1)
