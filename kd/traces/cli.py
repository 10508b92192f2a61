"""``kd traces``: load, generate, verify, filter, mix, render, report, demo."""

from __future__ import annotations

import argparse
import json
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

from kd.traces.trace import Trace
from kd.traces.yields import Yield


def add_parser(subparsers: Any) -> None:
    """Add ``traces`` and its verbs to the ``kd`` command."""
    area = subparsers.add_parser(
        "traces", help="load, verify, filter, mix and render reasoning traces"
    )
    verbs = area.add_subparsers(title="verbs", metavar="VERB", dest="verb")

    def verb(name: str, run: Any, summary: str, inputs: str | None = "+") -> Any:
        made = verbs.add_parser(name, help=summary, description=summary)
        if inputs:
            made.add_argument("input", nargs=inputs, help="files, folders or owner/name of the hub")
        made.add_argument("-o", "--output", help="file (.jsonl, .jsonl.gz or .parquet)")
        made.add_argument("--report", help="JSON file of counts; added to when it exists")
        made.set_defaults(run=run)
        return made

    load = verb("load", _load, "read any known shape, write traces")
    load.add_argument("--all-samples", action="store_true", help="every sample of a record")
    load.add_argument("--source", default="", help="name of records that bring none")
    load.add_argument("--domain", default="")
    generate = verb("generate", _generate, "answer problems with a local model")
    generate.add_argument("--model", required=True, help="transformers model, or a server's name")
    generate.add_argument("--server", help="OpenAI-compatible address, such as http://host:8000/v1")
    generate.add_argument("--key-variable", default="", help="environment variable with the key")
    generate.add_argument("--concurrency", type=int, default=32)
    generate.add_argument("--journal", help="answers so far; a rerun continues from it")
    generate.add_argument("-n", type=int, default=1, help="samples a problem")
    generate.add_argument("--temperature", type=float, default=0.6)
    generate.add_argument("--top-p", type=float, default=0.95)
    generate.add_argument("--max-new-tokens", type=int, default=4096)
    generate.add_argument("--batch-size", type=int, default=16)
    generate.add_argument("--seed", type=int, default=0)
    verify = verb("verify", _verify, "compare answers with their references")
    verify.add_argument(
        "--verifier", choices=sorted(_VERIFIERS), default="maths", help="default: %(default)s"
    )
    verify.add_argument(
        "--keep",
        nargs="+",
        default=["correct"],
        choices=["correct", "wrong", "unknown", "error"],
    )
    verify.add_argument("--workers", type=int, default=2)
    verify.add_argument(
        "--run-code",
        choices=["no", "sandbox", "unsafe-subprocess"],
        default="no",
        help="for --verifier code: bubblewrap, or NO isolation; default: %(default)s",
    )
    verify.add_argument("--journal", help="verdicts so far; a rerun continues from it")
    filters = verb("filter", _filter, "lint, lengths, languages, duplicates, contamination")
    filters.add_argument("--no-lint", action="store_true")
    filters.add_argument("--need-think", action="store_true")
    filters.add_argument("--one-language", action="store_true")
    filters.add_argument("--tokenizer", help="the student's, for --max-tokens and --min-tokens")
    filters.add_argument("--min-tokens", type=int, default=0)
    filters.add_argument("--max-tokens", type=int)
    filters.add_argument("--dedupe", choices=["no", "exact", "near"], default="exact")
    filters.add_argument("--against", nargs="*", default=[], help="evaluation sets to keep out")
    filters.add_argument("--evidence", help="JSON lines of what matched what")
    mixing = verb("mix", _mix, "mix files: FILE or FILE=WEIGHT, FILE@EPOCHS")
    mixing.add_argument("--total", type=int)
    mixing.add_argument("--reasoning-share", type=float)
    mixing.add_argument("--seed", type=int, default=0)
    render = verb("render", _render, "token ids for a student, packed or one trace a row")
    render.add_argument("--tokenizer", required=True)
    render.add_argument("--max-tokens", type=int)
    render.add_argument("--pack", type=int, help="tokens a row; documents stay apart")
    report = verb("report", _report, "an HTML page of the counts and samples", inputs="*")
    report.set_defaults(output="report.html")
    report.add_argument("--title", default="Traces")
    demo = verb("demo", _demo, "the whole pipeline on reasoning-gym and a tiny teacher", None)
    demo.add_argument("--problems", type=int, default=400)
    demo.add_argument("--steps", type=int, default=600, help="training steps of the teacher")


