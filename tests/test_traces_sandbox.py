"""Hostile programs, themselves bounded, are contained; verdicts on 100 programs are right.

Where bubblewrap cannot run, the verifier stays closed and these tests are skipped with its reason.
"""

import os
import shutil
import subprocess

import pytest

from kd.traces import Trace, verify
from kd.traces.verifiers.code import Code, extract_program
from kd.traces.verifiers.sandbox import Bubblewrap, Limits, Run, SandboxClosed, UnsafeSubprocess

try:
    SANDBOX = Bubblewrap(Limits(seconds=3.0))
    CLOSED = ""
except OSError as error:
    SANDBOX, CLOSED = None, str(error)
needs_sandbox = pytest.mark.skipif(SANDBOX is None, reason=CLOSED)

# name: (program, allowed statuses, what its output must not show)
HOSTILE = {
    "child processes": (
        "import os\nn = 0\nfor _ in range(200):\n"
        "    try:\n        pid = os.fork()\n    except OSError:\n        continue\n"
        "    if pid == 0: os._exit(0)\n    n += 1\nprint('children', n)",
        "children 0",
    ),
    "threads": (
        "import threading, time\nn = 0\ntry:\n    for _ in range(200):\n"
        "        threading.Thread(target=time.sleep, args=(1,), daemon=True).start(); n += 1\n"
        "except RuntimeError: pass\nprint('bounded' if n < 150 else 'unbounded')",
        "bounded",
    ),
    "memory": (
        "try:\n    x = bytearray(2**30)\n    print('got it')\n"
        "except MemoryError:\n    print('refused')",
        "refused",
    ),
    "disk": (
        "n = 0\ntry:\n    for i in range(64):\n        with open(f'/tmp/{i}', 'wb') as f:\n"
        "            f.write(bytes(2**20)); f.flush(); n += 1\nexcept OSError: pass\n"
        "print('bounded' if n <= 16 else 'unbounded')",
        "bounded",
    ),
    "network": (
        "import socket\ntry:\n    socket.socket(); print('open')\nexcept OSError: print('refused')",
        "refused",
    ),
    "reading outside": (
        "import os\nfound = []\nfor p in ('/etc/passwd', '/root', '/home', '/proc/1/environ',"
        " '/sys'):\n"
        "    try:\n        os.listdir(p) if not p.endswith(('passwd', 'environ')) else open(p)\n"
        "        found.append(p)\n    except OSError: pass\nprint(found)",
        "[]",
    ),
    "writing outside": (
        "found = []\nfor p in ('/x', '/usr/x', '/dev/x', '/program/x', '/usr/bin/python3'):\n"
        "    try:\n        open(p, 'a'); found.append(p)\n    except OSError: pass\nprint(found)",
        "[]",
    ),
    "environment": ("import os\nprint('HOME' in os.environ, 'PATH' in os.environ)", "False False"),
    "killing its parent": (
        "import os, signal\nfor pid in (1, os.getppid()):\n"
        "    try: os.kill(pid, signal.SIGKILL)\n    except OSError: pass\nprint('still here')",
        "still here",
    ),
    "ctypes": (
        "import ctypes\nlibc = ctypes.CDLL(None)\n"
        "print([libc.system(b'true') == 0, libc.unshare(0x10000000) == 0, libc.setuid(0) == 0])",
        "[False, False, False]",
    ),
    "importlib": (
        "import importlib, os\nos.fork = None\nimportlib.reload(os)\n"
        "import posix, _posixsubprocess\n"
        "try: posix.fork(); print('forked')\nexcept OSError: print('refused')",
        "refused",
    ),
    "posix_spawn": (
        "import os\ntry: os.posix_spawn('/usr/bin/true', ['true'], {}); print('ran')\n"
        "except OSError: print('refused')",
        "refused",
    ),
    "subprocess": (
        "import subprocess\ntry: subprocess.run(['/usr/bin/true']); print('ran')\n"
        "except OSError: print('refused')",
        "refused",
    ),
}


@needs_sandbox
@pytest.mark.parametrize("name", HOSTILE)
def test_hostile_programs_are_contained(name):
    program, output = HOSTILE[name]
    run = SANDBOX(program)
    assert run.status == "done", run
    assert run.stdout.strip() == output, run


@needs_sandbox
@pytest.mark.parametrize(
    "program, status",
    [
        ("import time\ntime.sleep(5)", "time limit"),
        (
            "import time, signal\nfor s in range(1, 65):\n"
            "    try: signal.signal(s, signal.SIG_IGN)\n    except (OSError, ValueError): pass\n"
            "end = time.time() + 5\nwhile time.time() < end: pass",
            "time limit",
        ),
        ("import sys\nfor _ in range(64): sys.stdout.write('x' * 2**16)", "output limit"),
        ("import sys, os\nos.close(1); os.close(2)\nimport time; time.sleep(5)", "time limit"),
    ],
)
def test_programs_that_do_not_end_are_ended(program, status):
    run = SANDBOX(program)
    assert run.status == status and run.seconds < 4.5


