"""What the verbs of ``kd traces`` do."""

from __future__ import annotations

import argparse
import importlib
import json
import sys
import warnings
from collections.abc import Callable, Iterable, Iterator
from itertools import chain, islice
from pathlib import Path
from typing import Any

from kd.models import load_model, load_tokenizer
from kd.traces.counts import DropCounts
from kd.traces.trace import Trace


def counts_of(args: argparse.Namespace) -> DropCounts:
    path = Path(args.report) if args.report else None
    if path is not None and path.exists():
        return DropCounts.from_dict(json.loads(path.read_text()))
    return DropCounts()


def finish(
    args: argparse.Namespace,
    report: DropCounts,
    rows: Iterable[Any],
    write: Any = None,
    advise: Callable[[], str] = str,
) -> int:
    """Write the rows, print the table, save the counts; no row at all is an error."""
    from kd.traces.files import write_traces

    rows = iter(rows)
    head = list(islice(rows, 1))
    count = 0
    if head and args.output:
        with warnings.catch_warnings(record=True) as heard:
            count = (write or write_traces)(args.output, chain(head, rows))
        for warning in heard:
            print(f"note: {warning.message}", file=sys.stderr)
    elif head:
        count = 1 + sum(1 for _ in rows)
    tell(args, report)
    if not count:
        kept = f"; {args.output} is not written" if args.output else ""
        raise ValueError(
            f"kd traces {args.verb}: at least one row must come out, got none{kept}. "
            f"{report.cure()} {advise()}".rstrip()
        )
    if args.output:
        print(f"wrote {count:,} rows to {args.output}")
    return 0


def tell(args: argparse.Namespace, report: DropCounts) -> None:
    print(report.table())
    if args.report:
        Path(args.report).parent.mkdir(parents=True, exist_ok=True)
        Path(args.report).write_text(json.dumps(report.to_dict(), indent=1))


def _read(args: argparse.Namespace, report: DropCounts, **options: Any) -> Iterator[Trace]:
    from kd.traces.loading import load

    for source in args.input:
        yield from load(source, report=report, **options)


def reread(args: argparse.Namespace, report: DropCounts) -> Iterator[Trace]:
    """Read what an earlier verb wrote: counted a second time only where records are lost."""
    name, scratch = f"read for {args.verb}", DropCounts()
    report.stage(name)
    yield from _read(args, scratch)
    if scratch.dropped:
        again = DropCounts()
        again.stages[name] = scratch["load"]
        report.merge(again)
    elif not report[name].seen:
        del report.stages[name]


def _columns(args: argparse.Namespace) -> dict[str, str]:
    for given in args.column:
        if "=" not in given:
            raise ValueError(
                f"kd traces {args.verb}: --column must be MINE=KNOWN, such as my_q=prompt, got "
                f"{given!r}."
            )
    return dict(given.split("=", 1) for given in args.column)


def run_load(args: argparse.Namespace) -> int:
    report = counts_of(args)
    options = {"all_samples": args.all_samples, "name": args.source, "domain": args.domain}
    return finish(args, report, _read(args, report, columns=_columns(args), **options))


def run_generate(args: argparse.Namespace) -> int:
    from kd.traces.generation import generate_local
    from kd.traces.loading import questions
    from kd.traces.sampling import Sampling, overridden
    from kd.traces.server import generate_server

    report = counts_of(args)
    counted = report.stage("generate")
    problems = []
    for source in args.input:
        for place, found in questions(source, _columns(args)):
            if isinstance(found, Trace):
                problems.append(found)
            else:
                counted.drop(found.reason, {"record": place}, found.detail)
    if not problems:
        return finish(args, report, ())
    sampling = Sampling(
        args.temperature,
        args.top_p,
        args.max_new_tokens,
        args.seed,
        args.top_k,
        args.min_p,
        args.repetition_penalty,
    )
    if args.server:
        server, told = _server(args), {"journal": args.journal, "report": report}
        stream = generate_server(server, problems, sampling=sampling, n=args.n, **told)
        done = finish(args, report, stream)
        if server.unstated:
            print(
                f"the server refuses {', '.join(server.unstated)}: they were not sent, and its own "
                "defaults (or the model's generation_config) apply"
            )
        return done
    tokenizer, model = load_tokenizer(args.model), load_model(args.model, dtype="auto")
    own = overridden(model, sampling)
    counted.notes |= {"sampling": sampling.stated(), "not applied": own}
    options: dict[str, Any] = {"n": args.n, "batch_size": args.batch_size, "report": report}
    stream = generate_local(model, tokenizer, problems, sampling=sampling, **options)
    done = finish(args, report, stream)
    if own:
        shown = ", ".join(f"{name}={value}" for name, value in own.items())
        print(f"not applied, of the model's own generation_config: {shown}. Options state what is.")
    return done


