"""kd: distil large language models from their logits, with a loss you can trust.

The losses need torch alone; it, Triton, transformers and a GPU are loaded on first use.
"""

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
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


def __getattr__(name: str) -> Any:
    """The losses, and torch with them, when one is first asked for: ``kd --help`` is not kept."""
    if name not in __all__ and name != "losses":
        raise AttributeError(f"module 'kd' has no attribute {name!r}")
    losses = importlib.import_module("kd.losses")
    found = globals()[name] = losses if name == "losses" else getattr(losses, name)
    return found


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
