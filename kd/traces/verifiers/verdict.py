"""What a verifier says about one trace: its status, why, and how long it took."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

from kd.traces.trace import Trace

CORRECT, WRONG, UNKNOWN, ERROR = "correct", "wrong", "unknown", "error"
STATUSES = (CORRECT, WRONG, UNKNOWN, ERROR)


@dataclass(frozen=True)
class Verdict:
    """A verifier's answer.

    Attributes:
        status: "correct"; "wrong"; "unknown" (nothing to compare, or it could not be decided);
            "error" (the verifier or its sandbox failed: this says nothing about the trace).
        reason: a short fixed phrase, such as "no reference" or "tests failed".
        seconds: how long the verifier worked.
        detail: what was special here (the values compared, the first failing test, ...).
        extra: figures for the record, such as tests passed.
    """

    status: str
    reason: str = ""
    seconds: float = 0.0
    detail: str = ""
    extra: Mapping[str, Any] = field(default_factory=dict, hash=False)

    def __post_init__(self) -> None:
        if self.status not in STATUSES:
            raise ValueError(
                f"Verdict: status must be one of {', '.join(STATUSES)}, got {self.status!r}."
            )

    @property
    def correct(self) -> bool:
        return self.status == CORRECT

    def label(self) -> str:
        """Status and reason in one phrase, as drops are counted by it."""
        return f"{self.status}: {self.reason}" if self.reason else self.status

    def to_dict(self) -> dict[str, Any]:
        plain = {"status": self.status, "reason": self.reason, "seconds": round(self.seconds, 4)}
        if self.detail:
            plain["detail"] = self.detail[:500]
        return plain | ({"extra": dict(self.extra)} if self.extra else {})

    @classmethod
    def from_dict(cls, record: Mapping[str, Any]) -> Verdict:
        """Read what ``to_dict`` made."""
        known = ("status", "reason", "seconds", "detail", "extra")
        return cls(**{key: record[key] for key in known if key in record})


Verifier = Callable[[Trace], Verdict]
