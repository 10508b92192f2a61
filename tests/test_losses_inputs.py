"""Bad input is refused by name, with its value."""

import pytest
import torch
from loss_cases import leaf, leaf64, normal, normal64

import kd

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
    z, t = leaf(3, 6), normal(3, 6, seed=1)
    before = z.detach().clone()
    with pytest.raises(error, match=message):
        call(z, t)
    assert torch.equal(z.detach(), before)


@pytest.mark.parametrize(
    "change, message",
    [
        (dict(weights=torch.ones(3, requires_grad=True)), "weights must not require a gradient"),
        (dict(num_items=torch.ones(2)), "num_items must be one number"),
        (dict(labels=[1, 2, 3]), "labels must be a tensor"),
        (dict(vocab_size=True), "vocab_size must be an integer"),
    ],
)
def test_arguments_that_were_taken_silently(change, message):
    options = {"labels": torch.tensor([0, 1, 2]), "ce_weight": 0.5, **change}
    with pytest.raises((TypeError, ValueError), match=message):
        kd.distillation_loss(
            leaf64(3, 5),
            normal64(3, 5, seed=1),
            **options,
        )


@pytest.mark.parametrize("dtype", [torch.int32, torch.int16, torch.uint8])
def test_narrow_integer_labels(dtype):
    z, labels = leaf64(3, 5), torch.tensor([0, 4, 2])
    same = kd.cross_entropy(z, labels.to(dtype))
    torch.testing.assert_close(same, kd.cross_entropy(z, labels))


def test_numbers_of_a_hidden_must_be_numbers():
    scale = torch.tensor(2.0, requires_grad=True)
    student = kd.Hidden(leaf64(3, 4), leaf64(5, 4, seed=1), logit_scale=scale)
    with pytest.raises(TypeError, match="would get no gradient"):
        kd.cross_entropy(student, torch.tensor([0, 1, 2]))


def test_divergences_made_by_hand_are_checked():
    with pytest.raises(ValueError, match="beta in"):
        kd.losses.Divergence("jsd", beta=1.5)
    with pytest.raises(ValueError, match="name must be one of"):
        kd.losses.Divergence("forwardkl")


def test_meta_tensors_are_refused():
    z = torch.empty(3, 5, device="meta")
    with pytest.raises(ValueError, match="memory"):
        kd.distillation_loss(z, z)
