"""kd: distil large language models from their logits, with a loss you can trust.

The losses need torch alone; it, Triton, transformers and a GPU are loaded on first use.
"""

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from kd.losses import *  # noqa: F403

__version__ = "0.1.0"


def __getattr__(name: str) -> Any:
    """The losses, and torch with them, when one is first asked for: ``kd --help`` is not kept."""
    if name == "__all__":
        return sorted([*importlib.import_module("kd.losses").__all__, "__version__"])
    if not name.startswith("_"):
        losses = importlib.import_module("kd.losses")
        if name == "losses" or name in losses.__all__:
            found = globals()[name] = losses if name == "losses" else getattr(losses, name)
            return found
    raise AttributeError(f"module 'kd' has no attribute {name!r}")


def __dir__() -> list[str]:
    return sorted({*globals(), *importlib.import_module("kd.losses").__all__})
