"""Other tools' log-probabilities as a cache: DistillKit parquet, vLLM / OpenAI JSONL, Axolotl.

Row i of a cache is the distribution for the token *after* token i. Servers and Axolotl store the
distribution *of* token i, so their rows move up by one, and the last row stays empty.
"""

from __future__ import annotations

import functools
import json
import os
from collections import Counter
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from kd.cache.codecs import default_options
from kd.cache.keys import token_array
from kd.cache.meta import CacheMeta
from kd.cache.reader import TeacherCache
from kd.cache.writer import CacheWriter
from kd.teachers.records import records
from kd.teachers.server_rows import TOLERANCE, Item, from_logprobs, table

LAYOUTS = ("distillkit", "logprobs", "axolotl")
TOKEN_ID = "token_id:"


def import_cache(
    source: str | os.PathLike[str],
    path: str | os.PathLike[str],
    *,
    layout: str,
    live_vocab: int,
    teacher: str,
    temperature: float = 1.0,
    codec: str = "compact",
    top_k: int | None = None,
    tokenizer: Mapping[str, Any] | None = None,
    compression: Mapping[str, Any] | str | os.PathLike[str] | None = None,
) -> TeacherCache:
    """Convert another tool's file into a cache; resumable like any capture.

    Args:
        source: a .parquet, .arrow or .jsonl file, or a folder with such files at any depth.
        path: folder of the new cache.
        layout: "distillkit" (its packed parquet), "logprobs" (vLLM or OpenAI responses, also as
            lines of a batch's output; one JSON object a line) or "axolotl" (columns
            input_ids, target_token_ids, target_logprobs, or a column of {logprob, token:
            "token_id:N"} lists).
        live_vocab: the teacher's tokens; foreign files do not say.
        teacher: its name, for the record.
        temperature: the one the values were captured at.
        codec: how the rows are stored.
        top_k: the most tokens kept in a row, the likeliest; the widest row's when None.
        tokenizer: a fingerprint to record.
        compression: "distillkit" alone: the compressor's configuration (d, k, exact_k,
            exact_dtype, ...), as its YAML states it, or the YAML or JSON file.

    Returns:
        The finished cache.

    Raises:
        ValueError: for a record that does not fit, by its number and what is wrong; and when no
            record holds log-probabilities: nothing is then written.
    """
    if layout not in LAYOUTS:
        raise ValueError(
            f"import_cache: layout must be one of {', '.join(LAYOUTS)}, got {layout!r}."
        )
    if isinstance(compression, (str, os.PathLike)):
        compression = read_compression(Path(compression))
    reader = _Reader(source, layout, live_vocab, compression)
    widest = 0
    for item in reader:
        widest = max(widest, item[1].shape[1])
        if top_k is not None:  # one is enough to know that there is something to write
            break
    if not widest:
        raise ValueError(
            f"import_cache: {source} must hold records with log-probabilities in the layout "
            f"{layout!r}, got none in {reader.number} records ({_counted(reader.left_out)}). "
            f"{reader.seen}Choose the layout they are in."
        )
    slots = min(top_k or widest, live_vocab)
    meta = CacheMeta(
        teacher={"id": teacher, "imported_from": layout},
        tokenizer=tokenizer or {},
        live_vocab=live_vocab,
        padded_vocab=live_vocab,
        temperature=temperature,
        top_k=slots,
        codec=codec,
        codec_options=default_options(codec, slots),
    )
    with CacheWriter(path, meta) as writer:
        for item in reader:
            if item[0] not in writer:
                writer.add(item[0], *likeliest(item[1], item[2], meta.top_k))
        for reason, number in reader.left_out.items():
            writer.count(reason, number)
    return TeacherCache(path)


def read_compression(path: Path) -> Mapping[str, Any]:
    """The configuration of DistillKit's compressor, from its YAML or from JSON."""
    text = path.read_text()
    if path.suffix in (".yaml", ".yml"):
        import yaml

        found = yaml.safe_load(text)
    else:
        found = json.loads(text)
    if not isinstance(found, dict):
        raise ValueError(f"import_cache: {path} must hold a mapping, got {found!r:.80}.")
    return found


class _Reader:
    """The records of a source as (tokens, ids, log-probs), those without any counted."""

    def __init__(
        self,
        source: str | os.PathLike[str],
        layout: str,
        live_vocab: int,
        compression: Mapping[str, Any] | None,
    ) -> None:
        self.source, self.layout = source, layout
        self.read = reader_of(layout, live_vocab, compression)
        self.number, self.left_out, self.seen = 0, Counter[str](), ""

    def __iter__(self) -> Iterator[Item]:
        self.number, self.left_out = 0, Counter()
        for number, record in enumerate(records(self.source)):
            where = f"import_cache: record {number} of {self.source}"
            self.number = number + 1
            if not isinstance(record, Mapping):
                raise ValueError(f"{where} must be an object, got {record!r:.100}.")
            self.seen = self.seen or f"The first has {', '.join(sorted(map(str, record)))[:200]}. "
            try:
                item = self.read(record)
            except (KeyError, TypeError, IndexError, AttributeError) as error:
                raise ValueError(
                    f"{where} must have {self.layout}'s columns, got {sorted(map(str, record))} "
                    f"({error!r:.200})."
                ) from error
            except ValueError as error:
                raise ValueError(f"{where}: {error}") from error
            if item is None:
                self.left_out["records_without_logprobs"] += 1
            else:
                yield item


