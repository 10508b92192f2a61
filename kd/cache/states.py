"""Codecs of the hidden-state tier: a row is the teacher's final hidden state, not its top tokens.

Such rows have no ids; the H values of a row stand where other codecs have log-probabilities.
"""

from __future__ import annotations

import numpy as np
import torch
from numpy.typing import NDArray

from kd.cache.codecs import Layout, Rows, Side, Streams
from kd.cache.compact import row_stream

FP8_LARGEST = 448.0  # of float8_e4m3fn


class HiddenBF16:
    """2 bytes a value: bfloat16, exact for a bfloat16 teacher."""

    name = "hidden_bf16"
    streams: tuple[str, ...] = ("hidden",)
    tables: tuple[str, ...] = ()

    def encode(self, rows: Rows, layout: Layout, side: Side) -> Streams:
        values = torch.from_numpy(rows.logprobs).bfloat16().view(torch.uint8).numpy()
        return {"hidden": (values, layout.entries * 2)}

    def decode(self, parts: Streams, counts: NDArray[np.int32], layout: Layout, side: Side) -> Rows:
        packed = np.array(parts["hidden"][0]).view("<u2").astype(np.uint32) << 16
        return Rows(counts, np.zeros(0, np.int32), packed.view(np.float32))


class HiddenFP8:
    """1 byte a value: float8 (e4m3fn) times a float32 scale for each row."""

    name = "hidden_fp8"
    streams: tuple[str, ...] = ("hidden", "scales")
    tables: tuple[str, ...] = ()

    def encode(self, rows: Rows, layout: Layout, side: Side) -> Streams:
        values = torch.from_numpy(rows.logprobs).view(len(rows.counts), -1)
        scale = values.abs().amax(1, keepdim=True).clamp(min=1e-30) / FP8_LARGEST
        packed = (values / scale).to(torch.float8_e4m3fn).view(torch.uint8).numpy()
        scales = scale.numpy().astype("<f4").view(np.uint8)
        return {
            "hidden": (packed.reshape(-1), layout.entries),
            "scales": row_stream(scales, 4, layout),
        }

    def decode(self, parts: Streams, counts: NDArray[np.int32], layout: Layout, side: Side) -> Rows:
        packed = torch.from_numpy(np.array(parts["hidden"][0])).view(torch.float8_e4m3fn)
        scales = np.array(parts["scales"][0]).view("<f4")
        values = packed.float().numpy().reshape(len(counts), -1) * scales[:, None]
        return Rows(counts, np.zeros(0, np.int32), values.reshape(-1).astype(np.float32))
