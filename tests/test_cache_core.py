"""A cache gives back what was written, whatever the order, batch, shard or process."""

import pickle

import cache_cases as cases
import numpy as np
import pytest
import torch

from kd.cache import CacheWriter, TeacherCache, sequence_key


@pytest.fixture
def items():
    return cases.sequences(40)


def test_lookup_returns_what_was_added_bit_for_bit(tmp_path, items):
    cache = cases.write(tmp_path / "cache", items, shard_tokens=64)
    assert len(cache) == 40 and len(cache.manifest.shards) > 3
    for input_ids, ids, logprobs in reversed(items):
        found = cache.lookup(input_ids)
        assert torch.equal(found.ids, ids) and found.ids.dtype == torch.int64
        assert torch.equal(found.logprobs, logprobs) and found.logprobs.dtype == torch.float32
        assert found.tail == "bucket" and found.temperature == 1.0


def test_a_batch_is_padded_with_empty_slots(tmp_path, items):
    cache = cases.write(tmp_path / "cache", items, shard_tokens=64)
    chosen = [items[i] for i in (7, 0, 31)]
    batch = cache.batch([item[0] for item in chosen], 40)
    assert batch.ids.shape == batch.logprobs.shape == (3, 40, 8)
    for row, (input_ids, ids, logprobs) in enumerate(chosen):
        n = len(input_ids)
        assert torch.equal(batch.ids[row, :n], ids)
        assert torch.equal(batch.logprobs[row, :n], logprobs)
        assert (batch.ids[row, n:] == -1).all() and (batch.logprobs[row, n:] == -torch.inf).all()


def test_packed_rows_hold_their_sequences_end_to_end(tmp_path, items):
    cache = cases.write(tmp_path / "cache", items, shard_tokens=64)
    packs = [[items[3], items[20]], [items[5]], [items[39], items[1], items[2]]]
    batch = cache.packed([[item[0] for item in pack] for pack in packs], 90)
    for row, pack in enumerate(packs):
        wanted = torch.cat([item[1] for item in pack])
        assert torch.equal(batch.ids[row, : len(wanted)], wanted)
        assert (batch.ids[row, len(wanted) :] == -1).all()


def test_rows_may_hold_different_numbers_of_tokens(tmp_path):
    input_ids, ids, logprobs = cases.targets(9, 8, 1000)
    for row in range(9):
        ids[row, row:] = -1
    cache = cases.write(tmp_path / "cache", [(input_ids, ids, logprobs)])
    found = cache.lookup(input_ids)
    assert torch.equal(found.ids, ids)  # row 0 is empty
    assert torch.equal(found.logprobs, logprobs.masked_fill(ids < 0, -torch.inf))


def test_keys_depend_on_the_tokens_alone():
    tokens = [5, 0, 70000]
    forms = (tokens, torch.tensor(tokens), np.array(tokens, np.int16 if False else np.int64))
    assert len({sequence_key(form) for form in forms}) == 1
    assert sequence_key([5, 0]) != sequence_key([5, 0, 0]) != sequence_key([0, 5, 0])


def test_resume_adds_only_what_is_missing(tmp_path, items):
    whole = cases.write(tmp_path / "whole", items, shard_tokens=64)
    path, identity = tmp_path / "cache", cases.meta()
    with CacheWriter(path, identity, shard_tokens=64) as writer:
        for item in items[:17]:
            writer.add(*item)
    with CacheWriter(path, identity, shard_tokens=64) as writer:
        assert [item[0] in writer for item in items] == [True] * 17 + [False] * 23
        for item in items[17:]:
            writer.add(*item)
    cache = TeacherCache(path)
    assert len(cache) == 40 and cache.content_digest() == whole.content_digest()


def test_content_digest_sees_a_changed_value_and_not_the_order(tmp_path, items):
    first = cases.write(tmp_path / "a", items, shard_tokens=64)
    second = cases.write(tmp_path / "b", items[::-1], shard_tokens=1000)
    assert first.content_digest() == second.content_digest()
    items[0][2][0, 0] -= 1e-3
    third = cases.write(tmp_path / "c", items)
    assert third.content_digest() != first.content_digest()


def test_ranks_write_side_by_side(tmp_path, items):
    path, identity = tmp_path / "cache", cases.meta()
    with (
        CacheWriter(path, identity, rank=0, world_size=2, shard_tokens=64) as first,
        CacheWriter(path, identity, rank=1, world_size=2, shard_tokens=64) as second,
    ):
        for number, item in enumerate(items):
            (second if number % 2 else first).add(*item)
    whole = cases.write(tmp_path / "whole", items)
    assert TeacherCache(path).content_digest() == whole.content_digest()


def test_same_sequences_give_the_same_files(tmp_path, items):
    cases.write(tmp_path / "a", items, shard_tokens=64)
    cases.write(tmp_path / "b", items, shard_tokens=64)
    names = sorted(item.name for item in (tmp_path / "a").glob("*.*"))
    assert len(names) > 3
    for name in names:
        assert (tmp_path / "a" / name).read_bytes() == (tmp_path / "b" / name).read_bytes()


def test_a_smaller_k_keeps_the_likeliest(tmp_path, items):
    cases.write(tmp_path / "cache", items, shard_tokens=64)
    found = TeacherCache(tmp_path / "cache", top_k=3).lookup(items[0][0])
    assert torch.equal(found.ids, items[0][1][:, :3])
    assert torch.equal(found.logprobs, items[0][2][:, :3])


