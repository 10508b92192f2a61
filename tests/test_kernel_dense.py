"""The dense row kernel in Triton's interpreter, against the float64 oracle.

A mutation put in here and caught: the per-lane rescaling of the running sum dropped.
"""

import pytest
import torch
from kernel_cases import TOKENS, VOCAB, compare, logits, some
from loss_cases import DIVERGENCES

import kd

pytestmark = pytest.mark.filterwarnings("ignore:.*encountered:RuntimeWarning")  # numpy's -inf

SKEWED = "skew_reverse_kl(0.1)"
LABELS = torch.tensor([0, 63, 64, VOCAB - 1])  # first, tile ends, last column


KEPT = ("forward_kl", "reverse_kl", "jsd(0.5)")
EVERY = [(name, temperature) for name in DIVERGENCES for temperature in (1.0, 2.0)]
WIDTHS = [(name, vocab) for vocab in (1, 2, 63, 64, 65, 129, 151) for name in (*KEPT[:2], SKEWED)]


@pytest.mark.parametrize(("name", "temperature"), some(EVERY, lambda n, t: t == 1 or n in KEPT))
def test_every_divergence(name, temperature):
    compare(logits(), logits(seed=1), divergence=DIVERGENCES[name], temperature=temperature)


@pytest.mark.parametrize("name", ["forward_kl", "jsd(0.5)", "adaptive_kl"])
@pytest.mark.parametrize("temperature", [1.0, 3.0])
def test_hard_labels(name, temperature):
    compare(
        logits(),
        logits(seed=1),
        divergence=DIVERGENCES[name],
        temperature=temperature,
        labels=LABELS,
        ce_weight=0.7,
        kd_weight=0.3,
    )


@pytest.mark.parametrize(
    ("name", "vocab"), some(WIDTHS, lambda n, v: v in (65, 151) or n == "forward_kl")
)
def test_padding(name, vocab):
    """Live columns end anywhere; what lies behind them, NaN too, counts for nothing."""
    student, teacher = logits(176), logits(160, seed=1)
    student[:, vocab:] = torch.nan
    teacher[:, vocab:] = torch.inf
    student.requires_grad_(True)
    live, live_teacher = student.detach()[:, :vocab].clone().requires_grad_(), teacher[:, :vocab]
    for z, t in ((student, teacher), (live, live_teacher)):
        loss = kd.distillation_loss(
            z, t, divergence=DIVERGENCES[name], vocab_size=vocab, backend="triton"
        )
        loss.backward()
    assert torch.equal(student.grad[:, :vocab], live.grad)
    assert (student.grad[:, vocab:] == 0).all()
    compare(live.detach(), live_teacher, divergence=DIVERGENCES[name])


@pytest.mark.parametrize("name", [n for n in DIVERGENCES if "reverse" not in n])
def test_minus_infinity(name):
    """-inf is probability zero: on both sides, on the teacher's, on the student's."""
    divergence = DIVERGENCES[name]
    student, teacher = logits(), logits(seed=1)
    teacher[0, ::3] = student[0, ::3] = -torch.inf
    if not divergence.needs_teacher_support:
        teacher[1, 5:90] = -torch.inf
    if name in ("jsd(0.5)", "jsd(0.1)", "total_variation", "skew_forward_kl(0.1)"):
        student[2, 10:140] = -torch.inf
    compare(student, teacher, divergence=divergence)


def test_infinite_values():
    """Where the maths is +inf the value is, and min_logprob bounds it."""
    student, teacher = logits(), logits(seed=1)
    teacher[1, 7] = -torch.inf
    values = kd.reverse_kl(student, teacher, reduction="none", backend="triton")
    assert values[1] == torch.inf and values[[0, 2, 3]].isfinite().all()
    compare(student.clone(), teacher, divergence="reverse_kl", min_logprob=-12.0)
    student[2, 9] = -torch.inf
    assert kd.forward_kl(student, teacher, reduction="none", backend="triton")[2] == torch.inf


def test_nan_stays_in_its_row():
    student, teacher = logits(), logits(seed=1)
    student[2, 70] = torch.nan
    values = kd.jsd(0.5)(student, teacher, reduction="none", backend="triton")
    assert values.isnan().tolist() == [False, False, True, False]


@pytest.mark.parametrize("peak", [200.0, 30.0])
@pytest.mark.parametrize("name", ["forward_kl", "reverse_kl", "jsd(0.5)", "total_variation"])
def test_collapsed_softmax(name, peak):
    student, teacher = logits(), logits(seed=1)
    student[:, 100] += peak
    teacher[:2, 100] += peak
    teacher[2:, 3] += 20.0
    compare(student, teacher, divergence=DIVERGENCES[name])


