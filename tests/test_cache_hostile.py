"""Hostile caches: random damage, and damage signed again by someone who knows the format.

Whatever is done to a header, a manifest or the data, a cache is refused with one of kd's own
messages or loads; it never crashes, hangs, takes the machine's memory or reads outside its folder.
"""

import copy
import hashlib
import json
import os
import resource
import sys
import time

import cache_cases as cases
import numpy as np
import pytest
import torch

from kd.cache import CacheMeta, CacheWriter, HiddenCache, TeacherCache, manifest
from kd.cache.verify import verify_cache

MEMORY = 4 << 30  # above what the process has: no file may make it ask for that much
SECONDS = 5.0  # for one file, on a busy machine
LIVE, K, DRAWS = 700, 8, 20
CODECS = ("float32", "log8", "compact", "counts")
OPENED: list[str] | None = None


def listen(event, arguments):
    if OPENED is not None and event in ("open", "os.listdir", "subprocess.Popen", "exec"):
        OPENED.append(f"{event}:{arguments[0]!s}")


sys.addaudithook(listen)


@pytest.fixture(autouse=True)
def bounded_memory():
    """An allocation of gigabytes fails here instead of taking the machine down."""
    with open("/proc/self/statm") as file:
        used = int(file.read().split()[0]) * resource.getpagesize()
    old = resource.getrlimit(resource.RLIMIT_AS)
    resource.setrlimit(resource.RLIMIT_AS, (used + MEMORY, old[1]))
    yield
    resource.setrlimit(resource.RLIMIT_AS, old)


def make(folder, codec):
    """A cache of rows that differ in length; float32 rows have one length each."""
    items = cases.sequences(12, k=K, live=LIVE, lengths=(1, 20))
    if codec == "counts":
        rng = np.random.default_rng(0)
        for i, (tokens, ids, _) in enumerate(items):
            times = rng.multinomial(DRAWS, [1 / K] * K, len(ids))
            logprobs = np.log(np.maximum(times, 1e-9) / DRAWS)
            items[i] = (tokens, np.where(times > 0, ids.numpy(), -1), logprobs)
    elif codec != "float32":
        for _, ids, _ in items:
            ids[::3, 5:] = -1
    options = {"selection": "sampled", "selection_options": {"draws": DRAWS}}
    identity = cases.meta(LIVE, DRAWS, codec, **(options if codec == "counts" else {}))
    with CacheWriter(folder, identity, shard_tokens=64) as writer:
        for tokens, ids, logprobs in items:
            writer.add(tokens, ids, logprobs)
    return [item[0] for item in items]


def read_all(folder, texts, verify=True):
    """Everything a trainer and the tools would read, as comparable values."""
    cache = TeacherCache(folder, verify=verify)
    found = []
    for tokens in texts:
        got = cache.lookup(tokens)
        used = got.ids >= 0
        assert bool((got.ids < LIVE).all()) and bool((got.ids >= -1).all())
        assert bool((got.logprobs[used] <= 0).all())
        found.append((got.ids, got.logprobs))
    list(cache.sequences())
    list(cache.blocks())
    return found


def read_damaged(folder, texts, before, *, verify=True, identical=True):
    """Read a damaged cache: kd's own refusal, or (when ``identical``) the same data."""
    global OPENED
    start, OPENED = time.perf_counter(), []
    try:
        found = read_all(folder, texts, verify)
        verify_cache(folder)
    except (ValueError, KeyError, OSError) as error:
        text = error.args[0] if isinstance(error, KeyError) else str(error)
        assert text.startswith(("TeacherCache", "kd.cache", "CacheMeta")), repr(error)
        assert " must " in text and " got " in text and len(text) < 5000, text
        outcome = "refused"
    else:
        outcome = "loaded"
        same = all(
            torch.equal(a, b)
            for x, y in zip(found, before, strict=True)
            for a, b in zip(x, y, strict=True)
        )
        assert same or not identical, "changed data was loaded"
    finally:
        opened, OPENED = OPENED, None
        seconds = time.perf_counter() - start
    inside = os.path.realpath(folder)
    outside = [
        item for item in opened
        if not os.path.realpath(item.partition(":")[2]).startswith(inside)
    ]  # fmt: skip
    assert not outside and seconds < SECONDS, (outside, seconds)
    return outcome


