"""Traces from a vLLM or any OpenAI-compatible server: bounded, retried, resumed, counted."""

from __future__ import annotations

import asyncio
import hashlib
import http.client
import json
import os
import random
import time
from collections import deque
from collections.abc import Iterable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

from kd.traces.generation import Sampling, messages
from kd.traces.trace import Trace, split_completion
from kd.traces.yields import Yield

AGAIN = (408, 409, 425, 429, 500, 502, 503, 504, 529)
LARGEST = 64 * 2**20


class ServerError(OSError):
    """A request that failed for good; ``reason`` is the phrase that yields count."""

    def __init__(self, reason: str, detail: str = "") -> None:
        super().__init__(f"{reason}: {detail}" if detail else reason)
        self.reason = reason
        self.detail = detail


@dataclass(frozen=True)
class Server:
    """An OpenAI-compatible chat server.

    Attributes:
        address: up to and with ``/v1``.
        model: the name the server knows it by.
        key_variable: environment variable that holds the key; empty for none.
        concurrency: requests in flight.
        retries: after the first attempt, for 429, 5xx, broken connections and garbage.
        wait: seconds before the first retry; doubled each time, up to a minute, with jitter; a
            ``Retry-After`` of the server counts when it is longer.
        timeout: seconds without an answer.
        input_price: of a million prompt tokens, for the cost in the report.
        output_price: of a million completion tokens.
    """

    address: str
    model: str
    key_variable: str = ""
    concurrency: int = 32
    retries: int = 5
    wait: float = 1.0
    timeout: float = 600.0
    input_price: float = 0.0
    output_price: float = 0.0

    def __post_init__(self) -> None:
        parts = urlsplit(self.address)
        if parts.scheme not in ("http", "https") or not parts.hostname:
            raise ValueError(
                f"Server: address must start with http:// or https://, got {self.address!r}. "
                "Write it as http://host:port/v1."
            )
        if self.concurrency < 1 or self.retries < 0:
            raise ValueError(
                "Server: concurrency must be at least 1 and retries at least 0, got "
                f"{self.concurrency} and {self.retries}."
            )
        if self.key_variable and not os.environ.get(self.key_variable):
            raise ValueError(
                f"Server: key_variable must name a set environment variable, got "
                f"{self.key_variable!r}. Export it first."
            )

    def chat(self, conversation: list[dict[str, str]], **options: Any) -> dict[str, Any]:
        """One answer: {"message", "finish_reason", "usage", "retries"}.

        Raises:
            ServerError: it failed for good, or every attempt did.
        """
        body = json.dumps({"model": self.model, "messages": conversation, **options}).encode()
        wait = self.wait
        for attempt in range(self.retries + 1):
            try:
                return {**self._attempt(body), "retries": attempt}
            except _Again as problem:
                if attempt == self.retries:
                    raise ServerError(problem.reason, problem.detail) from None
                time.sleep(max(problem.after, wait * random.uniform(0.5, 1.0)))
                wait = min(60.0, 2 * wait)
        raise AssertionError

    async def chat_async(
        self, conversation: list[dict[str, str]], **options: Any
    ) -> dict[str, Any]:
        """``chat`` for callers with an event loop; it runs in a thread."""
        return await asyncio.to_thread(self.chat, conversation, **options)

    def _attempt(self, body: bytes) -> dict[str, Any]:
        parts = urlsplit(self.address)
        kind = (
            http.client.HTTPSConnection if parts.scheme == "https" else http.client.HTTPConnection
        )
        connection = kind(str(parts.hostname), parts.port, timeout=self.timeout)
        headers = {"Content-Type": "application/json"}
        if self.key_variable:
            headers["Authorization"] = f"Bearer {os.environ[self.key_variable]}"
        try:
            connection.request("POST", f"{parts.path.rstrip('/')}/chat/completions", body, headers)
            response = connection.getresponse()
            data = response.read(LARGEST + 1)
            if response.length and len(data) <= LARGEST:
                raise http.client.IncompleteRead(b"", response.length)
        except (OSError, http.client.HTTPException) as error:
            raise _Again("server unreachable", f"{type(error).__name__}: {error}") from None
        finally:
            connection.close()
        if response.status in AGAIN:
            after = response.headers.get("Retry-After", "")
            seconds = min(120.0, float(after)) if after.replace(".", "", 1).isdigit() else 0.0
            raise _Again(f"HTTP {response.status}", _excerpt(data), seconds)
        if response.status != 200:
            raise ServerError(f"HTTP {response.status}", _excerpt(data))
        try:
            if len(data) > LARGEST:
                raise ValueError("larger than 64 MiB")
            answer = json.loads(data)
            choice = answer["choices"][0]
            said = choice["message"]
            if not isinstance(said.get("content") or said.get("reasoning_content"), str):
                raise ValueError("no content")
        except (ValueError, KeyError, IndexError, TypeError, AttributeError) as error:
            raise _Again("garbage from the server", f"{error}; {_excerpt(data)}") from None
        usage = answer.get("usage")
        return {
            "message": said,
            "finish_reason": choice.get("finish_reason"),
            "usage": usage if isinstance(usage, dict) else {},
        }


