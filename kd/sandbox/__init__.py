"""Runs one program nobody has read, with limits, and says what came of it.

Example:
    >>> from kd.sandbox import Bubblewrap, Limits
    >>> run = Bubblewrap(Limits(seconds=2.0))("print(input() * 2)", "ab")    # doctest: +SKIP
    >>> run.status, run.code, run.stdout                                      # doctest: +SKIP
    ('done', 0, 'abab\\n')
"""

from kd.sandbox.bubblewrap import Bubblewrap
from kd.sandbox.hostile import HOSTILE, Hostile, table
from kd.sandbox.runs import Limits, Run, SandboxClosed
from kd.sandbox.unsafe import UnsafeSubprocess

__all__ = [
    "HOSTILE",
    "Bubblewrap",
    "Hostile",
    "Limits",
    "Run",
    "SandboxClosed",
    "UnsafeSubprocess",
    "table",
]