def damage(data, rng):
    """A file with something done to it, and what was done."""
    data, size = bytearray(data), len(data)
    at = int(rng.integers(size)) if rng.random() < 0.6 else int(rng.integers(min(size, 1500)))
    span = int(rng.integers(1, 40))
    kind = str(rng.choice(["bit", "byte", "bytes", "cut", "insert", "truncate", "zeros", "copy"]))
    if kind == "bit":
        data[at] ^= 1 << int(rng.integers(8))
    elif kind == "byte":
        data[at] = int(rng.integers(256))
    elif kind == "bytes":
        data[at : at + span] = rng.bytes(min(span, size - at))
    elif kind == "cut":
        del data[at : at + span]
    elif kind == "insert":
        data[at:at] = rng.bytes(span)
    elif kind == "truncate":
        del data[at:]
    elif kind == "zeros":
        data[at : at + span] = bytes(min(span, size - at))
    else:
        other = int(rng.integers(size))
        data[at : at + span] = data[other : other + span]
    return bytes(data), f"{kind} at {at}"


def sign(folder):
    """Make the manifest agree with the files, as someone who knows the format can."""
    path = folder / manifest.NAME
    body = json.loads(path.read_text())
    for entry in body["shards"]:
        data = (folder / entry["name"]).read_bytes()
        entry.update(bytes=len(data), sha256=hashlib.sha256(data).hexdigest())
    body["digest"] = manifest.digest_of(body)
    path.write_text(json.dumps(body))


@pytest.mark.parametrize("codec", CODECS)
def test_random_damage_is_refused_or_without_effect(tmp_path, codec):
    texts = make(tmp_path, codec)
    before = read_all(tmp_path, texts)
    files = [tmp_path / manifest.NAME, *sorted(tmp_path.glob("shard-*"))]
    good = {path: path.read_bytes() for path in files}
    rng = np.random.default_rng(CODECS.index(codec))
    outcomes = []
    for _ in range(160):
        path = files[int(rng.integers(len(files)))] if rng.random() < 0.7 else files[0]
        data, what = damage(good[path], rng)
        path.write_bytes(data)
        try:
            outcomes.append(read_damaged(tmp_path, texts, before))
            assert outcomes[-1] == "refused" or data == good[path] or path == files[0], what
        finally:
            path.write_bytes(good[path])
    assert outcomes.count("refused") > 120


@pytest.mark.parametrize("codec", CODECS)
def test_signed_damage_never_gets_past_the_reader(tmp_path, codec):
    """The checksums hold: only the reader's own checks are left. Ids and log-probs that come out
    are valid ones."""
    texts = make(tmp_path, codec)
    before = read_all(tmp_path, texts)
    files = [tmp_path / manifest.NAME, *sorted(tmp_path.glob("shard-*"))]
    good = {path: path.read_bytes() for path in files}
    rng = np.random.default_rng(100 + CODECS.index(codec))
    outcomes = []
    for number in range(160):
        path = files[1 + int(rng.integers(len(files) - 1))]
        data, _ = damage(good[path], rng)
        path.write_bytes(data)
        if number % 2:
            sign(tmp_path)
        try:
            outcomes.append(
                read_damaged(tmp_path, texts, before, verify=number % 2 == 1, identical=False)
            )
        finally:
            for name, content in good.items():
                name.write_bytes(content)
    assert {"refused", "loaded"} == set(outcomes)


HOSTILE = (
    None, True, -1, 0, 2**31, 2**40, 2**63, 10**40, 1e308, float("inf"), "", "x", "../x",
    "/etc/passwd", [], [[]], {}, {"a": {}}, [None], "9" * 5000,
)  # fmt: skip


def places(value, path=()):
    """Every place in a JSON value, as keys from its root."""
    if path:
        yield path
    inner = value.items() if isinstance(value, dict) else ()
    inner = enumerate(value) if isinstance(value, list) else inner
    for name, below in inner:
        yield from places(below, (*path, name))


def put(value, path, new):
    changed = copy.deepcopy(value)
    at = changed
    for name in path[:-1]:
        at = at[name]
    at[path[-1]] = new
    return changed


