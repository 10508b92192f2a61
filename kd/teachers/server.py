"""A teacher behind an OpenAI-compatible server (vLLM, SGLang, ...): prompt log-probs into a cache.

A server scores a prompt that is sent as token ids. It returns the likeliest tokens at every
position but the first, at temperature 1, and the prompt's own token where that is not among them.
"""

from __future__ import annotations

import http.client
import json
import os
import random
import threading
import time
import urllib.error
import urllib.request
from collections.abc import Iterable, Mapping
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass, field
from typing import Any

import numpy as np
from numpy.typing import NDArray

from kd.cache import CacheMeta, CacheWriter, TeacherCache
from kd.cache.importers import Item, prompt_rows
from kd.cache.writer import SHARD_TOKENS
from kd.teachers.build import batches
from kd.teachers.progress import Meter

RETRY_STATUS = frozenset({408, 409, 425, 429, 500, 502, 503, 504})
MODES = ("prompt_logprobs", "echo")
MAX_TOP_K = 1024
MAX_RESPONSE = 1 << 30


@dataclass
class ServerTeacher:
    """A completions endpoint that scores prompts.

    Attributes:
        base_url: up to and with /v1, such as "http://localhost:8000/v1".
        model: the name the server knows the teacher by.
        top_k: tokens asked for at each position; the server's own limit is --max-logprobs.
        mode: "prompt_logprobs" (vLLM), or "echo" (logprobs of an echoed prompt, with
            return_tokens_as_token_ids).
        api_key_env: environment variable that holds the key; never a key itself.
        timeout: seconds for one request.
        retries: further attempts after a refusal that may pass (429, 5xx, a broken connection).
        backoff: seconds before the first of them; doubled each time, with jitter, up to
            ``max_wait``. A Retry-After header is obeyed, up to the same limit.
        requests_per_minute: None is no limit.
        concurrency: requests under way at a time.
    """

    base_url: str
    model: str
    top_k: int = 20
    mode: str = "prompt_logprobs"
    api_key_env: str = "OPENAI_API_KEY"
    timeout: float = 300.0
    retries: int = 6
    backoff: float = 1.0
    max_wait: float = 60.0
    requests_per_minute: float | None = None
    concurrency: int = 4
    _next: float = field(default=0.0, repr=False)
    _guard: threading.Lock = field(default_factory=threading.Lock, repr=False, compare=False)

    def __post_init__(self) -> None:
        if not self.base_url.startswith(("http://", "https://")):
            raise ValueError(
                f"ServerTeacher: base_url must start with http:// or https://, got "
                f"{self.base_url!r}."
            )
        if not 1 <= self.top_k <= MAX_TOP_K:
            raise ValueError(
                f"ServerTeacher: top_k must be from 1 to {MAX_TOP_K}, got {self.top_k}. A "
                "server's memory and time grow with it."
            )
        if self.mode not in MODES:
            raise ValueError(
                f"ServerTeacher: mode must be one of {', '.join(MODES)}, got {self.mode!r}."
            )

    def score(self, tokens: NDArray[np.int32]) -> Item:
        """A sequence's (tokens, ids [L, K], log-probs [L, K]); the last row is empty.

        Raises:
            OSError: when the server refuses for good, or still refuses after the retries.
            ValueError: when its answer does not fit the sequence.
        """
        prompt = [int(token) for token in tokens]
        body: dict[str, Any] = {"model": self.model, "prompt": prompt, "max_tokens": 1}
        if self.mode == "echo":
            body.update(echo=True, logprobs=self.top_k, return_tokens_as_token_ids=True)
        else:
            body.update(prompt_logprobs=self.top_k)
        choice = self._choice(self._request(body))
        if self.mode == "prompt_logprobs":
            found = choice.get("prompt_logprobs")
        else:
            found = echoed((choice.get("logprobs") or {}), len(prompt))
        if not found:
            raise ValueError(
                f"ServerTeacher: the answer must hold {self.mode}, got none for a prompt of "
                f"{len(prompt)} tokens. Does the server of {self.model!r} support it?"
            )
        return prompt_rows(tokens, found)

    def _choice(self, answer: Any) -> Mapping[str, Any]:
        try:
            return answer["choices"][0]
        except (KeyError, IndexError, TypeError):
            raise ValueError(
                f"ServerTeacher: the answer must hold choices, got {str(answer)[:200]!r}."
            ) from None

    def _request(self, body: Mapping[str, Any]) -> Any:
        """POST with retries; the answer's JSON."""
        for attempt in range(self.retries + 1):
            self._wait_for_turn()
            try:
                return self._post(body)
            except urllib.error.HTTPError as error:
                refusal = f"HTTP {error.code}: {error.read(500).decode(errors='replace')}"
                retry_after = error.headers.get("Retry-After") if error.headers else None
                if error.code not in RETRY_STATUS:
                    raise OSError(
                        f"ServerTeacher: {self.base_url} must accept the request, got {refusal}"
                    ) from None
            except (OSError, http.client.HTTPException, ValueError) as error:
                refusal, retry_after = f"{type(error).__name__}: {error}", None
            if attempt < self.retries:
                time.sleep(self._pause(attempt, retry_after))
        raise OSError(
            f"ServerTeacher: {self.base_url} must answer within {self.retries + 1} attempts, got "
            f"{refusal}. What was scored is stored: run the same command again to continue."
        )

    def _post(self, body: Mapping[str, Any]) -> Any:
        headers = {"Content-Type": "application/json"}
        key = os.environ.get(self.api_key_env)
        if key:
            headers["Authorization"] = f"Bearer {key}"
        request = urllib.request.Request(
            f"{self.base_url.rstrip('/')}/completions", json.dumps(body).encode(), headers
        )
        with urllib.request.urlopen(request, timeout=self.timeout) as answer:
            return json.loads(answer.read(MAX_RESPONSE))

    def _pause(self, attempt: int, retry_after: str | None) -> float:
        """Seconds to wait before another attempt."""
        try:
            asked = float(retry_after or 0)
        except ValueError:  # a date
            asked = 0.0
        jittered = self.backoff * 2**attempt * random.uniform(0.5, 1.0)
        return min(max(asked, jittered), self.max_wait)

    def _wait_for_turn(self) -> None:
        """Space requests evenly over the minute."""
        if self.requests_per_minute is None:
            return
        with self._guard:
            now = time.monotonic()
            turn = max(now, self._next)
            self._next = turn + 60 / self.requests_per_minute
        time.sleep(turn - now)


