"""``kd evaluate``: models side by side on problems, on text, and beside a teacher's cache."""

from __future__ import annotations

import argparse
import dataclasses
import json
from pathlib import Path
from typing import Any

from kd.serving import KEY_VARIABLE
from kd.traces.verifiers.registry import ALONE, DEFAULT

EXAMPLES = """\
examples:
  kd evaluate Qwen/Qwen2.5-0.5B-Instruct --problems gym:gsm_symbolic --limit 100
  kd evaluate before=Qwen/Qwen2.5-7B after=runs/mine/model --problems tests.jsonl --samples 4
  kd evaluate my-model --problems tests.jsonl --server http://localhost:8000/v1
  kd evaluate before=Qwen/Qwen2.5-7B after=runs/mine/model --text docs.txt     # what was forgotten
  kd evaluate student --traces traces.jsonl --cache cache        # agreement with the teacher
  kd evaluate Qwen/Qwen2.5-0.5B --problems lm-eval:gsm8k         # needs pip install lm-eval
"""


def add_parser(subparsers: Any) -> None:
    """Add ``kd evaluate``."""
    parser = subparsers.add_parser(
        "evaluate",
        help="score models on problems, on text, and beside a teacher",
        description=(
            "Asks every MODEL the same problems and reports pass@1 with its 95 % interval; "
            "measures perplexity on a text, where the first model is what the others are compared "
            "with; and measures agreement and calibration against a teacher's cache."
        ),
        epilog=EXAMPLES,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("models", nargs="+", metavar="MODEL", help="[label=]folder or hub id")
    what = parser.add_argument_group("what to measure (at least one)")
    what.add_argument(
        "--problems", help="a file of questions and answers, gym:NAME[:k=v,...] or lm-eval:TASK"
    )
    what.add_argument("--text", type=Path, help="perplexity on a .txt, a .jsonl or a folder")
    what.add_argument("--traces", type=Path, help="traces the cache was built from (with --cache)")
    what.add_argument("--cache", type=Path, help="a teacher's cache of these traces")
    how = parser.add_argument_group("how answers are drawn and judged")
    how.add_argument("--verifier", choices=ALONE, help=f"default: gym for gym:, else {DEFAULT}")
    how.add_argument("--samples", type=int, default=1, help="answers to each problem (1)")
    how.add_argument(
        "--pass-at",
        type=_numbers,
        default=(1,),
        metavar="K,K,...",
        help="such as 1,4; at most --samples (1)",
    )
    how.add_argument("--temperature", type=float, help="0 is greedy; default 0, or 0.6 for several")
    how.add_argument("--top-p", type=float, default=0.95)
    how.add_argument(
        "--max-new-tokens", type=int, default=4096, help="of an answer; longer ones are cut (4096)"
    )
    how.add_argument("--batch-size", type=int, default=16, help="answers drawn side by side (16)")
    how.add_argument("--limit", type=int, default=0, help="only the first so many problems")
    how.add_argument("--seed", type=int, default=0)
    how.add_argument(
        "--no-chat", action="store_false", dest="chat", help="prompts are raw text, no template"
    )
    how.add_argument("--server", help="ask this OpenAI-compatible server; MODEL is its name there")
    how.add_argument(
        "--key-variable",
        default=KEY_VARIABLE,
        help="environment variable with the API key (%(default)s)",
    )
    parser.add_argument("--output", type=Path, help="folder for report.html and results.json")
    parser.set_defaults(run=run)


def run(args: argparse.Namespace) -> int:
    """Measure what was asked for, print it, and write the page."""
    labels = dict(_label(name) for name in args.models)
    if len(labels) < len(args.models):
        raise ValueError("kd evaluate: models must have different labels. Write label=model.")
    if (args.problems or "").startswith("lm-eval:"):
        return _lm_eval(args, labels)

    from kd.evaluation.measure import Plan, measure
    from kd.evaluation.summary import summarise

    plan = Plan(**{field.name: getattr(args, field.name) for field in dataclasses.fields(Plan)})
    found = {label: measure(label, model, plan) for label, model in labels.items()}
    text, page = summarise(found, plan)
    print(text)
    if args.output:
        print(f"\nreport: {page.save(args.output / 'report.html')}")
        _save(args.output, {label: one.to_dict() for label, one in found.items()})
    return 0


def _label(name: str) -> tuple[str, str]:
    label, equals, model = name.partition("=")
    return (label, model) if equals and label else (Path(name).name or name, name)


def _lm_eval(args: argparse.Namespace, labels: dict[str, str]) -> int:
    from kd.evaluation.problems import run_lm_eval

    task = args.problems.removeprefix("lm-eval:")
    found = {label: run_lm_eval(task, model, args.limit) for label, model in labels.items()}
    for label, figures in found.items():
        print(label)
        for name, value in figures.items():
            print(f"  {name:<32} {value:.4f}")
    if args.output:
        _save(args.output, found)
    return 0


def _save(folder: Path, results: Any) -> None:
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "results.json").write_text(json.dumps(results, indent=1))


def _numbers(text: str) -> tuple[int, ...]:
    return tuple(int(part) for part in text.split(","))
