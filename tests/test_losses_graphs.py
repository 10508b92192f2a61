"""Under autograd: repeated and second backwards, changed tensors, frozen leaves, hooks."""

import pytest
import torch
from loss_cases import (
    STUDENTS,
    VOCAB,
    group_of_one,
    leaf,
    leaf64,
    make_student,
    make_teacher,
    normal,
    normal64,
)

import kd
from kd.losses import fused

pytestmark = pytest.mark.filterwarnings("ignore:.*encountered:RuntimeWarning")  # numpy's -inf


BACKENDS = ("torch", "triton")


def teachers(name):
    """(teacher, one of its tensors) of a form."""
    if name == "logits":
        t = normal(4, 9, seed=1)
        return t, t
    if name in ("hidden", "weight", "bias"):
        parts = dict(hidden=normal(4, 3, seed=1), weight=normal(9, 3, seed=2), bias=normal(9))
        return kd.Hidden(**parts), parts[name]
    logprobs, ids = torch.log_softmax(normal(4, 9, seed=1), -1).topk(3)
    return kd.TopK(ids, logprobs), {"ids": ids, "logprobs": logprobs}[name]


F64 = torch.float64


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("name", ["logits", "hidden", "weight", "bias", "ids", "logprobs"])
def test_a_teacher_changed_before_backward_is_refused(name, backend):
    teacher, tensor = teachers(name)
    z = normal(4, 9).requires_grad_()
    loss = kd.forward_kl(z, teacher, reduction="none", backend=backend)
    tensor.zero_()
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        loss.sum().backward()


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("which", ["labels", "weights"])
@pytest.mark.parametrize("half", [False, True])
def test_labels_and_weights_changed_before_backward(which, backend, half):
    """Refused, or of no consequence as what counts was taken before: never half of each."""
    z = normal(4, 9).to(torch.float16 if half else torch.float32).requires_grad_()
    labels, weights = torch.tensor([1, 2, 3, 4]), torch.ones(4)
    options = dict(reduction="none", backend=backend, weights=weights)
    want = torch.autograd.grad(kd.cross_entropy(z, labels, **options).sum(), z)[0]
    loss = kd.cross_entropy(z, labels, **options)
    dict(labels=labels, weights=weights)[which].zero_()
    try:
        got = torch.autograd.grad(loss.sum(), z)[0]
    except RuntimeError as error:
        assert "modified by an inplace operation" in str(error)
    else:
        torch.testing.assert_close(got, want)


def test_a_teacher_of_vocabulary_shards_changed_before_backward_is_refused():
    z, t = normal(4, 9).requires_grad_(), normal(4, 9, seed=1)
    with group_of_one():
        loss = kd.vocab_parallel_loss(z, t, reduction="none")
        t.zero_()
        with pytest.raises(RuntimeError, match="modified by an inplace operation"):
            loss.sum().backward()


