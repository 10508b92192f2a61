"""The documents of a row of token ids: what the collator trains on and a capture stores."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from kd.traces.tokens import Rendered


def documents(row: Mapping[str, Any], where: str) -> list[Rendered]:
    """The documents of a row of ids: without its padding, a pack taken apart.

    Args:
        row: {input_ids[, labels][, attention_mask][, lengths][, position_ids]}.
        where: names the row in errors.

    Raises:
        ValueError: the columns contradict each other.
    """
    for name in ("seq_lengths", "cu_seq_lens_q", "cu_seq_lens_k"):
        if row.get(name) is not None:
            raise ValueError(
                f"{where}: the documents of a pack must be told by lengths, got {name}. Call the "
                "column lengths, and let it hold the tokens of each document."
            )
    ids = _numbers(row, "input_ids") or []
    columns = {name: _numbers(row, name) for name in ("labels", "attention_mask", "position_ids")}
    for name, values in columns.items():
        if values is not None and len(values) != len(ids):
            raise ValueError(
                f"{where}: {name} must be as long as input_ids, got {len(values)} and {len(ids)}."
            )
    labels, mask, positions = columns.values()
    told = _numbers(row, "lengths")
    keep = unpadded(mask, told is not None, where)
    ids, labels = ids[keep], (ids if labels is None else labels)[keep]
    positions = None if positions is None else positions[keep]
    found, start = [], 0
    for length in document_lengths(told, positions, len(ids), where):
        found.append(Rendered(ids[start : start + length], labels[start : start + length]))
        start += length
    return found


def unpadded(mask: Sequence[int] | None, packed: bool, where: str) -> slice:
    """The tokens between padding on the left and padding on the right; a pack has none."""
    if mask is None:
        return slice(0, None)
    found = [i for i, value in enumerate(mask) if value]
    start, end = (found[0], found[-1] + 1) if found else (0, 0)
    if not found or len(found) != end - start or any(value != 1 for value in mask[start:end]):
        raise ValueError(
            f"{where}: attention_mask must be 1 on one run of tokens and 0 on padding around it, "
            f"got {list(mask[:16])}. Mask tokens of the loss with -100 in labels; say where the "
            "documents of a pack end with lengths."
        )
    if packed and end - start < len(mask):
        raise ValueError(
            f"{where}: attention_mask must be all 1 in a pack, got padding. Remove it; the "
            "collator pads."
        )
    return slice(start, end)


def document_lengths(
    told: Sequence[int] | None, positions: Sequence[int] | None, size: int, where: str
) -> list[int]:
    """Lengths of a row's documents, from its lengths, its positions, or none of them."""
    if told is not None and (sum(told) != size or min(told, default=0) < 1):
        raise ValueError(
            f"{where}: lengths must be positive and add up to the row's {size} tokens, got "
            f"{list(told)}. Take them from the Pack."
        )
    if positions is None:
        return list(told or [size])
    starts = [i for i, position in enumerate(positions) if position == 0]
    found = [end - start for start, end in zip(starts, [*starts[1:], size], strict=False)]
    counted = [position for length in found for position in range(length)]
    if counted != list(positions) or list(told or found) != found:
        raise ValueError(
            f"{where}: position_ids must count from 0 in each document of lengths, got "
            f"{list(positions[:16])} and lengths {told}. Leave position_ids out."
        )
    return found


def _numbers(row: Mapping[str, Any], name: str) -> list[int] | None:
    values: Any = row.get(name)
    values = values.tolist() if hasattr(values, "tolist") else values
    return None if values is None else [int(value) for value in values]
