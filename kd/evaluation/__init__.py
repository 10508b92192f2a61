"""Evaluation: generate, score with intervals, compare with standard errors, and report."""

from kd.evaluation.arms import (
    ACCURACY,
    NATS,
    PERPLEXITY,
    Metric,
    arms_figure,
    arms_rows,
    compare_arms,
    compare_runs,
    percent,
    text_table,
)
from kd.evaluation.generate import generate
from kd.evaluation.likelihood import Closeness, Likelihood, closeness, likelihood
from kd.evaluation.report import Report, open_page
from kd.evaluation.scores import Comparison, Score, compare, final_answer, score, spread

__all__ = [
    "ACCURACY",
    "NATS",
    "PERPLEXITY",
    "Closeness",
    "Comparison",
    "Likelihood",
    "Metric",
    "Report",
    "Score",
    "arms_figure",
    "arms_rows",
    "closeness",
    "compare",
    "compare_arms",
    "compare_runs",
    "final_answer",
    "generate",
    "likelihood",
    "open_page",
    "percent",
    "score",
    "spread",
    "text_table",
]
