"""A teacher behind an OpenAI-compatible server (vLLM, SGLang, ...): prompt log-probs into a cache.

A server scores a prompt that is sent as token ids. It returns the likeliest tokens at every
position but the first, at temperature 1, and the prompt's own token where that is not among them.
It is not believed: every row is checked before it is stored.
"""

from __future__ import annotations

import threading
import time
from dataclasses import KW_ONLY, dataclass, field
from typing import Any

import numpy as np
from numpy.typing import NDArray

from kd.serving import Endpoint
from kd.teachers.server_rows import Item, checked_row, table

MODES = ("prompt_logprobs", "echo")
MAX_TOP_K = 1024
MAX_RESPONSE = 1 << 30
ENTRY_BYTES = 256  # of JSON for one token of one row, with its text; vLLM's have about 90


class _Turns:
    """Spaces requests evenly."""

    def __init__(self) -> None:
        self.next, self.guard = 0.0, threading.Lock()

    def wait(self, gap: float) -> None:
        with self.guard:
            now = time.monotonic()
            turn = max(now, self.next)
            self.next = turn + gap
        time.sleep(turn - now)


@dataclass(frozen=True, repr=False)
class ServerTeacher(Endpoint):
    """A completions endpoint that scores prompts; the other fields are ``kd.serving.Endpoint``'s.

    Attributes:
        top_k: tokens asked for at each position; the server's own limit is --max-logprobs.
        mode: "prompt_logprobs" (vLLM), or "echo" (logprobs of an echoed prompt, with
            return_tokens_as_token_ids).
        requests_per_minute: None is no limit.
    """

    top_k: int = 20
    mode: str = "prompt_logprobs"
    _: KW_ONLY
    requests_per_minute: float | None = None
    _turns: _Turns = field(default_factory=_Turns, init=False, repr=False, compare=False)

    def __post_init__(self) -> None:
        super().__post_init__()
        if not 1 <= self.top_k <= MAX_TOP_K:
            raise ValueError(
                f"ServerTeacher: top_k must be from 1 to {MAX_TOP_K}, got {self.top_k}. A "
                "server's memory and time grow with it."
            )
        if self.mode not in MODES:
            raise ValueError(
                f"ServerTeacher: mode must be one of {', '.join(MODES)}, got {self.mode!r}."
            )
        if self.requests_per_minute is not None and not self.requests_per_minute > 0:
            raise ValueError(
                "ServerTeacher: requests_per_minute must be above 0, got "
                f"{self.requests_per_minute}. Use None for no limit."
            )

    def score(self, tokens: NDArray[np.int32], live_vocab: int | None = None) -> Item:
        """A sequence's (tokens, ids [L, K], log-probs [L, K]); the last row is empty.

        Args:
            tokens: [L] token ids.
            live_vocab: ids at or past it are refused; not checked when None.

        Raises:
            kd.serving.ServerError: when the server refuses for good, or still refuses after the
                retries. It is an OSError.
            ValueError: when its answer does not fit the sequence; names the row.
        """
        prompt = [int(token) for token in tokens]
        asked: dict[str, Any] = {"extra_body": {"prompt_logprobs": self.top_k}}
        if self.mode == "echo":
            beyond = {"return_tokens_as_token_ids": True}
            asked = {"echo": True, "logprobs": self.top_k, "extra_body": beyond}

        def call(client: Any) -> Any:
            return client.completions.with_raw_response.create(
                model=self.model, prompt=prompt, max_tokens=1, **asked
            )

        # One row more than tokens, for the token that is generated.
        limit = (1 << 16) + (len(prompt) + 1) * (self.top_k + 2) * ENTRY_BYTES
        answer, _ = self.ask(
            call, min(limit, MAX_RESPONSE), lambda found: found, self._wait_for_turn
        )
        try:
            return (tokens, *table(self._rows(prompt, answer, live_vocab)))
        except ValueError as error:
            problem = self.redact(str(error))
        raise ValueError(problem)

    def _rows(self, prompt: list[int], answer: Any, live: int | None) -> list[dict[int, float]]:
        """Row i is for the token after token i; the last is empty."""
        choices = answer.get("choices") if isinstance(answer, dict) else None
        choice = choices[0] if isinstance(choices, list) and choices else None
        if not isinstance(choice, dict):
            raise ValueError(
                f"ServerTeacher: the answer must hold choices, got {str(answer)[:200]!r}."
            )
        found = choice.get("prompt_logprobs")
        prefix = ""
        if self.mode == "echo":
            said = choice.get("logprobs")
            found = said.get("top_logprobs") if isinstance(said, dict) else None
            found = found[: len(prompt)] if isinstance(found, list) else None
            prefix = "token_id:"
        if not isinstance(found, list) or not found:
            raise ValueError(
                f"ServerTeacher: the answer must hold {self.mode}, got none for a prompt of "
                f"{len(prompt)} tokens. Does the server of {self.model!r} support it?"
            )
        if choice.get("prompt_token_ids") not in (None, prompt):
            raise ValueError(
                "ServerTeacher: the answer's prompt_token_ids must equal the prompt, got "
                f"{str(choice['prompt_token_ids'])[:100]}. It is of another sequence."
            )
        if len(found) != len(prompt):
            raise ValueError(
                f"ServerTeacher: {self.mode} must have one element a token ({len(prompt)}), got "
                f"{len(found)}. The server cut the prompt, or tokenised it again."
            )
        rows = []
        for number, following in enumerate(prompt[1:]):
            try:
                rows.append(checked_row(found[number + 1], following, self.top_k, live, prefix))
            except ValueError as error:
                raise ValueError(f"ServerTeacher: row {number}: {error}") from None
        return [*rows, {}]

    def _wait_for_turn(self) -> None:
        if self.requests_per_minute is not None:
            self._turns.wait(60 / self.requests_per_minute)
