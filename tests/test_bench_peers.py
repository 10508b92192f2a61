"""The peers' Triton kernels give the oracle's numbers, run in Triton's interpreter."""

import importlib.util
import json
import os
import subprocess
import sys

import pytest

from kd_bench.machine import version_of
from kd_bench.peers import PEERS
from kd_bench.suite import add_peers_to_path

SCRIPT = """
import json, sys
import bench_losses
from kd_bench.suite import SMOKE, Problem, add_peers_to_path

add_peers_to_path()
suite = next(s for s in bench_losses.SUITES if s.name == sys.argv[1])
peer = next(i for i in suite.implementations if i.name == sys.argv[2])
problem = Problem(suite, SMOKE, sys.argv[4], sys.argv[3])
inputs = suite.inputs(problem)
print(json.dumps(suite.errors(peer.build(problem, inputs)(), suite.truth(problem, inputs))))
"""
CASES = [
    (suite, peer, divergence)
    for suite, found in PEERS.items()
    for peer in found
    if peer.needs_gpu
    for divergence in ("forward_kl", "reverse_kl", "jsd(0.25)")
    if divergence.partition("(")[0] in (peer.divergences or ("forward_kl",))
]


@pytest.mark.slow
@pytest.mark.parametrize(
    ("suite", "peer", "divergence"), CASES, ids=[f"{p.name}-{d}" for _, p, d in CASES]
)
def test_answer_is_the_oracles(suite, peer, divergence):
    add_peers_to_path()
    if version_of(peer.package) is None or importlib.util.find_spec("triton") is None:
        pytest.skip(f"{peer.package} or triton is not installed")
    if peer.name == "liger kl_div":
        pytest.skip("its kernel calls a method of a scalar that the interpreter passes as a float")
    if peer.name == "cut cross-entropy":
        pytest.skip("it passes None where the interpreter wants a tensor; no run has checked it")
    path = os.pathsep.join(folder for folder in sys.path if folder)
    done = subprocess.run(
        [sys.executable, "-c", SCRIPT, suite, peer.name, divergence, "float32"],
        env={**os.environ, "TRITON_INTERPRET": "1", "PYTHONPATH": path},
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stderr[-2000:]
    value, worst = json.loads(done.stdout.splitlines()[-1])
    assert value < 1e-5 and worst < 1e-4
