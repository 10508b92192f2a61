"""Plain text: from files, from Python's own documentation, and as blocks of tokens."""

from __future__ import annotations

import importlib.util
import json
import random
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor


def documents(path: Path) -> list[str]:
    """Texts in a fixed random order; an empty path takes Python's documentation.

    Raises:
        ValueError: there is nothing to read, or a line of a .jsonl has no "text".
    """
    if path == Path():
        from pydoc_data.topics import topics

        found = [text for _, text in sorted(topics.items())]
    elif path.is_dir():
        found = [file.read_text(encoding="utf-8") for file in sorted(path.rglob("*.txt"))]
    elif path.suffix == ".jsonl":
        found = [_text(line, path) for line in path.read_text(encoding="utf-8").splitlines()]
    elif path.is_file():
        found = [path.read_text(encoding="utf-8")]
    else:
        raise ValueError(
            f"documents: text must be a file or a folder, got {path}, which is missing."
        )
    found = [text for text in found if text.strip()]
    if not found:
        raise ValueError(
            f"documents: text must hold some text, got none in {path}. Look for *.txt."
        )
    random.Random(0).shuffle(found)
    return found


def _text(line: str, path: Path) -> str:
    if not line.strip():
        return ""
    try:
        return str(json.loads(line)["text"])
    except (ValueError, KeyError, TypeError):
        raise ValueError(
            f'documents: every line must be an object with "text", got {line[:60]!r} in {path}.'
        ) from None


def story() -> list[str]:
    """The Gutenberg story that comes with reasoning-gym; empty when that is not installed."""
    found = importlib.util.find_spec("reasoning_gym")
    if found is None or found.origin is None:
        return []
    file = Path(found.origin).parent / "data" / "in_the_year_2889.txt"
    return [file.read_text(encoding="utf-8")] if file.is_file() else []


def blocks(tokenizer: Any, texts: Sequence[str], length: int) -> Tensor:
    """The texts behind each other, cut into rows [N, length]; the rest is left out."""
    end = [tokenizer.eos_token_id] if tokenizer.eos_token_id is not None else []
    ids: list[int] = []
    for text in texts:
        ids += tokenizer(text, add_special_tokens=False, verbose=False).input_ids + end
    count = len(ids) // length
    return torch.tensor(ids[: count * length], dtype=torch.long).view(count, length)