def test_student_equals_teacher():
    """Forward KL's gradient is exactly zero, and every value is zero to rounding."""
    teacher = logits(seed=1)
    for name, divergence in DIVERGENCES.items():
        student = teacher.clone().requires_grad_()
        loss = kd.distillation_loss(student, teacher, divergence=divergence, backend="triton")
        loss.backward()
        assert abs(float(loss.detach())) < 3e-6, name
        bound = 0.0 if kd.forward_kl in (divergence,) or name == "skew_forward_kl(0)" else 1e-7
        assert float(student.grad.abs().max()) <= bound, name


def test_close_to_the_teacher():
    """Student and teacher 0.05 nats apart at magnitude 25, in float32.

    Going to log2 units rounds a logit once more, by 25 * 2**-24 nats: 3e-5 of the gap.
    """
    teacher = 25 + logits(seed=1)
    for name in ("forward_kl", "reverse_kl", "jsd(0.5)", "skew_forward_kl(0.1)"):
        student = teacher + 0.05 * logits(seed=2, scale=1.0)
        compare(student, teacher, divergence=DIVERGENCES[name], slack=3e-5)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_narrow_logits(dtype):
    """The gradient of narrow logits is the float32 one, rounded once.

    The interpreter cuts bf16 off where a GPU rounds it, hence one unit of the last place.
    """
    student, teacher = logits().to(dtype), logits(seed=1).to(dtype)
    wide = student.float().requires_grad_()
    kd.jsd(0.5)(wide, teacher.float(), backend="triton").backward()
    student.requires_grad_(True)
    kd.jsd(0.5)(student, teacher, backend="triton").backward()
    assert student.grad.dtype == dtype
    # The gradient is scaled by 1/N before it is rounded, in both.
    torch.testing.assert_close(student.grad.float(), wide.grad, rtol=2**-7, atol=1e-6)


def test_masked_rows():
    student, teacher = logits(), logits(seed=1)
    student[1] = torch.nan  # never read
    labels = torch.tensor([3, -100, 5, -100])
    student.requires_grad_(True)
    loss = kd.distillation_loss(student, teacher, labels=labels, backend="triton")
    loss.backward()
    assert loss.isfinite() and (student.grad[[1, 3]] == 0).all() and student.grad[0].any()
    student.grad = None
    nothing = kd.distillation_loss(student, teacher, labels=labels * 0 - 100, backend="triton")
    nothing.backward()
    assert nothing == 0 and (student.grad == 0).all()


def test_no_rows():
    student = logits(tokens=0).requires_grad_()
    loss = kd.distillation_loss(student, logits(tokens=0), backend="triton")
    loss.backward()
    assert loss == 0 and student.grad.shape == (0, VOCAB)


def test_unaligned_and_strided_rows():
    """Rows that start anywhere, rows with gaps, columns with gaps."""
    wide = logits(VOCAB + 7)
    teacher = logits(VOCAB + 3, seed=1)[:, 3:]
    compare(wide[:, 5 : 5 + VOCAB].detach(), teacher)
    compare(logits(2 * VOCAB)[:, ::2].detach(), logits(TOKENS, tokens=VOCAB).T)


@pytest.mark.parametrize("reduction", ["mean", "sum"])
def test_overwriting(reduction):
    """In place: the gradient stands where the student's logits were."""
    base = logits().requires_grad_()
    options = dict(temperature=2.0, reduction=reduction, backend="triton")
    kd.distillation_loss(base, logits(seed=1), **options).backward()
    want, base.grad = base.grad, None
    student = base * 1.0
    loss = kd.distillation_loss(student, logits(seed=1), overwrite_student_logits=True, **options)
    loss.backward()
    assert torch.equal(base.grad, want)
    assert torch.equal(student.detach(), want)


def test_upstream_and_second_backward():
    student = logits().requires_grad_()
    loss = kd.distillation_loss(student, logits(seed=1), backend="triton")
    (once,) = torch.autograd.grad(3 * loss, student, retain_graph=True)
    (twice,) = torch.autograd.grad(loss, student)
    torch.testing.assert_close(once, 3 * twice)
    with pytest.raises(RuntimeError, match="backward was called twice"):
        loss.backward()


def test_cross_entropy_alone():
    student = logits().requires_grad_()
    loss = kd.cross_entropy(student, LABELS, backend="triton")
    loss.backward()
    wide = student.detach().double().requires_grad_()
    want = torch.nn.functional.cross_entropy(wide, LABELS)
    want.backward()
    torch.testing.assert_close(loss.double(), want, rtol=1e-6, atol=0)
    torch.testing.assert_close(student.grad.double(), wide.grad, rtol=1e-5, atol=1e-8)


def test_refusals():
    with pytest.raises(RuntimeError, match="Triton backend is unavailable: the student is"):
        kd.distillation_loss(logits().double(), logits().double(), backend="triton")
    from kd_kernels.launch import check_logits

    with pytest.raises(TypeError, match="logits must be bfloat16, float16 or float32"):
        check_logits(logits().double())
    with pytest.raises(ValueError, match="unit column stride"):
        check_logits(logits().T)