def test_a_cache_travels_to_workers(tmp_path, items):
    cache = cases.write(tmp_path / "cache", items, shard_tokens=64)
    cache.lookup(items[0][0])
    copy = pickle.loads(pickle.dumps(cache))
    assert torch.equal(copy.lookup(items[9][0]).ids, items[9][1])
    rows = [item[0] for item in items]
    loader = torch.utils.data.DataLoader(
        rows, batch_size=8, num_workers=2, collate_fn=lambda batch: cache.batch(batch, 30).ids
    )
    assert torch.equal(torch.cat(list(loader)), cache.batch(rows, 30).ids)


def test_expectations_that_are_met(tmp_path, items):
    identity = cases.meta()
    cases.write(tmp_path / "cache", items, identity)
    TeacherCache(tmp_path / "cache", expect=identity)
    TeacherCache(tmp_path / "cache", expect=cases.meta(top_k=4, padded_vocab=5000))
    TeacherCache(tmp_path / "cache", expect={"temperature": 1.0, "teacher": {"id": "teacher"}})


@pytest.mark.parametrize(
    ("expect", "words"),
    [
        ({"temperature": 2.0}, "temperature: the cache has 1.0, expected has 2.0"),
        ({"tokenizer": {"fingerprint": "beef"}}, "tokenizer.fingerprint: the cache has 'f00d'"),
        ({"teacher": {"revision": "b2"}}, "teacher.revision: the cache has 'a1', expected has"),
        ({"live_vocab": 999}, "live_vocab: the cache has 1000, expected has 999"),
        ({"top_k": 9}, "top_k: the cache has 8, expected has 9"),
        ({"flavour": 1}, "flavour: the cache has '.no such field.'"),
        (cases.meta(temperature=2.0), "temperature: the cache has 1.0, expected has 2.0"),
    ],
)
def test_a_mismatch_shows_both_sides(tmp_path, items, expect, words):
    cases.write(tmp_path / "cache", items[:2])
    with pytest.raises(ValueError, match=words):
        TeacherCache(tmp_path / "cache", expect=expect)


def test_one_field_may_be_allowed_to_differ(tmp_path, items):
    cases.write(tmp_path / "cache", items[:2])
    expect = {"teacher": {"revision": "b2"}, "temperature": 1.0}
    TeacherCache(tmp_path / "cache", expect=expect, allow=("teacher",))
    with pytest.raises(ValueError, match="temperature"):
        TeacherCache(tmp_path / "cache", expect={**expect, "temperature": 3.0}, allow=("teacher",))


def test_a_missing_sequence_is_named(tmp_path, items):
    cache = cases.write(tmp_path / "cache", items[:5])
    with pytest.raises(KeyError, match=r"3 tokens: 1, 2, 3\)"):
        cache.lookup([1, 2, 3])
    assert cache.missing([items[0][0], [1, 2, 3], items[30][0]]) == [1, 2]


@pytest.mark.parametrize("side", ["right", "left", "both"])
@pytest.mark.parametrize("pad", [0, "last", "first"])
def test_padding_is_named_where_it_is_the_cause(tmp_path, items, side, pad):
    """Also where the padding is the sequence's own last (end) or first (begin) token."""
    cache = cases.write(tmp_path / "cache", items)
    tokens = max((item[0] for item in items), key=len)
    pad = {"last": int(tokens[-1]), "first": int(tokens[0])}.get(pad, pad)
    filler = torch.full((7,), pad)
    left, right = side in ("left", "both"), side in ("right", "both")
    padded = torch.cat([*[filler] * left, tokens, *[filler] * right])
    first = 7 if left else 0
    words = rf"padded: tokens {first} to {first + len(tokens) - 1} of it .* are id {pad}\. Pass"
    with pytest.raises(KeyError, match=words):
        cache.batch(padded[None], length=64)
    with pytest.raises(KeyError, match="row\\[mask.bool"):
        cache.lookup(padded)
    mask = torch.zeros(len(padded))
    mask[first : first + len(tokens)] = 1
    rows = [row[one.bool()] for row, one in zip(padded[None], mask[None], strict=True)]
    assert torch.equal(cache.batch(rows, length=64).ids[0, : len(tokens)], cache.lookup(tokens).ids)


def test_a_pack_or_a_longer_text_is_told_from_padding(tmp_path, items):
    cache = cases.write(tmp_path / "cache", items)
    pair = [item[0] for item in items if len(item[0]) > 3][:2]
    with pytest.raises(KeyError, match=rf"first {len(pair[0])} tokens .*cache.packed"):
        cache.lookup(torch.cat(pair))
    with pytest.raises(KeyError, match="changed since the capture"):
        cache.lookup(pair[0][:-1])  # cut
    with pytest.raises(KeyError, match="changed since the capture"):
        cache.lookup(torch.full((9,), 5))  # nothing but padding


def test_missing_sequences_can_be_skipped_and_are_counted(tmp_path, items):
    import kd

    cases.write(tmp_path / "cache", items[:20], shard_tokens=64)
    cache = TeacherCache(tmp_path / "cache", on_missing="skip")
    batch = cache.batch([items[3][0], items[30][0], items[4][0]], 40)
    assert cache.skipped == 1
    assert torch.equal(batch.ids[2, : len(items[4][0])], items[4][1])
    assert (batch.ids[1] == -1).all()
    teacher = kd.TopK(batch.ids, batch.logprobs, batch.tail)
    loss = kd.distillation_loss(torch.randn(3, 40, 1000), teacher, reduction="none").view(3, 40)
    assert loss[1].abs().max() < 1e-6 and loss[0].max() > 0.1
    with pytest.raises(ValueError, match="on_missing must be 'error' or 'skip', got 'drop'"):
        TeacherCache(tmp_path / "cache", on_missing="drop")


def test_an_empty_cache_opens(tmp_path):
    cache = cases.write(tmp_path / "cache", [])
    assert len(cache) == 0 and [1] not in cache
