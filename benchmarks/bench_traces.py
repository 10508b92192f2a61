"""Throughput of the trace pipeline: load, lint, dedupe, decontaminate, mix, render, pack.

    python benchmarks/bench_traces.py --records 100000

Synthetic bulk over real shapes; prints records a second by stage, the total, and peak memory, as
Markdown (`--output FILE` also writes it). One thread.
"""

from __future__ import annotations

import argparse
import json
import random
import resource
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path

from kd.traces import (
    CHATML,
    DropCounts,
    Evaluations,
    JsonlTraces,
    Lint,
    OneLanguage,
    Renderer,
    Source,
    decontaminate,
    exact_duplicates,
    filter_stream,
    load,
    mix,
    near_duplicates,
    pack,
    render_stream,
    write_traces,
)
from kd_bench import machine, tables

CAPACITY = 16_384


def tokenizer():
    """A byte-level BPE trained on the words below: about a token a word, as real ones give."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
    from transformers import PreTrainedTokenizerFast

    backend = Tokenizer(models.BPE())
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    backend.decoder = decoders.ByteLevel()
    special = ["<|endoftext|>", "<|im_start|>", "<|im_end|>"]
    trainer = trainers.BpeTrainer(
        vocab_size=4000,
        special_tokens=special,
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
    )
    backend.train_from_iterator([" ".join(WORDS)] * 20, trainer)
    return PreTrainedTokenizerFast(
        tokenizer_object=backend, eos_token="<|im_end|>", pad_token="<|endoftext|>"
    )


_PARTS = "ba de fi go hu ja ke li mo nu pra stu cle dri".split()
WORDS = [a + b + c for a in _PARTS for b in _PARTS for c in ("", "n", "rs", "t")]


def write_bulk(path: Path, count: int, seed: int = 0) -> None:
    """Records of three public shapes; 5 % near and 5 % exact duplicates, 1 % malformed."""
    rng = random.Random(seed)
    last = ("", "", 0)
    with path.open("w") as file:
        for i in range(count):
            draw = rng.random()
            length = min(4000, max(40, int(rng.lognormvariate(5.6, 0.8))))
            think = " ".join(rng.choices(WORDS, k=length))
            prompt = " ".join(rng.choices(WORDS, k=30))
            if draw < 0.05 and last[0]:
                prompt, think, number = last
            elif draw < 0.10 and last[0]:
                prompt, think, number = last[0], last[1] + " and so on", i
            else:
                number = i
            last = prompt, think, number
            text = f"<think>\n{think}\n</think>\n\nIt is {number}."
            if draw > 0.99:
                text = text.replace("</think>", "")
            turns = (("user", prompt), ("assistant", text))
            row = [
                {"messages": [{"role": r, "content": t} for r, t in turns], "source": "m"},
                {"conversations": [{"from": r, "value": t} for r, t in turns]},
                {"question": prompt, "reasoning_content": think, "content": f"It is {number}."},
            ][i % 3]
            file.write(json.dumps(row) + "\n")


def run(count: int, folder: Path) -> Iterator[str]:
    """The table of every stage's throughput on ``count`` records."""
    raw, clean = folder / "raw.jsonl", folder / "clean.jsonl"
    write_bulk(raw, count)
    rng = random.Random(1)
    questions = [" ".join(rng.choices(WORDS, k=40)) for _ in range(2000)]
    evaluations = Evaluations().add("bench", questions)
    report = DropCounts()
    names = ("load", "filter", "dedupe exact", "dedupe near", "decontaminate", "mix", "render")
    for name in names:
        report.stage(name)
    started = time.perf_counter()
    stream = filter_stream(load(raw, report=report), [Lint(), OneLanguage()], report=report)
    stream = near_duplicates(exact_duplicates(stream, report=report), report=report)
    write_traces(clean, decontaminate(stream, evaluations, report=report))
    middle = time.perf_counter()
    mixed = mix([Source("clean", JsonlTraces(clean))], report=report)
    renderer = Renderer(tokenizer(), chat_template=CHATML)
    stream2 = render_stream(mixed, renderer, report=report, max_tokens=CAPACITY)
    used = rows = 0
    for made in pack((ids for _, ids in stream2), CAPACITY, window=4000):
        used, rows = used + len(made.input_ids), rows + 1
    ended = time.perf_counter()
    total = ended - started
    rows_of_stages = [
        [name, f"{stage.seen:,}", f"{stage.kept:,}",
         f"{stage.seen / max(stage.seconds, 1e-9):,.0f}", f"{stage.seconds:.1f}"]
        for name, stage in report.stages.items()
    ]  # fmt: skip
    counted = sum(stage.seconds for stage in report.stages.values())
    rows_of_stages += [
        ["writing in the middle, packing", "", "", "", f"{total - counted:.1f}"],
        ["**all**", f"{count:,}", f"{report.kept:,}", f"{count / total:,.0f}", f"{total:.1f}"],
    ]
    yield f"{machine.line_of(machine.machine_info('cpu'))}\n"
    yield tables.markdown(["stage", "in", "kept", "records/s", "seconds"], rows_of_stages)
    yield (
        f"\n{used:,} tokens; rows of {CAPACITY:,} are {100 * used / (rows * CAPACITY):.1f} % full; "
        f"load to decontaminate {middle - started:.1f} s; peak memory "
        f"{resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20:.2f} GiB."
    )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--records", type=int, default=100_000)
    parser.add_argument("--output", type=Path, help="also write the Markdown there")
    args = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        tables.show(run(args.records, Path(folder)), args.output)


if __name__ == "__main__":
    main()
