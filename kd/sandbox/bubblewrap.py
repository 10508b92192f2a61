"""Runs programs nobody has read: in bubblewrap, proved tight at start, closed otherwise.

Layers: another uid (when root), a cgroup where there is one, new user, pid, network, ipc and uts
namespaces, no capabilities, read-only /usr and nothing else of the disk, a tmpfs of bounded bytes
and files, an empty environment, rlimits, a seccomp filter, a wall clock, an output cap, and the
process group killed at the end.

With or without a cgroup the memory of a run is bounded as a whole: there is one process with a
bounded address space, and what could hold memory outside it (shared memory, message queues,
anonymous files, other processes) is denied or, like the tmpfs, bounded. Page tables, which no
rlimit bounds, are counted by the cgroup, or else looked at ten times a second.
"""

from __future__ import annotations

import itertools
import json
import os
import shutil
import socket
import subprocess
import tempfile
import threading
from contextlib import ExitStack
from pathlib import Path
from typing import IO

from kd.sandbox.cgroup import Cgroups, ran_out_of_memory
from kd.sandbox.runs import Limits, Run, SandboxClosed, can_be_watched, supervise
from kd.sandbox.seccomp import program as seccomp_program

FIRST_UID = 61_100
UIDS = 64
PYTHON = "/usr/bin/python3"
TOOLS = ("prlimit", "unshare", "setpriv", "mount", "sh")  # util-linux and a shell
SETTING_OUT = "/usr/sbin:/usr/bin:/sbin:/bin"
_CANARY = Path(__file__).with_name("canary.py")
# sh -c: enter the cgroup named first, or none; then run the rest
_ENTER = 'echo $$ > "$0" || exit 125; exec "$@"'
# sh -c: bubblewrap cannot bound the number of files, so /tmp of a namespace of our own is mounted
# first, and the sandbox is given that
_MOUNT = 'mount -t tmpfs -o "$0" tmpfs /tmp || exit 125; exec "$@"'


