"""What must hold for every divergence on any input, searched by hypothesis in float64."""

import dataclasses

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from loss_cases import DIVERGENCES

import kd

F64 = torch.float64
F_DIVERGENCES = [
    name for name, d in DIVERGENCES.items() if d.name not in ("alpha_beta", "adaptive_kl")
]

quick = settings(max_examples=100, deadline=None, derandomize=True, database=None)
names = st.sampled_from(list(DIVERGENCES))
seeds = st.integers(0, 2**32 - 1)
spreads = st.sampled_from([0.01, 1.0, 8.0])  # nearly uniform, ordinary, nearly one-hot
temperatures = st.sampled_from([0.5, 1.0, 3.0])


def pair(seed, rows=3, vocab=9, spread=1.0):
    """Student and teacher logits."""
    g = torch.Generator().manual_seed(seed)
    z, t = (spread * torch.randn(rows, vocab, generator=g, dtype=F64) for _ in range(2))
    return z.requires_grad_(), t


def sparse(t, k, tail="bucket"):
    logprobs, ids = torch.log_softmax(t, -1).topk(k)
    return kd.TopK(ids, logprobs, tail=tail, tail_at_temperature="spread")


def grad(loss, leaf):
    return torch.autograd.grad(loss.sum(), leaf)[0]


def close(got, want, rtol=1e-8, atol=1e-11):
    torch.testing.assert_close(got.detach(), want.detach(), rtol=rtol, atol=atol)


@quick
@given(names, seeds, spreads, st.integers(1, 12), st.integers(1, 6))
def test_order_of_the_vocabulary_does_not_matter(name, seed, spread, vocab, k):
    d = DIVERGENCES[name]
    z, t = pair(seed, vocab=vocab, spread=spread)
    order = torch.randperm(vocab, generator=torch.Generator().manual_seed(seed))
    turned = z.detach()[:, order].requires_grad_()
    loss, other = d(z, t, reduction="none"), d(turned, t[:, order], reduction="none")
    close(other, loss)
    close(grad(other, turned), grad(loss, z)[:, order])
    teacher = sparse(t, min(k, vocab))
    place = torch.empty_like(order).scatter_(0, order, torch.arange(vocab))
    moved = dataclasses.replace(teacher, ids=place[teacher.ids])
    close(d(turned, moved, reduction="none"), d(z, teacher, reduction="none"))


@quick
@given(names, seeds, spreads, st.sampled_from([-50.0, 3.0, 50.0]))
def test_a_constant_added_to_a_row_does_not_matter(name, seed, spread, shift):
    d = DIVERGENCES[name]
    z, t = pair(seed, spread=spread)
    row = shift * torch.arange(3, dtype=F64)[:, None]
    for teacher, moved in ((t, t - row), (sparse(t, 3), sparse(t - row, 3))):
        student = (z.detach() + row).requires_grad_()
        loss, other = d(z, teacher, reduction="none"), d(student, moved, reduction="none")
        close(other, loss, rtol=1e-7, atol=1e-10)
        close(grad(other, student), grad(loss, z), rtol=1e-6, atol=1e-10)


@quick
@given(names, seeds, spreads)
def test_gradient_of_a_row_sums_to_zero(name, seed, spread):
    """Softmax does not see a constant, so no gradient may point along it."""
    d = DIVERGENCES[name]
    z, t = pair(seed, spread=spread)
    for teacher in (t, sparse(t, 4)):
        g = grad(d(z, teacher, reduction="none"), z)
        assert (g.sum(-1).abs() <= 1e-12 + 1e-10 * g.abs().sum(-1)).all()


@quick
@given(names, seeds, spreads, temperatures)
def test_nonnegative_and_zero_at_equality(name, seed, spread, temperature):
    d = DIVERGENCES[name]
    z, t = pair(seed, spread=spread)
    for teacher in (t, sparse(t, 4)):
        assert (d(z, teacher, temperature=temperature, reduction="none") >= -1e-12).all()
    same = t.clone().requires_grad_()
    loss = d(same, t, temperature=temperature, reduction="none")
    assert loss.abs().max() <= 1e-12
    if not d.detach_mixture:  # its gradient is not that of its value
        assert grad(loss, same).abs().max() <= 1e-12
    loss = d(same, sparse(t, 4), reduction="none")  # same distribution on the K+1 outcomes
    assert loss.abs().max() <= 1e-12


