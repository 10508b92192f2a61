"""What is measured: named models' shapes, and the least work that each suite must do."""

from __future__ import annotations

import dataclasses

from kd_bench.models import matmul_parameters


@dataclasses.dataclass(frozen=True)
class Shape:
    """Sizes of one problem; the name says whose they are."""

    name: str
    tokens: int
    vocab: int
    student_hidden: int
    teacher_hidden: int
    top_k: int = 64
    layers: int = 0  # of the models, where the suite has some
    length: int = 0  # tokens of a sequence, where the suite has some

    def scaled(self, **sizes: int) -> Shape:
        """The same shape with some sizes changed and named."""
        letters = {"tokens": "N", "vocab": "V", "top_k": "K"}
        changed = ",".join(f"{letters.get(key, key)}={value}" for key, value in sizes.items())
        return dataclasses.replace(self, name=f"{self.name}:{changed}", **sizes)


QWEN_05B_15B = Shape("qwen2.5-0.5b<-1.5b", 512, 151_936, 896, 1536)
NARROW_HEADS = Shape("narrow-heads", 512, 151_936, 128, 256)
GPU_SHAPES = {
    shape.name: shape
    for shape in (
        dataclasses.replace(QWEN_05B_15B, tokens=8192),
        Shape("qwen2.5-1.5b<-r1-distill-7b", 8192, 151_936, 1536, 3584),
        Shape("qwen2.5-7b<-r1-distill-32b", 8192, 152_064, 3584, 5120),
        Shape("llama3-1b<-8b", 8192, 128_256, 2048, 4096),
        Shape("llama3-8b<-70b", 8192, 128_256, 4096, 8192),
        Shape("gemma2-2b<-9b", 4096, 256_000, 2304, 3584),
        Shape("qwen2.5-0.5b<-1.5b-1k", 1024, 151_936, 896, 1536),
        Shape("qwen2.5-0.5b<-1.5b-64k", 65_536, 151_936, 896, 1536),
    )
}
SMOKE_SHAPES = {
    "smoke": Shape("smoke", 24, 1000, 16, 24, 8),
    "smoke-models": Shape("smoke", 64, 1000, 32, 64, 32, layers=1, length=32),
}
CACHE = Shape("qwen2.5-ids,k=64", 8192, 151_936, 0, 0, 64, length=512)
CAPTURED = Shape("qwen2-2x256", 1024, 151_936, 0, 256, 32, layers=2, length=128)
TRAINED = Shape("qwen2-4x256<-4x512", 128, 151_936, 256, 512, 32, layers=4, length=64)
GPU_CAPTURED = Shape("qwen2-8x1536", 16_384, 151_936, 0, 1536, 64, layers=8, length=512)
GPU_TRAINED = Shape("qwen2-8x896<-8x1536", 4096, 151_936, 896, 1536, 32, layers=8, length=512)
RECIPE = Shape("quickstart-smoke", 1, 18, 64, 128, 8)

SUITES = {
    "linear": "fused linear: student and teacher as hidden states and lm_head, forward + backward",
    "linear-sparse": "fused linear against a stored top-k teacher, forward + backward",
    "dense": "both sides as logits, forward + backward",
    "sparse": "student logits against a stored top-k teacher, forward + backward",
    "cross-entropy": "fused linear cross-entropy on hard labels, forward + backward",
    "selection": "top-k log-probabilities of a teacher's logits, as a cache stores them",
}
PIPELINE_SUITES = {
    "cache-write": "a teacher's targets written into a new cache",
    "cache-read": "training batches read from a cache, shuffled",
    "capture": "targets of a local model, whole: forward, selection, encoding, writing",
    "training": "a step of a trainer: forward, backward, AdamW (sft, or forward_kl with a teacher)",
    "recipe": "the quickstart's smoke preset from traces to report",
}
ALL_SUITES = {**SUITES, **PIPELINE_SUITES}


def floor_flops(suite: str, shape: Shape) -> int:
    """Multiply-adds (times two) that no implementation can avoid: each matmul once."""
    if suite in PIPELINE_SUITES:
        return _model_flops(suite, shape)
    elements = shape.tokens * shape.vocab
    student = 6 * elements * shape.student_hidden  # logits, dH, dW
    if suite == "linear":
        return student + 2 * elements * shape.teacher_hidden
    return student if suite in ("linear-sparse", "cross-entropy") else 0


def _model_flops(suite: str, shape: Shape) -> int:
    """Matmuls of the weights alone: forward of a captured teacher, three passes of a student."""
    passes = {"capture": (0, 2), "training": (6, 0)}.get(suite, (0, 0))
    sizes = (shape.student_hidden, shape.teacher_hidden)
    weights = [matmul_parameters(hidden, shape.layers, shape.vocab) for hidden in sizes]
    return shape.tokens * (passes[0] * weights[0] + passes[1] * weights[1])


def floor_bytes(suite: str, shape: Shape, itemsize: int) -> int:
    """Bytes that must cross memory once: inputs read, results written."""
    elements = shape.tokens * shape.vocab
    sparse = shape.tokens * shape.top_k * 12  # int64 ids, float32 log-probs
    heads = shape.vocab * shape.student_hidden + shape.tokens * shape.student_hidden
    teacher = (shape.vocab + shape.tokens) * shape.teacher_hidden
    return {
        "dense": 3 * elements * itemsize,
        "sparse": 2 * elements * itemsize + sparse,
        "selection": elements * itemsize + sparse,
        "linear": (2 * heads + teacher) * itemsize,
        "linear-sparse": 2 * heads * itemsize + sparse,
        "cross-entropy": 2 * heads * itemsize + 8 * shape.tokens,
        "cache-write": sparse,
        "cache-read": sparse,
    }.get(suite, 0)
