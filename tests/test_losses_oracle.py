"""Every divergence, student form and teacher form against the float64 oracle."""

import itertools

import pytest
import torch
from loss_cases import (
    DIVERGENCES,
    STUDENTS,
    TEACHERS,
    VOCAB,
    labels_for,
    make_student,
    make_teacher,
    meaningful,
    relative_error,
)

import kd
from kd.losses import chunks, fused, rows_torch

TEMPERATURES = (1.0, 2.0)


def evaluate(student_form, teacher_form, divergence, dtype, backend, seed=0, **options):
    """(value, gradients) under an upstream gradient that is not one."""
    student, leaves = make_student(student_form, dtype, seed)
    teacher = make_teacher(teacher_form, dtype)
    loss = kd.distillation_loss(
        student, teacher, divergence=divergence, vocab_size=VOCAB, backend=backend, **options
    )
    upstream = torch.linspace(0.3, 1.7, max(loss.numel(), 1), dtype=loss.dtype).reshape(loss.shape)
    return loss.detach(), torch.autograd.grad((loss * upstream).sum(), leaves)


@pytest.mark.parametrize("student_form", STUDENTS)
@pytest.mark.parametrize("teacher_form", TEACHERS)
@pytest.mark.parametrize("name", DIVERGENCES)
def test_float64_agrees_with_the_oracle(name, teacher_form, student_form):
    divergence = DIVERGENCES[name]
    tried = 0
    for temperature, ce_weight, reduction in itertools.product(
        TEMPERATURES, (0.0, 0.5), ("mean", "none")
    ):
        if not meaningful(divergence, teacher_form, temperature):
            continue
        tried += 1
        options = dict(
            temperature=temperature,
            ce_weight=ce_weight,
            kd_weight=0.7,
            labels=labels_for(),
            weights=torch.linspace(0.2, 1.4, 6, dtype=torch.float64),
            reduction=reduction,
        )
        case = (student_form, teacher_form, divergence, torch.float64)
        want, want_grads = evaluate(*case, "reference", **options)
        got, got_grads = evaluate(*case, "torch", **options)
        assert relative_error(got, want) <= 1e-10, (temperature, ce_weight, reduction)
        for got_grad, want_grad in zip(got_grads, want_grads, strict=True):
            assert relative_error(got_grad, want_grad) <= 1e-10, (temperature, ce_weight, reduction)
    if tried == 0:
        student, _ = make_student(student_form, torch.float64)
        with pytest.raises(ValueError, match="tail="):
            kd.distillation_loss(
                student, make_teacher(teacher_form, torch.float64), divergence=divergence
            )


@pytest.mark.parametrize("student_form", STUDENTS)
@pytest.mark.parametrize("teacher_form", ("logits", "hidden", "bucket"))
@pytest.mark.parametrize("budget", (1, 2, 3))
def test_chunks_and_blocks_do_not_change_the_result(
    student_form, teacher_form, budget, monkeypatch
):
    """One row a block and 2, 4 or 6 rows a chunk, so that every loop runs more than once."""
    case = (student_form, teacher_form, kd.jsd(0.3), torch.float64)
    options = dict(labels=labels_for(), ce_weight=0.5, temperature=1.5)
    want, want_grads = evaluate(*case, "reference", **options)
    monkeypatch.setattr(chunks, "BUDGET", budget * VOCAB * 16)
    monkeypatch.setattr(rows_torch, "BLOCK_ELEMENTS", VOCAB)
    got, got_grads = evaluate(*case, "torch", **options)
    assert relative_error(got, want) <= 1e-10
    for got_grad, want_grad in zip(got_grads, want_grads, strict=True):
        assert relative_error(got_grad, want_grad) <= 1e-10


@pytest.mark.parametrize("name", DIVERGENCES)
@pytest.mark.parametrize("teacher_form", TEACHERS)
def test_the_oracle_passes_gradcheck(name, teacher_form):
    divergence = DIVERGENCES[name]
    if divergence.detach_mixture or divergence.name == "adaptive_kl":
        pytest.skip("its gradient treats part of the value as a constant, by definition")
    if not meaningful(divergence, teacher_form, 1.0):
        pytest.skip("refused combination")
    logits = make_student("logits", torch.float64)[0][:3]
    teacher = make_teacher(teacher_form, torch.float64, tokens=3)

    def loss(z):
        return kd.distillation_loss(
            z, teacher, divergence=divergence, vocab_size=VOCAB, backend="reference"
        )

    assert torch.autograd.gradcheck(loss, (logits.detach().requires_grad_(),))


