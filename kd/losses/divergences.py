"""The divergences: one definition each, from which every form of the loss follows.

p is the teacher's distribution and q the student's, q = softmax(z). A divergence is a sum over
outcomes of phi(p, q), and

    dD/dz_j = h_j - q_j * sum_i h_i,        h = q * dphi/dq.

h may be shifted by any multiple of q, which changes nothing since q sums to one; the definitions
below drop such terms. An outcome is a vocabulary entry, or, for a sparse teacher, one of the K
stored entries or the tail: the algebra does not care.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable
from typing import Any, ClassVar

import torch
from torch import Tensor

from kd.losses.inputs import Student, Teacher

__all__ = [
    "Divergence",
    "adaptive_kl",
    "alpha_beta",
    "forward_kl",
    "jsd",
    "reverse_kl",
    "skew_forward_kl",
    "skew_reverse_kl",
    "total_variation",
]


@dataclasses.dataclass(frozen=True)
class Divergence:
    """A divergence between teacher p and student q, with its parameters.

    What each is: ``DEFINITIONS``, and the functions that make those with parameters. Calling it
    computes the pure divergence (no T**2 factor, no hard labels), per token or reduced:
    ``kd.jsd(0.5)(student, teacher, temperature=2.0, reduction="none")``.

    Attributes:
        name: one of ``kd.losses.divergences.DEFINITIONS``.
        alpha: skew of the skew divergences, or ABKD's first exponent.
        beta: weight of the teacher in JSD's mixture, or ABKD's second exponent.
        detach_mixture: skew_reverse_kl alone: no gradient through the mixture (DistiLLM-2).
        head_mass: adaptive_kl alone: teacher probability that the head must cover.
    """

    name: str
    alpha: float = 0.0
    beta: float = 0.0
    detach_mixture: bool = False
    head_mass: float = 0.5

    compute: ClassVar[Callable[..., Tensor]]
    """``kd.distillation_loss``; kd.losses.api, which is above this module, puts it here."""

    def __post_init__(self) -> None:
        if self.name not in DEFINITIONS:
            raise ValueError(
                f"Divergence: name must be one of {', '.join(DEFINITIONS)}, got {self.name!r}."
            )
        rule, holds = DEFINITIONS[self.name].rule
        if not holds(self):
            shown = DEFINITIONS[self.name].parameters or ("head_mass",)
            got = ", ".join(f"{name}={getattr(self, name)}" for name in shown)
            raise ValueError(f"{self.name}: must have {rule}, got {got}.")

    def __call__(
        self, student: Student, teacher: Teacher, *, reduction: str = "mean", **options: Any
    ) -> Tensor:
        """The pure divergence of student from teacher; options as in ``kd.distillation_loss``."""
        for name in ("kd_weight", "ce_weight", "scale_by_t2", "divergence"):
            if name in options:
                raise TypeError(
                    f"{self.name}: a pure divergence takes no {name}, got {name}={options[name]!r}."
                    " Use kd.distillation_loss(..., divergence=...)."
                )
        return Divergence.compute(
            student, teacher, divergence=self, scale_by_t2=False, reduction=reduction, **options
        )

    def __str__(self) -> str:
        shown = DEFINITIONS[self.name].parameters
        values = [f"{getattr(self, parameter):g}" for parameter in shown]
        if self.detach_mixture:
            values.append("detach_mixture")
        return f"{self.name}({', '.join(values)})" if values else self.name

    @property
    def needs_teacher_support(self) -> bool:
        """True where q > 0 = p makes the value +inf."""
        return DEFINITIONS[self.name].needs_teacher_support(self)

    @property
    def needs_head(self) -> bool:
        """True where the teacher's most probable outcomes are told from the others."""
        return self.name == "adaptive_kl"

    @property
    def kernel(self) -> str:
        """The name of its branch in ``kd_kernels.algebra.terms``; a limit has one of its own."""
        return DEFINITIONS[self.name].kernel(self)

    def terms(
        self, p: Tensor, q: Tensor, log_p: Tensor, log_q: Tensor, head: Tensor | None = None
    ) -> tuple[Tensor, Tensor]:
        """phi and h = q * dphi/dq for each outcome, [..., outcomes] each; p or q need not sum to 1.

        Where a term is 0 * log 0 it is 0; where q > 0 = p makes reverse KL infinite, phi is +inf.
        Each phi carries the terms of its Bregman form (q - p for forward KL): they sum to zero
        over a normalised row, and cancel the rounding of both log-normalisers to first order.
        ``head`` is adaptive_kl's head, as a mask of 0 and 1.
        """
        return DEFINITIONS[self.name].terms(self, p, q, log_p, log_q, head)


