"""Other tools' log-probabilities as a cache: DistillKit parquet, vLLM / OpenAI JSONL, Axolotl.

Row i of a cache is the distribution for the token *after* token i. Servers and Axolotl store the
distribution *of* token i, so their rows move up by one, and the last row stays empty.
"""

from __future__ import annotations

import json
import os
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from kd.cache.keys import token_array
from kd.cache.meta import CacheMeta
from kd.cache.reader import TeacherCache
from kd.cache.writer import CacheWriter

LAYOUTS = ("distillkit", "logprobs", "axolotl")
Item = tuple[NDArray[np.int32], NDArray[np.int64], NDArray[np.float32]]


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
    compression: Mapping[str, Any] | None = None,
) -> TeacherCache:
    """Convert another tool's file into a cache; resumable like any capture.

    Args:
        source: a .parquet or .jsonl file, or a folder of them.
        path: folder of the new cache.
        layout: "distillkit" (its packed parquet), "logprobs" (vLLM or OpenAI responses, one JSON
            object a line) or "axolotl" (columns input_ids, target_token_ids, target_logprobs, or
            a column of {logprob, token: "token_id:N"} lists).
        live_vocab: the teacher's tokens; foreign files do not say.
        teacher: its name, for the record.
        temperature: the one the values were captured at.
        codec: how the rows are stored.
        top_k: the most tokens kept in a row, the likeliest; the widest row's when None.
        tokenizer: a fingerprint to record.
        compression: "distillkit" alone: the compressor's configuration (d, k, exact_k,
            exact_dtype, ...), as its YAML states it.

    Returns:
        The finished cache.
    """
    if layout not in LAYOUTS:
        raise ValueError(
            f"import_cache: layout must be one of {', '.join(LAYOUTS)}, got {layout!r}."
        )
    read = reader_of(layout, live_vocab, compression)
    widest = top_k or max(
        (item[1].shape[1] for item in map(read, records(source)) if item is not None), default=1
    )
    meta = CacheMeta(
        teacher={"id": teacher, "imported_from": layout},
        tokenizer=tokenizer or {},
        live_vocab=live_vocab,
        padded_vocab=live_vocab,
        temperature=temperature,
        top_k=min(widest, live_vocab),
        codec=codec,
    )
    with CacheWriter(path, meta) as writer:
        for number, record in enumerate(records(source)):
            try:
                item = read(record)
                if item is None:
                    writer.count("records_without_logprobs")
                elif item[0] not in writer:
                    writer.add(item[0], *likeliest(item[1], item[2], meta.top_k))
            except (KeyError, TypeError, IndexError) as error:
                raise ValueError(
                    f"import_cache: record {number} of {source} must have {layout}'s columns, got "
                    f"{sorted(record)} ({error!r})."
                ) from error
    return TeacherCache(path)


def reader_of(layout: str, live_vocab: int, compression: Mapping[str, Any] | None) -> Any:
    """The function that turns one record into (tokens, ids, log-probs), or None."""
    if layout == "logprobs":
        return from_logprobs
    if layout == "axolotl":
        return from_axolotl
    from kd.cache.distillkit import Packed

    if compression is None:
        raise ValueError(
            "import_cache: compression must be given for layout 'distillkit', got None. Its files "
            "do not hold it: pass the compressor's configuration from the YAML they were made with."
        )
    return Packed(compression, live_vocab).read


def records(source: str | os.PathLike[str]) -> Iterator[dict[str, Any]]:
    """The rows of a parquet or JSONL file, or of every such file in a folder, by name."""
    path = Path(source)
    if path.is_dir():
        for item in sorted(path.iterdir()):
            if item.suffix in (".parquet", ".jsonl"):
                yield from records(item)
    elif path.suffix == ".parquet":
        import pyarrow.parquet

        with pyarrow.parquet.ParquetFile(path) as file:
            for batch in file.iter_batches(batch_size=64):
                yield from batch.to_pylist()
    else:
        with open(path, encoding="utf-8") as lines:
            for number, line in enumerate(lines, 1):
                if line.strip():
                    try:
                        yield json.loads(line)
                    except ValueError as error:
                        raise ValueError(
                            f"import_cache: line {number} of {path} must be JSON, got {error}."
                        ) from None


