"""The tail at another temperature than the capture's, against full logits in float64."""

import math
import re

import pytest
import torch
from loss_cases import DIVERGENCES

import kd
from kd.losses.oracle import divergence_of

TEMPERATURES = tuple(16 / n for n in (16, 15, 13, 10, 7, 5, 4))  # what a capture stores by default
VOCAB, K = 400, 8
STEP = 1 / 448  # of the cache


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


def student_logits(seed=5):
    g = torch.Generator().manual_seed(seed)
    return 2 * torch.randn(5, VOCAB, generator=g, dtype=torch.float64)


def both(student, loss):
    leaf = student.clone().requires_grad_()
    value = loss(leaf)
    (gradient,) = torch.autograd.grad(value.sum(), leaf)
    return value.detach(), gradient


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