def _times(weight: Tensor, factor: Tensor) -> Tensor:
    """weight * factor with 0 * inf = 0 and 0 * nan = 0 (a NaN weight stays NaN)."""
    return torch.where(weight == 0, weight, weight * factor)


def _forward_kl(d, p, q, log_p, log_q, head):
    return _times(p, log_p - log_q) + (q - p), q - p


def _reverse_kl(d, p, q, log_p, log_q, head):
    h = _times(q, log_q - log_p)
    return h + (p - q), h


def _log_ratio_to_mixture(log_a: Tensor, log_b: Tensor, weight_a: float) -> Tensor:
    """log a - log(weight_a * a + (1 - weight_a) * b), accurate where a and b are close."""
    ratio = log_b - log_a  # log(b / a); +-inf where one is zero, nan where both are
    if weight_a == 0:  # log1p(expm1(ratio)) would be -inf from a gap of 17 nats in float32
        return -ratio
    near = -torch.log1p((1 - weight_a) * torch.expm1(ratio.clamp(max=0)))
    far = -ratio - torch.log1p(weight_a * torch.expm1(-ratio.clamp(min=0)))
    return torch.where(ratio <= 0, near, far)


def _jsd(d, p, q, log_p, log_q, head):
    h = (1 - d.beta) * _times(q, _log_ratio_to_mixture(log_q, log_p, 1 - d.beta))
    return d.beta * _times(p, _log_ratio_to_mixture(log_p, log_q, d.beta)) + h, h


def _skew_forward_kl(d, p, q, log_p, log_q, head):
    mixture = d.alpha * p + (1 - d.alpha) * q
    phi = _times(p, _log_ratio_to_mixture(log_p, log_q, d.alpha)) + (1 - d.alpha) * (q - p)
    # p / mixture <= 1 / alpha; where both are zero the outcome does not count.
    h = (1 - d.alpha) * (q - q * (p / mixture.clamp(min=torch.finfo(p.dtype).tiny)))
    return phi, h if d.alpha > 0 else q - p


def _skew_reverse_kl(d, p, q, log_p, log_q, head):
    mixture = (1 - d.alpha) * p + d.alpha * q
    log_ratio = _log_ratio_to_mixture(log_q, log_p, d.alpha)
    h = _times(q, log_ratio)
    phi = h + (1 - d.alpha) * (p - q)
    if not d.detach_mixture:
        h = h + d.alpha * (q - q * (q / mixture.clamp(min=torch.finfo(q.dtype).tiny)))
    return phi, h


def _total_variation(d, p, q, log_p, log_q, head):
    return 0.5 * (p - q).abs(), 0.5 * q * torch.sign(q - p)


def _alpha_beta(d, p, q, log_p, log_q, head):
    a, b = d.alpha, d.beta
    if b == 0:  # the limit: generalised KL(p**a || q**a) / a**2
        p_a, q_a = torch.exp(a * log_p), torch.exp(a * log_q)
        return (_times(p_a, a * (log_p - log_q)) + (q_a - p_a)) / a**2, (q_a - p_a) / a
    if a == 0:  # the limit: generalised KL(q**b || p**b) / b**2
        p_b, q_b = torch.exp(b * log_p), torch.exp(b * log_q)
        log_gap = _times(q_b, b * (log_q - log_p))
        return (log_gap + (p_b - q_b)) / b**2, log_gap / b
    # p**a q**b ((p/q)**b - 1) / b and q**(a+b) ((p/q)**a - 1) / a: no sum of large terms to be
    # divided by a small a or b, and by the larger of p and q, so that no power is infinite.
    gap, more = log_p - log_q, log_p > log_q
    cross, size = torch.exp(a * log_p + b * log_q), -gap.abs()
    of_p = _times(torch.where(more, torch.exp((a + b) * log_p), -cross), torch.expm1(b * size))
    of_q = _times(torch.where(more, cross, -torch.exp((a + b) * log_q)), torch.expm1(a * size))
    return (of_q / a - of_p / b) / (a + b), of_q / a


