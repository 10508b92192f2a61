"""Fill a cache from a local model: every sequence once, in batches of like length."""

from __future__ import annotations

import os
from collections.abc import Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from kd.cache import CacheMeta, CacheWriter, TeacherCache
from kd.cache.codecs import default_options
from kd.cache.keys import describe, key_of, token_array
from kd.cache.tails import DEFAULT as DEFAULT_TAIL_TEMPERATURES
from kd.cache.writer import SHARD_TOKENS
from kd.heads import reading
from kd.progress import Progress
from kd.teachers.data import token_ids
from kd.teachers.identity import teacher_identity
from kd.teachers.logits import LogitSource
from kd.teachers.selection import Selection, bad_rows

WINDOW = 1024  # sequences that are sorted by length together
# Rounding must not bias what was drawn.
DEFAULT_CODECS = {"sampled": "counts", "hybrid": "log8"}
ON_BAD_ROWS = ("error", "drop", "mask")


def build_cache(
    model: Any,
    sequences: Iterable[Any],
    path: str | os.PathLike[str],
    *,
    tokenizer: Any = None,
    top_k: int = 32,
    temperature: float = 1.0,
    selection: Selection | str | None = None,
    codec: str | None = None,
    codec_options: Mapping[str, Any] | None = None,
    tail_temperatures: Sequence[float] | str | None = "auto",
    realised: bool = True,
    live_vocab: int | None = None,
    batch_tokens: int = 4096,
    shard_tokens: int = SHARD_TOKENS,
    max_length: int | None = None,
    limit: int | None = None,
    on_bad_rows: str = "error",
    source: Mapping[str, Any] | None = None,
    progress: bool = True,
) -> TeacherCache:
    """Cache a local transformers model's likeliest tokens after every token of every sequence.

    Run again with the same arguments it continues where it was stopped; sequences that are stored
    already cost nothing. Under ``accelerate launch`` or ``torchrun`` every rank computes its share
    of the batches into shards of its own. How sequences are batched depends on the list alone, so
    a resumed or distributed run stores what an uninterrupted one would.

    Args:
        model: a causal LM in eval mode on its device.
        sequences: one-dimensional integer token ids, unpadded, or what else
            ``kd.traces.render_rows`` takes (traces, ``messages``, texts, packs), which is rendered
            with ``tokenizer``; repeated ones are stored once.
        path: the cache's folder.
        tokenizer: its fingerprint is recorded, and its length is the live vocabulary.
        top_k: tokens kept in each row.
        temperature: divides the logits before the softmax.
        selection: which tokens are kept: "top_k" (the default), "top_p", "sampled", "hybrid", or
            a ``kd.teachers.Selection`` with its settings (its top_k counts then).
        codec: how rows are stored: "compact", "log8", "float32" (lossless) or "counts". When
            None: "counts" for "sampled", "log8" for "hybrid", "compact" for the others.
        codec_options: {"levels": n} of "compact": steps of sqrt(p), more is finer. By default as
            many as keep its KL error below 1e-3 nats: 110 up to 64 tokens a row, 339 at 512.
        tail_temperatures: where the tail's log-partition is stored beside the tokens, three to
            four bytes a token, so that a loss at any temperature between has the tail's mass
            (kd.TopK). "auto": 7 temperatures from 1 to 4 for "top_k" and "top_p", none for the
            selections without a tail. None or (): not at all.
        realised: store in every row the log-prob of the token that followed, in about a byte
            (``cache.realised(input_ids)``).
        live_vocab: tokens that exist, when there is no tokenizer; the lm_head's rows when None.
        batch_tokens: padded tokens in a forward pass.
        shard_tokens: tokens in a shard: what a killed run loses at most.
        max_length: longer sequences are refused; the model's own limit when None.
        limit: use only the first so many sequences.
        on_bad_rows: for a NaN or +inf logit: "error" (names sequence and row), "drop" the
            sequence, or "mask" the row (it stores nothing); the latter two are counted.
        source: what the sequences are of, for the manifest: {"data": a name, ...}.
        progress: show tokens/s and the time left.

    Returns:
        The finished cache.
    """
    if on_bad_rows not in ON_BAD_ROWS:
        raise ValueError(
            f"build_cache: on_bad_rows must be one of {', '.join(ON_BAD_ROWS)}, got "
            f"{on_bad_rows!r}."
        )
    meta = cache_meta(
        model,
        tokenizer=tokenizer,
        live_vocab=live_vocab,
        top_k=top_k,
        temperature=temperature,
        selection=selection,
        codec=codec,
        codec_options=codec_options,
        tail_temperatures=tail_temperatures,
        realised=realised,
    )
    rank, world = int(os.environ.get("RANK", "0")), int(os.environ.get("WORLD_SIZE", "1"))
    was_training = model.training
    model.eval()
    try:
        with (
            Progress("teacher", _total(sequences, limit), unit="tokens", show=progress) as meter,
            CacheWriter(
                path,
                meta,
                shard_tokens=shard_tokens,
                rank=rank,
                world_size=world,
                sources=() if source is None else (source,),
            ) as writer,
        ):
            _wait_for_all(world)  # every rank is marked as open before the first can close
            capture = _Capture(model, writer, meter, on_bad_rows, selection_of(selection, top_k))
            most = max_length or getattr(model.config, "max_position_embeddings", None)
            ids = token_ids(sequences, tokenizer)
            for number, batch in enumerate(batches(ids, batch_tokens, limit, most)):
                if number % world == rank:
                    capture.batch(batch)
    finally:
        model.train(was_training)
    _wait_for_all(world)
    return TeacherCache(Path(path), verify=False)


