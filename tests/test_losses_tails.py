"""The tail at another temperature than the capture's, against full logits in float64."""

import math
import re

import pytest
import torch
from loss_cases import (
    DIVERGENCES,
    close,
    gradient,
    leaf,
    leaf64,
    normal,
    normal64,
    top_k_of,
)

import kd
from kd.losses.oracle import divergence_of


def both(student, loss):
    leaf = student.clone().requires_grad_()
    value = loss(leaf)
    (gradient,) = torch.autograd.grad(value.sum(), leaf)
    return value.detach(), gradient


VOCAB, K = 400, 8
STEP = 1 / 448  # of the cache


TEMPERATURES = tuple(16 / n for n in (16, 15, 13, 10, 7, 5, 4))  # what a capture stores by default


def captured(
    logits: torch.Tensor, k: int = K, at: float = 1.0, temperatures=TEMPERATURES, **options
) -> kd.TopK:
    """The top k of logits at a temperature, tails in steps as a cache holds them."""
    log_p = (logits / at).log_softmax(-1)
    top = log_p.topk(k)
    left = log_p.scatter(1, top.indices, -torch.inf)
    tails = torch.stack([(left * (at / t)).logsumexp(-1) for t in temperatures], -1)
    tails = torch.where(tails == -torch.inf, tails, (tails / STEP).round() * STEP)
    return kd.TopK(
        top.indices,
        top.values.float(),
        temperature=at,
        tail_log_partition=tails.float(),
        tail_temperatures=temperatures,
        **options,
    )


def exact(student, logits, ids, temperature, divergence):
    """K + 1 outcomes of both sides from their full logits; the oracle's definition on them."""
    losses = []
    for z, t, kept in zip(student, logits, ids, strict=True):
        sides = []
        for side in (t, z):
            log_p = (side / temperature).log_softmax(-1)
            rest = [j for j in range(log_p.numel()) if j not in set(kept.tolist())]
            tail = log_p[rest].logsumexp(0) if rest else log_p.new_tensor(-torch.inf)
            sides.append(torch.cat([log_p[kept], tail[None]]))
        log_p, log_q = sides
        live = len(log_p) if rest else len(log_p) - 1
        losses.append(divergence_of(divergence, log_p[:live], log_q[:live], None))
    return torch.stack(losses)


def rows(name: str) -> torch.Tensor:
    """Teacher logits [N, VOCAB] float64 of one kind."""
    g = torch.Generator().manual_seed(3)
    noise = torch.randn(5, VOCAB, generator=g, dtype=torch.float64)
    if name == "usual":
        return 2 * noise
    if name == "saturated":
        noise[:, 7] += 40
        return noise
    if name == "flat":
        return 0 * noise
    if name == "two tokens":  # the others are impossible
        noise[:, K + 2 :] = -torch.inf
        return 3 * noise
    assert name == "zipf"
    return -1.2 * torch.arange(1, VOCAB + 1, dtype=torch.float64).log().expand(5, -1) + 0 * noise


def student_logits(seed=5):
    g = torch.Generator().manual_seed(seed)
    return 2 * torch.randn(5, VOCAB, generator=g, dtype=torch.float64)


F64 = torch.float64


INF = float("inf")


@pytest.mark.parametrize("name", ["usual", "saturated", "flat", "two tokens", "zipf"])
@pytest.mark.parametrize("at", [1.0, 2.0, 0.7])
def test_any_temperature_between_is_that_of_full_logits(name, at):
    logits, student = rows(name), student_logits()
    teacher = captured(logits, at=at)
    for temperature in (1.0, 1.1, 1.5, 2.0, 2.9, 4.0):
        for d in DIVERGENCES.values():
            if name == "two tokens" and d.needs_teacher_support:
                continue  # +inf either way: the impossible tokens are the student's tail
            if d.name == "adaptive_kl" and name == "flat":
                continue  # ties at the edge of its head are decided by rounding
            want, want_g = both(
                student, lambda z, d=d, t=temperature: exact(z, logits, teacher.ids, t, d)
            )
            got, got_g = both(
                student,
                lambda z, d=d, t=temperature: kd.distillation_loss(
                    z, teacher, divergence=d, temperature=t, scale_by_t2=False, reduction="none"
                ),
            )
            where = f"{d} at {temperature}"
            slack = 1e-3 * max(1.0, float(want.abs().max()))
            assert (got - want).abs().max() < slack, where
            assert (got_g - want_g).abs().max() < 1e-3, where


