"""The work of ``kd evaluate``: one model measured, and all of them on one page."""

from __future__ import annotations

import argparse
import json
from dataclasses import dataclass
from itertools import islice
from pathlib import Path
from typing import Any

from kd.evaluation import (
    NATS,
    Closeness,
    Evaluation,
    Likelihood,
    closeness,
    compare_runs,
    evaluate,
    intervals_figure,
    likelihood,
    percent,
    read_problems,
    text_table,
)
from kd.evaluation.texts import blocks, documents
from kd.models import load_model, load_tokenizer, mixed_precision
from kd.page import Page
from kd.recipe import Progress
from kd.traces import advice
from kd.traces.verifiers.registry import DEFAULT

BLOCK = 512


@dataclass
class Measured:
    """What is known of one model."""

    answers: Evaluation | None = None
    text: Likelihood | None = None
    traces: Likelihood | None = None
    teacher: Closeness | None = None


def measure(label: str, name: str, args: argparse.Namespace) -> Measured:
    """Everything that was asked for, of one model."""
    found = Measured()
    if args.server:
        found.answers = _ask(label, args, server=_server(name, args))
        return found
    tokenizer = load_tokenizer(name)
    if args.cache:
        _same_tokenizer(tokenizer, args.cache)
    model = load_model(name).eval()
    if args.problems:
        found.answers = _ask(label, args, model=model, tokenizer=tokenizer)
    if args.text:
        length = min(BLOCK, getattr(model.config, "max_position_embeddings", BLOCK))
        rows = list(blocks(tokenizer, documents(args.text), length))
        with Progress(f"{label}: reading", len(rows)) as bar, mixed_precision():
            found.text = likelihood(model, rows, progress=bar.to)
    if args.cache:
        from kd.cache import TeacherCache

        cache = TeacherCache(args.cache)
        rows = _rendered(args.traces, tokenizer, args.limit, cache.manifest.rendering)
        with Progress(f"{label}: beside the teacher", len(rows)) as bar, mixed_precision():
            found.traces, found.teacher = closeness(model, cache, rows, progress=bar.to)
    return found


def _verifier(args: argparse.Namespace) -> str:
    """The name of the verifier: what was asked for, else reasoning-gym's own, else the default."""
    return args.verifier or ("gym" if args.problems.startswith("gym:") else DEFAULT)


def _ask(label: str, args: argparse.Namespace, **who: Any) -> Evaluation:
    from kd.traces import Sampling, verifier

    problems = read_problems(args.problems, args.limit, args.seed)
    temperature = args.temperature
    if temperature is None:
        temperature = 0.0 if args.samples == 1 else 0.6
    journal = None
    if args.server and args.output:
        args.output.mkdir(parents=True, exist_ok=True)
        journal = args.output / f"{label}.answers.jsonl"
    words = f"{label}: answering, at most {args.max_new_tokens:,} tokens each"
    with Progress(words, len(problems) * args.samples) as bar:
        return evaluate(
            problems,
            verifier(_verifier(args)),
            n=args.samples,
            sampling=Sampling(temperature, args.top_p, args.max_new_tokens, args.seed),
            batch_size=args.batch_size,
            chat=not args.no_chat,
            journal=journal,
            progress=bar.to,
            **who,
        )


def _server(name: str, args: argparse.Namespace) -> Any:
    from kd.traces import Server

    return Server(args.server, name, key_variable=args.key_variable)


def _same_tokenizer(tokenizer: Any, path: Path) -> None:
    from kd.cache import TeacherCache
    from kd.vocab import fingerprint_differences, tokenizer_fingerprint

    cached = TeacherCache(path).meta.tokenizer
    found = fingerprint_differences(cached, tokenizer_fingerprint(tokenizer)) if cached else []
    serious = [words for words in found if not words.startswith("template")]
    if serious:
        raise ValueError(
            "kd evaluate: the model must have the cache's tokenizer, got differences (cache and "
            f"model): {'; '.join(serious[:4])}. Use a cache in the model's own ids."
        )


def _rendered(path: Path, tokenizer: Any, limit: int, way: dict[str, Any]) -> list[dict[str, Any]]:
    from kd.traces import AnyRenderer, Yield, as_recorded, render_rows

    report = Yield()
    rows = render_rows(path, AnyRenderer(tokenizer, **as_recorded(way)), report=report)
    found = [row._asdict() for row in islice(rows, limit or None)]
    if not found:
        raise ValueError(
            f"kd evaluate: --traces must hold rows that can be rendered, got none in {path}:\n"
            f"{report.table()}"
        )
    return found


