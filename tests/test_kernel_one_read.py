"""The cluster schedule's kernel in Triton's interpreter, which runs a cluster as one program.

What a cluster adds (reductions through distributed shared memory, registers) is for the
compile-time checks.
"""

import contextlib

import pytest
import torch
from kernel_cases import VOCAB, compare, logits, some
from loss_cases import DIVERGENCES

import kd
from kd_kernels import launch

pytestmark = pytest.mark.filterwarnings("ignore:.*encountered:RuntimeWarning")  # numpy's -inf
SHAPES = {"one": launch.OneRead(1, 1, 256), "two": launch.OneRead(1, 1, 128, 64)}


@contextlib.contextmanager
def forced(name: str):
    launch.forced_shapes.append(SHAPES[name])
    try:
        yield
    finally:
        launch.forced_shapes.pop()


EVERY = [(name, segments) for name in DIVERGENCES for segments in SHAPES]


@pytest.mark.parametrize(
    ("name", "segments"), some(EVERY, lambda n, s: s == "two" or n in ("forward_kl", "jsd(0.5)"))
)
def test_every_divergence(name, segments):
    with forced(segments):
        compare(logits(), logits(seed=1), divergence=DIVERGENCES[name], temperature=1.5)


@pytest.mark.parametrize("segments", SHAPES)
@pytest.mark.parametrize("temperature", [1.0, 2.0])
def test_options(segments, temperature):
    """Hard labels, padding, masked rows, -inf, a lower bound."""
    student, teacher = logits(176), logits(160, seed=1)
    student[:, VOCAB:], teacher[:, VOCAB:] = torch.nan, torch.inf
    student[3, :VOCAB:3] = teacher[3, :VOCAB:3] = -torch.inf
    labels = torch.tensor([0, -100, VOCAB - 1, 130])
    options = dict(labels=labels, ce_weight=0.5, vocab_size=VOCAB, temperature=temperature)
    with forced(segments):
        compare(student.detach().clone(), teacher, divergence=kd.jsd(0.5), **options)
        compare(
            student.detach().clone(), teacher, divergence="reverse_kl", min_logprob=-9.0, **options
        )


def test_collapsed_and_equal():
    student, teacher = logits(), logits(seed=1)
    student[:, 140] += 200.0
    teacher[:2, 140] += 200.0
    with forced("two"):
        for name in ("forward_kl", "reverse_kl", "jsd(0.5)"):
            compare(student.detach().clone(), teacher, divergence=DIVERGENCES[name], slack=3e-6)
        same = teacher.clone().requires_grad_()
        kd.forward_kl(same, teacher, backend="triton").backward()
        assert (same.grad == 0).all()


def test_choice():
    """Clusters grow with the vocabulary; where they cannot be, two passes."""
    hopper, ampere = launch.Target("cuda", 90), launch.Target("cuda", 80)
    rows = torch.empty(4, 262_144, dtype=torch.bfloat16, device="meta")

    def choice(vocab, target=hopper, tensor=rows):
        return launch.one_read_shape(tensor, tensor, tensor, vocab, target)

    assert choice(32_000).blocks == 4 and choice(131_072).blocks == 16
    assert choice(151_936).second == 32_768
    assert choice(262_144) is None and choice(32_000, ampere) is None
    assert choice(32_000, launch.Target("hip")) is None
    assert choice(1000, tensor=torch.empty(4, 1001, device="meta")) is None
