"""What an attack on the public functions found: each test fails without its repair."""

import pytest
import torch

import kd


def leaf(*shape: int, seed: int = 0) -> torch.Tensor:
    made = torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)
    return made.requires_grad_()


def test_a_second_derivative_is_refused_and_not_dropped():
    """A gradient penalty silently left out of the loss."""
    z, t = leaf(3, 5), leaf(3, 5, seed=1).detach()
    (gradient,) = torch.autograd.grad(kd.forward_kl(z, t), z, create_graph=True)
    with pytest.raises(RuntimeError, match="differentiated once"):
        gradient.square().sum().backward()


def test_rows_without_upstream_gradient_do_not_poison_the_others():
    """0 * inf: a row that the caller left out of a sum of per-token losses."""
    z = leaf(3, 5)
    bad = z.masked_fill(torch.tensor([[False], [True], [False]]), torch.inf)
    losses = kd.forward_kl(bad, leaf(3, 5, seed=1).detach(), reduction="none")
    (gradient,) = torch.autograd.grad(losses[0] + losses[2], z)
    assert bool(gradient.isfinite().all())


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
        kd.distillation_loss(leaf(3, 5), leaf(3, 5, seed=1).detach(), **options)


@pytest.mark.parametrize("dtype", [torch.int32, torch.int16, torch.uint8])
def test_narrow_integer_labels(dtype):
    z, labels = leaf(3, 5), torch.tensor([0, 4, 2])
    same = kd.cross_entropy(z, labels.to(dtype))
    torch.testing.assert_close(same, kd.cross_entropy(z, labels))


def test_numbers_of_a_hidden_must_be_numbers():
    scale = torch.tensor(2.0, requires_grad=True)
    student = kd.Hidden(leaf(3, 4), leaf(5, 4, seed=1), logit_scale=scale)
    with pytest.raises(TypeError, match="would get no gradient"):
        kd.cross_entropy(student, torch.tensor([0, 1, 2]))


def test_expanded_logits_are_not_overwritten():
    z = (leaf(1, 5) * 1).expand(3, 5)
    with pytest.raises(ValueError, match="expanded"):
        kd.distillation_loss(z, leaf(3, 5, seed=1).detach(), overwrite_student_logits=True)


@pytest.mark.parametrize("backend", ["torch", "reference"])
def test_a_stored_row_without_entries_says_nothing(backend):
    teacher = kd.TopK(torch.full((2, 3), -1), torch.full((2, 3), -torch.inf), tail="renormalize")
    z = leaf(2, 5)
    loss = kd.distillation_loss(z, teacher, backend=backend)
    (gradient,) = torch.autograd.grad(loss, z)
    assert bool(loss.isfinite()) and bool(gradient.isfinite().all())


def test_divergences_made_by_hand_are_checked():
    with pytest.raises(ValueError, match="beta in"):
        kd.losses.Divergence("jsd", beta=1.5)
    with pytest.raises(ValueError, match="name must be one of"):
        kd.losses.Divergence("forwardkl")


def test_transforms_of_torch_func_are_refused():
    teacher = leaf(3, 5, seed=1).detach()
    with pytest.raises(RuntimeError, match="torch.func"):
        torch.func.grad(lambda z: kd.forward_kl(z, teacher))(leaf(3, 5).detach())


def test_meta_tensors_are_refused():
    z = torch.empty(3, 5, device="meta")
    with pytest.raises(ValueError, match="memory"):
        kd.distillation_loss(z, z)


@pytest.mark.parametrize("name", ["forward_kl", "reverse_kl", "adaptive_kl"])
def test_the_oracle_reaches_past_where_exp_underflows(name):
    """Logits 1e4 apart: the loss is thousands of nats, not +inf."""
    teacher = leaf(4, 9, seed=1).detach()
    z = (leaf(4, 9).detach() * 1e4).requires_grad_()
    divergence = kd.Divergence(name)
    losses = [divergence(z, teacher, reduction="none", backend=b) for b in ("torch", "reference")]
    assert bool(losses[1].isfinite().all())
    torch.testing.assert_close(*losses, rtol=1e-9, atol=1e-9)
    gradients = [torch.autograd.grad(x.sum(), z)[0] for x in losses]
    torch.testing.assert_close(*gradients, rtol=1e-9, atol=1e-9)


def test_autocast_on_a_cpu_casts_hidden_states_of_another_dtype():
    hidden, weight = leaf(3, 4).detach().bfloat16(), leaf(5, 4, seed=1).detach().float()
    z, t = hidden.double() @ weight.double().T, leaf(3, 5, seed=2).detach().float()
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
    z = leaf(64, 500).detach()
    t, made = z + 0.3 * leaf(64, 500, seed=1).detach(), []
    for dtype in (torch.float64, torch.float32):
        x = z.float().to(dtype).requires_grad_()
        loss = kd.alpha_beta(*exponents)(x, t.float().to(dtype), reduction="none")
        made.append((loss.detach().double(), torch.autograd.grad(loss.sum(), x)[0].double()))
    (loss, gradient), (loss32, gradient32) = made
    assert (loss32 - loss).abs().max() < 2e-6 * loss.abs().max()
    assert (gradient32 - gradient).abs().max() < 2e-6 * gradient.abs().max()
