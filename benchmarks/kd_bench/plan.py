"""Which groups a run measures: the suites at named shapes, and the scaling series."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence

from kd_bench.runner import Group
from kd_bench.shapes import (
    ALL_SUITES,
    CACHE,
    CAPTURED,
    GPU_CAPTURED,
    GPU_SHAPES,
    GPU_TRAINED,
    NARROW_HEADS,
    PIPELINE_SUITES,
    QWEN_05B_15B,
    RECIPE,
    SMOKE_SHAPES,
    SUITES,
    TRAINED,
    Shape,
)

CPU_TOKENS = 64


def plan(
    device: str,
    *,
    smoke: bool = False,
    tokens: int | None = None,
    suites: Sequence[str] | None = None,
    shapes: Sequence[str] | None = None,
    dtypes: Sequence[str] | None = None,
    divergences: Sequence[str] | None = None,
) -> list[Group]:
    """The groups of one run, the most telling first.

    Args:
        device: "cpu" or "cuda": a card gets more tokens and more models.
        smoke: every suite at a tiny shape instead.
        tokens: of every shape; on a CPU 64, so that a whole run takes minutes.
        suites, shapes, dtypes, divergences: keep these alone; a shape is known by its beginning,
            a divergence that is not planned is added.
    Raises:
        ValueError: nothing is left, or a suite does not exist.
    """
    for suite in suites or ():
        if suite not in ALL_SUITES:
            names = ", ".join(ALL_SUITES)
            raise ValueError(f"bench: --only must be one of {names}, got {suite!r}.")
    if smoke:
        groups = [Group(suite, SMOKE_SHAPES["smoke"], "float32") for suite in SUITES]
        models = SMOKE_SHAPES["smoke-models"]
        groups += _pipelines(models, models, models, models, "float32")
    else:
        groups = _cpu(tokens or CPU_TOKENS) if device == "cpu" else _gpu(tokens)
    if divergences:
        groups = _with_divergences(groups, divergences)
    kept = [
        group
        for group in groups
        if (not suites or group.suite in suites)
        and (not shapes or any(group.shape.name.startswith(name) for name in shapes))
        and (not dtypes or group.dtype in dtypes)
    ]
    if not kept:
        raise ValueError(
            "bench: the options must leave something to measure, got nothing. "
            "See python benchmarks/run.py --list."
        )
    return kept


def _with_divergences(groups: list[Group], divergences: Sequence[str]) -> list[Group]:
    fixed = ("cross-entropy", "selection", *PIPELINE_SUITES)
    made: dict[Group, None] = {}  # in order, each once
    for group in groups:
        kept = (group.divergence,) if group.suite in fixed else divergences
        made |= {dataclasses.replace(group, divergence=name): None for name in kept}
    return list(made)


def _pipelines(
    cache: Shape, captured: Shape, trained: Shape, recipe: Shape, dtype: str
) -> list[Group]:
    """Cache, capture, training step and recipe, at the shapes of a device."""
    return [
        Group("cache-write", cache, "float32"),
        Group("cache-read", cache, "float32"),
        Group("capture", captured, dtype),
        Group("training", trained, dtype, "sft"),
        Group("training", trained, dtype, "forward_kl"),
        Group("recipe", recipe, "float32"),
    ]


def _cpu(tokens: int) -> list[Group]:
    def at(shape: Shape) -> Shape:
        return shape if tokens == shape.tokens else shape.scaled(tokens=tokens)

    qwen, narrow = at(QWEN_05B_15B), at(NARROW_HEADS)
    return [
        Group("linear", qwen, "float32"),
        Group("linear", qwen, "bfloat16"),
        Group("linear", narrow, "float32"),
        Group("dense", qwen, "float32"),
        Group("sparse", qwen, "float32"),
        Group("selection", qwen, "float32"),
        *_pipelines(CACHE, CAPTURED, TRAINED, RECIPE, "float32"),
        *scaling_series(NARROW_HEADS.scaled(tokens=2 * tokens), "float32"),
        Group("linear-sparse", narrow, "float32"),
        Group("cross-entropy", narrow, "float32"),
        Group("dense", qwen, "float32", "jsd(0.5)"),
        Group("linear", narrow, "float32", "jsd(0.5)"),
    ]


def _gpu(tokens: int | None) -> list[Group]:
    shapes = [s if tokens is None else s.scaled(tokens=tokens) for s in GPU_SHAPES.values()]
    first = shapes[0]
    groups = [Group("linear", shape, "bfloat16") for shape in shapes]
    for suite in ("linear-sparse", "cross-entropy"):
        groups += [Group(suite, shape, "bfloat16") for shape in shapes[:3]]
    groups += [Group("linear", first, "bfloat16", d) for d in ("reverse_kl", "jsd(0.5)")]
    logits = first.scaled(tokens=2048)
    for divergence in ("forward_kl", "reverse_kl", "jsd(0.5)"):
        groups.append(Group("dense", logits, "bfloat16", divergence))
    groups += [Group("dense", logits, "float32"), Group("sparse", logits, "bfloat16")]
    groups.append(Group("selection", logits, "bfloat16"))
    groups += _pipelines(CACHE, GPU_CAPTURED, GPU_TRAINED, RECIPE, "bfloat16")
    return groups + scaling_series(NARROW_HEADS.scaled(tokens=2048), "bfloat16")


def scaling_series(base: Shape, dtype: str) -> list[Group]:
    """One size at a time, from a base shape: V and N for logits on both sides, K for a cache."""
    base = Shape("scaling", *list(vars(base).values())[1:])
    sizes = (32_000, 64_000, 128_256, 256_000)
    groups = [Group("dense", base.scaled(vocab=vocab), dtype) for vocab in sizes]
    fractions = (base.tokens // 4, base.tokens // 2, base.tokens)
    groups += [Group("linear", base.scaled(tokens=tokens), dtype) for tokens in fractions]
    return groups + [Group("sparse", base.scaled(top_k=k), dtype) for k in (8, 64, 512)]