@pytest.mark.parametrize("codec", ["float32", "compact"])
def test_hostile_values_anywhere_in_a_signed_manifest(tmp_path, codec):
    texts = make(tmp_path, codec)
    before = read_all(tmp_path, texts)
    path = tmp_path / manifest.NAME
    body = json.loads(path.read_text())
    known = [place for place in places(body) if place[0] != "digest"]
    rng = np.random.default_rng(5)
    for number in range(200):
        place = known[number % len(known)]
        changed = put(body, place, HOSTILE[int(rng.integers(len(HOSTILE)))])
        try:
            changed["cache_id"] = CacheMeta.from_dict(changed["meta"]).cache_id
            changed["digest"] = manifest.digest_of(changed)
        except (ValueError, TypeError, KeyError):
            changed["digest"] = "0" * 64
        path.write_text(json.dumps(changed))
        read_damaged(tmp_path, texts, before, identical=False)


@pytest.mark.parametrize("codec", CODECS)
def test_hostile_values_anywhere_in_a_signed_header(tmp_path, codec):
    """Counts, shapes, offsets and a codec's parameters that were never written by kd."""
    texts = make(tmp_path, codec)
    before = read_all(tmp_path, texts)
    path = sorted(tmp_path.glob("shard-*"))[0]
    good, listed = path.read_bytes(), (tmp_path / manifest.NAME).read_bytes()
    length = int.from_bytes(good[:8], "little")
    header = json.loads(good[8 : 8 + length])
    params = json.loads(header["__metadata__"]["params"])
    rng = np.random.default_rng(6)
    known = list(places(header))
    for number in range(120):
        value = HOSTILE[int(rng.integers(len(HOSTILE)))]
        if params and number % 4 == 0:
            name = list(params)[int(rng.integers(len(params)))]
            text = json.dumps({**params, name: value})
            changed = put(header, ("__metadata__", "params"), text)
        else:
            place = known[int(rng.integers(len(known)))]
            text = value if place[0] != "__metadata__" or number % 2 else str(value)
            changed = put(header, place, text)
        words = json.dumps(changed).encode()
        path.write_bytes(len(words).to_bytes(8, "little") + words + good[8 + length :])
        sign(tmp_path)
        read_damaged(tmp_path, texts, before, identical=False)
        (tmp_path / manifest.NAME).write_bytes(listed)


def test_a_signed_shard_that_claims_four_billion_rows(tmp_path):
    """Lengths that add up, a manifest that agrees, and no bytes behind them."""
    make(tmp_path, "float32")
    path = sorted(tmp_path.glob("shard-*"))[0]
    data = bytearray(path.read_bytes())
    length = int.from_bytes(data[:8], "little")
    header = json.loads(data[8 : 8 + length])
    begin = 8 + length + header["lengths"]["data_offsets"][0]
    old = int.from_bytes(data[begin : begin + 4], "little")
    data[begin : begin + 4] = (2**32 - 1).to_bytes(4, "little")
    rows = int(header["__metadata__"]["rows"]) + 2**32 - 1 - old
    header["__metadata__"].update(rows=str(rows), entries=str(K * rows))
    words = json.dumps(header).encode()
    path.write_bytes(len(words).to_bytes(8, "little") + words + bytes(data[8 + length :]))
    body = json.loads((tmp_path / manifest.NAME).read_text())
    body["shards"][0].update(rows=rows, entries=K * rows)
    (tmp_path / manifest.NAME).write_text(json.dumps(body))
    sign(tmp_path)
    with pytest.raises(ValueError, match="must have .* got"):
        list(TeacherCache(tmp_path).blocks())


def test_hidden_states_under_read_damaged(tmp_path):
    from kd.teachers import build_hidden_cache

    texts = cases.texts(6)
    build_hidden_cache(cases.teacher(), texts, tmp_path, progress=False)
    wanted = HiddenCache(tmp_path).lookup(texts[0]).hidden
    files = [path for path in sorted(tmp_path.iterdir()) if path.name[0] != "."]
    rng = np.random.default_rng(7)
    for _ in range(100):
        path = files[int(rng.integers(len(files)))]
        good = path.read_bytes()
        path.write_bytes(damage(good, rng)[0])
        try:
            found = HiddenCache(tmp_path).lookup(texts[0])
            assert torch.equal(found.hidden, wanted)
        except (ValueError, OSError, KeyError) as error:
            assert " must " in str(error) and " got " in str(error), repr(error)
        finally:
            path.write_bytes(good)
