"""``kd cache``: build, look into, verify, merge and convert caches; check one with its teacher."""

from __future__ import annotations

import argparse
import json
import os
from typing import Any

from kd.cli.options import add_rendering, rendering_options

DATA = "a file, folder or hub data set of traces, messages, text or input_ids (packs too)"
DTYPES = ("auto", "float32", "bfloat16", "float16")


def add_parser(subparsers: Any) -> None:
    """Add ``kd cache`` with its verbs."""
    parser = subparsers.add_parser(
        "cache", help="build, look into, verify and convert caches of teacher log-probabilities"
    )
    verbs = parser.add_subparsers(title="verbs", metavar="VERB", dest="verb")
    _info(verbs)
    _verify(verbs)
    _merge(verbs)
    _import(verbs)
    _build(verbs)
    _doctor(verbs)


def _info(verbs: Any) -> None:
    verb = verbs.add_parser("info", help="identity, size, bytes/token and probability covered")
    verb.add_argument("cache", help="the cache's folder")
    verb.add_argument("--json", action="store_true", help="print JSON")
    verb.add_argument("--plot", metavar="PNG", help="save a plot of the probability covered")
    verb.add_argument("--sample", type=int, default=200, help="sequences to look at (default 200)")
    verb.set_defaults(run=run_info)


def run_info(args: argparse.Namespace) -> int:
    from kd.cache.info import cache_info

    found = cache_info(args.cache, args.sample)
    print(json.dumps(found.to_dict(), indent=1) if args.json else found.text())
    if args.plot:
        found.plot(args.plot)
        print(f"plot           {args.plot}")
    return 0


def _verify(verbs: Any) -> None:
    verb = verbs.add_parser("verify", help="checksums, and every row of every sequence")
    verb.add_argument("cache", help="the cache's folder")
    verb.add_argument(
        "--repair",
        action="store_true",
        help="take damaged shards out (kept as NAME.bad), so that the capture can be run again",
    )
    verb.set_defaults(run=run_verify)


def run_verify(args: argparse.Namespace) -> int:
    from kd.cache.verify import repair_cache, verify_cache

    verdict = verify_cache(args.cache)
    for problem in verdict.problems:
        print(f"problem: {problem}")
    print(
        f"{args.cache}: {verdict.shards:,} shards, {verdict.sequences:,} sequences, "
        f"{verdict.rows:,} rows: {'sound' if verdict.sound else 'NOT SOUND'}"
    )
    if args.repair and not verdict.sound:
        taken = repair_cache(args.cache, verdict)
        print(
            f"taken out: {', '.join(taken) or 'no shard'}. Run the capture again to fill the gap."
        )
    return 0 if verdict.sound else 1


def _merge(verbs: Any) -> None:
    verb = verbs.add_parser("merge", help="put caches of one identity into one")
    verb.add_argument("sources", nargs="+", help="folders of caches")
    verb.add_argument("--output", required=True, help="folder of the merged cache")
    verb.set_defaults(run=run_merge)


def run_merge(args: argparse.Namespace) -> int:
    from kd.cache.merge import merge_caches

    cache = merge_caches(args.sources, args.output)
    print(f"{args.output}: {len(cache):,} sequences, {cache.tokens:,} tokens")
    return 0


def _import(verbs: Any) -> None:
    verb = verbs.add_parser("import", help="convert another tool's log-probabilities")
    verb.add_argument("source", help="a parquet, arrow or JSONL file, or a folder of them")
    verb.add_argument("--format", required=True, choices=("distillkit", "logprobs", "axolotl"))
    verb.add_argument("--output", required=True, help="folder of the new cache")
    verb.add_argument("--vocab", type=int, required=True, help="live tokens of the teacher")
    verb.add_argument("--teacher", required=True, help="name of the teacher, for the record")
    verb.add_argument("--temperature", type=float, default=1.0)
    verb.add_argument("--codec", default="compact")
    verb.add_argument("--top-k", type=int, default=None, help="most tokens in a row")
    verb.add_argument(
        "--compression", metavar="FILE", help="distillkit: the compressor's YAML or JSON"
    )
    verb.set_defaults(run=run_import)


def run_import(args: argparse.Namespace) -> int:
    from kd.teachers.importers import import_cache

    cache = import_cache(
        args.source,
        args.output,
        layout=args.format,
        live_vocab=args.vocab,
        teacher=args.teacher,
        temperature=args.temperature,
        codec=args.codec,
        top_k=args.top_k,
        compression=args.compression,
    )
    print(f"{args.output}: {len(cache):,} sequences, {cache.tokens:,} tokens")
    return 0


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

    model, tokenizer = _load_teacher(args)
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

    model, tokenizer = _load_teacher(args)
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


def _load_teacher(args: argparse.Namespace) -> tuple[Any, Any]:
    from kd.teachers.identity import load_teacher

    return load_teacher(
        args.teacher,
        revision=args.revision,
        dtype=args.dtype,
        device=args.device,
        tokenizer=args.tokenizer,
    )
