"""Every verifier by its name: what ``kd traces verify``, ``kd evaluate`` and the recipes offer."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

from kd.traces.trace import Trace
from kd.traces.verifiers.choices import Choice
from kd.traces.verifiers.exact import Exact
from kd.traces.verifiers.matching import Maths, Numeric
from kd.traces.verifiers.process import ReasoningGym
from kd.traces.verifiers.verdict import CORRECT, UNKNOWN, WRONG, Verdict, Verifier


@dataclass(frozen=True)
class Kind:
    """A verifier on offer.

    Attributes:
        make: builds it; its options are the verifier's own.
        needs: what a trace must bring.
        alone: it needs nothing but the trace: no sandbox, no server.
    """

    make: Callable[..., Verifier]
    needs: str
    alone: bool = True


def _code(**options: Any) -> Verifier:
    from kd.traces.verifiers.code import Code

    return Code(**options)


def _judge(**options: Any) -> Verifier:
    from kd.traces.verifiers.judge import Judge

    return Judge(**options)


DEFAULT = "maths"
VERIFIERS: dict[str, Kind] = {
    "maths": Kind(Maths, "a reference: a number, a term, a set, a word, ... in LaTeX or plain"),
    "numeric": Kind(Numeric, "a reference that is one number"),
    "choice": Kind(Choice, "a reference that is the letter of a choice"),
    "exact": Kind(Exact, "a reference of any text"),
    "gym": Kind(ReasoningGym, "a reasoning-gym item in metadata"),
    "code": Kind(_code, "tests in metadata, and --run-code", alone=False),
    "judge": Kind(_judge, "a reference, and a language model behind a server", alone=False),
}
ALONE = tuple(name for name, kind in VERIFIERS.items() if kind.alone)


def verifier(name: str, **options: Any) -> Verifier:
    """A verifier by its name.

    Args:
        name: one of ``VERIFIERS``.
        **options: the verifier's own, such as ``tolerance`` of "numeric".

    Raises:
        ValueError: there is none of this name.
    """
    if name not in VERIFIERS:
        known = ", ".join(VERIFIERS)
        raise ValueError(f"verifier: name must be one of {known}, got {name!r}.")
    return VERIFIERS[name].make(**options)


def identity(used: Verifier) -> str:
    """A verifier with its options and its version, as journals know it."""
    version = getattr(used, "version", 0)
    return f"{used!r} version {version}"


def advice(traces: Sequence[Trace], asked: str) -> str:
    """What to do where a verifier left nothing: what it objected to, and which one would fit.

    Args:
        traces: some of those that were not found correct.
        asked: the name of the verifier that judged them.

    Returns:
        One or two sentences.
    """
    if not traces:
        return ""
    if asked in ALONE and asked != "gym" and not any(trace.reference for trace in traces):
        return (
            f"{asked} needs {VERIFIERS[asked].needs}: none of the traces has one. Name the "
            "column of right answers: kd traces load --column MINE=reference."
        )
    said = {name: Counter[str]() for name in ALONE}
    reasons: Counter[str] = Counter()
    for name in ALONE:
        judged = verifier(name)
        for trace in traces:
            verdict: Verdict = judged(trace)
            said[name][verdict.status] += 1
            if name == asked:
                reasons[verdict.label()] += 1
    count = len(traces)
    best = max(ALONE, key=lambda name: (said[name][CORRECT], -said[name][UNKNOWN]))
    example = next((trace.reference for trace in traces if trace.reference), "")
    words = [f"Of the first {count} that {asked} did not find correct"]
    if reasons:
        words[0] += f', it called {reasons.most_common(1)[0][1]} "{reasons.most_common(1)[0][0]}"'
    words[0] += f"; a reference is {example[:60]!r}."
    if best != asked and said[best][CORRECT]:
        words.append(f"--verifier {best} finds {said[best][CORRECT]} of them correct.")
    elif asked in said and said[asked][WRONG] < count / 2:
        words.append("No other verifier decides them; kd traces judge asks a language model.")
    return " ".join(words)
