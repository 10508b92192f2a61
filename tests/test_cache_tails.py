"""Stored tails from the capture to the loss: every codec, older caches, merging and damage."""

import json
import math

import cache_cases as cases
import numpy as np
import pytest
import torch

import kd
from kd.cache import CacheWriter, TeacherCache
from kd.cache.merge import merge_caches
from kd.cache.tails import DEFAULT, STEPS, coding_order
from kd.cache.verify import verify_cache
from kd.cli.cache import tail_temperatures
from kd.teachers import Selection, build_cache
from kd.teachers.build import cache_meta

CODECS = ("float32", "log8", "compact")


def built(folder, model=None, sequences=None, **options):
    model = model or cases.teacher(vocabulary=700)
    sequences = cases.texts(12, 700) if sequences is None else sequences
    return build_cache(model, sequences, folder, top_k=9, progress=False, **options)


def real_tails(model, tokens, found, temperature, live=700):
    """log(sum of p ** (T_c / t)) outside the stored ids, from the model's own logits."""
    with torch.no_grad():
        logits = model(input_ids=torch.as_tensor(tokens)[None].long()).logits[0].double()
    log_p = (logits[:, :live] / temperature).log_softmax(-1)
    out = torch.empty(len(log_p), len(found.tail_temperatures), dtype=torch.float64)
    for row, ids in enumerate(found.ids):
        outside = torch.ones(live, dtype=torch.bool)
        outside[ids[ids >= 0]] = False
        for column, t in enumerate(found.tail_temperatures):
            out[row, column] = (log_p[row][outside] * temperature / t).logsumexp(0)
    return out


@pytest.mark.parametrize("codec", CODECS)
@pytest.mark.parametrize("selection", ["top_k", "top_p"])
@pytest.mark.parametrize("temperature", [1.0, 2.0])
def test_every_codec_holds_what_the_teacher_leaves(tmp_path, codec, selection, temperature):
    model, sequences = cases.teacher(vocabulary=700), cases.texts(12, 700)
    choose = Selection(selection, top_k=9, top_p=0.7)
    cache = built(tmp_path / "cache", model, sequences, codec=codec, selection=choose,
                  temperature=temperature, shard_tokens=90)  # fmt: skip
    assert cache.meta.tail_temperatures == DEFAULT and len(cache.manifest.shards) > 1
    for tokens in sequences:
        found = cache.lookup(tokens)
        want = real_tails(model, tokens, found, temperature)
        torch.testing.assert_close(
            found.tail_log_partition.double(), want, rtol=0, atol=0.5 / STEPS + 1e-4
        )
    assert verify_cache(tmp_path / "cache").sound


def test_a_loss_at_another_temperature_is_that_of_the_teachers_logits(tmp_path):
    model, sequences = cases.teacher(vocabulary=700), cases.texts(6, 700)
    cache = built(tmp_path / "cache", model, sequences, codec="float32")
    student = cases.teacher(seed=9, vocabulary=700)
    for tokens in sequences:
        found = cache.lookup(tokens)
        with torch.no_grad():
            z, t = (m(input_ids=tokens[None].long()).logits[0].double() for m in (student, model))
        for temperature in (1.0, 1.4, 2.0, 3.3, 4.0):
            p, q = ((side / temperature).softmax(-1) for side in (t, z))
            p, q = (torch.cat([s.gather(1, found.ids), 1 - s.gather(1, found.ids).sum(1, True)], 1)
                    for s in (p, q))  # fmt: skip
            want = (p * (p / q).log()).sum(1)
            got = kd.forward_kl(
                z, kd.TopK(**vars(found)), temperature=temperature, reduction="none"
            )
            torch.testing.assert_close(got, want, rtol=1e-3, atol=1e-3)


def test_off_older_and_drawn_caches_have_none_and_say_so(tmp_path):
    plain = built(tmp_path / "off", tail_temperatures=None, realised=False)
    manifest = json.loads((tmp_path / "off" / "manifest.json").read_text())
    assert manifest["version"] == 1 and "tail_temperatures" not in manifest["meta"]
    shard = plain.shard(0)
    assert shard.metadata["format"] == "kd-cache/1" and "partition.bits" not in shard.places
    drawn = built(tmp_path / "drawn", selection=Selection("sampled", draws=20))
    for cache in (plain, drawn):
        found = cache.lookup(next(cache.sequences()))
        assert found.tail_log_partition is None and found.tail_temperatures == ()
        student = torch.randn(len(found.ids), 700)
        assert kd.forward_kl(student, kd.TopK(**vars(found))).isfinite()
        with pytest.raises(ValueError, match="temperature.*captured at"):
            kd.forward_kl(student, kd.TopK(**vars(found)), temperature=2.0)
    new = built(tmp_path / "new")
    tails_alone = built(tmp_path / "tails", realised=False)
    versions = [
        json.loads((cache.path / "manifest.json").read_text())["version"]
        for cache in (tails_alone, new)
    ]
    assert versions == [2, 3]
    assert plain.meta.cache_id != new.meta.cache_id


