"""Every divergence as one writes it in PyTorch without a library: the yardstick of the benchmarks.

Log-softmax in float32 (float64 for float64 inputs), the formula over [N, V], autograd for the
gradient. Correct, and what most training code does; its error and its speed are what ours are
compared with.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor

from kd import Divergence, Hidden, TopK
from kd_bench.suite import unknown_divergence


def wide(tensor: Tensor) -> Tensor:
    """float32, or float64 where it is already."""
    return tensor if tensor.dtype == torch.float64 else tensor.float()


def dense_logits(source: Tensor | Hidden) -> Tensor:
    """[N, V] logits in the inputs' own dtype."""
    if isinstance(source, Tensor):
        return source
    logits = source.hidden @ source.weight.T
    return logits if source.bias is None else logits + source.bias


def outcomes(
    student: Tensor | Hidden, teacher: Tensor | Hidden | TopK, temperature: float, vocab_size: int
) -> tuple[Tensor, Tensor]:
    """log p and log q over the outcomes that are compared: the vocabulary, or top-k and tail."""
    z = wide(dense_logits(student))[:, :vocab_size]
    log_q = torch.log_softmax(z / temperature, -1)
    if not isinstance(teacher, TopK):
        logits = wide(dense_logits(teacher))[:, :vocab_size]
        return torch.log_softmax(logits / temperature, -1), log_q
    stored = wide(teacher.logprobs)
    tail = torch.log1p(-stored.exp().sum(-1, keepdim=True))
    if teacher.tail == "renormalize":
        stored, tail = torch.log_softmax(stored, -1), torch.full_like(tail, -torch.inf)
    if temperature != teacher.temperature:
        ratio = teacher.temperature / temperature
        count = math.log(max(1, vocab_size - teacher.ids.shape[-1]))
        both = torch.cat([stored * ratio, (tail - count) * ratio + count], -1)
        both = torch.log_softmax(both, -1)
        stored, tail = both[:, :-1], both[:, -1:]
    if teacher.tail == "uniform":
        rest = math.log(max(1, vocab_size - teacher.ids.shape[-1]))
        log_p = (tail - rest).expand(-1, vocab_size).clone()
        return log_p.scatter(1, teacher.ids, stored), log_q
    top = log_q.gather(1, teacher.ids)
    outside = torch.logsumexp(log_q.scatter(1, teacher.ids, -torch.inf), -1, keepdim=True)
    if teacher.tail == "drop":
        return stored, top
    return torch.cat([stored, tail], -1), torch.cat([top, outside], -1)


def kl(log_a: Tensor, log_b: Tensor) -> Tensor:
    """KL(a || b) per row; an outcome without mass in a adds nothing."""
    a = log_a.exp()
    return torch.where(a == 0, torch.zeros_like(a), a * (log_a - log_b)).sum(-1)


def _jsd(d: Divergence, log_p: Tensor, log_q: Tensor) -> Tensor:
    log_m = (d.beta * log_p.exp() + (1 - d.beta) * log_q.exp()).log()
    return d.beta * kl(log_p, log_m) + (1 - d.beta) * kl(log_q, log_m)


def _skew_forward_kl(d: Divergence, log_p: Tensor, log_q: Tensor) -> Tensor:
    return kl(log_p, (d.alpha * log_p.exp() + (1 - d.alpha) * log_q.exp()).log())


def _skew_reverse_kl(d: Divergence, log_p: Tensor, log_q: Tensor) -> Tensor:
    log_m = ((1 - d.alpha) * log_p.exp() + d.alpha * log_q.exp()).log()
    return kl(log_q, log_m.detach() if d.detach_mixture else log_m)


def _adaptive_kl(d: Divergence, log_p: Tensor, log_q: Tensor) -> Tensor:
    p, q = log_p.exp(), log_q.exp()
    ordered = p.sort(-1, descending=True).values
    last = (ordered.cumsum(-1) < d.head_mass).sum(-1, keepdim=True).clamp(max=p.shape[-1] - 1)
    head = p >= ordered.gather(-1, last)
    gap = (p - q).abs().detach()
    share = (gap * head).sum(-1) / gap.sum(-1).clamp(min=torch.finfo(p.dtype).tiny)
    return share * kl(log_p, log_q) + (1 - share) * kl(log_q, log_p)


