"""The suites around the losses: cache, capture, training step, recipe.

They are measured as the losses are: each implementation in a process of its own, checked against
the truth, timed in turns. Their modules say what their value and their error are.
"""

from __future__ import annotations

import functools
import importlib
from types import ModuleType
from typing import Any

import torch

from kd_bench.models import matmul_parameters
from kd_bench.shapes import PIPELINE_SUITES, Shape
from kd_bench.steps import Implementation, Inputs, Step, Truth

MODULES = {
    "cache-write": "kd_bench.cache_suite",
    "cache-read": "kd_bench.cache_suite",
    "capture": "kd_bench.capture_suite",
    "training": "kd_bench.training_suite",
    "recipe": "kd_bench.recipe_suite",
}
assert MODULES.keys() == PIPELINE_SUITES.keys()
DISTILLKIT = (
    "distillkit is not on PyPI and not installed; bytes and error of its format are computed by "
    "benchmarks/cache_sizes.py"
)


def module_of(suite: str) -> ModuleType:
    return importlib.import_module(MODULES[suite])


def make_inputs(suite: str, shape: Shape, dtype: torch.dtype) -> Inputs:
    return module_of(suite).make(shape, dtype)


def exact_answer(suite: str, divergence: str, inputs: Inputs) -> Truth:
    return module_of(suite).truth(divergence, inputs)


def memory_needed(suite: str, shape: Shape, itemsize: int) -> int:
    """Rough bytes of one implementation, and of its truth in float64."""
    logits = shape.tokens * shape.vocab
    if suite == "training":
        hidden = max(shape.student_hidden, shape.teacher_hidden)
        # weights, gradients, two moments, a teacher; logits of both sides in float32, twice
        weights = matmul_parameters(hidden, shape.layers, shape.vocab)
        return weights * (4 * itemsize + itemsize) + 16 * logits
    if suite == "capture":
        weights = matmul_parameters(shape.teacher_hidden, shape.layers, shape.vocab)
        return weights * itemsize + 12 * min(logits, 1024 * shape.vocab)
    return 40 * shape.tokens * max(1, shape.top_k)


CODECS = {"kd": "compact", "kd log8": "log8", "kd float32": "float32", "pytorch": "torch"}
CAPTURES = {"kd": "Capture", "pytorch": "PlainCapture", "bare forward": "BareForward"}


def build(name: str, suite: str, divergence: str, inputs: Inputs) -> Step:
    """The step of an implementation in one of these suites."""
    module = module_of(suite)
    if suite in ("cache-write", "cache-read"):
        return module.build(suite, inputs, CODECS[name])
    if suite == "capture":
        return getattr(module, CAPTURES[name])(inputs)
    if suite == "training":
        return module.TrainingStep(name, divergence, inputs)
    return module.Recipe()


def _made(name: str, suites: tuple[str, ...], *divergences: str, **options: Any) -> Implementation:
    return Implementation(
        name, suites, functools.partial(build, name), divergences=divergences, **options
    )


_CACHE = ("cache-write", "cache-read")
IMPLEMENTATIONS = (  # beside kd and pytorch, which take part in the losses' suites too
    _made("kd log8", _CACHE),
    _made("kd float32", _CACHE, note="lossless"),
    _made("distillkit", _CACHE, package="distillkit", missing=DISTILLKIT),
    _made("bare forward", ("capture",), note="the floor: the logits of the same batches"),
    _made("kd cached", ("training",), "forward_kl", note="a stored top-32: another number"),
    _made("trl sft trainer", ("training",), "sft", package="trl"),
    _made("trl gkd trainer", ("training",), "forward_kl", package="trl"),
)
