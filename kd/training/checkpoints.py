"""Checkpoints that are whole or not used: a completeness marker with digests, written last.

transformers writes straight into ``checkpoint-N`` and resumes from the highest N, torn or not.
``mark_complete`` puts ``COMPLETE.json`` (size and SHA-256 of every file) into a finished
checkpoint, and ``last_complete_checkpoint`` takes the newest one that still matches its marker.
"""

from __future__ import annotations

import hashlib
import json
import os
import re
import shutil
import warnings
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

from kd.files import write_whole

MARKER = "COMPLETE.json"


def _digest(path: Path) -> str:
    digest = hashlib.sha256()
    with path.open("rb") as file:
        while block := file.read(1 << 20):
            digest.update(block)
    return digest.hexdigest()


def _sync(path: Path) -> None:
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def _entry(path: Path) -> dict[str, int | str]:
    _sync(path)
    return {"bytes": path.stat().st_size, "sha256": _digest(path)}


def mark_complete(folder: str | Path) -> Path:
    """Flush every file of a checkpoint to disk, then write its marker atomically.

    Args:
        folder: a ``checkpoint-N`` folder nobody writes to any more.

    Returns:
        The marker's path.
    """
    folder = Path(folder)
    files = sorted(p for p in folder.rglob("*") if p.is_file() and p.name != MARKER)
    with ThreadPoolExecutor(8) as pool:  # hashing releases the interpreter
        entries = list(pool.map(_entry, files))
    names = [path.relative_to(folder).as_posix() for path in files]
    listing = dict(zip(names, entries, strict=True))
    marker = folder / MARKER
    text = json.dumps({"files": listing}, indent=1, sort_keys=True)
    write_whole(marker, text.encode())
    return marker


def problem_with(folder: str | Path) -> str | None:
    """Why a checkpoint must not be resumed from, or None when it is whole."""
    folder = Path(folder)
    marker = folder / MARKER
    if not marker.is_file():
        return f"has no {MARKER} (its writer was interrupted)"
    try:
        files = json.loads(marker.read_text())["files"]
        for name, wanted in files.items():
            path = folder / name
            if not path.is_file():
                return f"lacks {name}"
            size = path.stat().st_size
            if size != wanted["bytes"]:
                return f"has {size} bytes in {name} instead of {wanted['bytes']}"
            if _digest(path) != wanted["sha256"]:
                return f"has a damaged {name} (its SHA-256 differs)"
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        return f"has an unreadable {MARKER} ({error})"
    return None


def last_complete_checkpoint(output_dir: str | Path) -> Path | None:
    """The newest whole ``checkpoint-N`` under a folder; torn ones are skipped with a warning."""
    for path in reversed(checkpoints_in(output_dir)):
        why = problem_with(path)
        if why is None:
            return path
        warnings.warn(
            f"last_complete_checkpoint: {path.name} {why}; trying the one before it.", stacklevel=2
        )
    return None


def checkpoints_in(output_dir: str | Path) -> list[Path]:
    """All ``checkpoint-N`` folders, whole or not, the oldest first."""
    output_dir = Path(output_dir)
    if not output_dir.is_dir():
        return []
    found = [
        (int(match.group(1)), path)
        for path in output_dir.iterdir()
        if (match := re.fullmatch(r"checkpoint-(\d+)", path.name)) and path.is_dir()
    ]
    return [path for _, path in sorted(found)]


def keep_newest(output_dir: str | Path, limit: int | None, keep: str | Path | None = None) -> None:
    """Delete the oldest checkpoints beyond ``limit``; call it when the newest is marked."""
    if limit is None or limit < 1:
        return
    for path in checkpoints_in(output_dir)[:-limit]:
        if keep is None or path.resolve() != Path(keep).resolve():
            (path / MARKER).unlink(missing_ok=True)  # half deleted it is torn
            shutil.rmtree(path, ignore_errors=True)
