"""The losses. Read divergences.py (the algebra), then objective.py (the public functions), then
reference.py (the float64 oracle), then torch_backend.py and rows.py (how it is computed)."""

from kd.losses.checks import check
from kd.losses.divergences import (
    Divergence,
    adaptive_kl,
    alpha_beta,
    forward_kl,
    jsd,
    reverse_kl,
    skew_forward_kl,
    skew_reverse_kl,
    total_variation,
)
from kd.losses.inputs import Hidden, TopK
from kd.losses.objective import cross_entropy, distillation_loss
from kd.losses.tensor_parallel import vocab_parallel_loss

__all__ = [
    "Divergence",
    "Hidden",
    "TopK",
    "adaptive_kl",
    "alpha_beta",
    "check",
    "cross_entropy",
    "distillation_loss",
    "forward_kl",
    "jsd",
    "reverse_kl",
    "skew_forward_kl",
    "skew_reverse_kl",
    "total_variation",
    "vocab_parallel_loss",
]
