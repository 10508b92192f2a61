"""The road from reasoning traces to a compared student: every setting, and every stage in order.

    models ─► traces ─► rows ─► [cache ─► targets] ─► [sft] ─► [kd, control] ─► evaluation ─► report

The recipes ``r1_to_qwen``, ``logit_kd``, ``stratos`` and ``sky_t1`` are settings of it. A stage
whose epochs are 0 is left out. Each stage is a function below: it gets its folder, its settings and
the stages that it reads, and returns what the later ones need.
"""

from __future__ import annotations

import shutil
import sys
from collections.abc import Iterator
from dataclasses import dataclass, replace
from functools import partial
from itertools import islice, tee
from pathlib import Path
from typing import Any

from kd.files import size_of
from kd.models import device, load_config, load_for_inference, load_tokenizer
from kd.progress import Progress, say
from kd.stages import Run, Stage, default_workers, one_thread, run_jobs, show_report
from kd_recipes import _arithmetic as arithmetic
from kd_recipes import _estimate
from kd_recipes import _offline_qwen as offline_world
from kd_recipes._offline_qwen import OFFLINE
from kd_recipes._reasoning_report import write_report
from kd_recipes._training import Training, train


@dataclass(frozen=True)
class Config:
    """Every setting of the recipe."""

    recipe: str = ""  # the recipe's name
    title: str = ""  # of the report
    output: str = ""  # folder of the run; start again with the same one to continue
    student: str = OFFLINE  # the student: a folder or a hub id
    teacher: str = OFFLINE  # with the student's merges: a folder or a hub id; "": traces alone
    traces: str = OFFLINE  # a .jsonl or .parquet, a hub data set (owner/name:config@split), offline
    max_traces: int = 0  # use only the first so many; 0 takes all
    verifier: str = ""  # keep right answers only: maths, numeric, choice, exact, gym; "": all
    tags: str = "r1"  # of a thought: r1 (<think>), compact, or sky_t1 (<|begin_of_thought|>)
    max_length: int = 32_768  # tokens; longer traces are dropped and counted, never cut
    sft: Training = Training()  # on the traces; 0 epochs leaves it out
    kd: Training = Training(epochs=0)  # logit KD on the same traces, after SFT; 0 epochs: none
    online: bool = False  # keep the teacher in memory during KD; else its targets are cached
    top_k: int = 64  # log-probabilities cached per token
    control: bool = False  # also SFT alone for as long as KD: the fair comparison, twice the cost
    problems: str = "gym:gsm_symbolic"  # for all models: a .jsonl of {prompt, reference}, gym:NAME
    problem_verifier: str = "numeric"  # of answers: maths, numeric, choice, exact or gym
    test_problems: int = 200  # how many problems
    max_new_tokens: int = 32_768  # longest answer
    seeds: tuple[int, ...] = (0,)  # runs of all training
    workers: int = 0  # students trained side by side on a CPU; 0 takes one per core
    shape: str = ""  # the student's size, for the estimate: 0.5B, 1.5B, 7B, 14B or 32B
    mean_tokens: int = 6_000  # tokens of a mean trace, for the estimate before the traces are read
    rows_expected: int = 16_700  # traces expected, likewise
    source: str = ""  # where the hyper-parameters come from
    dry_run: bool = False  # print memory, time and disk, and stop
    gpus: int = 0  # GPUs to assume in the estimate; 0 takes what is here
    gpu_memory: float = 0.0  # GiB of each
    gpu: str = ""  # their kind, such as H100
    fresh: bool = False  # forget earlier stages and do everything again
    open: bool = False  # open the report in a browser at the end, where there is one


@dataclass(frozen=True)
class Exam:
    """What every model is asked, and how its answers are checked."""

    problems: str
    verifier: str
    count: int
    max_new_tokens: int


def main(config: Config) -> dict[str, Any]:
    """Run the recipe, or print its estimate; returns the figures of its report."""
    if config.shape or config.dry_run:
        text = _estimate.estimate(config)
        say(text)
        if config.dry_run:
            return {"estimate": text}
        _estimate.require_gpu(config)
        report = run_stages(config)
    else:
        with one_thread():
            report = run_stages(config)
    return show_report(report, browser=config.open)


