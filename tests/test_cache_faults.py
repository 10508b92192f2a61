"""Damaged, foreign and hostile caches are refused with both sides shown, and nothing is changed.

Kills are in test_cache_kill, bad rows in test_cache_rows, other tokenizers, teachers and templates
in test_cache_core, test_teachers_build, test_teachers_doctor and test_vocab_fingerprint.
"""

import errno
import json
import os
import shutil
import struct
import subprocess
import sys
from pathlib import Path

import cache_cases as cases
import numpy as np
import pytest
import torch
from safetensors.numpy import save_file

from kd import files
from kd.cache import CacheWriter, TeacherCache, manifest
from kd.cache.verify import repair_cache, verify_cache


@pytest.fixture
def items():
    return cases.sequences(40)


@pytest.fixture
def folder(tmp_path, items):
    cases.write(tmp_path / "cache", items, shard_tokens=64)
    return tmp_path / "cache"


def shards(folder):
    return sorted(folder.glob("shard-*"))


def rewrite_manifest(folder, change, sign=True):
    body = json.loads((folder / "manifest.json").read_text())
    change(body)
    if sign:
        body["digest"] = manifest.digest_of(body)
    (folder / "manifest.json").write_text(json.dumps(body))


def snapshot(folder):
    return {item.name: item.read_bytes() for item in folder.iterdir() if item.name[0] != "."}


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
        cache.check_shard(0)


def test_a_shard_replaced_while_it_is_open_is_read_as_it_was(folder, items):
    cache = TeacherCache(folder)
    before = cache.lookup(items[0][0])
    for path in shards(folder):
        (folder / "new").write_bytes(b"something else")
        os.replace(folder / "new", path)
    assert torch.equal(cache.lookup(items[0][0]).ids, before.ids)
    with pytest.raises(ValueError, match="must have .* bytes, got 14"):
        TeacherCache(folder)


READ_ONLY = """
import sys, cache_cases as cases
from kd.cache import CacheWriter, TeacherCache
folder, meta = sys.argv[1], cases.meta()
items = cases.sequences(41)
with CacheWriter(folder, meta) as writer:
    assert writer.read_only and len(writer) == 40
    missing = [item for item in items if item[0] not in writer]
    writer.count("seen", 40)
assert len(TeacherCache(folder)) == 40 and len(missing) == 1
try:
    with CacheWriter(folder, meta) as writer:
        writer.add(*missing[0])
except PermissionError as error:
    assert "must be writable, got a read-only folder" in str(error), error
else:
    raise SystemExit("written")
print("right")
"""


@pytest.mark.parametrize("how", ["mount", "permissions"])
def test_a_finished_cache_on_a_read_only_medium(folder, how):
    """What is there is found; what is not is refused. A second run of a capture is the first."""
    command = [sys.executable, "-c", READ_ONLY, str(folder)]
    if how == "mount":
        if shutil.which("unshare") is None or os.geteuid() != 0:
            pytest.skip("mounting needs root")
        mount = 'mount --bind "$0" "$0" && mount -o remount,ro,bind "$0" && exec "$@"'
        command = ["unshare", "--mount", "sh", "-c", mount, str(folder), *command]
    elif os.geteuid() == 0:
        pytest.skip("root may write everywhere")
    else:
        folder.chmod(0o555)
    path = os.pathsep.join([str(Path(cases.__file__).parent), *sys.path])
    run = subprocess.run(
        command, capture_output=True, text=True, env={**os.environ, "PYTHONPATH": path}
    )
    if how == "mount" and "mount" in run.stderr and "Traceback" not in run.stderr:
        pytest.skip(f"mounting is not allowed here: {run.stderr[:80]}")
    assert run.stdout.endswith("right\n"), run.stderr


@pytest.mark.parametrize("number", [errno.EROFS, errno.EACCES, errno.EPERM])
def test_an_unfinished_cache_on_a_read_only_medium_is_refused(folder, monkeypatch, number):
    rewrite_manifest(folder, lambda body: body.update(open_writers=[0]))

    def refuse(*args, **options):
        raise OSError(number, "refused")

    monkeypatch.setattr(files.Lock, "acquire", refuse)
    with pytest.raises(PermissionError, match="writable to go on with its capture"):
        with CacheWriter(folder, cases.meta()):
            pass
    with pytest.raises(OSError, match="refused"):
        with CacheWriter(folder / "none", cases.meta()):
            pass
    rewrite_manifest(folder, lambda body: body.update(open_writers=[]))
    with pytest.raises(ValueError, match="temperature: the cache has 1.0, this run has 2.0"):
        with CacheWriter(folder, cases.meta(temperature=2.0)):
            pass


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


def test_a_read_only_folder_can_be_read(folder, items):
    for item in [*folder.iterdir(), folder]:
        item.chmod(0o555 if item.is_dir() else 0o444)
    try:
        assert torch.equal(TeacherCache(folder).lookup(items[5][0]).ids, items[5][1])
    finally:
        folder.chmod(0o755)


def test_sequence_stored_twice(folder, tmp_path, items):
    with pytest.raises(ValueError, match="must be added once, got .* again"):
        with CacheWriter(tmp_path / "new", cases.meta()) as writer:
            writer.add(*items[0])
            writer.add(*items[0])
    with (
        CacheWriter(tmp_path / "two", cases.meta(), rank=0, world_size=2) as first,
        CacheWriter(tmp_path / "two", cases.meta(), rank=1, world_size=2) as second,
    ):
        first.add(*items[0])
        second.add(*items[0])
    with pytest.raises(ValueError, match="stored once, got 1 .*shard-0000-.*shard-0001-"):
        TeacherCache(tmp_path / "two")
    assert "too" in verify_cache(tmp_path / "two").problems[0]


