"""The manifest: one JSON file that says what a cache is and which shards are in it.

It is replaced as a whole, under a lock, after a shard is safely on disk; a shard that the manifest
does not name does not exist. It carries a SHA-256 of itself.
"""

from __future__ import annotations

import hashlib
import json
import re
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from kd.cache.header import whole
from kd.cache.meta import MAX_VOCAB, CacheMeta
from kd.files import canonical_json, locked, write_whole

FORMAT = "kd-cache"
VERSION = 3
NAME = "manifest.json"
LOCK = ".manifest.lock"
SHARD_NAME = re.compile(r"^shard-\d{4}-\d{6}\.safetensors$")
SHA256 = re.compile(r"[0-9a-f]{64}")
MAX_BYTES = 256 * 1024 * 1024
# Features that a reader has to understand; an unknown one is refused, an unknown field is not.
KNOWN_FEATURES: frozenset[str] = frozenset()


@dataclass(frozen=True)
class ShardEntry:
    """What the manifest says about a shard."""

    name: str
    bytes: int
    sha256: str
    sequences: int
    rows: int
    entries: int
    slots: int  # the most entries of a row

    def check(self) -> None:
        """Raise TypeError unless every field has its type."""
        counts = (self.bytes, self.sequences, self.rows, self.entries, self.slots)
        if not all(map(whole, counts)) or self.slots > MAX_VOCAB:
            raise TypeError(f"a shard's counts must be integers of at least 0, got {counts}")
        if not isinstance(self.name, str) or not SHA256.fullmatch(str(self.sha256)):
            raise TypeError("a shard's name and sha256 must be text, the latter 64 hex digits")


@dataclass
class Manifest:
    """The manifest's content.

    open_writers: ranks whose capture has not ended well; a reader refuses while there are any.
    counters: what capture counted, such as {"duplicates": 3}; for people, no reader needs it.
    sources: what was captured: {"data": its name, "digest", "rendering": what ids depend on}, ...
    """

    meta: CacheMeta
    shards: list[ShardEntry] = field(default_factory=list)
    open_writers: list[int] = field(default_factory=list)
    counters: dict[str, int] = field(default_factory=dict)
    sources: list[dict[str, Any]] = field(default_factory=list)

    @property
    def rendering(self) -> dict[str, Any]:
        """How everything that was captured was rendered, where that is one way; else {}."""
        ways = [entry.get("rendering") or {} for entry in self.sources]
        return ways[0] if ways and all(way == ways[0] for way in ways) else {}

    def to_bytes(self) -> bytes:
        body = {
            "format": FORMAT,
            "version": version_of(self.meta),
            "required_features": [],
            "cache_id": self.meta.cache_id,
            "meta": self.meta.to_dict(),
            "shards": [vars(entry) for entry in self.shards],
            "open_writers": sorted(self.open_writers),
            "counters": self.counters,
            **({"sources": self.sources} if self.sources else {}),
        }
        body["digest"] = digest_of(body)
        return (json.dumps(body, indent=1, sort_keys=True) + "\n").encode()


def version_of(meta: CacheMeta) -> int:
    """The least version of the format that has what a cache stores."""
    return 3 if meta.realised else 2 if meta.tail_temperatures else 1


def digest_of(body: Mapping[str, Any]) -> str:
    """SHA-256 of the manifest without its digest, in canonical JSON."""
    rest = {name: value for name, value in body.items() if name != "digest"}
    return hashlib.sha256(canonical_json(rest)).hexdigest()


