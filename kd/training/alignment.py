"""Labels that say they are aligned: ``shift_labels``, as transformers calls them.

Hugging Face's ``labels`` are the input's own tokens, shifted by the model inside its forward. Our
loss never shifts, so ``shift_labels[i]`` of a batch is the token *after* token i. A batch with
``labels`` alone may be either, and trained as it stands it would teach every token itself: it is
refused, whichever collator made it.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

IGNORE = -100


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
    if given is not None:
        _check_agreement(found, given, asked)
    return found


def _check_agreement(found: Tensor, given: Tensor, asked: str) -> None:
    """Refuse ``labels`` (unshifted, as transformers') that ``shift_labels`` is not the shift of.

    Fewer trained tokens are no contradiction: the first token after a document's border is none.
    """
    here = "shift_labels must be labels moved by one to the left"
    fix = "Leave labels out of the batch."
    if found.shape != given.shape or given.ndim < 2:
        raise ValueError(
            f"{asked}: {here}, got shapes {list(found.shape)} and {list(given.shape)}. {fix}"
        )
    moved = torch.nn.functional.pad(given[..., 1:], (0, 1), value=IGNORE).to(found.device)
    wrong = (found != IGNORE) & (found != moved)
    if bool(wrong.any()):
        row, at = (int(i) for i in wrong.nonzero()[0])
        raise ValueError(
            f"{asked}: {here}, got shift_labels {int(found[row, at])} and labels "
            f"{int(moved[row, at])} for the token after position {at} of row {row}. {fix}"
        )
