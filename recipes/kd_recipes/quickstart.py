"""Distil a tiny reasoning model on a CPU: do a teacher's logits add anything to its traces?

    kd run quickstart                       # minutes on 2 CPU cores, nothing is downloaded
    kd run quickstart smoke                 # seconds, to see that everything runs
    kd run quickstart plenty                # with plenty of traces: does the gain stay?
    kd run quickstart --temperature 1.0     # any field can be set

A teacher of 0.8M parameters solves sums such as ``4-8+7+0=`` one step per line, in any order. It
writes traces, which are kept when the answer is exact; its top-k log-probabilities on the kept
traces go into a cache. Pairs of students of 0.1M parameters then see the same few traces in the
same order from the same start: one learns from the traces alone, one also from the cached logits.
Both are scored on problems that nobody was trained on, over several seeds.

The teacher's weights (``quickstart_teacher.safetensors``, 1.6 MB) were made by the preset
``teacher``, that is by ``train_teacher`` below. The defaults were chosen on other problems and
other seeds (10 and 11) than those of the report. A run that was killed continues when it is
started again, and stages whose inputs have not changed are skipped.
"""

from __future__ import annotations

import random
import sys
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

from kd.files import size_of
from kd.progress import Progress
from kd.stages import (
    Run,
    Stage,
    default_workers,
    one_thread,
    run_jobs,
    run_recipe,
    show_report,
)
from kd_recipes import _arithmetic as arithmetic

TEACHER_FILE = Path(__file__).with_name("quickstart_teacher.safetensors")
MAX_NEW_TOKENS = 36  # the longest right solution has 32


@dataclass(frozen=True)
class Config:
    """Every setting of the quickstart."""

    output: str = "runs/quickstart"  # folder of the run; start again with the same one to continue
    train_teacher: bool = False  # train the teacher instead of using the shipped weights
    teacher_hidden: int = 128  # width of the teacher
    teacher_layers: int = 4  # depth of the teacher
    teacher_steps: int = 3000  # optimiser steps of the teacher, 64 fresh problems each
    problems: int = 800  # problems the teacher solves once each, at temperature 1, to make traces
    top_k: int = 8  # log-probabilities cached per token, of 18 in the vocabulary
    student_hidden: int = 64  # width of the students
    student_layers: int = 2  # depth of the students
    steps: int = 1800  # optimiser steps of each student
    batch_size: int = 32  # traces per optimiser step
    learning_rate: float = 4e-3  # peak learning rate of the students; cosine to zero
    kd_weight: float = 0.9  # weight of the divergence from the teacher in the KD arm
    ce_weight: float = 0.1  # weight of the cross-entropy on the trace in the KD arm
    temperature: float = 2.0  # softens teacher and student in the divergence
    seeds: tuple[int, ...] = (0, 1, 2)  # one pair of students per seed: same start, same data order
    test_problems: int = 1000  # problems kept for the score; no model is trained on them
    workers: int = 0  # students trained side by side, one thread each; 0 takes one per core
    fresh: bool = False  # forget earlier stages and do everything again
    open: bool = False  # open the report in a browser at the end, where there is one


DEFAULT = Config()
SMOKE = replace(
    DEFAULT,
    output="runs/quickstart-smoke",
    problems=64,
    steps=20,
    seeds=(0, 1),
    test_problems=32,
    workers=1,
)
PLENTY = replace(DEFAULT, output="runs/quickstart-plenty", problems=4000)
TEACHER = replace(DEFAULT, output="runs/quickstart-teacher", train_teacher=True)
PRESETS = {
    "default": ("Shipped teacher, 800 traces, 3 seeds: about 3 minutes on 2 CPU cores.", DEFAULT),
    "smoke": ("Everything once in seconds; its students learn nothing yet.", SMOKE),
    "plenty": ("4,000 traces, so that data is not short: about 4 minutes.", PLENTY),
    "teacher": ("Trains the teacher as well: about 10 minutes more on 2 CPU cores.", TEACHER),
}
ARMS = {"sft": "traces alone", "kd": "traces + logits"}


def main(config: Config) -> dict[str, Any]:
    """Run the recipe; returns the figures of its report."""
    with one_thread():
        report = run_stages(config)
    return show_report(report, browser=config.open)


def run_stages(config: Config) -> Stage:
    """Every stage in order; each is skipped when what it reads has not changed."""
    run = Run(config.output, "quickstart", fresh=config.fresh)
    sizes: dict[str, Any] = {"hidden": config.teacher_hidden, "layers": config.teacher_layers}
    weights, held_out = TEACHER_FILE, config.test_problems
    if config.train_teacher:
        made = run.stage("weights", train_teacher, **sizes, steps=config.teacher_steps)
        weights = made.path / "teacher.safetensors"
    teacher = run.stage("teacher", score_teacher, weights=weights, **sizes, test_problems=held_out)
    traces = run.stage(
        "traces", make_traces, teacher=teacher, problems=config.problems, test_problems=held_out
    )
    cache = run.stage("cache", make_cache, teacher=teacher, traces=traces, top_k=config.top_k)
    what = replace(config, output="", workers=0, fresh=False, open=False)
    training = partial(train_students, workers=config.workers or default_workers())
    students = run.stage("students", training, config=what, traces=traces, cache=cache)
    return run.stage(
        "report",
        write_report,
        config=what,
        teacher=teacher,
        traces=traces,
        cache=cache,
        students=students,
    )


