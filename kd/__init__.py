"""kd: distil large language models from their logits, with a loss you can trust.

``import kd`` needs torch alone; Triton, transformers and a GPU are loaded on first use.
"""

from kd.losses import (
    Divergence,
    Hidden,
    TopK,
    adaptive_kl,
    alpha_beta,
    check,
    cross_entropy,
    distillation_loss,
    forward_kl,
    jsd,
    reverse_kl,
    skew_forward_kl,
    skew_reverse_kl,
    total_variation,
    vocab_parallel_loss,
)

__version__ = "0.1.0"

__all__ = [
    "Divergence",
    "Hidden",
    "TopK",
    "__version__",
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
