"""What is in a cache: identity, size, bytes per token, and how much probability it covers."""

from __future__ import annotations

import os
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from kd.cache.meta import CacheMeta
from kd.cache.reader import CacheReader
from kd.page import subplots

QUANTILES = (0.01, 0.05, 0.25, 0.5, 0.75, 0.95)
LOW_MASS = 0.5


@dataclass
class CacheInfo:
    """Figures of a cache.

    mass [n] float64: probability covered by each of the sampled rows; entries: tokens per row;
    perplexity: of the sampled text to the teacher, None where its tokens' log-probs are not stored.
    """

    cache: CacheReader
    bytes: int
    mass: NDArray[np.float64]
    entries: float
    perplexity: float | None = None

    @property
    def bytes_per_token(self) -> float:
        return self.bytes / max(self.cache.tokens, 1)

    def to_dict(self) -> dict[str, Any]:
        """The figures as JSON values."""
        manifest = self.cache.manifest
        return {
            "cache_id": manifest.meta.cache_id,
            "meta": manifest.meta.to_dict(),
            "sequences": len(self.cache),
            "tokens": self.cache.tokens,
            "shards": len(manifest.shards),
            "bytes": self.bytes,
            "bytes_per_token": self.bytes_per_token,
            "entries_per_token": self.entries,
            "perplexity": self.perplexity,
            "mass_mean": float(self.mass.mean()) if len(self.mass) else None,
            "mass_quantiles": {
                str(q): float(np.quantile(self.mass, q)) for q in QUANTILES if len(self.mass)
            },
            "counters": manifest.counters,
            "sources": manifest.sources,
            "open_writers": manifest.open_writers,
        }

    def warnings(self) -> list[str]:
        found = []
        if self.cache.manifest.open_writers:
            found.append("the capture has not ended: run it again, it continues")
        if len(self.mass) and self.cache.meta.tail == "bucket":
            low = float((self.mass < LOW_MASS).mean())
            if low > 0.05:
                found.append(
                    f"{100 * low:.0f} % of the rows hold less than {LOW_MASS} of the probability: "
                    "use a larger top_k, or selection 'sampled', and keep tail='bucket'"
                )
        return found

    def text(self) -> str:
        """The figures as lines for a terminal, with a histogram of the covered mass."""
        meta, teacher = self.cache.meta, self.cache.meta.teacher
        text = "the log-probs of its own tokens are not stored"
        if self.perplexity is not None:
            text = f"perplexity {self.perplexity:.4g} to the teacher"
        lines = [
            f"cache          {self.cache.path}  (id {meta.cache_id[:12]})",
            f"teacher        {teacher.get('id')}  revision {teacher.get('revision')}  "
            f"{teacher.get('dtype')}",
            f"tokenizer      {meta.tokenizer.get('fingerprint', 'unknown')}",
            f"vocabulary     {meta.live_vocab:,} live of {meta.padded_vocab:,} rows",
            f"rows           {meta.selection}, at most {meta.top_k} tokens "
            f"({self.entries:.1f} on average), temperature {meta.temperature:g}, "
            f"read as tail={meta.tail!r}",
            f"codec          {meta.codec} {dict(meta.codec_options) or ''}".rstrip(),
            f"tail           {_tail_words(meta)}",
            f"text           {text}",
            f"content        {len(self.cache):,} sequences, {self.cache.tokens:,} tokens, "
            f"{len(self.cache.manifest.shards):,} shards",
            f"size           {self.bytes:,} bytes, {self.bytes_per_token:.1f} bytes/token",
        ]
        for entry in self.cache.manifest.sources:
            date = (entry.get("rendering") or {}).get("date")
            told = f"  (its chat template was told the date {date})" if date else ""
            lines.append(f"data           {entry.get('data')}{told}")
        for name, number in sorted(self.cache.manifest.counters.items()):
            lines.append(f"counted        {name}: {number:,}")
        if len(self.mass):
            shown = ", ".join(f"{np.quantile(self.mass, q):.3f}" for q in QUANTILES)
            named = ", ".join(f"{100 * q:g} %" for q in QUANTILES)
            lines.append(f"mass covered   mean {self.mass.mean():.4f}; at {named}: {shown}")
            lines += histogram(self.mass)
        return "\n".join([*lines, *(f"warning        {line}" for line in self.warnings())])

    def plot(self, path: str | os.PathLike[str]) -> None:
        """Save the distribution of the covered mass as a PNG."""
        figure, axes = subplots(6, 3.5)
        axes.hist(self.mass, bins=50, range=(0, 1), color="#4477aa")
        axes.axvline(float(self.mass.mean()), color="#cc3311", label=f"mean {self.mass.mean():.3f}")
        axes.set(
            xlabel=f"probability covered by the stored tokens (k = {self.cache.meta.top_k})",
            ylabel="rows",
            title=f"{self.cache.meta.teacher.get('id')}: {self.bytes_per_token:.1f} bytes/token",
        )
        axes.legend(frameon=False)
        figure.savefig(path, dpi=130, bbox_inches="tight")


def _tail_words(meta: CacheMeta) -> str:
    if meta.tail_temperatures:
        least, most = min(meta.tail_temperatures), max(meta.tail_temperatures)
        return f"stored at {len(meta.tail_temperatures)} temperatures from {least:g} to {most:g}"
    return f"for losses at temperature {meta.temperature:g}" if meta.tail != "none" else "exact"


def cache_info(path: str | os.PathLike[str], sample: int = 200) -> CacheInfo:
    """Figures of a cache; the covered mass is that of ``sample`` evenly spread sequences."""
    cache = CacheReader(Path(path), partial=True, duplicates="first")
    mass, followed, step = [], [np.zeros(0)], max(1, len(cache) // max(sample, 1))
    position = 0
    for number, entry in enumerate(cache.manifest.shards):
        chosen = [i for i in range(entry.sequences) if (position + i) % step == 0]
        position += entry.sequences
        if chosen and not cache.meta.hidden:
            rows = cache.shard(number).read(chosen, complete=True)
            mass.append(rows.mass)
            if rows.realised is not None:
                followed.append(rows.realised[~np.isnan(rows.realised)].astype(np.float64))
    text = np.concatenate(followed)
    entries = sum(entry.entries for entry in cache.manifest.shards)
    size = sum(item.stat().st_size for item in cache.path.iterdir() if item.is_file())
    found = np.concatenate([*mass, np.zeros(0)])
    perplexity = float(np.exp(-text.mean())) if len(text) else None
    return CacheInfo(
        cache, size, np.minimum(found, 1.0), entries / max(cache.tokens, 1), perplexity
    )


def histogram(values: NDArray[np.float64], bins: int = 10, width: int = 40) -> list[str]:
    """A histogram over [0, 1] in characters."""
    heights, _ = np.histogram(values, bins=bins, range=(0, 1))
    top = max(int(heights.max()), 1)
    return [
        f"  {i / bins:.1f}-{(i + 1) / bins:.1f}  {'#' * round(width * int(height) / top):<{width}} "
        f"{100 * height / len(values):5.1f} %"
        for i, height in enumerate(heights)
    ]
