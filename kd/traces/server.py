"""Traces from a vLLM or any OpenAI-compatible server: bounded, retried, resumed, counted."""

from __future__ import annotations

import asyncio
import hashlib
import json
import re
from collections import deque
from collections.abc import Iterable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import KW_ONLY, dataclass, field
from pathlib import Path
from typing import Any

from kd.files import JsonLines
from kd.serving import Endpoint, ServerError
from kd.traces.conversations import messages
from kd.traces.counts import DropCounts
from kd.traces.sampling import Sampling
from kd.traces.trace import Trace, split_completion

LARGEST = 64 * 2**20
# Off, in the words of OpenAI's servers, and of those that have more (vLLM, SGLang): a request that
# does not say so is sampled by what the model's generation_config, or the server, asks for.
STANDARD: dict[str, Any] = {"presence_penalty": 0.0, "frequency_penalty": 0.0}
BEYOND: dict[str, Any] = {"top_k": -1, "min_p": 0.0, "repetition_penalty": 1.0}
_UNKNOWN = re.compile(
    r"top_k|min_p|\w+_penalty|(unrecogni[sz]ed|unknown|unexpected|unsupported|extra|additional)"
    r"\W+(request\W+)?(argument|field|input|param|propert|key)",
    re.IGNORECASE,
)
TOKEN_BYTES = 256  # of JSON for one token of an answer, at most on average


