"""Faults that adversaries found in the losses, each as its input and relatives of its kind.

Half precision under a loss scale, one row of a padded vocabulary, tensors changed between forward
and backward, denominators that are none, rows without a distribution.
"""

import contextlib
import tempfile

import pytest
import torch
from loss_cases import relative_error

import kd

pytestmark = pytest.mark.filterwarnings("ignore:.*encountered:RuntimeWarning")  # numpy's -inf
BACKENDS = ("torch", "triton")
EVERY = ("torch", "triton", "reference")
NAMES = ("forward_kl", "reverse_kl", "jsd", "total_variation", "cross_entropy")


def normal(*shape: int, seed: int = 0, scale: float = 1.0) -> torch.Tensor:
    return scale * torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


@contextlib.contextmanager
def group_of_one():
    with tempfile.TemporaryDirectory() as folder:
        store = f"file://{folder}/store"
        torch.distributed.init_process_group("gloo", init_method=store, rank=0, world_size=1)
        try:
            yield
        finally:
            torch.distributed.destroy_process_group()


def loss_of(name, student, teacher, labels, **options):
    if name == "cross_entropy":
        return kd.cross_entropy(student, labels, **options)
    return kd.distillation_loss(student, teacher, divergence=name, **options)


def gradients(loss, leaves, upstream):
    """Of upstream * loss, in float64."""
    return [g.double() for g in torch.autograd.grad(loss * upstream, leaves)]


# --- half precision under a loss scale ------------------------------------------------------------


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


def half_head(seed: int = 0):
    """(hidden, weight, bias, LoRA's A and B) in half precision."""
    shapes = ((32, 8), (60, 8), (60,), (2, 8), (60, 2))
    return [normal(*s, seed=seed + i).mul_(0.5).half() for i, s in enumerate(shapes)]


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


# --- one row of a padded vocabulary ---------------------------------------------------------------


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


# --- changed between forward and backward ---------------------------------------------------------


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


# --- denominators ---------------------------------------------------------------------------------


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


# --- rows without a distribution ------------------------------------------------------------------


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