@pytest.mark.parametrize("k", [1, K, VOCAB - 5, VOCAB - 1, VOCAB])
def test_any_number_of_tokens_up_to_the_whole_vocabulary(k):
    logits, student = rows("usual"), student_logits()
    teacher = captured(logits, k)
    for temperature in (1.3, 2.0, 3.7):
        want, want_g = both(
            student, lambda z, t=temperature: exact(z, logits, teacher.ids, t, kd.forward_kl)
        )
        got, got_g = both(
            student,
            lambda z, t=temperature: kd.forward_kl(z, teacher, temperature=t, reduction="none"),
        )
        torch.testing.assert_close(got, want, atol=2e-3, rtol=1e-3)
        torch.testing.assert_close(got_g, want_g, atol=1e-3, rtol=0)


@pytest.mark.parametrize("tail", ["bucket", "uniform"])
@pytest.mark.parametrize("temperature", [1.0, 1.6, 2.3])
def test_the_backends_agree(tail, temperature):
    student, teacher = student_logits(), captured(rows("usual"), tail=tail)
    found = {}
    for backend in ("torch", "reference"):
        found[backend] = both(
            student,
            lambda z, b=backend: kd.distillation_loss(
                z, teacher, divergence="jsd", temperature=temperature, reduction="none", backend=b
            ),
        )
    for got, want in zip(found["torch"], found["reference"], strict=True):
        torch.testing.assert_close(got, want, rtol=1e-5, atol=1e-7)


def test_at_a_stored_temperature_it_is_the_stored_value_and_order_does_not_matter():
    logits, student = rows("usual"), student_logits()
    teacher = captured(logits)
    turned = captured(logits, temperatures=TEMPERATURES[::-1])
    alone = captured(logits, temperatures=(1.6,))
    losses = [kd.forward_kl(student, t, temperature=1.6) for t in (teacher, turned, alone)]
    torch.testing.assert_close(losses[0], losses[1])
    torch.testing.assert_close(losses[0], losses[2])


def test_rows_without_entries_say_nothing_at_any_temperature():
    teacher = captured(rows("usual"))
    ids, tails = teacher.ids.clone(), teacher.tail_log_partition.clone()
    ids[1:], tails[1:] = -1, 0
    logprobs = torch.where(ids < 0, -torch.inf, teacher.logprobs)
    for fill in (0.0, -3.0, -torch.inf):
        tails[2:] = fill
        empty = kd.TopK(ids, logprobs, "bucket", 1.0, tails, TEMPERATURES)
        losses = kd.forward_kl(student_logits(), empty, temperature=2.0, reduction="none")
        assert losses[0] > 0 and losses[1:].abs().max() < 1e-12, fill


@pytest.mark.parametrize(
    "options, temperature",
    [
        ({}, 2.0),
        ({}, 0.5),
        ({"temperature": 2.0}, 1.0),
        ({"stored": (1.0, 2.0)}, 2.5),
        ({"stored": (2.0, 4.0)}, 1.5),
    ],
)
def test_another_temperature_is_refused_unless_a_rule_is_named(options, temperature):
    options = dict(options)
    stored = options.pop("stored", None)
    logits, student = rows("usual"), student_logits()
    full = captured(logits, at=options.get("temperature", 1.0), temperatures=stored or (3.0,))
    kept = (full.tail_log_partition, full.tail_temperatures) if stored else (None, ())
    with pytest.raises(ValueError, match=r"captured at .*1\.44.*tail_at_temperature='spread'"):
        kd.forward_kl(student, kd.TopK(full.ids, full.logprobs, "bucket", full.temperature, *kept),
                      temperature=temperature)  # fmt: skip
    p = full.logprobs.double().exp()
    left, ratio = 1 - p.sum(-1, keepdim=True), full.temperature / temperature
    for rule, many in (("spread", VOCAB - K), ("one_outcome", 1)):
        teacher = kd.TopK(full.ids, full.logprobs, "bucket", full.temperature, *kept, rule)
        moved = torch.cat([p**ratio, many * (left / many) ** ratio], -1)
        moved = moved / moved.sum(-1, keepdim=True)
        q = (student / temperature).softmax(-1)
        mine = q.gather(1, full.ids)
        mine = torch.cat([mine, 1 - mine.sum(-1, keepdim=True)], -1)
        want = (moved * (moved / mine).log()).sum(-1).mean()
        got = kd.forward_kl(student, teacher, temperature=temperature)
        torch.testing.assert_close(got, want, rtol=1e-4, atol=1e-5)


def test_modes_that_say_all_they_need_take_another_temperature():
    ids, logprobs = captured(rows("usual")).ids, captured(rows("usual")).logprobs
    for tail in ("renormalize", "uniform"):
        assert kd.forward_kl(student_logits(), kd.TopK(ids, logprobs, tail), temperature=2.0) > 0
    with pytest.raises(ValueError, match="dropped mass cannot be renormalised"):
        kd.forward_kl(student_logits(), kd.TopK(ids, logprobs, "drop"), temperature=2.0)


