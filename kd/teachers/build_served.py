"""Fill a cache from a teacher behind a server: what is answered is stored, whatever fails."""

from __future__ import annotations

import os
from collections.abc import Iterable
from concurrent.futures import Future, ThreadPoolExecutor
from typing import Any

import numpy as np
from numpy.typing import NDArray

from kd.cache import CacheMeta, CacheWriter, TeacherCache
from kd.cache.codecs import default_options
from kd.cache.keys import describe
from kd.cache.writer import SHARD_TOKENS
from kd.progress import Progress
from kd.serving import ServerError
from kd.teachers.build import batches
from kd.teachers.data import token_ids
from kd.teachers.server import ServerTeacher
from kd.teachers.server_rows import Item

ON_FAILURE = ("error", "drop")
CONTINUE = "What was scored is stored: run the same command again to continue."
MOST_FAILED = 32  # sequences that fail before a capture ends, unless they may be dropped
# Failures that a sequence can be the cause of; the others are the server's, of every sequence.
OF_THE_SEQUENCE = (
    "HTTP 400",
    "HTTP 413",
    "HTTP 422",
    "HTTP 500",
    "timed out",
    "answer too large",
    "garbage from the server",
)


def build_cache_from_server(
    teacher: ServerTeacher,
    sequences: Iterable[Any],
    path: str | os.PathLike[str],
    *,
    live_vocab: int | None = None,
    tokenizer: Any = None,
    revision: str | None = None,
    codec: str = "compact",
    shard_tokens: int = SHARD_TOKENS,
    max_length: int | None = None,
    limit: int | None = None,
    on_failure: str = "error",
    progress: bool = True,
) -> TeacherCache:
    """Cache a served teacher's log-probs; run again, it continues where it was stopped.

    Args:
        teacher: the server.
        sequences: one-dimensional integer token ids of the teacher's tokenizer, at least 2 long;
            or records, rendered with ``tokenizer`` as in build_cache.
        path: the cache's folder.
        live_vocab: the teacher's tokens; the tokenizer's length when None.
        tokenizer: its fingerprint is recorded.
        revision: of the teacher, for the record: a server does not tell.
        codec: how rows are stored.
        shard_tokens: tokens in a shard: what a killed run loses at most.
        max_length: longer sequences are refused.
        limit: use only the first so many sequences.
        on_failure: for a sequence that the server refuses, fails at or answers wrongly, again and
            again: "error" scores the others, and ends with an error that names sequence and row;
            "drop" leaves it out, counted in the manifest under "dropped_sequences". Where
            everything fails, both end with the error, after 32 sequences at most.
        progress: show tokens/s and the time left.

    Returns:
        The finished cache. A row holds the top_k likeliest tokens, and the text's own next token
        where it is not among them; the last row of every sequence is empty.

    Raises:
        OSError: the server failed, at a sequence or altogether.
        ValueError: an answer does not fit its sequence.
            What was scored, also beside the request that failed, is stored in either case; the
            same command continues.
    """
    from kd.vocab import tokenizer_fingerprint

    if on_failure not in ON_FAILURE:
        raise ValueError(
            f"build_cache_from_server: on_failure must be one of {', '.join(ON_FAILURE)}, got "
            f"{on_failure!r}."
        )
    live = live_vocab or (len(tokenizer) if tokenizer is not None else 0)
    if live < 1:
        raise ValueError(
            "build_cache_from_server: live_vocab or tokenizer must be given, got neither. A "
            "server does not say how many tokens its model has."
        )
    slots = min(teacher.top_k + 1, live)
    meta = CacheMeta(
        teacher={"id": teacher.model, "revision": revision, "server": teacher.mode},
        tokenizer=tokenizer_fingerprint(tokenizer) if tokenizer is not None else {},
        live_vocab=live,
        padded_vocab=live,
        top_k=slots,
        codec=codec,
        codec_options=default_options(codec, slots),
        realised=True,
    )
    with (
        Progress("teacher", unit="tokens", show=progress) as meter,
        CacheWriter(path, meta, shard_tokens=shard_tokens) as writer,
        ThreadPoolExecutor(teacher.concurrency) as pool,
    ):
        capture = _Capture(teacher, writer, meter, on_failure == "drop")
        try:
            for (tokens,) in batches(token_ids(sequences, tokenizer), 1, limit, max_length):
                capture.submit(pool, tokens)
            capture.finish()
        except BaseException:
            capture.rescue()
            raise
    return TeacherCache(path)


class _Capture:
    """Requests under way, the oldest first."""

    def __init__(
        self, teacher: ServerTeacher, writer: CacheWriter, meter: Progress, drop: bool
    ) -> None:
        self.teacher, self.writer, self.meter, self.drop = teacher, writer, meter, drop
        self.under_way: list[tuple[NDArray[np.int32], Future[Item]]] = []
        self.failed = 0
        self.first: tuple[type[Exception], str] = ValueError, ""

    def submit(self, pool: ThreadPoolExecutor, tokens: NDArray[np.int32]) -> None:
        if tokens in self.writer:
            self.meter.advance(len(tokens), fresh=False)
            return
        live = self.writer.meta.live_vocab
        if len(tokens) < 2 or int(tokens.max()) >= live:
            raise ValueError(
                "build_cache_from_server: a sequence must have at least 2 tokens, all below "
                f"live_vocab ({live}), got {describe(tokens)}."
            )
        self.under_way.append((tokens, pool.submit(self.teacher.score, tokens, live)))
        if len(self.under_way) >= 2 * self.teacher.concurrency:
            self._take()

    def finish(self) -> None:
        while self.under_way:
            self._take()
        if self.failed:
            self._refuse()

    def rescue(self) -> None:
        """Store what is answered beside a request that failed: it was paid for."""
        for _, future in self.under_way:
            future.cancel()  # those that have not begun
        for tokens, future in self.under_way:
            if not future.cancelled() and future.exception() is None:
                self._store(*future.result())
                self.meter.advance(len(tokens), fresh=True)
        self.writer.keep_pending()

    def _store(self, tokens: NDArray[np.int32], ids: NDArray[Any], logprobs: NDArray[Any]) -> None:
        """Every row holds the text's own next token: a row without it was refused."""
        own = ids[:-1] == tokens[1:, None]
        followed = np.append(np.where(own, logprobs[:-1], -np.inf).max(1), np.nan)
        self.writer.add(tokens, ids, logprobs, None, followed.astype(np.float32))

    def _take(self) -> None:
        tokens, future = self.under_way.pop(0)
        try:
            self._store(*future.result())
        except ServerError as error:
            kind: type[Exception] = OSError
            mine, problem = error.reason in OF_THE_SEQUENCE, str(error)
        except ValueError as error:
            kind, mine, problem = ValueError, True, str(error)
        else:
            self.meter.advance(len(tokens), fresh=True)
            return
        problem = f"sequence {describe(tokens)}: {problem}"
        if not mine:
            raise kind(f"build_cache_from_server: {problem} {CONTINUE}")
        self.first = self.first if self.failed else (kind, problem)
        self.failed += 1
        self.writer.count("dropped_sequences")
        self.meter.advance(len(tokens), fresh=False)
        if self.failed == MOST_FAILED:
            self._refuse()

    def _refuse(self) -> None:
        """Raise for the sequences that failed, unless they are dropped and others are not."""
        if self.drop and len(self.writer):
            return
        kind, problem = self.first
        way_out = "" if self.drop else " Or leave such sequences out with on_failure='drop'."
        raise kind(
            f"build_cache_from_server: the server must score every sequence, got {self.failed} "
            f"that failed. The first is {problem} {CONTINUE}{way_out}"
        )
