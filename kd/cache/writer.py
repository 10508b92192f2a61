"""Write a cache: sequences are collected, encoded and published as whole shards."""

from __future__ import annotations

import dataclasses
import errno
import os
from collections import deque
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path
from types import TracebackType
from typing import Any

from kd.cache.checks import checked_rows
from kd.cache.keys import describe, key_of, token_array
from kd.cache.manifest import (
    NAME,
    SHARD_NAME,
    Manifest,
    ShardEntry,
    read_manifest,
    update_manifest,
)
from kd.cache.meta import CacheMeta, differences, side_by_side
from kd.cache.rows import Rows
from kd.cache.shards import Shard, encode_shard, entry_of, open_listed
from kd.files import TEMPORARY, Lock, write_whole

SHARD_TOKENS = 1 << 17
WAITING = 3  # shards that may wait to be encoded and written


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
        self.read_only = False
        self._known: set[bytes] = set()
        self._pending: list[Rows] = []
        self._pending_tokens = 0
        self._thread: ThreadPoolExecutor | None = None
        self._published: deque[Future[None]] = deque()
        self._failure: BaseException | None = None
        self._lock: Lock | None = None

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
        self._thread = ThreadPoolExecutor(1, "kd-cache-writer")
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
            if kind is None and self._pending:
                self._hand_over()
            self._thread.shutdown(cancel_futures=kind is not None)
            if kind is None:
                self._wait(0)
                update_manifest(self.path, self._closed)
        finally:
            self._thread.shutdown()
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
        self.add_rows(checked_rows(tokens, ids, logprobs, self.meta, tails, realised))

    def add_rows(self, rows: Rows) -> None:
        """``add`` for the rows of one sequence, with its tokens, that are checked already."""
        assert rows.tokens is not None and len(rows.lengths) == 1
        self._refuse_read_only(f"sequence {describe(rows.tokens)}")
        if self._thread is None:
            raise RuntimeError("CacheWriter: add must be called inside `with CacheWriter(...)`.")
        self._wait(WAITING)
        key = key_of(rows.tokens)
        if key in self._known:
            raise ValueError(
                f"CacheWriter.add: a sequence must be added once, got {describe(rows.tokens)} "
                "again. Skip it when `input_ids in writer`."
            )
        self._known.add(key)
        self._pending.append(rows)
        self._pending_tokens += len(rows.tokens)
        if self._pending_tokens >= self.shard_tokens:
            self._hand_over()

    def copy_shard(self, shard: Shard, entry: ShardEntry) -> bool:
        """Take over a shard of another cache of this identity, byte by byte.

        Returns:
            False, and nothing is done, when a sequence of it is stored here already.
        """
        keys = shard.key_list
        if len(set(keys)) < len(keys) or self._known & set(keys):
            return False
        self._refuse_read_only(entry.name)
        self._known.update(keys)
        data = b"".join(part.tobytes() for part in shard.file.parts())
        self._submit(lambda name: (data, dataclasses.replace(entry, name=name)))
        return True

    def keep_pending(self) -> None:
        """Publish the shard in hand although an exception is about to leave ``with``.

        For captures whose rows were paid for. The cache stays marked as unfinished.
        """
        if self._pending and self._failure is None:
            self._hand_over()
            self._wait(0)

    def count(self, name: str, number: int = 1) -> None:
        """Count something for the manifest, such as sequences that were dropped."""
        self.counters[name] = self.counters.get(name, 0) + number

    # --- opening ----------------------------------------------------------------------------------

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
        start = f"shard-{self.rank:04d}-"
        mine = [entry.name for entry in manifest.shards if entry.name.startswith(start)]
        self._next = 1 + max((int(name[11:17]) for name in mine), default=-1)
        self._take_in(manifest)
        self._adopt(manifest)

    def _take_in(self, manifest: Manifest) -> None:
        """Know the sequences of the shards that are there."""
        for entry in manifest.shards:
            self._known.update(open_listed(self.path, entry, self.meta).key_list)

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

    def _adopt(self, manifest: Manifest) -> None:
        """List shards that were published just before the process was killed."""
        listed = {entry.name for entry in manifest.shards}
        for path in sorted(self.path.glob(f"shard-{self.rank:04d}-*.safetensors")):
            if path.name in listed:
                continue
            shard = Shard(path, self.meta)
            keys = shard.key_list
            if self._known & set(keys):
                raise ValueError(
                    f"CacheWriter: {path.name} must be listed in {NAME} or hold new sequences, got "
                    "neither. Move the file out of the folder."
                )
            rows = shard.read(range(shard.sequences), complete=True)
            self._known.update(keys)
            self._next = max(self._next, int(path.name[11:17]) + 1)
            self._list(entry_of(path.name, path.read_bytes(), rows))

    def _closed(self, present: Manifest | None) -> Manifest:
        assert present is not None
        present.open_writers = [rank for rank in present.open_writers if rank != self.rank]
        for name, number in self.counters.items():
            present.counters[name] = present.counters.get(name, 0) + number
        return present

    # --- publishing -------------------------------------------------------------------------------

    def _hand_over(self) -> None:
        """Encode and publish the shard in hand, beside the caller's work."""
        rows, meta = Rows.joined(self._pending), self.meta
        self._pending, self._pending_tokens = [], 0

        def encoded(name: str) -> tuple[bytes, ShardEntry]:
            data = encode_shard(rows, meta)
            return data, entry_of(name, data, rows)

        self._submit(encoded)

    def _submit(self, make: Callable[[str], tuple[bytes, ShardEntry]]) -> None:
        assert self._thread is not None
        self._wait(WAITING - 1)
        self._published.append(self._thread.submit(self._publish, make))

    def _wait(self, most: int) -> None:
        """Until at most so many shards are waiting; raises what publishing one has raised."""
        while len(self._published) > most:
            self._published.popleft().result()
        if self._failure is not None:
            raise self._failure

    def _publish(self, make: Callable[[str], tuple[bytes, ShardEntry]]) -> None:
        if self._failure is not None:  # nothing is written behind a shard that could not be
            return
        try:
            data, entry = make(f"shard-{self.rank:04d}-{self._next:06d}.safetensors")
            write_whole(self.path / entry.name, data, replace=False)
            self._list(entry)
            self._next += 1
        except BaseException as error:  # raised by the caller's next call
            self._failure = error

    def _list(self, entry: ShardEntry) -> None:
        """Enter a shard in the manifest."""

        def change(present: Manifest | None) -> Manifest:
            assert present is not None
            present.shards = sorted([*present.shards, entry], key=lambda shard: shard.name)
            return present

        update_manifest(self.path, change)
