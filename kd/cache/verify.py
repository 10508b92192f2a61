"""Check a whole cache: sizes, checksums, every sequence's key and every row's probabilities."""

from __future__ import annotations

import hashlib
import os
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from kd.cache.codecs import starts
from kd.cache.compact import row_sums
from kd.cache.keys import key_of
from kd.cache.manifest import (
    SHARD_NAME,
    Manifest,
    ShardEntry,
    read_manifest,
    safe_path,
    update_manifest,
)
from kd.cache.meta import CacheMeta
from kd.cache.rows import MASS_TOLERANCE, broken_realised, broken_tails
from kd.cache.shards import Block, Shard
from kd.cache.writer import keys_in, shard_options
from kd.files import TEMPORARY

AT_A_TIME = 256  # sequences decoded together


@dataclass
class Verdict:
    """What ``verify_cache`` found.

    Attributes:
        problems: one line each; empty when the cache is sound.
        bad_shards: names of the shards that the problems are in.
        shards, sequences, rows: how much was checked.
    """

    problems: list[str] = field(default_factory=list)
    bad_shards: list[str] = field(default_factory=list)
    shards: int = 0
    sequences: int = 0
    rows: int = 0

    @property
    def sound(self) -> bool:
        return not self.problems

    def add(self, shard: str, problem: str) -> None:
        self.problems.append(f"{shard}: {problem}")
        if shard not in self.bad_shards:
            self.bad_shards.append(shard)


def verify_cache(path: str | os.PathLike[str]) -> Verdict:
    """Read everything and compare it with what the manifest and the format say.

    Args:
        path: the cache's folder.

    Raises:
        FileNotFoundError, ValueError: when the manifest itself is missing or damaged.
    """
    folder = Path(path)
    manifest = read_manifest(folder)
    verdict = Verdict()
    owner: dict[bytes, str] = {}
    for entry in manifest.shards:
        verdict.shards += 1
        try:
            shard = _open_whole(folder, entry, manifest.meta)
        except (OSError, ValueError) as error:
            verdict.add(entry.name, str(error))
            continue
        for key in keys_in(shard):
            if key in owner:
                verdict.add(entry.name, f"sequence {key.hex()[:12]} is in {owner[key]} too")
            owner[key] = entry.name
        try:
            _check_rows(shard, manifest.meta, verdict)
        except (ValueError, IndexError, KeyError) as error:
            verdict.add(entry.name, f"its rows cannot be decoded: {error}")
    listed = {entry.name for entry in manifest.shards}
    for item in sorted(folder.iterdir()):
        if SHARD_NAME.match(item.name) and item.name not in listed:
            verdict.problems.append(f"{item.name}: not listed in the manifest; no reader sees it")
        elif item.name.startswith(TEMPORARY):
            verdict.problems.append(f"{item.name}: left by a writer that was killed")
    if manifest.open_writers:
        verdict.problems.append(f"capture has not ended: open ranks {manifest.open_writers}")
    return verdict


def _open_whole(folder: Path, entry: ShardEntry, meta: CacheMeta) -> Shard:
    """A shard whose size and checksum are the manifest's."""
    path = safe_path(folder, entry.name)
    if not path.exists():
        raise FileNotFoundError("missing")
    size = path.stat().st_size
    if size != entry.bytes:
        raise ValueError(f"must have {entry.bytes:,} bytes, got {size:,}")
    with open(path, "rb") as file:
        digest = hashlib.sha256()
        while data := file.read(1 << 22):
            digest.update(data)
    if digest.hexdigest() != entry.sha256:
        raise ValueError(f"must have SHA-256 {entry.sha256}, got {digest.hexdigest()}")
    shard = Shard(path, meta.codec, shard_options(meta), meta.cache_id)
    if (shard.sequences, shard.rows, shard.entries) != (entry.sequences, entry.rows, entry.entries):
        raise ValueError("its counts differ from the manifest's")
    return shard


