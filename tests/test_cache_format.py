"""A reader written from FORMAT.md alone, in plain Python, agrees with the library's."""

import hashlib
import json
import math
import re
from pathlib import Path

import cache_cases as cases
import numpy as np
import pytest
from safetensors import safe_open

import kd.cache
from kd.cache import tails
from kd.teachers import Selection, build_cache


class Bits:
    """A stream's part, bit by bit."""

    def __init__(self, data):
        self.bits = [(byte >> i) & 1 for byte in data.tolist() for i in range(8)]
        self.at = 0

    def number(self, width):
        taken = self.bits[self.at : self.at + width]
        self.at += width
        return sum(bit << i for i, bit in enumerate(taken))

    def zeros(self):
        count = 0
        while self.number(1) == 0:
            count += 1
        return count


def prefix_code(unary, bits, mode, k):
    c = unary.zeros()
    if mode == "rice":
        return (c << k) + bits.number(k)
    return (((1 << c) - 1) << k) + bits.number(c + k)


def read_plainly(folder):
    """{tokens: [{id: log-prob}, ...]} of a whole cache."""
    manifest = json.loads((folder / "manifest.json").read_text())
    canonical = {"sort_keys": True, "separators": (",", ":")}
    body = {name: value for name, value in manifest.items() if name != "digest"}
    assert hashlib.sha256(json.dumps(body, **canonical).encode()).hexdigest() == manifest["digest"]
    meta, found = manifest["meta"], {}
    version = 3 if meta.get("realised") else 2 if "tail_temperatures" in meta else 1
    assert (manifest["format"], manifest["version"]) == ("kd-cache", version)
    for entry in manifest["shards"]:
        path = folder / entry["name"]
        assert hashlib.sha256(path.read_bytes()).hexdigest() == entry["sha256"]
        with safe_open(path, "numpy") as file:
            tensors = {name: file.get_tensor(name) for name in file.keys()}
            found |= read_shard(tensors, file.metadata(), meta)
    return found


def read_shard(tensors, metadata, meta):
    width = max(1, (meta["live_vocab"] - 1).bit_length())
    params, found, row = json.loads(metadata["params"]), {}, 0
    table = tensors.get("ranks", np.zeros(0, int)).tolist()
    listed = set(table)
    id_at = table + [i for i in range(meta["live_vocab"]) if i not in listed]
    for s, length in enumerate(tensors["lengths"].tolist()):

        def part(name, s=s):
            start, stop = tensors[f"{name}.offsets"][s : s + 2].tolist()
            return tensors[name][start:stop]

        stream = Bits(part("tokens"))
        tokens = tuple(stream.number(width) for _ in range(length))
        key = hashlib.sha256(np.array(tokens, "<i4").tobytes()).digest()[:16]
        assert key == tensors["keys"][s].tobytes()
        same = int(metadata["row_entries"])
        counts = [same] * length if same >= 0 else tensors["counts"][row : row + length].tolist()
        row += length
        rows = DECODERS[metadata["codec"]](part, counts, width, id_at, params, meta)
        found[tokens] = rows
        if "tail_temperatures" in meta:
            for row_, tails in zip(
                rows, read_tails(part, rows, params, meta, metadata["codec"]), strict=True
            ):
                row_["tails"] = tails
        if meta.get("realised"):
            unary, bits = Bits(part("realised.unary")), Bits(part("realised.bits"))
            for row_ in rows:
                value = prefix_code(unary, bits, params["realised_mode"], params["realised_k"])
                level = value - 1
                row_["realised"] = (
                    math.nan if level < 0 else -math.inf if level == 65_536 else -level / 64
                )
    return found


def own_tails(part, rows, codec):
    if codec == "compact":
        return part("heads").reshape(-1, 2)[:, 0].tolist()
    if codec == "log8":
        return part("tails").tolist()
    left = [1 - math.fsum(math.exp(v) for v in row.values()) for row in rows]
    odds = [math.log(max(t, 1e-12)) - math.log(1 - max(t, 1e-12)) for t in left]
    return [round(min(max((o + 15.9) * 254 / 23.9, 0), 254)) for o in odds]


def read_tails(part, rows, params, meta, codec):
    number, order, spans = len(meta["tail_temperatures"]), [], []
    order, spans = [0, number - 1], [(0, number - 1)]
    while spans:
        a, b = spans.pop(0)
        middle = (a + b) // 2
        if middle > a:
            order.append(middle)
            spans += [(a, middle), (middle, b)]
    words, lines = [int(word) for word in params["partition"].split()], []
    for n in range(number):
        lines.append(words[: n + 3])
        words = words[n + 3 :]
    assert not words
    unary, bits = Bits(part("partition.unary")), Bits(part("partition.bits"))
    for byte in own_tails(part, rows, codec):
        odds = -15.9 + min(byte, 254) * 23.9 / 254
        seen, levels, none = [round(448 * -math.log1p(math.exp(-odds)))], {}, False
        for n, column in enumerate(order):
            k, constant, *coefficients = lines[n]
            value = prefix_code(unary, bits, "exponential", k)
            if n == 0:
                none, value = value == 0, max(value - 1, 0)
            residual = -(value + 1) // 2 if value % 2 else value // 2
            total = constant + sum(c * a for c, a in zip(coefficients, seen, strict=True))
            levels[column] = total // 2**16 + residual
            seen.append(levels[column])
        yield [-math.inf if none else levels[column] / 448 for column in range(number)]


