"""Verifiers: each is called with a trace and returns a ``Verdict``; ``VERIFIERS`` names them."""

from kd.traces.verifiers.answers import final_answer, last_boxed
from kd.traces.verifiers.choices import Choice
from kd.traces.verifiers.code import Code
from kd.traces.verifiers.exact import Exact
from kd.traces.verifiers.matching import Maths, Numeric
from kd.traces.verifiers.process import ReasoningGym, gym_problems
from kd.traces.verifiers.registry import VERIFIERS, advice, verifier
from kd.traces.verifiers.verdict import CORRECT, ERROR, UNKNOWN, WRONG, Verdict, Verifier

__all__ = [
    "CORRECT",
    "ERROR",
    "UNKNOWN",
    "VERIFIERS",
    "WRONG",
    "Choice",
    "Code",
    "Exact",
    "Maths",
    "Numeric",
    "ReasoningGym",
    "Verdict",
    "Verifier",
    "advice",
    "final_answer",
    "gym_problems",
    "last_boxed",
    "verifier",
]
