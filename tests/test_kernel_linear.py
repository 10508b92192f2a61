"""The fused linear form through the kernels: hidden states and lm_heads in, no [N, V] tensor.

Against the float64 oracle in Triton's interpreter; reduced losses make their gradients in forward,
unreduced ones in backward. Chunks of two tokens unless a test says otherwise.
"""

import inspect

import pytest
import torch
from kernel_cases import TOKENS, VOCAB, compare, logits, some
from loss_cases import DIVERGENCES, normal

import kd
from kd.losses import api, chunks, fused, rows_triton

pytestmark = pytest.mark.filterwarnings("ignore:.*encountered:RuntimeWarning")  # numpy's -inf
HIDDEN, TEACHER_HIDDEN, RANK = 6, 9, 2
LABELS = torch.tensor([0, 63, -100, VOCAB - 1])


@pytest.fixture(autouse=True)
def small_chunks(monkeypatch):
    """Room for two tokens' logits and their gradient."""
    monkeypatch.setattr(chunks, "INTERPRETER_BYTES", VOCAB * 10 * 2)


def student(dtype=torch.float32, **options):
    """(kd.Hidden, its leaves); the lm_head has six padded rows."""
    hidden = normal(TOKENS, HIDDEN, seed=1).to(dtype)
    weight = normal(VOCAB + 6, HIDDEN, seed=2).to(dtype)
    leaves = [hidden, weight]
    if "bias" in options:
        options["bias"] = normal(VOCAB + 6, seed=3).to(dtype)
        leaves.append(options["bias"])
    if "lora" in options:
        a, b = normal(RANK, HIDDEN, seed=4).to(dtype), normal(VOCAB + 6, RANK, seed=5).to(dtype)
        options["lora"] = (a, b, 0.7)
        leaves += [a, b]
    return kd.Hidden(hidden, weight, **options), leaves


def teacher(form, dtype=torch.float32):
    if form == "logits":
        return logits(VOCAB + 2, seed=7).to(dtype)
    if form == "hidden":
        weight = normal(VOCAB, TEACHER_HIDDEN, seed=9).to(dtype)
        hidden = normal(TOKENS, TEACHER_HIDDEN, seed=8).to(dtype)
        return kd.Hidden(hidden, weight, logit_scale=0.8, softcap=5.0)
    logprobs, ids = torch.log_softmax(logits(seed=7), -1).topk(5)
    ids[0, 1], ids[1, 0] = -1, ids[1, 2]
    logprobs[1, :3] -= 1
    return kd.TopK(ids, logprobs, tail=form, tail_at_temperature="spread")


OPTIONS = {
    "plain": {},
    "bias": dict(bias=True),
    "lora": dict(lora=True),
    "everything": dict(bias=True, lora=True, logit_scale=1.3, softcap=6.0),
}


@pytest.mark.parametrize("options", OPTIONS)
@pytest.mark.parametrize("form", ["logits", "hidden", "bucket", "uniform"])
def test_forms(form, options):
    """Every teacher; biases, LoRA on the lm_head, scales and caps; unreduced, any upstream."""
    source, leaves = student(**OPTIONS[options])
    loss = dict(divergence=kd.jsd(0.3), temperature=1.5, vocab_size=VOCAB)
    compare(source, teacher(form), leaves=leaves, slack=3e-6, **loss)


@pytest.mark.parametrize("name", some(DIVERGENCES, lambda n: "kl" in n and "(" not in n))
def test_every_divergence(name):
    source, leaves = student()
    compare(source, teacher("hidden"), leaves=leaves, divergence=DIVERGENCES[name], slack=3e-6,
            vocab_size=VOCAB)  # fmt: skip


def reduced(source, leaves, target, backend, upstream=3.0, **options):
    """[loss, gradients] of a reduced loss under an upstream gradient."""
    for leaf in leaves:
        leaf.grad = None
    loss = kd.distillation_loss(source, target, backend=backend, vocab_size=VOCAB, **options)
    (upstream * loss).backward()
    return [loss.detach().double()] + [None if t.grad is None else t.grad.double() for t in leaves]


@pytest.mark.parametrize("form", ["logits", "hidden", "bucket", "uniform"])
@pytest.mark.parametrize("options", [dict(reduction="sum"), dict(num_items=7.0), {}])
def test_reduced(form, options):
    """Gradients made in forward, two chunks, a masked row packed out, weights, hard labels."""
    source, leaves = student(bias=True, lora=True)
    leaves = [leaf.requires_grad_(True) for leaf in leaves]
    weights = torch.tensor([0.5, 2.0, 1.0, 1.5])
    options = dict(labels=LABELS, ce_weight=0.4, weights=weights, temperature=2.0, **options)
    want = reduced(source, leaves, teacher(form), "reference", **options)
    found = reduced(source, leaves, teacher(form), "triton", **options)
    for got, right in zip(found, want, strict=True):
        torch.testing.assert_close(got, right, rtol=2e-5, atol=2e-6 * float(right.abs().max()))
    assert (leaves[0].grad[2] == 0).all() and (leaves[1].grad[VOCAB:] == 0).all()


def test_masked_rows_are_never_projected(monkeypatch):
    """Packed out before the first matmul: NaN there does no harm, and no row of it is computed."""
    source, leaves = student()
    source.hidden[2] = torch.nan
    rows = []
    project = fused.project

    def counted(source, inputs, *rest):
        rows.append(len(inputs[0]))
        return project(source, inputs, *rest)

    monkeypatch.setattr(fused, "project", counted)
    leaves = [leaf.requires_grad_(True) for leaf in leaves]
    found = reduced(source, leaves, teacher("logits"), "triton", labels=LABELS)
    assert all(value.isfinite().all() for value in found) and sum(rows) == 3
    rows.clear()
    nothing = reduced(source, leaves, teacher("logits"), "triton", labels=LABELS * 0 - 100)
    assert nothing[0] == 0 and (nothing[2] == 0).all() and sum(rows) == 0


