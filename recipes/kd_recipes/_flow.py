"""The way from traces to a compared student that all Qwen recipes go: config, stages, report.

    models ─► traces ─► rows ─► [cache ─► targets] ─► [sft] ─► [kd, control] ─► evaluation ─► report

A recipe is a ``Config`` with a name, a title and presets; a stage whose epochs are 0 is left out.
"""

from __future__ import annotations

from dataclasses import dataclass, field, replace
from functools import partial
from pathlib import Path
from typing import Any

from kd.progress import say
from kd.stages import Run, Stage, default_workers, one_thread, run_jobs
from kd_recipes import _estimate, _pipeline, _training
from kd_recipes._flow_report import write_report
from kd_recipes._pipeline import OFFLINE, OFFLINE_QWEN
from kd_recipes._training import Job, Training


@dataclass(frozen=True)
class Config:
    """Every setting of the recipe."""

    recipe: str = ""
    """The recipe's name."""
    title: str = ""
    """Of the report."""
    output: str = ""
    """Folder of the run; start again with the same one to continue."""
    student: str = OFFLINE
    """The student: a folder or a hub id."""
    teacher: str = OFFLINE
    """A model with the student's merges: a folder or a hub id; empty for traces alone."""
    traces: str = OFFLINE
    """A .jsonl or .parquet of traces, a hub data set (owner/name:config@split), or "offline"."""
    max_traces: int = 0
    """Use only the first so many; 0 takes all."""
    verifier: str = ""
    """Keep a trace only if its answer is right: maths, numeric, choice, exact, gym; empty: all."""
    tags: str = "r1"
    """How a thought is written: r1 (<think>), compact, or sky_t1 (<|begin_of_thought|>)."""
    max_length: int = 32_768
    """Tokens; longer traces are dropped and counted, never cut."""
    sft: Training = field(default_factory=Training)
    """SFT on the traces; 0 epochs leaves it out."""
    kd: Training = field(default_factory=lambda: Training(epochs=0))
    """Logit KD on the same traces, after SFT; 0 epochs leaves it out."""
    online: bool = False
    """Keep the teacher in memory during KD instead of caching its targets first."""
    top_k: int = 64
    """Log-probabilities cached per token."""
    control: bool = False
    """Also go on with SFT alone for as long as KD: the fair comparison, at twice the cost."""
    problems: str = "gym:gsm_symbolic"
    """What all models are asked: a .jsonl of {prompt, reference}, gym:NAME or lm-eval:TASK."""
    problem_verifier: str = "numeric"
    """How answers are checked: maths, numeric, choice, exact or gym."""
    test_problems: int = 200
    """How many problems."""
    max_new_tokens: int = 32_768
    """Longest answer."""
    seeds: tuple[int, ...] = (0,)
    """Runs of all training."""
    workers: int = 0
    """Students trained side by side on a CPU; 0 takes one per core."""
    shape: str = ""
    """The student's size, for the estimate: 0.5B, 1.5B, 7B, 14B or 32B."""
    mean_tokens: int = 6_000
    """Tokens of a mean trace, for the estimate before the traces are read."""
    rows_expected: int = 16_700
    """Traces expected, likewise."""
    source: str = ""
    """Where the hyper-parameters come from."""
    dry_run: bool = False
    """Print memory, time and disk, and stop."""
    gpus: int = 0
    """GPUs to assume in the estimate; 0 takes what is here."""
    gpu_memory: float = 0.0
    """GiB of each."""
    gpu: str = ""
    """Their kind, such as H100."""
    fresh: bool = False
    """Forget earlier stages and do everything again."""
    open: bool = False
    """Open the report in a browser at the end, where there is one."""


__all__ = ["OFFLINE", "OFFLINE_QWEN", "Config", "Training", "run"]


def run(config: Config) -> dict[str, Any]:
    """Run the recipe, or print its estimate; returns the figures of its report."""
    if config.shape or config.dry_run:
        need = _need(config)
        text = _estimate.estimate(need, config.gpus, config.gpu_memory, config.gpu)
        say(text)
        if config.dry_run:
            return {"estimate": text}
        _estimate.require_gpu(need)
        report = run_stages(config)
    else:
        with one_thread():
            report = run_stages(config)
    page = report.path / "report.html"
    say(f"\n{report.result['table']}\n\n{report.result['verdict']}\n\nreport: {page}")
    if config.open:
        from kd.page import open_page

        open_page(page)
    return report.result


def _need(config: Config) -> _estimate.Need:
    size = config.teacher.removesuffix("-Instruct").rpartition("-")[2]
    return _estimate.Need(
        name=config.recipe,
        student=_estimate.QWEN25.get(config.shape) or _shape(config.student),
        teacher=_estimate.QWEN25.get(size),
        length=config.max_length,
        rows=config.max_traces or config.rows_expected,
        mean_tokens=min(config.mean_tokens, config.max_length),
        sft_epochs=config.sft.epochs,
        kd_epochs=config.kd.epochs,
        top_k=config.top_k,
        online=config.online,
        source=config.source,
        offline=f"kd run {config.recipe} offline",
    )