def _adaptive_kl(d, p, q, log_p, log_q, head):
    gap = (p - q).abs()
    head_gap = (gap * head).sum(-1, keepdim=True)
    tail_gap = (gap * (1 - head)).sum(-1, keepdim=True)
    total = head_gap + tail_gap
    forward_share = torch.where(total > 0, head_gap / total, torch.full_like(total, 0.5))
    forward, forward_h = _forward_kl(d, p, q, log_p, log_q, head)
    reverse, reverse_h = _reverse_kl(d, p, q, log_p, log_q, head)
    share = 1 - forward_share
    phi = _times(forward_share, forward) + _times(share, reverse)
    return phi, forward_share * forward_h + _times(share, reverse_h)


@dataclasses.dataclass(frozen=True)
class Definition:
    """What there is to know of a divergence; a new one is an entry of ``DEFINITIONS``, its branch
    in kd_kernels.algebra.terms and its branch in kd.losses.oracle.divergence_of."""

    terms: Callable[..., tuple[Tensor, Tensor]]
    """(d, p, q, log_p, log_q, head) to phi and h."""
    formula: str
    """Of p, the teacher's, and q, the student's, for the README's table."""
    source: str
    parameters: tuple[str, ...] = ()
    """Which of ``Divergence``'s numbers it has; they must be given where ``default`` is False."""
    rule: tuple[str, Callable[[Divergence], bool]] = ("no parameters", lambda d: True)
    """Which values they may have, in words and as a test."""
    default: dict[str, float] | None = None
    """The parameters where the divergence is given by its name alone; None refuses that."""
    needs_teacher_support: Callable[[Divergence], bool] = lambda d: False
    kernel: Callable[[Divergence], str] = lambda d: d.name


JSD_RULE = "beta in (0, 1) (use forward_kl for 0 and reverse_kl for 1)"
DEFINITIONS = {
    "forward_kl": Definition(_forward_kl, "KL(p‖q)", "Hinton et al. 2015", default={}),
    "reverse_kl": Definition(
        _reverse_kl, "KL(q‖p)", "MiniLLM", default={}, needs_teacher_support=lambda d: True
    ),
    "jsd": Definition(
        _jsd,
        "beta·KL(p‖m) + (1−beta)·KL(q‖m), m = beta·p + (1−beta)·q",
        "GKD",
        parameters=("beta",),
        rule=(JSD_RULE, lambda d: 0 < d.beta < 1),
        default={"beta": 0.5},
    ),
    "skew_forward_kl": Definition(
        _skew_forward_kl,
        "KL(p‖alpha·p + (1−alpha)·q)",
        "DistiLLM",
        parameters=("alpha",),
        rule=("alpha in [0, 1)", lambda d: 0 <= d.alpha < 1),
        kernel=lambda d: d.name if d.alpha else "forward_kl",
    ),
    "skew_reverse_kl": Definition(
        _skew_reverse_kl,
        "KL(q‖(1−alpha)·p + alpha·q)",
        "DistiLLM, DistiLLM-2",
        parameters=("alpha",),
        rule=("alpha in [0, 1)", lambda d: 0 <= d.alpha < 1),
        needs_teacher_support=lambda d: d.alpha == 0,
        kernel=lambda d: "reverse_kl" if d.alpha == 0 else d.name + "_detached" * d.detach_mixture,
    ),
    "total_variation": Definition(_total_variation, "½ Σ abs(p−q)", "f-distill", default={}),
    "alpha_beta": Definition(
        _alpha_beta,
        "ABKD's alpha-beta divergence",
        "ABKD",
        parameters=("alpha", "beta"),
        rule=(
            "finite alpha and beta >= 0, not both 0",
            lambda d: d.alpha >= 0 and d.beta >= 0 and 0 < d.alpha + d.beta < math.inf,
        ),
        needs_teacher_support=lambda d: d.alpha == 0,
        kernel=lambda d: d.name + ("_forward" if d.beta == 0 else "_reverse" * (d.alpha == 0)),
    ),
    "adaptive_kl": Definition(
        _adaptive_kl,
        "forward and reverse KL weighted by the gap on head and tail",
        "AKL",
        rule=("head_mass in (0, 1]", lambda d: 0 < d.head_mass <= 1),
        default={},
        needs_teacher_support=lambda d: True,
    ),
}


