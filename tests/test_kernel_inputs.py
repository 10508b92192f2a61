"""Inputs that kernels must take or refuse: far rows, no rows, old Triton, GPUs they do not know.

Widths that are no whole vectors, unaligned and strided rows: test_kernel_dense.py.
"""

import logging

import kernel_cases  # noqa: F401  before any kernel
import pytest
import torch
from kernel_cases import TOKENS, VOCAB, logits

import kd
from kd_kernels import launch

pytestmark = pytest.mark.filterwarnings("ignore:.*encountered:RuntimeWarning")  # numpy's -inf
FAR = 1_200_000_000  # elements between rows: the third row starts past 2**31


def far_rows(tmp_path, values, name):
    """``values`` [3, V] whose rows lie FAR apart, in a file that is all hole."""
    size = 2 * FAR + values.shape[1]
    flat = torch.from_file(str(tmp_path / name), shared=True, size=size, dtype=values.dtype)
    return flat.as_strided(values.shape, (FAR, 1)).copy_(values)


@pytest.mark.parametrize("form", ["logits", "sparse"])
@pytest.mark.parametrize("clusters", [False, True])
def test_far_rows(tmp_path, monkeypatch, form, clusters):
    """N * V > 2**31: 64-bit offsets in reading and in writing, whichever the schedule."""
    if clusters:
        monkeypatch.setattr(launch, "forced_shapes", [launch.OneRead(1, 1, 256)])
    near, teacher = logits(tokens=3).half(), logits(tokens=3, seed=1).half()
    logprobs, ids = torch.log_softmax(teacher.float(), -1).topk(4)
    options = dict(backend="triton", divergence="reverse_kl", temperature=2.0)
    want = near.clone().requires_grad_(True)
    target = kd.TopK(ids, logprobs, tail_at_temperature="spread") if form == "sparse" else teacher
    kd.distillation_loss(want * 1.0, target, **options).backward()
    student = far_rows(tmp_path, near, "student")
    student.requires_grad_(True)
    scratch = far_rows(tmp_path, near, "scratch")
    if form == "logits":
        target = far_rows(tmp_path, teacher, "teacher")
    loss = kd.distillation_loss(
        Overwritten.apply(student, scratch), target, overwrite_student_logits=True, **options
    )
    loss.backward()
    assert torch.equal(scratch, want.grad)  # written where the logits were
    assert torch.equal(student.grad, want.grad)


class Overwritten(torch.autograd.Function):
    """A model's output that lies where it is told to."""

    @staticmethod
    def forward(ctx, values, where):
        return where

    @staticmethod
    def backward(ctx, gradient):
        return gradient, None


def hopper_shape(vocab=32_000):
    row = torch.empty(4, vocab, dtype=torch.bfloat16, device="meta")
    return launch.one_read_shape(row, row, row, vocab, launch.Target("cuda", 90))


def test_old_triton_falls_back(monkeypatch, caplog):
    """No cluster reductions before 3.8: two passes, said once in a debug log."""
    launch._say_once.cache_clear()
    monkeypatch.setattr(launch.triton, "__version__", "3.7.1")
    with caplog.at_level(logging.DEBUG, logger="kd_kernels"):
        assert hopper_shape() is None and hopper_shape() is None
    assert [r.message for r in caplog.records] == [
        "triton 3.7.1 has no cluster reductions (3.8 has): two passes"
    ]
    monkeypatch.setattr(launch.triton, "__version__", "3.10.0+git1234")
    assert hopper_shape() is not None  # as numbers, not as text


def test_unaligned_rows_fall_back(caplog):
    launch._say_once.cache_clear()
    with caplog.at_level(logging.DEBUG, logger="kd_kernels"):
        assert hopper_shape(1001) is None and hopper_shape(1001) is None
    assert [r.message for r in caplog.records] == ["rows are not aligned to 16 bytes: two passes"]


@pytest.mark.parametrize("target", [("cuda", 75), ("cuda", 89), ("cuda", 120), ("hip", 0)])
def test_gpus_without_clusters(target):
    """Turing, Ada, consumer Blackwell, AMD: the schedule that any GPU runs."""
    row = torch.empty(4, 32_000, dtype=torch.bfloat16, device="meta")
    assert launch.one_read_shape(row, row, row, 32_000, launch.Target(*target)) is None


def test_no_gpu(monkeypatch):
    """By name it is refused with the reason; "auto" takes the torch backend."""
    monkeypatch.setattr(launch, "INTERPRETING", False)
    with pytest.raises(RuntimeError, match="unavailable: the student is on cpu. Move it to a GPU"):
        kd.forward_kl(logits(), logits(seed=1), backend="triton")
    assert kd.forward_kl(logits(), logits(seed=1), backend="auto") > 0


@pytest.mark.parametrize("dtype", [torch.float64, torch.float8_e4m3fn, torch.int32])
def test_dtypes_refused(dtype):
    with pytest.raises(TypeError, match="logits must be bfloat16, float16 or float32"):
        launch.check_logits(torch.zeros(2, 4).to(dtype))


def test_columns_apart_refused():
    """Kernels take raw logits: columns must lie side by side."""
    with pytest.raises(ValueError, match="unit column stride"):
        launch.check_logits(logits(2 * VOCAB)[:, ::2])


def test_no_rows_of_a_sparse_teacher():
    student = logits(tokens=0).requires_grad_()
    teacher = kd.TopK(torch.zeros(0, 3, dtype=torch.long), torch.zeros(0, 3))
    loss = kd.distillation_loss(student, teacher, backend="triton")
    loss.backward()
    assert loss == 0 and student.grad.shape == (0, VOCAB)


def test_labels_of_masked_rows_are_not_read():
    """ignore_index lies outside the vocabulary: no address is made of it."""
    student = logits().requires_grad_()
    labels = torch.tensor([3, -(2**40), 5, -(2**40)])
    options = dict(labels=labels, ignore_index=-(2**40), ce_weight=1.0, backend="triton")
    loss = kd.distillation_loss(student, logits(seed=1), **options)
    loss.backward()
    assert loss.isfinite() and (student.grad[1::2] == 0).all() and len(labels) == TOKENS