def _shape(student: str) -> _estimate.Shape:
    if student == OFFLINE:
        return _estimate.Shape(64, 4, 2, 2, 176, 151_936, True, 128)
    from kd.models import load_config

    return _estimate.Shape.of(load_config(student))


def run_stages(config: Config) -> Stage:
    """Every stage in order; each is skipped when what it reads has not changed."""
    flow = Run(config.output, config.recipe, fresh=config.fresh)
    workers = config.workers or default_workers()
    length, with_kd = config.max_length, config.kd.epochs > 0
    models = flow.stage(
        "models",
        _pipeline.get_models,
        student=config.student,
        teacher=config.teacher,
        max_length=length,
    )
    traces = flow.stage(
        "traces",
        _pipeline.get_traces,
        models=models,
        source=config.traces,
        verifier=config.verifier,
        limit=config.max_traces,
        held_out=config.test_problems,
    )
    rows = flow.stage(
        "rows",
        _pipeline.render_rows,
        models=models,
        traces=traces,
        max_length=length,
        tags=config.tags,
    )
    if config.online and not models.result["one_to_one"]:
        raise ValueError(
            f"{config.recipe}: online must be used with a teacher of the student's own tokens, "
            f"got ids that differ: {models.result['contract']}. Leave out --online: a cache is "
            "remapped."
        )
    targets = None
    if with_kd and not config.online:
        cache = flow.stage(
            "cache",
            _pipeline.cache_teacher,
            every_rank=True,
            models=models,
            rows=rows,
            top_k=config.top_k,
            batch_tokens=max(4096, length),
        )
        targets = flow.stage(
            "targets", _pipeline.translate_targets, models=models, rows=rows, cache=cache
        )
    sft = flow.stage(
        "sft",
        partial(train_sft, workers=workers),
        every_rank=True,
        models=models,
        rows=rows,
        training=config.sft,
        seeds=config.seeds,
    )
    arms = flow.stage(
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
    scores = flow.stage(
        "evaluation",
        partial(evaluate, workers=workers),
        models=models,
        arms=arms,
        problems=config.problems,
        verifier=config.problem_verifier,
        count=config.test_problems,
        max_new_tokens=config.max_new_tokens,
    )
    return flow.stage(
        "report",
        write_report,
        config=replace(config, output="", workers=0, fresh=False, open=False),
        traces=traces,
        rows=rows,
        targets=targets or rows,
        arms=arms,
        scores=scores,
    )


def train_sft(
    folder: Path, models: Stage, rows: Stage, training: Training, seeds: Any, workers: int
) -> dict[str, Any]:
    """SFT, once a seed; without it the student goes on as it is."""
    student = models.result["student"]
    if not training.epochs:
        return {"runs": [{"seed": seed, "model": student} for seed in seeds]}
    jobs = [
        Job(folder / f"seed-{seed}", student, student, rows.path, training, seed) for seed in seeds
    ]
    return {"runs": _training.train_all(jobs, f"SFT of {len(jobs)} students", workers)}


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
    alone = replace(training, kd_weight=0.0, ce_weight=1.0)
    base = Job(folder, "", models.result["student"], rows.path, training, 0)
    jobs = []
    for run in before:
        # another order of the data than in the SFT before; the same one in both arms
        here = replace(base, start=run["model"], seed=run["seed"] + 1000)
        if control:
            jobs.append(replace(here, folder=folder / f"sft-{run['seed']}", training=alone))
        source = (
            {"online": models.result["teacher"]} if online else {"targets": targets.result["path"]}
        )
        jobs.append(replace(here, folder=folder / f"kd-{run['seed']}", **source))
    what = "KD, and SFT as control" if control else "KD"
    done = _training.train_all(jobs, f"{what}: {len(jobs)} students", workers)
    found = {
        arm: [r for r in done if Path(r["folder"]).name.startswith(arm)] for arm in ("sft", "kd")
    }
    return found if control else {**found, "sft": before}


def evaluate(
    folder: Path,
    models: Stage,
    arms: Stage,
    problems: str,
    verifier: str,
    count: int,
    max_new_tokens: int,
    workers: int,
) -> dict[str, Any]:
    """Before, after and the teacher on the same problems, decoding greedily."""
    paths = {"before": models.result["student"]}
    if models.result["teacher"]:
        paths["teacher"] = models.result["teacher"]
    for arm, runs in arms.result.items():
        paths |= {f"{arm}-{number}": run["model"] for number, run in enumerate(runs)}
    # a student that was not trained at all is asked once
    unique = {path: name for name, path in reversed(paths.items())}
    asked = [
        (str(folder / name), path, problems, count, verifier, max_new_tokens)
        for path, name in unique.items()
    ]
    done = run_jobs(_pipeline.answer_problems, asked, f"asking {len(asked)} models", workers)
    found = dict(zip(unique, done, strict=True))
    return {name: found[path] for name, path in paths.items()}