def read_manifest(folder: Path) -> Manifest:
    """Read and check a cache's manifest.

    Raises:
        FileNotFoundError: when the folder holds none.
        ValueError: when it is not JSON, was changed by hand, is of a newer version, or names a
            file that is not a shard of this folder.
    """
    path = folder / NAME
    try:
        size = path.stat().st_size
        if size > MAX_BYTES:
            raise _wrong(path, f"be at most {MAX_BYTES:,} bytes", f"{size:,}")
        data = path.read_bytes()
    except (FileNotFoundError, NotADirectoryError):
        raise FileNotFoundError(
            f"kd.cache: {folder} must hold a cache, got no {NAME}. "
            "Build one with kd.teachers.build_cache, or check the path."
        ) from None
    try:
        body = json.loads(data, parse_constant=_no_number)
    except (ValueError, RecursionError) as error:
        raise _wrong(path, "be JSON", str(error)[:120]) from None
    if not isinstance(body, dict) or body.get("format") != FORMAT:
        raise _wrong(path, f"have format {FORMAT!r}", repr(_get(body, "format")))
    version = body.get("version")
    if not isinstance(version, int) or version > VERSION:
        raise ValueError(
            f"kd.cache: {path} must have version {VERSION} or older, got {version!r}. "
            "A newer kd wrote this cache; update kd."
        )
    features = body.get("required_features", [])
    named = isinstance(features, list) and all(isinstance(item, str) for item in features)
    needed = set(features) - KNOWN_FEATURES if named else {repr(features)[:100]}
    if needed:
        raise ValueError(
            f"kd.cache: {path} must need only features this kd has "
            f"({sorted(KNOWN_FEATURES) or 'none'}), got {sorted(needed)}. Update kd."
        )
    if body.get("digest") != digest_of(body):
        raise _wrong(
            path,
            f"match its digest {str(body.get('digest'))[:12]}",
            f"{digest_of(body)[:12]}, so it was edited or damaged",
        )
    return _manifest_of(path, body)


def _manifest_of(path: Path, body: Mapping[str, Any]) -> Manifest:
    try:
        meta = CacheMeta.from_dict(body["meta"])
        shards = [ShardEntry(**entry) for entry in body["shards"]]
        sources = [dict(entry) for entry in body.get("sources", [])]
        writers, counters = list(body["open_writers"]), dict(body["counters"])
        manifest = Manifest(meta, shards, writers, counters, sources)
        for entry in shards:
            entry.check()
        if not all(map(whole, (*manifest.open_writers, *manifest.counters.values()))):
            raise TypeError("open_writers and counters must hold integers of at least 0")
    except (KeyError, TypeError, AttributeError, ValueError) as error:
        if isinstance(error, ValueError) and str(error).startswith("CacheMeta"):
            raise
        found = f"{type(error).__name__}: {error}"[:200]
        raise _wrong(path, "hold meta, shards, open_writers and counters", found) from None
    if body.get("cache_id") != meta.cache_id:
        raise _wrong(path, f"have cache_id {meta.cache_id}", repr(body.get("cache_id")))
    names = [entry.name for entry in shards]
    for name in names:
        safe_path(path.parent, name)
    if len(set(names)) < len(names):
        raise _wrong(path, "name each shard once", "a shard listed twice")
    return manifest


def _no_number(name: str) -> Any:
    raise ValueError(f"{name} is no number")


def _get(body: Any, name: str) -> Any:
    return body.get(name) if isinstance(body, dict) else type(body).__name__


def _wrong(path: Path, rule: str, got: str) -> ValueError:
    return ValueError(
        f"kd.cache: {path} must {rule}, got {got}. Restore the file, or delete it together with "
        "the shards and run the capture again."
    )


def safe_path(folder: Path, name: str) -> Path:
    """The path of a shard, which must have a shard's name and lie in the folder itself.

    A link may lead to another name in the folder, or, in a snapshot of the Hub's cache, to that
    repository's own blobs.
    """
    path = folder / name
    if not SHARD_NAME.fullmatch(name):
        raise ValueError(
            f"kd.cache: a shard's name must match {SHARD_NAME.pattern}, got {name[:80]!r}. "
            "Only safetensors shards inside the cache's folder are ever opened."
        )
    if path.is_symlink() and path.resolve().parent not in (folder.resolve(), _blobs(folder)):
        raise ValueError(
            f"kd.cache: shard {name} must lie in {folder}, got a link to {path.resolve()}. "
            "Copy the file instead of linking it."
        )
    return path


def _blobs(folder: Path) -> Path | None:
    """Where the links of a folder in ``models--o--n/snapshots/REVISION/...`` lead to."""
    inside = folder.resolve()
    for snapshot in (inside, *inside.parents):
        repository = snapshot.parent.parent
        if snapshot.parent.name == "snapshots" and repository.name.count("--") >= 2:
            return repository / "blobs"
    return None


def update_manifest(folder: Path, change: Any) -> Manifest:
    """Read, change and replace the manifest while no other writer can.

    Args:
        folder: the cache.
        change: called with the Manifest (or None when there is none yet); returns the new one.
    """
    with locked(folder / LOCK):
        present = read_manifest(folder) if (folder / NAME).exists() else None
        manifest: Manifest = change(present)
        write_whole(folder / NAME, manifest.to_bytes(), replace=True)
    return manifest
