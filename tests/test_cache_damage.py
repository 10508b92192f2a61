"""Damaged and foreign files are refused with both sides shown, or read as they were.

Damage that is drawn, and signed again, is in test_cache_hostile; rows in test_cache_rows; the
writer's own trouble in test_cache_writer.
"""

import json
import os
import struct

import cache_cases as cases
import numpy as np
import pytest
import torch
from cache_cases import rewrite_manifest, shards
from safetensors.numpy import save_file

from kd.cache import CacheWriter, TeacherCache
from kd.cache.verify import verify_cache


@pytest.fixture
def items():
    return cases.sequences(40)


@pytest.fixture
def folder(tmp_path, items):
    cases.write(tmp_path / "cache", items, shard_tokens=64)
    return tmp_path / "cache"


def test_truncated_shard(folder, items):
    path = shards(folder)[1]
    size = path.stat().st_size
    os.truncate(path, size - 5)
    with pytest.raises(
        ValueError, match=rf"{path.name} must have {size:,} bytes, got {size - 5:,}"
    ):
        TeacherCache(folder)
    with pytest.raises(ValueError, match="kd cache verify --repair"):
        with CacheWriter(folder, cases.meta()):
            pass


def test_flipped_bit_in_the_data(folder, items):
    path = shards(folder)[0]
    data = bytearray(path.read_bytes())
    data[-9] ^= 4
    path.write_bytes(data)
    cache = TeacherCache(folder)  # size and header are right
    with pytest.raises(ValueError, match=rf"{path.name} must have SHA-256 \w+, got \w+"):
        cache.lookup(items[0][0])
    TeacherCache(folder, verify=False).lookup(items[0][0])  # off by option
    assert verify_cache(folder).bad_shards == [path.name]


def test_flipped_bit_in_the_manifest(folder):
    text = (folder / "manifest.json").read_text()
    (folder / "manifest.json").write_text(text.replace('"temperature": 1.0', '"temperature": 2.0'))
    with pytest.raises(ValueError, match="must match its digest .* edited or damaged"):
        TeacherCache(folder)


@pytest.mark.parametrize("text", ["", "{", "[1]", '{"format": "other"}', "[" * 100_000])
def test_a_manifest_that_is_none(folder, text):
    (folder / "manifest.json").write_text(text)
    with pytest.raises(ValueError, match="manifest.json must (be JSON|have format)"):
        TeacherCache(folder)


def test_missing_shard(folder):
    path = shards(folder)[2]
    path.unlink()
    with pytest.raises(FileNotFoundError, match=rf"shard {path.name} must be in .*, got no such"):
        TeacherCache(folder)


def test_extra_shard_is_seen_by_verify_and_by_no_reader(folder, items, tmp_path):
    other = cases.write(tmp_path / "other", cases.sequences(3, seed=9))
    (folder / "shard-0007-000000.safetensors").write_bytes(shards(other.path)[0].read_bytes())
    assert len(TeacherCache(folder)) == 40
    assert "not listed in the manifest" in verify_cache(folder).problems[0]


def test_swapped_shards(folder, items):
    first, second = shards(folder)[:2]
    data = first.read_bytes()
    first.write_bytes(second.read_bytes())
    second.write_bytes(data)
    with pytest.raises(ValueError, match="must have .* bytes|must hold .sequences, rows"):
        TeacherCache(folder)


def test_shard_of_another_cache(folder, tmp_path, items):
    other = cases.write(tmp_path / "other", items, cases.meta(temperature=2.0), shard_tokens=64)
    for mine, theirs in zip(shards(folder), shards(other.path), strict=True):
        mine.write_bytes(theirs.read_bytes())
    with pytest.raises(ValueError, match="must have cache_id"):
        TeacherCache(folder)


def test_foreign_files(folder, tmp_path, items):
    path = shards(folder)[0]
    size = path.stat().st_size
    for data in (b"\x80\x04pickle" + bytes(size), bytes(size), b"\xff" * size):
        path.write_bytes(data[:size])
        with pytest.raises(ValueError, match="shard-0000-000000.safetensors must have"):
            TeacherCache(folder)
    save_file({"weight": np.zeros(3, np.float32)}, tmp_path / "model.safetensors")
    data = (tmp_path / "model.safetensors").read_bytes()
    path.write_bytes(data)
    rewrite_manifest(folder, lambda body: body["shards"][0].update(bytes=len(data)))
    with pytest.raises(ValueError, match="must have (the tensors|a safetensors header)"):
        TeacherCache(folder)


def test_no_pickle_is_ever_read(folder):
    """Nothing in kd.cache can load a pickle."""
    import ast
    from pathlib import Path

    import kd.cache

    for source in Path(kd.cache.__file__).parent.glob("*.py"):
        for node in ast.walk(ast.parse(source.read_text())):
            if isinstance(node, ast.Import | ast.ImportFrom):
                names = [item.name for item in node.names] + [getattr(node, "module", "") or ""]
                assert not {"pickle", "marshal", "shelve", "dill"} & set(names), source
            if isinstance(node, ast.Call) and isinstance(node.func, ast.Attribute):
                called = ast.unparse(node.func)
                assert called not in ("torch.load", "np.load", "numpy.load"), source


def test_huge_header(folder):
    path = shards(folder)[0]
    size = path.stat().st_size
    for length in (10**12, 65 * 1024, 2**64 - 1):
        path.write_bytes((struct.pack("<Q", length) + bytes(size))[:size])
        with pytest.raises(ValueError, match="a header of at most 65,536 bytes"):
            TeacherCache(folder)


