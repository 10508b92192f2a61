"""The stages that the Qwen recipes share: models, traces, rows, teacher targets, answers.

Each function is a stage of ``kd.stages.Run``: it gets its folder, its settings and the stages it
reads, and returns what the later ones need. A recipe file lists them; nothing here knows a recipe.
"""

from __future__ import annotations

import shutil
import sys
from pathlib import Path
from typing import Any

from kd.files import read_json, write_json
from kd.models import device, load_config, load_model, load_tokenizer
from kd.progress import Progress
from kd.stages import Stage
from kd_recipes import _arithmetic as arithmetic

OFFLINE, OFFLINE_QWEN = "offline", "offline-qwen"

# --- models and vocabulary ------------------------------------------------------------------------


def get_models(folder: Path, student: str, teacher: str, max_length: int) -> dict[str, Any]:
    """Where both models are, and the contract between their vocabularies.

    Everything that could make a long run fail late is checked here: tokenizers that differ,
    lm_heads that are too narrow, and a context shorter than the traces may be.
    """
    from kd.vocab import R1_TO_QWEN, check_width, vocabulary_contract

    paths = {"student": student, "teacher": teacher}
    for side, name in paths.items():
        if name in (OFFLINE, OFFLINE_QWEN):
            from kd_recipes import _offline_qwen

            made = "qwen-teacher" if name == OFFLINE_QWEN else side
            _offline_qwen.write_model(made, folder / side)
            paths[side] = str(folder / side)
    found: dict[str, Any] = dict(paths)
    tokenizers = {}
    for side, path in paths.items():
        if not path:
            continue
        tokenizers[side], config = load_tokenizer(path), load_config(path)
        found[f"{side}_live"] = check_width(tokenizers[side], config.vocab_size, side)
        found[f"{side}_rows"] = config.vocab_size
        if max_length > config.max_position_embeddings:
            raise ValueError(
                f"recipe: max_length must be at most the {side}'s context of "
                f"{config.max_position_embeddings} tokens, got {max_length}. Lower --max-length, "
                "or choose a model with a longer context."
            )
    if teacher:
        contract = vocabulary_contract(
            tokenizers["teacher"], tokenizers["student"], special=R1_TO_QWEN
        )
        found["contract"] = contract.to_dict()
        found["one_to_one"] = contract.trivial
    return found


def contract_of(models: Stage) -> Any:
    """The vocabulary contract that the ``models`` stage settled."""
    from kd.vocab import VocabularyContract

    plain = models.result["contract"]
    return VocabularyContract(
        plain["teacher_live"],
        plain["student_live"],
        {int(a): b for a, b in plain["remap"].items()},
        frozenset(plain["masked"]),
    )


# --- traces ---------------------------------------------------------------------------------------


def get_traces(
    folder: Path,
    models: Stage,
    source: str,
    verifier: str,
    limit: int,
    held_out: int,
) -> dict[str, Any]:
    """Traces of a file or a data set, or of the offline teacher; verified, and counted."""
    from kd.traces import (
        DropCounts,
        Lint,
        Trace,
        advice,
        exact_duplicates,
        filter_stream,
        verify_stream,
        write_traces,
    )
    from kd.traces import verifier as verifier_named

    report = DropCounts()
    found = (
        _offline_traces(folder, models, limit, held_out, report)
        if source == OFFLINE
        else _limited(_load(source, report), limit)
    )
    stream = filter_stream(found, [Lint(need_think=True)], report=report, stage="lint")
    missed: list[Trace] = []
    if verifier:
        stream = verify_stream(
            stream,
            verifier_named(verifier),
            journal=folder / "verdicts.jsonl",
            report=report,
            missed=missed,
        )
    count = write_traces(folder / "traces.jsonl", exact_duplicates(stream, report=report))
    if not count:
        print(report.table(), file=sys.stderr)
        raise ValueError(
            f"recipe: traces must leave at least one after filtering, got none of {source}. "
            f"{advice(missed, verifier) or report.cure()}"
        )
    return {"table": report.table(), "kept": count}