# --- the teacher ----------------------------------------------------------------------------------


def train_teacher(folder: Path, hidden: int, layers: int, steps: int) -> dict[str, Any]:
    """Train the teacher on fresh worked solutions, and keep its weights in half precision."""
    from safetensors.torch import save_file

    model = arithmetic.model(hidden, layers, seed=0)
    arithmetic.teach(
        model,
        folder / "training",
        steps,
        rng=random.Random("teacher"),
        held_out=set(arithmetic.problems(1000, seed=0)),
        learning_rate=1e-3,
        adam_beta2=0.98,
        weight_decay=0.01,
    )
    weights = {name: value.half() for name, value in model.state_dict().items()}
    weights.pop("lm_head.weight")  # tied to the embedding
    save_file(weights, folder / "teacher.safetensors")
    return {"parameters": model.num_parameters()}


def load_teacher(weights: Path, hidden: int, layers: int) -> Any:
    """The teacher in float32, ready to generate."""
    from safetensors.torch import load_file

    model = arithmetic.model(hidden, layers, seed=0)
    state = {name: value.float() for name, value in load_file(weights).items()}
    model.load_state_dict(state, strict=False)
    return model.eval()


def score_teacher(
    folder: Path, weights: Path, hidden: int, layers: int, test_problems: int
) -> dict[str, Any]:
    """How often the teacher is right on the held-out problems, decoding greedily."""
    model = load_teacher(weights, hidden, layers)
    with Progress("testing the teacher", test_problems) as bar:
        found = ask(model, test_problems, bar.to)
    made = {"weights": str(weights), "hidden": hidden, "layers": layers}
    return {**made, "accuracy": found.accuracy, "parameters": model.num_parameters()}


def ask(model: Any, test_problems: int, progress: Any) -> Any:
    """A model answers the held-out problems greedily; only the exact answer counts."""
    from kd.evaluation import evaluate
    from kd.traces import Exact, Sampling

    return evaluate(
        arithmetic.asked(test_problems),
        Exact(),
        model=model,
        tokenizer=arithmetic.tokenizer(),
        sampling=Sampling(temperature=0, max_new_tokens=MAX_NEW_TOKENS),
        batch_size=256,
        progress=progress,
    )


# --- traces and their targets ---------------------------------------------------------------------


def make_traces(folder: Path, teacher: Stage, problems: int, test_problems: int) -> dict[str, Any]:
    """The teacher solves problems; traces with the exact answer are kept, tokenised and saved."""
    from datasets import Dataset

    from kd.traces import COMPACT, Exact, Renderer, render_stream, verify, write_traces

    tokenizer = arithmetic.tokenizer()
    answered = arithmetic.solved(
        teacher_of(teacher),
        tokenizer,
        problems,
        test_problems,
        max_new_tokens=MAX_NEW_TOKENS,
        batch_size=256,
    )
    kept, report = verify(answered, Exact())
    if not kept:
        raise ValueError(
            f"quickstart: the teacher must solve at least one problem, got none of {problems} "
            "right. Raise --teacher-steps or --problems."
        )
    write_traces(folder / "traces.jsonl", kept)
    rendered = render_stream(kept, Renderer(tokenizer, tags=COMPACT), report=report)
    rows = [row._asdict() for _, row in rendered]
    Dataset.from_list(rows).save_to_disk(folder / "rows")
    return {"table": report.table(), "kept": len(rows), "tried": problems}


def teacher_of(stage: Stage) -> Any:
    """The teacher that a finished ``teacher`` stage scored."""
    found = stage.result
    return load_teacher(Path(found["weights"]), found["hidden"], found["layers"])


def rows_of(traces: Path) -> Any:
    """The tokenised traces of the finished ``traces`` stage."""
    from datasets import load_from_disk

    return load_from_disk(traces / "rows").with_format("torch")


def make_cache(folder: Path, teacher: Stage, traces: Stage, top_k: int) -> dict[str, Any]:
    """Cache the teacher's likeliest tokens after every token of every trace."""
    from kd.teachers import build_cache

    rows = rows_of(traces.path)
    cache = build_cache(
        teacher_of(teacher),
        [row["input_ids"] for row in rows],
        folder / "cache",
        tokenizer=arithmetic.tokenizer(),
        top_k=top_k,
    )
    undecided = tokens = 0
    for row in rows:
        best = cache.lookup(row["input_ids"]).logprobs.max(dim=-1).values.exp()  # [L]
        trained = row["labels"][1:] != -100
        undecided += int((best[:-1][trained] < 0.9).sum())
        tokens += int(trained.sum())
    size = size_of(folder / "cache")
    return {"tokens": tokens, "undecided": undecided / tokens, "bytes": size}


