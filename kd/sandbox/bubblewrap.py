"""Runs programs nobody has read: in bubblewrap, proved tight at start, closed otherwise.

Layers: another uid (when root), new user, pid, network, ipc and uts namespaces, no
capabilities, read-only /usr and nothing else of the disk, a small tmpfs, an empty environment,
rlimits, a seccomp filter, a wall clock, an output cap, and the process group killed at the end.
"""

from __future__ import annotations

import itertools
import json
import os
import resource
import selectors
import shutil
import signal
import socket
import subprocess
import tempfile
import threading
import time
from dataclasses import dataclass
from pathlib import Path
from typing import IO, Any

from kd.sandbox.seccomp import program as seccomp_program

FIRST_UID = 61_100
UIDS = 64
PYTHON = "/usr/bin/python3"


@dataclass(frozen=True)
class Limits:
    """What one run may use.

    Attributes:
        seconds: of wall clock; the processor gets one second more.
        memory: bytes of address space.
        disk: bytes of one file, and of the whole tmpfs.
        output: bytes of stdout and stderr together.
        processes: tasks of the sandbox's uid; new processes are refused anyway.
    """

    seconds: float = 5.0
    memory: int = 2**30
    disk: int = 16 * 2**20
    output: int = 2**20
    processes: int = 64


@dataclass(frozen=True)
class Run:
    """What came of a run.

    Attributes:
        status: "done", "time limit", "output limit", or "sandbox error" (says nothing about the
            program).
        code: its exit status, negative for a signal; None where it was killed by us.
        stdout: what it wrote, as text with replacement characters.
        stderr: likewise.
        seconds: wall clock.
    """

    status: str
    code: int | None = None
    stdout: str = ""
    stderr: str = ""
    seconds: float = 0.0


class SandboxClosed(OSError):
    """The sandbox does not run anything here; the message says why."""


class Bubblewrap:
    """The sandbox. Making one runs the probe and raises unless every attempt in it failed.

    Args:
        limits: of each run.
        bwrap: the program; found on PATH by default.

    Raises:
        SandboxClosed: bubblewrap is missing, cannot make namespaces here, or let a probe through.
    """

    def __init__(self, limits: Limits | None = None, *, bwrap: str | None = None) -> None:
        self.limits = limits or Limits()
        found = bwrap or shutil.which("bwrap")
        if found is None:
            raise SandboxClosed(
                "Bubblewrap: bwrap must be installed, got none on PATH. "
                "Install it (apt install bubblewrap), or pass a remote backend."
            )
        if not os.path.exists(PYTHON):
            raise SandboxClosed(f"Bubblewrap: {PYTHON} must exist, got none. Install python3.")
        self.bwrap = found
        self._filter = seccomp_program()
        self._slots = itertools.count()
        self._lock = threading.Lock()
        self._probe()

    def __repr__(self) -> str:
        return f"Bubblewrap({self.limits})"

    def __call__(self, program: str, stdin: str = "") -> Run:
        """Run a Python program on an input."""
        with self._lock:
            uid = FIRST_UID + next(self._slots) % UIDS
        with (
            _file(self._filter) as filters,
            _file(program.encode("utf-8", "replace")) as source,
            tempfile.TemporaryFile() as status,
        ):
            handles = (filters.fileno(), source.fileno(), status.fileno())
            try:
                process = subprocess.Popen(
                    self._command(*handles),
                    stdin=subprocess.PIPE,
                    stdout=subprocess.PIPE,
                    stderr=subprocess.PIPE,
                    pass_fds=handles,
                    start_new_session=True,
                    cwd="/",
                    env={},
                    preexec_fn=_limiter(self.limits, uid if os.geteuid() == 0 else None),
                )
            except (OSError, subprocess.SubprocessError) as error:
                return Run("sandbox error", stderr=str(error))
            run = supervise(process, stdin.encode("utf-8", "replace"), self.limits)
            status.seek(0)
            if run.status == "done" and b"exit-code" not in status.read():
                return Run("sandbox error", run.code, stderr=run.stderr, seconds=run.seconds)
            return run

    def _command(self, filters: int, source: int, status: int) -> list[str]:
        disk = str(self.limits.disk)
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
            *("--size", disk, "--tmpfs", "/tmp", "--dir", "/program"),
            *("--ro-bind-data", str(source), "/program/main.py", "--remount-ro", "/"),
            *("--chdir", "/tmp", "--setenv", "PYTHONHASHSEED", "0"),
            *("--json-status-fd", str(status), "--seccomp", str(filters)),
            *("--", PYTHON, "-I", "-X", "utf8", "/program/main.py"),
        ]

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
            raise SandboxClosed(
                f"Bubblewrap: the probe must run, got {run.status}: {run.stderr[-300:].strip()}. "
                "Unprivileged user namespaces may be switched off here; use a remote backend."
            ) from None
        if escaped != {"sum": 5050, "escaped": []}:
            raise SandboxClosed(
                f"Bubblewrap: every probe must fail, got through: {escaped}. Use a remote backend."
            )