@dataclass(frozen=True, repr=False)
class Server(Endpoint):
    """An OpenAI-compatible chat server; the other fields are those of ``kd.serving.Endpoint``.

    Attributes:
        input_price: of a million prompt tokens, for the cost in the report.
        output_price: of a million completion tokens.

    Every request states what the sampling does not ask for: penalties 0 or 1, ``top_k`` -1,
    ``min_p`` 0. A server that does not know such fields is asked without those beyond OpenAI's,
    or without any, from then on; ``unstated`` names them, and its own defaults apply.
    """

    _: KW_ONLY
    concurrency: int = 32
    retries: int = 5
    timeout: float = 600.0
    input_price: float = 0.0
    output_price: float = 0.0
    unstated: list[str] = field(default_factory=list, init=False, repr=False, compare=False)

    def chat(self, conversation: list[dict[str, str]], **options: Any) -> dict[str, Any]:
        """One answer: {"message", "finish_reason", "usage", "retries", "sampling"}.

        The message's "content" and "reasoning_content" are text, empty where the server gives
        none. What has no content (a refusal, one cut in its thought, a tool call) is an answer.
        "sampling" is every field that was sent beside the conversation.

        Raises:
            kd.serving.ServerError: it failed for good, or every attempt did.
        """
        # Some servers send the conversation back.
        limit = (
            2**20
            + 2 * len(json.dumps(conversation))
            + TOKEN_BYTES * options.get("max_tokens", LARGEST // TOKEN_BYTES)
        )
        # Half a character, which a message cannot hold, is sent as "?".
        conversation = json.loads(
            json.dumps(conversation, ensure_ascii=False).encode("utf-8", "replace")
        )
        off = {k: v for k, v in {**BEYOND, **STANDARD}.items() if k not in self.unstated}
        while True:
            try:
                answer = self._ask(conversation, {**off, **options}, min(limit, LARGEST))
            except ServerError as error:
                unknown = error.reason in ("HTTP 400", "HTTP 422") and _UNKNOWN.search(error.detail)
                if not unknown or not off or set(BEYOND) & set(options):
                    raise
                off = STANDARD if set(BEYOND) & set(off) else {}
                continue
            self.unstated[:] = sorted({*BEYOND, *STANDARD} - {*off, *options})
            return answer

    def _ask(
        self, conversation: list[dict[str, str]], sent: dict[str, Any], limit: int
    ) -> dict[str, Any]:
        def call(client: Any) -> Any:
            known = {name: value for name, value in sent.items() if name not in BEYOND}
            beyond = {name: value for name, value in sent.items() if name in BEYOND}
            return client.chat.completions.with_raw_response.create(
                model=self.model, messages=conversation, **known, extra_body=beyond
            )

        answer, retries = self.ask(call, limit, _read_answer)
        return {**answer, "retries": retries, "sampling": sent}

    async def chat_async(
        self, conversation: list[dict[str, str]], **options: Any
    ) -> dict[str, Any]:
        """``chat`` for callers with an event loop; it runs in a thread."""
        return await asyncio.to_thread(self.chat, conversation, **options)


def _read_answer(answer: Any) -> dict[str, Any]:
    """What ``chat`` returns, of a server's JSON; an error when it has another shape."""
    choice, usage = answer["choices"][0], answer.get("usage")
    said, finish = choice["message"], choice.get("finish_reason")
    thought = _text(said.get("reasoning_content") or said.get("reasoning"))
    rest = {name: value for name, value in said.items() if name != "reasoning"}
    return {
        "message": {**rest, "content": _text(said.get("content")), "reasoning_content": thought},
        "finish_reason": finish if isinstance(finish, str) else "",
        "usage": usage if isinstance(usage, dict) else {},
    }


def _text(value: Any) -> str:
    """A message's text, which may be null or come in parts."""
    if isinstance(value, list):
        return "".join(part["text"] for part in value)
    if not isinstance(value, str | None):
        raise TypeError(f"texts must be strings, got {type(value).__name__}")
    return value or ""


def without_content(answer: dict[str, Any]) -> str:
    """Why an answer of ``Server.chat`` has no content; empty when it has some."""
    message, finish = answer["message"], answer.get("finish_reason")
    if message.get("refusal") or finish == "refusal":
        return "refusal"
    if (message.get("content") or "").strip():
        return ""
    if message.get("tool_calls") or message.get("function_call"):
        return "tool call"
    reasons = {"length": "cut at the length limit", "content_filter": "content filter"}
    return reasons.get(str(finish), "no content")


def generate_server(
    server: Server,
    problems: Iterable[str | Trace],
    *,
    sampling: Sampling | None = None,
    n: int = 1,
    journal: str | Path | None = None,
    report: DropCounts,
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
        report: takes the counts; tokens, retries, cost, what was sent as sampling and, by
            reason, the answers without content are notes.
        stage: the stage's name in the report.

    Yields:
        The traces. ``metadata`` says "sample", "finish", "sampling" (all that was sent) and the
        tokens; an answer without content
        is a trace too: "without_content" says why ("cut at the length limit", "refusal", "tool
        call", "content filter", "no content"), and "refusal" and "tool_calls" hold what there is.
    """
    sampling = sampling or Sampling()
    counted = report.stage(stage)
    answers = _Answers(journal)
    asked = (Trace(item) if isinstance(item, str) else item for item in problems)
    jobs = ((trace, k) for trace in asked for k in range(n))

    def ask(trace: Trace, k: int) -> tuple[str, dict[str, Any]]:
        options = {**sampling.served(), "seed": sampling.seed + k}
        conversation = messages(trace)
        stated = {**BEYOND, **STANDARD, **options}  # answers sampled otherwise are other answers
        request = json.dumps([server.model, conversation, stated], sort_keys=True)
        key = hashlib.blake2b(request.encode("utf-8", "replace"), digest_size=16).hexdigest()
        if key in answers.known:
            return key, answers.known[key]
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
                        yield from _take(waiting, server, counted, answers)
                while waiting:
                    yield from _take(waiting, server, counted, answers)
            finally:
                pool.shutdown(wait=True, cancel_futures=True)
                for _, _, future in waiting:  # paid for, although nobody takes them any more
                    if not future.cancelled() and future.exception() is None:
                        answers.add(*future.result())
    finally:
        answers.close()


def _take(waiting: Any, server: Server, counted: Any, answers: _Answers) -> Iterator[Trace]:
    trace, k, future = waiting.popleft()
    key, answer = future.result()
    if "failed" in answer:
        counted.drop(f"teacher failed: {answer['failed']}", trace, answer["detail"])
        return
    answers.add(key, answer)
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
        counted.notes[name] = counted.notes.get(name, 0) + value
    cost = counts.get("prompt_tokens", 0) * server.input_price
    cost += counts.get("completion_tokens", 0) * server.output_price
    counted.notes["cost"] = counted.notes.get("cost", 0.0) + cost / 1e6
    sent = answer.get("sampling", {})
    counted.notes["sampling"] = {k: v for k, v in sent.items() if k != "seed"}
    if server.unstated:
        counted.notes["not stated"] = ", ".join(server.unstated)
    reason = without_content(answer)
    if reason:
        absent = counted.notes.setdefault("without_content", {})
        absent[reason] = absent.get(reason, 0) + 1
        counts["without_content"] = reason
        counts.update({name: said[name] for name in ("refusal", "tool_calls") if said.get(name)})
    counted.keep()
    finish = answer.get("finish_reason") or ""
    yield trace.replace(think=think, answer=text).note(
        sample=k, finish=finish, sampling=sent, **counts
    )


class _Answers:
    """Answers by the content of the request; in a file, where there is one."""

    def __init__(self, path: str | Path | None) -> None:
        self.lines = None if path is None else JsonLines(path)
        self.known: dict[str, Any] = {}
        for entry in self.lines or ():
            if isinstance(entry, dict) and {"key", "answer"} <= set(entry):
                self.known[entry["key"]] = entry["answer"]

    def add(self, key: str, answer: dict[str, Any]) -> None:
        if self.lines is not None and key not in self.known and "failed" not in answer:
            self.lines.add({"key": key, "answer": answer})
            self.known[key] = answer

    def close(self) -> None:
        if self.lines is not None:
            self.lines.close()
