"""The doctor names what is wrong with a cache; the kd cache command does what it says."""

import json
import re

import cache_cases as cases
import numpy as np
import pytest
import torch

from kd.cache import CacheWriter, TeacherCache
from kd.cache.merge import merge_caches
from kd.cli.main import main
from kd.teachers import Selection, build_cache, cache_meta, diagnose


@pytest.fixture(scope="module")
def model():
    return cases.teacher()


def long_texts(count, **options):
    return [item for item in cases.texts(3 * count, **options) if len(item) > 8][:count]


def shifted(cache, path, shift):
    """The cache with every row at another position: what an off-by-one capture stores."""
    with CacheWriter(path, cache.meta) as writer:
        for tokens in cache.sequences():
            found = cache.lookup(tokens)
            rows = (found.ids, found.logprobs, found.tail_log_partition)
            writer.add(tokens, *(values.roll(shift, 0) for values in rows))
    return TeacherCache(path)


@pytest.mark.parametrize("selection", ["top_k", "top_p", "hybrid", "sampled"])
def test_a_good_cache_is_healthy(tmp_path, model, selection):
    sequences = long_texts(20)
    choose = Selection(selection, top_k=12, draws=60, exact=6)
    cache = build_cache(model, sequences, tmp_path / "cache", selection=choose, progress=False)
    found = diagnose(cache, model, sequences=sequences)
    assert found.healthy, found.text()
    assert found.scored > 50 and found.found == found.wanted == 20


@pytest.mark.parametrize(
    ("shift", "words"), [(1, "1 position.s. late"), (-1, "1 position.s. early")]
)
def test_rows_off_by_one(tmp_path, model, shift, words):
    cache = build_cache(
        model, long_texts(20), tmp_path / "cache", top_k=12, realised=False, progress=False
    )
    found = diagnose(shifted(cache, tmp_path / "shifted", shift), model)
    assert len(found.problems) == 1
    assert re.search(words, found.problems[0])


def test_another_teacher(tmp_path, model):
    cache = build_cache(model, long_texts(5), tmp_path / "cache", top_k=12, progress=False)
    words = "\n".join(diagnose(cache, cases.teacher(seed=1)).problems)
    assert (
        "teacher.weights_hash: the cache has" in words and "rows differ from the teacher" in words
    )


def test_values_of_another_temperature(tmp_path, model):
    cache = build_cache(model, long_texts(5), tmp_path / "a", top_k=12, progress=False)
    meta = cache_meta(model, top_k=12, temperature=3.0, tail_temperatures=None, realised=False)
    with CacheWriter(tmp_path / "b", meta) as writer:
        for tokens in cache.sequences():
            found = cache.lookup(tokens)
            writer.add(tokens, found.ids, found.logprobs)
    assert "temperature" in diagnose(TeacherCache(tmp_path / "b"), model).problems[0]


def test_truncated_and_changed_sequences(tmp_path, model):
    sequences = long_texts(6)
    cache = build_cache(model, sequences, tmp_path / "cache", top_k=8, progress=False)
    changed = sequences[0].clone()
    changed[4] = (changed[4] + 1) % 61
    for wanted, words in (
        (sequences[0][:-2], "truncated since the capture"),
        (torch.cat([sequences[0], sequences[1]]), "truncated at the capture"),
        (changed, "changed since the capture from token 4 on"),
    ):
        found = diagnose(cache, sequences=[*sequences, wanted])
        assert found.found == 6 and found.wanted == 7
        assert words in found.problems[0], found.problems


def test_another_tokenizer(tmp_path, model):
    from test_vocab_fingerprint import tokenizer

    made = tokenizer()
    cache = build_cache(
        cases.teacher(vocabulary=300), cases.texts(3), tmp_path / "cache", tokenizer=made,
        top_k=8, progress=False,
    )  # fmt: skip
    assert cache.meta.live_vocab == len(made) == 260
    assert diagnose(cache, tokenizer=tokenizer()).healthy
    words = diagnose(cache, tokenizer=tokenizer(split_digits=True)).problems[0]
    assert "another tokenizer: pipeline" in words and "is tokenised differently" in words


