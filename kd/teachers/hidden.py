"""Fill a hidden-state cache from a local model: exact targets, for disks that have the room."""

from __future__ import annotations

import os
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from kd.cache.hidden import Head, HiddenCache, HiddenWriter, hidden_meta
from kd.cache.writer import SHARD_TOKENS
from kd.progress import Progress
from kd.teachers.build import batches
from kd.teachers.data import token_ids
from kd.teachers.identity import teacher_identity
from kd.teachers.logits import LogitSource


def build_hidden_cache(
    model: Any,
    sequences: Iterable[Any],
    path: str | os.PathLike[str],
    *,
    tokenizer: Any = None,
    codec: str = "hidden_bf16",
    live_vocab: int | None = None,
    batch_tokens: int = 4096,
    shard_tokens: int = SHARD_TOKENS // 8,
    max_length: int | None = None,
    limit: int | None = None,
    progress: bool = True,
) -> HiddenCache:
    """Cache a local model's final hidden states, and its lm_head once; resumable.

    Args:
        model: a causal LM on its device whose logits are lm_head(hidden), perhaps scaled and
            softcapped; others are refused.
        sequences: as in build_cache; repeated ones are stored once.
        path: the cache's folder.
        tokenizer: its fingerprint is recorded, and its length is the live vocabulary.
        codec: "hidden_bf16" (2 H bytes a token) or "hidden_fp8" (H + 4).
        live_vocab, batch_tokens, shard_tokens, max_length, limit, progress: as in build_cache.

    Returns:
        The finished cache.
    """
    from kd.vocab import tokenizer_fingerprint

    source = LogitSource(model, 1)
    if source.head is None:
        raise ValueError(
            f"build_hidden_cache: model must have an lm_head, got {type(model).__name__}."
        )
    found, bias = source.reading, getattr(source.head, "bias", None)
    head = Head(
        source.head.weight[: found.width],
        None if bias is None else bias[: found.width],
        found.scale,
        found.softcap,
    )
    meta = hidden_meta(
        head,
        teacher=teacher_identity(model),
        tokenizer=tokenizer_fingerprint(tokenizer) if tokenizer is not None else {},
        live_vocab=live_vocab or (len(tokenizer) if tokenizer else head.weight.shape[0]),
        codec=codec,
    )
    most = max_length or getattr(model.config, "max_position_embeddings", None)
    was_training = model.training
    model.eval()
    try:
        with (
            Progress("teacher", unit="tokens", show=progress) as meter,
            HiddenWriter(path, meta, head, shard_tokens=shard_tokens) as writer,
        ):
            ids = token_ids(sequences, tokenizer)
            for batch in batches(ids, batch_tokens, limit, most):
                _store(source, writer, batch, meter)
    finally:
        model.train(was_training)
    return HiddenCache(Path(path))


def _store(source: LogitSource, writer: HiddenWriter, batch: list[Any], meter: Progress) -> None:
    """Compute a batch whole, and store the sequences of it that are missing."""
    missing = [tokens not in writer for tokens in batch]
    if any(missing):
        parts = source.hidden_rows(batch).split([len(tokens) for tokens in batch])
        for tokens, wanted, hidden in zip(batch, missing, parts, strict=True):
            if wanted:
                writer.add(tokens, hidden)
    meter.advance(sum(map(len, batch)), fresh=any(missing))