def test_chunks_agree():
    """One chunk or many: the same gradients, dW accumulated."""
    source, leaves = student(bias=True)
    leaves = [leaf.requires_grad_(True) for leaf in leaves]
    many = reduced(source, leaves, teacher("hidden"), "triton")
    chunks.INTERPRETER_BYTES = 1 << 20
    one = reduced(source, leaves, teacher("hidden"), "triton")
    for a, b in zip(many, one, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-5, atol=1e-7)


@pytest.mark.parametrize("reduction", ["mean", "none"])
def test_frozen_lm_head(reduction, monkeypatch):
    """No dW is made, none allocated; LoRA's factors still learn."""
    source, (hidden, weight, a, b) = student(lora=True)
    for leaf in (hidden, a, b):
        leaf.requires_grad_(True)
    made = []
    allocate = fused.allocate_gradients
    monkeypatch.setattr(
        fused, "allocate_gradients", lambda *given: made.append(allocate(*given)) or made[-1]
    )
    loss = kd.distillation_loss(
        source, teacher("logits"), reduction=reduction, vocab_size=VOCAB, backend="triton"
    )
    loss.sum().backward()
    assert weight.grad is None and a.grad.abs().sum() > 0 and b.grad.abs().sum() > 0
    _, of_weight, _, of_b, _ = made[-1]
    assert of_weight is None and of_b.shape == b.shape
    loss = kd.distillation_loss(
        kd.Hidden(hidden.detach(), weight), teacher("logits"), vocab_size=VOCAB, backend="triton"
    )
    assert not loss.requires_grad


@pytest.mark.parametrize("form", ["hidden", "bucket"])
def test_narrow(form):
    """bfloat16 hidden states and lm_head: as close to the oracle as one rounding allows.

    The allowance is the torch backend's own error, twice, which includes its bf16 logits.
    """
    source, leaves = student(torch.bfloat16)
    leaves = [leaf.requires_grad_(True) for leaf in leaves]
    target = teacher(form, torch.bfloat16)
    want = reduced(source, leaves, target, "reference")
    plain = reduced(source, leaves, target, "torch")
    found = reduced(source, leaves, target, "triton")
    assert leaves[1].grad.dtype == torch.bfloat16
    for got, other, right in zip(found, plain, want, strict=True):
        bound = 2 * (other - right).abs().max() + 2**-8 * right.abs().max()
        assert (got - right).abs().max() <= bound


def test_second_backward():
    source, leaves = student()
    for leaf in leaves:
        leaf.requires_grad_(True)
    loss = kd.distillation_loss(source, teacher("logits"), vocab_size=VOCAB, backend="triton")
    once = torch.autograd.grad(loss * 2.0, leaves, retain_graph=True)
    again = torch.autograd.grad(loss, leaves)
    for a, b in zip(once, again, strict=True):
        torch.testing.assert_close(a, 2 * b)
    with pytest.raises(RuntimeError, match="backward was called twice"):
        loss.backward()


def test_backward_reads_no_value(monkeypatch):
    """Scaling by the upstream gradient happens on the device: nothing becomes a Python number."""
    source, leaves = student()
    for leaf in leaves:
        leaf.requires_grad_(True)
    loss = kd.distillation_loss(source, teacher("hidden"), vocab_size=VOCAB, backend="triton")
    upstream = torch.tensor(2.0)

    def refuse(*_):
        raise AssertionError("a host sync")

    scaled = []
    monkeypatch.setattr("kd_kernels.scale.scale_", lambda g, f: scaled.append(g) or g.mul_(f))
    for name in ("item", "__bool__", "__float__", "tolist", "nonzero"):
        monkeypatch.setattr(torch.Tensor, name, refuse)
    loss.backward(upstream)
    monkeypatch.undo()
    assert len(scaled) == 2


def test_no_rows():
    source, _ = student()
    none = kd.Hidden(source.hidden[:0].requires_grad_(True), source.weight.requires_grad_(True))
    loss = kd.distillation_loss(none, logits(VOCAB + 6)[:0], vocab_size=VOCAB, backend="triton")
    loss.backward()
    assert loss == 0 and (none.weight.grad == 0).all()


def test_cross_entropy():
    """The fused SFT loss: one matmul forward, no teacher."""
    source, leaves = student(softcap=4.0)
    leaves = [leaf.requires_grad_(True) for leaf in leaves]
    found = []
    for backend in ("triton", "reference"):
        for leaf in leaves:
            leaf.grad = None
        loss = kd.cross_entropy(source, LABELS, vocab_size=VOCAB, backend=backend)
        loss.backward()
        found.append([loss.detach().double()] + [leaf.grad.double() for leaf in leaves])
    for got, right in zip(*found, strict=True):
        torch.testing.assert_close(got, right, rtol=2e-5, atol=1e-6 * float(right.abs().max()))


def test_one_host_sync():
    """Packing takes the backend's one, and none under torch.compile; logits take none."""
    source = inspect.getsource(api.autograd.counted)
    assert source.count(".nonzero()") == 1
    for module in (fused, rows_triton):
        source = inspect.getsource(module)
        assert not any(word in source for word in (".nonzero()", ".item()", ".tolist()", "bool("))
