"""Evaluation: generate, score with intervals, compare with standard errors."""

from kd.evaluation.answers import Evaluation, evaluate, pass_at_k
from kd.evaluation.arms import (
    ACCURACY,
    NATS,
    PERPLEXITY,
    Metric,
    arms_figure,
    arms_rows,
    compare_arms,
    compare_runs,
    intervals_figure,
    percent,
    show_arms,
    text_table,
)
from kd.evaluation.likelihood import Closeness, Likelihood, closeness, likelihood
from kd.evaluation.problems import read_problems
from kd.evaluation.scores import Comparison, Score, compare, is_right, score, spread
from kd.traces.generation import generate

__all__ = [
    "ACCURACY",
    "NATS",
    "PERPLEXITY",
    "Closeness",
    "Comparison",
    "Evaluation",
    "Likelihood",
    "Metric",
    "Score",
    "arms_figure",
    "arms_rows",
    "closeness",
    "compare",
    "compare_arms",
    "compare_runs",
    "evaluate",
    "generate",
    "intervals_figure",
    "is_right",
    "likelihood",
    "pass_at_k",
    "percent",
    "read_problems",
    "score",
    "show_arms",
    "spread",
    "text_table",
]
