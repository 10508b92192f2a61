"""Every loss, forward and backward, beside PyTorch, torch.compile and the peers that are installed.

pytest benchmarks/bench_losses.py --benchmark-enable -k "linear and bfloat16" --tokens 512
"""

from __future__ import annotations

import contextlib
import dataclasses
import subprocess
import sys
from collections.abc import Iterator
from typing import Any

from kd_bench import losses, peers
from kd_bench.suite import NARROW_HEADS, QWEN, SMOKE, Implementation, Problem, Shape, Suite

CPU_TOKENS = 64  # a whole run takes minutes


def lower_flops(shape: Shape, teacher: bool) -> int:
    """Multiply-adds (times two) that nobody avoids: the student's logits, dH, dW; the teacher's."""
    widths = 3 * shape.student_hidden + (shape.teacher_hidden if teacher else 0)
    return 2 * shape.tokens * shape.vocab * widths


def lower_bytes(shape: Shape, itemsize: int, logits: int, heads: int, stored: int) -> int:
    """Bytes that cross memory once: [N, V] tensors, lm_heads with hidden states, stored rows."""
    sides = (2 * shape.student_hidden, shape.teacher_hidden)[:heads]
    read = logits * shape.tokens * shape.vocab + (shape.vocab + shape.tokens) * sum(sides)
    return read * itemsize + stored * shape.tokens * shape.top_k


def input_bytes(problem: Problem) -> int:
    s, suite = problem.shape, problem.suite.name
    both = {"dense": 2, "dense-loaded": 2, "sparse": 1, "selection": 1}.get(suite, 0)
    widths = (suite in losses.FUSED) * s.student_hidden + (suite == "linear") * s.teacher_hidden
    return (both * s.tokens * s.vocab + (s.vocab + s.tokens) * widths) * problem.itemsize


def memory_needed(problem: Problem, implementation: Implementation) -> int:
    """Rough peak of one implementation in bytes: inputs, gradients, [N, V] temporaries."""
    s, wide = problem.shape, implementation.copies * problem.shape.tokens * problem.shape.vocab * 4
    gradients = 4 * s.vocab * s.student_hidden if problem.suite.name in losses.FUSED else 0
    if gradients and (implementation.bare or implementation.name == "kd"):
        wide = min(wide, 512 << 20)  # they work in chunks
    return int(input_bytes(problem) + gradients + wide)


@contextlib.contextmanager
def competing_process() -> Iterator[None]:
    """One process that takes all of a core that it can get."""
    process = subprocess.Popen([sys.executable, "-c", "while True: pass"])
    try:
        yield
    finally:
        process.kill()
        process.wait()


KD = Implementation("kd", losses.build_kd, copies=1.2)
IN_PLACE = Implementation("kd in place", losses.build_kd_in_place, copies=1.2)
BARE = Implementation(
    "bare GEMM", losses.build_bare_gemm, note="lower bound: each GEMM once, one buffer", bare=True
)
PYTORCH = Implementation("pytorch", losses.build_pytorch, copies=7)
COMPILED = Implementation("pytorch compiled", losses.build_pytorch_compiled, copies=7)


def loss_suite(name: str, implementations: Any, **options: Any) -> Suite:
    shared = {"inputs": losses.make_inputs, "few": losses.first_rows, "truth": losses.exact_answer}
    return Suite(
        name=name,
        implementations=(*implementations, *peers.PEERS.get(name, ())),
        memory=memory_needed,
        **{**shared, **options},
    )