@pytest.mark.parametrize(
    "change, words",
    [
        (dict(tail_temperatures=()), "1 to 16 different temperatures"),
        (dict(tail_temperatures=(1.0,) * 7), "1 to 16 different temperatures"),
        (dict(tail_temperatures=(1.0, 2.0)), r"\[\.\.\., M\] .* each of the 2 .* got \(5, 7\)"),
        (dict(tail_temperatures=(0.0, *TEMPERATURES[1:])), "must be finite and > 0"),
        (dict(tail_temperatures=("1", *TEMPERATURES[1:])), "must be a number"),
        (dict(tail_log_partition=None), "tail_log_partition must be a tensor"),
        (dict(tail_log_partition=torch.zeros(4, 7)), r"got \(4, 7\) beside ids \(5, 8\)"),
        (dict(tail_log_partition=torch.zeros(5, 7).long()), "must be floating point"),
        (dict(tail_log_partition=torch.full((5, 7), math.nan)), "finite, or -inf"),
        (dict(tail_log_partition=torch.full((5, 7), math.inf)), "finite, or -inf"),
        (dict(tail_log_partition=torch.zeros(5, 7, requires_grad=True)), "not require a gradient"),
        (dict(tail="renormalize"), "must come with a tail, got tail='renormalize'"),
        (dict(tail="drop"), "must come with a tail, got tail='drop'"),
        (dict(tail_at_temperature="uniform"), "must be one of spread, one_outcome or None"),
    ],
)
def test_what_is_no_stored_tail_is_refused(change, words):
    given = {**vars(captured(rows("usual"))), **change}
    with pytest.raises((TypeError, ValueError), match=words):
        kd.forward_kl(student_logits(), kd.TopK(**given), temperature=1.0)


def test_leading_shapes_and_precision():
    teacher, student = captured(rows("usual")), student_logits()
    shaped = kd.TopK(
        teacher.ids.view(1, 5, K),
        teacher.logprobs.view(1, 5, K),
        tail_log_partition=teacher.tail_log_partition.view(1, 5, -1),
        tail_temperatures=TEMPERATURES,
    )
    for dtype, tolerance in ((torch.float32, 1e-5), (torch.bfloat16, 3e-2)):
        got = kd.forward_kl(student.to(dtype).view(1, 5, VOCAB), shaped, temperature=2.0)
        want = kd.forward_kl(student.to(dtype).double(), teacher, temperature=2.0)
        torch.testing.assert_close(got.double(), want, rtol=tolerance, atol=tolerance)
    assert re.search("tail_log_partition", kd.TopK.__doc__)


def test_student_mass_outside_the_top_k_costs():
    """Renormalised over its top-k on both sides, a loss cannot see mass the student puts outside:
    +8 on every other logit left it unchanged."""
    z, t = normal64(3, 40), 2 * normal64(3, 40, seed=1)
    outside = torch.ones(3, 40, dtype=torch.bool).scatter_(1, t.topk(8).indices, False)
    dense = kd.forward_kl(z + 8 * outside, t) - kd.forward_kl(z, t)
    for teacher in (top_k_of(t, 8), top_k_of(t, 8, tail="uniform")):
        rise = kd.forward_kl(z + 8 * outside, teacher) - kd.forward_kl(z, teacher)
        assert rise > 0.9 * dense > 1
        student = z.clone().requires_grad_()
        grad = gradient(kd.forward_kl(student, teacher, reduction="sum"), student)
        assert grad[outside].abs().min() > 0


def test_raw_mass_loss_is_not_clamped_at_zero():
    """sum p (log p - log q) over part of the outcomes is negative where the student holds more of
    them than the teacher; clamped, its gradient is lost."""
    p = torch.tensor([[0.3, 0.2]], dtype=F64)
    z = torch.tensor([[3.0, 2.5, 0.0, 0.0, 0.0]], dtype=F64).requires_grad_()
    teacher = kd.TopK(torch.tensor([[0, 1]]), p.log(), tail="drop")
    loss = kd.forward_kl(z, teacher)
    q = z.detach().softmax(-1)
    close(loss, (p * (p / q[:, :2]).log()).sum())
    assert loss < -0.1
    want = 0.5 * q - torch.cat([p, torch.zeros(1, 3)], 1)  # mass of p times q, minus p
    close(gradient(loss, z), want)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_tail_stays_finite_where_the_student_saturates(dtype):
    """log(1 - sum q) is log 0 once the student is sure; the tail must be summed by itself."""
    z = torch.full((1, 50), -30.0).to(dtype)
    z[0, 3] = 30.0
    z.requires_grad_()
    teacher = kd.TopK(torch.tensor([[3, 4]]), torch.tensor([[0.6, 0.2]]).log())
    for divergence in (kd.forward_kl, kd.reverse_kl, kd.jsd(0.3)):
        want, got = (divergence(z, teacher, backend=name) for name in ("reference", "torch"))
        close(got.detach(), want.detach(), rtol=1e-5)
        want_grad, got_grad = gradient(want, z), gradient(got, z)
        assert got_grad.isfinite().all()
        close(got_grad, want_grad, rtol=1e-2 if dtype == torch.bfloat16 else 1e-4, atol=1e-9)


