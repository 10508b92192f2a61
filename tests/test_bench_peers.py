"""The peers' Triton kernels give the oracle's numbers, run in Triton's interpreter."""

import importlib.util
import json
import os
import subprocess
import sys

import pytest

from kd_bench import runner
from kd_bench.peers import TRITON_PEERS, add_peers_to_path, version_of
from kd_bench.shapes import SMOKE_SHAPES

SCRIPT = """
import json, sys, torch
from kd_bench.inputs import errors, exact_answer, make_inputs
from kd_bench.peers import TRITON_PEERS, add_peers_to_path
from kd_bench.shapes import SMOKE_SHAPES

add_peers_to_path()
(made,) = [made for made in TRITON_PEERS if made.name == sys.argv[1]]
suite, divergence = made.suites[0], sys.argv[2]
inputs = make_inputs(suite, SMOKE_SHAPES["smoke"], torch.float32)
answer = made.build(suite, divergence, inputs)()
print(json.dumps(errors(suite, answer, exact_answer(suite, divergence, inputs))))
"""
CASES = [
    (made.name, name)
    for made in TRITON_PEERS
    for name in ("forward_kl", "reverse_kl", "jsd(0.25)")
    if made.takes(made.suites[0], name) and (made.divergences or name == "forward_kl")
]


def test_on_a_cpu_they_are_rows_that_say_they_need_a_gpu(monkeypatch):
    monkeypatch.setattr(runner, "version_of", lambda package: "1.0")
    for made in TRITON_PEERS:
        group = runner.Group(made.suites[0], SMOKE_SHAPES["smoke"], "float32")
        assert runner._new_row(group, made, "cpu")["skipped"].startswith("needs a GPU")
        monkeypatch.setattr(runner.machine, "free_memory", lambda device: 1 << 40)
        assert "skipped" not in runner._new_row(group, made, "cuda")


@pytest.mark.slow
@pytest.mark.parametrize(("name", "divergence"), CASES)
def test_answer_is_the_oracles(name, divergence):
    add_peers_to_path()
    (made,) = [made for made in TRITON_PEERS if made.name == name]
    if version_of(made.package) is None or importlib.util.find_spec("triton") is None:
        pytest.skip(f"{made.package} or triton is not installed")
    if name == "liger kl_div":
        pytest.skip("its kernel calls a method of a scalar that the interpreter passes as a float")
    path = os.pathsep.join(folder for folder in sys.path if folder)
    done = subprocess.run(
        [sys.executable, "-c", SCRIPT, name, divergence],
        env={**os.environ, "TRITON_INTERPRET": "1", "PYTHONPATH": path},
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stderr[-2000:]
    found = json.loads(done.stdout.splitlines()[-1])
    assert found["value_error"] < 1e-5 and found["grad_error"] < 1e-4
