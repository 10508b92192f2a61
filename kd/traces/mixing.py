"""Mixing sources into one training set: weights, epochs and the share of reasoning."""

from __future__ import annotations

import random
from array import array
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, overload

from kd.traces.files import _parse
from kd.traces.shapes import normalise
from kd.traces.trace import Trace
from kd.traces.yields import Tally, Yield, metered


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
        if self.weight < 0 or self.epochs < 0:
            raise ValueError(
                "Source: weight and epochs must be at least 0, got "
                f"{self.weight} and {self.epochs} for {self.name!r}."
            )


class JsonlTraces(Sequence[Trace]):
    """A JSON-lines file of traces as a sequence; 8 bytes a trace in memory."""

    def __init__(self, path: str | Path) -> None:
        self.path = Path(path)
        self._offsets = array("q")
        self._file = self.path.open("rb")
        at = 0
        for line in self._file:
            if line.strip():
                self._offsets.append(at)
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
        return normalise(_parse(self._file.readline()))


def mix(
    sources: Sequence[Source],
    *,
    total: int | None = None,
    reasoning_share: float | None = None,
    seed: int = 0,
    report: Yield,
    stage: str = "mix",
    count_tokens: Callable[[Trace], int] | None = None,
) -> Iterator[Trace]:
    """Mix sources; the same seed gives the same order.

    Args:
        sources: the ingredients.
        total: traces wanted, shared out by weight (a source too small is repeated); None takes
            each source ``epochs`` times.
        reasoning_share: traces with a thought among all, such as 0.75 for DeepSeek's 600k : 200k;
            the side with too many is thinned out.
        seed: of choice and order.
        report: takes the counts, and traces, characters and tokens by source as notes.
        stage: the stage's name in the report.
        count_tokens: of a trace; without it only characters are counted.
    """
    if reasoning_share is not None and not 0 <= reasoning_share <= 1:
        raise ValueError(f"mix: reasoning_share must lie in [0, 1], got {reasoning_share}.")
    tally = report.stage(stage)
    chosen = _mixed(sources, total, reasoning_share, seed, tally, count_tokens)
    return metered(tally, chosen)


def _mixed(
    sources: Sequence[Source],
    total: int | None,
    reasoning_share: float | None,
    seed: int,
    tally: Tally,
    count_tokens: Callable[[Trace], int] | None,
) -> Iterator[Trace]:
    rng = random.Random(f"mix-{seed}")
    plan = [
        (which, index)
        for which, wanted in enumerate(_shares(sources, total))
        for index in _draw(len(sources[which].traces), wanted, rng)
    ]
    if reasoning_share is not None:
        plan = _balance(plan, sources, reasoning_share, rng, tally)
    rng.shuffle(plan)
    notes: dict[str, Any] = tally.notes.setdefault("sources", {})
    for which, index in plan:
        trace, name = sources[which].traces[index], sources[which].name
        entry = notes.setdefault(name, {"traces": 0, "reasoning": 0, "characters": 0, "tokens": 0})
        entry["traces"] += 1
        entry["reasoning"] += bool(trace.think)
        entry["characters"] += len(trace.prompt) + len(trace.think) + len(trace.answer)
        entry["tokens"] += count_tokens(trace) if count_tokens else 0
        tally.keep()
        yield trace


def _shares(sources: Sequence[Source], total: int | None) -> list[int]:
    if total is None:
        return [round(source.epochs * len(source.traces)) for source in sources]
    weights = [source.weight if len(source.traces) else 0.0 for source in sources]
    whole = sum(weights)
    if whole <= 0:
        raise ValueError("mix: weights must not all be 0, got none above it with traces.")
    exact = [total * weight / whole for weight in weights]
    shares = [int(share) for share in exact]
    by_remainder = sorted(range(len(exact)), key=lambda i: (shares[i] - exact[i], i))
    for i in by_remainder[: total - sum(shares)]:
        shares[i] += 1
    return shares


def _draw(size: int, wanted: int, rng: random.Random) -> list[int]:
    """``wanted`` indices below ``size``: whole rounds first, so that none is far ahead."""
    chosen = [i for _ in range(wanted // size if size else 0) for i in range(size)]
    return chosen + (rng.sample(range(size), wanted % size) if size else [])


def _balance(
    plan: list[tuple[int, int]],
    sources: Sequence[Source],
    share: float,
    rng: random.Random,
    tally: Any,
) -> list[tuple[int, int]]:
    sides: tuple[list[tuple[int, int]], list[tuple[int, int]]] = ([], [])
    for which, index in plan:
        sides[bool(sources[which].traces[index].think)].append((which, index))
    plain, reasoning = sides
    size = min(
        len(reasoning) / share if share else float("inf"),
        len(plain) / (1 - share) if share < 1 else float("inf"),
    )
    for side, wanted, name in (
        (reasoning, round(size * share) if share else 0, "too much reasoning"),
        (plain, round(size * (1 - share)) if share < 1 else 0, "too little reasoning"),
    ):
        rng.shuffle(side)
        for which, index in side[wanted:]:
            tally.drop(name, sources[which].traces[index])
        del side[wanted:]
    return reasoning + plain