def test_an_older_cache_is_continued_as_it_is_and_not_with_tails(tmp_path):
    sequences = cases.texts(12, 700)
    built(tmp_path / "cache", sequences=sequences[:5], tail_temperatures=())
    with pytest.raises(ValueError, match=r"tail_temperatures.*\(absent\)"):
        built(tmp_path / "cache", sequences=sequences)
    assert len(built(tmp_path / "cache", sequences=sequences, tail_temperatures=None)) == 12
    model = cases.teacher(vocabulary=700)
    expected = cache_meta(model, top_k=9)
    with pytest.raises(ValueError, match="tail_temperatures"):
        TeacherCache(tmp_path / "cache", expect=expected)
    assert len(TeacherCache(tmp_path / "cache", expect=expected, allow=("tail_temperatures",)))
    whole = built(tmp_path / "whole", model, sequences)
    without = cache_meta(model, top_k=9, tail_temperatures=None)
    assert TeacherCache(tmp_path / "whole", expect=without).meta == whole.meta


def test_stopped_and_merged_is_the_same(tmp_path):
    sequences = cases.texts(12, 700)
    whole = built(tmp_path / "whole", sequences=sequences, shard_tokens=60)
    built(tmp_path / "twice", sequences=sequences[:7], shard_tokens=60)
    again = built(tmp_path / "twice", sequences=sequences, shard_tokens=60)
    a = built(tmp_path / "a", sequences=sequences[:8], codec="float32")
    built(tmp_path / "b", sequences=sequences[4:], codec="float32")
    merged = merge_caches([tmp_path / "a", tmp_path / "b"], tmp_path / "c")  # b is encoded again
    assert a.meta.tail_temperatures == merged.meta.tail_temperatures
    for tokens in sequences:
        want = whole.lookup(tokens).tail_log_partition
        for cache in (again, merged):
            got = cache.lookup(tokens).tail_log_partition
            torch.testing.assert_close(got, want, rtol=0, atol=1.01 / STEPS)
    with pytest.raises(ValueError, match="tail_temperatures"):
        built(tmp_path / "d", sequences=sequences[:3], codec="float32", tail_temperatures=(1, 2))
        merge_caches([tmp_path / "a", tmp_path / "d"], tmp_path / "e")


def test_batches_pad_skip_and_keep_the_likeliest(tmp_path):
    model, sequences = cases.teacher(vocabulary=700), cases.texts(5, 700)
    cache = built(tmp_path / "cache", model, sequences, codec="float32")
    batch = cache.packed([[sequences[0], sequences[1]], [sequences[2]]], 90)
    assert batch.tail_log_partition.shape == (2, 90, len(DEFAULT))
    used = len(sequences[0]) + len(sequences[1])
    assert (batch.tail_log_partition[0, used:] == 0).all()
    torch.testing.assert_close(
        batch.tail_log_partition[0, len(sequences[0]) : used],
        cache.lookup(sequences[1]).tail_log_partition,
    )
    few = TeacherCache(tmp_path / "cache", top_k=3).lookup(sequences[0])
    assert few.ids.shape[1] == 3
    want = real_tails(model, sequences[0], few, 1.0)
    torch.testing.assert_close(few.tail_log_partition.double(), want, rtol=0, atol=2 / STEPS)
    lenient = TeacherCache(tmp_path / "cache", on_missing="skip")
    found = lenient.batch([torch.tensor([1, 2, 3]), sequences[0]], 60)
    loss = kd.forward_kl(torch.randn(2, 60, 700), kd.TopK(**vars(found)), temperature=2.0)
    assert loss.isfinite() and lenient.skipped == 1


def test_rows_without_a_tail_and_without_a_token(tmp_path):
    identity = cases.meta(live=4, top_k=4, codec="log8", tail_temperatures=(1, 2, 4))
    ids = torch.tensor([[0, 1, 2, 3], [1, 2, -1, -1], [-1, -1, -1, -1]])
    logprobs = torch.tensor([[0.25] * 4, [0.5, 0.4, 0, 0], [0.0] * 4]).log()
    tails = torch.full((3, 3), -torch.inf)
    tails[1] = torch.tensor([math.log(0.1), math.log(0.4), math.log(0.9)])
    cache = cases.write(
        tmp_path / "cache", [(torch.tensor([1, 2, 3]), ids, logprobs, tails)], identity
    )
    found = cache.lookup([1, 2, 3]).tail_log_partition
    assert (found[0] == -torch.inf).all() and (found[2] == 0).all()
    torch.testing.assert_close(found[1], tails[1], rtol=0, atol=0.51 / STEPS)


