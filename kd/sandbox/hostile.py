"""Hostile programs, themselves bounded (at most 200 processes, 1 GiB, 5 seconds), and what has to
contain each: the table that ``kd traces sandbox`` prints for the machine it runs on."""

from __future__ import annotations

from typing import NamedTuple

from kd.sandbox.bubblewrap import Bubblewrap, Run


class Hostile(NamedTuple):
    """A program, what is meant to contain it, and how a contained run ends."""

    program: str
    contained_by: str
    output: str = ""
    status: str = "done"

    def contained(self, run: Run) -> bool:
        """Whether it ended as it must."""
        if run.status != self.status:
            return False
        return self.status != "done" or run.stdout.strip() == self.output


HOSTILE: dict[str, Hostile] = {
    "child processes": Hostile(
        "import os\n"
        "n = 0\n"
        "for _ in range(200):\n"
        "    try:\n"
        "        pid = os.fork()\n"
        "    except OSError:\n"
        "        continue\n"
        "    if pid == 0: os._exit(0)\n"
        "    n += 1\n"
        "print('children', n)",
        "seccomp: fork denied (and RLIMIT_NPROC of its own uid)",
        "children 0",
    ),
    "threads": Hostile(
        "import threading, time\n"
        "n = 0\n"
        "try:\n"
        "    for _ in range(200):\n"
        "        threading.Thread(target=time.sleep, args=(1,), daemon=True).start(); n += 1\n"
        "except RuntimeError: pass\n"
        "print('bounded' if n < 150 else 'unbounded')",
        "RLIMIT_NPROC and RLIMIT_AS",
        "bounded",
    ),
    "memory": Hostile(
        "try:\n"
        "    x = bytearray(2**30)\n"
        "    print('got it')\n"
        "except MemoryError:\n"
        "    print('refused')",
        "RLIMIT_AS",
        "refused",
    ),
    "disk": Hostile(
        "n = 0\n"
        "try:\n"
        "    for i in range(64):\n"
        "        with open(f'/tmp/{i}', 'wb') as f:\n"
        "            f.write(bytes(2**20)); f.flush(); n += 1\n"
        "except OSError: pass\n"
        "print('bounded' if n <= 16 else 'unbounded')",
        "size of the tmpfs, RLIMIT_FSIZE",
        "bounded",
    ),
    "network": Hostile(
        "import socket\ntry:\n    socket.socket(); print('open')\nexcept OSError: print('refused')",
        "seccomp: socket denied; no network namespace behind it",
        "refused",
    ),
    "reading outside": Hostile(
        "import os\n"
        "found = []\n"
        "for p in ('/etc/passwd', '/root', '/home', '/proc/1/environ', '/sys'):\n"
        "    try:\n"
        "        os.listdir(p) if not p.endswith(('passwd', 'environ')) else open(p)\n"
        "        found.append(p)\n"
        "    except OSError: pass\n"
        "print(found)",
        "mount namespace: only /usr is there, read-only",
        "[]",
    ),
    "writing outside": Hostile(
        "found = []\n"
        "for p in ('/x', '/usr/x', '/dev/x', '/program/x', '/usr/bin/python3'):\n"
        "    try:\n"
        "        open(p, 'a'); found.append(p)\n"
        "    except OSError: pass\n"
        "print(found)",
        "read-only mounts",
        "[]",
    ),
    "environment": Hostile(
        "import os\nprint('HOME' in os.environ, 'PATH' in os.environ)",
        "emptied",
        "False False",
    ),
    "killing its parent": Hostile(
        "import os, signal\n"
        "for pid in (1, os.getppid()):\n"
        "    try: os.kill(pid, signal.SIGKILL)\n"
        "    except OSError: pass\n"
        "print('still here')",
        "pid namespace, another uid",
        "still here",
    ),
    "ctypes": Hostile(
        "import ctypes\n"
        "libc = ctypes.CDLL(None)\n"
        "print([libc.system(b'true') == 0, libc.unshare(0x10000000) == 0, libc.setuid(0) == 0])",
        "seccomp, no capabilities",
        "[False, False, False]",
    ),
    "importlib": Hostile(
        "import importlib, os\n"
        "os.fork = None\n"
        "importlib.reload(os)\n"
        "import posix, _posixsubprocess\n"
        "try: posix.fork(); print('forked')\n"
        "except OSError: print('refused')",
        "seccomp: the module does not matter",
        "refused",
    ),
    "posix_spawn": Hostile(
        "import os\n"
        "try: os.posix_spawn('/usr/bin/true', ['true'], {}); print('ran')\n"
        "except OSError: print('refused')",
        "seccomp: fork denied",
        "refused",
    ),
    "subprocess": Hostile(
        "import subprocess\n"
        "try: subprocess.run(['/usr/bin/true']); print('ran')\n"
        "except OSError: print('refused')",
        "seccomp: fork denied",
        "refused",
    ),
    "endless loop": Hostile(
        "while True: pass",
        "wall clock, process group killed",
        status="time limit",
    ),
    "sleeping": Hostile(
        "import time\ntime.sleep(5)",
        "wall clock, process group killed",
        status="time limit",
    ),
    "ignoring signals": Hostile(
        "import time, signal\n"
        "for s in range(1, 65):\n"
        "    try: signal.signal(s, signal.SIG_IGN)\n"
        "    except (OSError, ValueError): pass\n"
        "end = time.time() + 5\n"
        "while time.time() < end: pass",
        "SIGKILL of the process group",
        status="time limit",
    ),
    "huge output": Hostile(
        "import sys\nfor _ in range(64): sys.stdout.write('x' * 2**16)",
        "output cap",
        status="output limit",
    ),
    "closing its output": Hostile(
        "import sys, os\nos.close(1); os.close(2)\nimport time; time.sleep(5)",
        "wall clock",
        status="time limit",
    ),
    "ptrace": Hostile(
        "import ctypes\nprint(ctypes.CDLL(None).ptrace(0, 0, 0, 0) == 0)",
        "seccomp: ptrace denied",
        "False",
    ),
    "raw system calls": Hostile(
        "import ctypes\n"
        "libc = ctypes.CDLL(None)\n"
        "print([libc.syscall(n) >= 0 for n in (57, 58, 41, 272)])",
        "seccomp: fork, vfork, socket, unshare denied",
        "[False, False, False, False]",
    ),
    "mounting": Hostile(
        "import ctypes\nprint(ctypes.CDLL(None).mount(b'none', b'/tmp', b'tmpfs', 0, 0) == 0)",
        "seccomp, no capabilities",
        "False",
    ),
    "lifting its limits": Hostile(
        "import resource\n"
        "try:\n"
        "    resource.setrlimit(resource.RLIMIT_AS, (-1, -1)); print('lifted')\n"
        "except (ValueError, OSError): print('refused')",
        "hard limits",
        "refused",
    ),
    "becoming root": Hostile(
        "import os\ntry:\n    os.setuid(0); print('root')\nexcept OSError: print('refused')",
        "user namespace, no capabilities",
        "refused",
    ),
    "a daemon": Hostile(
        "import os\n"
        "try:\n"
        "    os.fork(); os.setsid(); print('forked')\n"
        "except OSError: print('refused')",
        "seccomp: fork denied; pid namespace",
        "refused",
    ),
}


def table(sandbox: Bubblewrap) -> tuple[str, bool]:
    """Run every program and say what became of it, as Markdown; True when all were contained."""
    lines = ["| program tries | contained by | it got | seconds | |", "|---|---|---|---|---|"]
    sound = True
    for name, hostile in HOSTILE.items():
        run = sandbox(hostile.program)
        held = hostile.contained(run)
        sound = sound and held
        got = run.stdout.strip()[:60] if run.status == "done" else run.status
        verdict = "contained" if held else "NOT CONTAINED"
        lines.append(
            f"| {name} | {hostile.contained_by} | `{got}` | {run.seconds:.2f} | {verdict} |"
        )
    return "\n".join(lines), sound
