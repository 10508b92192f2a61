"""Packed documents stay apart, or the batch is refused: measured once for each model.

Position ids that start again within a row say where documents begin. Whether a model heeds them
depends on its architecture (recurrent layers and ALiBi do not) and on its attention implementation
(flash attention looks for borders in a batch of one row only), so it is measured, on the form of
batch that is trained: several rows, position ids, no attention mask.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from kd.heads import causal_lm, text_config
from kd.traces import isolates_documents
from kd.training.batches import RECORD, STAMP
from kd.training.teachers import Teachers

# They read borders in every row of a batch; any other (flash) reads them in a single row only.
SEVERAL_ROWS = ("eager", "sdpa", "flex_attention", None)
SHARDED = ("FSDPModule", "FullyShardedDataParallel")


def documents_apart(
    model: Any, batch: Mapping[str, Any], teachers: Teachers | None = None
) -> Mapping[str, Any]:
    """The batch in the form in which every model of it keeps packed documents apart.

    Args:
        model: the student, bare or wrapped.
        batch: what a collator made; ``input_ids`` [B, L].
        teachers: those whose models in memory read the batch too.

    Returns:
        The batch itself, or, where it holds packs and a model uses flash attention, all its rows
        in one (``flattened``).

    Raises:
        TypeError: the batch holds packs, and a model mixes their documents.
        ValueError: the batch says where documents begin in a way that not all models read.
    """
    models = [("the student", model)]
    for member in () if teachers is None else teachers.members:
        if member.kind == "model":
            models.append(("a teacher", member.source))
    device = batch["input_ids"].device
    flat = any(_attention(one)[-1] not in SEVERAL_ROWS for _, one in models)
    for _, one in models:  # a forward of sharded weights needs every rank, packs or not
        if _kept(one, flat) is None and _sharded(one):
            _measure(one, flat, device)
    positions, mask = batch.get("position_ids"), batch.get("attention_mask")
    _check_borders(batch)
    known = [_kept(one, flat) for _, one in models]
    if positions is None or (not flat and mask is None and all(kept == ("",) for kept in known)):
        return batch
    if not _restarts(positions, mask):
        return batch
    _check_form(batch, positions, mask)
    for role, one in models:
        (trouble,) = _kept(one, flat) or _measure(one, flat, device)
        if trouble:
            raise TypeError(_refusal(role, one, trouble))
    return flattened(batch) if flat and batch.get("cu_seq_lens_q") is None else batch


def flattened(batch: Mapping[str, Any]) -> dict[str, Any]:
    """A batch of packs [B, L] as one row [1, B * L], with its borders as ``cu_seq_lens_q`` etc.

    Every entry [B, L, ...] is flattened alike; padding is a document of its own.
    """
    rows, length = batch["input_ids"].shape
    made: dict[str, Any] = {}
    for key, value in batch.items():
        if key.startswith((RECORD, STAMP)):  # the same in every row
            made[key] = value[:1]
        elif isinstance(value, Tensor) and value.shape[:2] == (rows, length):
            made[key] = value.flatten(0, 1)[None]
        else:
            made[key] = value
    starts = torch.nn.functional.pad(_borders(batch["position_ids"]), (1, 0), value=True)
    at = starts.flatten().nonzero()[:, 0]
    borders = torch.cat([at, at.new_tensor([rows * length])]).int()
    longest = int(borders.diff().max())
    made |= {"cu_seq_lens_q": borders, "cu_seq_lens_k": borders}
    return made | {"max_length_q": longest, "max_length_k": longest}


def _borders(positions: Tensor) -> Tensor:
    """Where a document begins behind another: [..., L - 1]."""
    return positions.diff(dim=-1) != 1


def _restarts(positions: Tensor, mask: Tensor | None) -> bool:
    found = _borders(positions)
    if mask is not None and mask.dim() == 2:  # positions of padding mean nothing
        found = found & (mask[:, 1:] != 0) & (mask[:, :-1] != 0)
    return bool(found.any())


def _check_borders(batch: Mapping[str, Any]) -> None:
    borders, positions = batch.get("cu_seq_lens_q"), batch.get("position_ids")
    if borders is None:
        return
    if positions is None or bool(positions.flatten()[borders[:-1].long()].any()):
        raise ValueError(
            "compute_loss: position_ids must start at 0 in every document of cu_seq_lens_q, got "
            f"{'none' if positions is None else 'others'}. Count them so: only flash attention "
            "reads cu_seq_lens_q."
        )


def _check_form(batch: Mapping[str, Any], positions: Tensor, mask: Tensor | None) -> None:
    if mask is not None:
        raise ValueError(
            "compute_loss: attention_mask must be left out where position_ids start again within "
            f"a row, got one of shape {list(mask.shape)}. With a mask, transformers takes a row "
            "for a single sequence; make padding a document of its own, as DistillationCollator "
            "does with rows that have lengths."
        )
    if positions.shape != batch["input_ids"].shape:
        raise ValueError(
            "compute_loss: position_ids of packs must have the shape of input_ids, got "
            f"{list(positions.shape)} for {list(batch['input_ids'].shape)}. Expand them."
        )


def _bare(model: Any) -> Any:
    """The model inside DDP, an engine or torch.compile."""
    for name in ("_orig_mod", "module"):
        if hasattr(model, name):
            return _bare(getattr(model, name))
    return model


def _attention(model: Any) -> tuple[str | None, ...]:
    """The attention implementations that a model and its text part name, the latter last."""
    config: Any = getattr(causal_lm(_bare(model)), "config", None)
    return tuple(getattr(c, "_attn_implementation", None) for c in (config, text_config(config)))


def _kept(model: Any, flat: bool) -> tuple[str] | None:
    """What was measured: ("",) for a model that keeps documents apart, (why not,), or None."""
    found = vars(causal_lm(_bare(model))).get("_kd_packs", {})
    return found.get((_attention(model), flat))


def _measure(model: Any, flat: bool, device: torch.device) -> tuple[str]:
    """Measure and keep; a sharded model through its wrapper, whose hooks bring the weights."""
    bare = _bare(model)
    try:
        if _sharded(model):
            apart = isolates_documents(model, flat=flat, device=device)
        else:
            apart = isolates_documents(bare, flat=flat)
        trouble = "" if apart else "the logits of a document change with the one before it"
    except torch.OutOfMemoryError:
        raise
    except (AttributeError, IndexError, KeyError, RuntimeError, TypeError, ValueError) as error:
        trouble = f"a forward of packs failed: {' '.join(str(error).split())[:200]}"
    causal = causal_lm(bare)
    kept = vars(causal).setdefault("_kd_packs", {})
    kept[_attention(model), flat] = (trouble,)
    return (trouble,)


def _sharded(model: Any) -> bool:
    """Whether a forward needs other ranks: FSDP, or parameters of ZeRO-3 or that are DTensor."""
    if not (torch.distributed.is_available() and torch.distributed.is_initialized()):
        return False
    kinds = {kind.__name__ for module in model.modules() for kind in type(module).__mro__}
    return not kinds.isdisjoint(SHARDED) or any(
        hasattr(parameter, "ds_id") or hasattr(parameter, "full_tensor")
        for parameter in model.parameters()
    )


def _refusal(role: str, model: Any, trouble: str) -> str:
    name, attention = type(causal_lm(_bare(model))).__name__, _attention(model)[-1]
    return (
        f"compute_loss: model must keep the documents of a pack apart, got {role} {name} with "
        f"attn_implementation={attention!r}: {trouble}. Train it unpacked, one document a row, or "
        "load it with another attn_implementation."
    )
