"""Verifiers: each is called with a trace and returns a ``Verdict``."""

from kd.traces.verifiers.answers import Choice, Exact, Numeric, final_answer, last_boxed
from kd.traces.verifiers.verdict import CORRECT, ERROR, UNKNOWN, WRONG, Verdict, Verifier

__all__ = [
    "CORRECT",
    "ERROR",
    "UNKNOWN",
    "WRONG",
    "Choice",
    "Exact",
    "Numeric",
    "Verdict",
    "Verifier",
    "final_answer",
    "last_boxed",
]
