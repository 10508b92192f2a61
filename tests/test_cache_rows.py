"""What may not be written, and rows that a checksum cannot judge."""

import cache_cases as cases
import numpy as np
import pytest
import torch

from kd.cache import CacheMeta, CacheWriter, TeacherCache
from kd.cache.rows import Rows
from kd.cache.shards import encode_shard
from kd.cache.verify import verify_cache


def add(tmp_path, tokens, ids, logprobs, **options):
    identity = cases.meta(live=100, top_k=3, **options)
    with CacheWriter(tmp_path / "cache", identity) as writer:
        writer.add(tokens, ids, logprobs)
    return TeacherCache(tmp_path / "cache")


GOOD = torch.tensor([[0.5, 0.3, 0.1], [0.9, 0.05, 0.01]]).log()
IDS = torch.tensor([[5, 6, 7], [99, 0, 1]])


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16, torch.float16])
def test_good_rows_of_any_dtype(tmp_path, dtype):
    found = add(tmp_path, [1, 2], IDS, GOOD.to(dtype)).lookup([1, 2])
    assert torch.equal(found.ids, IDS) and torch.equal(found.logprobs, GOOD.to(dtype).float())


def changed(tensor, value, row=1, slot=2):
    out = tensor.clone()
    out[row, slot] = value
    return out


@pytest.mark.parametrize(
    ("tokens", "ids", "logprobs", "words"),
    [
        ([], IDS, GOOD, "at least one token, got a sequence of zero length"),
        ([1, 2, 3], IDS, GOOD, r"must both be \[L, K\] with L = 3, got \(2, 3\)"),
        ([[1, 2]], IDS, GOOD, r"one-dimensional .L., got shape \(1, 2\)"),
        ([1, -100], IDS, GOOD, "from 0 to 2..31 - 1, got -100"),
        ([1, 100], IDS, GOOD, "input_ids must be below 100, got 100 in row 1"),
        ([1.0, 2.0], IDS, GOOD, "must be integers, got float64"),
        ([1, 2], changed(IDS, 100), GOOD, "ids must be from 0 to 99, .* got 100 in row 1"),
        ([1, 2], changed(IDS, -2), GOOD, "ids must be from 0 to 99, .* got -2 in row 1"),
        ([1, 2], changed(IDS, 99), GOOD, "different within a row, got 99 in row 1"),
        ([1, 2], IDS, changed(GOOD, float("nan")), "not NaN, got nan in row 1"),
        ([1, 2], IDS, changed(GOOD, float("inf")), "at most 0, not NaN, got inf in row 1"),
        ([1, 2], IDS, changed(GOOD, 0.7), "at most 0, not NaN, got 0.69.* in row 1"),
        ([1, 2], IDS, GOOD.exp(), "at most 0"),
        ([1, 2], IDS, changed(GOOD, -0.1), "at most 1 in sum, got 1.8.* in row 1"),
        ([1, 2], torch.arange(8).view(2, 4), torch.full((2, 4), -3.0), "at most top_k = 3"),
    ],
)
def test_bad_rows_are_named(tmp_path, tokens, ids, logprobs, words):
    with pytest.raises((ValueError, TypeError), match=words):
        add(tmp_path, tokens, ids, logprobs)
    assert not list((tmp_path / "cache").glob("shard*"))


def test_minus_infinity_is_an_empty_slot(tmp_path):
    found = add(tmp_path, [1, 2], IDS, changed(GOOD, -torch.inf)).lookup([1, 2])
    assert found.ids[1].tolist() == [99, 0, -1] and found.logprobs[1, 2] == -torch.inf


@pytest.mark.parametrize("length", [1, 2, 1000])
def test_any_length(tmp_path, length):
    items = [cases.targets(length, 8, 1000)]
    for codec in ("float32", "compact"):
        cache = cases.write(tmp_path / codec, items, cases.meta(codec=codec))
        assert cache.lookup(items[0][0]).ids.shape == (length, 8)