_VERIFIERS = ("choice", "code", "exact", "gym", "maths", "numeric")


def _counts(args: argparse.Namespace) -> Yield:
    path = Path(args.report) if args.report else None
    if path is not None and path.exists():
        return Yield.from_dict(json.loads(path.read_text()))
    return Yield()


def _finish(args: argparse.Namespace, report: Yield, rows: Iterable[Any], write: Any = None) -> int:
    """Write the rows, print the table, save the counts."""
    from kd.traces.files import write_traces

    if args.output:
        count = (write or write_traces)(args.output, rows)
        print(report.table())
        print(f"wrote {count:,} rows to {args.output}")
    else:
        for _ in rows:
            pass
        print(report.table())
    if args.report:
        Path(args.report).parent.mkdir(parents=True, exist_ok=True)
        Path(args.report).write_text(json.dumps(report.to_dict(), indent=1))
    return 0


def _read(args: argparse.Namespace, report: Yield, **options: Any) -> Iterator[Trace]:
    from kd.traces.loading import load

    for source in args.input:
        yield from load(source, report=report, **options)


def _again(args: argparse.Namespace) -> Iterator[Trace]:
    """Read what an earlier verb wrote, without counting it a second time."""
    return _read(args, Yield())


def _load(args: argparse.Namespace) -> int:
    report = _counts(args)
    options = {"all_samples": args.all_samples, "name": args.source, "domain": args.domain}
    return _finish(args, report, _read(args, report, **options))


def _generate(args: argparse.Namespace) -> int:
    from kd.traces.columns import ShapeError
    from kd.traces.files import expand, read_records
    from kd.traces.generation import Sampling, generate_local
    from kd.traces.server import Server, generate_server
    from kd.traces.shapes import problem

    report = _counts(args)
    tally = report.stage("generate")
    problems = []
    for path in (file for source in args.input for file in expand(source)):
        for index, record in enumerate(read_records(path)):
            try:
                problems.append(problem(record))
            except ShapeError as error:
                tally.drop(error.reason, {"index": index}, error.detail)
    sampling = Sampling(args.temperature, args.top_p, args.max_new_tokens, args.seed)
    if args.server:
        server = Server(
            args.server, args.model, key_variable=args.key_variable, concurrency=args.concurrency
        )
        stream = generate_server(
            server, problems, sampling=sampling, n=args.n, journal=args.journal, report=report
        )
        return _finish(args, report, stream)
    from transformers import AutoModelForCausalLM, AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(args.model)
    model = AutoModelForCausalLM.from_pretrained(args.model)

    def made() -> Iterator[Trace]:
        options: dict[str, Any] = {"n": args.n, "batch_size": args.batch_size}
        for trace in generate_local(model, tokenizer, problems, sampling=sampling, **options):
            tally.keep()
            for key in ("prompt_tokens", "completion_tokens"):
                tally.notes[key] = tally.notes.get(key, 0) + trace.metadata[key]
            yield trace

    return _finish(args, report, made())


def _verify(args: argparse.Namespace) -> int:
    from kd.traces.verification import verify_stream
    from kd.traces.verifiers import Choice, Exact, Maths, Numeric, ReasoningGym, final_answer
    from kd.traces.verifiers.code import Code

    makers: dict[str, Any] = {
        "choice": Choice,
        "code": lambda: Code(_backend(args.run_code)),
        "exact": lambda: Exact(final_answer, normalised=True),
        "gym": ReasoningGym,
        "maths": Maths,
        "numeric": Numeric,
    }
    report = _counts(args)
    stream = verify_stream(
        _again(args),
        makers[args.verifier](),
        keep=args.keep,
        workers=args.workers,
        journal=args.journal,
        report=report,
        stage=f"verify {args.verifier}",
    )
    return _finish(args, report, stream)


def _backend(name: str) -> Any:
    from kd.traces.verifiers.sandbox import Bubblewrap, UnsafeSubprocess

    if name == "no":
        return None
    return Bubblewrap() if name == "sandbox" else UnsafeSubprocess()