def bounded_terms(
    d: Divergence,
    p: Tensor,
    q: Tensor,
    log_p: Tensor,
    log_q: Tensor,
    min_logprob: float | None,
    head: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    """``d.terms`` of p and q whose logarithms are no less than ``min_logprob``.

    Nothing is renormalised. Below the bound q is a constant: h is zero there, so that the gradient
    is h - q * sum(h) with q as it is.
    """
    if min_logprob is None:
        return d.terms(p, q, log_p, log_q, head)
    log_p, bounded = log_p.clamp(min=min_logprob), log_q.clamp(min=min_logprob)
    phi, h = d.terms(log_p.exp(), bounded.exp(), log_p, bounded, head)
    return phi, h.masked_fill(log_q < min_logprob, 0.0)


def raw_terms(
    p: Tensor, log_p: Tensor, log_q: Tensor, min_logprob: float | None
) -> tuple[Tensor, Tensor]:
    """Forward KL's phi and h of raw masses p, of which only the logarithms are bounded."""
    bound = -torch.inf if min_logprob is None else min_logprob
    phi = torch.where(p == 0, p, p * (log_p.clamp(min=bound) - log_q.clamp(min=bound)))
    return phi, -p.masked_fill(log_q < bound, 0.0)


def head_mask(p: Tensor, head_mass: float) -> Tensor:
    """adaptive_kl's head: the most probable outcomes that together hold ``head_mass``.

    Outcomes tied with the last one taken belong to the head too, so that the mask does not
    depend on the order of the vocabulary. p: [..., outcomes]. Returns 0/1 in p's dtype.

    The cut is found by widening top-k, not by sorting the row: a language model's head is a
    handful of tokens.
    """
    outcomes = p.shape[-1]
    k = min(64, outcomes)
    while True:
        top = p.topk(k, dim=-1).values
        mass = top.cumsum(-1)
        if k == outcomes or bool((mass[..., -1] >= head_mass).all()):
            break
        k = min(8 * k, outcomes)
    last = (mass < head_mass).sum(-1, keepdim=True).clamp(max=k - 1)
    return (p >= top.gather(-1, last)).to(p.dtype)


def _with_numbers(name: str, **numbers: Any) -> Divergence:
    for argument, value in numbers.items():
        if isinstance(value, Tensor) or not isinstance(value, (int, float)):
            raise TypeError(
                f"{name}: {argument} must be a number, got {type(value).__name__}. {name}(...) "
                f"makes a divergence; compute it with kd.{name}(...)(student, teacher)."
            )
    return Divergence(name, **{argument: float(v) for argument, v in numbers.items()})  # type: ignore[arg-type]


def jsd(beta: float = 0.5) -> Divergence:
    """Generalised Jensen-Shannon divergence, beta*KL(p||m) + (1-beta)*KL(q||m).

    m = beta*p + (1-beta)*q: beta is the teacher's weight. Its limits divided by beta or 1-beta
    are forward and reverse KL; the end points themselves are zero everywhere and are refused.

    Args:
        beta: in (0, 1), default 0.5 (the symmetric divergence, at most log 2 nats).
    Raises:
        ValueError: beta outside (0, 1). TypeError: beta is not a number.
    Source: Agarwal et al. 2024 (GKD), https://arxiv.org/abs/2306.13649, eq. 1.
    """
    return _with_numbers("jsd", beta=beta)


def skew_forward_kl(alpha: float = 0.1) -> Divergence:
    """Skew forward KL, KL(p || alpha*p + (1-alpha)*q).

    Args:
        alpha: in [0, 1), default 0.1; 0 is forward KL.
    Raises:
        ValueError: alpha outside [0, 1). TypeError: alpha is not a number.
    Source: Ko et al. 2024 (DistiLLM), https://arxiv.org/abs/2402.03898, section 3.1.
    """
    return _with_numbers("skew_forward_kl", alpha=alpha)


def skew_reverse_kl(alpha: float = 0.1, *, detach_mixture: bool = False) -> Divergence:
    """Skew reverse KL, KL(q || (1-alpha)*p + alpha*q), with gradient through the mixture.

    Args:
        alpha: in [0, 1), default 0.1: the student's share of the mixture; 0 is reverse KL.
        detach_mixture: treat the mixture as a constant in the gradient, as DistiLLM-2 does. The
            value is the same, the gradient is another.
    Raises:
        ValueError: alpha outside [0, 1). TypeError: alpha is not a number.
    Source: Ko et al. 2024 (DistiLLM), https://arxiv.org/abs/2402.03898, section 3.1; Ko et al.
        2025 (DistiLLM-2), https://arxiv.org/abs/2503.07067.
    """
    made = _with_numbers("skew_reverse_kl", alpha=alpha)
    return dataclasses.replace(made, detach_mixture=bool(detach_mixture))


def alpha_beta(alpha: float, beta: float) -> Divergence:
    """ABKD's alpha-beta divergence.

    -1/(alpha*beta) * sum(p**alpha * q**beta - alpha/(alpha+beta) * p**(alpha+beta)
                          - beta/(alpha+beta) * q**(alpha+beta))

    (1, 0) is forward KL and (0, 1) reverse KL, both reached by continuity. At beta = 0 the limit is
    sum(p**alpha * log(p**alpha / q**alpha) - p**alpha + q**alpha) / alpha**2, and at alpha = 0 the
    same with beta, p and q exchanged.

    Args:
        alpha, beta: >= 0, not both 0 (negative exponents are infinite wherever a probability is 0).
    Raises:
        ValueError: out of range. TypeError: not numbers.
    Source: Wang et al. 2025 (ABKD), https://arxiv.org/abs/2505.04560, definition 3.1.
    """
    return _with_numbers("alpha_beta", alpha=alpha, beta=beta)


forward_kl = Divergence("forward_kl")
"""KL(p || q), teacher to student: zero when p = q. Hinton et al. 2015, arXiv:1503.02531."""
reverse_kl = Divergence("reverse_kl")
"""KL(q || p), mode-seeking; +inf where q > 0 = p. Gu et al. 2024 (MiniLLM), arXiv:2306.08543."""
total_variation = Divergence("total_variation")
"""Half the L1 distance of p and q, in [0, 1]. Wen et al. 2023 (f-distill), arXiv:2307.15190."""
adaptive_kl = Divergence("adaptive_kl")
"""Forward and reverse KL weighted by the gap |p - q| on the teacher's head (most probable tokens
holding half its mass) and tail; the weights carry no gradient. Wu et al. 2024, arXiv:2404.02657."""


DEFAULTS = {
    name: Divergence(name, **definition.default)  # type: ignore[arg-type]
    for name, definition in DEFINITIONS.items()
    if definition.default is not None
}
"""What a name alone stands for."""


def resolve(divergence: str | Divergence) -> Divergence:
    """A divergence from its name (with its default parameters) or itself."""
    if isinstance(divergence, Divergence):
        return divergence
    if not isinstance(divergence, str) or divergence not in DEFINITIONS:
        raise ValueError(
            f"distillation_loss: divergence must be one of {', '.join(DEFINITIONS)} or a "
            f"kd.Divergence, got {divergence!r}."
        )
    if divergence not in DEFAULTS:
        raise ValueError(
            f"distillation_loss: divergence {divergence!r} must be given with its parameters, "
            f"for example divergence=kd.{divergence}(0.1)."
        )
    return DEFAULTS[divergence]
