"""Masks, weights, reductions, vocabulary, infinities, bad input: the contract around the maths."""

import pytest
import torch

import kd
from kd.losses import fused

INF = float("inf")


def logits(*shape, seed=0, grad=True):
    g = torch.Generator().manual_seed(seed)
    return torch.randn(*shape, generator=g).requires_grad_(grad)


def test_equal_models_give_exactly_zero_loss_and_gradient():
    z = logits(4, 33)
    for divergence in (kd.forward_kl, kd.total_variation):
        loss = divergence(z, z.detach().clone(), reduction="sum")
        (grad,) = torch.autograd.grad(loss, z)
        assert loss == 0 and grad.abs().max() == 0


def test_masked_rows_cost_nothing_and_get_zero_gradient():
    z, t = logits(4, 9), logits(4, 9, seed=1, grad=False)
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
    hidden, weight = logits(rows, 4), logits(7, 4)
    student = kd.Hidden(hidden, weight) if form == "hidden" else logits(rows, 7)
    leaves = [hidden, weight] if form == "hidden" else [student]
    labels = torch.full((rows,), -100)
    loss = kd.distillation_loss(student, torch.randn(rows, 7), labels=labels, reduction=reduction)
    assert loss.sum() == 0 and loss.requires_grad
    assert all(g.eq(0).all() for g in torch.autograd.grad(loss.sum(), leaves))


def test_num_items_makes_any_split_equal_one_batch():
    z, t = logits(10, 11), logits(10, 11, seed=1, grad=False)
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
    z, t = logits(3, 8), logits(3, 8, seed=1, grad=False)
    weights = torch.tensor([0.5, 0.0, 2.0])
    per_token = kd.forward_kl(z, t, reduction="none")
    mean = kd.forward_kl(z, t, weights=weights)
    torch.testing.assert_close(mean, (per_token * weights).sum() / weights.sum())


def test_temperature_squared_scales_value_and_gradient_alike():
    z, t = logits(3, 8), logits(3, 8, seed=1, grad=False)
    pure = kd.forward_kl(z, t, temperature=3.0)
    scaled = kd.distillation_loss(z, t, temperature=3.0)
    unscaled = kd.distillation_loss(z, t, temperature=3.0, scale_by_t2=False)
    torch.testing.assert_close(scaled, 9 * pure)
    torch.testing.assert_close(unscaled, pure)
    (g_pure,), (g_scaled,) = torch.autograd.grad(pure, z), torch.autograd.grad(scaled, z)
    torch.testing.assert_close(g_scaled, 9 * g_pure)


def test_padded_columns_do_not_count_whatever_they_hold():
    z, t = logits(3, 8), logits(3, 8, seed=1, grad=False)
    want = kd.forward_kl(z, t)
    (want_grad,) = torch.autograd.grad(want, z)
    wide = torch.cat([z.detach(), torch.full((3, 2), 40.0)], 1).requires_grad_()
    wider = torch.cat([t, torch.full((3, 5), 30.0)], 1)
    got = kd.forward_kl(wide, wider, vocab_size=8)
    (grad,) = torch.autograd.grad(got, wide)
    torch.testing.assert_close(got, want)
    torch.testing.assert_close(grad[:, :8], want_grad)
    assert grad[:, 8:].eq(0).all()


@pytest.mark.parametrize("divergence", [kd.forward_kl, kd.jsd(0.3), kd.total_variation])
def test_minus_infinity_is_probability_zero_and_never_nan(divergence):
    z, t = logits(3, 8).detach(), logits(3, 8, seed=1, grad=False)
    t[:, 2] = -INF
    z[:, 3] = t[:, 3] = -INF
    z.requires_grad_()
    loss = divergence(z, t)
    (grad,) = torch.autograd.grad(loss, z)
    assert loss.isfinite() and grad.isfinite().all()
    want = divergence(z, t, backend="reference")
    torch.testing.assert_close(loss.double(), want, rtol=1e-6, atol=1e-7)


