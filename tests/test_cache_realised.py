"""Every row holds what the teacher gave the token that followed, in the top-k or not."""

import argparse
import json

import cache_cases as cases
import numpy as np
import pytest
import torch

from kd.cache import CacheWriter, TeacherCache
from kd.cache.info import cache_info
from kd.cache.merge import merge_caches
from kd.cache.verify import verify_cache
from kd.cli import cache as cli
from kd.teachers import Selection, build_cache

LIVE = 300


def text(seed=0, length=12):
    return torch.randint(0, LIVE, (length,), generator=torch.Generator().manual_seed(seed))


def exact(model, tokens, temperature):
    logits = model(tokens[None]).logits[0].double() / temperature
    return logits.log_softmax(-1)[:-1].gather(1, tokens[1:, None])[:, 0]


@pytest.mark.parametrize("codec", ["float32", "log8", "compact"])
@pytest.mark.parametrize("temperature", [1.0, 2.0])
def test_it_is_the_teachers_own(tmp_path, codec, temperature):
    model, texts = cases.teacher(vocabulary=LIVE), [text(n, 3 + n) for n in range(9)]
    cache = build_cache(model, texts, tmp_path / "cache", top_k=4, codec=codec,
                        temperature=temperature, shard_tokens=30, progress=False)  # fmt: skip
    outside = 0
    for tokens in texts:
        found = cache.realised(tokens)
        assert (found[:-1] - exact(model, tokens, temperature)).abs().max() <= 1 / 128 + 1e-5
        assert found[-1].isnan() and found.dtype == torch.float32
        outside += int((cache.lookup(tokens).ids[:-1] != tokens[1:, None]).all(-1).sum())
    assert outside > 20 and verify_cache(tmp_path / "cache").sound
    mean = torch.cat([exact(model, tokens, temperature) for tokens in texts]).mean()
    info = cache_info(tmp_path / "cache")
    assert info.perplexity == pytest.approx(float((-mean).exp()), rel=1e-2)
    assert f"perplexity {info.perplexity:.4g}" in info.text()


@pytest.mark.parametrize("name", ["top_p", "sampled", "hybrid"])
def test_every_selection_stores_it(tmp_path, name):
    model, tokens = cases.teacher(vocabulary=LIVE), text()
    selection = Selection(name, top_k=9, top_p=0.5, draws=5, exact=2)
    cache = build_cache(model, [tokens], tmp_path / "cache", selection=selection, progress=False)
    found = cache.realised(tokens)[:-1]
    assert (found - exact(model, tokens, 1.0)).abs().max() <= 1 / 128 + 1e-5


def test_left_out_where_asked_and_never_mixed(tmp_path):
    model, tokens = cases.teacher(vocabulary=LIVE), text()
    cache = build_cache(model, [tokens], tmp_path / "cache", realised=False, progress=False)
    assert "realised" not in json.loads((tmp_path / "cache" / "manifest.json").read_text())["meta"]
    with pytest.raises(ValueError, match="must store the log-probs of the tokens that followed"):
        cache.realised(tokens)
    with pytest.raises(ValueError, match="realised: the cache has '.absent.', this run has True"):
        build_cache(model, [text(1)], tmp_path / "cache", progress=False)
    assert "are not stored" in cache_info(tmp_path / "cache").text()


def test_merged_continued_and_skipped(tmp_path):
    model, texts = cases.teacher(vocabulary=LIVE), [text(n) for n in range(6)]
    options = {"top_k": 5, "codec": "float32", "progress": False}
    whole = build_cache(model, texts, tmp_path / "whole", **options)
    build_cache(model, texts[:4], tmp_path / "a", **options)
    build_cache(model, texts[3:], tmp_path / "b", **options)  # one text in both: encoded again
    merged = merge_caches([tmp_path / "a", tmp_path / "b"], tmp_path / "merged")
    assert merged.content_digest() == whole.content_digest()
    skipping = TeacherCache(tmp_path / "a", on_missing="skip")
    assert skipping.realised(text(77)).isnan().all() and skipping.skipped == 1
    with pytest.raises(KeyError):
        merged.realised(text(77))


