"""Which rows and columns count: masks, padding, infinities, NaN, nothing at all."""

import math

import pytest
import torch
from loss_cases import close, gradient, group_of_one, leaf, normal, normal64

import kd

pytestmark = pytest.mark.filterwarnings("ignore:.*encountered:RuntimeWarning")  # numpy's -inf


INF = float("inf")


BACKENDS = ("torch", "triton")


NAMES = ("forward_kl", "reverse_kl", "jsd", "total_variation", "cross_entropy")


def loss_of(name, student, teacher, labels, **options):
    if name == "cross_entropy":
        return kd.cross_entropy(student, labels, **options)
    return kd.distillation_loss(student, teacher, divergence=name, **options)


EVERY = ("torch", "triton", "reference")


F64 = torch.float64


def test_equal_models_give_exactly_zero_loss_and_gradient():
    z = leaf(4, 33)
    for divergence in (kd.forward_kl, kd.total_variation):
        loss = divergence(z, z.detach().clone(), reduction="sum")
        (grad,) = torch.autograd.grad(loss, z)
        assert loss == 0 and grad.abs().max() == 0


def test_masked_rows_cost_nothing_and_get_zero_gradient():
    z, t = leaf(4, 9), normal(4, 9, seed=1)
    t[1] = torch.nan  # a masked row is not even read
    labels = torch.tensor([3, -100, 2, 1])
    loss = kd.distillation_loss(z, t, labels=labels, ce_weight=0.5)
    (grad,) = torch.autograd.grad(loss, z)
    assert loss.isfinite() and grad[1].eq(0).all() and grad[0].abs().max() > 0
    per_token = kd.distillation_loss(z, t, labels=labels, reduction="none")
    assert per_token[1] == 0


@pytest.mark.parametrize("reduction", ["mean", "sum", "none"])
@pytest.mark.parametrize("form", ["logits", "hidden"])
@pytest.mark.parametrize("rows", [0, 3])
def test_nothing_to_learn_is_zero_with_a_graph(rows, form, reduction):
    hidden, weight = leaf(rows, 4), leaf(7, 4)
    student = kd.Hidden(hidden, weight) if form == "hidden" else leaf(rows, 7)
    leaves = [hidden, weight] if form == "hidden" else [student]
    labels = torch.full((rows,), -100)
    loss = kd.distillation_loss(student, torch.randn(rows, 7), labels=labels, reduction=reduction)
    assert loss.sum() == 0 and loss.requires_grad
    assert all(g.eq(0).all() for g in torch.autograd.grad(loss.sum(), leaves))


@pytest.mark.parametrize("divergence", [kd.forward_kl, kd.jsd(0.3), kd.total_variation])
def test_minus_infinity_is_probability_zero_and_never_nan(divergence):
    z, t = leaf(3, 8).detach(), normal(3, 8, seed=1)
    t[:, 2] = -INF
    z[:, 3] = t[:, 3] = -INF
    z.requires_grad_()
    loss = divergence(z, t)
    (grad,) = torch.autograd.grad(loss, z)
    assert loss.isfinite() and grad.isfinite().all()
    want = divergence(z, t, backend="reference")
    torch.testing.assert_close(loss.double(), want, rtol=1e-6, atol=1e-7)


def test_reverse_kl_onto_a_teacher_zero_is_infinite_unless_bounded():
    z, t = leaf(2, 6), normal(2, 6, seed=1)
    t[0, 1] = -INF
    assert kd.reverse_kl(z, t) == INF
    floored = kd.reverse_kl(z, t, min_logprob=-30.0)
    want = kd.reverse_kl(z, t, min_logprob=-30.0, backend="reference")
    torch.testing.assert_close(floored.double(), want, rtol=1e-6, atol=1e-7)


def test_nan_in_gives_nan_out_and_check_names_the_row():
    z, t = leaf(3, 6), normal(3, 6, seed=1)
    t[1, 4] = torch.nan
    per_token = kd.forward_kl(z, t, reduction="none")
    assert per_token.isnan().tolist() == [False, True, False]
    with pytest.raises(ValueError, match=r"teacher must be finite, got nan at row 1, column 4"):
        kd.check("teacher", t)
    assert kd.check("student", z) is z


def test_leading_dimensions_and_strides_do_not_matter():
    z, t = leaf(2, 3, 12), normal(2, 3, 12, seed=1)
    want = kd.forward_kl(z.reshape(6, 12), t.reshape(6, 12), reduction="none")
    torch.testing.assert_close(kd.forward_kl(z, t, reduction="none"), want.reshape(2, 3))
    strided = torch.randn(2, 3, 24)[..., ::2]
    strided.copy_(z.detach())
    turned = t.permute(2, 0, 1).contiguous().permute(1, 2, 0)
    torch.testing.assert_close(kd.forward_kl(strided, turned, reduction="none"), want.view(2, 3))


def test_padded_columns_do_not_count_whatever_they_hold():
    z, t = leaf(3, 8), normal(3, 8, seed=1)
    want = kd.forward_kl(z, t)
    (want_grad,) = torch.autograd.grad(want, z)
    wide = torch.cat([z.detach(), torch.full((3, 2), 40.0)], 1).requires_grad_()
    wider = torch.cat([t, torch.full((3, 5), 30.0)], 1)
    got = kd.forward_kl(wide, wider, vocab_size=8)
    (grad,) = torch.autograd.grad(got, wide)
    torch.testing.assert_close(got, want)
    torch.testing.assert_close(grad[:, :8], want_grad)
    assert grad[:, 8:].eq(0).all()