def cache_meta(
    model: Any,
    *,
    tokenizer: Any = None,
    live_vocab: int | None = None,
    top_k: int = 32,
    temperature: float = 1.0,
    selection: Selection | str | None = None,
    codec: str | None = None,
    codec_options: Mapping[str, Any] | None = None,
    tail_temperatures: Sequence[float] | str | None = "auto",
    realised: bool = True,
) -> CacheMeta:
    """The identity a cache of this model has; also what a reader may ``expect``."""
    from kd.vocab import tokenizer_fingerprint

    head, found = model.get_output_embeddings(), reading(model)
    padded = int(head.weight.shape[0]) if head is not None else int(model.config.vocab_size)
    if found is not None and found.width is not None:  # its logits leave the last rows out
        padded = found.width
    live = live_vocab or (len(tokenizer) if tokenizer is not None else padded)
    chosen = selection_of(selection, top_k)
    slots = chosen.slots(live)
    codec = codec or DEFAULT_CODECS.get(chosen.name, "compact")
    return CacheMeta(
        teacher=teacher_identity(model),
        tokenizer=tokenizer_fingerprint(tokenizer) if tokenizer is not None else {},
        live_vocab=live,
        padded_vocab=max(padded, live) if head is None else padded,
        temperature=float(temperature),
        top_k=slots,
        selection=chosen.name,
        codec=codec,
        selection_options=chosen.options(),
        codec_options=default_options(codec, slots) if codec_options is None else codec_options,
        realised=realised,
        tail_temperatures=tail_temperatures_of(tail_temperatures, chosen),
    )


def tail_temperatures_of(
    asked: Sequence[float] | str | None, selection: Selection
) -> tuple[float, ...]:
    """The temperatures that ``build_cache`` stores the tail at."""
    if isinstance(asked, str):
        if asked != "auto":
            raise ValueError(
                "build_cache: tail_temperatures must be 'auto', None or a list of temperatures, "
                f"got {asked!r}."
            )
        return () if selection.random else DEFAULT_TAIL_TEMPERATURES
    return tuple(map(float, asked or ()))


def selection_of(selection: Selection | str | None, top_k: int) -> Selection:
    """A Selection from what ``build_cache`` takes."""
    if isinstance(selection, Selection):
        return selection
    return Selection(name=selection or "top_k", top_k=top_k)


Batch = list[NDArray[np.int32]]


def batches(
    sequences: Iterable[Any], batch_tokens: int, limit: int | None, most: int | None
) -> Iterator[Batch]:
    """Different sequences in batches of like length; a function of the list alone.

    Args:
        sequences: token ids, one-dimensional.
        batch_tokens: a batch's longest sequence times its sequences, at most; one sequence that
            is longer makes a batch of its own.
        limit: stop after so many sequences, repeated ones included.
        most: the longest sequence allowed.
    """
    seen: set[bytes] = set()
    window: Batch = []
    for number, sequence in enumerate(sequences):
        if limit is not None and number >= limit:
            break
        tokens = token_array(sequence, f"build_cache: sequence {number}")
        if most is not None and len(tokens) > most:
            raise ValueError(
                f"build_cache: a sequence must have at most {most} tokens, got {len(tokens)} in "
                f"sequence {number}. Truncate the training rows themselves, so that they match."
            )
        key = key_of(tokens)
        if key not in seen:
            seen.add(key)
            window.append(tokens)
        if len(window) == WINDOW:
            yield from _by_length(window, batch_tokens)
            window = []
    yield from _by_length(window, batch_tokens)


def _by_length(window: Batch, batch_tokens: int) -> Iterator[Batch]:
    batch: Batch = []
    for tokens in sorted(window, key=len):
        if batch and len(tokens) * (len(batch) + 1) > batch_tokens:
            yield batch
            batch = []
        batch.append(tokens)
    if batch:
        yield batch


