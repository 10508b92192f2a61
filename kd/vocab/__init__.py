"""The vocabulary contract between a teacher and a student: what a token id means to each."""

from __future__ import annotations

import importlib
from typing import Any

# Public name -> the module that has it; loaded on first use.
_HOMES = {
    "Aligner": "kd.vocab.alignment",
    "R1_TO_QWEN": "kd.vocab.contract",
    "VocabularyContract": "kd.vocab.contract",
    "VocabularyDiff": "kd.vocab.contract",
    "check_width": "kd.vocab.contract",
    "live_vocab": "kd.vocab.contract",
    "place_rows": "kd.vocab.alignment",
    "qwen_tokenizer": "kd.vocab.qwen",
    "vocabulary_contract": "kd.vocab.contract",
    "vocabulary_diff": "kd.vocab.contract",
    "fingerprint_differences": "kd.vocab.fingerprint",
    "tokenizer_fingerprint": "kd.vocab.fingerprint",
}

__all__ = sorted(_HOMES)


def __getattr__(name: str) -> Any:
    if name in _HOMES:
        return getattr(importlib.import_module(_HOMES[name]), name)
    raise AttributeError(f"module 'kd.vocab' has no attribute {name!r}")


def __dir__() -> list[str]:
    return sorted([*globals(), *_HOMES])
