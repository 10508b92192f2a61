"""The launches that the compile-time checks compile: kernel, divergence, dtype, vocabulary.

Each case runs a launcher on meta tensors, so what is compiled is what the launcher would launch.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable

import torch

from kd_kernels import shards
from kd_kernels.dense import dense_losses, head_logits
from kd_kernels.sparse import sparse_losses

VOCABULARIES = (32_000, 128_256, 151_936, 262_144)
DTYPES = {"bf16": torch.bfloat16, "fp16": torch.float16, "fp32": torch.float32}
DIVERGENCES = {
    "forward_kl": {},
    "reverse_kl": {},
    "jsd": {"beta": 0.5},
    "skew_forward_kl": {"alpha": 0.1},
    "skew_reverse_kl": {"alpha": 0.1},
    "skew_reverse_kl_detached": {"alpha": 0.1},
    "total_variation": {},
    "alpha_beta": {"alpha": 0.2, "beta": 0.7},
    "alpha_beta_forward": {"alpha": 0.5},
    "alpha_beta_reverse": {"beta": 0.5},
    "adaptive_kl": {},
}
TWO_PASS = ("forward_kl", "reverse_kl", "none")
ROWS = 4096


@dataclasses.dataclass(frozen=True)
class Case:
    """One launch: how to make it, and the bytes an element costs beside the least."""

    name: str
    launch: Callable[[], object]
    bytes: float  # read and written an element of the row, all passes
    one_read_bytes: float  # the same where the launcher takes the cluster schedule
    least_bytes: float
    read_bytes: float  # read an element in one pass
    kernel: str = ""  # start of the name of the launch to look at; the last one's where empty
    aligned: bool = True
    bounded: bool = True  # whether it must be memory-bound by the counts
    arches: tuple[str, ...] | None = None
    loop_bytes: tuple[float, ...] = ()  # read_bytes of each loop, where they differ
    bulk: int = 64  # bits from which an access outside a loop is one of the row's

    def runs_on(self, arch: str) -> bool:
        return self.arches is None or arch in self.arches


def empty(*shape: int, dtype: torch.dtype) -> torch.Tensor:
    return torch.empty(shape, dtype=dtype, device="meta")


def dense_case(divergence: str, kind: str, vocab: int, live: int | None = None, **options) -> Case:
    """Dense rows, gradient written, on the schedule that the launcher takes."""
    dtype = DTYPES[kind]
    size = dtype.itemsize
    sides = 1 if divergence == "none" else 2
    passes = 2 if divergence in TWO_PASS else 3

    def launch() -> None:
        student, gradient = (empty(ROWS, vocab, dtype=dtype) for _ in range(2))
        weights = empty(ROWS, dtype=torch.float32)
        teacher = None if sides == 1 else empty(ROWS, vocab, dtype=dtype)
        labels = empty(ROWS, dtype=torch.int64) if options.get("ce") else None
        numbers = DIVERGENCES.get(divergence, {}) | options
        dense_losses(
            student, teacher, weights, labels, gradient, divergence, live or vocab, **numbers
        )

    extra = "".join(f" {k}={v:g}" for k, v in options.items())
    name = f"dense {divergence} {kind} {live or vocab}{extra}"
    return Case(
        name,
        launch,
        bytes=passes * sides * size + size,
        one_read_bytes=(sides + 1 + (divergence == "adaptive_kl")) * size,
        least_bytes=sides * size + size,
        read_bytes=sides * size,
        # Hard labels at another temperature add an exponential a pass: 86 to 100 % of the roofline.
        bounded=not loss_is_mixed(options),
    )


def loss_is_mixed(options: dict) -> bool:
    """Whether the hard labels' softmax is not the soft targets'."""
    return options.get("ce", 0) != 0 and options.get("temperature", 1.0) != 1.0


def sparse_case(divergence: str, kind: str, vocab: int, stored: int, **options) -> Case:
    """A sparse teacher, gradient written, on the schedule that the launcher takes."""
    dtype = DTYPES[kind]
    size = dtype.itemsize

    def launch() -> None:
        student, gradient = (empty(ROWS, vocab, dtype=dtype) for _ in range(2))
        ids = empty(ROWS, stored, dtype=torch.int64)
        log_p, log_tail = (empty(ROWS, k, dtype=torch.float32) for k in (stored, 1))
        weights = empty(ROWS, dtype=torch.float32)
        numbers = DIVERGENCES.get(divergence, {}) | options
        targets = (ids, log_p, log_tail)
        sparse_losses(
            student, *targets, weights, weights, None, gradient, divergence, vocab, **numbers
        )

    return Case(
        f"sparse {divergence} {kind} {vocab} k={stored}",
        launch,
        bytes=3 * size,
        one_read_bytes=2 * size + 0.25,  # an eighth of a byte of marks, zeroed and read
        least_bytes=2 * size,
        read_bytes=size,
        kernel="sparse_rows",
        bulk=128,  # marks are 64 bits a thread
    )


def head_case(kind: str, vocab: int) -> Case:
    """The threshold of adaptive_kl's head."""
    dtype = DTYPES[kind]
    size = dtype.itemsize

    def launch() -> None:
        head_logits(empty(ROWS, vocab, dtype=dtype), empty(ROWS, dtype=torch.float32), vocab)

    return Case(
        f"head threshold {kind} {vocab}",
        launch,
        bytes=2 * size,
        one_read_bytes=size,
        least_bytes=size,
        read_bytes=size,
        bounded=False,
    )


