"""Mixing sources into one training set: weights, epochs and the share of reasoning."""

from __future__ import annotations

import math
import random
from array import array
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, overload

from kd.traces.columns import ShapeError
from kd.traces.counts import DropCounts, StageCounts, metered
from kd.traces.records import BadRecord, parse
from kd.traces.shapes import normalise
from kd.traces.trace import Trace


@dataclass(frozen=True)
class Source:
    """One ingredient.

    Attributes:
        name: shown in the report.
        traces: a list, or ``JsonlTraces`` for a file that stays on disk.
        weight: its share relative to the other sources, when ``mix`` is given a total.
        epochs: how often each trace appears when it is not; 1.5 is all once and half again.
    """

    name: str
    traces: Sequence[Trace]
    weight: float = 1.0
    epochs: float = 1.0

    def __post_init__(self) -> None:
        if not (0 <= self.weight < math.inf and 0 <= self.epochs < math.inf):
            raise ValueError(
                "Source: weight and epochs must be numbers of at least 0, got "
                f"{self.weight} and {self.epochs} for {self.name!r}."
            )

    def reasons(self, index: int) -> bool:
        """Whether a trace has a thought."""
        held = self.traces
        return bool(held.thoughts[index] if isinstance(held, JsonlTraces) else held[index].think)


class JsonlTraces(Sequence[Trace]):
    """A JSON-lines file of traces as a sequence; 9 bytes a trace in memory.

    Args:
        path: of the file.
        report: takes the counts of lines that hold no trace, as stage "load".

    Attributes:
        thoughts: for each trace, whether it has one.
    """

    def __init__(self, path: str | Path, *, report: DropCounts | None = None) -> None:
        self.path = Path(path)
        self.thoughts = bytearray()
        self._offsets = array("q")
        self._file = self.path.open("rb")
        counted, at = (report if report is not None else DropCounts()).stage("load"), 0
        for number, line in enumerate(self._file):
            if line.strip():
                trace = _read(line)
                if isinstance(trace, Trace):
                    self._offsets.append(at)
                    self.thoughts.append(bool(trace.think))
                    counted.keep()
                else:
                    where = {"index": number, "file": self.path.name}
                    counted.drop(trace.reason, where, trace.detail)
            at += len(line)

    def __len__(self) -> int:
        return len(self._offsets)

    @overload
    def __getitem__(self, index: int) -> Trace: ...
    @overload
    def __getitem__(self, index: slice) -> list[Trace]: ...
    def __getitem__(self, index: int | slice) -> Trace | list[Trace]:
        if isinstance(index, slice):
            return [self[i] for i in range(*index.indices(len(self)))]
        self._file.seek(self._offsets[index])
        found = _read(self._file.readline())
        if isinstance(found, Trace):
            return found
        raise ValueError(f"mix: {self.path} must not change while it is read, got {found}.")


def _read(line: bytes) -> Trace | ShapeError:
    values = list(parse(line))
    if len(values) != 1:
        return ShapeError("not JSON", f"{len(values)} values on a line")
    if isinstance(values[0], BadRecord):
        return ShapeError(values[0].reason, values[0].detail)
    try:
        return normalise(values[0])
    except ShapeError as error:
        return error


def mix(
    sources: Sequence[Source],
    *,
    total: int | None = None,
    reasoning_share: float | None = None,
    seed: int = 0,
    report: DropCounts,
    stage: str = "mix",
    count_tokens: Callable[[Trace], int] | None = None,
) -> Iterator[Trace]:
    """Mix sources; the same seed gives the same order.

    Args:
        sources: the ingredients; each must hold traces.
        total: traces wanted, shared out by weight; a source too small is repeated, and the notes
            say how many times each was taken. None takes each source ``epochs`` times.
        reasoning_share: traces with a thought among all, such as 0.75 for DeepSeek's 600k : 200k.
            With a total, both sides are filled, each by the weights of its sources; without one,
            the side with too many is thinned out.
        seed: of choice and order.
        report: takes the counts, and traces, characters and tokens by source as notes.
        stage: the stage's name in the report.
        count_tokens: of a trace; without it only characters are counted.

    Raises:
        ValueError: a source is empty, no weight is above 0, or the share cannot be reached.
    """
    if reasoning_share is not None and not 0 <= reasoning_share <= 1:
        raise ValueError(f"mix: reasoning_share must lie in [0, 1], got {reasoning_share}.")
    if total is not None and total < 1:
        raise ValueError(f"mix: total must be at least 1, got {total}.")
    empty = [source.name for source in sources if not len(source.traces)]
    if empty or not sources:
        raise ValueError(
            f"mix: every source must hold traces, got none in {', '.join(empty) or 'no source'}. "
            "Check the file, or leave it out."
        )
    counted = report.stage(stage)
    rng = random.Random(f"mix-{seed}")
    plan = _plan(sources, total, reasoning_share, rng, counted)
    rng.shuffle(plan)
    return metered(counted, _taken(plan, sources, counted, count_tokens))


