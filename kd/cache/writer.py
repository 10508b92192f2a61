"""Write a cache: sequences are collected, encoded and published as whole shards."""

from __future__ import annotations

import dataclasses
import errno
import hashlib
import os
import queue
import threading
from collections.abc import Mapping, Sequence
from pathlib import Path
from types import TracebackType
from typing import Any

import numpy as np

from kd.cache.codecs import Rows
from kd.cache.keys import KEY_BYTES, describe, key_of, token_array
from kd.cache.manifest import (
    NAME,
    SHARD_NAME,
    Manifest,
    ShardEntry,
    read_manifest,
    safe_path,
    update_manifest,
)
from kd.cache.meta import CacheMeta, differences, side_by_side
from kd.cache.rows import rows_of
from kd.cache.shards import Block, Shard, encode_shard
from kd.files import TEMPORARY, Lock, write_whole

SHARD_TOKENS = 1 << 17


class CacheWriter:
    """Add sequences to a cache; a context manager.

        with CacheWriter("cache", meta) as writer:
            if input_ids not in writer:
                writer.add(input_ids, ids, logprobs)

    A killed writer loses at most the shard in hand; opening the same path with the same ``meta``
    continues. An exception inside ``with`` discards the shard in hand and leaves the cache marked
    as unfinished. Shards are encoded and written by a thread, beside the caller's work. A finished
    cache on a read-only medium is opened too, and adding to it is refused.

    Args:
        path: the cache's folder; made when absent.
        meta: the identity of the cache. One that differs from what is there is refused with both
            sides shown, and nothing is changed.
        shard_tokens: a shard is closed once it holds this many tokens.
        rank: number of this writer. Writers of different ranks may write side by side; a second
            writer of one rank is refused.
        world_size: how many writers there are; ranks of an earlier run past it are forgotten.
        sources: what is captured, for the manifest; entries that it has already are not added.
    """

    def __init__(
        self,
        path: str | os.PathLike[str],
        meta: CacheMeta,
        *,
        shard_tokens: int = SHARD_TOKENS,
        rank: int = 0,
        world_size: int = 1,
        sources: Sequence[Mapping[str, Any]] = (),
    ) -> None:
        if shard_tokens < 1:
            raise ValueError(f"CacheWriter: shard_tokens must be at least 1, got {shard_tokens}.")
        if not 0 <= rank <= 9999:
            raise ValueError(f"CacheWriter: rank must be from 0 to 9999, got {rank}.")
        self.path, self.meta = Path(path), meta
        self.shard_tokens, self.rank, self.world_size = shard_tokens, rank, world_size
        self.sources = [dict(source) for source in sources]
        self.counters: dict[str, int] = {}
        self._known: set[bytes] = set()
        self._pending: list[tuple[np.ndarray, Rows]] = []
        self._pending_tokens = 0
        self._queue: queue.Queue[Block | tuple[bytes, ShardEntry] | None] = queue.Queue(maxsize=2)
        self._failure: BaseException | None = None
        self._thread: threading.Thread | None = None
        self._lock: Lock | None = None
        self.read_only = False

    def __enter__(self) -> CacheWriter:
        lock = Lock(self.path / f".writer-{self.rank:04d}.lock")
        try:
            self.path.mkdir(parents=True, exist_ok=True)
            taken = lock.acquire(wait=False)
        except OSError as error:
            if error.errno not in (errno.EROFS, errno.EACCES, errno.EPERM):
                raise
            self._open_read_only(error)
            return self
        if not taken:
            raise BlockingIOError(
                f"CacheWriter: rank {self.rank} of {self.path} must have one writer, got a second; "
                f"the first is {lock.holder()}. Wait for it, or give this one another rank."
            )
        self._lock = lock
        try:
            self._open()
        except BaseException:
            lock.release()
            raise
        self._thread = threading.Thread(target=self._work, name="kd-cache-writer", daemon=True)
        self._thread.start()
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        if self.read_only:
            return
        assert self._lock is not None and self._thread is not None
        try:
            if kind is None and self._failure is None and self._pending:
                self._hand_over()
            if kind is not None:
                self._discard()
            self._queue.put(None)
            self._thread.join()
            if kind is None:
                self._raise_failure()
                update_manifest(self.path, self._closed)
        finally:
            self._lock.release()

    def __contains__(self, input_ids: Any) -> bool:
        """Whether a sequence is stored already, or added to the shard in hand."""
        return key_of(token_array(input_ids, "CacheWriter")) in self._known

    def __len__(self) -> int:
        return len(self._known)

    def add(
        self, input_ids: Any, ids: Any, logprobs: Any, tails: Any = None, realised: Any = None
    ) -> None:
        """Store a sequence's targets: row i is the distribution for the token after token i.

        Args:
            input_ids: [L] integer token ids, unpadded.
            ids: [L, K] integer token ids; -1 is an empty slot.
            logprobs: [L, K] natural-log probabilities at the cache's temperature, over the live
                vocabulary.
            tails: [L, M] log(sum over the ids left out of p ** (temperature / t)) at the M
                ``meta.tail_temperatures`` t (-inf: nothing is left out); none without any.
            realised: [L] log-probs of the token that follows each (of the last row, nothing: it
                is ignored; NaN where unknown), where ``meta.realised``; none elsewhere.

        Raises:
            ValueError: for bad rows (naming sequence and row), and for a sequence that is there.
            OSError: when an earlier shard could not be written.
        """
        tokens = token_array(input_ids, "CacheWriter.add")
        self.add_rows(tokens, rows_of(tokens, ids, logprobs, self.meta, tails, realised))

    def add_rows(self, tokens: np.ndarray, rows: Rows) -> None:
        """``add`` for rows that are flat and checked already."""
        self._refuse_read_only(f"sequence {describe(tokens)}")
        if self._thread is None:
            raise RuntimeError("CacheWriter: add must be called inside `with CacheWriter(...)`.")
        self._raise_failure()
        key = key_of(tokens)
        if key in self._known:
            raise ValueError(
                f"CacheWriter.add: a sequence must be added once, got {describe(tokens)} again. "
                "Skip it when `input_ids in writer`."
            )
        self._known.add(key)
        self._pending.append((tokens, rows))
        self._pending_tokens += len(tokens)
        if self._pending_tokens >= self.shard_tokens:
            self._hand_over()

    def copy_shard(self, shard: Shard, entry: ShardEntry) -> bool:
        """Take over a shard of another cache of this identity, byte by byte.

        Returns:
            False, and nothing is done, when a sequence of it is stored here already.
        """
        keys = keys_in(shard)
        if len(set(keys)) < len(keys) or self._known & set(keys):
            return False
        self._refuse_read_only(entry.name)
        self._raise_failure()
        self._known.update(keys)
        self._queue.put((b"".join(part.tobytes() for part in shard.file.parts()), entry))
        return True

    def keep_pending(self) -> None:
        """Publish the shard in hand although an exception is about to leave ``with``.

        For captures whose rows were paid for. The cache stays marked as unfinished.
        """
        if self._pending and self._failure is None:
            self._hand_over()
            self._queue.join()

    def count(self, name: str, number: int = 1) -> None:
        """Count something for the manifest, such as sequences that were dropped."""
        self.counters[name] = self.counters.get(name, 0) + number

    def _open_read_only(self, error: OSError) -> None:
        """Find what is there, where nothing can be written: all that a finished cache needs."""
        try:
            present = read_manifest(self.path)
        except FileNotFoundError:
            raise error from None
        self._check_meta(present)
        if present.open_writers:
            raise PermissionError(
                f"CacheWriter: {self.path} must be writable to go on with its capture (open ranks "
                f"{present.open_writers}), got a read-only folder. Copy the cache first."
            ) from error
        self.read_only = True
        self._take_in(present)

    def _refuse_read_only(self, what: str) -> None:
        if self.read_only:
            raise PermissionError(
                f"CacheWriter: {self.path} must be writable, got a read-only folder, and {what} is "
                "not in it. Copy the cache, or make the folder writable."
            )

    def _open(self) -> None:
        for leftover in self.path.glob(f"{TEMPORARY}*-shard-{self.rank:04d}-*"):
            leftover.unlink(missing_ok=True)
        manifest = update_manifest(self.path, self._opened)
        mine = [entry.name for entry in manifest.shards if self._is_mine(entry.name)]
        self._next = 1 + max((int(name[11:17]) for name in mine), default=-1)
        self._take_in(manifest)
        self._adopt(manifest)

    def _take_in(self, manifest: Manifest) -> None:
        """Know the sequences of the shards that are there."""
        options = shard_options(self.meta)
        for entry in manifest.shards:
            path = safe_path(self.path, entry.name)
            if not path.exists() or path.stat().st_size != entry.bytes:
                size = path.stat().st_size if path.exists() else "no file"
                raise ValueError(
                    f"CacheWriter: shard {entry.name} must have {entry.bytes:,} bytes, got {size}. "
                    f"Restore it, or run: kd cache verify --repair {self.path}"
                )
            shard = Shard(path, self.meta.codec, options, self.meta.cache_id)
            self._known.update(keys_in(shard))

    def _is_mine(self, name: str) -> bool:
        return bool(SHARD_NAME.match(name)) and int(name[6:10]) == self.rank

    def _opened(self, present: Manifest | None) -> Manifest:
        for leftover in self.path.glob(f"{TEMPORARY}*-{NAME}"):
            leftover.unlink(missing_ok=True)
        if present is None:
            foreign = [item.name for item in self.path.iterdir() if not item.name.startswith(".")]
            stray = [name for name in foreign if not SHARD_NAME.match(name)]
            if stray:
                raise ValueError(
                    f"CacheWriter: path must be a new or empty folder, or a cache, got {self.path} "
                    f"with {', '.join(sorted(stray)[:5])}. Choose another folder."
                )
            present = Manifest(self.meta)
        self._check_meta(present)
        kept = {rank for rank in present.open_writers if rank < self.world_size}
        present.open_writers = sorted(kept | {self.rank})
        known = present.sources if present.shards else []  # nothing came of earlier ones
        present.sources = known + [entry for entry in self.sources if entry not in known]
        return present

    def _check_meta(self, present: Manifest) -> None:
        found = differences(present.meta.to_dict(), self.meta.to_dict())
        if found:
            raise ValueError(
                f"CacheWriter: meta must equal that of the cache in {self.path}, got\n"
                f"{side_by_side(found, 'the cache', 'this run')}\n"
                "Nothing was changed. Write to another folder, or use the cache's settings."
            )

    def _closed(self, present: Manifest | None) -> Manifest:
        assert present is not None
        present.open_writers = [rank for rank in present.open_writers if rank != self.rank]
        for name, number in self.counters.items():
            present.counters[name] = present.counters.get(name, 0) + number
        return present

    def _adopt(self, manifest: Manifest) -> None:
        """List shards that were published just before the process was killed."""
        listed = {entry.name for entry in manifest.shards}
        for path in sorted(self.path.glob(f"shard-{self.rank:04d}-*.safetensors")):
            if path.name in listed:
                continue
            shard = Shard(path, self.meta.codec, shard_options(self.meta), self.meta.cache_id)
            keys = keys_in(shard)
            if self._known & set(keys):
                raise ValueError(
                    f"CacheWriter: {path.name} must be listed in {NAME} or hold new sequences, got "
                    "neither. Move the file out of the folder."
                )
            entry = entry_of(path.name, path.read_bytes(), shard.block(range(shard.sequences)))
            self._known.update(keys)
            self._next = max(self._next, int(path.name[11:17]) + 1)
            update_manifest(self.path, _listing(entry))

    def _hand_over(self) -> None:
        tokens = np.concatenate([item[0] for item in self._pending])
        lengths = np.array([len(item[0]) for item in self._pending], np.int64)
        rows = join_rows([item[1] for item in self._pending])
        self._pending, self._pending_tokens = [], 0
        self._queue.put(Block(tokens, lengths, rows))

    def _work(self) -> None:
        while (item := self._queue.get()) is not None:
            try:
                if self._failure is None:
                    self._publish(item)
            except BaseException as error:  # raised again by the caller's next call
                self._failure = error
            finally:
                self._queue.task_done()

    def _publish(self, item: Block | tuple[bytes, ShardEntry]) -> None:
        meta, name = self.meta, f"shard-{self.rank:04d}-{self._next:06d}.safetensors"
        if isinstance(item, Block):
            data = encode_shard(item, meta.codec, shard_options(meta), meta.cache_id)
            entry = entry_of(name, data, item)
        else:
            data, entry = item[0], dataclasses.replace(item[1], name=name)
        write_whole(self.path / name, data, replace=False)
        update_manifest(self.path, _listing(entry))
        self._next += 1

    def _discard(self) -> None:
        self._pending, self._pending_tokens = [], 0
        try:
            while True:
                self._queue.get_nowait()
                self._queue.task_done()
        except queue.Empty:
            return

    def _raise_failure(self) -> None:
        if self._failure is not None:
            raise self._failure


