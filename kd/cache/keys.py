"""What a sequence is called in a cache: a hash of its token ids and of nothing else."""

from __future__ import annotations

import hashlib
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

KEY_BYTES = 16


def token_array(input_ids: Any, where: str) -> NDArray[np.int32]:
    """Token ids [L] as int32, from a tensor, an array or a list.

    Raises:
        TypeError: for anything that is not integers.
        ValueError: unless they are one-dimensional, at least one, and from 0 to 2**31 - 1.
    """
    if isinstance(input_ids, torch.Tensor):
        input_ids = input_ids.detach().cpu().numpy()
    found = np.asarray(input_ids)
    if found.ndim != 1:
        raise ValueError(
            f"{where}: input_ids must be one-dimensional [L], got shape {found.shape}. "
            "Pass one sequence at a time, without padding."
        )
    if len(found) == 0:
        raise ValueError(
            f"{where}: input_ids must hold at least one token, got a sequence of zero length. "
            "Drop empty sequences."
        )
    if found.dtype.kind not in "iu":
        raise TypeError(f"{where}: input_ids must be integers, got {found.dtype}.")
    if found.dtype != np.int32:
        low, high = int(found.min()), int(found.max())
        if low < 0 or high > 2**31 - 1:
            raise ValueError(
                f"{where}: input_ids must be from 0 to 2**31 - 1, got {low if low < 0 else high}. "
                "-100 marks labels, not inputs."
            )
    elif int(found.min()) < 0:
        raise ValueError(
            f"{where}: input_ids must be at least 0, got {int(found.min())}. "
            "-100 marks labels, not inputs."
        )
    return found.astype("<i4", copy=False)


def key_of(tokens: NDArray[np.int32]) -> bytes:
    """The first 16 bytes of SHA-256 over the ids as little-endian int32."""
    return hashlib.sha256(np.ascontiguousarray(tokens, "<i4").tobytes()).digest()[:KEY_BYTES]


def sequence_key(input_ids: Any) -> bytes:
    """The 16 bytes under which a sequence is found, whatever its position, batch or rank."""
    return key_of(token_array(input_ids, "sequence_key"))


def describe(tokens: NDArray[np.int32]) -> str:
    """A sequence for an error message: its key, length and first ids."""
    head = ", ".join(str(int(token)) for token in tokens[:6])
    dots = ", ..." if len(tokens) > 6 else ""
    return f"{key_of(tokens).hex()[:12]} ({len(tokens)} tokens: {head}{dots})"
