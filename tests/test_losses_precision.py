"""Half precision, near-equal sides, high temperatures: the digits of a loss and of its gradient."""

from unittest import mock

import pytest
import torch
from loss_cases import (
    DIVERGENCES,
    close,
    gradient,
    group_of_one,
    leaf,
    normal,
    normal64,
    relative_error,
    top_k_of,
)

import kd
from kd.losses import chunks

pytestmark = pytest.mark.filterwarnings("ignore:.*encountered:RuntimeWarning")  # numpy's -inf


F64 = torch.float64


BACKENDS = ("torch", "triton")


NAMES = ("forward_kl", "reverse_kl", "jsd", "total_variation", "cross_entropy")


def gradients(loss, leaves, upstream):
    """Of upstream * loss, in float64."""
    return [g.double() for g in torch.autograd.grad(loss * upstream, leaves)]


def loss_of(name, student, teacher, labels, **options):
    if name == "cross_entropy":
        return kd.cross_entropy(student, labels, **options)
    return kd.distillation_loss(student, teacher, divergence=name, **options)


def half_head(seed: int = 0):
    """(hidden, weight, bias, LoRA's A and B) in half precision."""
    shapes = ((32, 8), (60, 8), (60,), (2, 8), (60, 2))
    return [normal(*s, seed=seed + i).mul_(0.5).half() for i, s in enumerate(shapes)]


HOT = [("torch", t, form) for t in (20.0, 1e3, 1e4) for form in ("logits", "uniform", "bucket")]


def answer(student, leaves, teacher, backend, upstream=None, call=kd.distillation_loss, **options):
    losses = call(student, teacher, reduction="none", backend=backend, **options)
    upstream = torch.linspace(0.5, 1.5, len(losses)) if upstream is None else upstream
    gradients = torch.autograd.grad((losses.double() * upstream).sum(), leaves)
    return [losses.detach().double(), *(g.double() for g in gradients)]


def test_bf16_logits_are_normalised_in_float32():
    """A log-sum-exp rounded to bf16 is off by up to 0.06 nats at 22, more than a late loss."""
    z = (22 + 2 * normal64(64, 97)).bfloat16()
    t = (22 + 2 * normal64(64, 97, seed=1)).bfloat16()
    for divergence in (kd.forward_kl, kd.reverse_kl, kd.jsd(0.5)):
        want = divergence(z, t, reduction="none", backend="reference")
        close(divergence(z, t, reduction="none"), want, rtol=1e-4, atol=1e-5)
    labels = torch.arange(64)
    want = kd.cross_entropy(z, labels, reduction="none", backend="reference")
    close(kd.cross_entropy(z, labels, reduction="none"), want, rtol=1e-5)


def test_small_losses_keep_their_digits():
    """Near the end of training log-ratios are the rounding of two log-normalisers; summed as they
    are, reverse KL at a gap of 1e-2 is 30 times less accurate than this."""
    t = (2 * normal64(64, 1000)).float()
    z = t + 1e-2 * normal64(64, 1000, seed=1).float()
    for divergence, teacher, bound in (
        (kd.reverse_kl, t, 5e-4),
        (kd.forward_kl, top_k_of(t, 64), 2e-3),
        (kd.reverse_kl, top_k_of(t, 64), 2e-3),
    ):
        want = divergence(z, teacher, reduction="none", backend="reference")
        error = (divergence(z, teacher, reduction="none") - want).abs().max() / want.max()
        assert error < bound


