"""The log-probability of the token that followed, for every row, in about a byte.

What a row's top-k may leave out: the teacher's likelihood of the text itself. In steps of 1 / 64
nats through a prefix code (FORMAT.md).
"""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

from kd.cache import prefix
from kd.cache.codecs import Layout, Side, Streams

STREAMS = ("realised.unary", "realised.bits")
STEPS = 64  # a nat
IMPOSSIBLE = 1 << 16  # level of a probability of zero; others are at least e**-1024


def encode_realised(values: NDArray[np.float32], layout: Layout, side: Side) -> Streams:
    """The streams of [N] log-probs, NaN where nothing followed; the code goes into side.params."""
    levels = np.rint(-np.nan_to_num(values.astype(np.float64), nan=0.0, neginf=-1e9) * STEPS)
    levels = np.where(values == -np.inf, IMPOSSIBLE, np.minimum(levels, IMPOSSIBLE - 1))
    coded = np.where(np.isnan(values), 0, 1 + levels).astype(np.int64)
    mode, k = prefix.best_parameter(coded)
    side.params.update(realised_mode=mode, realised_k=k)
    unary, bits = prefix.encode(coded, k, mode, layout.rows)
    return {STREAMS[0]: unary, STREAMS[1]: bits}


def decode_realised(parts: Streams, layout: Layout, side: Side) -> NDArray[np.float32]:
    """[N] log-probs from the streams."""
    mode, k = str(side.params["realised_mode"]), int(side.params["realised_k"])
    coded = prefix.decode(parts[STREAMS[0]], parts[STREAMS[1]], k, mode, layout.rows)
    levels = np.asarray(coded, np.int64) - 1
    if len(levels) and int(levels.max()) > IMPOSSIBLE:
        raise ValueError("a realised token's log-prob is out of range")
    values = (-levels / STEPS).astype(np.float32)
    values[levels == IMPOSSIBLE] = -np.inf
    values[levels < 0] = np.nan
    return values
