"""What multiplies a loss and its gradient: temperature, weights, denominators, the hard part."""

import math
from unittest import mock

import pytest
import torch
from loss_cases import (
    STUDENTS,
    TEACHERS,
    VOCAB,
    close,
    gradient,
    labels_for,
    leaf,
    leaf64,
    make_student,
    make_teacher,
    normal,
    normal64,
    top_k_of,
)

import kd
from kd.training import DistillationCollator, Objective

pytestmark = pytest.mark.filterwarnings("ignore:.*encountered:RuntimeWarning")  # numpy's -inf


F64 = torch.float64


EVERY = ("torch", "triton", "reference")


def test_t2_is_in_the_gradient_as_it_is_in_the_value():
    """T**2 on the returned value alone leaves the soft part T**2 too weak against the hard one."""
    for temperature in (1.0, 2.0, 4.0):
        for teacher in (
            normal64(3, 11, seed=1),
            top_k_of(normal64(3, 11, seed=1), 4),
        ):

            def loss(z, teacher=teacher, temperature=temperature):
                return kd.distillation_loss(z, teacher, temperature=temperature)

            z, direction, step = (
                leaf64(3, 11),
                normal64(3, 11, seed=2),
                1e-5,
            )
            slope = (loss(z + step * direction) - loss(z - step * direction)) / (2 * step)
            close((gradient(loss(z), z) * direction).sum(), slope, rtol=1e-7)


def test_t2_is_the_same_for_every_backend_and_form():
    """One form scaled by T**2 and another not: switching it changes the mix with cross-entropy."""
    for student_form in STUDENTS:
        student, _ = make_student(student_form, F64)
        for teacher_form in (form for form in TEACHERS if form != "drop"):
            teacher = make_teacher(teacher_form, F64)
            options = dict(temperature=3.0, vocab_size=VOCAB)
            pure = kd.forward_kl(student, teacher, backend="reference", **options)
            for backend in ("torch", "auto", "reference"):
                options["backend"] = backend
                close(kd.distillation_loss(student, teacher, **options), 9 * pure)
                unscaled = kd.distillation_loss(student, teacher, scale_by_t2=False, **options)
                close(unscaled, pure)


def test_mean_is_over_tokens_and_not_over_the_vocabulary():
    """A mean over [N, V] makes the loss 150,000 times too small; here it would be two times."""
    p, q = torch.tensor([0.75, 0.25], dtype=F64), torch.tensor([0.5, 0.5], dtype=F64)
    want = 0.75 * math.log(1.5) + 0.25 * math.log(0.5)
    close(kd.forward_kl(q.log().expand(3, 2), p.log().expand(3, 2)), want)


def test_tokens_are_divided_by_once():
    """A loss that is already a mean, divided by the token count again, is N times too small."""
    z, t = normal64(1, 7), normal64(1, 7, seed=1)
    want = kd.forward_kl(z, t, reduction="sum")
    for rows in (1, 16, 64, 256):
        close(kd.forward_kl(z.expand(rows, 7), t.expand(rows, 7)), want)
        student = z.expand(rows, 7).clone().requires_grad_()
        grad = gradient(kd.forward_kl(student, t.expand(rows, 7)), student)
        close(grad.sum(0), (z.softmax(-1) - t.softmax(-1))[0])


def test_uneven_microbatches_and_ranks_add_up_to_the_one_batch_gradient():
    """A mean of microbatch means weighs a token by how short the others in its microbatch are."""
    z, t = leaf64(9, 13), normal64(9, 13, seed=1)
    labels = torch.arange(9)
    labels[[0, 1, 2, 5]] = -100
    options = dict(ce_weight=0.5, temperature=2.0)
    want = gradient(kd.distillation_loss(z, t, labels=labels, **options), z)

    def total(**extra):
        parts = [
            kd.distillation_loss(z[rows], t[rows], labels=labels[rows], **options, **extra)
            for rows in (slice(0, 4), slice(4, 5), slice(5, 9))
        ]
        return gradient(sum(parts), z)

    close(total(num_items=5), want)
    close(total(num_items=torch.tensor(5.0)), want, rtol=1e-6)
    assert (total() / 3 - want).abs().max() > 0.1 * want.abs().max()  # the defect is visible here


