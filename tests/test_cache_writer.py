"""Killed, doubled, without room or rights: what the writer leaves, and how the next one goes on."""

import errno
import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import cache_cases as cases
import pytest
import torch
from cache_cases import rewrite_manifest, shards, snapshot

from kd import files
from kd.cache import CacheWriter, TeacherCache
from kd.cache.verify import repair_cache, verify_cache
from kd.teachers import build, build_cache

TESTS = Path(__file__).parent


@pytest.fixture
def items():
    return cases.sequences(40)


@pytest.fixture
def folder(tmp_path, items):
    cases.write(tmp_path / "cache", items, shard_tokens=64)
    return tmp_path / "cache"


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


@pytest.mark.parametrize("code", [errno.EPERM, errno.ENOTSUP, errno.EMLINK])
def test_a_file_system_without_hard_links(tmp_path, monkeypatch, code):
    def refuse(*_):
        raise OSError(code, os.strerror(code))

    monkeypatch.setattr(os, "link", refuse)
    items = cases.sequences(20)
    cache = cases.write(tmp_path, items, shard_tokens=64)
    assert len(cache) == 20 and len(cache.manifest.shards) > 1
    assert not [path for path in tmp_path.iterdir() if path.name.startswith(".tmp-")]


def test_one_rank_goes_on_where_two_were_stopped(tmp_path, monkeypatch):
    """Which batches exist depends on the sequences alone, not on who computed them before."""
    options = {"top_k": 8, "batch_tokens": 60, "shard_tokens": 100, "progress": False}
    sequences = cases.texts(40, seed=3)
    whole = build_cache(cases.teacher(), sequences, tmp_path / "whole", **options)
    monkeypatch.setattr(build, "_wait_for_all", lambda world: None)
    monkeypatch.setenv("WORLD_SIZE", "2")
    monkeypatch.setenv("RANK", "0")
    build_cache(cases.teacher(), sequences, tmp_path / "cache", limit=25, **options)
    monkeypatch.setenv("RANK", "1")
    monkeypatch.setattr(CacheWriter, "__exit__", die)
    with pytest.raises(ValueError, match="must have ended"):
        build_cache(cases.teacher(), sequences, tmp_path / "cache", limit=25, **options)
    monkeypatch.undo()
    with pytest.raises(ValueError, match="capture of .* must have ended, got writers of rank .1"):
        TeacherCache(tmp_path / "cache")
    build_cache(cases.teacher(), sequences, tmp_path / "cache", **options)
    found = TeacherCache(tmp_path / "cache")
    assert found.content_digest() == whole.content_digest() and len(found) == 40


def die(self, kind, error, trace):
    """What a kill leaves: published shards, an open writer, no lock."""
    self._thread.shutdown(cancel_futures=True)
    self._lock.release()


# --- kills --------------------------------------------------------------------------------------


def killed(folder, kills, seed):
    roots = [TESTS, TESTS.parent, TESTS.parent / "kernels", TESTS.parent / "recipes"]
    done = subprocess.run(
        [sys.executable, TESTS / "cache_kill.py", folder, str(kills), str(seed)],
        env={**os.environ, "PYTHONPATH": os.pathsep.join(map(str, roots))},
        capture_output=True,
        text=True,
        timeout=900,
    )
    assert done.returncode == 0, done.stderr
    return dict(item.split("=", 1) for item in done.stdout.strip().splitlines()[-1].split(" ", 6))


def check_survivor(found, least):
    assert found["status"] == "0"
    assert int(found["shards"]) > 10
    assert int(found["hit"]) >= least, "the kills came after the end: nothing was tested"
    assert found["files_equal"] == "True" and found["content_equal"] == "True"
    assert found["leftovers"] == "[]"


def test_three_kills(tmp_path):
    check_survivor(killed(tmp_path, 3, seed=1), least=3)


@pytest.mark.slow
def test_fifty_kills(tmp_path):
    check_survivor(killed(tmp_path, 50, seed=0), least=50)