def test_overwritten_logits_changed_before_backward_are_refused():
    z = normal(4, 9).requires_grad_()
    logits = z * 1
    loss = kd.forward_kl(logits, normal(4, 9, seed=1), overwrite_student_logits=True)
    with torch.no_grad():
        logits.zero_()
    with pytest.raises(RuntimeError, match="left alone until backward"):
        loss.backward()


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("form", ["logits", "hidden", "ids"])
def test_hooks_on_saved_tensors_see_what_backward_reads(form, backend):
    teacher, _ = teachers(form)
    z, packed = normal(4, 9).requires_grad_(), []

    def pack(tensor):
        packed.append(tensor.clone())
        return packed[-1]

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        loss = kd.jsd(0.5)(z, teacher, reduction="none", backend=backend)
    want = torch.autograd.grad(kd.jsd(0.5)(z, teacher, reduction="none").sum(), z)[0]
    assert len(packed) >= 3  # the student, the teacher's tensors, the weights of the rows
    torch.testing.assert_close(torch.autograd.grad(loss.sum(), z)[0], want, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("reduction", ["mean", "none"])
def test_gradient_checkpointing_around_a_loss(reduction):
    from torch.utils.checkpoint import checkpoint

    t, found = normal(4, 9, seed=1), []
    for wrap in (False, True):
        z = normal(4, 9).requires_grad_()

        def step(z):
            return kd.forward_kl(z * 2, t, reduction=reduction).sum()

        (checkpoint(step, z, use_reentrant=False) if wrap else step(z)).backward()
        found.append(z.grad)
    torch.testing.assert_close(*found)


def test_a_second_derivative_is_refused_and_not_dropped():
    """A gradient penalty silently left out of the loss."""
    z, t = leaf64(3, 5), normal64(3, 5, seed=1)
    (gradient,) = torch.autograd.grad(kd.forward_kl(z, t), z, create_graph=True)
    with pytest.raises(RuntimeError, match="differentiated once"):
        gradient.square().sum().backward()


def test_rows_without_upstream_gradient_do_not_poison_the_others():
    """0 * inf: a row that the caller left out of a sum of per-token losses."""
    z = leaf64(3, 5)
    bad = z.masked_fill(torch.tensor([[False], [True], [False]]), torch.inf)
    losses = kd.forward_kl(bad, normal64(3, 5, seed=1), reduction="none")
    (gradient,) = torch.autograd.grad(losses[0] + losses[2], z)
    assert bool(gradient.isfinite().all())


def test_expanded_logits_are_not_overwritten():
    z = (leaf64(1, 5) * 1).expand(3, 5)
    with pytest.raises(ValueError, match="expanded"):
        kd.distillation_loss(z, normal64(3, 5, seed=1), overwrite_student_logits=True)


def test_transforms_of_torch_func_are_refused():
    teacher = normal64(3, 5, seed=1)
    with pytest.raises(RuntimeError, match="torch.func"):
        torch.func.grad(lambda z: kd.forward_kl(z, teacher))(normal64(3, 5))


def test_backward_twice_and_upstream_scale():
    hidden, weight = leaf(5, 4), leaf(9, 4)
    loss = kd.distillation_loss(kd.Hidden(hidden, weight), torch.randn(5, 9))
    first = torch.autograd.grad(loss, [hidden, weight], retain_graph=True)
    second = torch.autograd.grad(3 * loss, [hidden, weight], retain_graph=True)
    third = torch.autograd.grad(loss, [hidden, weight])
    for a, b, c in zip(first, second, third, strict=True):
        torch.testing.assert_close(b, 3 * a)
        torch.testing.assert_close(c, a)


def test_accumulating_into_grad_leaves_the_saved_gradient_alone():
    hidden, weight = leaf(5, 4), leaf(9, 4)
    loss = kd.distillation_loss(kd.Hidden(hidden, weight), torch.randn(5, 9))
    loss.backward(retain_graph=True)
    once = weight.grad.clone()
    loss.backward()
    torch.testing.assert_close(weight.grad, 2 * once)


def test_frozen_lm_head_and_frozen_hidden():
    hidden, weight, t = leaf(5, 4), leaf(9, 4), torch.randn(5, 9)
    want = torch.autograd.grad(kd.forward_kl(kd.Hidden(hidden, weight), t), [hidden, weight])
    (got,) = torch.autograd.grad(kd.forward_kl(kd.Hidden(hidden, weight.detach()), t), [hidden])
    torch.testing.assert_close(got, want[0])
    (got,) = torch.autograd.grad(kd.forward_kl(kd.Hidden(hidden.detach(), weight), t), [weight])
    torch.testing.assert_close(got, want[1])


def test_a_frozen_lm_head_beside_lora_gets_no_gradient_computed(monkeypatch):
    hidden, weight, t = leaf(5, 4), torch.randn(9, 4), torch.randn(5, 9)
    a, b = leaf(2, 4), leaf(9, 2)
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
    base, t = leaf(6, 9), torch.randn(6, 9)
    labels = torch.tensor([1, -100, 2, 3, -100, 4])
    want = torch.autograd.grad(kd.distillation_loss(base * 2, t, labels=labels), base)
    made = base * 2
    address = made.data_ptr()
    loss = kd.distillation_loss(made, t, labels=labels, overwrite_student_logits=True)
    assert made.data_ptr() == address
    torch.testing.assert_close(torch.autograd.grad(loss, base), want)
    with pytest.raises(ValueError, match="must not be used on a leaf"):
        kd.distillation_loss(base, t, overwrite_student_logits=True)


@pytest.mark.parametrize("form", STUDENTS)
def test_rank_without_tokens_still_has_a_graph(form):
    """A bare zero has no backward: the other ranks wait for this one's gradients for ever."""
    student, leaves = make_student(form, F64)
    for teacher_form in ("logits", "bucket"):
        loss = kd.distillation_loss(
            student,
            make_teacher(teacher_form, F64),
            labels=torch.full((6,), -100),
            ce_weight=0.5,
            vocab_size=VOCAB,
            num_items=12,
        )
        assert loss == 0 and loss.requires_grad
        for grad in torch.autograd.grad(loss, leaves, retain_graph=True):
            assert grad.eq(0).all()