def test_lm_head_gradient_accumulates_in_float32():
    """In bf16 a sum stops growing at 256 equal terms: long batches train the lm_head too little."""
    rows = 2048
    hidden = torch.ones(rows, 2, dtype=torch.bfloat16)
    weight = torch.tensor([[0.5, 0.0], [0.0, 0.5], [0.25, 0.0]]).bfloat16().requires_grad_()
    labels = torch.zeros(rows, dtype=torch.long)
    with mock.patch.object(chunks, "BUDGET", 8):
        loss = kd.cross_entropy(kd.Hidden(hidden, weight), labels, reduction="sum")
    one = kd.cross_entropy(kd.Hidden(hidden[:1], weight), labels[:1], backend="reference")
    close(gradient(loss, weight), rows * gradient(one, weight).double(), rtol=0.01)


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("backend", BACKENDS)
def test_half_logits_under_a_loss_scale(backend, name):
    """8,192 rows of 1,000 tokens scaled by 32,768: a fifth of the gradient was zero."""
    rows, vocab, upstream = 64, 100, 32768.0
    z, t = torch.zeros(rows, vocab).half(), normal(rows, vocab, seed=1)
    labels = torch.arange(rows) % vocab
    options = dict(num_items=8192 * 10)  # as small as in the large batch
    found = []
    for made, which in ((z, backend), (z.double(), "reference")):
        leaf = made.clone().requires_grad_()
        loss = loss_of(name, leaf, t.to(made.dtype), labels, backend=which, **options)
        found += gradients(loss, [leaf], upstream)
    assert bool((found[0] != 0).sum() >= (found[1].half() != 0).sum())
    assert relative_error(*found) < 1e-3


@pytest.mark.parametrize("reduction", ["mean", "none"])
@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("backend", BACKENDS)
def test_half_hidden_states_under_a_loss_scale(backend, name, reduction):
    """Hidden states, lm_head, bias and LoRA: 4,096 rows of 8,000 tokens were off by 0.59."""
    t, labels, upstream = normal(32, 60, seed=9), torch.arange(32) % 60, 65536.0
    found = []
    for dtype, which in ((torch.float16, backend), (torch.float64, "reference")):
        leaves = [x.to(dtype).requires_grad_() for x in half_head()]
        hidden, weight, bias, a, b = leaves
        student = kd.Hidden(hidden, weight, bias=bias, lora=(a, b, 0.5), logit_scale=0.5)
        weights = torch.linspace(0, 1e-4, 32)  # small beside one, as 1 / N is
        options = dict(weights=weights, reduction=reduction, backend=which, temperature=1.0)
        options |= dict(num_items=1.0) if reduction == "mean" else {}
        if name == "cross_entropy":
            options.pop("temperature")
        loss = loss_of(name, student, t.to(dtype), labels, **options).double().sum()
        found.append(gradients(loss, leaves, upstream))
    for got, want in zip(*found, strict=True):
        assert relative_error(got, want) < 4e-3


@pytest.mark.parametrize("form", ["logits", "hidden"])
@pytest.mark.parametrize("backend", BACKENDS)
def test_half_gradients_are_finite_where_the_scaled_ones_are(backend, form):
    """The loss scale itself is past float16: it must meet 1 / N before it meets the gradient."""
    hidden, weight, *_ = half_head()
    leaves = [hidden.requires_grad_(), weight.requires_grad_()]
    student = kd.Hidden(*leaves)
    if form == "logits":
        leaves = [(hidden @ weight.T).detach().requires_grad_()]
        student = leaves[0]
    loss = kd.forward_kl(student, normal(32, 60, seed=9), num_items=4096, backend=backend)
    assert all(bool(g.isfinite().all()) for g in gradients(loss, leaves, 65536.0))


@pytest.mark.parametrize("form", ["logits", "hidden"])
def test_half_vocabulary_shards(form):
    found = []
    t = normal(32, 60, seed=9)
    with group_of_one():
        for dtype in (torch.float16, torch.float64):
            hidden, weight = (x.to(dtype).requires_grad_() for x in half_head()[:2])
            leaves, student = [hidden, weight], kd.Hidden(hidden, weight)
            if form == "logits":
                leaves = [(hidden @ weight.T).detach().half().to(dtype).requires_grad_()]
                student = leaves[0]
            make = kd.vocab_parallel_loss if dtype == torch.float16 else kd.distillation_loss
            loss = make(student, t.to(dtype), num_items=1 << 19)
            found.append(gradients(loss, leaves, 65536.0))
    for got, want in zip(*found, strict=True):
        assert relative_error(got, want) < 4e-3