class _Capture:
    """Runs batches through the teacher and hands the rows to the writer."""

    def __init__(
        self,
        model: Any,
        writer: CacheWriter,
        meter: Progress,
        on_bad_rows: str,
        selection: Selection,
    ) -> None:
        self.writer, self.meter, self.on_bad_rows = writer, meter, on_bad_rows
        self.selection = selection
        self.source = LogitSource(model, writer.meta.live_vocab)

    def batch(self, sequences: Batch) -> None:
        """Store a batch. It is computed whole even when a part of it is stored already: the
        shape of a batch may change the last bits of its logits."""
        missing = [tokens not in self.writer for tokens in sequences]
        tokens_in = sum(len(tokens) for tokens in sequences)
        if any(missing):
            ids, logprobs, tails, followed, bad = self._targets(sequences)
            start = 0
            for tokens, wanted in zip(sequences, missing, strict=True):
                stop = start + len(tokens)
                rows = slice(start, stop)
                if wanted and self._accept(tokens, bad[rows], ids[rows]):
                    self.writer.add(
                        tokens,
                        ids[rows],
                        logprobs[rows],
                        None if tails is None else tails[rows],
                        None if followed is None else followed[rows],
                    )
                start = stop
        self.meter.advance(tokens_in, fresh=any(missing))

    def _targets(
        self, sequences: Batch
    ) -> tuple[Tensor, Tensor, Tensor | None, Tensor | None, Tensor]:
        """Of all real rows: ids, log-probs, tails or None, log-probs of the tokens that followed
        or None, and which are no distribution."""
        meta = self.writer.meta
        powers = [meta.temperature / t for t in meta.tail_temperatures]
        parts, row = [], 0
        uniforms = None
        if self.selection.random:
            drawn = [self.selection.uniforms(len(item), key_of(item)) for item in sequences]
            uniforms = torch.cat(drawn)  # [N, draws]
        following = torch.cat([torch.from_numpy(np.roll(item, -1)) for item in sequences]).long()
        for logits in self.source.chunks(sequences):
            mine = None if uniforms is None else uniforms[row : row + len(logits)]
            ids, logprobs, tails = self.selection.rows(logits, meta.temperature, mine, powers)
            # A row with a NaN or +inf has no finite log-prob at all.
            random = self.selection.random
            bad = bad_rows(logits) if random else ~torch.isfinite(logprobs[:, 0])
            followed = logits.new_empty(len(logits), dtype=torch.float32)
            if meta.realised:
                mine = following[row : row + len(logits)].to(logits.device)
                followed = self.selection.realised(logits, mine, ids, logprobs, meta.temperature)
            if bool(bad.any()):  # stored as nothing, or refused below
                ids, logprobs = ids.clone(), logprobs.clone()
                ids[bad], logprobs[bad], tails[bad], followed[bad] = -1, -torch.inf, 0, torch.nan
            row += len(logits)
            parts.append((ids.cpu(), logprobs.cpu(), tails.cpu(), followed.cpu(), bad.cpu()))
        ids, logprobs, tails, followed, bad = (torch.cat(c) for c in zip(*parts, strict=True))
        return ids, logprobs, tails if powers else None, followed if meta.realised else None, bad

    def _accept(self, tokens: NDArray[np.int32], bad: Tensor, ids: Tensor) -> bool:
        """Deal with rows that are no distribution; False drops the sequence."""
        if not bool(bad.any()):
            return True
        row = int(bad.nonzero()[0])
        if self.on_bad_rows == "error":
            raise ValueError(
                f"build_cache: the teacher's logits must be finite or -inf, got NaN or +inf in "
                f"row {row} of sequence {describe(tokens)}. Use a wider dtype (bfloat16 or "
                "float32), or on_bad_rows='drop' or 'mask'."
            )
        if self.on_bad_rows == "drop":
            self.writer.count("dropped_sequences")
            return False
        self.writer.count("masked_rows", int(bad.sum()))
        ids[bad] = -1
        return True


def _total(sequences: Any, limit: int | None) -> int | None:
    if not isinstance(sequences, (list, tuple)):
        return None
    ids = [
        item for item in sequences[:limit] if isinstance(item, (list, tuple, Tensor, np.ndarray))
    ]
    return sum(map(len, ids)) if len(ids) == len(sequences[:limit]) else None


def _wait_for_all(world: int) -> None:
    if world > 1:
        if not torch.distributed.is_initialized():
            torch.distributed.init_process_group("gloo")
        torch.distributed.barrier()


__all__ = ["build_cache", "cache_meta"]