def test_merging(tmp_path):
    items = cases.sequences(30)
    identity = cases.meta(codec="compact")
    cases.write(tmp_path / "a", items[:20], identity, shard_tokens=64)
    cases.write(tmp_path / "b", items[15:], identity, shard_tokens=64)
    cases.write(tmp_path / "c", items[:1], cases.meta(codec="compact", temperature=2.0))
    with pytest.raises(ValueError, match="temperature: .*a has 1.0, .*c has 2.0"):
        merge_caches([tmp_path / "a", tmp_path / "c"], tmp_path / "merged")
    assert not (tmp_path / "merged").exists()
    merged = merge_caches([tmp_path / "a", tmp_path / "b"], tmp_path / "merged")
    assert len(merged) == 30 and merged.manifest.counters["duplicates_dropped"] >= 1
    whole = TeacherCache(tmp_path / "a")
    for input_ids, _, _ in items[:20]:  # a's shards were copied as they are
        assert torch.equal(merged.lookup(input_ids).logprobs, whole.lookup(input_ids).logprobs)


def run(capsys, *arguments):
    status = main(["cache", *map(str, arguments)])
    shown = capsys.readouterr()
    return status, shown.out + shown.err


def test_the_command(tmp_path, model, capsys):
    model.save_pretrained(tmp_path / "teacher")
    data = tmp_path / "data.jsonl"
    sequences = long_texts(12)
    data.write_text("".join(json.dumps({"input_ids": t.tolist()}) + "\n" for t in sequences))
    cache = tmp_path / "cache"
    build = ["build", "--teacher", tmp_path / "teacher", "--data", data, "--output", cache]
    status, shown = run(capsys, *build, "--top-k", 12, "--limit", 5)
    assert status == 0 and "5 sequences" in shown, shown
    status, shown = run(capsys, *build, "--top-k", 12)  # goes on
    assert status == 0 and "12 sequences" in shown
    status, shown = run(capsys, *build, "--top-k", 9)
    assert status == 1 and "top_k: the cache has 12, this run has 9" in shown
    status, shown = run(capsys, "info", cache, "--plot", tmp_path / "mass.png")
    assert status == 0 and "bytes/token" in shown and "mass covered" in shown
    assert (tmp_path / "mass.png").stat().st_size > 1000
    status, shown = run(capsys, "info", cache, "--json")
    assert json.loads(shown)["sequences"] == 12 and 0 < json.loads(shown)["mass_mean"] <= 1
    assert run(capsys, "verify", cache)[0] == 0
    doctor = ["doctor", cache, "--teacher", tmp_path / "teacher", "--data", data]
    status, shown = run(capsys, *doctor)
    assert status == 0 and "healthy" in shown and "12 of 12" in shown
    status, shown = run(capsys, "merge", cache, "--output", tmp_path / "merged")
    assert status == 0 and "12 sequences" in shown
    shard = next(cache.glob("shard-*"))
    shard.write_bytes(shard.read_bytes()[:-1])
    status, shown = run(capsys, "verify", cache)
    assert status == 1 and "NOT SOUND" in shown and shard.name in shown
    assert run(capsys, "verify", cache, "--repair")[0] == 1
    assert run(capsys, *build, "--top-k", 12)[0] == 0
    assert run(capsys, "verify", cache)[0] == 0


def test_importing_on_the_command_line(tmp_path, capsys):
    record = {"prompt_token_ids": [1, 2], "prompt_logprobs": [None, {"2": -0.5, "3": -1.5}]}
    (tmp_path / "a.jsonl").write_text(json.dumps(record))
    status, shown = run(
        capsys, "import", tmp_path / "a.jsonl", "--format", "logprobs", "--output",
        tmp_path / "cache", "--vocab", 100, "--teacher", "t",
    )  # fmt: skip
    assert status == 0 and "1 sequences, 2 tokens" in shown


def test_low_coverage_is_warned_of(tmp_path):
    from kd.cache.info import cache_info

    ids = torch.arange(4).repeat(9, 1)
    items = [(np.arange(9), ids, torch.full((9, 4), -3.0))]
    info = cache_info(cases.write(tmp_path / "cache", items).path)
    assert "100 % of the rows hold less than 0.5" in info.text()