@pytest.mark.parametrize("keep", [False, True])
@pytest.mark.parametrize(
    ("backend", "dtype"),  # Triton's interpreter cuts off what bfloat16 does not hold
    [("torch", torch.bfloat16), ("torch", torch.float16), ("triton", torch.float16)],
)
def test_upstream_gradients_are_not_rounded_to_the_logits(backend, dtype, keep):
    """A third of a loss, as of three microbatches, was the third that bfloat16 holds (0.2 %)."""
    z, t = normal(8, 90).to(dtype), normal(8, 90, seed=1)
    found = []
    for made, which in ((z, backend), (z.double(), "reference")):
        leaf = made.clone().requires_grad_()
        loss = kd.forward_kl(leaf, t.to(made.dtype), backend=which) / 3
        loss.backward(retain_graph=keep)
        found.append(leaf.grad.double())
    bias = (found[0].abs().sum() / found[1].abs().sum() - 1).abs()
    assert bias < 4e-4  # rounding of single entries is even


def test_half_logits_may_be_overwritten_and_their_backward_repeated():
    z, t = normal(6, 40).half(), normal(6, 40, seed=1).half()
    want = z.clone().requires_grad_()
    kd.forward_kl(want, t).backward()
    leaf = z.clone().requires_grad_()
    loss = kd.forward_kl(leaf * 1, t, overwrite_student_logits=True)
    first = torch.autograd.grad(loss, leaf, retain_graph=True)[0]
    second = torch.autograd.grad(loss, leaf)[0]
    assert torch.equal(first, want.grad) and torch.equal(second, want.grad)


@pytest.mark.parametrize(
    ("backend", "gap"),  # at 1e-4 the ties lie below float32's resolution, whoever computes
    [("torch", 1.0), ("torch", 1e-2), ("torch", 1e-4), ("triton", 1.0), ("triton", 1e-2)],
)
def test_total_variation_is_as_good_as_a_softmax(backend, gap):
    """Signs flipped at near-ties: 7e-4 where a float32 softmax is off by 2e-7."""
    rows, vocab = (8, 32_000) if backend == "torch" else (4, 4_000)
    t = normal(rows, vocab, scale=3.0)
    z = t + gap * normal(rows, vocab, seed=1)

    def by_hand(dtype):
        leaf = z.to(dtype).requires_grad_()
        q, p = torch.softmax(leaf, -1), torch.softmax(t.to(dtype), -1)
        return torch.autograd.grad(0.5 * (q - p).abs().sum(), leaf)[0].double()

    leaf = z.clone().requires_grad_()
    loss = kd.total_variation(leaf, t, reduction="sum", backend=backend)
    got, want = torch.autograd.grad(loss, leaf)[0].double(), by_hand(torch.float64)
    plain = relative_error(by_hand(torch.float32), want)
    assert relative_error(got, want) <= 2 * plain + 2e-6


@pytest.mark.parametrize(
    ("backend", "temperature", "teacher"),
    [*HOT, ("triton", 1e3, "logits"), ("triton", 1e3, "bucket")],
)
@pytest.mark.parametrize("name", DIVERGENCES)
def test_high_temperatures(backend, name, teacher, temperature):
    """Forward KL was off by a tenth at T = 1000; value and gradient, T**2 included."""
    z, t = normal(4, 150, scale=2.0), normal(4, 150, seed=1, scale=2.0)
    if teacher != "logits":  # of that temperature: what is captured at another has lost its digits
        logprobs, ids = torch.log_softmax(t.double() / temperature, -1).topk(20)
        t = kd.TopK(ids, logprobs, tail=teacher, temperature=temperature)
    options = dict(divergence=DIVERGENCES[name], temperature=temperature)
    leaf, wide = z.clone().requires_grad_(), z.double().requires_grad_()
    got = answer(leaf, [leaf], t, backend, **options)
    want = answer(wide, [wide], t.double() if teacher == "logits" else t, "reference", **options)
    # Log-probabilities that a float32 holds to 5e-7 differ by 1 / T: sparse targets in Triton.
    slack = 1e-5 if teacher == "logits" else 5e-6 * temperature
    assert relative_error(got[0], want[0]) < slack
    assert relative_error(got[1], want[1]) < slack


