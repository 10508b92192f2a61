"""Measured models side by side: tables and plain words, for the terminal and on a page."""

from __future__ import annotations

from collections.abc import Mapping

from kd.evaluation.answers import Evaluation
from kd.evaluation.arms import NATS, compare_runs, intervals_figure, percent, text_table
from kd.evaluation.likelihood import Likelihood
from kd.evaluation.measure import Measured, Plan
from kd.page import Page
from kd.traces import advice


def summarise(found: Mapping[str, Measured], plan: Plan) -> tuple[str, Page]:
    """The tables as text, and the page with plots and samples; the first model is the baseline.

    Args:
        found: label to what was measured; at least one.
        plan: what was asked for.
    """
    page = Page("Evaluation: " + ", ".join(found))
    answers = {label: one.answers for label, one in found.items() if one.answers is not None}
    texts = {label: one.text for label, one in found.items() if one.text is not None}
    parts = []
    if answers:
        parts.append(_answers(page, answers, plan))
    if texts and plan.text:
        parts.append(_texts(page, texts, plan.text.name))
    if plan.cache:
        parts.append(_teacher(page, found))
    return "\n\n".join(parts), page


def _answers(page: Page, answers: Mapping[str, Evaluation], plan: Plan) -> str:
    wanted = [f"pass@{k}" for k in plan.pass_at]
    header = ["", *wanted, "95 % interval", "unfinished", "undecided", "tokens"]
    rows = []
    words: list[str] = []
    for label, one in answers.items():
        low, high = one.interval()
        rows.append(
            [
                label,
                *(percent(one.pass_at(k)) for k in plan.pass_at),
                f"{percent(low)} to {percent(high)}",
                percent(one.unfinished),
                percent(one.undecided),
                f"{one.tokens:.0f}",
            ]
        )
        words += _doubts(label, one, plan)
    first, *others = answers
    words += [
        compare_runs(first, other, _shares(answers[first]), _shares(answers[other]))
        for other in others
    ]
    count = len(answers[first].right)
    page.heading(f"{count} problems of {plan.problems}, {plan.samples} sample(s) each")
    for sentence in words:
        page.verdict(sentence)
    page.table(header, rows)
    page.figure(
        intervals_figure(
            {label: (one.accuracy, *one.interval()) for label, one in answers.items()}
        ),
        "pass@1 with its 95 % interval over problems.",
        "accuracy",
    )
    for label, one in answers.items():
        page.heading(f"Answers of {label}").samples(one.samples[:5])
    return "\n".join([text_table(header, rows), *words])


def _doubts(label: str, one: Evaluation, plan: Plan) -> list[str]:
    """Why verdicts are missing, and another verifier where this one hardly finds any."""
    said = []
    if one.reasons:
        counted = ", ".join(f"{count} {reason}" for reason, count in one.reasons.items())
        said.append(f"{label}: undecided, counted as wrong: {counted}.")
    if one.missed and one.accuracy < 0.05:
        said.append(f"{label}: {advice(one.missed, plan.judged_by)}")
    return said


def _shares(one: Evaluation) -> list[float]:
    return [sum(row) / len(row) for row in one.right]


def _texts(page: Page, texts: Mapping[str, Likelihood], name: str) -> str:
    header = ["", "perplexity", "95 % interval"]
    rows = []
    for label, one in texts.items():
        low, high = one.interval
        rows.append([label, f"{one.perplexity:.2f}", f"{low:.2f} to {high:.2f}"])
    first, *others = texts
    base = texts[first]
    words = []
    for other in others:
        if len(texts[other].nats) == len(base.nats):  # the same tokenizer: block by block
            a, b = ([x / y for x, y in zip(t.nats, t.tokens, strict=True)]
                    for t in (base, texts[other]))  # fmt: skip
            words.append(compare_runs(first, other, a, b, NATS, "blocks of text"))
    page.heading(f"Perplexity on {name}").table(header, rows)
    page.text(
        "On text that no stage trained on, a rise over the first model is what was forgotten."
    )
    for sentence in words:
        page.verdict(sentence)
    return "\n".join([text_table(header, rows), *words])


def _teacher(page: Page, found: Mapping[str, Measured]) -> str:
    header = ["", "same top token", "KL to teacher", "calibration gap", "perplexity of traces"]
    rows = []
    for label, one in found.items():
        if one.teacher is not None and one.traces is not None:
            close = one.teacher
            figures = percent(close.top1), f"{close.kl:.4f}", percent(close.calibration)
            rows.append([label, *figures, f"{one.traces.perplexity:.2f}"])
    page.heading("Beside the teacher").table(header, rows)
    page.text(
        "On the teacher's cached rows: how often both like the same token best, the mean "
        "divergence in nats, and the gap between the model's confidence in its likeliest token "
        "and the teacher's probability for it."
    )
    return text_table(header, rows)
