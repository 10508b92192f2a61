"""Verifiers: each is called with a trace and returns a ``Verdict``."""

from kd.sandbox import Bubblewrap, Limits, Run, SandboxClosed, UnsafeSubprocess
from kd.traces.verifiers.answers import Choice, Exact, Numeric, final_answer, last_boxed
from kd.traces.verifiers.code import Code
from kd.traces.verifiers.process import Maths, ReasoningGym, gym_problems
from kd.traces.verifiers.verdict import CORRECT, ERROR, UNKNOWN, WRONG, Verdict, Verifier

__all__ = [
    "CORRECT",
    "ERROR",
    "UNKNOWN",
    "WRONG",
    "Bubblewrap",
    "Choice",
    "Code",
    "Exact",
    "Limits",
    "Maths",
    "Numeric",
    "ReasoningGym",
    "Run",
    "SandboxClosed",
    "UnsafeSubprocess",
    "Verdict",
    "Verifier",
    "final_answer",
    "gym_problems",
    "last_boxed",
]
