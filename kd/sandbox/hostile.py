"""Hostile programs, themselves bounded (at most 200 tasks, 1.5 GiB, 200,000 files, 5 seconds), and
what has to contain each: the table that ``kd traces sandbox`` prints for the machine it runs on."""

from __future__ import annotations

import os
from typing import NamedTuple

from kd.sandbox.bubblewrap import Bubblewrap
from kd.sandbox.runs import Run


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
        "seccomp: fork denied",
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
        "RLIMIT_NPROC of the namespace",
        "bounded",
    ),
    "threads with tiny stacks": Hostile(
        "import threading\n"
        "threading.stack_size(2**16); stop = threading.Event(); n = 0\n"
        "try:\n"
        "    for _ in range(200):\n"
        "        threading.Thread(target=stop.wait, daemon=True).start(); n += 1\n"
        "except RuntimeError: pass\n"
        "stop.set(); print('bounded' if n < 64 else 'unbounded')",
        "RLIMIT_NPROC of the namespace",
        "bounded",
    ),
    "shared memory (System V)": Hostile(
        "import ctypes\n"
        "libc = ctypes.CDLL(None); libc.shmat.restype = ctypes.c_void_p; held = 0\n"
        "for _ in range(16):\n"
        "    i = libc.shmget(0, 2**25, 0o1600)\n"
        "    if i < 0: break\n"
        "    at = libc.shmat(i, None, 0)\n"
        "    ctypes.memset(at, 1, 2**25); libc.shmdt(ctypes.c_void_p(at)); held += 32\n"
        "print(held, 'MiB')",
        "seccomp: shmget denied",
        "0 MiB",
    ),
    "shared memory (POSIX)": Hostile(
        "from multiprocessing import shared_memory\n"
        "try: shared_memory.SharedMemory(create=True, size=2**25); print('got it')\n"
        "except OSError: print('refused')",
        "no /dev/shm",
        "refused",
    ),
    "shared mappings": Hostile(
        "import mmap\n"
        "held = []\n"
        "try:\n"
        "    for _ in range(80): held.append(mmap.mmap(-1, 2**24)); held[-1].write(b'1')\n"
        "except OSError: pass\n"
        "print('bounded' if len(held) < 64 else 'unbounded')",
        "RLIMIT_AS",
        "bounded",
    ),
    "page tables": Hostile(
        "import ctypes, time\n"
        "libc = ctypes.CDLL(None); libc.mmap.restype = ctypes.c_void_p\n"
        "number = ctypes.c_long\n"
        "libc.mmap.argtypes = [ctypes.c_void_p, number, *[ctypes.c_int] * 3, number]\n"
        "block, at = bytearray(800 * 2**20), 2**40\n"
        "for _ in range(2**17):\n"
        "    page = libc.mmap(at, 4096, 3, 0x100022, -1, 0)\n"
        "    if page in (None, 2**64 - 1): break\n"
        "    ctypes.memset(page, 1, 1); at += 2**29\n"
        "time.sleep(0.5); print('held')",
        "looking at them, or the cgroup",
        status="memory limit",
    ),
    "files in memory": Hostile(
        "import os\ntry: os.memfd_create('x'); print('got it')\nexcept OSError: print('refused')",
        "seccomp: memfd_create denied",
        "refused",
    ),
    "message queues": Hostile(
        "import ctypes\n"
        "libc = ctypes.CDLL(None)\n"
        "print([libc.msgget(0, 0o1600) >= 0, libc.mq_open(b'/q', 0o102, 0o600, None) >= 0])",
        "seccomp: msgget, mq_open denied",
        "[False, False]",
    ),
    "semaphores": Hostile(
        "import ctypes\n"
        "print(any(ctypes.CDLL(None).semget(0, 32000, 0o1600) >= 0 for _ in range(100)))",
        "seccomp: semget denied",
        "False",
    ),
    "pages kept in pipes": Hostile(
        "import ctypes, os\n"
        "class Part(ctypes.Structure):\n"
        "    _fields_ = [('base', ctypes.c_void_p), ('length', ctypes.c_size_t)]\n"
        "buffer = ctypes.create_string_buffer(4096)\n"
        "part = Part(ctypes.addressof(buffer), 4096)\n"
        "print(ctypes.CDLL(None).vmsplice(os.pipe()[1], ctypes.byref(part), 1, 0))",
        "seccomp: vmsplice denied",
        "-1",
    ),
    "pipes": Hostile(
        "import os, fcntl\n"
        "n = 0\n"
        "try:\n"
        "    while n < 5000: fcntl.fcntl(os.pipe()[1], 1031, 2**20); n += 1\n"
        "except OSError: pass\n"
        "print('bounded' if n < 40 else 'unbounded')",
        "RLIMIT_NOFILE",
        "bounded",
    ),
    "empty files": Hostile(
        "n = 0\n"
        "try:\n"
        "    for n in range(200_000): open(f'/tmp/{n}', 'w').close()\n"
        "except OSError: pass\n"
        "print('bounded' if n <= 1024 else 'unbounded')",
        "files of the tmpfs (nr_inodes)",
        "bounded",
    ),
    "links and folders": Hostile(
        "import os\n"
        "n = 0\n"
        "try:\n"
        "    for n in range(50_000): os.symlink('x', f'/tmp/s{n}'); os.mkdir(f'/tmp/d{n}')\n"
        "except OSError: pass\n"
        "print('bounded' if n <= 512 else 'unbounded')",
        "files of the tmpfs (nr_inodes)",
        "bounded",
    ),
    "small full files": Hostile(
        "n = 0\n"
        "try:\n"
        "    for n in range(20_000):\n"
        "        with open(f'/tmp/{n}', 'w') as f: f.write('x' * 65536)\n"
        "except OSError: pass\n"
        "print('bounded' if n <= 256 else 'unbounded')",
        "size of the tmpfs",
        "bounded",
    ),
    "watching files": Hostile(
        "import ctypes\nprint(ctypes.CDLL(None).inotify_init1(0) >= 0)",
        "seccomp: inotify_init denied",
        "False",
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
    user = "root, programs as another uid" if os.geteuid() == 0 else f"uid {os.geteuid()}"
    lines = [f"As {user}; {sandbox.limits}; {sandbox.memory()}.", ""]
    lines += ["| program tries | contained by | it got | seconds | |", "|---|---|---|---|---|"]
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
