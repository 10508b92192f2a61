"""``kd evaluate``: generate answers to a file of problems and score them."""

from __future__ import annotations

import argparse
import json
from pathlib import Path
from typing import Any


def add_parser(subparsers: Any) -> None:
    """Add ``kd evaluate``."""
    parser = subparsers.add_parser(
        "evaluate",
        help="score a model on a file of problems",
        description=(
            "Generates an answer to every problem and compares the text behind </think> with the "
            "reference. PROBLEMS is a JSON-lines file of {prompt, reference}."
        ),
    )
    parser.add_argument("model", help="a transformers model: a folder or a hub id")
    parser.add_argument("problems", type=Path, help="JSON lines of {prompt, reference}")
    parser.add_argument("--temperature", type=float, default=0.0, help="0 is greedy (default)")
    parser.add_argument("--top-p", type=float, default=1.0)
    parser.add_argument("--max-new-tokens", type=int, default=4096)
    parser.add_argument("--batch-size", type=int, default=8)
    parser.add_argument("--limit", type=int, help="only the first so many problems")
    parser.add_argument("--no-chat", action="store_true", help="prompts are raw text, no template")
    parser.add_argument("--output", type=Path, help="write every completion as JSON lines here")
    parser.set_defaults(run=run)


def read_problems(path: Path, limit: int | None = None) -> list[dict[str, str]]:
    """The problems of a JSON-lines file.

    Raises:
        ValueError: a line is not an object with a prompt and a reference.
    """
    problems = []
    for number, line in enumerate(path.read_text(encoding="utf-8").splitlines(), 1):
        if not line.strip():
            continue
        try:
            row = json.loads(line)
            problems.append({"prompt": row["prompt"], "reference": str(row["reference"])})
        except (ValueError, KeyError, TypeError):
            raise ValueError(
                f"kd evaluate: every line of PROBLEMS must be an object with prompt and reference, "
                f"got {line[:60]!r} in {path}:{number}. Rename the fields or drop the line."
            ) from None
    if not problems:
        raise ValueError(
            f"kd evaluate: PROBLEMS must hold at least one problem, got none in {path}."
        )
    return problems[:limit]


def run(args: argparse.Namespace) -> int:
    """Evaluate and print accuracy with its 95 % interval."""
    problems = read_problems(args.problems, args.limit)

    from transformers import AutoModelForCausalLM, AutoTokenizer

    from kd.evaluation import generate, score
    from kd.recipe.progress import Progress

    tokenizer = AutoTokenizer.from_pretrained(args.model)
    model = AutoModelForCausalLM.from_pretrained(args.model, dtype="auto")
    with Progress("answering", len(problems)) as bar:
        completions = generate(
            model,
            tokenizer,
            [problem["prompt"] for problem in problems],
            max_new_tokens=args.max_new_tokens,
            temperature=args.temperature,
            top_p=args.top_p,
            batch_size=args.batch_size,
            chat=not args.no_chat,
            progress=bar.to,
        )
    result = score(completions, [problem["reference"] for problem in problems])
    if args.output is not None:
        with args.output.open("w", encoding="utf-8") as file:
            for problem, completion, right in zip(
                problems, completions, result.correct, strict=True
            ):
                row = {**problem, "completion": completion, "correct": right}
                file.write(json.dumps(row, ensure_ascii=False) + "\n")
    low, high = result.interval
    print(
        f"{100 * result.accuracy:.1f} % of {len(problems)} right "
        f"(95 % interval {100 * low:.1f} to {100 * high:.1f} %)"
    )
    return 0
