"""``kd traces``: its verbs and their options."""

from __future__ import annotations

import argparse
import os
from typing import Any

from kd.cli import traces_choosing, traces_verbs
from kd.cli.options import add_rendering
from kd.serving import ADDRESS_VARIABLE, KEY_VARIABLE
from kd.traces.verifiers import VERIFIERS
from kd.traces.verifiers.registry import DEFAULT
from kd.traces.verifiers.verdict import STATUSES

NAMES = tuple(name for name in VERIFIERS if name != "judge")  # that is a verb of its own
RUN = {
    "load": traces_verbs.run_load,
    "generate": traces_verbs.run_generate,
    "verify": traces_verbs.run_verify,
    "judge": traces_verbs.run_judge,
    "select": traces_choosing.run_select,
    "filter": traces_choosing.run_filter,
    "mix": traces_choosing.run_mix,
    "render": traces_verbs.run_render,
    "report": traces_verbs.run_report,
    "sandbox": traces_verbs.run_sandbox,
    "demo": traces_verbs.run_demo,
}


def add_parser(subparsers: Any) -> None:
    """Add ``traces`` and its verbs to the ``kd`` command."""
    area = subparsers.add_parser(
        "traces", help="load, verify, filter, mix and render reasoning traces"
    )
    verbs = area.add_subparsers(title="verbs", metavar="VERB", dest="verb")

    def verb(name: str, summary: str, inputs: str | None = "+") -> Any:
        made = verbs.add_parser(name, help=summary, description=summary)
        if inputs:
            made.add_argument("input", nargs=inputs, help="files, folders or owner/name of the hub")
        made.add_argument("-o", "--output", help="file (.jsonl, .jsonl.gz or .parquet)")
        made.add_argument("--report", help="JSON file of counts; added to when it exists")
        made.set_defaults(run=RUN[name])
        return made

    load = verb("load", "read any known shape, write traces")
    _column(load)
    load.add_argument("--all-samples", action="store_true", help="every sample of a record")
    load.add_argument("--source", default="", help="name of records that bring none")
    load.add_argument("--domain", default="")
    generate = verb("generate", "answer problems with a local model")
    _column(generate)
    generate.add_argument("--model", required=True, help="transformers model, or a server's name")
    _serving(generate)
    generate.add_argument("--journal", help="answers so far; a rerun continues from it")
    generate.add_argument("-n", type=int, default=1, help="samples a problem")
    generate.add_argument("--temperature", type=float, default=0.6)
    generate.add_argument("--top-p", type=float, default=0.95)
    generate.add_argument("--top-k", type=int, default=0, help="0 is off (default)")
    generate.add_argument("--min-p", type=float, default=0.0, help="0 is off (default)")
    generate.add_argument("--repetition-penalty", type=float, default=1.0, help="1 is off")
    generate.add_argument("--max-new-tokens", type=int, default=4096)
    generate.add_argument("--batch-size", type=int, default=16)
    generate.add_argument("--seed", type=int, default=0)
    verify = verb("verify", "compare answers with their references")
    verify.add_argument(
        "--verifier",
        nargs="+",
        choices=NAMES,
        default=[DEFAULT],
        help=f"several are compared with one another; default: {DEFAULT}",
    )
    needs = "\n".join(f"  {name:<9}{VERIFIERS[name].needs}" for name in NAMES)
    verify.epilog = f"what each verifier needs of a trace:\n{needs}"
    verify.formatter_class = argparse.RawDescriptionHelpFormatter
    _deciding(verify)
    judge = verb("judge", "let a language model compare answers with their references")
    judge.add_argument("--model", required=True, help="the server's name of the judge")
    _serving(judge, required=True)
    judge.add_argument(
        "--beside", nargs="*", choices=NAMES, default=[], help="verifiers to compare it with"
    )
    _deciding(judge)
    select = verb("select", "by difficulty, best of n, for diversity; in this order")
    select.add_argument(
        "--difficulty",
        nargs=2,
        type=float,
        metavar=("LEAST", "MOST"),
        help="keep prompts whose share of correct samples lies between",
    )
    select.add_argument(
        "--best", type=int, metavar="N", help="samples kept a prompt, correct first"
    )
    select.add_argument("--prefer", choices=["shortest", "longest", "random"], default="shortest")
    select.add_argument("--diverse", type=int, metavar="COUNT", help="traces, evenly over --by")
    select.add_argument("--by", choices=["domain", "source"], default="domain")
    select.add_argument("--seed", type=int, default=0)
    filters = verb("filter", "lint, lengths, languages, duplicates, contamination")
    filters.add_argument("--no-lint", action="store_true")
    filters.add_argument("--need-think", action="store_true")
    filters.add_argument("--one-language", action="store_true")
    filters.add_argument("--tokenizer", help="the student's, for --max-tokens and --min-tokens")
    filters.add_argument("--min-tokens", type=int, default=0)
    filters.add_argument("--max-tokens", type=int)
    filters.add_argument("--dedupe", choices=["no", "exact", "near"], default="exact")
    filters.add_argument("--against", nargs="*", default=[], help="evaluation sets to keep out")
    filters.add_argument("--evidence", help="JSON lines of what matched what")
    mixing = verb("mix", "mix files: FILE or FILE=WEIGHT, FILE@EPOCHS")
    mixing.add_argument("--total", type=int)
    mixing.add_argument("--reasoning-share", type=float)
    mixing.add_argument("--seed", type=int, default=0)
    render = verb("render", "token ids for a student, packed or one trace a row")
    render.add_argument("--tokenizer", required=True, help="the student's: folder or hub id")
    add_rendering(render)
    render.add_argument("--max-tokens", type=int)
    render.add_argument("--pack", type=int, help="tokens a row; documents stay apart")
    report = verb("report", "an HTML page of the counts and samples", inputs="*")
    report.set_defaults(output="report.html")
    report.add_argument("--title", default="Traces")
    verb("sandbox", "probe the sandbox with hostile programs and print what contained each", None)
    demo = verb("demo", "the whole pipeline on reasoning-gym and a tiny teacher", None)
    demo.add_argument("--problems", type=int, default=400)
    demo.add_argument("--steps", type=int, default=600, help="training steps of the teacher")