# --- servers --------------------------------------------------------------------------------------


def from_logprobs(record: Mapping[str, Any]) -> Item | None:
    """A vLLM or OpenAI response with prompt_logprobs; None when it holds none.

    Understands ``prompt_token_ids`` beside ``prompt_logprobs``, at the top or in ``choices[0]``.
    Each element of prompt_logprobs is null (the first) or {"token id": {"logprob": x, ...}}.
    """
    choice = (record.get("choices") or [{}])[0]
    found = record.get("prompt_logprobs") or choice.get("prompt_logprobs")
    if not found:
        return None
    tokens = record.get("prompt_token_ids") or choice.get("prompt_token_ids")
    if tokens is None:
        tokens = record["input_ids"]
    return prompt_rows(tokens, found)


def prompt_rows(input_ids: Any, prompt_logprobs: Any) -> Item:
    """Rows from a server's prompt_logprobs: element i + 1 becomes row i, the last row is empty."""
    tokens = token_array(input_ids, "prompt_rows")
    if len(prompt_logprobs) != len(tokens):
        raise ValueError(
            f"prompt_rows: prompt_logprobs must have one element a token ({len(tokens)}), got "
            f"{len(prompt_logprobs)}. The server cut the prompt, or tokenised it again: send token "
            "ids, not text."
        )
    rows = []
    for element in prompt_logprobs[1:]:
        row = {}
        for token, value in (element or {}).items():
            logprob = value["logprob"] if isinstance(value, Mapping) else value
            row[int(token)] = min(float(logprob), 0.0)
        rows.append(row)
    return (tokens, *table([*rows, {}]))


def table(rows: Iterable[Mapping[int, float]]) -> tuple[NDArray[np.int64], NDArray[np.float32]]:
    """Mappings id -> log-prob as ids and log-probs [L, K], the likeliest first."""
    found = [sorted(row.items(), key=lambda item: (-item[1], item[0])) for row in rows]
    width = max(1, max(map(len, found), default=1))
    ids = np.full((len(found), width), -1, np.int64)
    logprobs = np.full((len(found), width), -np.inf, np.float32)
    for i, row in enumerate(found):
        if row:
            ids[i, : len(row)], logprobs[i, : len(row)] = zip(*row, strict=True)
    return ids, logprobs


# --- Axolotl --------------------------------------------------------------------------------------


def from_axolotl(record: Mapping[str, Any]) -> Item | None:
    """Axolotl's columns: rows of the distribution of token t, on the completion or on all tokens.

    Fewer rows than tokens are the last tokens' (its own convention); rows before are empty.
    """
    tokens = token_array(record["input_ids"], "from_axolotl")
    if record.get("target_token_ids") is not None:
        pairs = zip(record["target_token_ids"], record["target_logprobs"], strict=True)
        rows = [
            {int(i): min(float(v), 0.0) for i, v in zip(ids, values, strict=True) if i is not None}
            for ids, values in pairs
        ]
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
            {int(str(e["token"]).rpartition(":")[2]): min(float(e["logprob"]), 0.0)
             for e in row or []}
            for row in listed
        ]  # fmt: skip
    if len(rows) > len(tokens):
        raise ValueError(
            f"from_axolotl: a record must have at most one row a token ({len(tokens)}), got "
            f"{len(rows)}. Its rows cannot be aligned with its tokens."
        )
    empty: list[dict[int, float]] = [{}] * (len(tokens) - len(rows))
    return (tokens, *table([*empty, *rows][1:] + [{}]))


def likeliest(
    ids: NDArray[np.int64], logprobs: NDArray[np.float32], k: int
) -> tuple[NDArray[np.int64], NDArray[np.float32]]:
    """The k likeliest entries of each row."""
    if ids.shape[1] <= k:
        return ids, logprobs
    order = np.argsort(-np.where(ids < 0, -np.inf, logprobs), axis=1, kind="stable")[:, :k]
    return np.take_along_axis(ids, order, 1), np.take_along_axis(logprobs, order, 1)
