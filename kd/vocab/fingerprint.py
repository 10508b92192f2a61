"""What a tokenizer does, as a few hashes: a vocabulary's hash alone is not enough.

Two tokenizers of one vocabulary can still cut a text differently (another pre-tokenizer), give
special tokens other meanings, or render a chat differently. The fingerprint therefore covers the
vocabulary, the whole pipeline, the special tokens, the chat template and the ids of fixed texts.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping
from typing import Any

# Texts on which tokenizers are known to part: digits, spaces, line ends, case, scripts, controls.
PROBES = (
    "The capital of France is Paris.",
    "12345 + 67890 = 80235; 3.14159; 1,000,000",
    "a  12\n\n 7\t end \r\n",
    "def f(x):\n    return x ** 2  # square\n",
    "naïve café ﬁancé İstanbul 北京 Привет 🙂👍🏽",
    "<think>\nWait, I'll re-check.\n</think>\n\n\\boxed{42}",
    "<|im_start|>user<|im_end|><|endoftext|>",
    "don't DON'T it's we'll $x_1^{2}$ \\frac{a}{b}",
)


def tokenizer_fingerprint(tokenizer: Any) -> dict[str, Any]:
    """A JSON description of a tokenizer by which two can be compared.

    Args:
        tokenizer: a transformers tokenizer, fast or slow, or anything with ``get_vocab()`` and
            ``encode(text)`` or ``__call__(text)``.

    Returns:
        {"fingerprint": hash of the rest, "size", "vocab", "pipeline", "special", "template",
        "probes"}; hashes are 16 hex digits, ``special`` maps roles to ids, ``probes`` holds the
        hash of each probe text's ids.
    """
    vocabulary = {str(token): int(i) for token, i in tokenizer.get_vocab().items()}
    found: dict[str, Any] = {
        "size": len(tokenizer) if hasattr(tokenizer, "__len__") else len(vocabulary),
        "vocab": _hash(sorted(vocabulary.items(), key=lambda item: (item[1], item[0]))),
        "pipeline": _hash(_pipeline(tokenizer)),
        "special": _special(tokenizer),
        "template": _hash(getattr(tokenizer, "chat_template", None)),
        "probes": [_hash(probe_ids(tokenizer, text)) for text in PROBES],
    }
    return {"fingerprint": _hash(found), **found}


def byte_letters() -> list[str]:
    """The letter that byte-level tokenizers write for each of the 256 bytes."""
    plain = {*range(33, 127), *range(161, 173), *range(174, 256)}
    others = iter(range(256, 512))
    return [chr(byte) if byte in plain else chr(next(others)) for byte in range(256)]


def added_tokens(tokenizer: Any) -> dict[int, str]:
    """The added tokens of a tokenizer by their ids, special or not."""
    found = getattr(tokenizer, "added_tokens_decoder", None) or {}
    return {int(i): str(getattr(token, "content", token)) for i, token in found.items()}


def probe_ids(tokenizer: Any, text: str) -> list[int]:
    """A text's ids without the special tokens that a tokenizer adds around it."""
    try:
        found = _encode(tokenizer, text)
    except Exception as error:  # a text outside a small vocabulary
        return [-1, len(type(error).__name__)]
    if isinstance(found, Mapping):
        found = found["input_ids"]
    return [int(i) for i in getattr(found, "ids", found)]


def _encode(tokenizer: Any, text: str) -> Any:
    if not hasattr(tokenizer, "encode"):
        return tokenizer(text)
    try:
        return tokenizer.encode(text, add_special_tokens=False)
    except TypeError:  # an encode of one's own, without that option
        return tokenizer.encode(text)


def fingerprint_differences(left: Mapping[str, Any], right: Mapping[str, Any]) -> list[str]:
    """What differs between two fingerprints, in words; the first differing probe is shown."""
    words = []
    for name in ("size", "vocab", "pipeline", "template"):
        if left.get(name) != right.get(name):
            words.append(f"{name}: {left.get(name)} and {right.get(name)}")
    roles = set(left.get("special", {})) | set(right.get("special", {}))
    for role in sorted(roles):
        a, b = left.get("special", {}).get(role), right.get("special", {}).get(role)
        if a != b:
            words.append(f"special token {role}: id {a} and {b}")
    pairs = zip(PROBES, left.get("probes", []), right.get("probes", []), strict=False)
    for text, a, b in pairs:
        if a != b:
            words.append(f"the text {text!r} is tokenised differently")
            break
    return words


def _pipeline(tokenizer: Any) -> Any:
    """Everything of a fast tokenizer but its vocabulary and its padding and truncation."""
    backend = getattr(tokenizer, "backend_tokenizer", None)
    if backend is None:
        added = getattr(tokenizer, "added_tokens_decoder", {})
        return [type(tokenizer).__name__, sorted((int(i), str(t)) for i, t in added.items())]
    described = json.loads(backend.to_str())
    described.pop("padding", None)
    described.pop("truncation", None)
    model = described.get("model", {})
    if isinstance(model, dict):
        model.pop("vocab", None)
        model["merges"] = _hash(model.get("merges"))
    return described


def _special(tokenizer: Any) -> dict[str, int]:
    """Special tokens by role, and the others by their text, with their ids."""
    found: dict[str, int] = {}
    for role in ("bos", "eos", "pad", "unk"):
        if (number := getattr(tokenizer, f"{role}_token_id", None)) is not None:
            found[role] = int(number)
    return found | {token: i for i, token in added_tokens(tokenizer).items()}


def _hash(value: Any) -> str:
    text = json.dumps(value, sort_keys=True, ensure_ascii=True, default=str)
    return hashlib.sha256(text.encode()).hexdigest()[:16]
