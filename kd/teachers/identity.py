"""Who the teacher is: it and its tokenizer, and what notices another revision or adapter."""

from __future__ import annotations

import hashlib
import json
import os
from pathlib import Path
from typing import Any

import torch

from kd.models import load_model, load_tokenizer

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


def load_teacher(
    name: str | Path,
    *,
    revision: str | None = None,
    dtype: str = "auto",
    device: str | None = None,
    tokenizer: str | Path | None = None,
) -> tuple[Any, Any]:
    """A teacher, and the tokenizer that renders its data.

    Args:
        name: a transformers model: a hub id or a folder.
        revision: of the teacher on the hub.
        dtype: "auto" (the checkpoint's own), "float32", "bfloat16" or "float16".
        device: the GPU where there is one when None.
        tokenizer: whose chat template renders the data, when not the teacher's own: it must have
            the same vocabulary.

    Returns:
        The model in evaluation mode, and the tokenizer; None in its place where the teacher's
        folder has none.

    Raises:
        OSError: one of them cannot be loaded.
        ValueError: the tokenizer has another vocabulary than the teacher's own.
    """
    kind = dtype if dtype == "auto" else getattr(torch, dtype)
    model = load_model(name, on=device, revision=revision, dtype=kind).eval()
    own = load_tokenizer(name, revision=revision) if _has_tokenizer(Path(name)) else None
    if tokenizer is None:
        return model, own
    other = load_tokenizer(tokenizer)
    if own is not None:
        _refuse_other_ids(own, other)
    return model, other


def _has_tokenizer(folder: Path) -> bool:
    """False where a folder has no files of one: transformers would make it up."""
    return not folder.is_dir() or any(
        path.name.startswith(("tokenizer", "vocab", "spiece")) or path.suffix == ".tiktoken"
        for path in folder.iterdir()
    )


def _refuse_other_ids(teacher: Any, student: Any) -> None:
    from kd.vocab import vocabulary_diff

    diff = vocabulary_diff(teacher, student)
    added = [token for _, token, ours in diff.special if ours is None]  # the teacher's own
    if diff.ordinary or diff.probes or len(added) < len(diff.special):
        raise ValueError(
            "load_teacher: tokenizer must have the teacher's vocabulary, and may differ in its "
            f"chat template alone, got\n{diff}\nCapture with the teacher's own and translate the "
            "cache (kd.teachers.translate), as the recipe r1_to_qwen does."
        )
