"""Every codec gives back the same ids, and values within the error it states."""

import dataclasses

import cache_cases as cases
import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from kd.cache import CacheWriter, TeacherCache, bits
from kd.cache.codecs import CODECS, default_options
from kd.cache.rows import Rows
from kd.cache.streams import Side

ALL = ("float32", "log8", "compact")


def random_rows(rng, rows, live, most, spread=3.0, ragged=True):
    """Rows with 0 to ``most`` tokens of random distributions over ``live`` tokens."""
    counts = rng.integers(0 if ragged else most, most + 1, rows).astype(np.int32)
    ids, logprobs = [], []
    for count in counts:
        logits = spread * rng.standard_normal(live)
        log_p = logits - np.logaddexp.reduce(logits)
        chosen = np.argsort(-log_p)[:count]
        ids.append(chosen)
        logprobs.append(log_p[chosen])
    return Rows(
        np.array([rows]),
        counts,
        np.concatenate([*ids, np.zeros(0)]).astype(np.int32),
        np.concatenate([*logprobs, np.zeros(0)]).astype(np.float32),
    )


def by_id(rows):
    """Each row's entries in ascending order of ids, in float64."""
    row = np.repeat(np.arange(len(rows.counts)), rows.counts)
    order = np.lexsort((rows.ids, row))
    return rows.ids[order], rows.logprobs[order].astype(np.float64), row


def added_kl(rows, found):
    """KL of each row's K + 1 outcomes, lossless against decoded, in nats."""
    _, a, row = by_id(rows)
    _, b, _ = by_id(found)
    n = len(rows.counts)
    left = np.maximum(1 - np.bincount(row, np.exp(a), n), 1e-7)
    right = np.maximum(1 - np.bincount(row, np.exp(b), n), 1e-7)
    return np.bincount(row, np.exp(a) * (a - b), n) + left * np.log(left / right)


def round_trip(name, rows, lengths, live, **options):
    chosen = {} if name == "counts" else options
    drawn = {"selection": "sampled", "selection_options": options} if name == "counts" else {}
    side = Side(cases.meta(live, 1, name, codec_options=chosen, **drawn))
    rows = dataclasses.replace(rows, lengths=lengths)
    streams = CODECS[name].encode(rows, side)
    assert set(streams) == set(CODECS[name].streams)
    for data, offsets in streams.values():
        assert data.dtype == np.uint8 and offsets[-1] == len(data)
    ids, logprobs = CODECS[name].decode(streams, rows, side)
    return dataclasses.replace(rows, ids=ids, logprobs=logprobs)


# 1 token: a vocabulary of one. 2, 300: narrow ids. 151936: Qwen's, 18 bits.
@pytest.mark.parametrize("name", ALL)
@pytest.mark.parametrize("live", [1, 2, 300, 151936])
def test_round_trip(name, live):
    rng = np.random.default_rng(live)
    rows = random_rows(rng, 23, live, min(live, 19))
    lengths = np.array([1, 0, 7, 15])
    found = round_trip(name, rows, lengths, live)
    assert np.array_equal(by_id(found)[0], by_id(rows)[0])
    assert found.logprobs.dtype == np.float32 and (found.logprobs <= 0).all()
    kl = added_kl(rows, found)
    assert (kl > -1e-6).all()
    assert kl.max() <= {"float32": 1e-9, "log8": 1e-3, "compact": 2e-3}[name]


@settings(deadline=None, max_examples=60)
@given(st.data())
def test_any_rows_survive_any_codec(data):
    live = data.draw(st.sampled_from([1, 3, 40, 5000]))
    name = data.draw(st.sampled_from(ALL))
    seed, spread = data.draw(st.integers(0, 99)), data.draw(st.sampled_from([0.0, 1.0, 9.0]))
    rng = np.random.default_rng(seed)
    lengths = np.array(data.draw(st.lists(st.integers(0, 5), min_size=1, max_size=5)))
    ragged = data.draw(st.booleans())
    rows = random_rows(rng, int(lengths.sum()), live, min(live, 12), spread, ragged)
    found = round_trip(name, rows, lengths, live)
    assert np.array_equal(by_id(found)[0], by_id(rows)[0])
    assert np.isfinite(found.logprobs).all()
    row = by_id(rows)[2]
    mass = np.bincount(row, np.exp(by_id(rows)[1]), len(rows.counts))
    kept = np.bincount(row, np.exp(by_id(found)[1]), len(rows.counts))
    filled = rows.counts > 0
    assert np.abs(mass - kept)[filled].max(initial=0) <= 0.013  # half a step of the tail's code


