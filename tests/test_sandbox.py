"""Hostile programs, themselves bounded, are contained, as root and as another user; every limit
that cannot be kept closes the sandbox.

Where bubblewrap cannot run, these tests are skipped with its reason.
"""

import json
import os
import shutil
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest

from kd.cli.main import main
from kd.sandbox import (
    HOSTILE,
    Bubblewrap,
    Limits,
    SandboxClosed,
    UnsafeSubprocess,
    bubblewrap,
    cgroup,
    hostile,
    runs,
    seccomp,
)

try:
    SANDBOX, QUICK = Bubblewrap(Limits(seconds=8.0)), Bubblewrap(Limits(seconds=1.0))
    CLOSED = ""
except OSError as error:
    SANDBOX, QUICK, CLOSED = None, None, str(error)
needs_sandbox = pytest.mark.skipif(SANDBOX is None, reason=CLOSED)
ROOT = Path(__file__).parent.parent


@needs_sandbox
@pytest.mark.parametrize("name", HOSTILE)
def test_hostile_programs_are_contained(name):
    endless = HOSTILE[name].status == "time limit"
    run = (QUICK if endless else SANDBOX)(HOSTILE[name].program)
    assert HOSTILE[name].contained(run), run
    assert not endless or run.seconds < 5.5


@needs_sandbox
def test_the_command_prints_the_table(monkeypatch, capsys):
    few = {name: HOSTILE[name] for name in ("memory", "network", "huge output")}
    monkeypatch.setattr(hostile, "HOSTILE", few)
    assert main(["traces", "sandbox"]) == 0
    shown = capsys.readouterr().out
    assert shown.count("| contained |") == 3 and "NOT" not in shown
    few["a lie"] = hostile.Hostile("print('out')", "nothing", "in")
    assert main(["traces", "sandbox"]) == 1
    assert "| a lie | nothing | `out` |" in capsys.readouterr().out


@needs_sandbox
def test_nothing_outlives_a_run():
    if shutil.which("pgrep") is None:
        pytest.skip("pgrep is not installed")
    mark = f"kdmark{os.getpid()}"  # another run of the tests may be beside this one
    run = QUICK(f"import ctypes, time\nctypes.CDLL(None).prctl(15, b'{mark}')\ntime.sleep(5)")
    assert run.status == "time limit"
    found = subprocess.run(["pgrep", mark], capture_output=True, text=True)
    assert not found.stdout.strip()


@needs_sandbox
def test_crashes_are_the_programs_own_fault():
    assert SANDBOX("import os, signal; os.kill(os.getpid(), signal.SIGSEGV)").code != 0
    assert SANDBOX("raise SystemExit(7)").code == 7


def test_a_missing_or_leaking_sandbox_is_closed(monkeypatch, tmp_path):
    monkeypatch.setenv("PATH", str(tmp_path))
    with pytest.raises(SandboxClosed, match="bwrap must be installed"):
        Bubblewrap()
    with monkeypatch.context() as bare, pytest.raises(SandboxClosed, match="prlimit must be"):
        bare.setattr(bubblewrap, "SETTING_OUT", str(tmp_path))
        Bubblewrap(bwrap="/bin/true")
    # a fake bwrap that isolates nothing: the canary gets through, and nothing is ever run in it
    fake = tmp_path / "fake"
    fake.write_text('#!/bin/sh\nexec /usr/bin/python3 /proc/self/fd/"$KD" 2>/dev/null\n')
    fake.chmod(0o755)
    if os.path.exists("/usr/bin/python3"):
        with pytest.raises(SandboxClosed):
            Bubblewrap(bwrap=str(fake))


def test_the_unsafe_backend_says_so_and_still_bounds_time():
    run = UnsafeSubprocess(Limits(seconds=0.5))("import time; time.sleep(5)")
    assert run.status == "time limit"


def as_another_user(script):
    """What a script prints as uid 65534, which has no privilege at all."""
    if os.geteuid() != 0:
        pytest.skip("not root: every other test runs without privileges already")
    command = ["setpriv", "--reuid", "65534", "--regid", "65534", "--clear-groups", sys.executable]
    paths = {"PYTHONPATH": str(ROOT), "PATH": os.environ["PATH"]}
    options = {"capture_output": True, "text": True, "cwd": "/", "env": paths, "timeout": 60}
    if subprocess.run([*command, "-B", "-c", "import kd.sandbox"], **options).returncode:
        pytest.skip("uid 65534 may not read this checkout or its Python")
    return subprocess.run([*command, "-B", "-c", script], **options)


