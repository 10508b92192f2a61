"""Put caches of one identity into one; shards without repeated sequences are copied as they are."""

from __future__ import annotations

import os
from collections.abc import Sequence
from pathlib import Path

from kd.cache.manifest import read_manifest
from kd.cache.meta import differences, side_by_side
from kd.cache.reader import TeacherCache
from kd.cache.writer import CacheWriter


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
    meta = manifests[0].meta
    for source, manifest in zip(sources, manifests, strict=True):
        found = differences(meta.to_dict(), manifest.meta.to_dict())
        if found:
            raise ValueError(
                f"merge_caches: sources must have one identity, got\n"
                f"{side_by_side(found, str(sources[0]), str(source))}\n"
                "Nothing was written. Only caches of one teacher and one setting can be merged."
            )
    captured = [entry for manifest in manifests for entry in manifest.sources]
    with CacheWriter(path, meta, sources=captured) as writer:
        for source in sources:
            cache = TeacherCache(source, partial=True, duplicates="first")
            for number, entry in enumerate(cache.manifest.shards):
                if writer.copy_shard(cache.shard(number), entry):
                    continue
                for block in cache.blocks(shards=[number]):
                    for rows in block.split():
                        if rows.tokens in writer:
                            writer.count("duplicates_dropped")
                        else:
                            writer.add_rows(rows)
    return TeacherCache(path)