def test_reverse_kl_onto_a_teacher_zero_is_infinite_unless_bounded():
    z, t = logits(2, 6), logits(2, 6, seed=1, grad=False)
    t[0, 1] = -INF
    assert kd.reverse_kl(z, t) == INF
    floored = kd.reverse_kl(z, t, min_logprob=-30.0)
    want = kd.reverse_kl(z, t, min_logprob=-30.0, backend="reference")
    torch.testing.assert_close(floored.double(), want, rtol=1e-6, atol=1e-7)


def test_nan_in_gives_nan_out_and_check_names_the_row():
    z, t = logits(3, 6), logits(3, 6, seed=1, grad=False)
    t[1, 4] = torch.nan
    per_token = kd.forward_kl(z, t, reduction="none")
    assert per_token.isnan().tolist() == [False, True, False]
    with pytest.raises(ValueError, match=r"teacher must be finite, got nan at row 1, column 4"):
        kd.check("teacher", t)
    assert kd.check("student", z) is z


def test_backward_twice_and_upstream_scale():
    hidden, weight = logits(5, 4), logits(9, 4)
    loss = kd.distillation_loss(kd.Hidden(hidden, weight), torch.randn(5, 9))
    first = torch.autograd.grad(loss, [hidden, weight], retain_graph=True)
    second = torch.autograd.grad(3 * loss, [hidden, weight], retain_graph=True)
    third = torch.autograd.grad(loss, [hidden, weight])
    for a, b, c in zip(first, second, third, strict=True):
        torch.testing.assert_close(b, 3 * a)
        torch.testing.assert_close(c, a)


def test_accumulating_into_grad_leaves_the_saved_gradient_alone():
    hidden, weight = logits(5, 4), logits(9, 4)
    loss = kd.distillation_loss(kd.Hidden(hidden, weight), torch.randn(5, 9))
    loss.backward(retain_graph=True)
    once = weight.grad.clone()
    loss.backward()
    torch.testing.assert_close(weight.grad, 2 * once)


def test_frozen_lm_head_and_frozen_hidden():
    hidden, weight, t = logits(5, 4), logits(9, 4), torch.randn(5, 9)
    want = torch.autograd.grad(kd.forward_kl(kd.Hidden(hidden, weight), t), [hidden, weight])
    (got,) = torch.autograd.grad(kd.forward_kl(kd.Hidden(hidden, weight.detach()), t), [hidden])
    torch.testing.assert_close(got, want[0])
    (got,) = torch.autograd.grad(kd.forward_kl(kd.Hidden(hidden.detach(), weight), t), [weight])
    torch.testing.assert_close(got, want[1])


def test_a_frozen_lm_head_beside_lora_gets_no_gradient_computed(monkeypatch):
    hidden, weight, t = logits(5, 4), torch.randn(9, 4), torch.randn(5, 9)
    a, b = logits(2, 4), logits(9, 2)
    widths, product = [], fused.product_

    def counted(out, *rest, add):
        widths.append(out.shape[1])
        product(out, *rest, add=add)

    monkeypatch.setattr(fused, "product_", counted)
    student = kd.Hidden(hidden, weight, lora=(a, b, 2.0))
    kd.forward_kl(student, t, backend="torch").backward()
    assert widths == [9, 9, 2]  # the logits of both pairs, then LoRA's B alone
    merged = kd.Hidden(hidden.detach(), weight + 2 * b @ a)
    want = torch.autograd.grad(kd.forward_kl(merged, t, backend="torch"), [a, b])
    torch.testing.assert_close((a.grad, b.grad), want)


def test_overwriting_the_students_logits_gives_the_same_gradient():
    base, t = logits(6, 9), torch.randn(6, 9)
    labels = torch.tensor([1, -100, 2, 3, -100, 4])
    want = torch.autograd.grad(kd.distillation_loss(base * 2, t, labels=labels), base)
    made = base * 2
    address = made.data_ptr()
    loss = kd.distillation_loss(made, t, labels=labels, overwrite_student_logits=True)
    assert made.data_ptr() == address
    torch.testing.assert_close(torch.autograd.grad(loss, base), want)
    with pytest.raises(ValueError, match="must not be used on a leaf"):
        kd.distillation_loss(base, t, overwrite_student_logits=True)