@needs_sandbox
def test_hostile_programs_are_contained_without_privileges():
    names = [name for name, each in HOSTILE.items() if each.status != "time limit"]
    run = as_another_user(
        "import json, os\n"
        "from kd.sandbox import HOSTILE, Bubblewrap, Limits\n"
        "sandbox = Bubblewrap(Limits(seconds=8.0))\n"
        f"held = [n for n in {names!r} if HOSTILE[n].contained(sandbox(HOSTILE[n].program))]\n"
        "print(json.dumps([os.geteuid(), held]))"
    )
    assert json.loads(run.stdout) == [65534, names], run.stderr


THREADS = (
    "import threading\nthreading.stack_size(2**16); stop = threading.Event(); n = 1\n"
    "try:\n"
    "    for _ in range(100): threading.Thread(target=stop.wait, daemon=True).start(); n += 1\n"
    "except RuntimeError: pass\n"
    "stop.set(); print(n)"
)
FILES = (
    "n = 0\ntry:\n    for n in range(9_999): open(f'/tmp/{n}', 'w').close()\nexcept OSError: pass\n"
    "print(n)"
)


@needs_sandbox
@pytest.mark.parametrize("user", ["this", "another"])
def test_few_tasks_and_few_files(user):
    """Near the limit from below, never above it."""
    script = (
        "from kd.sandbox import Bubblewrap, Limits\n"
        "sandbox = Bubblewrap(Limits(processes=20, files=50))\n"
        f"print(sandbox({THREADS!r}).stdout, sandbox({FILES!r}).stdout)"
    )
    if user == "another":
        said = as_another_user(script).stdout
    else:
        sandbox = Bubblewrap(Limits(processes=20, files=50))
        said = sandbox(THREADS).stdout + sandbox(FILES).stdout
    tasks, files = map(int, said.split())
    assert 15 <= tasks <= 20 and 45 <= files <= 50


@needs_sandbox
def test_a_busy_machine_takes_no_time_from_a_run():
    """More work than processors: each needs less than its limit, and together they need more."""
    if not Path("/proc/self/schedstat").exists():
        pytest.skip("the kernel does not count what a process waits")
    busy = Bubblewrap(Limits(seconds=1.0))
    work = "import time\nwhile time.process_time() < 0.7: pass\nprint('done')"
    many = 2 * len(os.sched_getaffinity(0))
    with ThreadPoolExecutor(many) as pool:
        done = list(pool.map(busy, [work] * many))
        assert [run.stdout for run in done] == ["done\n"] * many
    assert busy("import time; time.sleep(1.6)").status == "time limit", "sleeping is not waiting"


@needs_sandbox
def test_what_is_granted_for_waiting_is_bounded(monkeypatch):
    monkeypatch.setattr(runs, "starved", lambda pid: 1e9)
    run = Bubblewrap(Limits(seconds=0.5))("import time; time.sleep(60)")
    assert run.status == "time limit" and 2 <= run.seconds < 4


@needs_sandbox
def test_runs_beside_each_other_do_not_share_the_limit_of_tasks():
    sandbox = Bubblewrap(Limits(processes=20))
    slow = THREADS.replace("stop.set()", "import time; time.sleep(0.5); stop.set()")
    with ThreadPoolExecutor(4) as pool:
        counts = [int(run.stdout) for run in pool.map(sandbox, [slow] * 4)]
    assert all(15 <= count <= 20 for count in counts)


