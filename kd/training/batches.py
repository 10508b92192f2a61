"""What a collated batch holds, by key, and how its targets are read.

``shift_labels`` [B, L], perhaps ``weights``, ``domain`` and ``token_class``; and each teacher's
part, tensors ``[B, L, ...]`` aligned with the student's rows: the fields of ``kd.TopK``
(``teacher_ids``, ``teacher_logprobs``, perhaps ``teacher_tail_log_partition``) from a cache of
sparse targets, ``teacher_hidden`` from a hidden-state cache (both put there by the collator) or
from a model in memory (put there by ``Teachers.forward``; logits where its lm_head is not a plain
matrix). The second teacher's keys end in ``_1``, and so on.
"""

from __future__ import annotations

import dataclasses
import json
import math
from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor

import kd

Target = kd.TopK | kd.Hidden | Tensor
STAMP = "teacher_stamp_"  # in a key's name, so that no GPU is waited for to read it
RECORD = "teacher_record"  # of a cache, as JSON in bytes: a loader moves tensors alone
FLAT_KEYS = ("cu_seq_lens_q", "cu_seq_lens_k", "max_length_q", "max_length_k")  # of one row
MODEL_KEYS = ("input_ids", "attention_mask", "position_ids", "inputs_embeds", *FLAT_KEYS)
TOKEN_KEYS = ("shift_labels", "weights", "domain", "token_class")
# A cache's answer by field, with what an empty row holds.
SPARSE = {"ids": -1, "logprobs": -math.inf, "tail_log_partition": 0.0}
HIDDEN = {"hidden": 0.0}


def keyed(name: str, number: int) -> str:
    """The batch's key of a teacher's part."""
    return name if number == 0 else f"{name}_{number}"


def top_k_of(
    flat: Mapping[str, Any], number: int, record: Mapping[str, Any], rule: str | None
) -> kd.TopK:
    """A cache's part of a batch, as the ``record`` says that it is to be read."""
    fields: dict[str, Any] = {n: flat.get(keyed(f"teacher_{n}", number)) for n in SPARSE}
    return kd.TopK(
        **fields,
        tail=record["tail"],
        temperature=record["temperature"],
        tail_temperatures=tuple(record["tail_temperatures"]),
        tail_at_temperature=rule,
    )


def record_entry(record: Mapping[str, Any], rows: int) -> Tensor:
    """A cache's record as an entry of a batch of so many rows, [rows, n] uint8."""
    text = torch.frombuffer(bytearray(json.dumps(record).encode()), dtype=torch.uint8)
    return text.repeat(rows, 1)


def record_in(batch: Mapping[str, Any]) -> dict[str, Any] | None:
    """The record of the first teacher's cache that a batch carries, or None."""
    text = batch.get(RECORD)
    return None if text is None else json.loads(bytes(text[0].tolist()))


def per_token(batch: Mapping[str, Any], change: Callable[[Tensor], Tensor]) -> dict[str, Any]:
    """A batch's targets with ``change`` made to every entry that has a value for each token.

    What belongs to the whole batch stays as it is; what is no target is left out.
    """
    found: dict[str, Any] = {}
    for key, value in batch.items():
        if value is None:
            continue
        if key.startswith((RECORD, STAMP)):
            found[key] = value
        elif isinstance(value, kd.Hidden) or key in TOKEN_KEYS or key.startswith("teacher_"):
            found[key] = mapped(value, change)
    return found


def mapped(said: Any, change: Callable[[Tensor], Tensor]) -> Any:
    """A teacher's answer with ``change`` made to its hidden states, or to its logits."""
    if isinstance(said, Tensor):
        return change(said)
    return dataclasses.replace(said, hidden=change(said.hidden))