def test_it_costs_about_a_byte(tmp_path):
    model = cases.teacher(vocabulary=2000, initializer_range=0.9)
    texts = [torch.randint(0, 2000, (64,)) for _ in range(20)]
    sizes = [
        sum(e.bytes for e in build_cache(model, texts, tmp_path / str(stored), realised=stored,
                                         progress=False).manifest.shards)
        for stored in (False, True)
    ]  # fmt: skip
    assert 0 < (sizes[1] - sizes[0]) / (20 * 64) < 2.5  # these texts surprise: 14 bits each


@pytest.mark.parametrize(
    "change, words",
    [
        (lambda r: None, "realised must be .L. = .12,. floating-point"),
        (lambda r: r[:-1], "realised must be .L. = .12,."),
        (lambda r: r.astype(int), "floating-point"),
        (lambda r: np.append(r[:3], [0.5, *r[4:]]), "a log-probability of at most 0, got 0.5 in"),
        (lambda r: np.roll(r, 1), "that of the row's own entry for the token that follows"),
        (lambda r: np.append(np.full(11, -1e-3), 0), "the row's own entry|leave over"),
    ],
)
def test_what_contradicts_a_row_is_refused(tmp_path, change, words):
    model, tokens = cases.teacher(vocabulary=LIVE), text()
    log_p = model(tokens[None]).logits[0].detach().log_softmax(-1)
    top = log_p.topk(200)
    followed = torch.cat([exact(model, tokens, 1.0).float(), torch.zeros(1)]).detach().numpy()
    identity = cases.meta(live=LIVE, top_k=200, realised=True)
    with CacheWriter(tmp_path / "cache", identity) as writer:
        with pytest.raises(ValueError, match=words):
            writer.add(tokens, top.indices, top.values, None, change(followed))
        writer.add(tokens, top.indices, top.values, None, followed)
    with CacheWriter(tmp_path / "plain", cases.meta(live=LIVE, top_k=200)) as writer:
        with pytest.raises(ValueError, match="meta.realised=False"):
            writer.add(tokens, top.indices, top.values, None, followed)


def test_impossible_and_unknown_tokens(tmp_path):
    """-inf, far below what a float32 softmax holds, NaN where it is not known."""
    given = np.array([-np.inf, -500.0, np.nan, -2000.0, -1e-5, 5e-4, 0.0], np.float32)
    ids = np.full((7, 1), 9)
    identity = cases.meta(live=20, realised=True)
    with CacheWriter(tmp_path / "cache", identity) as writer:
        writer.add(np.arange(7), ids, np.full((7, 1), -800.0, np.float32), None, given)
    found = TeacherCache(tmp_path / "cache").realised(np.arange(7)).numpy()
    want = [-np.inf, -500.0, np.nan, -1024 + 1 / 64, 0.0, 0.0, np.nan]
    np.testing.assert_allclose(found, want)


def test_damage_is_refused_or_found(tmp_path):
    model, texts = cases.teacher(vocabulary=LIVE), [text(n) for n in range(3)]
    cache = build_cache(model, texts, tmp_path / "cache", top_k=200, progress=False)
    shard, seen = cache.shard(0), set()
    for name in ("realised.unary", "realised.bits"):
        data = shard.part(name, range(3))[0]
        for at in range(len(data)):
            changed = data.copy()
            changed[at] ^= 1
            real = shard.places[name]
            shard.places[name] = cases.Changed(changed)
            try:
                values = shard.realised_of(range(3))
            except ValueError as error:
                assert "realised tokens that can be decoded" in str(error)
                seen.add("refused")
            else:
                assert not (values > 0).any()
                seen.add("read")
            shard.places[name] = real
    assert seen == {"refused", "read"}


def test_the_command_line_leaves_it_out():
    verbs = argparse.ArgumentParser().add_subparsers()
    cli.add_parser(verbs)
    parser = verbs.choices["cache"]
    given = ["build", "--teacher", "t", "--data", "d", "--output", "o"]
    assert parser.parse_args(given).realised
    assert not parser.parse_args([*given, "--no-realised"]).realised
