"""Row blocks on the losses' own threads: the same numbers, nothing left changed, safe anywhere."""

import concurrent.futures
import multiprocessing
import os
import subprocess
import sys
import threading

import pytest
import torch

import kd
from kd.losses import rows_torch

pytestmark = pytest.mark.skipif(rows_torch._openmp() is None, reason="no OpenMP to be found")


@pytest.fixture(autouse=True)
def two_threads():
    """Of this thread's OpenMP alone."""
    before = torch.get_num_threads()
    torch.set_num_threads(2)
    yield
    torch.set_num_threads(before)


def inputs(rows: int = 24, vocab: int = 60_000, dtype: torch.dtype = torch.float32):
    g = torch.Generator().manual_seed(0)
    z, t = (2 * torch.randn(rows, vocab, generator=g) for _ in range(2))
    return z.to(dtype), t.to(dtype)


def answer(z, t, **options):
    leaf = z.clone().requires_grad_()
    loss = kd.distillation_loss(leaf, t, **options)
    (gradient,) = torch.autograd.grad(loss.sum(), leaf)
    return loss.detach(), gradient


def teacher(form, t):
    if form == "logits":
        return t
    if form == "sparse":
        logprobs, ids = torch.log_softmax(t, -1).topk(8)
        return kd.TopK(ids, logprobs, tail_at_temperature="spread")
    return kd.Hidden(t[:, :4].contiguous(), t[:4].T.contiguous())


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64])
@pytest.mark.parametrize("form", ["logits", "sparse", "hidden"])
@pytest.mark.parametrize("name", ["forward_kl", "jsd", "adaptive_kl"])
def test_two_threads_give_what_one_gives(name, form, dtype, monkeypatch):
    """To the bit: a row is one thread's. Masked rows, hard labels and another temperature too."""
    z, t = inputs(dtype=dtype)
    labels = torch.arange(len(z)).masked_fill(torch.arange(len(z)) % 5 == 0, -100)
    options = dict(divergence=name, labels=labels, ce_weight=0.5, temperature=2.0)
    used = set()
    original = threading.Thread.start
    monkeypatch.setattr(threading.Thread, "start", lambda self: (used.add(self), original(self))[1])
    many = answer(z, teacher(form, t), **options)
    assert used, "no helper was started"
    torch.set_num_threads(1)
    torch.testing.assert_close(many, answer(z, teacher(form, t), **options), rtol=0, atol=0)


def test_fused_linear_on_two_threads():
    g = torch.Generator().manual_seed(0)
    hidden, weight = torch.randn(40, 16, generator=g), torch.randn(60_000, 16, generator=g)
    found = []
    for count in (2, 1):
        torch.set_num_threads(count)
        leaves = [hidden.clone().requires_grad_(), weight.clone().requires_grad_()]
        loss = kd.forward_kl(kd.Hidden(*leaves), inputs(rows=40)[1])
        found.append([loss.detach(), *torch.autograd.grad(loss, leaves)])
    torch.testing.assert_close(*found, rtol=1e-5, atol=1e-7)  # matmuls add in another order


def test_the_number_of_threads_stays_everyone_s():
    """Of this thread, of one started after, and after an error in a block."""
    z, t = inputs()

    def seen():
        with concurrent.futures.ThreadPoolExecutor(1) as pool:
            return torch.get_num_threads(), pool.submit(torch.get_num_threads).result()

    before = seen()
    answer(z, t)
    assert seen() == before == (2, 2)

    def begin():
        def work(first, last):
            raise KeyError(first)

        return work

    with pytest.raises(KeyError):
        rows_torch.spread(8, 1, begin, torch.device("cpu"))
    assert seen() == before


@pytest.mark.parametrize("failing", [0, 5, 7])
def test_an_error_in_any_block_is_raised(failing):
    done = []

    def begin():
        def work(first, last):
            if first == failing:
                raise ValueError(f"block {first}")
            done.append(first)

        return work

    with pytest.raises(ValueError, match=f"block {failing}"):
        rows_torch.spread(8, 1, begin, torch.device("cpu"))
    assert failing not in done


def test_every_row_is_computed_once_where_no_thread_may_be_started(monkeypatch):
    def refuse(self):
        raise RuntimeError("can't start new thread")

    monkeypatch.setattr(threading.Thread, "start", refuse)
    done = []
    rows_torch.spread(7, 2, lambda: lambda a, b: done.append((a, b)), torch.device("cpu"))
    assert done == [(0, 2), (2, 4), (4, 6), (6, 7)]


def test_user_threads_at_once():
    z, t = inputs()
    want = answer(z, t)
    with concurrent.futures.ThreadPoolExecutor(3) as pool:
        for got in pool.map(lambda _: answer(z, t), range(6)):
            torch.testing.assert_close(got, want, rtol=0, atol=0)


@pytest.mark.parametrize("mode", [torch.inference_mode, torch.no_grad])
def test_without_gradients(mode):
    z, t = inputs()
    want = answer(z, t)[0]
    with mode():
        assert torch.equal(kd.forward_kl(z.clone(), t.clone()), want)


def test_dispatch_modes_see_every_operation():
    """A mode is a thread's own: under one, nothing goes to another thread."""
    from torch.utils._python_dispatch import TorchDispatchMode

    class Counting(TorchDispatchMode):
        seen = 0

        def __torch_dispatch__(self, function, types, arguments=(), options=None):
            Counting.seen += "softmax" in str(function)
            return function(*arguments, **(options or {}))

    z, t = inputs()
    with Counting():
        assert rows_torch.threads(torch.device("cpu")) == 1
        kd.forward_kl(z, t)
    assert Counting.seen >= 2


def test_under_torch_compile():
    z, t = inputs(rows=12)
    step = torch.compile(lambda z: kd.forward_kl(z * 1.0, t), backend="eager")
    leaf = z.clone().requires_grad_()
    (gradient,) = torch.autograd.grad(step(leaf), leaf)
    torch.testing.assert_close(gradient, answer(z, t)[1], rtol=1e-5, atol=1e-9)


def test_a_spawned_child():
    context = multiprocessing.get_context("spawn")
    z, t = inputs(rows=12)
    with concurrent.futures.ProcessPoolExecutor(1, mp_context=context) as pool:
        found = pool.submit(_child, z.numpy(), t.numpy()).result(timeout=120)
    assert found == pytest.approx(float(kd.forward_kl(z, t)), rel=1e-6)


def _child(z, t):
    torch.set_num_threads(2)
    return float(kd.forward_kl(torch.from_numpy(z), torch.from_numpy(t)))


# In an interpreter of its own, which is ended if it waits: this is the very thing it asks about.
FORKING = """
import os, torch, kd
from os import fork
torch.set_num_threads(2)
z, t = (torch.randn(24, 60_000, generator=torch.Generator().manual_seed(i)) for i in (0, 1))
want = float(kd.forward_kl(z, t))
pid = fork()
if pid == 0:
    os._exit(0 if float(kd.forward_kl(z, t)) == want else 3)
assert os.waitpid(pid, 0)[1] == 0
"""


@pytest.mark.skipif(not hasattr(os, "fork"), reason="no fork")
def test_a_forked_child():
    """A child has its parent's OpenMP without its threads: a parallel region waits for ever."""
    done = subprocess.run([sys.executable, "-c", FORKING], capture_output=True, timeout=120)
    assert done.returncode == 0, done.stderr