def test_an_exception_commits_nothing_and_marks_the_cache(tmp_path, items):
    path = tmp_path / "cache"
    with pytest.raises(KeyboardInterrupt):
        with CacheWriter(path, cases.meta()) as writer:
            writer.add(*items[0])
            raise KeyboardInterrupt
    assert shards(path) == []
    with pytest.raises(ValueError, match=r"must have ended, got writers of rank \[0\]"):
        TeacherCache(path)
    assert len(TeacherCache(path, partial=True)) == 0
    assert len(cases.write(path, items)) == 40


def test_two_writers_of_one_rank(tmp_path, items):
    with CacheWriter(tmp_path / "cache", cases.meta()) as writer:
        writer.add(*items[0])
        with pytest.raises(
            BlockingIOError, match=rf"got a second; the first is .* pid {os.getpid()}"
        ):
            with CacheWriter(tmp_path / "cache", cases.meta()):
                pass
    assert len(TeacherCache(tmp_path / "cache")) == 1


def test_two_writers_on_one_shard_name(tmp_path, items, monkeypatch):
    """Where locks do not work (some network file systems), a name is still never taken twice."""
    monkeypatch.setattr(files.Lock, "acquire", lambda self, wait: True)
    first = CacheWriter(tmp_path / "cache", cases.meta()).__enter__()
    with pytest.raises(FileExistsError, match="must be a new name, got one that exists"):
        with CacheWriter(tmp_path / "cache", cases.meta()) as second:
            first.add(*items[0])
            first.__exit__(None, None, None)
            before = snapshot(tmp_path / "cache")
            second.add(*items[1])
    after = snapshot(tmp_path / "cache")
    assert {k: v for k, v in after.items() if "shard" in k} == {
        k: v for k, v in before.items() if "shard" in k
    }


def test_disk_full(folder, monkeypatch, items):
    more = cases.sequences(30, seed=5)
    before = snapshot(folder)
    real = os.fsync

    def full(handle):
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(os, "fsync", full)
    with pytest.raises(
        OSError, match=r"must have room for .* \([0-9,]+ bytes so far\), got [0-9,]+ bytes free"
    ):
        with CacheWriter(folder, cases.meta(), shard_tokens=64) as writer:
            for item in more:
                writer.add(*item)
    monkeypatch.setattr(os, "fsync", real)
    assert snapshot(folder) == before and not list(folder.glob(".tmp*"))
    assert len(cases.write(folder, more, shard_tokens=64)) == 70


def test_disk_full_in_the_middle_of_a_capture(tmp_path, items, monkeypatch):
    """The shards that fitted stay; the next run goes on from there."""
    real, written = os.link, []

    def link(*args, **kwargs):
        if len(written) == 3:
            raise OSError(errno.ENOSPC, "No space left on device")
        written.append(args)
        return real(*args, **kwargs)

    monkeypatch.setattr(os, "link", link)
    with pytest.raises(OSError, match="must have room for"):
        with CacheWriter(tmp_path / "cache", cases.meta(), shard_tokens=64) as writer:
            for item in items:
                writer.add(*item)
    monkeypatch.setattr(os, "link", real)
    assert len(shards(tmp_path / "cache")) == 3 and not list((tmp_path / "cache").glob(".tmp*"))
    kept = TeacherCache(tmp_path / "cache", partial=True)
    assert 0 < len(kept) < 40
    with CacheWriter(tmp_path / "cache", cases.meta(), shard_tokens=64) as writer:
        for item in items:
            if item[0] not in writer:
                writer.add(*item)
    whole = cases.write(tmp_path / "whole", items)
    assert TeacherCache(tmp_path / "cache").content_digest() == whole.content_digest()


def test_temporary_files_are_swept_by_the_next_writer(folder, items):
    orphan = folder / ".tmp-123-shard-0000-000077.safetensors"
    orphan.write_bytes(b"half")
    other = folder / ".tmp-123-shard-0001-000000.safetensors"  # another rank may be at work on it
    other.write_bytes(b"half")
    with CacheWriter(folder, cases.meta()):
        pass
    assert not orphan.exists() and other.exists()


def test_a_shard_published_just_before_a_kill_is_taken_in(folder, items):
    before = json.loads((folder / "manifest.json").read_text())["shards"]
    rewrite_manifest(folder, lambda body: body["shards"].pop())
    assert len(TeacherCache(folder)) < 40
    with CacheWriter(folder, cases.meta()):
        pass
    assert json.loads((folder / "manifest.json").read_text())["shards"] == before


def test_a_folder_with_other_files_is_not_written_into(tmp_path):
    (tmp_path / "notes.txt").write_text("mine")
    with pytest.raises(ValueError, match="must be a new or empty folder, or a cache, got .*notes"):
        with CacheWriter(tmp_path, cases.meta()):
            pass
    assert [item.name for item in tmp_path.iterdir() if item.name[0] != "."] == ["notes.txt"]


def test_repair_takes_out_the_bad_shard_and_the_rerun_fills_the_gap(folder, tmp_path, items):
    path = shards(folder)[1]
    path.write_bytes(path.read_bytes()[:-1])
    (folder / ".tmp-9-shard-0000-000009.safetensors").write_bytes(b"half")
    assert repair_cache(folder, verify_cache(folder)) == [path.name]
    assert (folder / f"{path.name}.bad").exists() and not list(folder.glob(".tmp*"))
    with CacheWriter(folder, cases.meta(), shard_tokens=64) as writer:
        for item in items:
            if item[0] not in writer:
                writer.add(*item)
    assert verify_cache(folder).sound
    whole = cases.write(tmp_path / "whole", items)
    assert TeacherCache(folder).content_digest() == whole.content_digest()