# --- the page -------------------------------------------------------------------------------------


def write_page(found: dict[str, Measured], args: argparse.Namespace) -> str:
    """The tables as text; with --output also report.html and results.json."""
    page = Page("Evaluation: " + ", ".join(found))
    parts = []
    if args.problems:
        parts.append(_answers(page, found, args))
    if args.text:
        parts.append(_text(page, found, args))
    if args.cache:
        parts.append(_teacher(page, found))
    if args.output:
        plain = {label: _plain(one) for label, one in found.items()}
        parts.append(f"report: {page.save(args.output / 'report.html')}")
        (args.output / "results.json").write_text(json.dumps(plain, indent=1))
    return "\n\n".join(parts)


def _answers(page: Page, found: dict[str, Measured], args: argparse.Namespace) -> str:
    answers = {label: one.answers for label, one in found.items() if one.answers is not None}
    wanted = [int(part) for part in args.pass_at.split(",")]
    header = [
        "",
        *(f"pass@{k}" for k in wanted),
        "95 % interval",
        "unfinished",
        "undecided",
        "tokens",
    ]
    rows = []
    words: list[str] = []
    for label, one in answers.items():
        low, high = one.interval()
        rows.append(
            [
                label,
                *(percent(one.pass_at(k)) for k in wanted),
                f"{percent(low)} to {percent(high)}",
                percent(one.unfinished),
                percent(one.undecided),
                f"{one.tokens:.0f}",
            ]
        )
        words += _doubts(label, one, args)
    first, *others = answers
    words += [
        compare_runs(first, other, _shares(answers[first]), _shares(answers[other]))
        for other in others
    ]
    count = len(answers[first].right)
    page.heading(f"{count} problems of {args.problems}, {args.samples} sample(s) each")
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
        page.heading(f"Answers of {label}").samples(list(one.samples[:5]))
    return "\n".join([text_table(header, rows), *words])


def _doubts(label: str, one: Evaluation, args: argparse.Namespace) -> list[str]:
    """Why verdicts are missing, and another verifier where this one hardly finds any."""
    said = []
    if one.reasons:
        counted = ", ".join(f"{count} {reason}" for reason, count in one.reasons.items())
        said.append(f"{label}: undecided, counted as wrong: {counted}.")
    if one.missed and one.accuracy < 0.05:
        said.append(f"{label}: {advice(one.missed, _verifier(args))}")
    return said


def _shares(one: Evaluation) -> list[float]:
    return [sum(row) / len(row) for row in one.right]


def _text(page: Page, found: dict[str, Measured], args: argparse.Namespace) -> str:
    texts = {label: one.text for label, one in found.items() if one.text is not None}
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
    page.heading(f"Perplexity on {args.text.name}").table(header, rows)
    page.text(
        "On text that no stage trained on, a rise over the first model is what was forgotten."
    )
    for sentence in words:
        page.verdict(sentence)
    return "\n".join([text_table(header, rows), *words])


def _teacher(page: Page, found: dict[str, Measured]) -> str:
    header = ["", "same top token", "KL to teacher", "calibration gap", "perplexity of traces"]
    rows = []
    for label, one in found.items():
        if one.teacher is not None and one.traces is not None:
            close = one.teacher
            rows.append(
                [
                    label,
                    percent(close.top1),
                    f"{close.kl:.4f}",
                    percent(close.calibration),
                    f"{one.traces.perplexity:.2f}",
                ]
            )
    page.heading("Beside the teacher").table(header, rows)
    page.text(
        "On the teacher's cached rows: how often both like the same token best, the mean "
        "divergence in nats, and the gap between the model's confidence in its likeliest token "
        "and the teacher's probability for it."
    )
    return text_table(header, rows)


def _plain(one: Measured) -> dict[str, Any]:
    plain: dict[str, Any] = {}
    if one.answers is not None:
        plain["problems"] = one.answers.to_dict()
    if one.text is not None:
        plain["text"] = {"perplexity": one.text.perplexity, "interval": one.text.interval}
    if one.teacher is not None:
        close = one.teacher
        plain["teacher"] = {"kl": close.kl, "top1": close.top1, "calibration": close.calibration}
    return plain
