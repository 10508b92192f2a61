"""Exact and near duplicates: hashes, then MinHash-LSH whose candidates are compared exactly."""

from __future__ import annotations

import hashlib
import re
from collections.abc import Iterable, Iterator
from itertools import chain
from typing import Any

from kd.traces.counts import DropCounts
from kd.traces.trace import Trace
from kd.traces.words import carried, words

_SPACES = re.compile(r"\s+")


def key_texts(trace: Trace, by: str) -> tuple[str, ...]:
    """The texts that decide: "prompt", or "trace" (prompt, thought and answer)."""
    if by == "prompt":
        return (trace.system, trace.prompt) if trace.system else (trace.prompt,)
    if by == "trace":
        return trace.prompt, trace.think, trace.answer
    raise ValueError(f'dedupe: by must be "prompt" or "trace", got {by!r}.')


def exact_duplicates(
    traces: Iterable[Trace], *, report: DropCounts, by: str = "trace", stage: str = "dedupe exact"
) -> Iterator[Trace]:
    """Keep the first of those that differ in case and spaces only; 16 bytes each in memory."""
    counted = report.stage(stage)
    seen: set[bytes] = set()
    for trace in traces:
        with counted.timed():
            text = _SPACES.sub(" ", "\n".join(key_texts(trace, by))).strip().casefold()
            key = hashlib.blake2b(text.encode("utf-8", "replace"), digest_size=16).digest()
            fresh = key not in seen
            seen.add(key)
        if fresh:
            counted.keep()
            yield trace
        else:
            counted.drop("exact duplicate", trace)


def near_duplicates(
    traces: Iterable[Trace],
    *,
    report: DropCounts,
    by: str = "trace",
    threshold: float = 0.85,
    permutations: int = 128,
    shingle: int = 5,
    stage: str = "dedupe near",
) -> Iterator[Trace]:
    """Keep the first of those whose word shingles overlap by ``threshold`` (Jaccard).

    MinHash signatures (rensa) find candidates in time linear in the records; a candidate's
    similarity is estimated from the two whole signatures, and the match is kept as evidence.
    Questions that differ in what makes a problem (numbers, signs, variables, names, words such as
    "not" or "largest": ``carried``) are different problems, however alike the texts are. In
    scripts without spaces a letter counts as a word.

    Args:
        traces: what to look through, one at a time.
        report: takes the counts.
        by: "trace" or "prompt"; with several samples a prompt, "prompt" keeps one of them.
        threshold: similarity from which two are the same.
        permutations: length of a signature; the estimate's standard error is at most
            0.5 / sqrt(permutations).
        shingle: words in a shingle.
        stage: the stage's name in the report.
    """
    from rensa import RMinHash, RMinHashLSH  # type: ignore[import-untyped]

    if not 0 < threshold < 1:
        raise ValueError(f"near_duplicates: threshold must lie in (0, 1), got {threshold}.")
    counted = report.stage(stage)
    bands = _bands(threshold, permutations)
    index = RMinHashLSH(threshold=threshold, num_perm=permutations, num_bands=bands)
    kept: dict[int, Any] = {}
    for number, trace in enumerate(traces):
        with counted.timed():
            signature = RMinHash(num_perm=permutations, seed=42)
            # the problem is part of every shingle: another problem shares none
            said = list(chain.from_iterable(map(words, key_texts(trace, by))))
            signature.update(shingles(said, shingle, _problem(trace)))
            best, twin = 0.0, -1
            for candidate in index.query(signature):
                similarity = signature.jaccard(kept[candidate])
                if similarity > best:
                    best, twin = similarity, candidate
            fresh = best < threshold
            if fresh:
                index.insert(number, signature)
                kept[number] = signature
        if fresh:
            counted.keep()
            yield trace
        else:
            counted.drop("near duplicate", trace, f"of record {twin}, similarity {best:.2f}")


def shingles(said: list[str], size: int, prefix: str) -> list[str]:
    """Runs of ``size`` words, each after the prefix; short texts are one shingle."""
    if len(said) <= size:
        return [" ".join([prefix, *said])]
    runs = zip(*(said[i:] for i in range(size)), strict=False)
    return [" ".join((prefix, *run)) for run in runs]


def _problem(trace: Trace) -> str:
    """A digest of what makes the question this one."""
    key = "\0".join(carried(trace.prompt)).encode("utf-8", "replace")
    return hashlib.blake2b(key, digest_size=8).hexdigest()


def _bands(threshold: float, permutations: int) -> int:
    """The fewest bands that find 99 of 100 pairs at the threshold."""
    for bands in range(1, permutations + 1):
        if permutations % bands == 0:
            rows = permutations // bands
            if 1 - (1 - threshold**rows) ** bands >= 0.99:
                return bands
    return permutations
