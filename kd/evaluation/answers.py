"""Answers of one model to problems, several samples each: pass@1, pass@k, intervals, samples."""

from __future__ import annotations

import math
import statistics
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from kd.evaluation.scores import Z_95, Score
from kd.traces import (
    DropCounts,
    Sampling,
    Server,
    Trace,
    generate_local,
    generate_server,
    judge_all,
)
from kd.traces.verification import MISSED


@dataclass(frozen=True)
class Evaluation:
    """What a model made of a problem set.

    Attributes:
        right: for each problem, one entry per sample.
        unfinished: share of the samples cut at the longest answer.
        tokens: mean tokens of a completion.
        undecided: share of the samples no verdict could be had on; they count as wrong.
        samples: (prompt, completion, right) of the first sample of each problem.
        reasons: why verdicts are missing, to how often.
        missed: the first 50 samples that were not found right.
        sampling: what was sent to the model with every problem.
    """

    right: tuple[tuple[bool, ...], ...]
    unfinished: float = 0.0
    tokens: float = 0.0
    undecided: float = 0.0
    samples: tuple[tuple[str, str, bool], ...] = field(default=(), repr=False)
    reasons: Mapping[str, int] = field(default_factory=dict, hash=False)
    missed: tuple[Trace, ...] = field(default=(), repr=False)
    sampling: Mapping[str, Any] = field(default_factory=dict, hash=False, repr=False)

    @property
    def accuracy(self) -> float:
        """pass@1: the mean over problems of the share of right samples."""
        return self.pass_at(1)

    def pass_at(self, k: int) -> float:
        """The probability that one of k samples is right, unbiased from n >= k samples."""
        return statistics.fmean(pass_at_k(len(row), sum(row), k) for row in self.right)

    def interval(self, k: int = 1) -> tuple[float, float]:
        """95 %, over problems like these: samples of one problem are not counted as independent.

        Wilson's where each problem has one sample, else from the spread between problems.
        """
        if k == 1 and all(len(row) == 1 for row in self.right):
            return Score(tuple(row[0] for row in self.right)).interval
        values = [pass_at_k(len(row), sum(row), k) for row in self.right]
        if len(values) < 2:
            return 0.0, 1.0
        mean, half = statistics.fmean(values), Z_95 * statistics.stdev(values)
        half /= math.sqrt(len(values))
        return max(0.0, mean - half), min(1.0, mean + half)

    def to_dict(self) -> dict[str, Any]:
        low, high = self.interval()
        return {
            "problems": len(self.right),
            "samples": len(self.right[0]),
            "accuracy": self.accuracy,
            "low": low,
            "high": high,
            "unfinished": self.unfinished,
            "tokens": self.tokens,
            "undecided": self.undecided,
            "reasons": dict(self.reasons),
            "sampling": dict(self.sampling),
        }


def pass_at_k(n: int, right: int, k: int) -> float:
    """Unbiased estimate of pass@k from n samples of which ``right`` were right.

    Raises:
        ValueError: k is above n or below 1.
    """
    if not 1 <= k <= n:
        raise ValueError(
            f"pass_at_k: k must be from 1 to the {n} samples of a problem, got {k}. Draw more."
        )
    if n - right < k:
        return 1.0
    return 1.0 - math.prod((n - right - i) / (n - i) for i in range(k))


def evaluate(
    problems: Sequence[Trace],
    verifier: Callable[[Trace], Any],
    *,
    model: Any = None,
    tokenizer: Any = None,
    server: Server | None = None,
    n: int = 1,
    sampling: Sampling | None = None,
    batch_size: int = 16,
    chat: bool = True,
    workers: int = 1,
    journal: Any = None,
    progress: Callable[[int], None] | None = None,
) -> Evaluation:
    """Ask a model, or a server, every problem n times, and judge the answers.

    Args:
        problems: with references.
        verifier: of ``kd.traces``.
        model: a local causal LM; or give ``server``.
        tokenizer: the local model's.
        server: an OpenAI-compatible one.
        n: samples of each problem.
        sampling: greedy when None and n is 1, else the R1 defaults.
        batch_size: samples decoded together.
        chat: wrap prompts with the chat template.
        workers: threads of the verifier.
        journal: a file for the server's answers; a rerun asks only for what is missing.
        progress: called with the number of samples done.
    """
    if not problems:
        raise ValueError("evaluate: problems must not be empty, got 0 of them.")
    if (model is None) == (server is None):
        raise ValueError(
            "evaluate: exactly one of model and server must be given, got "
            f"{'both' if model is not None else 'neither'}."
        )
    sampling = sampling or Sampling(temperature=0.0 if n == 1 else 0.6)
    asked = [trace.note(number=i) for i, trace in enumerate(problems)]
    if server is not None:
        stream = generate_server(
            server, asked, sampling=sampling, n=n, journal=journal, report=DropCounts()
        )
        answered: Any = _counted(stream, progress)
    else:
        answered = generate_local(
            model,
            tokenizer,
            asked,
            sampling=sampling,
            n=n,
            batch_size=batch_size,
            chat=chat,
            progress=progress,
        )
    return judged(problems, judge_all(answered, verifier, workers=workers), n)


def _counted(stream: Any, progress: Callable[[int], None] | None) -> Any:
    for done, trace in enumerate(stream, 1):
        if progress is not None:
            progress(done)
        yield trace


def judged(problems: Sequence[Trace], verdicts: Any, n: int) -> Evaluation:
    """An ``Evaluation`` from (trace, verdict) pairs; a sample that never came is wrong."""
    right: list[list[bool]] = [[] for _ in problems]
    samples: dict[int, tuple[str, str, bool]] = {}
    cut = 0
    tokens: list[int] = []
    reasons: Counter[str] = Counter()
    missed: list[Trace] = []
    sampling: dict[str, Any] = {}
    for trace, verdict in verdicts:
        number = trace.metadata["number"]
        sampling = sampling or dict(trace.metadata.get("sampling", {}))
        right[number].append(verdict.correct)
        cut += trace.metadata.get("finish") == "length"
        if verdict.status in ("unknown", "error"):
            reasons[verdict.label()] += 1
        if not verdict.correct and len(missed) < MISSED:
            missed.append(trace)
        if trace.metadata.get("completion_tokens") is not None:
            tokens.append(int(trace.metadata["completion_tokens"]))
        if number not in samples:
            thought = f"<think>\n{trace.think}\n</think>\n\n" if trace.think else ""
            samples[number] = (f"{trace.prompt}\n\n", thought + trace.answer, verdict.correct)
    rows = tuple(tuple(row + [False] * (n - len(row))) for row in right)
    total = len(problems) * n
    return Evaluation(
        rows,
        cut / total,
        statistics.fmean(tokens) if tokens else 0.0,
        reasons.total() / total,
        tuple(samples[i] for i in sorted(samples)),
        dict(reasons.most_common()),
        tuple(missed),
        sampling,
    )