def test_denominator_counts_the_labels_the_loss_sees():
    """Counted on raw rows, before the shift or before generation, it is another batch's count."""
    trainer = pytest.importorskip("kd.training.trainer")
    rows = [
        {"input_ids": [3, 4, 5, 6], "labels": [3, 4, 5, 6]},  # the first token is never predicted
        {"input_ids": [7, 8], "labels": [-100, 8]},
    ]
    batch = DistillationCollator(0)(rows)
    fake = mock.Mock(args=mock.Mock(world_size=1), _tokens_seen=0.0)
    count = trainer.DistillationTrainer._get_num_items_in_batch(
        fake, [batch, batch], torch.device("cpu")
    )
    logits = normal64(8, 11)
    each = kd.cross_entropy(logits, batch["shift_labels"].flatten(), reduction="none")
    assert count == 2 * (each != 0).sum() == 8


def test_hard_label_gradient_is_not_dropped():
    """Cross-entropy returned for the log alone: the printed loss is right, nothing learns it."""
    labels = labels_for()
    kept = labels != -100
    for student_form in STUDENTS:
        for teacher_form in TEACHERS:
            student, leaves = make_student(student_form, F64)
            teacher = make_teacher(teacher_form, F64)
            options = dict(labels=labels, vocab_size=VOCAB)
            mixed = kd.distillation_loss(student, teacher, ce_weight=0.5, **options)
            soft = kd.distillation_loss(student, teacher, **options)
            hard = kd.cross_entropy(student, **options)
            for tensor in leaves:
                part = gradient(mixed, tensor, retain_graph=True) - gradient(
                    soft, tensor, retain_graph=True
                )
                close(part, 0.5 * gradient(hard, tensor, retain_graph=True))
            if student_form == "logits":
                want = student[:, :VOCAB].softmax(-1)
                want = want - torch.eye(VOCAB, dtype=F64)[labels.clamp(min=0)]
                got = gradient(hard, leaves[0])[:, :VOCAB]
                close(got, want.detach() * kept[:, None] / kept.sum())


def test_labels_alone_bring_in_no_hard_loss():
    """A hidden default of half cross-entropy: students were trained on another objective."""
    z, labels = leaf64(4, 9), torch.tensor([1, 2, -100, 4])
    loss = kd.distillation_loss(z, z.detach().clone(), labels=labels)
    assert loss == 0 and gradient(loss, z).eq(0).all()
    t = normal64(4, 9, seed=1)
    other = torch.tensor([5, 0, -100, 8])
    assert kd.distillation_loss(z, t, labels=labels) == kd.distillation_loss(z, t, labels=other)


def test_temperature_of_capture_or_sampling_is_not_the_loss_temperature():
    """Targets captured (or text sampled) at T = 2 are compared at the temperature asked for."""
    z, t = normal64(4, 9), normal64(4, 9, seed=1)
    stored = top_k_of(t / 2, 9, temperature=2.0)
    for temperature in (1.0, 2.0, 3.0):
        want = kd.forward_kl(z, t, temperature=temperature)
        close(kd.forward_kl(z, stored, temperature=temperature), want)
    assert Objective().temperature == Objective().teacher_temperature == 1.0


def test_softcap_and_logit_scale_are_part_of_the_logits():
    """Gemma 2 caps its logits and Cohere scales them: a loss that skips it trains another model."""
    hidden, weight = (
        leaf64(4, 5),
        leaf64(9, 5, seed=1),
    )
    t_hidden, t_weight = normal64(4, 6, seed=2), normal64(9, 6, seed=3)
    capped = 2.0 * torch.tanh(0.7 * (t_hidden @ t_weight.T) / 2.0)
    fused_teacher = kd.Hidden(t_hidden, t_weight, logit_scale=0.7, softcap=2.0)
    logits = 3.0 * torch.tanh(1.5 * (hidden @ weight.T) / 3.0)
    want = kd.forward_kl(logits, capped, backend="reference")
    fused = kd.Hidden(hidden, weight, logit_scale=1.5, softcap=3.0)
    got = kd.forward_kl(fused, fused_teacher)
    close(got, want)
    for tensor in (hidden, weight):
        close(gradient(got, tensor, retain_graph=True), gradient(want, tensor, retain_graph=True))