def _column(verb: Any) -> None:
    verb.add_argument(
        "--column",
        action="append",
        default=[],
        metavar="MINE=KNOWN",
        help="your column's name and a known one, such as my_q=prompt; may be repeated",
    )


def _serving(verb: Any, required: bool = False) -> None:
    address = "OpenAI-compatible address, such as http://host:8000/v1"
    if required:
        required = ADDRESS_VARIABLE not in os.environ
        address += f"; default: that of {ADDRESS_VARIABLE}"
    verb.add_argument("--server", required=required, help=address)
    verb.add_argument(
        "--key-variable",
        default=KEY_VARIABLE,
        help="environment variable with the key; default: %(default)s, where it is set",
    )
    verb.add_argument("--concurrency", type=int, default=32, help="requests in flight")


def _deciding(verb: Any) -> None:
    verb.add_argument("--keep", nargs="+", default=["correct"], choices=STATUSES)
    verb.add_argument(
        "--decide",
        choices=["first", "all", "any", "majority"],
        default="first",
        help="whose verdict counts where several are asked; default: %(default)s",
    )
    verb.add_argument("--workers", type=int, default=2)
    verb.add_argument(
        "--run-code",
        choices=["no", "sandbox", "unsafe-subprocess"],
        default="no",
        help="for the verifier code: bubblewrap, or NO isolation; default: %(default)s",
    )
    verb.add_argument(
        "--most-tests", type=int, help="of a program, the first ones; default: all, until one fails"
    )
    verb.add_argument(
        "--trust-inside-tests",
        action="store_true",
        help="let tests that run beside the program make it correct; it could make them hold",
    )
    verb.add_argument("--journal", help="verdicts so far; a rerun continues from it")