@pytest.mark.parametrize("overwrite", [False, True])
@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("shape", [(1, 8), (1, 1, 8), (2, 8)])
def test_one_row_with_padding(shape, name, backend, overwrite):
    """A [1, V] slice is contiguous whatever its stride."""
    z, t, labels = normal(*shape), normal(*shape, seed=1), torch.full(shape[:-1], 2)
    options = dict(vocab_size=5, overwrite_student_logits=overwrite)
    found = []
    for which in (backend, "reference"):
        leaf = z.clone().requires_grad_()
        if which == "reference":
            options.pop("overwrite_student_logits")
        value = loss_of(name, leaf * 1, t, labels, backend=which, **options)
        found.append((value.detach().float(), torch.autograd.grad(value, leaf)[0].float()))
    torch.testing.assert_close(*found, rtol=1e-5, atol=1e-6)
    assert bool((found[0][1][..., 5:] == 0).all())


@pytest.mark.parametrize("name", [*NAMES, "adaptive_kl"])
@pytest.mark.parametrize("side", ["student", "teacher"])
@pytest.mark.parametrize("backend", EVERY)
def test_a_row_of_minus_infinity_is_nan_and_alone_so(backend, side, name):
    """No token lives: there is no distribution to compare. Other rows are not touched."""
    if side == "teacher" and name == "cross_entropy":
        pytest.skip("no teacher")
    z, t, labels = normal(3, 9), normal(3, 9, seed=1), torch.tensor([0, 1, 2])
    (z if side == "student" else t)[1] = -torch.inf
    z.requires_grad_()
    losses = loss_of(name, z, t, labels, reduction="none", backend=backend)
    assert losses.isnan().tolist() == [False, True, False]
    gradient = torch.autograd.grad(losses.sum(), z)[0]
    flat = side == "teacher" and name == "total_variation"  # its slope is 0 where nothing compares
    assert gradient.isnan().any(-1).tolist() == [False, not flat, False]


@pytest.mark.parametrize("name", ["forward_kl", "jsd", "cross_entropy"])
def test_a_row_of_minus_infinity_over_shards(name):
    z, t, labels = normal(3, 9), normal(3, 9, seed=1), torch.tensor([0, 1, 2])
    z[1] = -torch.inf
    options = dict(kd_weight=0, ce_weight=1.0) if name == "cross_entropy" else dict(divergence=name)
    with group_of_one():
        losses = kd.vocab_parallel_loss(z, t, labels=labels, reduction="none", **options)
    assert losses.isnan().tolist() == [False, True, False]


@pytest.mark.parametrize("how", ["labels", "weights"])
@pytest.mark.parametrize("reduction", ["mean", "sum", "none"])
@pytest.mark.parametrize("backend", EVERY)
def test_nothing_that_counts_is_zero_with_a_graph(backend, reduction, how):
    """Whatever the rows hold: what does not count has no part, not even as 0 * inf."""
    z, t = normal(3, 9), normal(3, 9, seed=1)
    z[1] = -torch.inf
    z.requires_grad_()
    rows = dict(labels=torch.full((3,), -100)) if how == "labels" else dict(weights=torch.zeros(3))
    loss = kd.distillation_loss(z, t, reduction=reduction, backend=backend, **rows)
    assert bool((loss == 0).all()) and loss.requires_grad
    assert bool((torch.autograd.grad(loss.sum(), z)[0] == 0).all())


def test_padded_columns_have_no_probability():
    """Zero-filled, or copied from the teacher into the student, padding takes part in softmax:
    the loss then depends on a constant added to the student's logits."""
    z, t = normal64(3, 8), normal64(3, 8, seed=1)
    want = kd.forward_kl(z, t)
    for student_pad, teacher_pad in ((0.0, 0.0), (0.0, 9.0), (40.0, -40.0), (9.0, 9.0)):
        for student_width, teacher_width in ((8, 11), (10, 8), (10, 10), (9, 12)):
            wide = torch.nn.functional.pad(z, (0, student_width - 8), value=student_pad)
            wider = torch.nn.functional.pad(t, (0, teacher_width - 8), value=teacher_pad)
            for shift in (0.0, 5.0, 20.0):
                student = (wide + shift).requires_grad_()
                loss = kd.forward_kl(student, wider, vocab_size=8)
                close(loss, want, rtol=1e-8)
                assert gradient(loss, student)[:, 8:].eq(0).all()


def test_jsd_beta_weighs_the_teacher():
    """The convention flips between papers and codes; here beta is the teacher's weight, and the
    end points are limits that vanish, not forward and reverse KL in disguise."""
    p, q = torch.tensor([[1.0, 0.0]], dtype=F64), torch.tensor([[0.5, 0.5]], dtype=F64)
    for beta in (0.1, 0.5, 0.9):
        m = (beta + (1 - beta) / 2, (1 - beta) / 2)
        kl_pm = math.log(1 / m[0])
        kl_qm = 0.5 * math.log(0.5 / m[0]) + 0.5 * math.log(0.5 / m[1])
        close(kd.jsd(beta)(q.log(), p.log()), beta * kl_pm + (1 - beta) * kl_qm)
    z, t = normal64(2, 6), normal64(2, 6, seed=1)
    small = 1e-6
    close(kd.jsd(small)(z, t) / small, kd.forward_kl(z, t), rtol=1e-4)
    close(kd.jsd(1 - small)(z, t) / small, kd.reverse_kl(z, t), rtol=1e-4)
    for beta, name in ((0, "forward_kl for 0"), (1, "reverse_kl for 1")):
        with pytest.raises(ValueError, match=name):
            kd.jsd(beta)