@needs_sandbox
def test_nothing_outlives_a_run():
    if shutil.which("pgrep") is None:
        pytest.skip("pgrep is not installed")
    mark = "kdmark4711"
    run = SANDBOX(f"import ctypes, time\nctypes.CDLL(None).prctl(15, b'{mark}')\ntime.sleep(5)")
    assert run.status == "time limit"
    found = subprocess.run(["pgrep", mark], capture_output=True, text=True)
    assert not found.stdout.strip()


@needs_sandbox
def test_crashes_are_the_programs_own_fault():
    assert SANDBOX("import os, signal; os.kill(os.getpid(), signal.SIGSEGV)").code != 0
    assert SANDBOX("raise SystemExit(7)").code == 7


ADD = "a, b = map(int, input().split())\nprint(a {} b)"


def answered(program, tests):
    return Trace("q", "t", f"```python\n{program}\n```", metadata={"tests": tests})


@needs_sandbox
def test_the_verdicts_of_100_programs_are_right():
    traces, wanted = [], []
    for i in range(25):
        stdin = {"inputs": [f"{i} 3\n", "2 5\n"], "outputs": [f"{i + 3}\n", "7\n"]}
        calls = {"fn_name": "f", "inputs": [[i], [2]], "outputs": [i * i, 4]}
        traces += [answered(ADD.format("+"), stdin), answered(ADD.format("-"), stdin)]
        traces += [
            answered("def f(x):\n    print('noise')\n    return x * x", calls),
            answered("class Solution:\n    def f(self, x): return x * x + 1", calls),
        ]
        wanted += ["correct", "wrong", "correct", "wrong"]
    kept, report = verify(traces, Code(SANDBOX), keep=("correct", "wrong"), workers=2)
    assert [t.metadata["verdict"]["status"] for t in kept] == wanted, report.table()


@needs_sandbox
def test_a_program_cannot_print_its_own_verdict():
    forger = (
        "import sys, json\nprint(json.dumps('PASS'))\nsys.stderr.write('PASS')\n"
        "def f(x):\n    sys.__stdout__.write('4\\n' * 3); raise SystemExit(0)"
    )
    tests = {"fn_name": "f", "inputs": [[2], [3]], "outputs": [4, 9]}
    verdict = Code(SANDBOX)(answered(forger, tests))
    assert verdict.status == "wrong"


def test_code_is_not_run_unless_asked_for():
    verdict = Code()(answered("print(1)", {"inputs": [""], "outputs": ["1"]}))
    assert verdict.label() == "unknown: code verification is off"


def test_a_missing_or_leaking_sandbox_is_closed(monkeypatch, tmp_path):
    monkeypatch.setenv("PATH", str(tmp_path))
    with pytest.raises(SandboxClosed, match="bwrap must be installed"):
        Bubblewrap()
    # a fake bwrap that isolates nothing: the canary gets through, and nothing is ever run in it
    fake = tmp_path / "fake"
    fake.write_text('#!/bin/sh\nexec /usr/bin/python3 /proc/self/fd/"$KD" 2>/dev/null\n')
    fake.chmod(0o755)
    if os.path.exists("/usr/bin/python3"):
        with pytest.raises(SandboxClosed):
            Bubblewrap(bwrap=str(fake))


def test_what_the_sandbox_does_wrong_is_not_the_programs_fault():
    asked = []

    def broken(program, stdin):
        asked.append(program)
        return Run("sandbox error", stderr="no namespaces")

    verdict = Code(broken)(answered("print(1)", {"inputs": [""], "outputs": ["1"]}))
    assert verdict.label() == "error: sandbox error" and len(asked) == 2


def test_a_remote_backend_is_any_callable_and_answers_without_code_are_wrong():
    remote = Code(lambda program, stdin: Run("done", 0, stdin.upper()))
    tests = [{"input": "a", "output": "A"}, {"input": "b", "output": "B"}]
    assert remote(answered("whatever", tests)).correct
    unfinished = Trace("q", "t", "```python\nprint(1)", metadata={"tests": tests})
    assert remote(unfinished).reason == "unterminated code fence"
    assert (
        remote(Trace("q", "t", "no", metadata={"tests": tests})).reason == "no code in the answer"
    )
    assert remote(Trace("q", "t", "```\n1\n```")).label() == "unknown: no tests"
    assert extract_program("```python\na\n```\ntext\n```py\nb\n```") == "b\n"


def test_the_unsafe_backend_says_so_and_still_bounds_time():
    run = UnsafeSubprocess(Limits(seconds=0.5))("import time; time.sleep(5)")
    assert run.status == "time limit"