def test_num_items_makes_any_split_equal_one_batch():
    z, t = leaf(10, 11), normal(10, 11, seed=1)
    labels = torch.arange(10)
    labels[[1, 2, 7]] = -100
    (whole,) = torch.autograd.grad(kd.distillation_loss(z, t, labels=labels, ce_weight=0.3), z)
    parts = 0
    for rows in (slice(0, 3), slice(3, 4), slice(4, 10)):
        parts = parts + kd.distillation_loss(
            z[rows], t[rows], labels=labels[rows], ce_weight=0.3, num_items=7
        )
    (split,) = torch.autograd.grad(parts, z)
    torch.testing.assert_close(split, whole, rtol=1e-6, atol=1e-7)


def test_mean_divides_by_the_unmasked_weight():
    z, t = leaf(3, 8), normal(3, 8, seed=1)
    weights = torch.tensor([0.5, 0.0, 2.0])
    per_token = kd.forward_kl(z, t, reduction="none")
    mean = kd.forward_kl(z, t, weights=weights)
    torch.testing.assert_close(mean, (per_token * weights).sum() / weights.sum())


def test_temperature_squared_scales_value_and_gradient_alike():
    z, t = leaf(3, 8), normal(3, 8, seed=1)
    pure = kd.forward_kl(z, t, temperature=3.0)
    scaled = kd.distillation_loss(z, t, temperature=3.0)
    unscaled = kd.distillation_loss(z, t, temperature=3.0, scale_by_t2=False)
    torch.testing.assert_close(scaled, 9 * pure)
    torch.testing.assert_close(unscaled, pure)
    (g_pure,), (g_scaled,) = torch.autograd.grad(pure, z), torch.autograd.grad(scaled, z)
    torch.testing.assert_close(g_scaled, 9 * g_pure)


@pytest.mark.parametrize("bad", [-3.0, 0, torch.inf, torch.nan])
@pytest.mark.parametrize("made", [float, torch.tensor, lambda x: torch.tensor([x])])
def test_a_denominator_is_finite_and_above_zero(made, bad):
    z = normal(4, 9)
    for loss in (kd.forward_kl(z, z, num_items=3), kd.forward_kl(z, z, num_items=torch.tensor(3))):
        assert float(loss) == 0
    with pytest.raises(ValueError, match="num_items must be finite and > 0"):
        kd.forward_kl(z, z, num_items=made(bad))
    with pytest.raises(ValueError, match="num_items must be finite and > 0"):
        kd.cross_entropy(z, torch.tensor([1, 2, 3, 4]), num_items=made(bad), backend="reference")


def test_a_denominator_that_cannot_be_looked_at_makes_nan():
    """As on a GPU: a bad one is not a sign that flips."""
    from kd.losses.api import scale_of

    for bad in (-3.0, 0.0, torch.inf, torch.nan):
        assert bool(scale_of(torch.ones(2), "mean", torch.tensor(bad)).isnan())
    assert float(scale_of(torch.ones(2), "mean", torch.tensor([4]))) == 0.25


@pytest.mark.parametrize("reduction", ["sum", "none"])
@pytest.mark.parametrize("backend", EVERY)
def test_a_denominator_of_nothing_is_refused(backend, reduction):
    z, options = normal(4, 9), dict(reduction=reduction, num_items=3, backend=backend)
    for call in (
        lambda: kd.forward_kl(z, z, **options),
        lambda: kd.cross_entropy(z, torch.tensor([1, 2, 3, 4]), **options),
    ):
        with pytest.raises(ValueError, match="num_items must be used with reduction='mean'"):
            call()


@pytest.mark.parametrize("bad", [True, "3", torch.tensor(True)])
def test_a_denominator_is_a_number(bad):
    z = normal(4, 9)
    with pytest.raises(TypeError, match="num_items must be a number"):
        kd.forward_kl(z, z, num_items=bad)
