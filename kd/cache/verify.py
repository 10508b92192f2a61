"""Check a whole cache: sizes, checksums, every sequence's key and every row's probabilities."""

from __future__ import annotations

import os
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

from kd.cache.checks import MASS_TOLERANCE, broken_realised, broken_tails
from kd.cache.keys import key_of
from kd.cache.manifest import SHARD_NAME, Manifest, read_manifest, update_manifest
from kd.cache.meta import CacheMeta
from kd.cache.shards import Shard, open_listed
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
            shard = open_listed(folder, entry, manifest.meta)
            shard.check_digest(entry.sha256)
        except (OSError, ValueError) as error:
            verdict.add(entry.name, str(error))
            continue
        for key in shard.key_list:
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


def _check_rows(shard: Shard, meta: CacheMeta, verdict: Verdict) -> None:
    """Keys against tokens; ids, log-probs and sums of every row."""
    name, live, keys = shard.path.name, meta.live_vocab, shard.key_list
    for first in range(0, shard.sequences, AT_A_TIME):
        chosen = range(first, min(first + AT_A_TIME, shard.sequences))
        rows = shard.read(chosen, check=False, complete=True)  # looked at below, row by row
        assert rows.tokens is not None
        at = rows.bounds
        for i, sequence in enumerate(chosen):
            if key_of(rows.tokens[at[i] : at[i + 1]]) != keys[sequence]:
                verdict.add(name, f"sequence {sequence}: its tokens do not have its key")
        verdict.sequences += len(rows.lengths)
        verdict.rows += len(rows.counts)
        if meta.hidden:
            if not np.isfinite(rows.logprobs).all():
                verdict.add(name, "a hidden state that is not finite")
            continue
        row, mass = rows.row_of_entry, rows.mass
        ordered = np.sort(row * live + rows.ids)
        checks = [
            ("an id outside the vocabulary", row[(rows.ids < 0) | (rows.ids >= live)]),
            ("a log-prob above 0 or NaN", row[~(rows.logprobs <= 0)]),
            ("an id twice", ordered[1:][ordered[1:] == ordered[:-1]] // live),
            ("probabilities above 1 in sum", np.flatnonzero(mass > 1 + MASS_TOLERANCE)),
        ]
        broken: list[tuple[str, str, Any]] = []
        if rows.tails is not None:
            broken += broken_tails(rows.tails, np.where(rows.counts > 0, mass, 0), meta)
        if rows.realised is not None:
            broken += broken_realised(rows, meta)
        for what, rule, bad in broken:
            wrong = np.flatnonzero(bad.reshape(len(bad), -1).any(1))
            checks.append((f"{what} must be {rule}", wrong))
        for what, found in checks:
            if len(found):
                sequence = int(np.searchsorted(at, found[0], side="right")) - 1
                place = f"sequence {first + sequence}, row {int(found[0] - at[sequence])}"
                verdict.add(name, f"{place}: {what} ({len(found)} such)")


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
