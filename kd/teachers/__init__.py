"""Where teacher targets come from: a local model, one behind a server, another tool's files."""

from __future__ import annotations

import importlib
from typing import Any

# Public name -> the module that has it; loaded on first use.
_HOMES = {
    "Selection": "kd.teachers.selection",
    "ServerTeacher": "kd.teachers.server",
    "build_cache": "kd.teachers.build",
    "build_cache_from_server": "kd.teachers.build_served",
    "build_hidden_cache": "kd.teachers.hidden",
    "cache_meta": "kd.teachers.build",
    "diagnose": "kd.teachers.doctor",
    "import_cache": "kd.teachers.importers",
    "load_teacher": "kd.teachers.identity",
    "teacher_identity": "kd.teachers.identity",
    "translate_cache": "kd.teachers.translate",
}

__all__ = sorted(_HOMES)


def __getattr__(name: str) -> Any:
    if name in _HOMES:
        return getattr(importlib.import_module(_HOMES[name]), name)
    raise AttributeError(f"module 'kd.teachers' has no attribute {name!r}")


def __dir__() -> list[str]:
    return sorted([*globals(), *_HOMES])