@pytest.mark.parametrize(
    "change",
    [
        lambda header: header.update(extra=header["keys"]),
        lambda header: header["keys"].update(dtype="F64"),
        lambda header: header["keys"].update(shape=[-1, 16]),
        lambda header: header["keys"].update(shape=[10**12, 16]),
        lambda header: header["keys"].update(data_offsets=[0, 10**9]),
        lambda header: header["tokens"].update(data_offsets=header["keys"]["data_offsets"]),
        lambda header: header.pop("__metadata__"),
        lambda header: header["__metadata__"].update(rows="1000000"),
        lambda header: header["__metadata__"].update(row_entries="-1"),
        lambda header: header["__metadata__"].update(params="{"),
        lambda header: header["__metadata__"].update(format="kd-cache/2"),
    ],
)
def test_headers_that_lie(folder, change):
    path = shards(folder)[0]
    data = path.read_bytes()
    length = int.from_bytes(data[:8], "little")
    header = json.loads(data[8 : 8 + length])
    change(header)
    text = json.dumps(header).encode()
    path.write_bytes(len(text).to_bytes(8, "little") + text + data[8 + length :])
    size = path.stat().st_size
    rewrite_manifest(folder, lambda body: body["shards"][0].update(bytes=size))
    with pytest.raises(ValueError, match="must have|must hold"):
        TeacherCache(folder)


@pytest.mark.parametrize(
    "name",
    [
        "../outside.safetensors",
        "/etc/passwd",
        "shard-0000-000000.safetensors/../x",
        "a.safetensors",
    ],
)
def test_paths_that_leave_the_folder(folder, name):
    rewrite_manifest(folder, lambda body: body["shards"][0].update(name=name))
    with pytest.raises(ValueError, match="a shard's name must match"):
        TeacherCache(folder)


def test_links_that_leave_the_folder(folder, tmp_path):
    path = shards(folder)[0]
    path.rename(tmp_path / "outside.safetensors")
    path.symlink_to(tmp_path / "outside.safetensors")
    with pytest.raises(ValueError, match="must lie in .*, got a link to"):
        TeacherCache(folder)


@pytest.mark.parametrize("nested", [False, True])
def test_links_of_the_hubs_cache_are_read(folder, items, tmp_path, nested):
    """models--o--n/snapshots/REVISION/... holds links to models--o--n/blobs/SHA256."""
    repository = tmp_path / "hub" / "datasets--someone--cache"
    blobs, there = repository / "blobs", repository / "snapshots" / "abc"
    there = there / "data" / "train" if nested else there
    blobs.mkdir(parents=True)
    there.mkdir(parents=True)
    for number, file in enumerate(sorted(folder.iterdir())):
        if not file.name.startswith("."):
            file.rename(blobs / str(number))
            (there / file.name).symlink_to(os.path.relpath(blobs / str(number), there))
    cache = TeacherCache(there)
    for tokens, ids, _ in items:
        assert cache.lookup(tokens).ids.shape == ids.shape
    assert verify_cache(there).sound
    link = shards(there)[0]  # but not out of the repository
    outside = tmp_path / "outside"
    outside.write_bytes(link.read_bytes())
    link.unlink()
    link.symlink_to(outside)
    with pytest.raises(ValueError, match="must lie in .*, got a link to"):
        TeacherCache(there)


@pytest.mark.parametrize("left", [0, 100, 0.5, 0.99])
@pytest.mark.parametrize("codec", ["float32", "compact", "log8"])
def test_a_shard_that_is_cut_while_it_is_open(tmp_path, items, left, codec):
    """An error that names the shard, and no signal that kills the process."""
    cases.write(tmp_path / "cache", items, cases.meta(codec=codec))
    cache = TeacherCache(tmp_path / "cache", verify=False)
    cache.lookup(items[0][0])
    path = shards(tmp_path / "cache")[0]
    size = path.stat().st_size
    with open(path, "r+b") as file:  # an editor, rsync --inplace, a full network disk
        file.truncate(left if isinstance(left, int) else int(size * left))
    with pytest.raises(ValueError, match=rf"{path.name} must have {size:,} bytes.* was cut since"):
        for tokens, _, _ in items:
            cache.lookup(tokens)
        list(cache.sequences())
    with pytest.raises(ValueError, match="was cut since"):
        cache.shard(0, verify=True)


def test_a_shard_replaced_while_it_is_open_is_read_as_it_was(folder, items):
    cache = TeacherCache(folder)
    before = cache.lookup(items[0][0])
    for path in shards(folder):
        (folder / "new").write_bytes(b"something else")
        os.replace(folder / "new", path)
    assert torch.equal(cache.lookup(items[0][0]).ids, before.ids)
    with pytest.raises(ValueError, match="must have .* bytes, got 14"):
        TeacherCache(folder)


def test_newer_version(folder):
    rewrite_manifest(folder, lambda body: body.update(version=4))
    with pytest.raises(ValueError, match="must have version 3 or older, got 4"):
        TeacherCache(folder)


def test_unknown_required_feature(folder):
    rewrite_manifest(folder, lambda body: body.update(required_features=["zstd"]))
    with pytest.raises(ValueError, match=r"got \['zstd'\]. Update kd"):
        TeacherCache(folder)


def test_unknown_optional_field_is_no_error(folder):
    rewrite_manifest(folder, lambda body: body.update(note="made on a Tuesday"))
    assert len(TeacherCache(folder)) == 40


def test_modification_times_do_not_matter(folder, items):
    for item in folder.iterdir():
        os.utime(item, (1, 1))
    assert torch.equal(TeacherCache(folder).lookup(items[5][0]).ids, items[5][1])