class _Again(Exception):
    def __init__(self, reason: str, detail: str, after: float = 0.0) -> None:
        super().__init__(reason)
        self.reason, self.detail, self.after = reason, detail, after


def _excerpt(data: bytes) -> str:
    return data[:200].decode("utf-8", "replace")


def generate_server(
    server: Server,
    problems: Iterable[str | Trace],
    *,
    sampling: Sampling | None = None,
    n: int = 1,
    journal: str | Path | None = None,
    report: Yield,
    stage: str = "generate",
) -> Iterator[Trace]:
    """Sample answers from a server, in order, with ``server.concurrency`` requests in flight.

    Args:
        server: where.
        problems: prompts, or traces to be answered.
        sampling: temperature, top-p, length and seed; the R1 defaults when None.
        n: samples for each problem, each its own request.
        journal: a JSON-lines file of answers by the content of the request; a rerun asks only
            for what is missing. Failures are asked again.
        report: takes the counts; tokens, retries and cost are notes.
        stage: the stage's name in the report.
    """
    sampling = sampling or Sampling()
    tally = report.stage(stage)
    known = _read(journal)
    asked = (Trace(item) if isinstance(item, str) else item for item in problems)
    jobs = ((trace, k) for trace in asked for k in range(n))
    log = _open(journal)

    def ask(trace: Trace, k: int) -> tuple[str, dict[str, Any]]:
        options = {
            "temperature": sampling.temperature,
            "top_p": sampling.top_p,
            "max_tokens": sampling.max_new_tokens,
            "seed": sampling.seed + k,
        }
        conversation = messages(trace)
        request = json.dumps([server.model, conversation, options], sort_keys=True)
        key = hashlib.blake2b(request.encode("utf-8", "replace"), digest_size=16).hexdigest()
        if key in known:
            return key, known[key]
        try:
            return key, server.chat(conversation, **options)
        except ServerError as error:
            return key, {"failed": error.reason, "detail": error.detail}

    waiting: deque[tuple[Trace, int, Future[tuple[str, dict[str, Any]]]]] = deque()
    try:
        with ThreadPoolExecutor(server.concurrency, thread_name_prefix="kd-generate") as pool:
            try:
                for trace, k in jobs:
                    waiting.append((trace, k, pool.submit(ask, trace, k)))
                    if len(waiting) >= 2 * server.concurrency:
                        yield from _take(waiting, server, tally, known, log)
                while waiting:
                    yield from _take(waiting, server, tally, known, log)
            finally:
                pool.shutdown(wait=True, cancel_futures=True)
    finally:
        if log is not None:
            log.close()


def _take(waiting: Any, server: Server, tally: Any, known: dict[str, Any], log: Any) -> Any:
    trace, k, future = waiting.popleft()
    key, answer = future.result()
    if "failed" in answer:
        tally.drop(f"teacher failed: {answer['failed']}", trace, answer["detail"])
        return
    if log is not None and key not in known:
        log.write(json.dumps({"key": key, "answer": answer}) + "\n")
        known[key] = answer
    said, usage = answer["message"], answer["usage"]
    thought = said.get("reasoning_content") or said.get("reasoning") or ""
    content = said.get("content") or ""
    think, text = (thought.strip(), content.strip()) if thought else split_completion(content)
    counts = {
        name: usage[name]
        for name in ("prompt_tokens", "completion_tokens")
        if isinstance(usage.get(name), int)
    }
    for name, value in {**counts, "retries": answer.get("retries", 0)}.items():
        tally.notes[name] = tally.notes.get(name, 0) + value
    cost = counts.get("prompt_tokens", 0) * server.input_price
    cost += counts.get("completion_tokens", 0) * server.output_price
    tally.notes["cost"] = tally.notes.get("cost", 0.0) + cost / 1e6
    tally.keep()
    finish = answer.get("finish_reason") or ""
    yield trace.replace(think=think, answer=text).note(sample=k, finish=finish, **counts)


def _read(journal: str | Path | None) -> dict[str, Any]:
    found: dict[str, Any] = {}
    if journal is None or not Path(journal).exists():
        return found
    with Path(journal).open("rb") as file:
        for line in file:
            try:
                entry = json.loads(line)
                found[entry["key"]] = entry["answer"]
            except (ValueError, KeyError, TypeError):
                continue  # torn by a crash: it is asked again
    return found


def _open(journal: str | Path | None) -> Any:
    if journal is None:
        return None
    path = Path(journal)
    path.parent.mkdir(parents=True, exist_ok=True)
    torn = path.exists() and path.read_bytes()[-1:] not in (b"", b"\n")
    file = path.open("a", encoding="utf-8", buffering=1)
    if torn:
        file.write("\n")
    return file