LINEAR = loss_suite(
    "linear",
    (KD, BARE, PYTORCH, COMPILED),
    flops=lambda s: lower_flops(s, teacher=True),
    bytes=lambda s, size: lower_bytes(s, size, logits=0, heads=2, stored=0),
    any_divergence=True,
)
LINEAR_SPARSE = loss_suite(
    "linear-sparse",
    (KD, BARE, PYTORCH, COMPILED),
    flops=lambda s: lower_flops(s, teacher=False),
    bytes=lambda s, size: lower_bytes(s, size, logits=0, heads=1, stored=12),
    any_divergence=True,
)
CROSS_ENTROPY = loss_suite(
    "cross-entropy",
    (KD, BARE, PYTORCH, COMPILED),
    flops=lambda s: lower_flops(s, teacher=False),
    bytes=lambda s, size: lower_bytes(s, size, logits=0, heads=1, stored=0) + 8 * s.tokens,
)
DENSE = loss_suite(
    "dense",
    (KD, IN_PLACE, PYTORCH, COMPILED),
    bytes=lambda s, size: lower_bytes(s, size, logits=3, heads=0, stored=0),
    any_divergence=True,
)
LOADED = dataclasses.replace(DENSE, name="dense-loaded", surroundings=competing_process)
SPARSE = loss_suite(
    "sparse",
    (KD, IN_PLACE, PYTORCH, COMPILED),
    bytes=lambda s, size: lower_bytes(s, size, logits=2, heads=0, stored=12),
    any_divergence=True,
)
SELECTION = loss_suite(
    "selection",
    (
        Implementation("kd", losses.build_selection),
        Implementation("pytorch", losses.build_plain_selection, copies=3),
    ),
    truth=losses.exact_selection,
    bytes=lambda s, size: lower_bytes(s, size, logits=1, heads=0, stored=12),
    errors=losses.selection_errors,
    error_name="error of log p",
)
SUITES = (LINEAR, LINEAR_SPARSE, CROSS_ENTROPY, DENSE, LOADED, SPARSE, SELECTION)
GPU_SHAPES = (
    dataclasses.replace(QWEN, tokens=8192),
    Shape("qwen2.5-1.5b<-r1-distill-7b", 8192, 151_936, 1536, 3584),
    Shape("qwen2.5-7b<-r1-distill-32b", 8192, 152_064, 3584, 5120),
    Shape("llama3-1b<-8b", 8192, 128_256, 2048, 4096),
    Shape("llama3-8b<-70b", 8192, 128_256, 4096, 8192),
    Shape("gemma2-2b<-9b", 4096, 256_000, 2304, 3584),
    Shape("qwen2.5-0.5b<-1.5b-1k", 1024, 151_936, 896, 1536),
    Shape("qwen2.5-0.5b<-1.5b-64k", 65_536, 151_936, 896, 1536),
)


def scaling(base: Shape, dtype: str) -> list[Problem]:
    """One size at a time: V and N for logits on both sides, K for a cache."""
    base = dataclasses.replace(base, name="scaling")
    sizes = [{"vocab": v} for v in (32_000, 64_000, 128_256, 256_000)]
    made = [Problem(DENSE, base.scaled(**size), dtype) for size in sizes]
    for tokens in (base.tokens // 4, base.tokens // 2, base.tokens):
        made.append(Problem(LINEAR, base.scaled(tokens=tokens), dtype))
    return made + [Problem(SPARSE, base.scaled(top_k=k), dtype) for k in (8, 64, 512)]


def problems(device: str, tokens: int | None, smoke: bool) -> list[Problem]:
    """What a run measures, the most telling first: fewer tokens and models on a CPU."""
    if smoke:
        return [Problem(suite, SMOKE) for suite in SUITES]
    if device == "cpu":
        n = tokens or CPU_TOKENS
        qwen, narrow = (s if n == s.tokens else s.scaled(tokens=n) for s in (QWEN, NARROW_HEADS))
        made = [Problem(LINEAR, qwen), Problem(LINEAR, qwen, "bfloat16"), Problem(LINEAR, narrow)]
        made += [Problem(suite, qwen) for suite in (DENSE, LOADED, SPARSE, SELECTION)]
        made += scaling(NARROW_HEADS.scaled(tokens=2 * n), "float32")
        made += [Problem(LINEAR_SPARSE, narrow), Problem(CROSS_ENTROPY, narrow)]
        return made + [
            Problem(suite, shape, "float32", "jsd(0.5)")
            for suite, shape in ((DENSE, qwen), (LINEAR, narrow))
        ]
    shapes = [s if tokens is None else s.scaled(tokens=tokens) for s in GPU_SHAPES]
    logits = shapes[0].scaled(tokens=2048)
    made = [Problem(LINEAR, shape, "bfloat16") for shape in shapes]
    for suite in (LINEAR_SPARSE, CROSS_ENTROPY):
        made += [Problem(suite, shape, "bfloat16") for shape in shapes[:3]]
    for divergence in ("reverse_kl", "jsd(0.5)"):
        made += [Problem(s, shape, "bfloat16", divergence)
                 for s, shape in ((LINEAR, shapes[0]), (DENSE, logits))]  # fmt: skip
    made += [Problem(suite, logits, "bfloat16") for suite in (DENSE, SPARSE, SELECTION)]
    made.append(Problem(DENSE, logits, "float32"))
    return made + scaling(NARROW_HEADS.scaled(tokens=2048), "bfloat16")


def test_losses(row, measure):
    measure(row)
