"""A plain subprocess with limits, for programs that need no sandbox."""

from __future__ import annotations

import json
import subprocess
import sys
import tempfile
from pathlib import Path

from kd.sandbox.runs import Limits, Run, supervise

# limits are set by the process itself: code between fork and exec may hang beside threads
_LAUNCH = """
import json, os, resource, sys
for kind, value in json.loads(sys.argv[1]).items():
    resource.setrlimit(getattr(resource, kind), (value, value))
os.execv(sys.executable, [sys.executable, "-I", "-X", "utf8", sys.argv[2]])
"""


class UnsafeSubprocess:
    """A plain subprocess with rlimits, for programs you trust as much as your own.

    There is NO isolation: it reads your files, uses your network, starts processes and runs as
    you. Of the limits it keeps ``seconds``, ``memory`` (of each process), ``disk`` (of each file)
    and ``output``; ``processes`` and ``files`` are not enforced.
    """

    def __init__(self, limits: Limits | None = None) -> None:
        self.limits = limits or Limits()

    def __repr__(self) -> str:
        return f"UnsafeSubprocess({self.limits})"

    def __call__(self, program: str, stdin: str = "") -> Run:
        """Run a Python program on an input."""
        kinds = {
            "RLIMIT_AS": self.limits.memory,
            "RLIMIT_CPU": int(self.limits.seconds) + 1,
            "RLIMIT_FSIZE": self.limits.disk,
            "RLIMIT_CORE": 0,
        }
        with tempfile.TemporaryDirectory() as folder:
            source = Path(folder) / "main.py"
            source.write_bytes(program.encode("utf-8", "replace"))
            process = subprocess.Popen(
                [sys.executable, "-I", "-S", "-c", _LAUNCH, json.dumps(kinds), str(source)],
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                stderr=subprocess.PIPE,
                start_new_session=True,
                cwd=folder,
                env={},
            )
            return supervise(process, stdin.encode("utf-8", "replace"), self.limits)
