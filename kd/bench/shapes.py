"""What is measured: named models' shapes, and the least work that each suite must do."""

from __future__ import annotations

import dataclasses


@dataclasses.dataclass(frozen=True)
class Shape:
    """Sizes of one problem; the name says whose they are."""

    name: str
    tokens: int
    vocab: int
    student_hidden: int
    teacher_hidden: int
    top_k: int = 64

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
SMOKE_SHAPES = {"smoke": Shape("smoke", 24, 1000, 16, 24, 8)}

SUITES = {
    "linear": "fused linear: student and teacher as hidden states and lm_head, forward + backward",
    "linear-sparse": "fused linear against a stored top-k teacher, forward + backward",
    "dense": "both sides as logits, forward + backward",
    "sparse": "student logits against a stored top-k teacher, forward + backward",
    "cross-entropy": "fused linear cross-entropy on hard labels, forward + backward",
    "selection": "top-k log-probabilities of a teacher's logits, as a cache stores them",
}


def floor_flops(suite: str, shape: Shape) -> int:
    """Multiply-adds (times two) that no implementation can avoid: each matmul once."""
    elements = shape.tokens * shape.vocab
    student = 6 * elements * shape.student_hidden  # logits, dH, dW
    if suite == "linear":
        return student + 2 * elements * shape.teacher_hidden
    return student if suite in ("linear-sparse", "cross-entropy") else 0


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
    }[suite]
