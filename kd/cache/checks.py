"""What the writer and ``kd cache verify`` look at: [L, K] targets become rows, or why not."""

from __future__ import annotations

from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

from kd.cache.keys import describe
from kd.cache.meta import CacheMeta
from kd.cache.rows import Rows

# Probabilities of a row may exceed one by the rounding of bfloat16 log-probs, and by no more.
MASS_TOLERANCE = 1e-2
REALISED_TOLERANCE = 0.1  # between a row's entry and the same token's own log-prob: lossy codecs
ROUNDING = 1e-3  # nats above 0 that are taken as 0
TAIL_TOLERANCE = 0.02  # nats, of a tail's log-partition: its steps and the rounding of float32


def checked_rows(
    tokens: NDArray[np.int32],
    ids: Any,
    logprobs: Any,
    meta: CacheMeta,
    tails: Any = None,
    realised: Any = None,
) -> Rows:
    """A sequence's rows from ids [L, K] (-1: an empty slot), log-probs [L, K] and tails [L, M].

    Raises:
        ValueError: naming the sequence and the row, for shapes that do not fit, ids outside the
            live vocabulary or twice in a row, log-probs that are NaN, +inf or above 0, and rows
            whose probabilities sum to more than one; tails that no distribution has; log-probs of
            the tokens that followed that contradict the row.
    """
    name = f"sequence {describe(tokens)}"
    name = f"sequence {describe(tokens)}"
    ids, logprobs = _array(ids), _array(logprobs)
    if ids.ndim != 2 or ids.shape != logprobs.shape or len(ids) != len(tokens):
        raise ValueError(
            f"CacheWriter.add: ids and logprobs must both be [L, K] with L = {len(tokens)}, got "
            f"{ids.shape} and {logprobs.shape} for {name}. Give one row for every token."
        )
    if ids.dtype.kind not in "iu":
        raise TypeError(f"CacheWriter.add: ids must be integers, got {ids.dtype}.")
    if logprobs.dtype.kind != "f":
        raise TypeError(f"CacheWriter.add: logprobs must be floating point, got {logprobs.dtype}.")
    live = meta.live_vocab
    logprobs = logprobs.astype(np.float32, copy=False)
    _refuse(tokens >= live, f"{name}: input_ids", f"below {live}", tokens)
    bad = (ids < -1) | (ids >= live)
    _refuse(bad, f"{name}: ids", f"from 0 to {live - 1}, or -1 for an empty slot", ids)
    used = ids >= 0
    bad = used & ~(logprobs <= ROUNDING)  # NaN included
    _refuse(bad, f"{name}: logprobs", "log-probabilities of at most 0, not NaN", logprobs)
    used &= logprobs > -np.inf
    counts = used.sum(1, dtype=np.int32)
    if int(counts.max(initial=0)) > meta.top_k:
        raise ValueError(
            f"CacheWriter.add: a row must hold at most top_k = {meta.top_k} tokens, got "
            f"{int(counts.max())} in row {int(counts.argmax())} of {name}."
        )
    ordered = np.sort(np.where(used, ids, -1), axis=1)
    bad = (ordered[:, 1:] == ordered[:, :-1]) & (ordered[:, 1:] >= 0)
    _refuse(bad, f"{name}: ids", "different within a row", ordered[:, 1:])
    mass = np.where(used, np.exp(np.where(used, logprobs, 0)), 0).sum(1)
    _refuse(mass > 1 + MASS_TOLERANCE, f"{name}: probabilities", "at most 1 in sum", mass)
    shape = (len(tokens), len(meta.tail_temperatures))
    rows = Rows(
        np.array([len(tokens)]),
        counts,
        ids[used].astype(np.int32),
        np.minimum(logprobs[used], 0),
        _optional(tails, shape, "tails must be [L, M]", "tail_temperatures", meta, name),
        _optional(realised, tokens.shape, "realised must be [L]", "realised", meta, name),
        tokens,
    )
    if rows.tails is not None:
        for problem, rule, bad in broken_tails(rows.tails, mass, meta):
            _refuse(bad, f"{name}: {problem}", rule, rows.tails)
        rows.tails[counts == 0] = 0  # such a row says nothing
    if rows.realised is not None:
        rows.realised[-1] = np.nan
        rows.realised[(rows.realised > 0) & (rows.realised <= ROUNDING)] = 0
        for problem, rule, bad in broken_realised(rows, meta):
            _refuse(bad, f"{name}: {problem}", rule, rows.realised)
    return rows


