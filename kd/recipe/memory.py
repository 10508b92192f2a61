"""How much memory this machine has."""

from __future__ import annotations

import os


def total_memory() -> float:
    """GiB of main memory; 0 where it cannot be told."""
    if hasattr(os, "sysconf") and "SC_PHYS_PAGES" in os.sysconf_names:
        return os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE") / 2**30
    return 0.0
