"""The exact tier: final hidden states for every token, and the teacher's lm_head once.

The student's loss multiplies them again, so that targets are the teacher's whole distribution at
any temperature. It takes H bytes (fp8) or 2 H bytes (bf16) a token instead of about a hundred.
"""

from __future__ import annotations

import hashlib
import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors.torch import load as load_tensors
from safetensors.torch import save as save_tensors
from torch import Tensor

from kd.cache.keys import describe, token_array
from kd.cache.meta import CODEC_NAMES, CacheMeta
from kd.cache.reader import CacheReader
from kd.cache.rows import Rows
from kd.cache.writer import CacheWriter
from kd.files import write_whole

HEAD = "lm_head.safetensors"


@dataclass(frozen=True)
class Head:
    """An lm_head: weight [V, H], bias [V] or None, and what the model does to its logits.

    ``logit_scale`` and ``softcap`` are those of ``kd.Hidden``.
    """

    weight: Tensor
    bias: Tensor | None = None
    logit_scale: float | None = None
    softcap: float | None = None

    def to_bytes(self) -> bytes:
        """The same head gives the same bytes."""
        tensors = {"weight": self.weight.detach().cpu().contiguous()}
        if self.bias is not None:
            tensors["bias"] = self.bias.detach().cpu().contiguous()
        return save_tensors(tensors)


@dataclass(frozen=True)
class HiddenTargets(Head):
    """A teacher's hidden states with the head that reads them, as ``kd.Hidden`` takes them.

    Attributes:
        hidden: [L, H] or [B, L, H] in the head's dtype; zeros in padding.
        live_vocab: the loss's ``vocab_size``.
    """

    hidden: Tensor = field(kw_only=True)
    live_vocab: int = field(kw_only=True)


def hidden_meta(
    head: Head,
    *,
    teacher: Mapping[str, Any],
    tokenizer: Mapping[str, Any],
    live_vocab: int,
    codec: str = "hidden_bf16",
) -> CacheMeta:
    """The identity of a hidden-state cache; the lm_head's checksum is part of it."""
    codecs = [name for name in CODEC_NAMES if name.startswith("hidden")]
    if codec not in codecs:
        raise ValueError(f"hidden_meta: codec must be one of {', '.join(codecs)}, got {codec!r}.")
    return CacheMeta(
        teacher=teacher,
        tokenizer=tokenizer,
        live_vocab=live_vocab,
        padded_vocab=head.weight.shape[0],
        top_k=live_vocab,
        selection="hidden",
        codec=codec,
        selection_options={
            "hidden_size": head.weight.shape[1],
            "head_sha256": hashlib.sha256(head.to_bytes()).hexdigest(),
            "logit_scale": head.logit_scale,
            "softcap": head.softcap,
        },
    )


class HiddenWriter(CacheWriter):
    """A CacheWriter of hidden states: resumable, atomic and checked in the same way.

    Args:
        path, shard_tokens, rank, world_size: as in CacheWriter.
        meta: from ``hidden_meta``.
        head: the lm_head, stored once beside the shards.
    """

    def __init__(
        self, path: str | os.PathLike[str], meta: CacheMeta, head: Head, **options: Any
    ) -> None:
        super().__init__(path, meta, **options)
        self.head = head

    def __enter__(self) -> HiddenWriter:
        super().__enter__()
        if not self.read_only and not (self.path / HEAD).exists():
            write_whole(self.path / HEAD, self.head.to_bytes(), replace=True)
        return self

    def add(self, input_ids: Any, hidden: Any, *rest: Any) -> None:
        """Store a sequence's final hidden states [L, H]: row i predicts the token after token i."""
        tokens = token_array(input_ids, "HiddenWriter.add")
        size = self.meta.selection_options["hidden_size"]
        values = torch.as_tensor(hidden).detach().float().cpu().numpy()
        if rest or values.shape != (len(tokens), size):
            raise ValueError(
                f"HiddenWriter.add: hidden must be [L, H] = {(len(tokens), size)}, got "
                f"{values.shape} for sequence {describe(tokens)}."
            )
        bad = ~np.isfinite(values).all(1)
        if bad.any():
            raise ValueError(
                f"HiddenWriter.add: hidden must be finite, got NaN or infinity in row "
                f"{int(bad.argmax())} of sequence {describe(tokens)}. Nothing of it was stored."
            )
        lengths, counts = np.array([len(tokens)]), np.full(len(tokens), size, np.int32)
        no_ids = np.zeros(0, np.int32)
        self.add_rows(Rows(lengths, counts, no_ids, values.reshape(-1), tokens=tokens))


class HiddenCache(CacheReader):
    """A hidden-state cache, with TeacherCache's interface: lookup, batch, packed, ``in``, len.

    Arguments are those of TeacherCache. The lm_head is read, and compared with its checksum, when
    targets are first asked for.
    """

    _head: Head | None = None

    @property
    def head(self) -> Head:
        """The teacher's lm_head."""
        if self._head is None:
            options = self.meta.selection_options
            if not (self.path / HEAD).exists():
                raise FileNotFoundError(
                    f"HiddenCache: {HEAD} must be in {self.path}, got no such file. Restore it."
                )
            data = (self.path / HEAD).read_bytes()
            found = hashlib.sha256(data).hexdigest()
            if found != options["head_sha256"]:
                raise ValueError(
                    f"HiddenCache: {HEAD} must have SHA-256 {options['head_sha256']}, got {found}. "
                    "It changed on disk: restore it, or run the capture again."
                )
            tensors = load_tensors(data)
            self._head = Head(
                tensors["weight"],
                tensors.get("bias"),
                options["logit_scale"],
                options["softcap"],
            )
        return self._head

    def lookup(self, input_ids: Any) -> HiddenTargets:
        """The hidden states of one sequence, [L, H]."""
        tokens = token_array(input_ids, "HiddenCache.lookup")
        values = self.rows_of([tokens]).logprobs.reshape(len(tokens), -1)
        return self._targets(torch.from_numpy(np.array(values)))

    def batch(self, sequences: Sequence[Any], length: int) -> HiddenTargets:
        """Several sequences, padded on the right with zeros: [B, length, H]."""
        return self.packed([[sequence] for sequence in sequences], length)

    def packed(self, packs: Sequence[Sequence[Any]], length: int) -> HiddenTargets:
        """Packed rows, each of several sequences end to end: [B, length, H]."""
        sequences, at = self.packed_places(packs, length)
        size = int(self.meta.selection_options["hidden_size"])
        out = torch.zeros(len(packs) * length, size)
        rows = self.rows_of(sequences)
        at = at[rows.counts > 0]  # a sequence that was skipped has no rows
        out[torch.from_numpy(at)] = torch.from_numpy(rows.logprobs.reshape(-1, size))
        return self._targets(out.view(len(packs), length, size))

    def _targets(self, hidden: Tensor) -> HiddenTargets:
        head, live = self.head, self.meta.live_vocab
        return HiddenTargets(**vars(head), hidden=hidden.to(head.weight.dtype), live_vocab=live)

    def _check_tier(self) -> None:
        if not self.meta.hidden:
            raise ValueError(
                f"HiddenCache: {self.path} must hold hidden states, got sparse targets. Open it "
                "with kd.cache.TeacherCache."
            )

    @staticmethod
    def exists(path: str | os.PathLike[str]) -> bool:
        """Whether a folder holds a hidden-state cache."""
        return (Path(path) / HEAD).exists()
