"""What a cache says about itself, and how two such statements are compared."""

from __future__ import annotations

import dataclasses
import hashlib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from kd.files import canonical_json

# What the probability outside the stored tokens means, for each selection (see kd.TopK).
TAIL_OF = {
    "top_k": "bucket",
    "top_p": "bucket",
    "sampled": "drop",
    "hybrid": "drop",
    "hidden": "none",
}
CODEC_NAMES = ("float32", "log8", "compact", "counts", "hidden_bf16", "hidden_fp8")
MAX_VOCAB = 2**25
MAX_TAILS = 16
# Of each kind of field: what it is called, and what it may be.
KINDS: dict[str, tuple[str, Any]] = {
    "teacher tokenizer selection_options codec_options": ("a mapping", Mapping),
    "live_vocab padded_vocab top_k": ("an integer", int),
    "temperature": ("a number", (int, float)),
    "selection codec": ("text", str),
    "tail_temperatures": ("a list of numbers", Sequence),
    "realised": ("True or False", bool),
}


@dataclass(frozen=True)
class CacheMeta:
    """The identity of a cache: equal for every shard in it, and compared, never retyped.

    Attributes:
        teacher: {id, revision, config_hash, weights_hash, dtype, ...} of the teacher.
        tokenizer: what ``kd.vocab.tokenizer_fingerprint`` returns, or {} when unknown.
        live_vocab: number of real tokens; every stored id is below it.
        padded_vocab: rows of the teacher's lm_head; probabilities are over the live ones.
        temperature: the teacher's logits were divided by it before the softmax.
        top_k: the most tokens a row holds.
        selection: "top_k", "top_p", "sampled" or "hybrid".
        codec: how the rows are stored: "float32" (lossless), "log8", "compact" or "counts".
        selection_options: {"top_p": ...}, {"draws": ..., "seed": ...} and the like.
        codec_options: settings of the codec that differ from its defaults.
        tail_temperatures: where the tail's log-partition is stored, for losses at another
            temperature; selections "top_k" and "top_p" alone. Empty: it is not.
        realised: whether every row has the log-probability of the token that followed it.
    """

    teacher: Mapping[str, Any]
    tokenizer: Mapping[str, Any]
    live_vocab: int
    padded_vocab: int
    temperature: float = 1.0
    top_k: int = 32
    selection: str = "top_k"
    codec: str = "float32"
    selection_options: Mapping[str, Any] = field(default_factory=dict)
    codec_options: Mapping[str, Any] = field(default_factory=dict)
    tail_temperatures: Sequence[float] = ()
    realised: bool = False

    def __post_init__(self) -> None:
        for names, (words, kind) in KINDS.items():
            for name in names.split():
                value = getattr(self, name)
                if not isinstance(value, kind) or (value is True and kind is not bool):
                    raise TypeError(f"CacheMeta: {name} must be {words}, got {value!r:.100}.")
        stored = tuple(self.tail_temperatures)
        numbers = all(type(t) in (int, float) and 0 < t < float("inf") for t in stored)
        bucket, hidden = TAIL_OF.get(self.selection) == "bucket", self.codec.startswith("hidden")
        padded, live = self.padded_vocab, self.live_vocab
        for holds, name, rule in (
            (
                1 <= live <= padded,
                "live_vocab",
                f"from 1 to padded_vocab ({padded}), the tokenizer's length with special tokens",
            ),
            (padded <= MAX_VOCAB, "padded_vocab", f"at most {MAX_VOCAB:,} (ids of 25 bits)"),
            (
                1 <= self.top_k <= live,
                "top_k",
                f"from 1 to live_vocab ({live}), the teacher's tokens",
            ),
            (0 < self.temperature < float("inf"), "temperature", "finite and above 0"),
            (self.selection in TAIL_OF, "selection", f"one of {', '.join(TAIL_OF)}"),
            (self.codec in CODEC_NAMES, "codec", f"one of {', '.join(CODEC_NAMES)}"),
            (
                numbers and len(set(stored)) == len(stored),
                "tail_temperatures",
                "different numbers above 0",
            ),
            (len(stored) <= MAX_TAILS, "tail_temperatures", f"at most {MAX_TAILS} temperatures"),
            (
                not stored or bucket,
                "tail_temperatures",
                f"left out for selection {self.selection!r}, which has no tail",
            ),
            (
                hidden == self.hidden,
                "codec",
                f"a hidden_ one exactly for selection 'hidden' (it is {self.selection!r})",
            ),
            (
                not (self.realised and self.hidden),
                "realised",
                "False for selection 'hidden', whose states give it",
            ),
        ):
            if not holds:
                got = f"{getattr(self, name)!r:.100}"
                raise ValueError(f"CacheMeta: {name} must be {rule}, got {got}.")
        object.__setattr__(self, "tail_temperatures", tuple(map(float, stored)))

    @property
    def hidden(self) -> bool:
        """Whether rows are hidden states."""
        return self.selection == "hidden"

    @property
    def tail(self) -> str:
        """The mode in which ``kd.TopK`` has to read the rows."""
        return TAIL_OF[self.selection]

    def to_dict(self) -> dict[str, Any]:
        found = {item.name: getattr(self, item.name) for item in dataclasses.fields(self)}
        found["tail_temperatures"] = list(self.tail_temperatures)
        for name in ("tail_temperatures", "realised"):  # as in caches older than these fields
            if not found[name]:
                del found[name]
        return {
            name: dict(value) if isinstance(value, Mapping) else value
            for name, value in found.items()
        }

    @classmethod
    def from_dict(cls, values: Mapping[str, Any]) -> CacheMeta:
        known = {item.name for item in dataclasses.fields(cls)}
        unknown = sorted(set(values) - known)
        if unknown:
            raise ValueError(
                f"CacheMeta: keys must be among {', '.join(sorted(known))}, got "
                f"{', '.join(unknown)}. A newer kd wrote this; update kd."
            )
        return cls(**values)

    @property
    def cache_id(self) -> str:
        """32 hex digits that name this identity; written into every shard."""
        return hashlib.sha256(canonical_json(self.to_dict())).hexdigest()[:32]