# --- students -------------------------------------------------------------------------------------


def train_students(
    folder: Path, config: Config, traces: Stage, cache: Stage, workers: int
) -> dict[str, Any]:
    """Every arm with every seed, several side by side."""
    data = {"config": config, "rows": traces.path, "cache": cache.path / "cache"}
    jobs = {
        folder / f"{arm}-{seed}": {"arm": arm, "seed": seed, **data}
        for seed in config.seeds
        for arm in ARMS
    }
    results = run_jobs(train_student, jobs, f"training {len(jobs)} students", workers)
    return {arm: [found for found in results if found["arm"] == arm] for arm in ARMS}


def train_student(
    folder: Path, report: Any, *, arm: str, seed: int, config: Config, rows: Path, cache: Path
) -> dict[str, Any]:
    """Train and score one student, continuing from its last checkpoint if there is one."""
    from kd.cache import TeacherCache
    from kd.training import DistillationCollator, Objective, fit

    objective = Objective()
    if arm == "kd":
        objective = Objective(
            kd_weight=config.kd_weight,
            ce_weight=config.ce_weight,
            temperature=config.temperature,
            teacher=TeacherCache(cache),
        )
    model = arithmetic.model(config.student_hidden, config.student_layers, seed)
    log = fit(
        model,
        rows_of(rows),
        folder,
        collator=DistillationCollator(0, objective, attention_mask=False),
        objective=objective,
        steps=config.steps,
        batch_size=config.batch_size,
        learning_rate=config.learning_rate,
        seed=seed,
        tokenizer=arithmetic.tokenizer(),
        report=lambda share: report(0.95 * share),
    )
    found = ask(model, config.test_problems, None)
    result = {"arm": arm, "seed": seed, "accuracy": found.accuracy, "log": log}
    return {**result, "parameters": model.num_parameters(), "samples": found.samples[:200]}


# --- the report -----------------------------------------------------------------------------------

WHY = """Logits help most where one trace says little. Here several next steps are right, the
trace shows one of them at random, and the cached logits show how the teacher weighs them all. With
a single right way to write each step, or with plenty of traces (kd run quickstart plenty), the
traces alone come close and the gain shrinks. Few traces and an undecided teacher: cache its logits;
a teacher that is nearly certain of every token: its traces are enough."""


def write_report(
    folder: Path, config: Config, teacher: Stage, traces: Stage, cache: Stage, students: Stage
) -> dict[str, Any]:
    """The table, the plot, the plain words and some samples on one page."""
    from kd.evaluation import compare_arms, percent, show_arms
    from kd.page import Page

    results = students.result
    arms = {label: [run["accuracy"] for run in results[arm]] for arm, label in ARMS.items()}
    verdict = compare_arms(arms, ARMS["sft"], ARMS["kd"])
    references = {"teacher": teacher.result["accuracy"]}
    sizes = teacher.result["parameters"], results["sft"][0]["parameters"]
    page = Page("Quickstart: do logits add anything to traces?")
    text = show_arms(page, verdict, arms, config.seeds, references)
    page.text(
        f"A teacher of {sizes[0]:,} parameters solved {traces.result['tried']} problems once each; "
        f"{traces.result['kept']} traces with the exact answer were kept. Students of "
        f"{sizes[1]:,} parameters saw these traces for {config.steps} steps of "
        f"{config.batch_size}. Each was asked {config.test_problems} problems that no model was "
        "trained on, decoding greedily; only the exact answer counts. The second arm weighs "
        f"cross-entropy with {config.ce_weight} and the divergence from the top-{config.top_k} "
        f"cached log-probabilities at temperature {config.temperature} with {config.kd_weight}."
    )
    page.heading("When do logits help?").text(" ".join(WHY.split()))
    page.text(
        "On these traces the teacher puts less than 90 % on any one token at "
        f"{percent(cache.result['undecided'])} of {cache.result['tokens']:,} trained tokens; the "
        f"whole cache is {cache.result['bytes']:,} bytes."
    )
    page.heading("Traces kept and dropped").code(traces.result["table"])
    page.heading("Samples").text("The first seed of each arm on the same held-out problems.")
    for arm, label in ARMS.items():
        page.text(label).samples(results[arm][0]["samples"][:8])
    page.save(folder / "report.html")
    return {"verdict": verdict, "text": text, "arms": arms, **references}


if __name__ == "__main__":
    run_recipe(sys.modules[__name__])
