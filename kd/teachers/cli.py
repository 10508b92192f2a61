"""``kd cache``: the verbs of ``kd.cache.cli``, and build and doctor, which need the teacher."""

from __future__ import annotations

import argparse
import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from kd.cache import cli as cache_cli
from kd.models import load_model, load_tokenizer

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


def _build(verbs: Any) -> None:
    verb = verbs.add_parser("build", help="run a teacher over a data set; resumable")
    _teacher(verb, "JSONL with input_ids, text or messages, or a saved datasets folder", True)
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
    verb.add_argument("--batch-tokens", type=int, default=4096)
    verb.add_argument("--shard-tokens", type=int, default=1 << 17)
    verb.add_argument("--limit", type=int, help="use only the first so many sequences")
    verb.add_argument("--on-bad-rows", choices=("error", "drop", "mask"), default="error")
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
    from kd.teachers.selection import Selection

    model, tokenizer = load_teacher(args)
    cache = build_cache(
        model,
        read_sequences(args.data, tokenizer),
        args.output,
        tokenizer=tokenizer,
        temperature=args.temperature,
        selection=Selection(args.selection, args.top_k, args.top_p, args.draws),
        codec=args.codec,
        tail_temperatures=args.tail_temperatures,
        batch_tokens=args.batch_tokens,
        shard_tokens=args.shard_tokens,
        limit=args.limit,
        on_bad_rows=args.on_bad_rows,
    )
    print(f"{args.output}: {len(cache):,} sequences, {cache.tokens:,} tokens")
    return 0


def _doctor(verbs: Any) -> None:
    verb = verbs.add_parser("doctor", help="re-score samples: is this what the teacher says?")
    verb.add_argument("cache", help="the cache's folder")
    _teacher(verb, "the training data: is every sequence of it in the cache?", False)
    verb.add_argument("--samples", type=int, default=8, help="sequences to re-score (default 8)")
    verb.set_defaults(run=run_doctor)


def run_doctor(args: argparse.Namespace) -> int:
    from kd.cache import TeacherCache
    from kd.teachers.doctor import diagnose

    model, tokenizer = load_teacher(args)
    found = diagnose(
        TeacherCache(args.cache, partial=True, duplicates="first"),
        model,
        tokenizer=tokenizer,
        sequences=read_sequences(args.data, tokenizer) if args.data else (),
        samples=args.samples,
    )
    print(found.text())
    return 0 if found.healthy else 1


def load_teacher(args: argparse.Namespace) -> tuple[Any, Any]:
    """The teacher and its tokenizer (None when it has none)."""
    import torch

    dtype = args.dtype if args.dtype == "auto" else getattr(torch, args.dtype)
    model = load_model(args.teacher, on=args.device, revision=args.revision, dtype=dtype)
    return model.eval(), _tokenizer(args.teacher, args.revision)


def _tokenizer(name: str, revision: str | None) -> Any:
    """A model's tokenizer; None where a folder has no files of one (transformers makes it up)."""
    folder = Path(name)
    if folder.is_dir() and not any(
        path.name.startswith(("tokenizer", "vocab", "spiece")) or path.suffix == ".tiktoken"
        for path in folder.iterdir()
    ):
        return None
    return load_tokenizer(name, revision=revision)


def read_sequences(path: str, tokenizer: Any) -> Iterator[Any]:
    """Token ids of every row of a data set.

    Args:
        path: a JSONL file, or a folder saved by ``datasets``; rows have ``input_ids``, ``text``
            or ``messages``.
        tokenizer: for text and messages.
    """
    for number, row in enumerate(_rows(path)):
        if row.get("input_ids") is not None:
            yield row["input_ids"]
            continue
        if tokenizer is None:
            raise ValueError(
                f"kd cache: row {number} of {path} must have input_ids, got {sorted(row)}. "
                "The teacher has no tokenizer to make them."
            )
        if isinstance(row.get("messages"), list):
            found = tokenizer.apply_chat_template(row["messages"], return_dict=True)
            yield found["input_ids"]
        elif isinstance(row.get("text"), str):
            yield tokenizer(row["text"])["input_ids"]
        else:
            raise ValueError(
                f"kd cache: row {number} of {path} must have input_ids, text or messages, got "
                f"{sorted(row)}."
            )


def _rows(path: str) -> Iterator[dict[str, Any]]:
    if Path(path).is_dir():
        from datasets import load_from_disk

        yield from load_from_disk(path)
        return
    with open(path, encoding="utf-8") as file:
        for number, line in enumerate(file, 1):
            if line.strip():
                try:
                    yield json.loads(line)
                except ValueError as error:
                    raise ValueError(
                        f"kd cache: line {number} of {path} must be JSON, got {error}."
                    ) from None
