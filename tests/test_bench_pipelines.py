"""Cache, capture, trainer and recipe as suites: right answers, and wrong ones seen."""

import pytest
import torch

from kd_bench import cache_suite, inputs, plan, runner
from kd_bench.implementations import IMPLEMENTATIONS
from kd_bench.shapes import PIPELINE_SUITES, SMOKE_SHAPES
from kd_bench.steps import answer_of, is_floor

SHAPE = SMOKE_SHAPES["smoke-models"]
CASES = [
    (suite, divergence, name)
    for suite, divergence in (
        ("cache-write", "forward_kl"),
        ("cache-read", "forward_kl"),
        ("capture", "forward_kl"),
        ("training", "sft"),
        ("training", "forward_kl"),
    )
    for name, implementation in IMPLEMENTATIONS.items()
    if implementation.takes(suite, divergence)
    and implementation.package is None
    and not is_floor(name)
]
# The largest error of a probability that each codec may make; a top-32 is another loss.
LOSSY = {"kd": 2e-2, "kd log8": 3e-3, "kd float32": 0.0, "pytorch": 0.0}


def found(suite, divergence, name, damage=None):
    made = inputs.make_inputs(suite, SHAPE, torch.float32)
    truth = inputs.exact_answer(suite, divergence, made)
    step = IMPLEMENTATIONS[name].build(suite, divergence, made)
    value, results = answer_of(step)
    if damage is not None:
        results = damage(results)
    return inputs.errors(suite, (value, results), truth)


@pytest.mark.parametrize(("suite", "divergence", "name"), CASES)
def test_answers_are_checked_and_right(suite, divergence, name):
    errors = found(suite, divergence, name)
    if suite.startswith("cache"):
        assert errors["grad_error"] <= LOSSY[name] + 1e-12
    elif suite == "capture":
        assert errors["grad_error"] < (2e-2 if name == "kd" else 1e-6)
    elif name != "kd cached":
        assert errors["value_error"] < 1e-5 and errors["grad_error"] < 1e-5


def test_a_wrong_cache_and_a_wrong_gradient_are_seen():
    wrong = found("cache-read", "forward_kl", "kd float32", lambda r: r | {"ids": r["ids"] + 1})
    assert wrong["grad_error"] > 1e-4
    wrong = found("training", "sft", "kd", lambda r: r | {"norm": 1.3 * r["norm"]})
    assert wrong["grad_error"] == pytest.approx(0.3, rel=1e-3)


def test_written_bytes_are_told():
    step = cache_suite.build("cache-write", cache_suite.make(SHAPE, torch.float32), "float32")
    step.check()
    assert step.detail.endswith(" bytes/token")


def test_every_pipeline_is_planned_on_both_devices():
    for device in ("cpu", "cuda"):
        planned = {group.suite for group in plan.plan(device)}
        assert PIPELINE_SUITES.keys() <= planned
    chosen = plan.plan("cpu", suites=["training"], divergences=["jsd(0.5)"])
    assert [group.divergence for group in chosen] == ["sft", "forward_kl"]


def test_what_has_to_be_absent_says_why():
    group = runner.Group("cache-write", SHAPE, "float32")
    row = runner._new_row(group, IMPLEMENTATIONS["distillkit"], "cpu")
    assert "not on PyPI" in row["skipped"]


def test_guard_knows_what_a_training_step_keeps():
    group = next(g for g in plan.plan("cuda") if g.suite == "training")
    weights = 28 * 2 * group.shape.teacher_hidden**2  # less than the teacher alone
    assert group.needs(IMPLEMENTATIONS["kd"]) > 2 * weights


@pytest.mark.slow
def test_a_recipe_runs_and_its_cache_is_checked():
    step = IMPLEMENTATIONS["kd"].build("recipe", "forward_kl", {})
    errors = step.errors()
    assert errors["grad_error"] < 2e-2 and "tokens cached" in step.detail
