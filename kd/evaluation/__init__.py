"""Evaluation: generate, score with intervals, compare with standard errors, and report."""

from kd.evaluation.arms import arms_figure, arms_rows, compare_arms, percent, text_table
from kd.evaluation.generate import generate
from kd.evaluation.report import Report, open_page
from kd.evaluation.scores import Comparison, Score, compare, final_answer, score, spread

__all__ = [
    "Comparison",
    "Report",
    "Score",
    "arms_figure",
    "arms_rows",
    "compare",
    "compare_arms",
    "final_answer",
    "generate",
    "open_page",
    "percent",
    "score",
    "spread",
    "text_table",
]