@pytest.mark.parametrize("name", ["log8", "compact"])
def test_added_kl_stays_below_what_is_stated(name):
    rng = np.random.default_rng(0)
    for spread in (1.0, 2.0, 4.0):
        rows = random_rows(rng, 200, 5000, 64, spread, ragged=False)
        kl = added_kl(rows, round_trip(name, rows, np.array([200]), 5000))
        assert kl.mean() <= {"log8": 1e-4, "compact": 1e-3}[name]


@pytest.mark.parametrize("k", [67, 512, 2_000, 20_000, "all"])
@pytest.mark.parametrize("spread", [1.0, 3.0])
def test_rows_of_any_width_stay_below_1e3_nats(k, spread):
    """With the levels that a capture takes by itself, up to the whole vocabulary."""
    live = 40_000
    k = live if k == "all" else k
    logits = spread * np.random.default_rng(k).standard_normal((3, live))
    log_p = logits - np.logaddexp.reduce(logits, 1, keepdims=True)
    ids = np.argsort(-log_p, 1)[:, :k]
    kept = np.take_along_axis(log_p, ids, 1).astype(np.float32)
    rows = Rows(
        np.array([3]), np.full(3, k, np.int32), ids.reshape(-1).astype(np.int32), kept.reshape(-1)
    )
    found = round_trip("compact", rows, np.array([3]), live, **default_options("compact", k))
    assert added_kl(rows, found).max() < 1e-3
    coarse = round_trip("compact", rows, np.array([3]), live)
    assert k < 512 or added_kl(rows, coarse).mean() > 3e-3  # 110 levels would not do


def test_a_cache_of_whole_rows_wider_than_two_bytes_count(tmp_path):
    """More tokens in a row than 65,535, and rows that differ."""
    live = 70_000
    logits = np.random.default_rng(0).standard_normal((2, live))
    log_p = (logits - np.logaddexp.reduce(logits, 1, keepdims=True)).astype(np.float32)
    ids = np.tile(np.arange(live), (2, 1))
    ids[1, 5:] = -1
    for codec in ALL:
        options = default_options(codec, live)
        identity = cases.meta(live=live, codec=codec, top_k=live, codec_options=options)
        with CacheWriter(tmp_path / codec, identity) as writer:
            writer.add([1, 2], ids, log_p)
        found = TeacherCache(tmp_path / codec).lookup([1, 2])
        order = found.ids[0].argsort()
        p = torch.from_numpy(log_p[0]).double()
        kl = (p.exp() * (p - found.logprobs[0][order])).sum()
        assert found.ids.shape == (2, live) and (found.ids[1] >= 0).sum() == 5
        assert found.ids[0][order].tolist() == list(range(live)) and abs(kl) < 1e-3, codec


def test_more_levels_cost_more_and_err_less():
    rng = np.random.default_rng(0)
    rows = random_rows(rng, 100, 5000, 64, 2.0, ragged=False)
    coarse = added_kl(rows, round_trip("compact", rows, np.array([100]), 5000, levels=52)).mean()
    fine = added_kl(rows, round_trip("compact", rows, np.array([100]), 5000, levels=208)).mean()
    assert 10 * fine < coarse


def test_counts_are_exact():
    rng = np.random.default_rng(0)
    drawn = [np.unique(rng.zipf(1.3, 50) % 9000, return_counts=True) for _ in range(40)]
    rows = Rows(
        np.array([40]),
        np.array([len(ids) for ids, _ in drawn], np.int32),
        np.concatenate([ids for ids, _ in drawn]).astype(np.int32),
        np.log(np.concatenate([times for _, times in drawn]) / 50).astype(np.float32),
    )
    found = round_trip("counts", rows, np.array([10, 30]), 9000, draws=50)
    assert np.array_equal(by_id(found)[0], by_id(rows)[0])
    assert np.array_equal(by_id(found)[1], by_id(rows)[1])
    with pytest.raises(ValueError, match="multiples of 1 / draws .49."):
        round_trip("counts", rows, np.array([10, 30]), 9000, draws=49)


