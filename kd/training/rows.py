"""One row of a data set as tensors, and the labels of a batch, which say that they are aligned.

Hugging Face's ``labels`` are the input's own tokens, shifted by the model inside its forward. Our
loss never shifts, so ``shift_labels[i]`` of a batch (transformers' name) is the token *after* token
i. A batch with ``labels`` alone may be either, and trained as it stands it would teach every token
itself: it is refused, whichever collator made it.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from kd.traces.documents import document_lengths, unpadded

IGNORE = -100
# Columns by which tokenizers and other trainers change what a model reads or trains; ignored, they
# would be wrong without a word.
REFUSED = re.compile(
    r"(.+_mask|.+_masks|token_type_ids|mm_token_type_ids|seq_lengths|shift_labels|inputs_embeds"
    r"|pixel_values.*|image_.*|decoder_.*|encoder_.*|cu_seq_lens.*|label|label_ids)"
)
FIXES = {
    "seq_lengths": "Call the column lengths",
    "shift_labels": "Give the row's own tokens as labels; the collator shifts them",
    "completion_mask": "Put -100 into labels where it is 0 and remove it",
    "assistant_masks": "Put -100 into labels where it is 0 and remove it",
    "token_type_ids": "Tokenize with return_token_type_ids=False",
}


@dataclass(frozen=True)
class Row:
    """A row without padding.

    Attributes:
        input_ids: [L] int64.
        labels: [L] int64, not shifted.
        weights: [L] float32, or None where the row has none.
        lengths: of its documents; they add up to L.
        packed: whether the row says that it holds documents.
    """

    input_ids: Tensor
    labels: Tensor
    weights: Tensor | None
    lengths: list[int]
    packed: bool


def read_row(row: Mapping[str, Any], number: int) -> Row:
    """Read a row and refuse what would be ignored or is contradictory.

    Args:
        row: {input_ids, labels[, weights][, lengths][, attention_mask][, position_ids]}; columns
            that are no input of a model (ids, texts, domains) may be there too.
        number: its place in the batch, for errors.
    """
    where = f"got row {number} of the batch with"
    missing = [name for name in ("input_ids", "labels") if row.get(name) is None]
    if missing:
        raise ValueError(
            f"DistillationCollator: rows must have input_ids and labels, {where} "
            f"{sorted(map(str, row))} and no {' or '.join(missing)}. Tokenize and render them "
            "first (kd.traces.render); labels are the row's own tokens, -100 where nothing is "
            "trained."
        )
    for name in row:
        if name != "attention_mask" and REFUSED.fullmatch(str(name)) and row[name] is not None:
            raise ValueError(
                f"DistillationCollator: rows must have no column that would be ignored, {where} "
                f"{name}. {FIXES.get(name, 'Remove the column')}."
            )
    ids = torch.as_tensor(row["input_ids"], dtype=torch.long)
    if ids.ndim != 1 or not len(ids):
        raise ValueError(
            f"DistillationCollator: input_ids must be a list of at least one token, {where} shape "
            f"{list(ids.shape)}. Give one sequence a row and drop empty ones."
        )
    labels = _per_token(row, "labels", ids, torch.long, where)
    weights = _per_token(row, "weights", ids, torch.float, where)
    positions = _per_token(row, "position_ids", ids, torch.long, where)
    mask = _per_token(row, "attention_mask", ids, torch.long, where)
    told = None if row.get("lengths") is None else [int(length) for length in row["lengths"]]
    name = f"DistillationCollator: row {number} of the batch"
    keep = unpadded(None if mask is None else mask.tolist(), told is not None, name)
    if weights is not None and not bool(((weights >= 0) & weights.isfinite()).all()):
        raise ValueError(
            f"DistillationCollator: weights must be finite and at least 0, {where} "
            f"{weights.min().item():g} to {weights.max().item():g}. Use 0 to leave a token out."
        )
    ids, labels = ids[keep], labels[keep]
    weights = None if weights is None else weights[keep]
    places = None if positions is None else positions[keep].tolist()
    _check_shift(ids, labels, where)
    lengths = document_lengths(told, places, len(ids), name)
    return Row(ids, labels, weights, lengths, told is not None or len(lengths) > 1)


def _per_token(
    row: Mapping[str, Any], name: str, ids: Tensor, dtype: torch.dtype, where: str
) -> Any:
    if row.get(name) is None:
        return None
    values = torch.as_tensor(row[name]).to(dtype)
    if values.shape != ids.shape:
        size = len(values) if values.ndim == 1 else list(values.shape)
        raise ValueError(
            f"DistillationCollator: {name} must be as long as input_ids, got "
            f"{size} and {len(ids)}, {where[4:]} them. Mask tokens with -100 in labels instead of "
            "dropping them."
        )
    return values


def _check_shift(ids: Tensor, labels: Tensor, where: str) -> None:
    """Refuse labels that were shifted already: they are the next tokens and not the row's own."""
    trained = labels != IGNORE
    if bool((labels == ids)[trained].all()):
        return
    inside = trained[:-1]
    if bool(inside.any()) and bool((labels[:-1] == ids[1:])[inside].all()):
        raise ValueError(
            "DistillationCollator: labels must be the row's own tokens (-100 where nothing is "
            f"trained), {where} labels that are the next tokens. The collator shifts them; do not "
            "shift them before."
        )


def aligned_labels(batch: Mapping[str, Any], asked: str = "compute_loss") -> Tensor:
    """A batch's ``shift_labels`` [B, L] (or flat [N]), int64, -100 where nothing is trained.

    Args:
        batch: what a collator made.
        asked: the function the error speaks of.

    Raises:
        ValueError: the batch has no ``shift_labels``, or has ``labels`` too and they contradict.
    """
    found = batch.get("shift_labels")
    if found is None:
        raise ValueError(
            f"{asked}: batch must hold shift_labels (shift_labels[i] is the token after token i), "
            f"got {sorted(batch)}. Collate the rows with kd.training.DistillationCollator("
            "pad_token_id), which shifts their labels, or shift a batch by hand: "
            "batch['shift_labels'] = torch.nn.functional.pad(batch.pop('labels')[:, 1:], (0, 1), "
            "value=-100)."
        )
    given = batch.get("labels")
    if given is None:
        return found
    here = "shift_labels must be labels moved by one to the left"
    fix = "Leave labels out of the batch."
    if found.shape != given.shape or given.ndim < 2:
        raise ValueError(
            f"{asked}: {here}, got shapes {list(found.shape)} and {list(given.shape)}. {fix}"
        )
    # Fewer trained tokens are no contradiction: the first after a document's border is none.
    moved = torch.nn.functional.pad(given[..., 1:], (0, 1), value=IGNORE).to(found.device)
    wrong = (found != IGNORE) & (found != moved)
    if bool(wrong.any()):
        row, at = (int(i) for i in wrong.nonzero()[0])
        raise ValueError(
            f"{asked}: {here}, got shift_labels {int(found[row, at])} and labels "
            f"{int(moved[row, at])} for the token after position {at} of row {row}. {fix}"
        )
    return found


def trained_weight(labels: Tensor, weights: Tensor | None = None) -> Tensor:
    """How many tokens count, or their weights' sum: what a mean over tokens divides by."""
    trained = labels != IGNORE
    return (trained if weights is None else weights * trained).sum().float()
