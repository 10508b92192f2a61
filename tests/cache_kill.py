"""Kill a capture again and again; run by test_cache_writer as a process of its own.

    python cache_kill.py FOLDER KILLS SEED

Every capture is a child of a fork server that has imported what it needs and has run nothing: a
process must not fork after torch has started threads. Prints how many kills hit a running capture,
and whether the survivor equals an uninterrupted capture file by file.
"""

import multiprocessing
import random
import shutil
import sys
import time
from pathlib import Path

import cache_cases as cases

from kd.cache import TeacherCache
from kd.teachers import build_cache


def capture(folder):
    build_cache(
        cases.teacher(),
        cases.texts(150, seed=3),
        folder,
        top_k=8,
        batch_tokens=60,
        shard_tokens=100,
        progress=False,
    )


def nothing():
    """What the fork server's first child does: the server itself imports before it."""


def started(target, *arguments):
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(["cache_cases", "kd.teachers", "transformers.models.qwen2"])
    process = context.Process(target=target, args=arguments)
    process.start()
    return process


def ended(process):
    process.join()
    return process.exitcode


def contents(folder):
    """Name and bytes of every file that belongs to the format."""
    return {item.name: item.read_bytes() for item in folder.iterdir() if item.name[0] != "."}


def main(folder, kills, seed):
    rng, folder = random.Random(seed), Path(folder)
    assert ended(started(nothing)) == 0  # kills hit captures, not the imports before the first
    start = time.perf_counter()
    assert ended(started(capture, folder / "whole")) == 0
    took = time.perf_counter() - start
    hit = resumed = tries = 0
    while hit < kills and tries < 4 * kills:
        tries += 1
        before = len(list((folder / "killed").glob("shard-*")))
        process = started(capture, folder / "killed")
        time.sleep(rng.uniform(0, took))
        process.kill()
        if ended(process) == 0:  # it had ended: start from an empty folder
            shutil.rmtree(folder / "killed")
        else:
            hit, resumed = hit + 1, resumed + (before > 0)
    status = ended(started(capture, folder / "killed"))
    whole, survivor = contents(folder / "whole"), contents(folder / "killed")
    leftovers = [item.name for item in (folder / "killed").glob(".tmp*")]
    same = TeacherCache(folder / "whole").content_digest()
    same = same == TeacherCache(folder / "killed").content_digest()
    for name in sorted(whole.keys() | survivor.keys()):
        if whole.get(name) != survivor.get(name):
            print("differs:", name, len(whole.get(name, b"")), len(survivor.get(name, b"")))
    print(
        f"status={status} hit={hit} resumed={resumed} shards={len(whole) - 1} "
        f"files_equal={whole == survivor} content_equal={same} leftovers={leftovers}"
    )


if __name__ == "__main__":
    main(sys.argv[1], int(sys.argv[2]), int(sys.argv[3]))