@quick
@given(names, seeds, spreads, temperatures)
def test_temperature_divides_the_logits(name, seed, spread, temperature):
    d = DIVERGENCES[name]
    z, t = pair(seed, spread=spread)
    cold = (z.detach() / temperature).requires_grad_()
    loss = d(z, t, temperature=temperature, reduction="none")
    want = d(cold, t / temperature, reduction="none")
    close(loss, want)
    close(temperature * grad(loss, z), grad(want, cold))


@quick
@given(names, seeds, spreads, st.sampled_from(["bucket", "renormalize", "uniform"]))
def test_every_token_stored_is_the_dense_loss(name, seed, spread, tail):
    d = DIVERGENCES[name]
    if tail == "renormalize" and d.needs_teacher_support:
        tail = "bucket"
    z, t = pair(seed, spread=spread)
    for temperature in (1.0, 2.0):
        loss = d(z, t, temperature=temperature, reduction="none")
        other = d(z, sparse(t, 9, tail), temperature=temperature, reduction="none")
        close(other, loss, rtol=1e-7)
        close(grad(other, z), grad(loss, z), rtol=1e-6, atol=1e-10)


@quick
@given(st.sampled_from(F_DIVERGENCES), seeds, spreads, st.integers(1, 9))
def test_bucket_is_a_lower_bound_of_the_dense_loss(name, seed, spread, k):
    """Merging outcomes cannot raise an f-divergence (data processing inequality); and more stored
    tokens cannot lower it."""
    d = DIVERGENCES[name]
    z, t = pair(seed, spread=spread)
    dense = d(z, t, reduction="none")
    coarse = d(z, sparse(t, k), reduction="none")
    finer = d(z, sparse(t, min(k + 2, 9)), reduction="none")
    # The stored log-probs are rounded, and a tail is what they leave of one.
    tail = t.softmax(-1).sort(-1).values[:, : max(9 - k - 2, 1)].sum(-1)
    slack = 1e-10 * (1 + dense.abs()) + 1e-14 / tail
    assert (coarse <= finer + slack).all() and (finer <= dense + slack).all()


@quick
@given(names, seeds, st.lists(st.floats(0.05, 0.95), min_size=3, max_size=3))
def test_repeated_ids_are_summed(name, seed, shares):
    """A sampled target may list a token twice: it stands for the sum of its masses."""
    d = DIVERGENCES[name]
    z, t = pair(seed)
    teacher = sparse(t, 3)
    share = torch.tensor(shares, dtype=F64)
    pieces = [teacher.logprobs + share.log(), teacher.logprobs + (1 - share).log()]
    split = kd.TopK(
        torch.cat([teacher.ids, teacher.ids.flip(1)], 1),
        torch.cat([pieces[0], pieces[1].flip(1)], 1),
    )
    loss, other = d(z, teacher, reduction="none"), d(z, split, reduction="none")
    close(other, loss)
    close(grad(other, z), grad(loss, z))


@quick
@given(names, seeds, st.booleans(), st.sampled_from([0.0, -0.3, -float("inf"), float("nan")]))
def test_empty_slots_hold_nothing(name, seed, with_repeats, held):
    """Padding of a ragged target: whatever log-prob lies in a slot of id -1, it is not read."""
    d = DIVERGENCES[name]
    z, t = pair(seed)
    teacher = sparse(t, 2)
    logprobs = teacher.logprobs - (0.7 if with_repeats else 0.0)  # exp(-0.7) twice is below one
    repeats = 2 if with_repeats else 1
    ids = torch.cat([torch.full((3, 1), -1)] + repeats * [teacher.ids], 1)
    ids = torch.cat([ids, torch.full((3, 1), -1)], 1)
    padding = torch.full((3, 1), held, dtype=F64)
    padded = kd.TopK(ids, torch.cat([padding] + repeats * [logprobs] + [padding], 1))
    plain = kd.TopK(ids[:, 1:-1], torch.cat(repeats * [logprobs], 1))
    loss, other = d(z, plain, reduction="none"), d(z, padded, reduction="none")
    close(other, loss)
    close(grad(other, z), grad(loss, z))


@quick
@given(names, seeds, st.lists(st.booleans(), min_size=5, max_size=5), st.booleans())
def test_masking_rows_is_removing_them(name, seed, kept, by_weight):
    d = DIVERGENCES[name]
    z, t = pair(seed, rows=5)
    keep = torch.tensor(kept)
    labels = torch.where(keep, torch.arange(5), -100)
    masked = dict(weights=keep.to(F64)) if by_weight else dict(labels=labels)
    for teacher, few in ((t, t[keep]), (sparse(t, 3), sparse(t[keep], 3))):
        loss, want = d(z, teacher, **masked), d(z[keep], few)
        close(loss, want)
        g, want_g = grad(loss, z), grad(want, z)
        close(g, want_g)
        assert g[~keep].eq(0).all()


