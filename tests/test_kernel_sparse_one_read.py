"""The sparse kernel of the cluster schedule in Triton's interpreter: a cluster as one program.

What a cluster adds (reductions through distributed shared memory, registers) is for the
compile-time checks.
"""

import contextlib

import pytest
import torch
from kernel_cases import TOKENS, VOCAB, compare, logits, some
from loss_cases import DIVERGENCES, meaningful
from test_kernel_sparse import sparse

import kd
from kd_kernels import launch

pytestmark = pytest.mark.filterwarnings("ignore:.*encountered:RuntimeWarning")  # numpy's -inf
SHAPES = {"one": launch.OneRead(1, 1, 256), "two": launch.OneRead(1, 1, 128, 64)}


@contextlib.contextmanager
def forced(name):
    launch.forced_shapes.append(SHAPES[name])
    try:
        yield
    finally:
        launch.forced_shapes.pop()


EVERY = [(name, tail) for tail in ("bucket", "renormalize", "drop") for name in DIVERGENCES]


@pytest.mark.parametrize(
    ("name", "tail"), some(EVERY, lambda n, t: t == "bucket" or n in ("forward_kl", "jsd(0.5)"))
)
def test_every_divergence(name, tail):
    if not meaningful(DIVERGENCES[name], tail, 1.0):
        pytest.skip("the library refuses it")
    with forced("two" if tail == "bucket" else "one"):
        compare(logits(), sparse(7, tail), divergence=DIVERGENCES[name], temperature=1.0)


@pytest.mark.parametrize("segments", SHAPES)
@pytest.mark.parametrize("temperature", [1.0, 2.0])
def test_hard_labels(segments, temperature):
    """Labels among the stored tokens, in the tail, in each segment."""
    teacher = sparse(7)
    labels = torch.tensor([int(teacher.ids[0, 0]), 64, int(teacher.ids[2, 6]), VOCAB - 1])
    with forced(segments):
        compare(logits(), teacher, temperature=temperature, labels=labels, ce_weight=0.6)


@pytest.mark.parametrize("k", [1, 2, 31, 32, VOCAB])
def test_sizes(k):
    """One token, a word of marks and its neighbour, the whole vocabulary (no tail)."""
    with forced("two"):
        compare(logits(), sparse(k), divergence=kd.skew_reverse_kl(0.1))


def test_options():
    """Padding, masked rows, -inf, a saturated student, a soft cap; in place."""
    student, teacher = logits(176), sparse(5)
    student[:, VOCAB:] = torch.nan
    student[1] = torch.nan
    student[0, 3:90:2] = -torch.inf
    student[0, teacher.ids[0].clamp(min=0)] = 1.0
    student[2].scatter_add_(0, teacher.ids[2], torch.full((5,), 40.0))
    weights = torch.tensor([1.0, 0.0, 0.5, 2.0])
    options = dict(vocab_size=VOCAB, weights=weights, divergence=kd.jsd(0.3))
    wide = student.nan_to_num(0.0, neginf=-torch.inf).double().requires_grad_()
    kd.distillation_loss(wide, teacher, backend="reference", **options).backward()
    for overwrite in (False, True):
        leaf = student.clone().requires_grad_(True)
        with forced("two"):
            loss = kd.distillation_loss(
                leaf * 1.0, teacher, backend="triton", overwrite_student_logits=overwrite, **options
            )
        loss.backward()
        assert (leaf.grad[:, VOCAB:] == 0).all() and (leaf.grad[1] == 0).all()
        torch.testing.assert_close(leaf.grad.double(), wide.grad, rtol=2e-5, atol=2e-7)


def test_softcap_and_scale():
    generator = torch.Generator().manual_seed(3)
    hidden, weight = (torch.randn(n, 6, generator=generator) for n in (TOKENS, VOCAB))
    student = kd.Hidden(hidden, weight, logit_scale=1.4, softcap=5.0)
    with forced("two"):
        compare(student, sparse(7), leaves=[hidden, weight], divergence="reverse_kl", slack=3e-6)


def test_choice():
    """One row takes half the registers of two: smaller clusters, and Gemma's vocabulary."""
    hopper, ampere = launch.Target("cuda", 90), launch.Target("cuda", 80)
    rows = torch.empty(4, 262_144, dtype=torch.bfloat16, device="meta")

    def choice(vocab, target=hopper):
        return launch.one_read_shape(rows, None, rows, vocab, target)

    assert choice(32_000).blocks == 2 and choice(131_072).blocks == 8
    assert choice(151_936).second == 32_768 and choice(262_144).blocks == 16
    assert choice(262_145) is None and choice(32_000, ampere) is None