def shard_case(part: str, divergence: str, kind: str, live: int) -> Case:
    """One kernel of a vocabulary shard: "statistics", "sums", "gradient", or "tail" statistics."""
    dtype = DTYPES[kind]
    size, sides = dtype.itemsize, 1 if part == "tail" else 2
    algebra = {"divergence": divergence, "vocab": live} | DIVERGENCES.get(divergence, {})

    def launch() -> None:
        student, teacher = (empty(ROWS, live, dtype=dtype) for _ in range(2))
        weights, numbers = (empty(*s, dtype=torch.float32) for s in ((ROWS,), (ROWS, 7)))
        if part == "statistics":
            gap = {"forward_kl": "forward", "reverse_kl": "reverse"}.get(divergence, "neither")
            shards.shard_statistics(student, teacher, weights, vocab=live, gap=gap)
        elif part == "tail":
            ids = empty(ROWS, 64, dtype=torch.int64)
            shards.shard_statistics(student, None, weights, vocab=live, ids=ids)
        elif part == "sums":
            shards.shard_sums(student, teacher, numbers, weights, **algebra)
        else:
            gradient = empty(ROWS, live, dtype=dtype)
            shards.shard_gradient_(gradient, student, teacher, numbers, weights, **algebra)

    moved = sides * size + (size if part == "gradient" else 0)
    return Case(
        f"shard {part} {divergence} {kind} {live}",
        launch,
        bytes=moved,
        one_read_bytes=moved,
        least_bytes=moved,
        read_bytes=sides * size,
        bounded=part != "tail",  # 2 bytes: the histogram is what it costs
    )


def shard_cases() -> list[Case]:
    """Eighths of two vocabularies, one of whole tiles and one ragged."""
    parts = [("statistics", d) for d in ("forward_kl", "reverse_kl", "jsd")]
    parts += [("sums", d) for d in ("jsd", "skew_reverse_kl")]
    parts += [("gradient", d) for d in ("forward_kl", "reverse_kl", "jsd")]
    parts.append(("tail", "forward_kl"))
    sizes = [(live, kind) for live in (16_384, 18_992) for kind in ("bf16", "fp32")]
    return [shard_case(*part, kind, live) for live, kind in sizes for part in parts]


def representative() -> list[Case]:
    """A minute's worth: every kernel everywhere, every divergence and odd shape on sm_90."""
    everywhere = [
        *(dense_case(d, "bf16", 128_256) for d in ("forward_kl", "jsd", "adaptive_kl")),
        sparse_case("forward_kl", "bf16", 128_256, 64),
        head_case("bf16", 128_256),
        shard_case("statistics", "reverse_kl", "bf16", 18_992),
        shard_case("gradient", "jsd", "bf16", 18_992),
        dense_case("none", "bf16", 151_936, live=151_665, ce=1.0),
    ]
    named = {case.name for case in everywhere}
    hopper = [
        *(dense_case(d, "bf16", 128_256) for d in DIVERGENCES),
        sparse_case("jsd", "bf16", 128_256, 64),
        sparse_case("forward_kl_raw", "bf16", 151_936, 1024),
        dense_case("forward_kl", "bf16", 262_144),
        *(dense_case(d, "bf16", 32_000) for d in ("forward_kl", "jsd")),
        dense_case("skew_reverse_kl", "bf16", 151_936, live=151_665),
        dense_case("jsd", "bf16", 151_936, live=151_665, ce=1.0, temperature=2.0),
        dense_case("jsd", "fp32", 151_936, live=151_665, ce=1.0, temperature=2.0),
    ]
    alone = (dataclasses.replace(c, arches=("sm_90",)) for c in hopper if c.name not in named)
    return [*everywhere, *alone]


def cases(subset: bool) -> list[Case]:
    """Every variant, or the representative ones that the test suite checks."""
    if subset:
        return representative()
    grid = [(d, k, v) for v in VOCABULARIES for k in DTYPES for d in DIVERGENCES]
    found = [dense_case(*point) for point in grid]
    found += [sparse_case(d, k, v, 64) for d, k, v in grid]
    found += [sparse_case("forward_kl", "bf16", 151_936, k) for k in (1, 8, 32, 256, 1024)]
    found += [head_case(k, v) for v in VOCABULARIES for k in DTYPES]
    found += [dense_case("none", k, 151_936, live=151_665, ce=1.0) for k in DTYPES]
    found += shard_cases()
    hard = dict(live=151_665, ce=1.0, temperature=2.0)
    return found + [dense_case(d, k, 151_936, **hard) for d in DIVERGENCES for k in DTYPES]