def shard_options(meta: CacheMeta) -> Mapping[str, Any]:
    """What a codec needs to know of the cache."""
    return {
        "live_vocab": meta.live_vocab,
        "tail_temperatures": len(meta.tail_temperatures),
        "realised": meta.realised,
        **meta.selection_options,
        **meta.codec_options,
    }


def keys_in(shard: Shard) -> list[bytes]:
    data = shard.keys.tobytes()
    return [data[i : i + KEY_BYTES] for i in range(0, len(data), KEY_BYTES)]


def entry_of(name: str, data: bytes, block: Block) -> ShardEntry:
    """A shard's line in the manifest."""
    return ShardEntry(
        name=name,
        bytes=len(data),
        sha256=hashlib.sha256(data).hexdigest(),
        sequences=len(block.lengths),
        rows=len(block.tokens),
        entries=len(block.rows.ids),
        slots=int(block.rows.counts.max(initial=0)),
    )


def join_rows(parts: list[Rows]) -> Rows:
    tails: list[Any] = [part.tails for part in parts]
    realised: list[Any] = [part.realised for part in parts]
    return Rows(
        np.concatenate([part.counts for part in parts]),
        np.concatenate([part.ids for part in parts]),
        np.concatenate([part.logprobs for part in parts]),
        None if any(part is None for part in tails) else np.concatenate(tails),
        None if any(part is None for part in realised) else np.concatenate(realised),
    )


def _listing(entry: ShardEntry) -> Any:
    def change(present: Manifest | None) -> Manifest:
        assert present is not None
        present.shards = sorted([*present.shards, entry], key=lambda shard: shard.name)
        return present

    return change
