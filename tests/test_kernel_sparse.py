"""The sparse row kernel in Triton's interpreter, against the float64 oracle.

A mutation put in here and caught: the stored columns left in the tail's sum.
"""

import pytest
import torch
from kernel_cases import TOKENS, VOCAB, compare, logits
from loss_cases import DIVERGENCES, meaningful

import kd

pytestmark = pytest.mark.filterwarnings("ignore:.*encountered:RuntimeWarning")  # numpy's -inf
TAILS = ("bucket", "renormalize", "drop", "uniform")


def sparse(k: int, tail: str = "bucket", seed: int = 1, **options) -> kd.TopK:
    """Top-k of a teacher, an empty slot and a repeated id where k allows."""
    logprobs, ids = torch.log_softmax(logits(seed=seed), -1).topk(k)
    if k > 2:
        ids[0, 1] = -1
        ids[1, 0] = ids[1, 2]
        logprobs[1, 0] = logprobs[1, 2] = logprobs[1, 2] - 1
    return kd.TopK(ids, logprobs, tail=tail, tail_at_temperature="spread", **options)


@pytest.mark.parametrize("tail", ["bucket", "renormalize", "drop"])
@pytest.mark.parametrize("name", DIVERGENCES)
def test_every_divergence(name, tail):
    if not meaningful(DIVERGENCES[name], tail, 1.0):
        pytest.skip("the library refuses it")
    compare(logits(), sparse(7, tail), divergence=DIVERGENCES[name])


@pytest.mark.parametrize("tail", ["bucket", "renormalize", "uniform"])
@pytest.mark.parametrize("name", ["forward_kl", "jsd(0.5)"])
def test_temperature(name, tail):
    compare(logits(), sparse(7, tail), divergence=DIVERGENCES[name], temperature=2.0)
    compare(logits(), sparse(7, tail, temperature=2.0), divergence=DIVERGENCES[name])


@pytest.mark.parametrize("temperature", [1.0, 1.3, 2.0, 4.0])
@pytest.mark.parametrize("tail", ["bucket", "uniform"])
def test_stored_tails(temperature, tail):
    teacher = sparse(7, tail)
    left = torch.log_softmax(logits(seed=1), -1).scatter(1, teacher.ids.clamp(min=0), -torch.inf)
    stored = torch.stack([(left / t).logsumexp(-1) for t in (1.0, 1.6, 4.0)], -1)
    teacher = kd.TopK(teacher.ids, teacher.logprobs, tail, 1.0, stored, (1.0, 1.6, 4.0))
    slack = 1e-6 if temperature < 2 else 1e-5  # p and q are close there, whatever the tail
    whole = (tail, temperature) == ("bucket", 2.0)
    for divergence in DIVERGENCES.values() if whole else ("forward_kl", "reverse_kl", "jsd"):
        compare(logits(), teacher, divergence=divergence, temperature=temperature, slack=slack)


@pytest.mark.parametrize("k", [1, 2, 3, 31, 32, VOCAB])
def test_sizes(k):
    """One token, a power of two and its neighbours, the whole vocabulary (no tail)."""
    compare(logits(), sparse(k), divergence="forward_kl")
    compare(logits(), sparse(k), divergence=kd.skew_reverse_kl(0.1))


@pytest.mark.parametrize("temperature", [1.0, 2.0])
@pytest.mark.parametrize("tail", ["bucket", "renormalize"])
def test_hard_labels(temperature, tail):
    """Labels among the stored tokens and in the tail."""
    teacher = sparse(7, tail)
    labels = torch.tensor([int(teacher.ids[0, 0]), 64, int(teacher.ids[2, 6]), VOCAB - 1])
    compare(logits(), teacher, temperature=temperature, labels=labels, ce_weight=0.6)


def test_saturated_student():
    """The tail's mass where the stored tokens hold all but 1e-12 of it: nothing is 1 - sum."""
    student, teacher = logits(), sparse(5)
    student.scatter_add_(1, teacher.ids.clamp(min=0), torch.full((TOKENS, 5), 40.0))
    for name in ("forward_kl", "reverse_kl", "jsd(0.5)"):
        compare(student.detach().clone(), teacher, divergence=DIVERGENCES[name])


def test_minus_infinity():
    student, teacher = logits(), sparse(5)
    student[0, ::2] = -torch.inf
    student[0, teacher.ids[0].clamp(min=0)] = 1.0
    student[2, teacher.ids[2, 1]] = -torch.inf
    for name in ("jsd(0.5)", "total_variation", "skew_forward_kl(0.1)"):
        compare(student.detach().clone(), teacher, divergence=DIVERGENCES[name])
    value = kd.forward_kl(student, teacher, reduction="none", backend="triton")
    assert value[2] == torch.inf and value[[0, 1, 3]].isfinite().all()


def test_padding_and_masks():
    """Padded columns and masked rows are not read; their gradient is exactly zero."""
    student, teacher = logits(176), sparse(5)
    student[:, VOCAB:] = torch.nan
    student[1] = torch.nan
    student.requires_grad_(True)
    weights = torch.tensor([1.0, 0.0, 0.5, 2.0])
    options = dict(vocab_size=VOCAB, weights=weights, divergence=kd.jsd(0.3))
    loss = kd.distillation_loss(student, teacher, backend="triton", **options)
    loss.backward()
    assert loss.isfinite()
    assert (student.grad[:, VOCAB:] == 0).all() and (student.grad[1] == 0).all()
    wide = student.detach().nan_to_num(0.0).double().requires_grad_()
    kd.distillation_loss(wide, teacher, backend="reference", **options).backward()
    torch.testing.assert_close(student.grad.double(), wide.grad, rtol=2e-5, atol=1e-7)


def test_softcap_and_scale():
    """Through a projection, whose raw logits the kernel caps and scales."""
    generator = torch.Generator().manual_seed(3)
    hidden, weight = (torch.randn(n, 6, generator=generator) for n in (TOKENS, VOCAB))
    student = kd.Hidden(hidden, weight, logit_scale=1.4, softcap=5.0)
    for teacher in (sparse(7), logits(seed=1)):
        compare(student, teacher, leaves=[hidden, weight], divergence="reverse_kl", slack=3e-6)


def test_narrow_logits():
    student = logits().to(torch.float16)
    wide = student.float().requires_grad_()
    kd.jsd(0.5)(wide, sparse(7), backend="triton").backward()
    student.requires_grad_(True)
    kd.jsd(0.5)(student, sparse(7), backend="triton").backward()
    torch.testing.assert_close(student.grad.float(), wide.grad, rtol=2**-10, atol=1e-6)
