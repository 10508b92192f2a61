"""Evaluation: generate, score with intervals, compare with standard errors, and report."""

from kd.evaluation.generate import generate
from kd.evaluation.report import Report
from kd.evaluation.scores import Comparison, Score, compare, final_answer, score, spread

__all__ = [
    "Comparison",
    "Report",
    "Score",
    "compare",
    "final_answer",
    "generate",
    "score",
    "spread",
]
