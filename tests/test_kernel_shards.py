"""Vocabulary shards over 2 and 4 ranks (gloo, CPU), both backends, against the float64 oracle.

Values, gradients, and the number of collectives.
"""

import functools
import os
import pathlib
import subprocess
import sys
import tempfile

import kernel_cases  # noqa: F401  before any kernel
import pytest
import shard_cases
import torch
from loss_cases import group_of_one
from shard_cases import RANKS, WIDTH, cases

import kd

pytestmark = pytest.mark.filterwarnings("ignore:.*encountered:RuntimeWarning")  # numpy's -inf
TESTS = pathlib.Path(__file__).resolve().parent


EACH = [(ranks, name) for ranks in RANKS for name in cases(ranks)]


@functools.cache
def every_rank():
    """{(ranks, rank): what that rank found, case by case}."""
    environment = dict(os.environ, TRITON_INTERPRET="1", OMP_NUM_THREADS="1")
    environment["PYTHONPATH"] = os.pathsep.join([str(TESTS), *sys.path])
    with tempfile.TemporaryDirectory() as folder:
        command = [sys.executable, "-W", "ignore", str(TESTS / "shard_ranks.py"), folder]
        done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=300)
        assert done.returncode == 0, done.stderr
        files = {(n, r): f"{folder}/{n}.{r}" for n in RANKS for r in range(n)}
        return {key: torch.load(file, weights_only=False) for key, file in files.items()}


def found(ranks):
    return [every_rank()[ranks, rank] for rank in range(ranks)]


def want(case):
    """The oracle's losses and gradients of the whole vocabulary."""
    student, teacher, leaves, options = shard_cases.whole(case)
    for leaf in leaves:
        leaf.requires_grad_(True)
    teacher = student.detach() if teacher is None else teacher
    loss = kd.distillation_loss(student, teacher, backend="reference", **options)
    (loss * shard_cases.upstream(loss)).sum().backward()
    return loss.detach(), [leaf.grad for leaf in leaves]


def joined(case, grads):
    """Every rank's gradients as those of the whole tensors."""
    if case.student == "logits":
        return [torch.cat([g[0] for g in grads], -1)]
    hidden, a = grads[0][0], grads[0][3]
    for other in grads[1:]:  # the same on every rank
        assert torch.equal(other[0], hidden) and torch.equal(other[3], a)
    weight, bias, b = (torch.cat([g[i] for g in grads]) for i in (1, 2, 4))
    return [hidden, weight, bias, a, b]


def check(case, backend, ranks_found):
    losses = [f[0] for f in ranks_found]
    assert all(torch.equal(losses[0], other) for other in losses[1:])  # to the bit
    value, gradients = want(case)
    bound = 1e-12 if case.dtype == torch.float64 else 3e-6
    slack = 4e-4 if case.change == "far" else bound  # logits of 3,000 are rounded to 2e-4
    finite = value.isfinite()
    assert torch.equal(losses[0].double()[~finite], value[~finite])
    error = (losses[0].double() - value)[finite].abs().max()
    assert error <= slack * (1 + value[finite].abs().max()), f"loss: {error:.2e}"
    for i, (got, right) in enumerate(
        zip(joined(case, [f[1] for f in ranks_found]), gradients, strict=True)
    ):
        rows = finite.reshape(-1) if case.student == "logits" and finite.ndim else slice(None)
        error = (got - right)[rows].abs().max()
        assert error <= slack * right[rows].abs().max() + slack / 10, f"gradient {i}: {error:.2e}"
    if case.student == "logits":
        assert (joined(case, [f[1] for f in ranks_found])[0][:, shard_cases.VOCAB :] == 0).all()


@pytest.mark.parametrize(("ranks", "name"), EACH)
def test_against_the_oracle(ranks, name):
    case = cases(ranks)[name]
    for backend in case.backends:
        check(case, backend, [rank[name, backend] for rank in found(ranks)])


@pytest.mark.parametrize(("ranks", "name"), EACH)
def test_collectives(ranks, name):
    """One SUM all-reduce, or two; never a MAX; in backward the hidden states' own alone."""
    case = cases(ranks)[name]
    hidden = 2 if case.student == "hidden" else 0  # hidden @ weight.T and LoRA's low rank
    later = case.options.get("reduction") == "none"
    for rank in found(ranks):
        for backend in case.backends:
            _, _, forward, backward = rank[name, backend]
            assert set(forward + backward) <= {"SUM"}
            assert len(forward) == case.collectives + (0 if later else hidden)
            assert len(backward) == (hidden if later else 0)


@pytest.fixture
def one_rank():
    with group_of_one():
        yield


def test_refusals(one_rank):
    z = torch.zeros(2, WIDTH)
    with pytest.raises(ValueError, match="vocab_size must be given with first_token"):
        kd.vocab_parallel_loss(z, z, first_token=0)
    with pytest.raises(ValueError, match="teacher must be sharded as the student is"):
        kd.vocab_parallel_loss(z, z[:, :-1])
    with pytest.raises(ValueError, match="divergence must be one whose sums are"):
        kd.vocab_parallel_loss(z, z, divergence="adaptive_kl")
    with pytest.raises(ValueError, match="backend must be auto, torch or triton"):
        kd.vocab_parallel_loss(z, z, backend="reference")
    with pytest.raises(ValueError, match="vocab_size must be an integer between 1 and"):
        kd.vocab_parallel_loss(z, z, vocab_size=WIDTH + 1)
    with pytest.raises(ValueError, match="teacher must be given"):
        kd.vocab_parallel_loss(z, None)
    ids = torch.zeros(2, WIDTH + 1, dtype=torch.long)
    with pytest.raises(ValueError, match="more than the 40 live tokens"):
        kd.vocab_parallel_loss(z, kd.TopK(ids, ids.float()))


@pytest.mark.parametrize("form", ["dense", "sparse"])
@pytest.mark.parametrize("name", ["forward_kl", "reverse_kl", "jsd"])
def test_one_shard_is_the_plain_loss(name, form):
    """The shards' kernels on the whole vocabulary, in this process: the mutations run here."""
    g = torch.Generator().manual_seed(3)
    z, t = (2 * torch.randn(3, 150, generator=g) for _ in range(2))
    logprobs, ids = torch.log_softmax(t, -1).topk(4)
    teacher = t if form == "dense" else kd.TopK(ids, logprobs, tail_at_temperature="spread")
    labels = torch.tensor([0, -100, 149])
    options = dict(divergence=name, temperature=2.0, labels=labels, ce_weight=0.5)
    found = []
    with group_of_one():
        for loss in (kd.vocab_parallel_loss, kd.distillation_loss):
            leaf = z.clone().requires_grad_(True)
            value = loss(leaf, teacher, backend="triton", **options)
            value.backward()
            found.append((value.detach(), leaf.grad))
    torch.testing.assert_close(found[0], found[1], rtol=1e-5, atol=1e-6)


def test_a_shard_of_padding(one_rank):
    """A rank without live columns adds nothing and gets a gradient of zero."""
    z = torch.randn(3, WIDTH, requires_grad=True)
    t = torch.randn(3, WIDTH)
    kd.vocab_parallel_loss(z, t, first_token=WIDTH, vocab_size=WIDTH).backward()
    assert (z.grad == 0).all()


def test_without_process_group():
    z = torch.zeros(2, WIDTH)
    with pytest.raises(RuntimeError, match="torch.distributed must be initialised"):
        kd.vocab_parallel_loss(z, z)
