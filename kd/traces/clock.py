"""The one day that chat templates are told, whenever they ask."""

from __future__ import annotations

import datetime

DATE = "2026-01-01"  # what a template that asks for today's date is told
_CODES = (
    "%d %e %b %B %m %y %Y %a %A %w %u %j %H %I %p %M %S %f %Z %z %U %W %V %G %x %X %c %D %F %T "
    "%-d %-m %-H %-I %-M %-S %-j"
).split()


def clock(date: str) -> str:
    """A macro in place of ``strftime_now``: transformers passes no functions to templates."""
    try:
        day = datetime.datetime.strptime(date, "%Y-%m-%d")
    except (TypeError, ValueError):
        raise ValueError(f"Renderer: date must be a day like 2026-01-31, got {date!r}.") from None
    codes = "".join(f"|replace('{code}', '{day.strftime(code)}')" for code in _CODES)
    # The end of the line is the template's own first line's start: Jinja trims it.
    return "{% macro strftime_now(format) %}{{ format" + codes + " }}{% endmacro %}\n"