def echoed(logprobs: Mapping[str, Any], length: int) -> list[dict[str, float] | None]:
    """An echoed prompt's top_logprobs as prompt_logprobs: "token_id:5" becomes "5"."""
    found: list[dict[str, float] | None] = []
    for element in (logprobs.get("top_logprobs") or [])[:length]:
        if element is None:
            found.append(None)
            continue
        if any(not name.startswith("token_id:") for name in element):
            raise ValueError(
                f"ServerTeacher: tokens must be named 'token_id:N', got {sorted(element)[:3]}. "
                "The server ignores return_tokens_as_token_ids: use mode='prompt_logprobs'."
            )
        found.append({name.partition(":")[2]: value for name, value in element.items()})
    return found


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
    progress: bool = True,
) -> TeacherCache:
    """Cache a served teacher's log-probs; run again, it continues where it was stopped.

    Args:
        teacher: the server.
        sequences: one-dimensional integer token ids of the teacher's tokenizer, at least 2 long.
        path: the cache's folder.
        live_vocab: the teacher's tokens; the tokenizer's length when None.
        tokenizer: its fingerprint is recorded.
        revision: of the teacher, for the record: a server does not tell.
        codec: how rows are stored.
        shard_tokens: tokens in a shard: what a killed run loses at most.
        max_length: longer sequences are refused.
        limit: use only the first so many sequences.
        progress: show tokens/s and the time left.

    Returns:
        The finished cache. A row holds the top_k likeliest tokens, and the text's own next token
        where it is not among them; the last row of every sequence is empty.
    """
    from kd.vocab import tokenizer_fingerprint

    live = live_vocab or (len(tokenizer) if tokenizer is not None else 0)
    if live < 1:
        raise ValueError(
            "build_cache_from_server: live_vocab or tokenizer must be given, got neither. A "
            "server does not say how many tokens its model has."
        )
    meta = CacheMeta(
        teacher={"id": teacher.model, "revision": revision, "server": teacher.mode},
        tokenizer=tokenizer_fingerprint(tokenizer) if tokenizer is not None else {},
        live_vocab=live,
        padded_vocab=live,
        top_k=min(teacher.top_k + 1, live),
        codec=codec,
    )
    meter = Meter(None, progress)
    try:
        with (
            CacheWriter(path, meta, shard_tokens=shard_tokens) as writer,
            ThreadPoolExecutor(teacher.concurrency) as pool,
        ):
            under_way: list[Future[Item]] = []
            try:
                for (tokens,) in batches(sequences, 1, limit, max_length):
                    if tokens in writer:
                        meter.advance(len(tokens), fresh=False)
                        continue
                    under_way.append(pool.submit(teacher.score, tokens))
                    if len(under_way) >= 2 * teacher.concurrency:
                        _store(writer, under_way.pop(0), meter)
                while under_way:
                    _store(writer, under_way.pop(0), meter)
            except BaseException:
                for future in under_way:
                    future.cancel()
                writer.keep_pending()  # what was paid for is not thrown away
                raise
    finally:
        meter.close()
    return TeacherCache(path)


def _store(writer: CacheWriter, future: Future[Item], meter: Meter) -> None:
    tokens, ids, logprobs = future.result()
    writer.add(tokens, ids, logprobs)
    meter.advance(len(tokens), fresh=True)
