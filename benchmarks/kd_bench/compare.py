"""Two result files side by side: what became slower, hungrier or less accurate.

Reads results.json of this project and any JSON of pytest-benchmark. The ratio is of minima, which
other processes disturb least; a change counts when it is past the threshold *and* past what the
older run's own rounds spread.
"""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path
from typing import Any


@dataclasses.dataclass(frozen=True)
class Change:
    """One benchmark in both files."""

    name: str
    before: float
    after: float
    noise: float  # (median - min) / min of the older run
    threshold: float
    memory: float | None  # extra memory, new over old
    error: float | None  # gradient error, new over old

    @property
    def ratio(self) -> float:
        return self.after / self.before

    @property
    def verdict(self) -> str:
        limit = 1 + max(self.threshold, self.noise)
        if self.ratio > limit:
            return "SLOWER"
        if self.memory is not None and self.memory > 1 + self.threshold:
            return "MORE MEMORY"
        if self.error is not None and self.error > 4:
            return "LESS ACCURATE"
        return "faster" if self.ratio < 1 / limit else "same"


def read(path: Path) -> dict[str, dict[str, Any]]:
    """{name: benchmark} of a JSON file, or of the results.json in a folder."""
    path = path / "results.json" if path.is_dir() else path
    try:
        return {entry["fullname"]: entry for entry in json.loads(path.read_text())["benchmarks"]}
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise ValueError(
            f"bench-compare: {path} must be results of make bench or pytest-benchmark, "
            f"got {error!r}."
        ) from error


def compare(old: Path, new: Path, threshold: float = 0.15) -> list[Change]:
    """Every benchmark that is in both files.

    Args:
        old, new: result files or folders.
        threshold: relative change in time or memory that counts.
    """
    before, after = read(old), read(new)
    changes = []
    for name in [name for name in before if name in after]:
        a, b = before[name], after[name]
        stats = a["stats"]
        changes.append(
            Change(
                name,
                stats["min"],
                b["stats"]["min"],
                (stats["median"] - stats["min"]) / stats["min"],
                threshold,
                _ratio(a, b, "extra_memory", least=16 << 20),
                _ratio(a, b, "grad_error", least=1e-12),
            )
        )
    return changes


def _ratio(old: dict[str, Any], new: dict[str, Any], key: str, least: float) -> float | None:
    """New over old, None where either is missing; anything under ``least`` counts as it."""
    a, b = old["extra_info"].get(key), new["extra_info"].get(key)
    return None if a is None or b is None else max(b, least) / max(a, least)


def as_markdown(changes: list[Change]) -> str:
    lines = ["| benchmark | old s | new s | ratio | verdict |", "|---|---:|---:|---:|---|"]
    for change in sorted(changes, key=lambda c: -c.ratio):
        name = change.name.removeprefix("kd.bench::")
        lines.append(
            f"| {name} | {change.before:.4g} | {change.after:.4g} | {change.ratio:.2f} | "
            f"{change.verdict} |"
        )
    return "\n".join(lines)


def run(old: Path, new: Path, threshold: float) -> int:
    """Print the comparison; 1 when ours became worse, 2 when nothing is comparable."""
    changes = compare(old, new, threshold)
    if not changes:
        print(f"bench-compare: {old} and {new} have no benchmark in common.")
        return 2
    print(as_markdown(changes))
    worse = [c for c in changes if c.verdict.isupper() and _ours(c.name)]
    peers = [c for c in changes if c.verdict.isupper() and not _ours(c.name)]
    print(f"\n{len(changes)} compared, {len(worse)} of ours worse, {len(peers)} of others worse.")
    if peers and len(peers) >= len(worse):
        print("Code that did not change became slower too: the machine may have been busy.")
    return 1 if worse else 0


def _ours(name: str) -> bool:
    last = name.rpartition("/")[2]
    return last in ("kd", "kd in place") or not name.startswith("kd.bench::")