@needs_sandbox
@pytest.mark.parametrize("memory", [160, 400])
def test_what_a_run_holds_is_bounded_as_a_whole(memory):
    sandbox = Bubblewrap(Limits(seconds=8.0, memory=memory * 2**20))
    for name in ("shared memory (System V)", "files in memory", "shared memory (POSIX)", "memory"):
        assert HOSTILE[name].contained(sandbox(HOSTILE[name].program))
    pages = HOSTILE["page tables"].program.replace("800", str(memory // 2))
    assert sandbox(pages).status == "memory limit"


@needs_sandbox
@pytest.mark.parametrize(
    ("call", "named"),
    [
        ("shmget", "share memory (System V)"),
        ("msgget", "make a message queue (System V)"),
        ("semget", "make semaphores (System V)"),
        ("memfd_create", "make a file in memory"),
        ("inotify_init1", "watch files"),
        ("socket", "open a socket"),
    ],
)
def test_a_hole_in_the_filter_closes_the_sandbox(monkeypatch, call, named):
    monkeypatch.delitem(seccomp._DENIED, call)
    with pytest.raises(SandboxClosed) as closed:
        Bubblewrap()
    assert named in str(closed.value)


@needs_sandbox
@pytest.mark.parametrize(
    ("lost", "named"),
    [
        ("nr_inodes", "an unbounded tmpfs"),
        ("size=", "an unbounded tmpfs"),
        ("--nproc", "start one thread too many"),
        ("--as", "lift its limits"),
        ("--fsize", "lift its limits"),
    ],
)
def test_a_limit_that_is_not_kept_closes_the_sandbox(monkeypatch, lost, named):
    """A prlimit or mount that takes the option and does nothing."""

    class Weak(Bubblewrap):
        def _outside(self, group):
            line = super()._outside(group)
            if lost in ("nr_inodes", "size="):
                parts = [part for part in line[-1].split(",") if not part.startswith(lost)]
                return [*line[:-1], ",".join(parts)]
            return [part for part in line if not part.startswith(lost)]

        def _inside(self, *handles):
            return [part for part in super()._inside(*handles) if not part.startswith(lost)]

    with pytest.raises(SandboxClosed) as closed:
        Weak()
    assert named in str(closed.value)


def fake_cgroups(folder, own="/user/me/shell", handed="memory pids", at="user/me"):
    """A cgroup tree of plain files whose folder ``at`` hands controllers on."""
    (folder / own.lstrip("/")).mkdir(parents=True)
    (folder / at).mkdir(parents=True, exist_ok=True)
    (folder / at / "cgroup.subtree_control").write_text(handed)
    (folder / at / "cgroup.procs").write_text("")
    mounts, name = folder / "mountinfo", folder / "own"
    mounts.write_text(f"30 20 0:1 / {folder} rw - cgroup2 cgroup rw\n")
    name.write_text(f"4:memory:/elsewhere\n0::{own}\n")
    return cgroup.Cgroups(str(mounts), str(name))


def test_a_cgroup_is_found_above_this_process_and_bounds_the_whole(tmp_path, monkeypatch):
    monkeypatch.setattr(cgroup, "_remove", lambda folder: removed.append(folder))
    removed = []
    found = fake_cgroups(tmp_path)
    assert found.parent == tmp_path / "user/me" and str(found).startswith("cgroup v2 in")
    limits = Limits(memory=1000, disk=24, processes=7)
    with found.one(limits) as folder:
        assert (folder / "memory.max").read_text() == "1024"
        assert (folder / "pids.max").read_text() == "11"
        assert not cgroup.ran_out_of_memory(folder)
        (folder / "memory.events").write_text("low 0\noom 1\noom_kill 1\n")
        assert cgroup.ran_out_of_memory(folder)
    assert removed == [folder] and folder.parent == found.parent


def test_without_a_cgroup_the_reason_is_said(tmp_path):
    other = fake_cgroups(tmp_path / "a", handed="cpu")
    assert other.parent is None and "hands on memory and pids" in str(other)
    above = fake_cgroups(tmp_path / "b", at=".")
    assert above.parent == tmp_path / "b"
    (tmp_path / "none").write_text("30 20 0:1 / /x rw - tmpfs tmpfs rw\n")
    none = cgroup.Cgroups(str(tmp_path / "none"), str(tmp_path / "none"))
    assert str(none) == "no cgroup (no cgroup v2 is mounted)"


@needs_sandbox
def test_a_cgroup_that_cannot_be_used_is_named_and_not_used(tmp_path, monkeypatch):
    """Plain files do not take a process: entering works, limiting does not."""
    broken = fake_cgroups(tmp_path)
    monkeypatch.setattr(bubblewrap, "Cgroups", lambda: broken)
    shutil.rmtree(broken.parent)
    sandbox = Bubblewrap()
    assert sandbox.cgroups.parent is None and "cannot be used" in sandbox.memory()
    assert sandbox("print(1)").stdout == "1\n"


@needs_sandbox
@pytest.mark.parametrize("small", [{"seconds": 0.01}, {"memory": 10 * 2**20}, {"output": 10}])
def test_limits_too_small_for_python_are_named(small):
    with pytest.raises(SandboxClosed, match="too small for Python itself"):
        Bubblewrap(Limits(**small))


@pytest.mark.parametrize("field", ["seconds", "memory", "disk", "output", "processes", "files"])
def test_limits_must_be_positive(field):
    with pytest.raises(ValueError, match=f"{field} must be above 0, got 0"):
        Limits(**{field: 0})