def run_stages(config: Config) -> Stage:
    """Every stage in order; each is skipped when what it reads has not changed."""
    run = Run(config.output, config.recipe, fresh=config.fresh)
    workers = 1 if device().type == "cuda" else config.workers or default_workers()
    models = run.stage(
        "models",
        get_models,
        student=config.student,
        teacher=config.teacher,
        max_length=config.max_length,
    )
    traces = run.stage(
        "traces",
        get_traces,
        models=models,
        source=config.traces,
        verifier=config.verifier,
        limit=config.max_traces,
        held_out=config.test_problems,
    )
    rows = run.stage(
        "rows",
        render_rows,
        models=models,
        traces=traces,
        max_length=config.max_length,
        tags=config.tags,
    )
    if config.online and not models.result["one_to_one"]:
        raise ValueError(
            f"{config.recipe}: online must be used with a teacher of the student's own tokens, "
            f"got ids that differ: {models.result['contract']}. Leave out --online: a cache is "
            "remapped."
        )
    targets = None
    if config.kd.epochs and not config.online:
        cache = run.stage(
            "cache",
            cache_teacher,
            every_rank=True,
            models=models,
            rows=rows,
            top_k=config.top_k,
            batch_tokens=max(4096, config.max_length),
        )
        targets = run.stage("targets", translate_targets, models=models, rows=rows, cache=cache)
    sft = run.stage(
        "sft",
        partial(train_sft, workers=workers),
        every_rank=True,
        models=models,
        rows=rows,
        training=config.sft,
        seeds=config.seeds,
    )
    arms = run.stage(
        "kd",
        partial(train_arms, workers=workers),
        every_rank=True,
        models=models,
        rows=rows,
        targets=targets or rows,
        sft=sft,
        training=config.kd,
        control=config.control,
        online=config.online,
    )
    scores = run.stage(
        "evaluation",
        partial(evaluate_models, workers=workers),
        models=models,
        arms=arms,
        exam=Exam(
            config.problems, config.problem_verifier, config.test_problems, config.max_new_tokens
        ),
    )
    return run.stage(
        "report",
        write_report,
        config=replace(config, output="", workers=0, fresh=False, open=False),
        traces=traces,
        rows=rows,
        targets=targets or rows,
        arms=arms,
        scores=scores,
    )


# --- the stages -----------------------------------------------------------------------------------


def get_models(folder: Path, student: str, teacher: str, max_length: int) -> dict[str, Any]:
    """Where both models are, and what the teacher's ids mean to the student.

    What could make a long run fail late is refused here: tokenizers that differ, lm_heads that are
    too narrow, and a context shorter than the traces may be.
    """
    from kd.vocab import R1_TO_QWEN, check_width, vocabulary_contract

    found: dict[str, Any] = {}
    tokenizers = {}
    for side, name in (("student", student), ("teacher", teacher)):
        path = found[side] = offline_world.folder_of(name, side, folder)
        if not path:
            continue
        tokenizers[side], sizes = load_tokenizer(path), load_config(path)
        check_width(tokenizers[side], sizes.vocab_size, side)
        found[f"{side}_rows"] = sizes.vocab_size
        if max_length > sizes.max_position_embeddings:
            raise ValueError(
                f"recipe: max_length must be at most the {side}'s context of "
                f"{sizes.max_position_embeddings} tokens, got {max_length}. Lower --max-length, "
                "or choose a model with a longer context."
            )
    if teacher:
        both = tokenizers["teacher"], tokenizers["student"]
        contract = vocabulary_contract(*both, special=R1_TO_QWEN)
        found |= {"contract": contract.to_dict(), "one_to_one": contract.trivial}
    return found