def test_leading_dimensions_and_strides_do_not_matter():
    z, t = logits(2, 3, 12), logits(2, 3, 12, seed=1, grad=False)
    want = kd.forward_kl(z.reshape(6, 12), t.reshape(6, 12), reduction="none")
    torch.testing.assert_close(kd.forward_kl(z, t, reduction="none"), want.reshape(2, 3))
    strided = torch.randn(2, 3, 24)[..., ::2]
    strided.copy_(z.detach())
    turned = t.permute(2, 0, 1).contiguous().permute(1, 2, 0)
    torch.testing.assert_close(kd.forward_kl(strided, turned, reduction="none"), want.view(2, 3))


def test_autocast_runs_the_matmul_in_its_dtype():
    hidden, weight, t = logits(5, 4), logits(9, 4), torch.randn(5, 9)
    with torch.autocast("cpu", torch.bfloat16):
        loss = kd.forward_kl(kd.Hidden(hidden, weight), t)
    assert loss.dtype == torch.float32
    grads = torch.autograd.grad(loss, [hidden, weight])
    assert [g.dtype for g in grads] == [torch.float32] * 2
    exact = torch.autograd.grad(kd.forward_kl(kd.Hidden(hidden, weight), t), [hidden, weight])
    torch.testing.assert_close(grads, exact, rtol=0.1, atol=0.02)


def test_sparse_tail_is_exact_where_the_student_saturates():
    """log(1 - sum q) is -inf in float32 here; the tail's own log-sum-exp is not."""
    z = torch.full((1, 50), -30.0)
    z[0, 3] = 30.0
    z.requires_grad_()
    teacher = kd.TopK(torch.tensor([[3, 4]]), torch.tensor([[0.6, 0.2]]).log())
    loss = kd.forward_kl(z, teacher)
    (grad,) = torch.autograd.grad(loss, z)
    want = kd.forward_kl(z, teacher, backend="reference")
    (want_grad,) = torch.autograd.grad(want, z)
    torch.testing.assert_close(loss.double(), want, rtol=1e-6, atol=0)
    torch.testing.assert_close(grad.double(), want_grad.double(), rtol=1e-5, atol=1e-9)


BAD_CALLS = {
    "shapes that differ": (lambda z, t: kd.forward_kl(z, t[:2]), ValueError, "leading shape"),
    "widths that differ": (lambda z, t: kd.forward_kl(z, t[:, :5]), ValueError, "vocab_size="),
    "vocab_size too large": (
        lambda z, t: kd.forward_kl(z, t, vocab_size=9),
        ValueError,
        "vocab_size must be an integer between 1 and",
    ),
    "label out of range": (
        lambda z, t: kd.cross_entropy(z, torch.tensor([0, 6, 1])),
        ValueError,
        r"got 6 at position 1",
    ),
    "float labels": (
        lambda z, t: kd.distillation_loss(z, t, labels=torch.zeros(3)),
        TypeError,
        "labels must be integer",
    ),
    "k > vocabulary": (
        lambda z, t: kd.forward_kl(z, kd.TopK(torch.zeros(3, 7).long(), torch.zeros(3, 7))),
        ValueError,
        "more than the 6 live tokens",
    ),
    "id out of range": (
        lambda z, t: kd.forward_kl(z, kd.TopK(torch.full((3, 1), 6), torch.full((3, 1), -1.0))),
        ValueError,
        r"teacher.ids must lie in \[0, 6\)",
    ),
    "logits as log-probs": (
        lambda z, t: kd.forward_kl(z, kd.TopK(torch.zeros(3, 1).long(), torch.full((3, 1), 2.0))),
        ValueError,
        "summing to at most 1",
    ),
    "temperature 0": (lambda z, t: kd.forward_kl(z, t, temperature=0), ValueError, "> 0, got 0"),
    "temperature NaN": (
        lambda z, t: kd.forward_kl(z, t, temperature=float("nan")),
        ValueError,
        "finite and > 0, got nan",
    ),
    "beta 0": (lambda z, t: kd.jsd(0.0), ValueError, "use forward_kl for 0"),
    "beta 1": (lambda z, t: kd.jsd(1.0), ValueError, "reverse_kl for 1"),
    "a tensor for beta": (lambda z, t: kd.jsd(z), TypeError, r"kd.jsd\(...\)\(student, teacher\)"),
    "integer logits": (lambda z, t: kd.forward_kl(z, t.long()), TypeError, "floating point"),
    "mixed devices": (
        lambda z, t: kd.forward_kl(z, t.to("meta")),
        ValueError,
        "must be on the student's device cpu, got meta",
    ),
    "teacher with a gradient": (
        lambda z, t: kd.forward_kl(z, t.requires_grad_()),
        ValueError,
        r"teacher.detach\(\)",
    ),
    "hidden and weight disagree": (
        lambda z, t: kd.forward_kl(kd.Hidden(torch.randn(3, 4), torch.randn(6, 5)), t),
        ValueError,
        "with one H",
    ),
    "ce without labels": (
        lambda z, t: kd.distillation_loss(z, t, ce_weight=0.5),
        ValueError,
        "needs labels",
    ),
    "unknown divergence": (
        lambda z, t: kd.distillation_loss(z, t, divergence="kl"),
        ValueError,
        "forward_kl, reverse_kl",
    ),
    "unknown tail": (
        lambda z, t: kd.forward_kl(z, kd.TopK(torch.zeros(3, 1).long(), t[:, :1], tail="zero")),
        ValueError,
        "bucket, renormalize, drop, uniform",
    ),
    "hard labels in a pure divergence": (
        lambda z, t: kd.forward_kl(z, t, ce_weight=1.0),
        TypeError,
        "pure divergence takes no ce_weight",
    ),
}