def _optional(
    values: Any, shape: tuple[int, ...], what: str, field: str, meta: CacheMeta, name: str
) -> NDArray[np.float32] | None:
    """What a sequence has beside its entries, exactly where the meta's ``field`` asks for it."""
    asked = getattr(meta, field)
    if not asked and values is None:
        return None
    found: NDArray[Any] = np.zeros(0) if values is None else _array(values)
    if not asked or found.shape != shape or found.dtype.kind != "f":
        raise ValueError(
            f"CacheWriter.add: {what} = {shape} floating-point values exactly where meta.{field} "
            f"asks for them, got {None if values is None else found.shape} for {name} and "
            f"meta.{field}={asked!r}."
        )
    return found.astype(np.float32)


def broken_realised(rows: Rows, meta: CacheMeta) -> list[tuple[str, str, NDArray[np.bool_]]]:
    """What no row with its token has: (what, the rule, where [N]).

    A token that followed and is among its row's has one probability, where rows are no draws.
    """
    assert rows.realised is not None and rows.tokens is not None
    value, row = rows.realised.astype(np.float64), rows.row_of_entry
    following = np.append(rows.tokens[1:], np.int32(-1))
    following[rows.bounds[1:] - 1] = -1  # nothing follows the last of a sequence
    entry = np.flatnonzero(rows.ids == following[row])
    differ = np.zeros(len(value), np.bool_)
    most = np.zeros(len(value))
    if meta.tail == "bucket":
        with np.errstate(invalid="ignore"):
            stored, said = rows.logprobs[entry].astype(np.float64), value[row[entry]]
            differ[row[entry]] = np.abs(stored - said) > REALISED_TOLERANCE * (1 + np.abs(stored))
        left = np.log(np.maximum(1 + MASS_TOLERANCE - rows.mass, MASS_TOLERANCE))
        most = np.where(rows.counts > 0, left, 0.0)
        most[row[entry]] = 0.0
    return [
        ("realised", "a log-probability of at most 0", value > 0),
        ("realised", "that of the row's own entry for the token that follows", differ),
        ("realised", "at most what the row's tokens leave over", value > most + ROUNDING),
    ]


def broken_tails(
    tails: NDArray[np.float32], mass: NDArray[Any], meta: CacheMeta
) -> list[tuple[str, str, NDArray[np.bool_]]]:
    """What no distribution has: (what, the rule, where [N, M]). mass [N] of the stored tokens."""
    order = np.argsort(meta.tail_temperatures)
    powers = meta.temperature / np.array(meta.tail_temperatures)
    with np.errstate(invalid="ignore"):
        falls = np.diff(tails[:, order], axis=1) < -TAIL_TOLERANCE
        most = np.log(meta.live_vocab) + TAIL_TOLERANCE
        # Probabilities of at most 1 - mass in all, and of at most live_vocab tokens.
        share = np.log(np.maximum(1 + MASS_TOLERANCE - mass, MASS_TOLERANCE))[:, None]
        largest = np.minimum(most, np.where(powers >= 1, powers * share, most)) + TAIL_TOLERANCE
        some = (tails == -np.inf).any(1) != (tails == -np.inf).all(1)
    return [
        ("tails", "finite, or -inf in a whole row", ~(tails < np.inf) | some[:, None]),
        ("tails", "log-sums of the probability left over, or less", tails > largest),
        ("tails", "larger at a higher temperature", falls),
    ]


def _array(values: Any) -> NDArray[Any]:
    if isinstance(values, torch.Tensor):
        values = values.detach().cpu()
        values = values.float() if values.dtype in (torch.bfloat16, torch.float16) else values
        return np.asarray(values.numpy())
    return np.asarray(values)


def _refuse(bad: NDArray[np.bool_], what: str, rule: str, values: NDArray[Any]) -> None:
    if bad.any():
        at = np.argwhere(bad)[0]
        raise ValueError(
            f"CacheWriter.add: {what} must be {rule}, got {values[tuple(at)]} in row {int(at[0])}. "
            "Nothing of this sequence was stored."
        )