@pytest.mark.parametrize(
    "change, words",
    [
        (lambda t: None, r"must be \[L, M\] = \(6, 3\) .* got None"),
        (lambda t: t[:5], r"got \(5, 3\)"),
        (lambda t: t[:, :2], r"got \(6, 2\)"),
        (lambda t: t.long(), r"floating-point values"),
        (lambda t: t * math.nan, "finite, or -inf in a whole row"),
        (lambda t: t + math.inf, "finite, or -inf in a whole row"),
        (lambda t: t.index_fill(1, torch.tensor([1]), -math.inf), "-inf in a whole row"),
        (lambda t: t.flip(1), "larger at a higher temperature|probability left over"),
        (lambda t: t + 3, "probability left over, or less"),
    ],
)
def test_the_writer_refuses_what_is_no_tail(tmp_path, change, words):
    identity = cases.meta(live=50, tail_temperatures=(1, 2, 4))
    tokens, ids, logprobs = cases.targets(6, 5, 50)
    rest = 1 - logprobs.exp().sum(-1, keepdim=True)
    tails = torch.cat(
        [rest.log(), (45 * (rest / 45) ** 0.5).log(), (45 * (rest / 45) ** 0.25).log()], 1
    )
    with CacheWriter(tmp_path / "cache", identity) as writer:
        with pytest.raises(ValueError, match=words):
            writer.add(tokens, ids, logprobs, change(tails))
        writer.add(tokens, ids, logprobs, tails)
    with CacheWriter(tmp_path / "plain", cases.meta(live=50)) as writer:
        with pytest.raises(ValueError, match="tails must be"):
            writer.add(tokens, ids, logprobs, tails)


@pytest.mark.parametrize("codec", CODECS)
def test_damage_that_is_signed_is_refused_or_found(tmp_path, codec):
    """Every byte of the streams, one at a time: refused, found by verify, or valid rows."""
    cache = built(tmp_path / "cache", codec=codec, sequences=cases.texts(2, 700, longest=6))
    shard = cache.shard(0)
    seen = set()
    for name in ("partition.unary", "partition.bits"):
        place = shard.places[name]
        data = np.array(place.read())
        for at in range(len(data)):
            for flip in (1, 128):
                changed = data.copy()
                changed[at] ^= flip
                shard.places[name] = cases.Changed(changed)
                try:
                    tails = shard.read([0, 1]).tails
                except ValueError as error:
                    assert "rows that can be decoded" in str(error)
                    seen.add("refused")
                else:
                    assert not np.isnan(tails).any() and not (tails == np.inf).any()
                    seen.add("read")
        shard.places[name] = place
    assert seen == {"refused", "read"}


@pytest.mark.parametrize(
    "text", ["", "1 2 3", "x 0 0 0", str(2**50) + " 0" * 55, "1 " * 55, "nan " * 56]
)
def test_parameters_that_are_none_are_refused(tmp_path, text):
    shard = built(tmp_path / "cache").shard(0)
    shard.side.params["partition"] = text
    with pytest.raises(ValueError, match="rows that can be decoded"):
        shard.read([0])


@pytest.mark.parametrize(
    "options, words",
    [
        ({"tail_temperatures": (1, 1)}, "different numbers above 0"),
        ({"tail_temperatures": (0.0, 1)}, "different numbers above 0"),
        ({"tail_temperatures": ("1",)}, "different numbers above 0"),
        ({"tail_temperatures": tuple(range(1, 18))}, r"at most 16 temperatures, got \(1, 2"),
        ({"tail_temperatures": 2.0}, "must be a list of numbers"),
        ({"tail_temperatures": (1, 2), "selection": "sampled"}, "which has no tail"),
    ],
)
def test_a_meta_with_impossible_temperatures(options, words):
    with pytest.raises((TypeError, ValueError), match=words):
        cases.meta(**options)


def test_what_the_command_line_says():
    assert tail_temperatures("auto") == "auto" and tail_temperatures("none") is None
    assert tail_temperatures("1,1.5,4") == (1.0, 1.5, 4.0)
    with pytest.raises(ValueError, match="tail_temperatures must be 'auto'"):
        cache_meta(cases.teacher(), tail_temperatures="many")
    with pytest.raises(ValueError, match="which has no tail"):
        cache_meta(cases.teacher(), selection="sampled", tail_temperatures=(1.0, 2.0))


@pytest.mark.parametrize("number", range(1, 17))
def test_every_column_is_coded_once(number):
    assert sorted(coding_order(number)) == list(range(number))


def test_four_bytes_a_token_at_most(tmp_path):
    """Tails as far apart as real ones: normal logits of several widths."""
    sizes = {}
    model = cases.teacher(vocabulary=2000, initializer_range=0.9)
    sequences = [torch.randint(0, 2000, (64,)) for _ in range(40)]
    for name, temperatures in (("with", "auto"), ("without", None)):
        cache = build_cache(model, sequences, tmp_path / name, top_k=64, progress=False,
                            tail_temperatures=temperatures)  # fmt: skip
        sizes[name] = sum(entry.bytes for entry in cache.manifest.shards) / cache.tokens
    assert sizes["with"] - sizes["without"] < 5
