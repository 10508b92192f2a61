"""``kd cache``: the verbs of ``kd.cache.cli``, and build and doctor, which need the teacher."""

from __future__ import annotations

import argparse
import os
from pathlib import Path
from typing import Any

from kd.cache import cli as cache_cli
from kd.models import load_model, load_tokenizer
from kd.traces.cli import add_rendering, rendering_options

DATA = "a file, folder or hub data set of traces, messages, text or input_ids (packs too)"
DTYPES = ("auto", "float32", "bfloat16", "float16")


def add_parser(subparsers: Any) -> None:
    """Register ``kd cache`` with all its verbs."""
    verbs = cache_cli.add_parser(subparsers)
    _build(verbs)
    _doctor(verbs)


def _teacher(verb: Any, data_help: str, required: bool) -> None:
    verb.add_argument("--teacher", required=True, help="a transformers model: hub id or folder")
    verb.add_argument("--revision", help="of the teacher on the hub")
    verb.add_argument("--dtype", choices=DTYPES, default="auto")
    verb.add_argument("--device", default=None, help="cuda, cpu; a GPU when there is one")
    verb.add_argument("--data", required=required, help=data_help)
    verb.add_argument(
        "--tokenizer",
        help="whose chat template renders the data: the student's, where it differs from the "
        "teacher's (same vocabulary)",
    )


def _build(verbs: Any) -> None:
    verb = verbs.add_parser("build", help="run a teacher over a data set; resumable")
    _teacher(verb, DATA + ", or a folder saved by datasets", True)
    verb.add_argument("--output", required=True, help="the cache's folder")
    verb.add_argument("--top-k", type=int, default=32)
    verb.add_argument("--temperature", type=float, default=1.0)
    verb.add_argument(
        "--selection", choices=("top_k", "top_p", "sampled", "hybrid"), default="top_k"
    )
    verb.add_argument("--top-p", type=float, default=0.98, help="for --selection top_p")
    verb.add_argument("--draws", type=int, default=50, help="for sampled and hybrid")
    verb.add_argument("--codec", choices=("compact", "log8", "float32", "counts"), default=None)
    verb.add_argument(
        "--tail-temperatures",
        type=tail_temperatures,
        default="auto",
        metavar="T,T,...",
        help="where the tail's mass is stored for losses at other temperatures, or 'none' "
        "(default auto: 7 from 1 to 4, about 4 bytes a token; top_k and top_p alone)",
    )
    verb.add_argument(
        "--no-realised",
        action="store_false",
        dest="realised",
        help="leave out the log-probs of the text's own tokens (about a byte a token)",
    )
    verb.add_argument("--batch-tokens", type=int, default=4096)
    verb.add_argument("--shard-tokens", type=int, default=1 << 17)
    verb.add_argument("--limit", type=int, help="use only the first so many sequences")
    verb.add_argument(
        "--max-tokens", type=int, help="drop longer sequences, as `kd traces render` does"
    )
    verb.add_argument("--on-bad-rows", choices=("error", "drop", "mask"), default="error")
    verb.add_argument(
        "--append",
        action="store_true",
        help="add other data to a cache (the same data always continues where it was stopped)",
    )
    add_rendering(verb)
    verb.set_defaults(run=run_build)


def tail_temperatures(text: str) -> tuple[float, ...] | str | None:
    """What ``--tail-temperatures`` says: "auto", "none", or numbers between commas."""
    if text in ("auto", "none"):
        return text if text == "auto" else None
    try:
        return tuple(float(part) for part in text.split(","))
    except ValueError:
        raise argparse.ArgumentTypeError(
            f"must be auto, none or numbers like 1,1.5,2,3,4, got {text!r}"
        ) from None


def run_build(args: argparse.Namespace) -> int:
    from kd.teachers.build import build_cache
    from kd.teachers.data import TrainingData
    from kd.teachers.selection import Selection

    model, tokenizer = load_teacher(args)
    options = {"limit": args.limit, "max_tokens": args.max_tokens, **rendering_options(args)}
    data = TrainingData(args.data, tokenizer, **options)
    if not args.append:
        data.refuse_if_other(args.output)
    cache = build_cache(
        model,
        data,
        args.output,
        tokenizer=tokenizer,
        temperature=args.temperature,
        selection=Selection(args.selection, args.top_k, args.top_p, args.draws),
        codec=args.codec,
        tail_temperatures=args.tail_temperatures,
        realised=args.realised,
        batch_tokens=args.batch_tokens,
        shard_tokens=args.shard_tokens,
        on_bad_rows=args.on_bad_rows,
        source=data.source(),
    )
    if os.environ.get("RANK", "0") == "0":  # every rank has read all of the data
        print(data.summary(), end="")
        print(f"{args.output}: {len(cache):,} sequences, {cache.tokens:,} tokens")
    if not len(cache):
        raise ValueError(
            f"kd cache build: --data must hold rows that can be rendered, got none in {args.data}."
        )
    return 0


def _doctor(verbs: Any) -> None:
    verb = verbs.add_parser("doctor", help="re-score samples: is this what the teacher says?")
    verb.add_argument("cache", help="the cache's folder")
    _teacher(verb, "the training data: is every sequence of it in the cache?", False)
    verb.add_argument("--samples", type=int, default=8, help="sequences to re-score (default 8)")
    verb.set_defaults(run=run_doctor)


def run_doctor(args: argparse.Namespace) -> int:
    from kd.cache import TeacherCache
    from kd.teachers.data import TrainingData
    from kd.teachers.doctor import diagnose
    from kd.traces import as_recorded

    model, tokenizer = load_teacher(args)
    cache = TeacherCache(args.cache, partial=True, duplicates="first")
    found = diagnose(
        cache,
        model,
        tokenizer=tokenizer,
        sequences=TrainingData(args.data, tokenizer, **as_recorded(cache.manifest.rendering))
        if args.data
        else (),
        samples=args.samples,
    )
    print(found.text())
    return 0 if found.healthy else 1


def load_teacher(args: argparse.Namespace) -> tuple[Any, Any]:
    """The teacher and the tokenizer that renders its data (None when there is none)."""
    import torch

    dtype = args.dtype if args.dtype == "auto" else getattr(torch, args.dtype)
    model = load_model(args.teacher, on=args.device, revision=args.revision, dtype=dtype)
    own = _tokenizer(args.teacher, args.revision)
    if args.tokenizer is None:
        return model.eval(), own
    tokenizer = load_tokenizer(args.tokenizer)
    if own is not None:
        _refuse_other_ids(own, tokenizer)
    return model.eval(), tokenizer


def _refuse_other_ids(teacher: Any, student: Any) -> None:
    from kd.vocab import vocabulary_diff

    diff = vocabulary_diff(teacher, student)
    added = [token for _, token, ours in diff.special if ours is None]  # the teacher's own
    if diff.ordinary or diff.probes or len(added) < len(diff.special):
        raise ValueError(
            "kd cache: --tokenizer must have the teacher's vocabulary, and may differ in its chat "
            f"template alone, got\n{diff}\nCapture with the teacher's own and translate the cache "
            "(kd.recipe.translate), as the recipe r1_to_qwen does."
        )


def _tokenizer(name: str, revision: str | None) -> Any:
    """A model's tokenizer; None where a folder has no files of one (transformers makes it up)."""
    folder = Path(name)
    if folder.is_dir() and not any(
        path.name.startswith(("tokenizer", "vocab", "spiece")) or path.suffix == ".tiktoken"
        for path in folder.iterdir()
    ):
        return None
    return load_tokenizer(name, revision=revision)