def _alpha_beta(d: Divergence, log_p: Tensor, log_q: Tensor) -> Tensor:
    a, b = d.alpha, d.beta
    if b == 0:
        p_a, q_a = (a * log_p).exp(), (a * log_q).exp()
        return (kl(a * log_p, a * log_q) - p_a.sum(-1) + q_a.sum(-1)) / a**2
    if a == 0:
        p_b, q_b = (b * log_p).exp(), (b * log_q).exp()
        return (kl(b * log_q, b * log_p) - q_b.sum(-1) + p_b.sum(-1)) / b**2
    both = (a * log_p + b * log_q).exp()
    p_ab, q_ab = ((a + b) * log_p).exp(), ((a + b) * log_q).exp()
    return (a / (a + b) * p_ab + b / (a + b) * q_ab - both).sum(-1) / (a * b)


TWINS: dict[str, Callable[[Divergence, Tensor, Tensor], Tensor]] = {
    "forward_kl": lambda d, log_p, log_q: kl(log_p, log_q),
    "reverse_kl": lambda d, log_p, log_q: kl(log_q, log_p),
    "jsd": _jsd,
    "skew_forward_kl": _skew_forward_kl,
    "skew_reverse_kl": _skew_reverse_kl,
    "total_variation": lambda d, log_p, log_q: 0.5 * (log_p.exp() - log_q.exp()).abs().sum(-1),
    "alpha_beta": _alpha_beta,
    "adaptive_kl": _adaptive_kl,
}
"""Every divergence of kd by name: (divergence, log p, log q), both [N, outcomes], to [N]."""


def divergence_of(d: Divergence, log_p: Tensor, log_q: Tensor) -> Tensor:
    """Per-token divergence [N] from log-probabilities, by its definition.

    Raises:
        ValueError: it has no twin here.
    """
    if d.name not in TWINS:
        raise unknown_divergence("plain PyTorch", d)
    return TWINS[d.name](d, log_p, log_q)


def written_by_hand(d: Divergence, log_p: Tensor, log_q: Tensor) -> Tensor:
    """Mean over tokens of [N, V] log-probabilities, with F.kl_div where training code has it."""
    kl_div = functools.partial(F.kl_div, reduction="none", log_target=True)
    if d.name == "forward_kl":
        terms = kl_div(log_q, log_p)
    elif d.name == "reverse_kl":
        terms = kl_div(log_p, log_q)
    elif d.name == "jsd":  # as GKD's reference code has it
        beta = torch.tensor(d.beta, dtype=log_q.dtype, device=log_q.device)
        sides = torch.stack([log_q + torch.log1p(-beta), log_p + torch.log(beta)])
        log_m = torch.logsumexp(sides, dim=0)
        terms = beta * kl_div(log_m, log_p) + (1 - beta) * kl_div(log_m, log_q)
    else:
        return divergence_of(d, log_p, log_q).mean()
    return terms.sum() / len(log_q)


def plain_losses(
    d: Divergence,
    student: Tensor | Hidden,
    teacher: Tensor | Hidden | TopK,
    temperature: float = 1.0,
    vocab_size: int | None = None,
) -> Tensor:
    """Per-token divergence [N], differentiable by autograd.

    Args:
        d: the divergence.
        student: logits [N, V] or ``kd.Hidden``.
        teacher: logits, ``kd.Hidden`` or ``kd.TopK`` without empty slots or repeated ids.
        temperature: divides both sides' logits.
        vocab_size: live tokens; the student's width when None.
    """
    if vocab_size is None:
        vocab_size = dense_logits(student).shape[-1]
    log_p, log_q = outcomes(student, teacher, temperature, vocab_size)
    return divergence_of(d, log_p, log_q)