def test_saturated_teacher_has_a_tail_of_its_rounding_and_no_infinity():
    """Stored log-probs of a sure teacher sum to 1, or just past it: the tail is not log 0."""
    teacher = kd.TopK(torch.tensor([[2, 5]]), torch.tensor([[0.0, -17.0]]))
    z = normal(1, 9, dtype=torch.float32).requires_grad_()
    for divergence in (kd.forward_kl, kd.reverse_kl, kd.jsd(0.5)):
        loss = divergence(z, teacher)
        assert loss.isfinite() and gradient(loss, z).isfinite().all()
        close(loss.detach(), divergence(z, teacher, backend="reference").detach(), rtol=1e-5)


def test_sparse_tail_is_exact_where_the_student_saturates():
    """log(1 - sum q) is -inf in float32 here; the tail's own log-sum-exp is not."""
    z = torch.full((1, 50), -30.0)
    z[0, 3] = 30.0
    z.requires_grad_()
    teacher = kd.TopK(torch.tensor([[3, 4]]), torch.tensor([[0.6, 0.2]]).log())
    loss = kd.forward_kl(z, teacher)
    (grad,) = torch.autograd.grad(loss, z)
    want = kd.forward_kl(z, teacher, backend="reference")
    (want_grad,) = torch.autograd.grad(want, z)
    torch.testing.assert_close(loss.double(), want, rtol=1e-6, atol=0)
    torch.testing.assert_close(grad.double(), want_grad.double(), rtol=1e-5, atol=1e-9)


@pytest.mark.parametrize("backend", ["torch", "triton", "reference"])
@pytest.mark.parametrize("tail", ["bucket", "renormalize", "drop", "uniform"])
def test_rows_without_targets_do_not_count_unless_said(tail, backend):
    """A padded batch of cached targets has the mean of its tokens, in any tail's reading."""
    z = leaf(2, 4, 11)
    logprobs, ids = normal(2, 4, 11, seed=1).log_softmax(-1).topk(3)
    ids[1, 2:] = -1  # padding: one row's, and one all but empty
    ids[0, 1, 1:] = -1
    teacher = kd.TopK(ids, logprobs.masked_fill(ids < 0, -INF), tail=tail)
    real = (ids >= 0).any(-1)

    single = kd.distillation_loss(
        z[real], kd.TopK(ids[real], teacher.logprobs[real], tail=tail), backend=backend
    )
    batch = kd.distillation_loss(z, teacher, backend=backend)
    (gradient,) = torch.autograd.grad(batch, z)
    assert torch.allclose(batch, single, rtol=1e-6) and gradient[~real].eq(0).all()
    each = kd.forward_kl(z, teacher, reduction="none", backend=backend)
    assert each[~real].eq(0).all() and torch.allclose(each[real].mean(), single, rtol=1e-6)

    # Labels or weights say which rows count, and theirs is the denominator.
    everything = torch.zeros(2, 4, dtype=torch.long)
    whole = kd.distillation_loss(z, teacher, labels=everything, reduction="sum", backend=backend)
    for said in ({"labels": everything}, {"weights": torch.ones(2, 4)}):
        mean = kd.distillation_loss(z, teacher, **said, backend=backend)
        assert torch.allclose(mean, whole / 8, rtol=1e-6)

    nothing = kd.TopK(torch.full_like(ids, -1), torch.full_like(logprobs, -INF), tail=tail)
    empty = kd.distillation_loss(z, nothing, backend=backend)
    assert empty == 0 and empty.requires_grad


@pytest.mark.parametrize("backend", ["torch", "reference"])
def test_a_stored_row_without_entries_says_nothing(backend):
    teacher = kd.TopK(torch.full((2, 3), -1), torch.full((2, 3), -torch.inf), tail="renormalize")
    z = leaf64(2, 5)
    loss = kd.distillation_loss(z, teacher, backend=backend)
    (gradient,) = torch.autograd.grad(loss, z)
    assert bool(loss.isfinite()) and bool(gradient.isfinite().all())
