"""Rows of a server's answer: id -> log-prob, believed only where they can be."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping
from typing import Any

import numpy as np
from numpy.typing import NDArray

from kd.cache.keys import token_array

TOLERANCE = 1e-3  # rounding by which a log-probability, or a row's log-mass, may exceed 0
Item = tuple[NDArray[np.int32], NDArray[np.int64], NDArray[np.float32]]
"""Tokens [L], ids [L, K] and log-probs [L, K]."""


def from_logprobs(record: Mapping[str, Any], live_vocab: int | None = None) -> Item | None:
    """A vLLM or OpenAI response with prompt_logprobs; None when it holds none.

    Understands ``prompt_token_ids`` beside ``prompt_logprobs``, at the top or in ``choices[0]``,
    and a batch's output lines, which hold the answer in ``response.body``. Each element of
    prompt_logprobs is null (the first) or {"token id": {"logprob": x, ...}}.
    """
    response = record.get("response")
    if isinstance(response, Mapping) and "body" in response:
        record = response["body"] or {}
    choice = (record.get("choices") or [{}])[0]
    found = record.get("prompt_logprobs") or choice.get("prompt_logprobs")
    if not found:
        return None
    tokens = record.get("prompt_token_ids") or choice.get("prompt_token_ids")
    if tokens is None:
        tokens = record["input_ids"]
    return prompt_rows(tokens, found, live_vocab)


def prompt_rows(input_ids: Any, prompt_logprobs: Any, live_vocab: int | None = None) -> Item:
    """Rows from a server's prompt_logprobs: element i + 1 becomes row i, the last row is empty."""
    tokens = token_array(input_ids, "prompt_rows")
    if len(prompt_logprobs) != len(tokens):
        raise ValueError(
            f"prompt_logprobs must have one element a token ({len(tokens)}), got "
            f"{len(prompt_logprobs)}. The server cut the prompt, or tokenised it again: send token "
            "ids, not text."
        )
    rows = []
    for number, following in enumerate(tokens[1:].tolist()):
        try:
            rows.append(checked_row(prompt_logprobs[number + 1], following, None, live_vocab))
        except ValueError as error:
            raise ValueError(f"row {number}: {error}") from None
    return (tokens, *table([*rows, {}]))


def checked_row(
    element: Any, following: int, top_k: int | None, live_vocab: int | None = None, prefix: str = ""
) -> dict[int, float]:
    """One element of a server's answer as id -> log-prob, or a ValueError with what is wrong.

    Args:
        element: {"token id": log-prob}, or {"token id": {"logprob": log-prob, ...}}.
        following: the prompt's token that this row is the distribution of. Servers always return
            it, whatever its rank: its absence shows a row of another position or another text.
        top_k: tokens asked for; None is unknown.
        live_vocab: the teacher's tokens; None is unknown.
        prefix: of the ids' names.
    """
    if not isinstance(element, Mapping):
        raise ValueError(f"it must be a mapping of token ids to log-probs, got {element!r:.100}.")
    live_vocab = live_vocab or 1 << 31
    row: dict[int, float] = {}
    for name, value in element.items():
        number = name[len(prefix) :] if name.startswith(prefix) else ""
        # int() would also take " 7", "0_7" and digits of other scripts.
        if not (number.isascii() and number.isdigit()) or str(int(number)) != number:
            fix = "The server ignores return_tokens_as_token_ids: use mode='prompt_logprobs'."
            raise ValueError(
                f"tokens must be named '{prefix}N' with N a token id, got {name!r:.100}. "
                f"{fix if prefix else 'Names of tokens are ambiguous.'}"
            )
        logprob = value.get("logprob") if isinstance(value, Mapping) else value
        if isinstance(logprob, bool) or not isinstance(logprob, (int, float)):
            raise ValueError(f"the log-prob of {number} must be a number, got {logprob!r:.100}.")
        if not logprob <= TOLERANCE:  # NaN included
            raise ValueError(f"the log-prob of {number} must be at most 0, got {logprob}.")
        if logprob < -3e38:  # probability 0, beyond float32
            continue
        if int(number) >= live_vocab:
            raise ValueError(
                f"token ids must be below live_vocab ({live_vocab}), got {number}. Is this the "
                "tokenizer's own teacher?"
            )
        row[int(number)] = min(float(logprob), 0.0)
    if following not in row:
        raise ValueError(
            f"the log-probs must include the prompt's own next token, {following}, got "
            f"{sorted(row)[:6]}. The rows are of another position, or of another text."
        )
    if top_k is not None and len(row) > top_k + 1:
        raise ValueError(f"it must hold at most {top_k + 1} tokens, got {len(row)}.")
    mass = math.fsum(math.exp(logprob) for logprob in row.values())
    if mass > math.exp(TOLERANCE):
        raise ValueError(f"its probabilities must be at most 1 in sum, got {mass:.6g}.")
    return row


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
