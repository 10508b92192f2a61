"""``kd traces demo``: traces of a tiny teacher on reasoning-gym's sums, from question to page."""

from __future__ import annotations

import json
import random
from pathlib import Path
from typing import Any

from kd.traces import (
    COMPACT,
    DropCounts,
    Lint,
    Maths,
    Numeric,
    ReasoningGym,
    Renderer,
    Sampling,
    Verifier,
    best_of_n,
    compare,
    efficiency,
    exact_duplicates,
    filter_stream,
    generate_local,
    gym_problems,
    pack,
    render_stream,
    write_traces,
)
from kd.traces.report import write_report
from kd_recipes import _arithmetic as arithmetic

CAPACITY = 256


def run_demo(folder: str | Path, *, problems: int = 400, steps: int = 600, seed: int = 0) -> Path:
    """Train a tiny teacher on worked sums, let it answer reasoning-gym's chain_sum, keep what
    its scorer accepts, render and pack it, and write the page.

    Args:
        folder: takes traces.jsonl, counts.json and report.html.
        problems: asked twice each.
        steps: the teacher's training steps; fewer make more wrong answers.
        seed: of everything.

    Returns:
        The page.
    """
    folder = Path(folder)
    asked = [
        trace.replace(prompt=_short(trace.prompt))
        for trace in gym_problems(
            "chain_sum", problems, seed, min_terms=2, max_terms=3, min_digits=1, max_digits=1
        )
    ]
    tokenizer = arithmetic.tokenizer()
    teacher = arithmetic.model(96, 2, seed)  # 0.2M parameters
    arithmetic.teach(
        teacher,
        folder / "teacher",
        steps,
        rng=random.Random(seed),
        held_out={trace.prompt for trace in asked},
        random_order=False,
        learning_rate=3e-3,
        checkpoints=0,
    )
    report = DropCounts()
    sampling = Sampling(temperature=1.0, top_p=1.0, max_new_tokens=24, seed=seed)
    told: dict[str, Any] = {"n": 2, "batch_size": 128, "report": report}
    answered = list(generate_local(teacher, tokenizer, asked, sampling=sampling, **told))
    linted = list(filter_stream(answered, [Lint(need_think=True)], report=report, stage="lint"))
    verifiers: dict[str, Verifier] = {"gym": ReasoningGym(), "numeric": Numeric(), "maths": Maths()}
    correct = compare(linted, verifiers, workers=1 + (problems > 100), report=report)
    unique = list(exact_duplicates(correct, report=report))
    chosen = best_of_n(unique, report=report)
    renderer = Renderer(tokenizer, tags=COMPACT)
    rendered = list(render_stream(chosen, renderer, report=report, max_tokens=CAPACITY))
    packs = list(pack((ids for _, ids in rendered), CAPACITY))
    report["render"].notes["fullness"] = round(efficiency(packs, CAPACITY), 4)
    write_traces(folder / "traces.jsonl", (trace for trace, _ in rendered))
    (folder / "counts.json").write_text(json.dumps(report.to_dict(), indent=1))
    print(report.table())
    print(f"packed into {len(packs)} rows of {CAPACITY}: {report['render'].notes}")
    title = "Traces of a tiny teacher on reasoning-gym's chain_sum"
    return write_report(folder / "report.html", report, (t for t, _ in rendered), title=title)


def _short(question: str) -> str:
    """The sum alone: "... 4 - 8 + 7 =" to "4-8+7="."""
    kept = "".join(c for c in question if c in "0123456789+-=")
    return kept.lstrip("+-=")[-12:]