def _filter(args: argparse.Namespace) -> int:
    from kd.traces.decontaminate import Evaluations, decontaminate
    from kd.traces.dedupe import exact_duplicates, near_duplicates
    from kd.traces.files import expand, read_records, write_rows
    from kd.traces.filters import Filter, Lint, OneLanguage, Tokens, filter_stream
    from kd.traces.shapes import problem

    report = _counts(args)
    checks: list[Filter] = [] if args.no_lint else [Lint(need_think=args.need_think)]
    if args.one_language:
        checks.append(OneLanguage())
    if args.max_tokens or args.min_tokens:
        if not args.tokenizer:
            raise ValueError(
                "kd traces filter: --max-tokens must come with --tokenizer, got none. "
                "Name the student's."
            )
        checks.append(Tokens(_tokenizer(args.tokenizer), args.min_tokens, args.max_tokens))
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
    stream = filter_stream(_again(args), checks, report=report)
    if args.dedupe != "no":
        stream = exact_duplicates(stream, report=report)
    if args.dedupe == "near":
        stream = near_duplicates(stream, report=report)
    evidence: list[dict[str, Any]] = []
    if args.against:
        evaluations = Evaluations()
        for source in args.against:
            for path in expand(source):
                evaluations.add(path.stem, [problem(r).prompt for r in read_records(path)])
        stream = decontaminate(stream, evaluations, report=report, evidence=evidence)
    done = _finish(args, report, stream)
    if args.evidence:
        write_rows(args.evidence, evidence)
    return done


def _mix(args: argparse.Namespace) -> int:
    from kd.traces.loading import load
    from kd.traces.mixing import JsonlTraces, Source, mix

    sources = []
    for given in args.input:
        path, weight, epochs = given, 1.0, 1.0
        if not Path(given).exists():
            if "=" in given:
                path, _, number = given.rpartition("=")
                weight = float(number)
            elif "@" in given:
                path, _, number = given.rpartition("@")
                epochs = float(number)
        held: Any = JsonlTraces(path) if path.endswith(".jsonl") else list(load(path))
        sources.append(Source(Path(path).stem, held, weight, epochs))
    report = _counts(args)
    stream = mix(
        sources,
        total=args.total,
        reasoning_share=args.reasoning_share,
        seed=args.seed,
        report=report,
    )
    return _finish(args, report, stream)


def _render(args: argparse.Namespace) -> int:
    from kd.traces.files import write_rows
    from kd.traces.packing import pack
    from kd.traces.rendering import Renderer, render_stream

    report = _counts(args)
    most = min((n for n in (args.max_tokens, args.pack) if n), default=None)
    renderer = Renderer(_tokenizer(args.tokenizer))
    stream = render_stream(_again(args), renderer, report=report, max_tokens=most)

    def rows() -> Iterator[dict[str, Any]]:
        if not args.pack:
            for _, (input_ids, labels) in stream:
                yield {"input_ids": input_ids, "labels": labels}
            return
        used = packs = 0
        for made in pack((rendered for _, rendered in stream), args.pack):
            used, packs = used + len(made.input_ids), packs + 1
            yield dict(vars(made))
        fullness = round(used / max(1, packs * args.pack), 4)
        report["render"].notes |= {"packs": packs, "fullness": fullness}
        print(f"packed into {packs:,} rows of {args.pack:,}, {100 * fullness:.1f} % full")

    return _finish(args, report, rows(), write_rows)


def _report(args: argparse.Namespace) -> int:
    from kd.traces.report import write_report

    if not args.report or not Path(args.report).exists():
        raise ValueError(
            "kd traces report: --report must name the counts that other verbs saved, got "
            f"{args.report}. Give the same --report to each verb."
        )
    print(write_report(args.output, _counts(args), _again(args), title=args.title))
    return 0


def _demo(args: argparse.Namespace) -> int:
    from kd.traces.demo import run_demo

    page = run_demo(args.output or "runs/traces-demo", problems=args.problems, steps=args.steps)
    print(page)
    return 0


def _tokenizer(name: str) -> Any:
    from transformers import AutoTokenizer

    return AutoTokenizer.from_pretrained(name)