def _check_rows(shard: Shard, meta: CacheMeta, verdict: Verdict) -> None:
    """Keys against tokens; ids, log-probs and sums of every row."""
    name, live = shard.path.name, shard.side.live_vocab
    keys = keys_in(shard)
    for first in range(0, shard.sequences, AT_A_TIME):
        chosen = range(first, min(first + AT_A_TIME, shard.sequences))
        block = shard.block(chosen, check=False)  # looked at below, row by row
        at = starts(block.lengths)
        for i, sequence in enumerate(chosen):
            if key_of(block.tokens[at[i] : at[i + 1]]) != keys[sequence]:
                verdict.add(name, f"sequence {sequence}: its tokens do not have its key")
        verdict.sequences += len(block.lengths)
        verdict.rows += len(block.tokens)
        rows = block.rows
        if shard.codec.name.startswith("hidden"):
            if not np.isfinite(rows.logprobs).all():
                verdict.add(name, "a hidden state that is not finite")
            continue
        row = np.repeat(np.arange(len(rows.counts)), rows.counts)
        mass = row_sums(np.exp(rows.logprobs.astype(np.float64)), rows.counts)
        ordered = np.sort(row.astype(np.int64) * live + rows.ids)
        checks = [
            ("an id outside the vocabulary", row[(rows.ids < 0) | (rows.ids >= live)]),
            ("a log-prob above 0 or NaN", row[~(rows.logprobs <= 0)]),
            ("an id twice", ordered[1:][ordered[1:] == ordered[:-1]] // live),
            ("probabilities above 1 in sum", np.flatnonzero(mass > 1 + MASS_TOLERANCE)),
        ]
        if rows.tails is not None:
            held = np.where(rows.counts > 0, mass, 0)
            for what, rule, bad in broken_tails(rows.tails, held, meta):
                checks.append((f"{what} must be {rule}", np.flatnonzero(bad.any(1))))
        if rows.realised is not None:
            checks += _realised(block, at, meta)
        for what, found in checks:
            if len(found):
                sequence = int(np.searchsorted(at, found[0], side="right")) - 1
                place = f"sequence {first + sequence}, row {int(found[0] - at[sequence])}"
                verdict.add(name, f"{place}: {what} ({len(found)} such)")


def _realised(block: Block, at: NDArray[np.int64], meta: CacheMeta) -> list[tuple[str, Any]]:
    """Rows of a block whose own token's log-prob contradicts what they hold."""
    entries, found = starts(block.rows.counts)[at], {}  # type: ignore[var-annotated]
    for i in range(len(block.lengths)):
        mine = slice(int(at[i]), int(at[i + 1])), slice(int(entries[i]), int(entries[i + 1]))
        tokens = block.tokens[mine[0]]
        for what, rule, bad in broken_realised(block.rows.cut(*mine), tokens, meta):
            found.setdefault(f"{what} must be {rule}", []).append(np.flatnonzero(bad) + at[i])
    return [(what, np.concatenate(parts)) for what, parts in found.items()]


def repair_cache(path: str | os.PathLike[str], verdict: Verdict) -> list[str]:
    """Take bad shards out of the manifest, so that a capture run again fills the gap.

    The files stay, renamed to ``NAME.bad``; nothing is deleted but temporary files.

    Returns:
        The names of the shards that were taken out.
    """
    folder, bad = Path(path), set(verdict.bad_shards)

    def change(present: Manifest | None) -> Manifest:
        assert present is not None
        present.shards = [entry for entry in present.shards if entry.name not in bad]
        return present

    update_manifest(folder, change)
    for name in sorted(bad):
        if (folder / name).exists():
            os.replace(folder / name, folder / f"{name}.bad")
    for leftover in folder.glob(f"{TEMPORARY}*"):
        leftover.unlink(missing_ok=True)
    return sorted(bad)
