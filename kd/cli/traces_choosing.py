"""What the verbs of ``kd traces`` do that choose among traces: select, filter, mix."""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import Any

from kd.cli.traces_verbs import counts_of, finish, reread, tell
from kd.models import load_tokenizer
from kd.traces.counts import DropCounts
from kd.traces.trace import Trace


def run_select(args: argparse.Namespace) -> int:
    from kd.traces.selecting import best_of_n, by_difficulty, diverse

    if args.difficulty is None and args.best is None and args.diverse is None:
        raise ValueError(
            "kd traces select: one of --difficulty, --best, --diverse must be given, got none."
        )
    report = counts_of(args)
    chosen = list(reread(args, report))
    if args.difficulty is not None:
        least, most = args.difficulty
        chosen = by_difficulty(chosen, least=least, most=most, report=report)
    if args.best is not None:
        options = {"keep": args.best, "prefer": args.prefer, "seed": args.seed}
        chosen = best_of_n(chosen, report=report, **options)
    if args.diverse is not None:
        chosen = diverse(chosen, args.diverse, by=args.by, seed=args.seed, report=report)
    return finish(args, report, chosen)


def run_filter(args: argparse.Namespace) -> int:
    from kd.traces.decontaminate import decontaminate
    from kd.traces.dedupe import exact_duplicates, near_duplicates
    from kd.traces.files import write_rows
    from kd.traces.filters import Filter, Lint, OneLanguage, Tokens, filter_stream

    report = counts_of(args)
    checks: list[Filter] = [] if args.no_lint else [Lint(need_think=args.need_think)]
    if args.one_language:
        checks.append(OneLanguage())
    if args.max_tokens or args.min_tokens:
        if not args.tokenizer:
            raise ValueError(
                "kd traces filter: --max-tokens must come with --tokenizer, got none. "
                "Name the student's."
            )
        checks.append(Tokens(load_tokenizer(args.tokenizer), args.min_tokens, args.max_tokens))
    # a stage enters the report when it first runs, and the last of a chain runs first
    wanted = {
        "filter": True,
        "dedupe exact": args.dedupe != "no",
        "dedupe near": args.dedupe == "near",
        "decontaminate": bool(args.against),
    }
    for name, used in wanted.items():
        if used:
            report.stage(name)
    stream = filter_stream(reread(args, report), checks, report=report)
    if args.dedupe != "no":
        stream = exact_duplicates(stream, report=report)
    if args.dedupe == "near":
        stream = near_duplicates(stream, report=report)
    evidence: list[dict[str, Any]] = []
    if args.against:
        evaluations = _evaluations(args.against)
        stream = decontaminate(stream, evaluations, report=report, evidence=evidence)
    done = finish(args, report, stream)
    if args.evidence:
        write_rows(args.evidence, evidence)
    return done


def _evaluations(sources: list[str]) -> Any:
    """The questions to keep out; one that cannot be read would be let in, so it is refused."""
    from kd.traces.decontaminate import Evaluations
    from kd.traces.loading import questions

    evaluations = Evaluations()
    for source in sources:
        found: dict[str, list[str]] = {}
        for place, question in questions(source):
            if not isinstance(question, Trace):
                raise ValueError(
                    f"kd traces filter: --against must hold questions only, got {place}: "
                    f"{question}. Mend or remove it."
                )
            found.setdefault(place.partition(".")[0], []).append(question.prompt)
        for name, prompts in found.items():
            evaluations.add(name, prompts)
    return evaluations


def run_mix(args: argparse.Namespace) -> int:
    from kd.traces.mixing import mix

    report = counts_of(args)
    told = {"total": args.total, "reasoning_share": args.reasoning_share, "seed": args.seed}
    sources = [_source(given, report) for given in args.input]
    try:
        stream = mix(sources, report=report, **told)
    except ValueError:
        if report.dropped:
            tell(args, report)
        raise
    return finish(args, report, stream)


def _source(given: str, report: DropCounts) -> Any:
    """FILE, FILE=WEIGHT or FILE@EPOCHS; what is lost in reading it is counted."""
    from kd.traces.loading import load
    from kd.traces.mixing import JsonlTraces, Source
    from kd.traces.records import is_lines

    path, numbers = given, {"weight": 1.0, "epochs": 1.0}
    for mark, name in (("=", "weight"), ("@", "epochs")):
        head, found, number = path.rpartition(mark)
        if found and not Path(path).exists():
            try:
                path, numbers[name] = head, float(number)
            except ValueError:
                raise ValueError(
                    f"kd traces mix: {name} must be a number, got {number!r} in {given}."
                ) from None
    scratch = DropCounts()
    held: Any = (
        JsonlTraces(path, report=scratch) if is_lines(path) else list(load(path, report=scratch))
    )
    if scratch.dropped:
        lost = DropCounts()
        lost.stages["read for mix"] = scratch["load"]
        report.merge(lost)
    return Source(Path(path).stem, held, **numbers)
