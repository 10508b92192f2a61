"""DistillKit's packed rows: what its compressor's configuration makes of their bytes.

A row's ids are ceil(log2 d) bits each, highest bit first, likeliest token first. Its values are
the ``exact_k`` best as they are, then polynomial coefficients of the rest, then residuals in bins
(a scale, and signed integers of ``element_bits``); with ``delta_encoding`` all of them are
differences from the one before. Files do not say which configuration they were made with.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np
from numpy.typing import NDArray

from kd.cache.keys import token_array

COLUMNS = ("input_ids", "compressed_logprobs", "bytepacked_indices")
WIDTHS = {"float16": 2, "bfloat16": 2, "float32": 4, "float64": 8}

ROUNDING = 2e-2  # of exact values in bfloat16, in nats and relative
MOST_MASS = 1.2  # of a row whose rest is approximated by a polynomial


def found_in(config: Mapping[str, Any]) -> Mapping[str, Any]:
    """The compressor's mapping, wherever in a YAML's nesting it is."""
    if {"d", "k", "exact_k"} <= set(config):
        return config
    for value in config.values():
        if isinstance(value, Mapping):
            inner = found_in(value)
            if {"d", "k", "exact_k"} <= set(inner):
                return inner
    return config


class Packed:
    """Decodes rows of one compressor configuration.

    Args:
        config: the YAML's ``logprob_compressor`` mapping, or one that holds it: d, k, exact_k,
            exact_dtype, polynomial_terms, term_dtype, residual_bins, delta_encoding, normalize_t.
        live_vocab: ids at or past it are dropped.
    """

    def __init__(self, config: Mapping[str, Any], live_vocab: int) -> None:
        config = found_in(config)
        self.config, self.live_vocab = dict(config), live_vocab
        missing = sorted({"d", "k", "exact_k"} - set(config))
        if missing:
            raise ValueError(
                f"import_cache: compression must have d, k and exact_k, got none of "
                f"{', '.join(missing)}. They are in the YAML that the files were made with."
            )
        self.bits = max(1, int(self.config["d"] - 1).bit_length())
        self.k, self.exact_k = int(config["k"]), int(config["exact_k"])
        self.bins = [dict(item) for item in self.config.get("residual_bins") or []]

    def read(self, record: Mapping[str, Any]) -> Any:
        """(tokens [L], ids [L, k], log-probs [L, k]) of a parquet row."""
        tokens = token_array(np.asarray(record["input_ids"], np.int64), "import_cache")
        values = np.asarray(record["compressed_logprobs"], np.uint8)
        packed = np.asarray(record["bytepacked_indices"], np.uint8)
        id_bytes, value_bytes = -(-self.k * self.bits // 8), self.value_bytes()
        wanted = ((len(tokens), value_bytes), (len(tokens), id_bytes))
        # Captured with vLLM there is no row after the last token.
        rows = len(tokens) - 1 if len(values) == len(packed) == len(tokens) - 1 else len(tokens)
        if (values.shape, packed.shape) != ((rows, value_bytes), (rows, id_bytes)):
            raise ValueError(
                f"a record's compressed_logprobs and bytepacked_indices must be "
                f"{wanted[0]} and {wanted[1]} bytes with this compression, got {values.shape} and "
                f"{packed.shape}. The configuration is not the one the file was made with."
            )
        ids, logprobs = self.ids(packed), self.logprobs(values)
        self._check(logprobs)
        if int(ids.max(initial=0)) >= int(self.config["d"]):
            raise ValueError(
                f"ids must be below compression's d ({self.config['d']}), got "
                f"{int(ids.max())}. The configuration is not the one the file was made with."
            )
        ids = np.where(ids >= self.live_vocab, -1, ids)
        logprobs = bounded(np.minimum(logprobs, 0))
        if rows < len(tokens):
            ids = np.concatenate([ids, np.full((1, self.k), -1)])
            logprobs = np.concatenate([logprobs, np.full((1, self.k), -np.inf, np.float32)])
        return tokens, ids, logprobs

    def _check(self, logprobs: NDArray[np.float32]) -> None:
        """Refuse values that are no likeliest-first log-probs: another configuration's bytes."""
        exact = logprobs[:, : self.exact_k]
        slack = ROUNDING * (1 + np.abs(np.nan_to_num(exact[:, :-1])))
        with np.errstate(over="ignore", invalid="ignore"):
            mass = np.exp(logprobs.astype(np.float64)).sum(1)
        broken = (
            (~np.isfinite(logprobs).all(1), "finite"),
            ((exact > ROUNDING).any(1), "at most 0"),
            ((np.diff(exact, axis=1) > slack).any(1), "likeliest first"),
            (mass > MOST_MASS, f"of a mass of at most {MOST_MASS}"),
            (self._summed_twice(exact), "no sums of log-probs"),
        )
        for bad, rule in broken:
            if bad.any():
                row = int(bad.argmax())
                shown = ", ".join(f"{value:.4g}" for value in logprobs[row, :6])
                raise ValueError(
                    f"log-probs must be {rule}, got {shown}, ... with a mass of {mass[row]:.4g} in "
                    f"row {row}. The configuration is not the one the file was made with: "
                    "exact_dtype, delta_encoding, normalize_t and the like must be its own."
                )

    def _summed_twice(self, exact: NDArray[np.float32]) -> NDArray[np.bool_]:
        """Rows whose differences are themselves likeliest first: nearly all of a file's rows only
        where the differences are the log-probs, written without delta_encoding."""
        gaps = np.diff(exact, axis=1, prepend=0)
        ordered = np.asarray((np.diff(gaps, axis=1) <= 0).all(1))
        enough = self.config.get("delta_encoding", True) and self.exact_k > 3
        return ordered & enough & (len(ordered) > 2) & (ordered.mean() > 0.9)

    def value_bytes(self) -> int:
        """Bytes of a row's values."""
        size = self.exact_k * WIDTHS[self.config.get("exact_dtype", "float32")]
        terms = self.config.get("polynomial_terms") or []
        size += len(terms) * WIDTHS[self.config.get("term_dtype", "float32")]
        for item in self.bins:
            size += WIDTHS[item["scale_dtype"]] + -(
                -item["num_elements"] * item["element_bits"] // 8
            )
        return size

    def ids(self, packed: NDArray[np.uint8]) -> NDArray[np.int64]:
        bits = np.unpackbits(packed, axis=1)[:, : self.k * self.bits]
        powers = 1 << np.arange(self.bits - 1, -1, -1, dtype=np.int64)
        return bits.reshape(len(packed), self.k, self.bits) @ powers

    def logprobs(self, data: NDArray[np.uint8]) -> NDArray[np.float32]:
        """The k log-probs of each row, likeliest first."""
        rest = self.k - self.exact_k
        exact, data = _take(data, self.exact_k, self.config.get("exact_dtype", "float32"))
        terms = self.config.get("polynomial_terms") or []
        coefficients, data = _take(data, len(terms), self.config.get("term_dtype", "float32"))
        approximate = np.zeros((len(data), rest), np.float32)
        if terms:
            at = np.linspace(0, 1, rest) if self.config.get("normalize_t") else np.arange(rest)
            named = {"sqrt": np.sqrt, "exp": np.exp}
            basis = [named[t](at) if isinstance(t, str) else at ** float(t) for t in terms]
            approximate += coefficients @ np.stack(basis).astype(np.float32)
        done = 0
        for item in self.bins:
            width, count = int(item["element_bits"]), int(item["num_elements"])
            scale, data = _take(data, 1, item["scale_dtype"])
            size = -(-width * count // 8)
            bits = np.unpackbits(data[:, :size], axis=1)[:, : width * count]
            data = data[:, size:]
            powers = 1 << np.arange(width - 1, -1, -1, dtype=np.int64)
            number = bits.reshape(len(bits), count, width) @ powers
            signed = number * 2 - 1 if width == 1 else number - (1 << (width - 1))
            approximate[:, done : done + count] += signed * scale
            done += count
        values = np.concatenate([exact, approximate], 1)
        if self.config.get("delta_encoding", True):
            values = np.cumsum(values, axis=1, dtype=np.float32)
        return values


def _take(
    data: NDArray[np.uint8], count: int, dtype: str
) -> tuple[NDArray[np.float32], NDArray[np.uint8]]:
    """The first ``count`` values of each row as float32, and the bytes after them."""
    size = WIDTHS[dtype]
    head = np.ascontiguousarray(data[:, : count * size])
    if dtype == "bfloat16":
        values = (head.view("<u2").astype(np.uint32) << 16).view(np.float32)
    else:
        values = head.view(f"<f{size}").astype(np.float32)
    return values.reshape(len(data), count), data[:, count * size :]


def bounded(logprobs: NDArray[np.float32]) -> NDArray[np.float32]:
    """Rows whose approximated probabilities pass one in sum are scaled back to it."""
    total = np.logaddexp.reduce(logprobs.astype(np.float64), axis=1, keepdims=True)
    return (logprobs - np.maximum(total, 0)).astype(np.float32)