@quick
@given(names, seeds, st.lists(st.integers(0, 8), max_size=4), st.sampled_from(["logits", "hidden"]))
def test_any_split_with_num_items_is_the_one_batch_loss(name, seed, cuts, form):
    g = torch.Generator().manual_seed(seed)
    t = torch.randn(8, 9, generator=g, dtype=F64)
    hidden = torch.randn(8, 4, generator=g, dtype=F64).requires_grad_()
    weight = torch.randn(9, 4, generator=g, dtype=F64).requires_grad_()
    labels = torch.randint(0, 9, (8,), generator=g)
    labels[torch.rand(8, generator=g) < 0.3] = -100
    weights = torch.rand(8, generator=g, dtype=F64)
    total = float(weights[labels != -100].sum())

    def loss(rows, **options):
        fused = kd.Hidden(hidden[rows], weight)
        return kd.distillation_loss(
            fused if form == "hidden" else fused.hidden @ weight.T,
            t[rows],
            divergence=DIVERGENCES[name],
            temperature=2.0,
            labels=labels[rows],
            ce_weight=0.5,
            weights=weights[rows],
            **options,
        )

    whole = loss(slice(0, 8))
    edges = [0, *sorted(cuts), 8]
    parts = sum(
        loss(slice(a, b), num_items=total or 1.0) for a, b in zip(edges, edges[1:], strict=False)
    )
    close(parts, whole)
    for leaf in (hidden, weight):
        want = torch.autograd.grad(whole, leaf, retain_graph=True)[0]
        close(torch.autograd.grad(parts, leaf, retain_graph=True)[0], want)


@quick
@given(seeds, spreads)
def test_forward_and_reverse_kl_are_each_others_mirror(seed, spread):
    z, t = pair(seed, spread=spread)
    close(kd.forward_kl(z.detach(), t), kd.reverse_kl(t, z.detach()))
    close(kd.jsd(0.3)(z.detach(), t), kd.jsd(0.7)(t, z.detach()))
    close(kd.total_variation(z.detach(), t), kd.total_variation(t, z.detach()))


def test_rows_past_two_to_the_31_elements_are_found():
    """Row 2 of the teacher, and of the student, begin past element 2**31. The memory is virtual:
    only the live columns of each row are ever touched."""
    rows, width, vocab = 3, 2**30 + 64, 1000
    g = torch.Generator().manual_seed(0)
    narrow_t, narrow_z = (torch.randn(rows, vocab, generator=g).bfloat16() for _ in range(2))
    wide = torch.empty(rows, width, dtype=torch.bfloat16)
    assert wide.numel() > 2**31
    wide[:, :vocab] = narrow_t
    for d in (kd.forward_kl, kd.jsd(0.3)):
        want = d(narrow_z, narrow_t, reduction="none")
        got = d(narrow_z, wide, vocab_size=vocab, reduction="none")
        assert torch.equal(got, want)
        student = narrow_z.clone().requires_grad_()
        g = grad(d(student, wide, vocab_size=vocab), student)
        other = narrow_z.clone().requires_grad_()
        assert torch.equal(g, grad(d(other, narrow_t), other))
    wide[:, :vocab] = narrow_z
    got = kd.forward_kl(wide, narrow_t, vocab_size=vocab, reduction="none")
    assert torch.equal(got, kd.forward_kl(narrow_z, narrow_t, reduction="none"))


@pytest.mark.slow
def test_gradient_of_two_to_the_31_logits():
    """A real gradient of more than 2**31 elements (4.3 GB in bf16), first and last row."""
    rows, vocab = 14_200, 151_936
    assert rows * vocab > 2**31
    g = torch.Generator().manual_seed(0)
    z = torch.randn(1, vocab, generator=g).bfloat16().requires_grad_()
    t = torch.randn(1, vocab, generator=g).bfloat16()
    seen = []
    student = z.expand(rows, vocab)
    student.register_hook(lambda grad: seen.append(grad[[0, rows // 2, -1]].clone()))
    kd.forward_kl(student, t.expand(rows, vocab), reduction="sum").backward()
    want = grad(kd.forward_kl(z, t, reduction="sum"), z)
    assert torch.equal(seen[0], want.expand(3, vocab))
