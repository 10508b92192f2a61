"""Selections: what they keep, that draws are unbiased, and that every one reads the same way."""

import cache_cases as cases
import pytest
import torch

import kd
from kd.cache import sequence_key
from kd.teachers import Selection, build_cache
from kd.teachers.selection import top_entries


def logits(rows=40, live=300, seed=0, spread=2.0):
    generator = torch.Generator().manual_seed(seed)
    return spread * torch.randn(rows, live, generator=generator)


def dense(ids, logprobs, live):
    """[C, V] probabilities of the kept tokens."""
    out = torch.zeros(len(ids), live + 1, dtype=torch.float64)
    out.scatter_add_(1, torch.where(ids < 0, live, ids), logprobs.double().exp())
    return out[:, :live]


def test_top_p_keeps_the_fewest_that_hold_p():
    chunk = logits()
    ids, logprobs, _ = Selection("top_p", top_k=64, top_p=0.7).rows(chunk, 1.0)
    p, order = chunk.softmax(-1).sort(-1, descending=True)
    for row in range(len(chunk)):
        held = p[row].cumsum(0)
        fewest = min(int((held < 0.7).sum()) + 1, 64)
        assert (ids[row] >= 0).sum() == fewest
        assert set(ids[row, :fewest].tolist()) == set(order[row, :fewest].tolist())


@pytest.mark.parametrize("method", ["independent", "systematic"])
@pytest.mark.parametrize("name", ["sampled", "hybrid"])
def test_draws_are_unbiased(name, method):
    """The mean over many rows of one distribution comes as near as its standard error says."""
    repeats, live = 4000, 50
    one = logits(1, live, spread=1.5)
    p = (one / 2).softmax(-1)[0].double()
    choose = Selection(name, draws=20, exact=5, method=method)
    uniforms = choose.uniforms(repeats, sequence_key([1, 2]))
    found = dense(*choose.rows(one.expand(repeats, -1), 2.0, uniforms)[:2], live)
    torch.testing.assert_close(found.sum(1), torch.ones(repeats, dtype=torch.float64))
    error = (found.mean(0) - p).abs()
    assert (error <= 5 * (p * (1 - p) / (20 * repeats)).sqrt() + 1e-6).all()


def test_systematic_and_hybrid_draws_vary_less():
    live, chunk = 300, logits(1, 300)
    p = chunk.softmax(-1)[0].double()
    variance = {}
    for name, method in (
        ("sampled", "independent"), ("sampled", "systematic"), ("hybrid", "independent"),
    ):  # fmt: skip
        choose = Selection(name, draws=50, exact=8, method=method)
        rows = choose.rows(chunk.expand(2000, -1), 1.0, choose.uniforms(2000, sequence_key([1])))
        variance[name, method] = (dense(*rows[:2], live) - p).square().sum(1).mean()
    assert variance["sampled", "systematic"] < 0.7 * variance["sampled", "independent"]
    assert variance["hybrid", "independent"] < 0.7 * variance["sampled", "independent"]


@pytest.mark.parametrize("name", ["top_k", "top_p", "sampled", "hybrid"])
def test_a_cache_of_any_selection_feeds_the_loss(tmp_path, name):
    model, sequences = cases.teacher(), cases.texts(6)
    choose = Selection(name, top_k=20, draws=30, exact=6)
    cache = build_cache(model, sequences, tmp_path / "cache", selection=choose, progress=False)
    assert cache.meta.selection == name
    targets = cache.batch(sequences, 40)
    assert targets.tail == ("bucket" if name.startswith("top") else "drop")
    student = torch.randn(6, 40, 61, requires_grad=True)
    teacher = kd.TopK(targets.ids, targets.logprobs, targets.tail, targets.temperature)
    labels = torch.full((6, 40), -100)
    for row, tokens in zip(labels, sequences, strict=True):
        row[: len(tokens) - 1] = 1
    loss = kd.distillation_loss(student, teacher, labels=labels)
    loss.backward()
    assert torch.isfinite(loss) and torch.isfinite(student.grad).all()
    assert (student.grad[labels >= 0].abs().sum(-1) > 0).all()


def test_the_gradient_of_sampled_targets_is_the_full_one_on_average():
    torch.manual_seed(0)
    repeats, live = 6000, 40
    one, student = logits(1, live), torch.randn(1, live, dtype=torch.float64)
    choose = Selection("sampled", draws=30)
    uniforms = choose.uniforms(repeats, sequence_key([3]))
    ids, logprobs, _ = choose.rows(one.expand(repeats, -1), 1.0, uniforms)
    rows = student.repeat(repeats, 1).requires_grad_()
    teacher = kd.TopK(ids, logprobs.double(), tail="drop")
    kd.distillation_loss(rows, teacher, backend="reference").backward()
    wanted = student.softmax(-1)[0] - one.double().softmax(-1)[0]
    torch.testing.assert_close(rows.grad.sum(0), wanted, atol=6e-3, rtol=0)


def test_draws_depend_on_the_sequence_and_not_on_its_batch(tmp_path):
    model, sequences = cases.teacher(), cases.texts(12)
    options = {"selection": "sampled", "progress": False}
    first = build_cache(model, sequences, tmp_path / "a", batch_tokens=400, **options)
    second = build_cache(model, sequences[::-1], tmp_path / "b", batch_tokens=1, **options)
    same = [
        torch.equal(first.lookup(item).ids, second.lookup(item).ids) for item in sequences
    ]  # a draw within float rounding of a border may fall either way
    assert sum(same) >= 11
    other = build_cache(
        model, sequences, tmp_path / "c", selection=Selection("sampled", seed=1), progress=False
    )
    assert other.content_digest() != first.content_digest()


def test_fewer_live_logits_than_k(tmp_path):
    chunk = logits(3, 10)
    chunk[0, 3:] = -torch.inf
    for name in ("top_k", "top_p", "sampled", "hybrid"):
        choose = Selection(name, top_k=6, draws=9, exact=4, top_p=1.0)
        ids, logprobs, _ = choose.rows(chunk, 1.0, choose.uniforms(3, sequence_key([1])))
        kept = ids[0][ids[0] >= 0]
        assert kept.max() < 3 and (logprobs[0][ids[0] < 0] == -torch.inf).all(), name
        assert dense(ids, logprobs, 10)[0].sum() <= 1 + 1e-6


@pytest.mark.parametrize(
    ("settings", "words"),
    [
        ({"name": "best"}, "name must be one of top_k, top_p, sampled, hybrid, got 'best'"),
        ({"top_k": 0}, "top_k must be at least 1, got 0"),
        ({"top_p": 1.5}, "top_p must be above 0 and at most 1, got 1.5"),
        ({"draws": 0}, "draws must be at least 1"),
        ({"method": "wild"}, "method must be one of independent, systematic"),
    ],
)
def test_bad_settings(settings, words):
    with pytest.raises(ValueError, match=words):
        Selection(**settings)


# 64 tokens of 20,000: whole blocks; 20,001: one column after them; 500: too few blocks to bother.
@pytest.mark.parametrize(("live", "k"), [(20_000, 64), (20_001, 64), (20_063, 7), (500, 64)])
def test_top_entries_are_torchs(live, k):
    values = logits(9, live)
    values[0, 50:] = -torch.inf
    values[1, :] = 3.0  # ties everywhere
    found, ids = top_entries(values, k)
    assert torch.equal(found, values.topk(k).values)
    assert torch.equal(values.gather(1, ids), found)
    assert all(len(set(row.tolist())) == k for row in ids)
