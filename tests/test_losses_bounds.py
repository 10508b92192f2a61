"""The lower bound on log-probabilities: one meaning for every divergence, form and backend."""

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from loss_cases import (
    DIVERGENCES,
    STUDENTS,
    TEACHERS,
    group_of_one,
    labels_for,
    make_student,
    make_teacher,
    meaningful,
    normal,
    relative_error,
)

import kd
from kd.training import Objective

pytestmark = pytest.mark.filterwarnings("ignore:.*encountered:RuntimeWarning")  # numpy's -inf


BOUND = -2.5  # among the cases' log-probabilities, of both sides


CASES = [(n, t) for n in DIVERGENCES for t in TEACHERS if meaningful(DIVERGENCES[n], t, 1.0)]


def answer(student, leaves, teacher, backend, upstream=None, call=kd.distillation_loss, **options):
    losses = call(student, teacher, reduction="none", backend=backend, **options)
    upstream = torch.linspace(0.5, 1.5, len(losses)) if upstream is None else upstream
    gradients = torch.autograd.grad((losses.double() * upstream).sum(), leaves)
    return [losses.detach().double(), *(g.double() for g in gradients)]


BACKENDS = ("torch", "triton")


EVERY = ("torch", "triton", "reference")


@pytest.mark.parametrize("student", STUDENTS)
@pytest.mark.parametrize(("name", "teacher"), CASES)
def test_bounded_torch_agrees_with_the_oracle(name, teacher, student):
    made, leaves = make_student(student, torch.float64)
    options = dict(divergence=DIVERGENCES[name], vocab_size=19, min_logprob=BOUND)
    options |= dict(temperature=1.0 if teacher == "drop" else 1.5)
    target = make_teacher(teacher, torch.float64)
    found = [answer(made, leaves, target, b, **options) for b in ("torch", "reference")]
    for got, want in zip(*found, strict=True):
        assert relative_error(got, want) < 1e-11


@pytest.mark.parametrize(("name", "teacher"), CASES)
def test_bounded_triton_agrees_with_the_oracle(name, teacher):
    options = dict(divergence=DIVERGENCES[name], vocab_size=19, min_logprob=BOUND)
    options |= dict(labels=labels_for(), ce_weight=0.3)
    found = []
    for dtype, backend in ((torch.float32, "triton"), (torch.float64, "reference")):
        made, leaves = make_student("logits", dtype)
        found.append(answer(made, leaves, make_teacher(teacher, dtype), backend, **options))
    for got, want in zip(*found, strict=True):
        assert relative_error(got, want) < 3e-6


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("teacher", ["logits", "bucket", "uniform", "drop"])
@pytest.mark.parametrize("name", ["forward_kl", "reverse_kl", "jsd(0.5)", "total_variation"])
def test_bounded_vocabulary_shards(name, teacher, backend):
    if teacher == "drop" and name != "forward_kl":
        pytest.skip("raw masses")
    z, t = normal(6, 19, scale=2.0), make_teacher(teacher, torch.float32)
    t = t[:, :19] if teacher == "logits" else t
    options = dict(divergence=DIVERGENCES[name], min_logprob=BOUND)
    leaf, wide = z.clone().requires_grad_(), z.double().requires_grad_()
    with group_of_one():
        call = kd.vocab_parallel_loss
        got = answer(leaf, [leaf], t, backend, call=call, **options)
    want = answer(wide, [wide], t.double() if teacher == "logits" else t, "reference", **options)
    for one, other in zip(got, want, strict=True):
        assert relative_error(one, other) < 3e-6


