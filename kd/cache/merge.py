"""Put caches of one identity into one; shards without repeated sequences are copied as they are."""

from __future__ import annotations

import os
from collections.abc import Sequence
from pathlib import Path

import numpy as np

from kd.cache.codecs import starts
from kd.cache.manifest import read_manifest
from kd.cache.meta import differences, side_by_side
from kd.cache.reader import TeacherCache
from kd.cache.shards import Block
from kd.cache.writer import SHARD_TOKENS, CacheWriter


def merge_caches(
    sources: Sequence[str | os.PathLike[str]], path: str | os.PathLike[str]
) -> TeacherCache:
    """Copy every sequence of several caches into one; a sequence found twice is kept once.

    Checksums are verified on the way. A shard whose sequences are all new is copied byte by byte.
    The others are encoded again: with a codec that rounds ("compact", "log8") this moves their
    values once more by at most the codec's own error.

    Args:
        sources: folders of caches with one identity.
        path: folder of the merged cache: new, or a cache of that identity to add to.

    Returns:
        The merged cache.
    """
    if not sources:
        raise ValueError("merge_caches: sources must name at least one cache, got none.")
    manifests = [read_manifest(Path(source)) for source in sources]
    caches = [manifest.meta for manifest in manifests]
    for source, meta in zip(sources, caches, strict=True):
        found = differences(caches[0].to_dict(), meta.to_dict())
        if found:
            raise ValueError(
                f"merge_caches: sources must have one identity, got\n"
                f"{side_by_side(found, str(sources[0]), str(source))}\n"
                "Nothing was written. Only caches of one teacher and one setting can be merged."
            )
    captured = [entry for manifest in manifests for entry in manifest.sources]
    with CacheWriter(path, caches[0], shard_tokens=SHARD_TOKENS, sources=captured) as writer:
        for source in sources:
            cache = TeacherCache(source, partial=True, duplicates="first")
            for number, entry in enumerate(cache.manifest.shards):
                if not writer.copy_shard(cache.checked_shard(number), entry):
                    for block in cache.blocks(shards=[number]):
                        _add(writer, block)
    return TeacherCache(path)


def _add(writer: CacheWriter, block: Block) -> None:
    at = starts(block.lengths)
    entries = starts(block.rows.counts)[at]
    for i in range(len(block.lengths)):
        tokens = np.array(block.tokens[at[i] : at[i + 1]])
        if tokens in writer:
            writer.count("duplicates_dropped")
            continue
        mine = slice(int(at[i]), int(at[i + 1])), slice(int(entries[i]), int(entries[i + 1]))
        writer.add_rows(tokens, block.rows.cut(*mine))