def plain_pytorch(student, teacher, temperature):
    """Forward KL as one writes it without a library, in the inputs' own dtype."""
    z = student if isinstance(student, torch.Tensor) else student.hidden @ student.weight.T
    t = teacher if isinstance(teacher, torch.Tensor) else teacher.hidden @ teacher.weight.T
    log_q = torch.log_softmax(z[:, :VOCAB].float() / temperature, -1)
    log_p = torch.log_softmax(t[:, :VOCAB].float() / temperature, -1)
    return torch.nn.functional.kl_div(log_q, log_p, log_target=True, reduction="sum")


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("gap", [1.0, 0.05], ids=["apart", "near"])
@pytest.mark.parametrize("form", ["logits", "hidden"])
def test_narrow_dtypes_are_within_twice_plain_pytorch(form, gap, dtype):
    """The yardstick is PyTorch's own error in the same dtype, also where student ~ teacher."""
    g = torch.Generator().manual_seed(0)
    hidden = torch.randn(64, 16, generator=g)
    weight = 3 * torch.randn(VOCAB, 16, generator=g)
    near = hidden + gap * torch.randn(64, 16, generator=g)
    near, hidden, weight = near.to(dtype), hidden.to(dtype), weight.to(dtype)

    def build(precise):
        h, w, t = (x.double() if precise else x.clone() for x in (near, weight, hidden))
        h.requires_grad_()
        w.requires_grad_()
        if form == "logits":
            z = h.detach() @ w.detach().T if precise else (h.detach() @ w.detach().T)
            z = (near.detach() @ weight.T).double() if precise else near.detach() @ weight.T
            z.requires_grad_()
            t = (hidden @ weight.T).double() if precise else hidden @ weight.T
            return z, t, [z]
        return kd.Hidden(h, w), kd.Hidden(t, w.detach()), [h, w]

    def results(loss, leaves):
        return [loss.detach(), *torch.autograd.grad(loss, leaves)]

    student, teacher, leaves = build(True)
    want = results(
        kd.distillation_loss(student, teacher, reduction="sum", backend="reference"), leaves
    )
    student, teacher, leaves = build(False)
    plain = results(plain_pytorch(student, teacher, 1.0), leaves)
    student, teacher, leaves = build(False)
    ours = results(kd.distillation_loss(student, teacher, reduction="sum"), leaves)
    for got, usual, true in zip(ours, plain, want, strict=True):
        scale = true.double().abs().max()
        allowed = 2 * (usual.double() - true).abs().max() + 4 * torch.finfo(dtype).eps * scale
        assert (got.double() - true).abs().max() <= allowed


@pytest.mark.parametrize("vocab_size", [None, 950])
def test_wide_projections_made_in_slabs(monkeypatch, vocab_size):
    monkeypatch.setattr(fused, "SLAB_ELEMENTS", 1 << 14)  # 409 tokens of the vocabulary
    make = torch.Generator().manual_seed(0)

    def hidden(width):
        rows, weight = (
            torch.randn(40, width, generator=make),
            torch.randn(1000, width, generator=make),
        )
        return kd.Hidden(rows.requires_grad_(), (weight / width**0.5).requires_grad_())

    student, teacher = hidden(520), hidden(640)
    teacher = kd.Hidden(teacher.hidden.detach(), teacher.weight.detach())
    found, exact = {}, {}
    for backend, kept in (("torch", found), ("reference", exact)):
        loss = kd.distillation_loss(student, teacher, vocab_size=vocab_size, backend=backend)
        kept["dh"], kept["dw"] = torch.autograd.grad(loss, (student.hidden, student.weight))
        kept["loss"] = loss.detach()
    for name, value in exact.items():
        torch.testing.assert_close(found[name].double(), value.double(), rtol=1e-5, atol=1e-7)


@pytest.mark.parametrize("count", (1, 5, 512, 4096))
@pytest.mark.parametrize("teacher_row", (0, 300, 602, 1200))
@pytest.mark.parametrize("spare_rows", (0, 100, 2000))
def test_plans_of_chunks_keep_within_the_budget(count, teacher_row, spare_rows, monkeypatch):
    monkeypatch.setattr(chunks, "BUDGET", 600 * 450)
    plan = chunks.Plan.of(count, 600, teacher_row, spare_rows * 600)
    assert plan.bytes <= 600 * 450 + chunks.ALIGNMENT
    memory = torch.empty(plan.bytes, dtype=torch.uint8)
    for rows in {plan.first, min(plan.later, max(0, count - plan.first))} - {0}:
        mine, rest = plan.split(memory, rows)
        assert len(mine) == 600 * rows
        in_dw = plan.borrows and rows == plan.first
        assert in_dw or len(rest) >= teacher_row
    assert plan.first == count or 1 <= plan.later <= count - plan.first