def test_some_sequences_decode_as_they_do_among_all(tmp_path):
    items = cases.sequences(30, k=8, live=70000)
    for name in ALL:
        identity = cases.meta(live=70000, codec=name)
        whole = cases.write(tmp_path / name, items, identity)
        split = cases.write(tmp_path / f"{name}-split", items, identity, shard_tokens=40)
        batch = whole.batch([item[0] for item in items], 30)
        for i in (29, 3, 0):
            alone = whole.lookup(items[i][0])
            n = len(items[i][0])
            assert torch.equal(alone.ids, batch.ids[i, :n])
            assert torch.equal(alone.logprobs, batch.logprobs[i, :n])
            other = split.lookup(items[i][0])  # another shard, another table of frequent ids
            for row in range(n):
                a = dict(zip(alone.ids[row].tolist(), alone.logprobs[row].tolist(), strict=True))
                b = dict(zip(other.ids[row].tolist(), other.logprobs[row].tolist(), strict=True))
                assert a.keys() == b.keys()


@pytest.mark.parametrize("live", [32768, 32769, 65536, 65537, 151936, 248077])
def test_ids_do_not_wrap(tmp_path, live):
    """int16 wraps at 32,768 and uint16 at 65,536."""
    ids = torch.tensor([[live - 1, 0, live // 2]])
    logprobs = torch.tensor([[0.5, 0.3, 0.1]]).log()
    for name in ALL:
        identity = cases.meta(live=live, top_k=3, codec=name)
        cache = cases.write(tmp_path / name, [(torch.tensor([live - 1]), ids, logprobs)], identity)
        assert sorted(cache.lookup([live - 1]).ids[0].tolist()) == [0, live // 2, live - 1]


def test_frequent_ids_make_a_table_when_it_pays(tmp_path):
    rng = np.random.default_rng(0)
    common = rng.choice(100_000, 300, replace=False)
    items = []
    for i in range(40):
        ids = np.stack([rng.choice(common, 8, replace=False) for _ in range(50)])
        items.append((torch.arange(50) + i, torch.from_numpy(ids), torch.full((50, 8), -3.0)))
    identity = cases.meta(live=100_000, codec="compact")
    cache = cases.write(tmp_path / "cache", items, identity)
    assert len(cache.shard(0).side.tables["ranks"]) == 256
    found = cache.lookup(items[7][0])
    assert torch.equal(found.ids.sort(-1).values, items[7][1].sort(-1).values)


@settings(deadline=None, max_examples=80)
@given(
    st.lists(st.lists(st.integers(0, 2**20), max_size=20), min_size=1, max_size=5),
    st.integers(0, 12),
    st.sampled_from(bits.MODES),
)
def test_prefix_code(parts, k, mode):
    values = np.array([value for part in parts for value in part], np.int64)
    if mode == "rice":
        values %= 1 << min(k + 6, 20)
    bounds = bits.starts(np.array([len(part) for part in parts]))
    unary, rest = bits.encode_prefix(values, k, mode, bounds)
    assert np.array_equal(bits.decode_prefix(unary, rest, k, mode, bounds), values)
    size = 8 * (len(unary[0]) + len(rest[0])) - int(bits.prefix_cost(values, k, mode).sum())
    assert 0 <= size < 16 * len(parts)


@given(st.integers(1, 25), st.lists(st.integers(0, 2**25 - 1), max_size=40))
def test_fixed_width(width, values):
    wanted = np.array(values, np.int64) % (1 << width)
    packed = bits.pack_fixed(wanted, width)
    assert len(packed) == -(-len(values) // 8) * width
    assert np.array_equal(bits.unpack_fixed(packed, width)[: len(values)], wanted)
    # The layout that FORMAT.md states, bit by bit.
    whole = int.from_bytes(packed.tobytes(), "little")
    assert [(whole >> (width * j)) % (1 << width) for j in range(len(values))] == wanted.tolist()


def test_the_codec_is_part_of_the_identity(tmp_path):
    items = cases.sequences(3)
    cases.write(tmp_path / "cache", items, cases.meta(codec="compact"))
    with pytest.raises(ValueError, match="codec: the cache has 'compact', this run has 'log8'"):
        with CacheWriter(tmp_path / "cache", cases.meta(codec="log8")):
            pass
    TeacherCache(tmp_path / "cache", expect=cases.meta(codec="float32"))  # it reads the same
