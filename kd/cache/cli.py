"""``kd cache``: the verbs that need no model: info, verify, merge, import."""

from __future__ import annotations

import argparse
import json
from pathlib import Path
from typing import Any


def add_parser(subparsers: Any) -> Any:
    """Register ``kd cache`` with its verbs; returns the verbs' subparsers for others to add to."""
    parser = subparsers.add_parser(
        "cache", help="build, look into, verify and convert caches of teacher log-probabilities"
    )
    verbs = parser.add_subparsers(title="verbs", metavar="VERB", dest="verb")
    _info(verbs)
    _verify(verbs)
    _merge(verbs)
    _import(verbs)
    return verbs


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
    from kd.cache.importers import import_cache

    compression = None
    if args.compression:
        text = Path(args.compression).read_text()
        if args.compression.endswith((".yaml", ".yml")):
            import yaml

            compression = yaml.safe_load(text)
        else:
            compression = json.loads(text)
        if not isinstance(compression, dict):
            raise ValueError(
                f"kd cache import: {args.compression} must hold a mapping, got {compression!r:.80}."
            )
    cache = import_cache(
        args.source,
        args.output,
        layout=args.format,
        live_vocab=args.vocab,
        teacher=args.teacher,
        temperature=args.temperature,
        codec=args.codec,
        top_k=args.top_k,
        compression=compression,
    )
    print(f"{args.output}: {len(cache):,} sequences, {cache.tokens:,} tokens")
    return 0