def _load(source: str, report: Any) -> Any:
    from kd.traces import load

    try:
        yield from load(source, report=report)
    except (OSError, ConnectionError) as error:
        raise OSError(
            f"recipe: traces must be a readable file or data set, got {source} "
            f"({str(error).strip().splitlines()[0][:120]}). Check the name and the network, or "
            "give a JSON-lines file with --traces."
        ) from error


def _limited(stream: Any, limit: int) -> Any:
    for number, trace in enumerate(stream):
        if limit and number >= limit:
            return
        yield trace


def _offline_traces(folder: Path, models: Stage, count: int, held_out: int, report: Any) -> Any:
    """The offline teacher solves sums, once each, at temperature 1."""
    from kd.traces import Sampling, Trace, generate_local

    excluded = set(arithmetic.problems(max(held_out, 1), seed=0))
    questions = arithmetic.problems(count, seed=1, exclude=excluded)
    asked = [Trace(q, reference=arithmetic.answer(q), domain="math") for q in questions]
    path = models.result["teacher"]
    if not path:  # traces alone: nobody needs the teacher later
        from kd_recipes import _offline_qwen

        path = str(folder / "teacher")
        _offline_qwen.write_model("teacher", folder / "teacher")
    counted = report.stage("generate")
    with Progress("the teacher solves problems", len(asked)) as bar:
        for trace in generate_local(
            load_model(path),
            load_tokenizer(path),
            asked,
            sampling=Sampling(temperature=1.0, top_p=1.0, max_new_tokens=40),
            batch_size=64,
            progress=bar.to,
        ):
            counted.keep()
            yield trace


def render_rows(
    folder: Path, models: Stage, traces: Stage, max_length: int, tags: str
) -> dict[str, Any]:
    """Every trace in the student's template and, where there is one, in the teacher's."""
    from datasets import Dataset

    from kd.traces import TAGS, DropCounts, Renderer, load

    if tags not in TAGS:
        raise ValueError(f"recipe: tags must be one of {', '.join(TAGS)}, got {tags!r}.")
    student = Renderer(load_tokenizer(models.result["student"]), tags=TAGS[tags])
    teacher_path = models.result["teacher"]
    teacher = Renderer(load_tokenizer(teacher_path), tags=TAGS[tags]) if teacher_path else None
    report, totals = DropCounts(), {"rows": 0, "tokens": 0, "trained": 0}

    def rows() -> Any:
        counted = report.stage("render")
        with Progress("rendering", traces.result["kept"]) as bar:
            for trace in load(traces.path / "traces.jsonl"):
                bar.advance()
                row = _render(trace, student, teacher, max_length, counted)
                if row is not None:
                    totals["rows"] += 1
                    totals["tokens"] += len(row["input_ids"])
                    totals["trained"] += len(row["input_ids"]) - row["start"]
                    yield row

    # written in batches: reasoning traces need not fit into memory
    cache = str(folder / "arrow")
    Dataset.from_generator(rows, cache_dir=cache, fingerprint="rows").save_to_disk(folder / "rows")
    shutil.rmtree(cache)
    return {**totals, "table": report.table()}


def _render(
    trace: Any, student: Any, teacher: Any, max_length: int, counted: Any
) -> dict[str, Any] | None:
    from kd.traces import RenderError

    try:
        ours = student(trace)
        theirs = teacher(trace) if teacher is not None else None
    except RenderError as error:
        counted.drop(error.reason, trace, str(error))
        return None
    longest = max(len(ours.input_ids), len(theirs.input_ids) if theirs else 0)
    if longest > max_length:
        counted.drop(f"longer than {max_length} tokens", trace, f"{longest} tokens")
        return None
    counted.keep()
    row = {"input_ids": ours.input_ids, "labels": ours.labels, "start": _start(ours.labels)}
    if theirs is not None:
        row |= {"teacher_ids": theirs.input_ids, "teacher_start": _start(theirs.labels)}
    return row


def _start(labels: list[int]) -> int:
    return next((i for i, label in enumerate(labels) if label != -100), len(labels))