_CANARY = Path(__file__).with_name("canary.py")


class UnsafeSubprocess:
    """A plain subprocess with rlimits, for programs you trust as much as your own.

    There is NO isolation: it reads your files, uses your network and runs as you.
    """

    def __init__(self, limits: Limits | None = None) -> None:
        self.limits = limits or Limits()

    def __repr__(self) -> str:
        return f"UnsafeSubprocess({self.limits})"

    def __call__(self, program: str, stdin: str = "") -> Run:
        """Run a Python program on an input."""
        import sys

        with tempfile.TemporaryDirectory() as folder:
            source = Path(folder) / "main.py"
            source.write_bytes(program.encode("utf-8", "replace"))
            process = subprocess.Popen(
                [sys.executable, "-I", "-X", "utf8", str(source)],
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                stderr=subprocess.PIPE,
                start_new_session=True,
                cwd=folder,
                env={},
                preexec_fn=_limiter(self.limits, None),
            )
            return supervise(process, stdin.encode("utf-8", "replace"), self.limits)


def supervise(process: subprocess.Popen[bytes], stdin: bytes, limits: Limits) -> Run:
    """Feed a process, read what it writes up to the cap, and kill its whole group at the end."""
    started = time.monotonic()
    parts: dict[str, bytearray] = {"stdout": bytearray(), "stderr": bytearray()}
    status = "done"
    pipes: dict[str, IO[bytes]] = {"stdout": process.stdout, "stderr": process.stderr}  # type: ignore[dict-item]
    feed = memoryview(stdin)
    with selectors.DefaultSelector() as selector:
        for name, pipe in pipes.items():
            selector.register(pipe, selectors.EVENT_READ, name)
        assert process.stdin is not None
        os.set_blocking(process.stdin.fileno(), False)
        selector.register(process.stdin, selectors.EVENT_WRITE, "stdin")
        while selector.get_map() and status == "done":
            left = started + limits.seconds - time.monotonic()
            if left <= 0:
                status = "time limit"
                break
            for key, _ in selector.select(left):
                if key.data == "stdin":
                    feed = _feed(key.fileobj, feed, selector)
                    continue
                data = os.read(key.fd, 65536)
                if not data:
                    selector.unregister(key.fileobj)
                parts[key.data] += data
                if sum(map(len, parts.values())) > limits.output:
                    status = "output limit"
    if status == "done":
        try:
            process.wait(max(0.05, started + limits.seconds - time.monotonic()))
        except subprocess.TimeoutExpired:
            status = "time limit"
    try:
        os.killpg(process.pid, signal.SIGKILL)
    except (ProcessLookupError, PermissionError):
        process.kill()
    process.wait()
    for handle in (process.stdin, process.stdout, process.stderr):
        try:
            handle.close()  # type: ignore[union-attr]
        except OSError:
            pass
    texts = {k: bytes(v[: limits.output]).decode("utf-8", "replace") for k, v in parts.items()}
    code = process.returncode if status == "done" else None
    return Run(status, code, texts["stdout"], texts["stderr"], time.monotonic() - started)


def _feed(pipe: Any, feed: memoryview, selector: selectors.BaseSelector) -> memoryview:
    try:
        feed = feed[os.write(pipe.fileno(), feed[:65536]) :] if feed else feed
    except BlockingIOError:
        return feed
    except OSError:  # it does not read its input
        feed = feed[:0]
    if not feed:
        selector.unregister(pipe)
        pipe.close()
    return feed


def _limiter(limits: Limits, uid: int | None) -> Any:
    """Runs in the child: rlimits, and another uid, since RLIMIT_NPROC does not bind root."""
    wanted = {
        resource.RLIMIT_AS: limits.memory,
        resource.RLIMIT_CPU: int(limits.seconds) + 1,
        resource.RLIMIT_FSIZE: limits.disk,
        resource.RLIMIT_NOFILE: 64,
        resource.RLIMIT_CORE: 0,
    }
    if uid is not None:
        wanted[resource.RLIMIT_NPROC] = limits.processes

    def limit() -> None:
        os.umask(0o077)
        if uid is not None:
            os.setgroups([])
            os.setresgid(uid, uid, uid)
            os.setresuid(uid, uid, uid)
        for kind, value in wanted.items():
            resource.setrlimit(kind, (value, value))

    return limit


def _file(content: bytes) -> IO[bytes]:
    made = tempfile.TemporaryFile()
    made.write(content)
    made.flush()
    made.seek(0)
    return made