@pytest.mark.parametrize("backend", EVERY)
def test_the_bound_by_hand(backend):
    """s = 0, t = (0, -8, -9) and a bound of -5: three backends gave three values."""
    q = [1 / 3] * 3
    total = sum(math.exp(x) for x in (0, -8, -9))
    p = [max(math.exp(x) / total, math.exp(-5)) for x in (0, -8, -9)]

    def kl(a, b):
        return sum(x * math.log(x / y) - x + y for x, y in zip(a, b, strict=True))

    m = [(x + y) / 2 for x, y in zip(p, q, strict=True)]
    want = dict(forward_kl=kl(p, q), reverse_kl=kl(q, p), jsd=(kl(p, m) + kl(q, m)) / 2)
    z, t = torch.zeros(1, 3), torch.tensor([[0.0, -8.0, -9.0]])
    for name, value in want.items():
        got = kd.distillation_loss(z, t, divergence=name, min_logprob=-5.0, backend=backend)
        assert float(got) == pytest.approx(value, rel=2e-6)


@pytest.mark.parametrize("backend", EVERY)
@pytest.mark.parametrize("name", DIVERGENCES)
@pytest.mark.parametrize("bound", [-1.0, -5.0, -30.0])
def test_equal_sides_are_zero(bound, name, backend):
    """-4.5e-4 for a divergence that is never negative."""
    z = normal(5, 30, scale=4.0).requires_grad_()
    loss, gradient = answer(
        z, [z], z.detach().clone(), backend, divergence=DIVERGENCES[name], min_logprob=bound
    )
    # alpha_beta's powers and Triton's logarithm of a mixture are rounded
    slack = 1e-13 if backend == "reference" else 2e-6
    assert loss.abs().max() <= (0.0 if name == "forward_kl" else slack)
    assert gradient.abs().max() <= slack


@settings(max_examples=60, deadline=None)
@given(
    st.sampled_from(sorted(DIVERGENCES)),
    st.integers(0, 10_000),
    st.floats(-40, -0.5),
    st.floats(0.1, 60),
    st.sampled_from(["torch", "reference"]),
)
def test_bounded_divergences_are_finite_and_not_negative(name, seed, bound, spread, backend):
    """Whatever is zero, and with the whole row below the bound."""
    z, t = (normal(3, 8, seed=seed + i, scale=spread).double() for i in (0, 1))
    z[0, :4] = t[1, :5] = -torch.inf
    z.requires_grad_()
    loss, gradient = answer(z, [z], t, backend, divergence=DIVERGENCES[name], min_logprob=bound)
    assert bool(loss.isfinite().all()) and bool(gradient.isfinite().all())
    assert bool((loss >= -1e-12).all())


def test_below_the_bound_there_is_no_gradient():
    z = torch.tensor([[0.0, -10.0, -10.0]], requires_grad=True)
    t = torch.tensor([[0.0, -20.0, -9.0]])
    loss, gradient = answer(z, [z], t, "torch", divergence="jsd", min_logprob=-5.0)
    assert loss.abs().max() < 1e-6 and gradient.abs().max() < 1e-6  # tails of both are one number


def test_floor_is_the_former_name():
    z, t = normal(3, 9, scale=4.0), normal(3, 9, seed=1, scale=4.0)
    want = kd.reverse_kl(z, t, min_logprob=-3.0)
    calls = [
        lambda **o: kd.reverse_kl(z, t, **o),
        lambda **o: kd.distillation_loss(z, t, divergence="reverse_kl", **o),
        lambda **o: kd.vocab_parallel_loss(z, t, divergence="reverse_kl", **o),
    ]
    with group_of_one():
        for call in calls:
            with pytest.warns(FutureWarning, match="floor is called min_logprob"):
                torch.testing.assert_close(call(floor=-3.0), want)
            with pytest.raises(TypeError, match="min_logprob must be given once"):
                call(floor=-3.0, min_logprob=-3.0)
            with pytest.raises(ValueError, match="min_logprob must be a finite log-prob"):
                call(min_logprob=0.0)
    with pytest.warns(FutureWarning, match="floor is called min_logprob"):
        objective = Objective(floor=-3.0)
    assert objective == Objective(min_logprob=-3.0)