Plan = list[tuple[int, int]]  # (which source, which of its traces)


def _plan(
    sources: Sequence[Source],
    total: int | None,
    share: float | None,
    rng: random.Random,
    counted: StageCounts,
) -> Plan:
    weights = [source.weight for source in sources]
    everything = [range(len(source.traces)) for source in sources]
    if share is None:
        if total is not None:
            return _drawn(everything, _shares(weights, total), rng)
        return _drawn(everything, _epochs(sources), rng)
    if total is None:
        return _thinned(_drawn(everything, _epochs(sources), rng), sources, share, rng, counted)
    plan: Plan = []
    pools: dict[bool, list[list[int]]] = {True: [], False: []}
    for source, indices in zip(sources, everything, strict=True):
        thoughtful = [source.reasons(i) for i in indices]
        for side in (True, False):
            pools[side].append([i for i in indices if thoughtful[i] is side])
    there = {side: sum(map(len, pools[side])) for side in pools}
    wanted = {True: round(total * share), False: total - round(total * share)}
    _check_share(share, there, wanted)
    for side, count in wanted.items():
        usable = [w if pool else 0.0 for w, pool in zip(weights, pools[side], strict=True)]
        if count:
            plan += _drawn(pools[side], _shares(usable, count), rng)
    return plan


def _check_share(share: float, there: dict[bool, int], wanted: dict[bool, int]) -> None:
    """Refuse a share that the traces cannot give; (with a thought, without) by True and False."""
    needed = {True: share > 0, False: share < 1}
    if any(needed[side] and not (there[side] and wanted[side]) for side in (True, False)):
        raise ValueError(
            f"mix: reasoning_share must be one that the traces can give, got {share} of "
            f"{there[True]:,} with a thought and {there[False]:,} without (that makes "
            f"{wanted[True]:,} and {wanted[False]:,}). Add a source of the kind that is missing, "
            "ask for more, or leave the share out."
        )


def _taken(
    plan: Plan,
    sources: Sequence[Source],
    counted: StageCounts,
    count_tokens: Callable[[Trace], int] | None,
) -> Iterator[Trace]:
    notes: dict[str, Any] = counted.notes.setdefault("sources", {})
    empty = {"traces": 0, "reasoning": 0, "characters": 0, "tokens": 0, "times": 0.0}
    for which, count in Counter(which for which, _ in plan).items():
        entry = notes.setdefault(sources[which].name, dict(empty))
        entry["times"] += round(count / len(sources[which].traces), 3)
    for which, index in plan:
        trace = sources[which].traces[index]
        entry = notes[sources[which].name]
        entry["traces"] += 1
        entry["reasoning"] += bool(trace.think)
        entry["characters"] += len(trace.prompt) + len(trace.think) + len(trace.answer)
        entry["tokens"] += count_tokens(trace) if count_tokens else 0
        counted.keep()
        yield trace


def _epochs(sources: Sequence[Source]) -> list[int]:
    return [round(source.epochs * len(source.traces)) for source in sources]


def _shares(weights: Sequence[float], total: int) -> list[int]:
    """``total`` by weight, in whole numbers that add up to it."""
    whole = sum(weights)
    if whole <= 0:
        raise ValueError("mix: weights must not all be 0, got none above it with traces to take.")
    exact = [total * weight / whole for weight in weights]
    shares = [int(share) for share in exact]
    by_remainder = sorted(range(len(exact)), key=lambda i: (shares[i] - exact[i], i))
    for i in by_remainder[: total - sum(shares)]:
        shares[i] += 1
    return shares


def _drawn(pools: Sequence[Sequence[int]], wanted: Sequence[int], rng: random.Random) -> Plan:
    """So many of each pool: whole rounds first, so that none is far ahead."""
    plan: Plan = []
    for which, (pool, count) in enumerate(zip(pools, wanted, strict=True)):
        rounds, rest = divmod(count, len(pool)) if pool else (0, 0)
        plan += [(which, i) for _ in range(rounds) for i in pool]
        plan += [(which, i) for i in rng.sample(pool, rest)]
    return plan


def _thinned(
    plan: Plan, sources: Sequence[Source], share: float, rng: random.Random, counted: StageCounts
) -> Plan:
    """The plan without what one side has too many of."""
    sides: dict[bool, Plan] = {True: [], False: []}
    for which, index in plan:
        sides[sources[which].reasons(index)].append((which, index))
    size = min(
        len(sides[True]) / share if share else math.inf,
        len(sides[False]) / (1 - share) if share < 1 else math.inf,
    )
    wanted = {True: round(size * share), False: round(size * (1 - share))}
    _check_share(share, {side: len(held) for side, held in sides.items()}, wanted)
    for side, name in ((True, "too much reasoning"), (False, "too little reasoning")):
        rng.shuffle(sides[side])
        for which, index in sides[side][wanted[side] :]:
            counted.drop(name, sources[which].traces[index])
        del sides[side][wanted[side] :]
    return sides[True] + sides[False]