def get_traces(
    folder: Path, models: Stage, source: str, verifier: str, limit: int, held_out: int
) -> dict[str, Any]:
    """Traces of a file, a data set or the offline teacher, verified; every drop is counted."""
    from kd.traces import (
        DropCounts,
        Lint,
        Trace,
        advice,
        exact_duplicates,
        filter_stream,
        load,
        verify_stream,
        write_traces,
    )
    from kd.traces import verifier as verifier_named

    report, missed = DropCounts(), list[Trace]()
    if source == OFFLINE:  # where nobody needs the teacher later, it is written for this alone
        path = models.result["teacher"] or offline_world.folder_of(OFFLINE, "teacher", folder)
        found = arithmetic.solved(
            load_for_inference(path),
            load_tokenizer(path),
            limit,
            held_out,
            max_new_tokens=40,
            batch_size=64,
            report=report,
        )
    else:
        found = islice(load(source, report=report), limit or None)
    kept = filter_stream(found, [Lint(need_think=True)], report=report, stage="lint")
    if verifier:
        judge, journal = verifier_named(verifier), folder / "verdicts.jsonl"
        kept = verify_stream(kept, judge, journal=journal, report=report, missed=missed)
    count = write_traces(folder / "traces.jsonl", exact_duplicates(kept, report=report))
    if not count:
        print(report.table(), file=sys.stderr)
        raise ValueError(
            f"recipe: traces must leave at least one after filtering, got none of {source}. "
            f"{advice(missed, verifier) or report.cure()}"
        )
    return {"table": report.table(), "kept": count}


def render_rows(
    folder: Path, models: Stage, traces: Stage, max_length: int, tags: str
) -> dict[str, Any]:
    """Every trace in the student's template and, where there is one, in the teacher's."""
    from datasets import Dataset

    from kd.traces import TAGS, DropCounts, Renderer, load, render_stream

    if tags not in TAGS:
        raise ValueError(f"recipe: tags must be one of {', '.join(TAGS)}, got {tags!r}.")
    report, totals = DropCounts(), {"rows": 0, "tokens": 0, "trained": 0}

    def rendered(found: Any, side: str) -> Iterator[Any]:
        renderer = Renderer(load_tokenizer(models.result[side]), tags=TAGS[tags])
        stage = f"render for the {side}"
        return render_stream(found, renderer, report=report, stage=stage, max_tokens=max_length)

    def rows() -> Iterator[dict[str, Any]]:
        ours, again = tee(rendered(load(traces.path / "traces.jsonl"), "student"))
        theirs = rendered((t for t, _ in again), "teacher") if models.result["teacher"] else again
        with Progress("rendering", traces.result["kept"]) as bar:
            for trace, other in theirs:
                row = next(own for same, own in ours if same is trace)
                start = _start(row.labels)
                totals["rows"] += 1
                totals["tokens"] += len(row.labels)
                totals["trained"] += len(row.labels) - start
                bar.to(totals["rows"])
                yield {
                    "input_ids": row.input_ids,
                    "labels": row.labels,
                    "start": start,
                    "teacher_ids": other.input_ids,
                    "teacher_start": _start(other.labels),
                }

    # written in batches: reasoning traces need not fit into memory
    cache = str(folder / "arrow")
    Dataset.from_generator(rows, cache_dir=cache, fingerprint="rows").save_to_disk(folder / "rows")
    shutil.rmtree(cache)
    return {**totals, "table": report.table()}


def _start(labels: list[int]) -> int:
    """Where the completion begins."""
    return next((i for i, label in enumerate(labels) if label != -100), len(labels))


def cache_teacher(
    folder: Path, models: Stage, rows: Stage, top_k: int, batch_tokens: int
) -> dict[str, Any]:
    """The teacher's top-k on its own rendering of every trace."""
    from datasets import load_from_disk

    from kd.teachers import build_cache

    path = models.result["teacher"]
    build_cache(
        load_for_inference(path),
        (row["teacher_ids"] for row in load_from_disk(rows.path / "rows").with_format("torch")),
        folder / "cache",
        tokenizer=load_tokenizer(path),
        top_k=top_k,
        batch_tokens=batch_tokens,
    )
    return {"path": str(folder / "cache"), "bytes": size_of(folder / "cache")}


def translate_targets(folder: Path, models: Stage, rows: Stage, cache: Stage) -> dict[str, Any]:
    """The teacher's targets at the student's tokens; nothing to do where both are the same."""
    from datasets import load_from_disk

    from kd.cache import TeacherCache
    from kd.teachers.translate import Pair, translate_cache
    from kd.vocab import VocabularyContract

    found = load_from_disk(rows.path / "rows")
    if models.result["one_to_one"] and found[0]["input_ids"] == found[0]["teacher_ids"]:
        return {**cache.result, "covered": 1, "tokens": 1}
    with Progress("translating targets to the student's ids", len(found)) as bar:
        result = translate_cache(
            TeacherCache(cache.result["path"]),
            (Pair(r["teacher_ids"], r["teacher_start"], r["input_ids"], r["start"]) for r in found),
            folder / "cache",
            teacher=load_tokenizer(models.result["teacher"]),
            student=load_tokenizer(models.result["student"]),
            contract=VocabularyContract.from_dict(models.result["contract"]),
            padded_vocab=models.result["student_rows"],
            progress=bar.to,
        )
    return {**cache.result, "path": str(folder / "cache"), **result}


