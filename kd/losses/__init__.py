"""The losses. Read divergences.py (the algebra), then api.py (the public functions), then oracle.py
(the float64 oracle), then fused.py and rows_torch.py (how it is computed)."""

from kd.losses import divergences
from kd.losses.api import cross_entropy, distillation_loss
from kd.losses.checks import check
from kd.losses.divergences import *  # noqa: F403
from kd.losses.inputs import Hidden, TopK
from kd.losses.tensor_parallel import vocab_parallel_loss

__all__ = ["Hidden", "TopK", "check", "cross_entropy", "distillation_loss", "vocab_parallel_loss"]
__all__ += divergences.__all__