def rows_of(rows: Path) -> Any:
    """The rows of a finished ``rows`` stage."""
    from datasets import load_from_disk

    return load_from_disk(rows / "rows")


# --- teacher targets ------------------------------------------------------------------------------


def cache_teacher(
    folder: Path, models: Stage, rows: Stage, top_k: int, batch_tokens: int
) -> dict[str, Any]:
    """The teacher's top-k on its own rendering of every trace."""
    from kd.teachers import build_cache

    path = models.result["teacher"]
    dtype = {"dtype": "auto"} if device().type == "cuda" else {}
    column = rows_of(rows.path).with_format("torch")
    cache = build_cache(
        load_model(path, **dtype).eval(),
        (row["teacher_ids"] for row in column),
        folder / "cache",
        tokenizer=load_tokenizer(path),
        top_k=top_k,
        batch_tokens=batch_tokens,
    )
    size = sum(file.stat().st_size for file in (folder / "cache").rglob("*") if file.is_file())
    return {"path": str(folder / "cache"), "bytes": size, "sequences": len(cache)}


def translate_targets(folder: Path, models: Stage, rows: Stage, cache: Stage) -> dict[str, Any]:
    """The teacher's targets at the student's tokens; nothing to do where both are the same."""
    from kd.cache import TeacherCache
    from kd.teachers.translate import Pair, translate_cache

    found = rows_of(rows.path)
    same = models.result["one_to_one"] and all(
        list(row["input_ids"]) == list(row["teacher_ids"]) for row in found.select(range(1))
    )
    if same:
        return {**cache.result, "covered": 1, "tokens": 1}
    with Progress("translating targets to the student's ids", len(found)) as bar:
        result = translate_cache(
            TeacherCache(cache.result["path"]),
            (
                Pair(row["teacher_ids"], row["teacher_start"], row["input_ids"], row["start"])
                for row in found
            ),
            folder / "cache",
            teacher=load_tokenizer(models.result["teacher"]),
            student=load_tokenizer(models.result["student"]),
            contract=contract_of(models),
            padded_vocab=models.result["student_rows"],
            progress=bar.to,
        )
    return {**cache.result, "path": str(folder / "cache"), **result}


# --- evaluation -----------------------------------------------------------------------------------


def problems_of(source: str, count: int) -> list[Any]:
    """Problems as traces to be answered: the offline sums, or what ``kd evaluate`` reads."""
    from kd.traces import Trace

    if source == OFFLINE:
        questions = arithmetic.problems(count, seed=0)
        return [Trace(q, reference=arithmetic.answer(q)) for q in questions]
    from kd.evaluation.problems import read_problems

    return read_problems(source, count)


def answer_problems(job: Any, report: Any) -> dict[str, Any]:
    """One model answers every problem; kept on disk, so that a rerun does not ask again."""
    folder, path, source, count, verifier, max_new_tokens = job
    file = Path(folder) / "answers.json"
    done = read_json(file)
    if done:
        return done

    from kd.traces import Sampling, generate_local, judge_all
    from kd.traces import verifier as verifier_named

    Path(folder).mkdir(parents=True, exist_ok=True)
    problems = [t.note(number=i) for i, t in enumerate(problems_of(source, count))]
    model = load_model(path, **({"dtype": "auto"} if device().type == "cuda" else {}))
    answered = generate_local(
        model,
        load_tokenizer(path),
        problems,
        sampling=Sampling(temperature=0, max_new_tokens=max_new_tokens),
        batch_size=64,
        progress=lambda done: report(done / len(problems)),
    )
    rows, undecided = [], 0
    in_order = sorted(answered, key=lambda t: t.metadata["number"])
    for trace, verdict in judge_all(in_order, verifier_named(verifier)):
        rows.append((trace.prompt, trace.think, trace.answer, verdict.correct))
        undecided += verdict.status in ("unknown", "error")
    result = {
        "accuracy": sum(row[3] for row in rows) / len(rows),
        "undecided": undecided / len(rows),
        "correct": [row[3] for row in rows],
        "samples": rows[:8],
    }
    write_json(file, result)
    return result