def test_a_batch_that_is_too_short_is_refused(tmp_path):
    items = cases.sequences(3, lengths=(5, 9))
    cache = cases.write(tmp_path / "cache", items)
    with pytest.raises(ValueError, match="length must be at least that of the longest row"):
        cache.batch([item[0] for item in items], 4)


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"top_k": 101, "live": 100}, "top_k must be from 1 to live_vocab .100., .* got 101"),
        ({"top_k": 0}, "top_k must be from 1"),
        ({"live": 100, "padded_vocab": 99}, "live_vocab must be from 1 to padded_vocab .99."),
        ({"temperature": 0.0}, "temperature must be finite and above 0"),
        ({"temperature": float("nan")}, "temperature must be finite and above 0"),
        ({"selection": "best"}, "selection must be one of top_k, top_p, sampled, hybrid"),
        ({"codec": "zip"}, "codec must be one of float32, log8, compact, counts"),
    ],
)
def test_an_identity_that_cannot_be(options, words):
    with pytest.raises(ValueError, match=words):
        cases.meta(**options)


def test_a_newer_field_in_the_identity_is_refused():
    with pytest.raises(ValueError, match="got colour. A newer kd wrote this"):
        CacheMeta.from_dict({**cases.meta().to_dict(), "colour": "red"})


def test_asking_for_more_tokens_than_are_cached(tmp_path):
    cases.write(tmp_path / "cache", cases.sequences(3))
    with pytest.raises(ValueError, match="top_k must be from 1 to the cached 8, got 9"):
        TeacherCache(tmp_path / "cache", top_k=9)


def test_fewer_tokens_of_a_sampled_cache_would_be_biased(tmp_path):
    identity = cases.meta(selection="sampled", selection_options={"draws": 8})
    cases.write(tmp_path / "cache", cases.sequences(3), identity)
    with pytest.raises(ValueError, match="left out for selection 'sampled'"):
        TeacherCache(tmp_path / "cache", top_k=2)


# Rows that are wrong although their file is whole: only a reader of every row can tell.
@pytest.mark.parametrize(
    ("ids", "logprobs", "words"),
    [
        ([3, 3], [-1.0, -2.0], "an id twice"),
        ([3, 4], [-0.1, -0.1], "probabilities above 1 in sum"),
        ([3, 4], [0.5, -3.0], "a log-prob above 0 or NaN"),
        ([3, 4], [float("nan"), -3.0], "a log-prob above 0 or NaN"),
        ([3, 1001], [-1.0, -2.0], "an id outside the vocabulary"),
    ],
)
def test_verify_reads_every_row(tmp_path, ids, logprobs, words):
    rows = Rows(
        np.array([2]),
        np.array([0, 2], np.int32),
        np.array(ids, np.int32),
        np.array(logprobs, np.float32),
        tokens=np.array([7, 8], np.int32),
    )
    with CacheWriter(tmp_path / "cache", cases.meta(live=1000)) as writer:
        writer.add_rows(rows)
    verdict = verify_cache(tmp_path / "cache")
    assert any(f"sequence 0, row 1: {words}" in problem for problem in verdict.problems)


def test_verify_compares_tokens_with_keys(tmp_path, monkeypatch):
    from kd.cache import shards

    real = shards.key_of
    monkeypatch.setattr(shards, "key_of", lambda tokens: real(tokens[::-1]))
    cases.write(tmp_path / "cache", cases.sequences(3, lengths=(4, 9)))
    monkeypatch.undo()
    assert "its tokens do not have its key" in verify_cache(tmp_path / "cache").problems[0]


def test_a_sound_cache_is_sound(tmp_path):
    cases.write(tmp_path / "cache", cases.sequences(40), cases.meta(codec="compact"))
    verdict = verify_cache(tmp_path / "cache")
    assert verdict.sound and verdict.sequences == 40 and verdict.rows > 40


def test_a_shard_needs_an_identity():
    rows = Rows(np.array([1]), *[np.ones(1, t) for t in "iif"], tokens=np.array([1], np.int32))
    assert cases.meta().cache_id.encode() in encode_shard(rows, cases.meta())
