"""Runs a verifier over traces: in parallel, resumable, and never stopped by one bad sample."""

from __future__ import annotations

import hashlib
import json
import time
from collections import deque
from collections.abc import Callable, Collection, Iterable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path
from typing import Any

from kd.files import JsonLines
from kd.traces.counts import DropCounts, StageCounts, metered
from kd.traces.trace import Trace
from kd.traces.verifiers.registry import identity
from kd.traces.verifiers.verdict import CORRECT, ERROR, UNKNOWN, Verdict, Verifier

MISSED = 50


def verify(
    traces: Iterable[Trace],
    verifier: Verifier,
    *,
    keep: Collection[str] = (CORRECT,),
    workers: int = 1,
    journal: str | Path | None = None,
    report: DropCounts | None = None,
    stage: str = "verify",
) -> tuple[list[Trace], DropCounts]:
    """Check every trace and keep those whose verdict has a wanted status.

    Args:
        traces: what to check.
        verifier: called as ``verifier(trace)``, returns a ``Verdict``; one that raises counts as
            status "error", never as "wrong".
        keep: statuses that pass: "correct", "wrong", "unknown", "error".
        workers: threads; verifiers that run another process (mathematics, code) use the cores.
        journal: a JSON-lines file of verdicts; a rerun continues from it.
        report: the yield to add to; a new one by default.
        stage: the stage's name in the report.

    Returns:
        The kept traces in their order, each with its verdict in ``metadata["verdict"]``, and the
        yield.
    """
    report = DropCounts() if report is None else report
    stream = verify_stream(
        traces, verifier, keep=keep, workers=workers, journal=journal, report=report, stage=stage
    )
    return list(stream), report


def verify_stream(
    traces: Iterable[Trace],
    verifier: Verifier,
    *,
    keep: Collection[str] = (CORRECT,),
    workers: int = 1,
    journal: str | Path | None = None,
    report: DropCounts,
    stage: str = "verify",
    missed: list[Trace] | None = None,
) -> Iterator[Trace]:
    """``verify`` one trace at a time, in order, holding only a few in memory.

    ``missed`` takes the first 50 that were not found correct: ``verifiers.advice`` says what to do
    where that is all of them.
    """
    counted = report.stage(stage)
    judged = judge_all(traces, verifier, workers=workers, journal=journal)
    return metered(counted, _kept(judged, keep, counted, [] if missed is None else missed))


def _kept(
    judged: Iterator[tuple[Trace, Verdict]],
    keep: Collection[str],
    counted: StageCounts,
    missed: list[Trace],
) -> Iterator[Trace]:
    statuses: dict[str, int] = counted.notes.setdefault("statuses", {})
    undecided: dict[str, int] = counted.notes.setdefault("undecided", {})
    for trace, verdict in judged:
        spent = counted.notes.get("verifier_seconds", 0.0) + verdict.seconds
        counted.notes["verifier_seconds"] = round(spent, 6)
        statuses[verdict.status] = statuses.get(verdict.status, 0) + 1
        if verdict.status in (UNKNOWN, ERROR):
            undecided[verdict.reason] = undecided.get(verdict.reason, 0) + 1
        if not verdict.correct and len(missed) < MISSED:
            missed.append(trace)
        if verdict.status in keep:
            counted.keep()
            yield trace.note(verdict=verdict.to_dict())
        else:
            counted.drop(verdict.label(), trace, verdict.detail)


def judge_all(
    traces: Iterable[Trace],
    verifier: Verifier,
    *,
    workers: int = 1,
    journal: str | Path | None = None,
) -> Iterator[tuple[Trace, Verdict]]:
    """Every trace with its verdict, in order; see ``verify``."""
    known = Journal(journal, verifier) if journal is not None else None
    try:
        yield from _ordered(traces, lambda trace: _judge(trace, verifier, known), workers)
    finally:
        if known is not None:
            known.close()


def judge(trace: Trace, verifier: Verifier) -> Verdict:
    """One verdict; an exception in the verifier becomes status "error"."""
    started = time.perf_counter()
    try:
        verdict = verifier(trace)
    except Exception as error:  # a verifier must not stop the run, whatever it raises
        verdict = Verdict(ERROR, "verifier crashed", detail=f"{type(error).__name__}: {error}")
    seconds = verdict.seconds or time.perf_counter() - started
    return Verdict(verdict.status, verdict.reason, seconds, verdict.detail, verdict.extra)


def _judge(trace: Trace, verifier: Verifier, known: Journal | None) -> Verdict:
    if known is None:
        return judge(trace, verifier)
    key = known.key(trace)
    verdict = known.get(key)
    if verdict is None:
        verdict = judge(trace, verifier)
        if verdict.status != ERROR:  # try again next time
            known.add(key, verdict)
    return verdict


def _ordered(
    traces: Iterable[Trace], function: Callable[[Trace], Verdict], workers: int
) -> Iterator[tuple[Trace, Verdict]]:
    if workers < 1:
        raise ValueError(f"verify: workers must be at least 1, got {workers}.")
    if workers == 1:
        for trace in traces:
            yield trace, function(trace)
        return
    waiting: deque[tuple[Trace, Future[Verdict]]] = deque()
    with ThreadPoolExecutor(workers, thread_name_prefix="kd-verify") as pool:
        try:
            for trace in traces:
                waiting.append((trace, pool.submit(function, trace)))
                if len(waiting) >= 4 * workers:
                    done, future = waiting.popleft()
                    yield done, future.result()
            while waiting:
                done, future = waiting.popleft()
                yield done, future.result()
        finally:
            pool.shutdown(wait=True, cancel_futures=True)


class Journal:
    """A JSON-lines file of verdicts, each by everything that it depends on.

    A verdict is taken over only for the same prompt, thought, answer and reference, the same
    ``metadata`` as far as the verifier reads it (its ``reads``; all of it where it does not say),
    and the same verifier, options and version. A line that a crash tore is skipped; its trace is
    judged again.
    """

    def __init__(self, path: str | Path, verifier: Any) -> None:
        self.verifier = identity(verifier)
        self.reads: Collection[str] | None = getattr(verifier, "reads", None)
        self._known: dict[str, Verdict] = {}
        self._lines = JsonLines(path)
        for entry in self._lines:
            try:
                if entry["verifier"] == self.verifier:
                    self._known[entry["trace"]] = Verdict.from_dict(entry["verdict"])
            except (ValueError, KeyError, TypeError):
                continue

    def key(self, trace: Trace) -> str:
        """A digest of what a verdict on this trace depends on."""
        own = ("verdict", "verdicts")  # what earlier verifiers said
        metadata = {
            key: value
            for key, value in trace.metadata.items()
            if (key in self.reads if self.reads is not None else key not in own)
        }
        rest = json.dumps([trace.reference, metadata], sort_keys=True, default=str)
        digest = hashlib.blake2b(rest.encode("utf-8", "surrogatepass"), digest_size=16)
        return f"{trace.id}-{digest.hexdigest()}"

    def get(self, key: str) -> Verdict | None:
        return self._known.get(key)

    def add(self, key: str, verdict: Verdict) -> None:
        self._lines.add({"trace": key, "verifier": self.verifier, "verdict": verdict.to_dict()})

    def close(self) -> None:
        self._lines.close()