@pytest.mark.parametrize("name", ["forward_kl", "reverse_kl", "jsd(0.5)"])
@pytest.mark.parametrize("backend", BACKENDS)
def test_high_temperatures_over_shards(backend, name):
    z, t = normal(4, 150, scale=2.0), normal(4, 150, seed=1, scale=2.0)
    options = dict(divergence=DIVERGENCES[name], temperature=1000.0)
    leaf, wide = z.clone().requires_grad_(), z.double().requires_grad_()
    with group_of_one():
        got = answer(leaf, [leaf], t, backend, call=kd.vocab_parallel_loss, **options)
    want = answer(wide, [wide], t.double(), "reference", **options)
    for one, other in zip(got, want, strict=True):
        assert relative_error(one, other) < 1e-5


@pytest.mark.parametrize("name", ["forward_kl", "reverse_kl", "adaptive_kl"])
def test_the_oracle_reaches_past_where_exp_underflows(name):
    """Logits 1e4 apart: the loss is thousands of nats, not +inf."""
    teacher = normal64(4, 9, seed=1)
    z = (normal64(4, 9) * 1e4).requires_grad_()
    divergence = kd.Divergence(name)
    losses = [divergence(z, teacher, reduction="none", backend=b) for b in ("torch", "reference")]
    assert bool(losses[1].isfinite().all())
    torch.testing.assert_close(*losses, rtol=1e-9, atol=1e-9)
    gradients = [torch.autograd.grad(x.sum(), z)[0] for x in losses]
    torch.testing.assert_close(*gradients, rtol=1e-9, atol=1e-9)


def test_autocast_on_a_cpu_casts_hidden_states_of_another_dtype():
    hidden, weight = (
        normal64(3, 4).bfloat16(),
        normal64(5, 4, seed=1).float(),
    )
    z, t = (
        hidden.double() @ weight.double().T,
        normal64(3, 5, seed=2).float(),
    )
    with torch.autocast("cpu", torch.bfloat16):
        student = kd.forward_kl(kd.Hidden(hidden, weight), t)
        teacher = kd.forward_kl(t, kd.Hidden(hidden, weight))
        with pytest.raises(ValueError, match="with one H"):
            kd.forward_kl(kd.Hidden(hidden, weight[:, :3]), t)
    torch.testing.assert_close(student.double(), kd.forward_kl(z, t).double(), rtol=5e-2, atol=0)
    torch.testing.assert_close(teacher.double(), kd.forward_kl(t, z).double(), rtol=5e-2, atol=0)


@pytest.mark.parametrize("exponents", [(1.0, 1e-3), (1e-3, 1.0), (1.0, 1e-6), (1e-6, 1.0)])
def test_alpha_beta_near_its_limits_in_float32(exponents):
    """Large terms that cancel, divided by a small exponent: errors of 1e-4 to 0.3 nats."""
    z = normal64(64, 500)
    t, made = z + 0.3 * normal64(64, 500, seed=1), []
    for dtype in (torch.float64, torch.float32):
        x = z.float().to(dtype).requires_grad_()
        loss = kd.alpha_beta(*exponents)(x, t.float().to(dtype), reduction="none")
        made.append((loss.detach().double(), torch.autograd.grad(loss.sum(), x)[0].double()))
    (loss, gradient), (loss32, gradient32) = made
    assert (loss32 - loss).abs().max() < 2e-6 * loss.abs().max()
    assert (gradient32 - gradient).abs().max() < 2e-6 * gradient.abs().max()


def test_autocast_runs_the_matmul_in_its_dtype():
    hidden, weight, t = leaf(5, 4), leaf(9, 4), torch.randn(5, 9)
    with torch.autocast("cpu", torch.bfloat16):
        loss = kd.forward_kl(kd.Hidden(hidden, weight), t)
    assert loss.dtype == torch.float32
    grads = torch.autograd.grad(loss, [hidden, weight])
    assert [g.dtype for g in grads] == [torch.float32] * 2
    exact = torch.autograd.grad(kd.forward_kl(kd.Hidden(hidden, weight), t), [hidden, weight])
    torch.testing.assert_close(grads, exact, rtol=0.1, atol=0.02)