class Bubblewrap:
    """The sandbox. Making one runs the probe and raises unless every attempt in it failed.

    Args:
        limits: of each run.
        bwrap: the program; found on PATH by default.

    Attributes:
        cgroups: where runs get a cgroup of their own, or why there is none.
        watched: whether, without one, page tables are counted by looking at them.

    Raises:
        SandboxClosed: bubblewrap or util-linux is missing, namespaces cannot be made here, a limit
            cannot be enforced here, or a probe got through.
    """

    def __init__(self, limits: Limits | None = None, *, bwrap: str | None = None) -> None:
        self.limits = limits or Limits()
        self.bwrap = bwrap or _found("bwrap", "bubblewrap", shutil.which("bwrap"))
        if not os.path.exists(PYTHON):
            raise SandboxClosed(f"Bubblewrap: {PYTHON} must exist, got none. Install python3.")
        self._tools = {
            name: _found(name, "util-linux", shutil.which(name, path=SETTING_OUT)) for name in TOOLS
        }
        self._filter = seccomp_program()
        self._slots = itertools.count()
        self._lock = threading.Lock()
        self.cgroups, self.watched = Cgroups(), can_be_watched()
        self._try_cgroup()
        self._probe()

    def __repr__(self) -> str:
        return f"Bubblewrap({self.limits})"

    def __call__(self, program: str, stdin: str = "") -> Run:
        """Run a Python program on an input."""
        with ExitStack() as stack:
            group = None
            try:
                if self.cgroups.parent is not None:
                    group = stack.enter_context(self.cgroups.one(self.limits))
                filters = stack.enter_context(_file(self._filter))
                source = stack.enter_context(_file(program.encode("utf-8", "replace")))
                status = stack.enter_context(tempfile.TemporaryFile())
                handles = (filters.fileno(), source.fileno(), status.fileno())
                process = subprocess.Popen(
                    [*self._outside(group), *self._inside(*handles)],
                    stdin=subprocess.PIPE,
                    stdout=subprocess.PIPE,
                    stderr=subprocess.PIPE,
                    pass_fds=handles,
                    start_new_session=True,
                    cwd="/",
                    env={"PATH": SETTING_OUT},
                    umask=0o077,
                )
            except (OSError, subprocess.SubprocessError) as error:
                return Run("sandbox error", stderr=str(error))
            feed, watch = stdin.encode("utf-8", "replace"), group is None and self.watched
            run = supervise(process, feed, self.limits, watch=watch)
            if group is not None and ran_out_of_memory(group):
                return Run("memory limit", None, run.stdout, run.stderr, run.seconds)
            status.seek(0)
            if run.status == "done" and b"exit-code" not in status.read():
                return Run("sandbox error", run.code, stderr=run.stderr, seconds=run.seconds)
            return run

    def _outside(self, group: Path | None) -> list[str]:
        """What runs before bubblewrap: it enters the cgroup, drops root, and mounts the tmpfs."""
        tool, limits = self._tools, self.limits
        line = []
        if group is not None:
            line += [tool["sh"], "-c", _ENTER, str(group / "cgroup.procs")]
        if os.geteuid() == 0:  # neither uid 0 nor its share of limits is bound by RLIMIT_NPROC
            with self._lock:
                uid = str(FIRST_UID + next(self._slots) % UIDS)
            line += [tool["setpriv"], "--reuid", uid, "--regid", uid, "--clear-groups"]
        both = {
            "as": limits.memory,
            "cpu": int(limits.seconds) + 1,
            "fsize": limits.disk,
            "nofile": 64,
            "core": 0,
            "sigpending": 256,
            "msgqueue": 0,
        }
        line += [tool["prlimit"], *(f"--{key}={value}:{value}" for key, value in both.items())]
        line += [tool["unshare"], "--map-root-user", "--mount"]
        size = f"size={limits.disk},nr_inodes={limits.files},mode=0777"
        return [*line, tool["sh"], "-c", _MOUNT, size]

    def _inside(self, filters: int, source: int, status: int) -> list[str]:
        """Bubblewrap and what it runs: RLIMIT_NPROC counts the tasks of one namespace, so it is
        set in there."""
        tasks = self.limits.processes
        return [
            self.bwrap,
            *("--unshare-user", "--unshare-pid", "--unshare-net", "--unshare-ipc"),
            *("--unshare-uts", "--unshare-cgroup-try", "--uid", "65534", "--gid", "65534"),
            *("--cap-drop", "ALL", "--clearenv", "--new-session", "--die-with-parent"),
            *("--hostname", "sandbox", "--ro-bind", "/usr", "/usr"),
            *("--symlink", "usr/lib", "/lib", "--symlink", "usr/lib64", "/lib64"),
            *("--symlink", "usr/bin", "/bin", "--dir", "/dev"),
            *("--dev-bind", "/dev/null", "/dev/null", "--dev-bind", "/dev/zero", "/dev/zero"),
            *("--dev-bind", "/dev/urandom", "/dev/urandom"),
            *("--bind", "/tmp", "/tmp", "--dir", "/program"),
            *("--ro-bind-data", str(source), "/program/main.py", "--remount-ro", "/"),
            *("--chdir", "/tmp", "--setenv", "PYTHONHASHSEED", "0"),
            *("--json-status-fd", str(status), "--seccomp", str(filters)),
            *("--", self._tools["prlimit"], f"--nproc={tasks}:{tasks}"),
            *(PYTHON, "-I", "-X", "utf8", "/program/main.py"),
        ]

    def memory(self) -> str:
        """What bounds the memory of a run here, in words."""
        if self.cgroups.parent is not None:
            return f"memory and tasks counted by {self.cgroups}"
        looked = "looked at" if self.watched else "NOT bounded, since the kernel shows no children"
        return f"{self.cgroups}: address space bounded, page tables {looked}"

    def _try_cgroup(self) -> None:
        if self.cgroups.parent is not None:
            try:
                with self.cgroups.one(self.limits):
                    return
            except OSError as error:
                self.cgroups.reason = f"{self.cgroups.parent} cannot be used: {error}"
                self.cgroups.parent = None

    def _probe(self) -> None:
        """Try to get out in every way the canary knows; anything that works closes the sandbox."""
        with (
            tempfile.TemporaryDirectory(prefix="kd-canary-") as folder,
            socket.create_server(("127.0.0.1", 0)) as listener,
        ):
            os.chmod(folder, 0o777)
            secret = Path(folder) / "secret"
            secret.write_text("secret")
            secret.chmod(0o666)
            facts = {
                "secret": str(secret),
                "folder": folder,
                "port": listener.getsockname()[1],
                "pid": os.getpid(),
                "processes": self.limits.processes,
                "files": self.limits.files,
                "disk": self.limits.disk,
            }
            run = self(_CANARY.read_text(), json.dumps(facts))
            listener.setblocking(False)
            try:
                listener.accept()
                raise SandboxClosed("Bubblewrap: the sandbox must have no network, got a caller.")
            except BlockingIOError:
                pass
            if sorted(os.listdir(folder)) != ["secret"] or secret.read_text() != "secret":
                raise SandboxClosed("Bubblewrap: the sandbox must not write outside, got a file.")
        try:
            escaped = json.loads(run.stdout)
        except ValueError:
            if run.status == "sandbox error":
                fix = "Unprivileged user namespaces may be switched off here; use a remote backend."
            else:
                fix = f"The limits may be too small for Python itself: {self.limits}."
            said = run.stderr[-300:].strip() or "nothing on stderr"
            raise SandboxClosed(
                f"Bubblewrap: the probe must run, got {run.status}: {said}. {fix}"
            ) from None
        if escaped != {"sum": 5050, "escaped": []}:
            raise SandboxClosed(
                f"Bubblewrap: every probe must fail, got through: {escaped}. Use a remote backend."
            )


def _found(program: str, package: str, found: str | None) -> str:
    if found is None:
        raise SandboxClosed(
            f"Bubblewrap: {program} must be installed, got none on PATH. "
            f"Install it (apt install {package}), or pass a remote backend."
        )
    return found


def _file(content: bytes) -> IO[bytes]:
    made = tempfile.TemporaryFile()
    made.write(content)
    made.flush()
    made.seek(0)
    return made