def ids_of(part, counts, id_at, params):
    unary, bits, rows = Bits(part("gaps.unary")), Bits(part("gaps.bits")), []
    for count in counts:
        rank, ids = -1, []
        for _ in range(count):
            rank += 1 + prefix_code(unary, bits, params["gap_mode"], params["gap_k"])
            ids.append(id_at[rank])
        rows.append(ids)
    return rows


def scaled(ids, u, tail):
    t = 0.0 if tail == 255 else 1 / (1 + math.exp(15.9 - tail * 23.9 / 254))
    total = sum(math.exp(x) for x in u)
    return {i: min(0, x + math.log(1 - t) - math.log(total)) for i, x in zip(ids, u, strict=True)}


def float32(part, counts, width, id_at, params, meta):
    ids, values, rows = Bits(part("ids")), iter(part("values").view("<f4").tolist()), []
    for count in counts:
        rows.append({ids.number(width): next(values) for _ in range(count)})
    return rows


def log8(part, counts, width, id_at, params, meta):
    values, rows = iter(part("values").tolist()), []
    heads, tails = part("heads").view("<f2").tolist(), part("tails").tolist()
    for ids, span, tail in zip(ids_of(part, counts, id_at, params), heads, tails, strict=True):
        rows.append(scaled(ids, [-span * (next(values) / 255) ** 2 for _ in ids], tail))
    return rows


def compact(part, counts, width, id_at, params, meta):
    n, rows = meta["codec_options"].get("levels", 110), []
    unary, bits = Bits(part("levels.unary")), Bits(part("levels.bits"))
    floors, heads = iter(part("floors").tolist()), part("heads").reshape(-1, 2).tolist()
    for ids, (tail, b) in zip(ids_of(part, counts, id_at, params), heads, strict=True):
        floor = next(floors) if b // 4 == 0 and ids else None
        levels = [b // 4 + prefix_code(unary, bits, "exponential", b % 4) for _ in ids]
        u = [2 * math.log(level / n) if level else -floor / 8 for level in levels]
        rows.append(scaled(ids, u, tail))
    return rows


def counted(part, counts, width, id_at, params, meta):
    unary, bits, rows = Bits(part("counts.unary")), Bits(part("counts.bits")), []
    for ids in ids_of(part, counts, id_at, params):
        times = [1 + prefix_code(unary, bits, params["count_mode"], params["count_k"]) for _ in ids]
        draws = meta["selection_options"]["draws"]
        rows.append({i: math.log(t / draws) for i, t in zip(ids, times, strict=True)})
    return rows


DECODERS = {"float32": float32, "log8": log8, "compact": compact, "counts": counted}


@pytest.mark.parametrize("codec", list(DECODERS))
@pytest.mark.parametrize("vocabulary", [61, 700])
def test_the_page_is_enough_to_read_a_cache(tmp_path, codec, vocabulary):
    selection = {"counts": "sampled", "float32": "top_p"}.get(codec, "top_k")
    sequences = cases.texts(12, vocabulary)
    cache = build_cache(
        cases.teacher(vocabulary=vocabulary), sequences, tmp_path / "cache", codec=codec,
        selection=Selection(selection, top_k=13, top_p=0.8), shard_tokens=90, progress=False,
    )  # fmt: skip
    plain = read_plainly(tmp_path / "cache")
    assert len(cache.manifest.shards) > 1 and len(plain) == len(cache)
    for tokens, rows in plain.items():
        found = cache.lookup(list(tokens))
        places = zip(rows, found.ids.tolist(), found.logprobs, strict=True)
        followed = cache.realised(list(tokens))
        for at, (row, ids, logprobs) in enumerate(places):
            held, own = row.pop("tails", []), row.pop("realised")
            assert own == followed[at] or math.isnan(own) and at == len(tokens) - 1
            assert set(row) == {i for i in ids if i >= 0}
            if found.tail_log_partition is None:
                assert not held and codec == "counts"
            else:
                assert np.allclose(held, found.tail_log_partition[at].tolist(), atol=1e-4)
            for i, value in zip(ids, logprobs.tolist(), strict=True):
                if i >= 0:
                    assert abs(row[i] - value) < 2e-5


def test_a_table_of_frequent_ids_is_read(tmp_path):
    rng = np.random.default_rng(0)
    common = rng.choice(4000, 300, replace=False)
    items = []
    for i in range(20):
        ids = np.stack([rng.choice(common, 8, replace=False) for _ in range(50)])
        items.append((np.arange(50) + i, ids, np.full((50, 8), -3.0, np.float32)))
    cache = cases.write(tmp_path / "cache", items, cases.meta(live=4000, codec="log8"))
    assert len(cache.shard(0).side.tables["ranks"]) > 0
    plain = read_plainly(tmp_path / "cache")
    for tokens, ids, _ in items:
        assert [set(row) for row in plain[tuple(tokens.tolist())]] == [set(r) for r in ids.tolist()]


def test_the_page_names_every_stream_and_field():
    page = (Path(kd.cache.__file__).parent / "FORMAT.md").read_text()
    from kd.cache.codecs import CODECS

    for codec in CODECS.values():
        assert f"**{codec.name}**" in page
        for stream in codec.streams:
            assert f"`{stream}`" in page, stream
    for name in cases.meta(tail_temperatures=(1, 2)).to_dict():
        assert f"`{name}`" in page, name
    assert re.search(r"110 when absent", page) and re.search(r"level / 448", page)
    for stream in (*tails.STREAMS, *tails.REALISED_STREAMS):
        assert f"`{stream}`" in page, stream