def train_sft(
    folder: Path, models: Stage, rows: Stage, training: Training, seeds: Any, workers: int
) -> dict[str, Any]:
    """SFT, once a seed; without it the student goes on as it is."""
    student = models.result["student"]
    if not training.epochs:
        return {"runs": [{"seed": seed, "model": student} for seed in seeds]}
    base = {"start": student, "tokenizer": student, "rows": rows.path / "rows"}
    jobs = {folder / f"seed-{s}": {**base, "training": training, "seed": s} for s in seeds}
    return {"runs": run_jobs(train, jobs, f"SFT of {len(jobs)} students", workers)}


def train_arms(
    folder: Path,
    models: Stage,
    rows: Stage,
    targets: Stage,
    sft: Stage,
    training: Training,
    control: bool,
    online: bool,
    workers: int,
) -> dict[str, Any]:
    """KD from every student of the SFT, and the control: as much SFT again."""
    before = sft.result["runs"]
    if not training.epochs:
        return {"sft": before, "kd": []}
    alone = {"training": replace(training, kd_weight=0.0, ce_weight=1.0)}
    teacher = {"online": models.result["teacher"]} if online else {"cache": targets.result["path"]}
    arms = {"sft": alone} if control else {}
    arms["kd"] = {"training": training, **teacher}
    base = {"tokenizer": models.result["student"], "rows": rows.path / "rows"}
    # another order of the data than in the SFT before; the same one in both arms
    jobs = {
        folder / f"{arm}-{run['seed']}": {
            **base,
            **settings,
            "start": run["model"],
            "seed": run["seed"] + 1000,
        }
        for run in before
        for arm, settings in arms.items()
    }
    what = f"KD{', and SFT as control' if control else ''}: {len(jobs)} students"
    done = dict(zip(jobs, run_jobs(train, jobs, what, workers), strict=True))
    found = {arm: [done[folder / f"{arm}-{run['seed']}"] for run in before] for arm in arms}
    return {"sft": before, **found}


def evaluate_models(
    folder: Path, models: Stage, arms: Stage, exam: Exam, workers: int
) -> dict[str, Any]:
    """Before, after and the teacher on the same problems, decoding greedily."""
    paths = {"before": models.result["student"], "teacher": models.result["teacher"]}
    for arm, runs in arms.result.items():
        paths |= {f"{arm}-{number}": run["model"] for number, run in enumerate(runs)}
    paths = {name: path for name, path in paths.items() if path}
    # a student that was not trained at all is asked once
    unique = {path: name for name, path in reversed(paths.items())}
    jobs = {folder / name: {"model": path, "exam": exam} for path, name in unique.items()}
    done = run_jobs(ask, jobs, f"asking {len(jobs)} models", workers)
    found = dict(zip(unique, done, strict=True))
    return {name: found[path] for name, path in paths.items()}


def ask(folder: Path, report: Any, *, model: str, exam: Exam) -> dict[str, Any]:
    """One model answers every problem."""
    from kd.evaluation import evaluate, read_problems
    from kd.traces import Sampling, verifier

    offline = exam.problems == OFFLINE
    problems = arithmetic.asked(exam.count) if offline else read_problems(exam.problems, exam.count)
    found = evaluate(
        problems,
        verifier(exam.verifier),
        model=load_for_inference(model),
        tokenizer=load_tokenizer(model),
        sampling=Sampling(temperature=0, max_new_tokens=exam.max_new_tokens),
        batch_size=64,
        progress=lambda done: report(done / len(problems)),
    )
    return {
        "accuracy": found.accuracy,
        "undecided": found.undecided,
        "correct": [row[0] for row in found.right],
        "samples": found.samples[:8],
    }
