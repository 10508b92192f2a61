"""Who the teacher is: enough to notice another revision, quantisation or adapter."""

from __future__ import annotations

import hashlib
import json
import os
from typing import Any

import torch

# Fields of a config that change without the model changing.
VOLATILE = (
    "_name_or_path",
    "_commit_hash",
    "_attn_implementation_autoset",
    "architectures",
    "dtype",
    "torch_dtype",
    "transformers_version",
    "use_cache",
)
SAMPLES = 32  # values of each weight that enter the hash


def teacher_identity(model: Any) -> dict[str, Any]:
    """What a cache records about a transformers model.

    Returns:
        {"id", "revision", "class", "config_hash", "weights_hash", "dtype", "attention",
        "quantization", "adapters"}; a local folder's id is its name without the path.
    """
    config = model.config
    name = str(getattr(config, "_name_or_path", "") or type(model).__name__)
    described = config.to_dict()
    quantization = described.get("quantization_config")
    if hasattr(quantization, "to_dict"):
        quantization = quantization.to_dict()
    settings = {key: value for key, value in described.items() if key not in VOLATILE}
    return {
        "id": os.path.basename(name.rstrip("/")) if os.path.isdir(name) else name,
        "revision": getattr(config, "_commit_hash", None),
        "class": type(model).__name__,
        "config_hash": _hash(json.dumps(settings, sort_keys=True, default=str).encode()),
        "weights_hash": weights_hash(model),
        "dtype": str(_dtype(model)).removeprefix("torch."),
        "attention": getattr(config, "_attn_implementation", None),
        "quantization": (quantization or {}).get("quant_method") if quantization else None,
        "adapters": sorted(getattr(model, "peft_config", None) or {}),
    }


def weights_hash(model: Any) -> str:
    """A hash of evenly spaced values of every weight: tells revisions and adapters apart."""
    state = hashlib.sha256()
    for name, weight in sorted(model.named_parameters()):
        weight = weight.detach()
        weight = weight.full_tensor() if hasattr(weight, "full_tensor") else weight
        state.update(f"{name} {tuple(weight.shape)} {weight.dtype}".encode())
        if weight.device.type == "meta" or weight.numel() == 0:
            continue
        flat = weight.reshape(-1)
        at = torch.linspace(0, len(flat) - 1, min(SAMPLES, len(flat)), dtype=torch.float64)
        values = flat[at.long().to(flat.device)].cpu().contiguous()
        state.update(values.view(torch.uint8).numpy().tobytes())
    return state.hexdigest()[:16]


def _dtype(model: Any) -> torch.dtype:
    found = getattr(model, "dtype", None)
    return found if isinstance(found, torch.dtype) else next(model.parameters()).dtype


def _hash(data: bytes) -> str:
    return hashlib.sha256(data).hexdigest()[:16]