@pytest.mark.parametrize("name", BAD_CALLS)
def test_bad_input_is_named(name):
    call, error, message = BAD_CALLS[name]
    z, t = logits(3, 6), logits(3, 6, seed=1, grad=False)
    before = z.detach().clone()
    with pytest.raises(error, match=message):
        call(z, t)
    assert torch.equal(z.detach(), before)


@pytest.mark.parametrize("backend", ["torch", "triton", "reference"])
@pytest.mark.parametrize("tail", ["bucket", "renormalize", "drop", "uniform"])
def test_rows_without_targets_do_not_count_unless_said(tail, backend):
    """A padded batch of cached targets has the mean of its tokens, in any tail's reading."""
    z = logits(2, 4, 11)
    logprobs, ids = logits(2, 4, 11, seed=1, grad=False).log_softmax(-1).topk(3)
    ids[1, 2:] = -1  # padding: one row's, and one all but empty
    ids[0, 1, 1:] = -1
    teacher = kd.TopK(ids, logprobs.masked_fill(ids < 0, -INF), tail=tail)
    real = (ids >= 0).any(-1)

    single = kd.distillation_loss(
        z[real], kd.TopK(ids[real], teacher.logprobs[real], tail=tail), backend=backend
    )
    batch = kd.distillation_loss(z, teacher, backend=backend)
    (gradient,) = torch.autograd.grad(batch, z)
    assert torch.allclose(batch, single, rtol=1e-6) and gradient[~real].eq(0).all()
    each = kd.forward_kl(z, teacher, reduction="none", backend=backend)
    assert each[~real].eq(0).all() and torch.allclose(each[real].mean(), single, rtol=1e-6)

    # Labels or weights say which rows count, and theirs is the denominator.
    everything = torch.zeros(2, 4, dtype=torch.long)
    whole = kd.distillation_loss(z, teacher, labels=everything, reduction="sum", backend=backend)
    for said in ({"labels": everything}, {"weights": torch.ones(2, 4)}):
        mean = kd.distillation_loss(z, teacher, **said, backend=backend)
        assert torch.allclose(mean, whole / 8, rtol=1e-6)

    nothing = kd.TopK(torch.full_like(ids, -1), torch.full_like(logprobs, -INF), tail=tail)
    empty = kd.distillation_loss(z, nothing, backend=backend)
    assert empty == 0 and empty.requires_grad