def _counted(reasons: Mapping[str, int]) -> str:
    return ", ".join(f"{n} {reason}" for reason, n in reasons.items()) or "an empty source"


def reader_of(layout: str, live_vocab: int, compression: Mapping[str, Any] | None) -> Any:
    """The function that turns one record into (tokens, ids, log-probs), or None."""
    if layout == "logprobs":
        return functools.partial(from_logprobs, live_vocab=live_vocab)
    if layout == "axolotl":
        return from_axolotl
    from kd.teachers.distillkit import Packed

    if compression is None:
        raise ValueError(
            "import_cache: compression must be given for layout 'distillkit', got None. Its files "
            "do not hold it: pass the compressor's configuration from the YAML they were made with."
        )
    return Packed(compression, live_vocab).read


# --- Axolotl --------------------------------------------------------------------------------------


def from_axolotl(record: Mapping[str, Any]) -> Item | None:
    """Axolotl's columns: rows of the distribution of token t, on the completion or on all tokens.

    Fewer rows than tokens are the last tokens' (its own convention); rows before are empty.
    """
    tokens = token_array(record["input_ids"], "from_axolotl")
    if record.get("target_token_ids") is not None:
        listed = record["target_token_ids"]
        pairs = zip(listed, record["target_logprobs"], strict=True)
        rows = [_row(n, ids, values) for n, (ids, values) in enumerate(pairs)]
        mask = record.get("target_mask")
        if mask is not None:
            flags = [bool(np.any(flag)) for flag in mask]
            rows = [row if flag else {} for row, flag in zip(rows, flags, strict=True)]
    else:
        listed = next((record[n] for n in ("logprobs", "llm_text_generation_vllm_logprobs")
                       if record.get(n)), None)  # fmt: skip
        if not listed:
            return None
        rows = [
            _row(n, [_named(n, e["token"]) for e in row or []], [e["logprob"] for e in row or []])
            for n, row in enumerate(listed)
        ]
    if not any(rows):
        return None
    if len(rows) > len(tokens):
        raise ValueError(
            f"a record must have at most one row a token ({len(tokens)}), got {len(rows)}. "
            "Its rows cannot be aligned with its tokens."
        )
    empty: list[dict[int, float]] = [{}] * (len(tokens) - len(rows))
    return (tokens, *table([*empty, *rows][1:] + [{}]))


def _named(number: int, token: Any) -> int:
    """The id in ``token_id:7``: a bare ``7`` is the text of some other token."""
    digits = token.removeprefix(TOKEN_ID) if isinstance(token, str) else ""
    if not str(token).startswith(TOKEN_ID) or not (digits.isascii() and digits.isdigit()):
        raise ValueError(
            f"row {number}: tokens must be named '{TOKEN_ID}N' with N a token id, got "
            f"{token!r:.100}. Texts of tokens are ambiguous: capture them with "
            "return_tokens_as_token_ids."
        )
    return int(digits)


def _row(number: int, ids: Any, logprobs: Any) -> dict[int, float]:
    """One row's ids and log-probs, checked; slots without an id are empty."""
    row: dict[int, float] = {}
    for i, value in zip(ids, logprobs, strict=True):
        if i is None:
            continue
        if isinstance(i, bool) or not isinstance(i, (int, np.integer)):
            raise ValueError(f"row {number}: token ids must be integers, got {i!r:.100}.")
        if isinstance(value, bool) or not isinstance(value, (int, float, np.number)):
            raise ValueError(f"row {number}: log-probs must be numbers, got {value!r:.100}.")
        if not value <= TOLERANCE:  # NaN included
            raise ValueError(f"row {number}: the log-prob of {i} must be at most 0, got {value}.")
        if int(i) in row:
            raise ValueError(f"row {number}: token ids must be different, got {i} twice.")
        row[int(i)] = min(float(value), 0.0)
    return row


def likeliest(
    ids: NDArray[np.int64], logprobs: NDArray[np.float32], k: int
) -> tuple[NDArray[np.int64], NDArray[np.float32]]:
    """The k likeliest entries of each row."""
    if ids.shape[1] <= k:
        return ids, logprobs
    order = np.argsort(-np.where(ids < 0, -np.inf, logprobs), axis=1, kind="stable")[:, :k]
    return np.take_along_axis(ids, order, 1), np.take_along_axis(logprobs, order, 1)
