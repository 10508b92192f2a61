"""Runs inside the sandbox and tries to get out; prints what worked. Imports nothing of kd."""

import ctypes
import json
import os
import resource
import socket
import sys
import threading


def attempt(name, action):
    try:
        if action() is not False:
            ESCAPED.append(name)
    except (Exception, SystemExit):
        pass


def write(path):
    with open(path, "w") as file:
        file.write("x")


def read(path):
    with open(path) as file:
        file.read(1)


def fork():
    if os.fork() == 0:
        os._exit(0)


def connect():
    socket.create_connection(("127.0.0.1", FACTS["port"]), timeout=1)


def system():
    return ctypes.CDLL(None).system(b"true") == 0


def unshare():
    return ctypes.CDLL(None).unshare(0x10000000) == 0


def raw_fork():
    child = ctypes.CDLL(None).fork()
    if child == 0:
        os._exit(0)
    return child > 0


def limits():
    """Limits must be set and must not be liftable."""
    for kind in (resource.RLIMIT_AS, resource.RLIMIT_CPU, resource.RLIMIT_FSIZE):
        if resource.getrlimit(kind)[1] == resource.RLIM_INFINITY:
            return True
        try:
            resource.setrlimit(kind, (resource.RLIM_INFINITY, resource.RLIM_INFINITY))
            return True
        except (ValueError, OSError):
            continue
    return False


def call(number, *arguments):
    """A system call by its number; libc may have no function for it."""
    return ctypes.CDLL(None).syscall(number, *arguments) >= 0


def threads():
    """One task more than allowed; small stacks, so that memory does not bound them first."""
    threading.stack_size(2**16)
    stop = threading.Event()
    try:
        for _ in range(FACTS["processes"]):
            threading.Thread(target=stop.wait, daemon=True).start()
        return True
    finally:
        stop.set()


def tmpfs():
    """The tmpfs must be bounded in bytes and in files, and be the only place to write."""
    found = os.statvfs("/tmp")
    files, size = found.f_files, found.f_blocks * found.f_frsize
    return not 0 < files <= FACTS["files"] or not 0 < size <= FACTS["disk"] + 4096


def one_file_too_many():
    for number in range(min(FACTS["files"], 2000) + 1):
        os.symlink("x", f"/tmp/canary-{number}")
    return FACTS["files"] <= 2000


ESCAPED: list = []
FACTS = json.load(sys.stdin)
attempt("read a secret file", lambda: read(FACTS["secret"]))
attempt("read /etc/passwd", lambda: read("/etc/passwd"))
attempt("read /etc/shadow", lambda: read("/etc/shadow"))
attempt("list /root", lambda: os.listdir("/root"))
attempt("list /home", lambda: os.listdir("/home"))
attempt("write a file outside", lambda: write(FACTS["secret"]))
attempt("make a file outside", lambda: write(FACTS["folder"] + "/new"))
for _folder in ("/", "/usr", "/dev", "/program", "/usr/lib"):
    attempt("write into " + _folder, lambda folder=_folder: write(folder + "/kd-canary"))
attempt("open a socket", lambda: socket.socket().close())
attempt("connect", connect)
attempt("fork", fork)
attempt("fork through libc", raw_fork)
attempt("spawn", lambda: os.posix_spawn("/usr/bin/true", ["true"], {}))
attempt("system through libc", system)
attempt("unshare through libc", unshare)
attempt("see the parent", lambda: os.kill(FACTS["pid"], 0) if FACTS["pid"] > 2 else False)
attempt("be root", lambda: os.getuid() == 0 or os.geteuid() == 0)
attempt("become root", lambda: os.setuid(0))
attempt("see an environment", lambda: bool(set(os.environ) - {"PYTHONHASHSEED", "PWD", "LC_CTYPE"}))
attempt("lift its limits", limits)
libc = ctypes.CDLL(None)
attempt("share memory (System V)", lambda: libc.shmget(0, 4096, 0o1600) >= 0)
attempt("make a message queue (System V)", lambda: libc.msgget(0, 0o1600) >= 0)
attempt("make semaphores (System V)", lambda: libc.semget(0, 1, 0o1600) >= 0)
attempt("make a message queue (POSIX)", lambda: libc.mq_open(b"/kd", 0o102, 0o600, None) >= 0)
attempt("share memory (POSIX)", lambda: libc.shm_open(b"/kd", 0o102, 0o600) >= 0)
attempt("make a file in memory", lambda: libc.memfd_create(b"kd", 0) >= 0)
attempt("make a secret file in memory", lambda: call(447, 0))
attempt("watch files", lambda: libc.inotify_init1(0) >= 0)
attempt("start one thread too many", threads)
attempt("have an unbounded tmpfs", tmpfs)
attempt("make one file too many", one_file_too_many)
print(json.dumps({"sum": sum(range(101)), "escaped": ESCAPED}))