Differences = list[tuple[str, Any, Any]]


def differences(left: Any, right: Any, path: str = "") -> Differences:
    """Where two JSON values differ: (path, left, right), nested mappings entered."""
    if isinstance(left, Mapping) and isinstance(right, Mapping):
        found = []
        for name in sorted(set(left) | set(right)):
            inner = f"{path}.{name}" if path else str(name)
            found += differences(left.get(name, "(absent)"), right.get(name, "(absent)"), inner)
        return found
    return [] if left == right else [(path, left, right)]


def side_by_side(found: Differences, left: str, right: str) -> str:
    """The differences as lines ``field: left has X, right has Y``."""
    return "\n".join(f"  {name}: {left} has {a!r}, {right} has {b!r}" for name, a, b in found)


def unmet(cached: CacheMeta, expected: CacheMeta | Mapping[str, Any]) -> Differences:
    """What a reader expected of a cache and does not find: (field, cached, expected).

    A mapping is compared in the fields it names. A CacheMeta is compared in everything that
    changes what the rows mean: not the codec, nor the padding of the lm_head; a ``top_k`` below
    the cached one is met by keeping the likeliest tokens.
    """
    have = cached.to_dict()
    if isinstance(expected, CacheMeta):
        want = expected.to_dict()
        for name in ("codec", "codec_options", "padded_vocab"):
            want.pop(name)
    else:
        want = dict(expected)
    found: Differences = []
    for name, value in want.items():
        if name not in have:
            found.append((name, "(no such field)", value))
        elif name == "top_k":
            if value > have[name]:
                found.append((name, have[name], value))
        elif isinstance(value, Mapping):
            mine = {key: have[name].get(key, "(absent)") for key in value}
            found += differences(mine, value, name)
        else:
            found += differences(have[name], value, name)
    return found