def _server(args: argparse.Namespace) -> Any:
    from kd.traces.server import Server

    return Server(
        args.server, args.model, key_variable=args.key_variable, concurrency=args.concurrency
    )


def _verifier(name: str, args: argparse.Namespace) -> Any:
    from kd.traces.verifiers import verifier

    if name == "code":
        return verifier(
            name,
            backend=_backend(args.run_code),
            most=args.most_tests,
            trust_inside_tests=args.trust_inside_tests,
        )
    return verifier(name, server=_server(args)) if name == "judge" else verifier(name)


def run_verify(args: argparse.Namespace) -> int:
    return _verified(args, args.verifier)


def run_judge(args: argparse.Namespace) -> int:
    args.workers = args.concurrency
    return _verified(args, ["judge", *args.beside])


def _verified(args: argparse.Namespace, names: list[str]) -> int:
    from kd.traces.agreement import compare
    from kd.traces.verification import verify_stream
    from kd.traces.verifiers import advice

    report, stage = counts_of(args), f"verify {' '.join(names)}"
    options: dict[str, Any] = {
        "keep": args.keep,
        "workers": args.workers,
        "journal": args.journal,
        "report": report,
        "stage": stage,
    }
    missed: list[Trace] = []
    verifiers = {name: _verifier(name, args) for name in names}
    if len(verifiers) == 1:
        stream = verify_stream(reread(args, report), verifiers[names[0]], missed=missed, **options)
    else:
        stream = compare(reread(args, report), verifiers, decide=args.decide, **options)
    return finish(args, report, stream, advise=lambda: advice(missed, names[0]))


def run_sandbox(args: argparse.Namespace) -> int:
    from kd.sandbox import Bubblewrap, Limits, table

    text, contained = table(Bubblewrap(Limits(seconds=3.0)))
    print(text)
    return 0 if contained else 1


def _backend(name: str) -> Any:
    from kd.sandbox import Bubblewrap, UnsafeSubprocess

    if name == "no":
        return None
    return Bubblewrap() if name == "sandbox" else UnsafeSubprocess()


def run_render(args: argparse.Namespace) -> int:
    from kd.cli.options import rendering_options
    from kd.traces.files import write_rows
    from kd.traces.packing import pack
    from kd.traces.rows import AnyRenderer, render_rows

    report = counts_of(args)
    most = min((n for n in (args.max_tokens, args.pack) if n), default=None)
    renderer = AnyRenderer(load_tokenizer(args.tokenizer), **rendering_options(args))
    date = {"date": args.date} if renderer.facts().get("date") else {}

    def rendered() -> Iterator[Any]:
        for source in args.input:
            yield from render_rows(source, renderer, report=report, max_tokens=most)

    def rows() -> Iterator[dict[str, Any]]:
        if not args.pack:
            for input_ids, labels in rendered():
                yield {"input_ids": input_ids, "labels": labels, **date}
            return
        used = packs = 0
        for made in pack(rendered(), args.pack):
            used, packs = used + len(made.input_ids), packs + 1
            yield {**vars(made), **date}
        fullness = round(used / max(1, packs * args.pack), 4)
        report["render"].notes |= {"packs": packs, "fullness": fullness}
        print(f"packed into {packs:,} rows of {args.pack:,}, {100 * fullness:.1f} % full")

    done = finish(args, report, rows(), write_rows)
    for line in renderer.remarks():
        print(line)
    return done


def run_report(args: argparse.Namespace) -> int:
    from kd.traces.report import write_report

    if not args.report or not Path(args.report).exists():
        raise ValueError(
            "kd traces report: --report must name the counts that other verbs saved, got "
            f"{args.report}. Give the same --report to each verb."
        )
    report, shown = counts_of(args), 0

    def traces() -> Iterator[Trace]:
        nonlocal shown
        for trace in _read(args, DropCounts()):
            shown += 1
            yield trace

    print(write_report(args.output, report, traces(), title=args.title))
    if args.input and not shown:
        raise ValueError(
            f"kd traces report: {', '.join(args.input)} must hold traces, got none. The page shows "
            f"the counts alone. {report.cure()}"
        )
    return 0


def run_demo(args: argparse.Namespace) -> int:
    demo = importlib.import_module("kd_recipes._traces_demo")  # above kd, found as recipes are
    folder = args.output or "runs/traces-demo"
    print(demo.run_demo(folder, problems=args.problems, steps=args.steps))
    return 0
