"""Kernels compiled for GPUs that are not here: spills, access widths and counts against budgets.

Seen to fail on tiles of 8,192 columns (spills) and on column masks in a full segment (SASS).
"""

import json
import os
import pathlib
import subprocess
import sys

import pytest

ROOT = pathlib.Path(__file__).resolve().parent.parent
BUDGETS = ROOT / "tests" / "aot_budgets.json"


def checks(*arguments: str) -> subprocess.CompletedProcess:
    """The compile-time checks in their own process: here Triton may be in its interpreter."""
    environment = {k: v for k, v in os.environ.items() if k != "TRITON_INTERPRET"}
    command = [sys.executable, str(ROOT / "benchmarks" / "aot_table.py"), "--subset", *arguments]
    return subprocess.run(command, capture_output=True, text=True, env=environment)


@pytest.fixture(scope="module", autouse=True)
def tools():
    triton = pytest.importorskip("triton", reason="they compile with triton")
    folder = pathlib.Path(triton.__file__).parent / "backends" / "nvidia" / "bin"
    for name in ("ptxas", "cuobjdump", "nvdisasm"):
        if not (folder / name).exists():
            pytest.skip(f"this triton wheel has no {name}")
    recorded = json.loads(BUDGETS.read_text())["triton"]
    if triton.__version__.split(".")[:2] != recorded.split(".")[:2]:
        pytest.skip(f"budgets are triton {recorded}'s, this is {triton.__version__}")


def test_representative_variants():
    """No spills, 128-bit bulk accesses, memory-bound on sm_90, nothing over its budget."""
    done = checks("--check", str(BUDGETS))
    assert done.returncode == 0, done.stdout + done.stderr


def test_a_budget_exceeded_fails(tmp_path):
    budgets = json.loads(BUDGETS.read_text())
    name = "dense forward_kl bf16 128256 sm_90"
    budgets["variants"][name]["registers"] -= 1
    tight = tmp_path / "budgets.json"
    tight.write_text(json.dumps(budgets))
    done = checks("--only", "dense forward_kl bf16", "--check", str(tight))
    assert (
        done.returncode == 1 and "registers" in done.stdout and "exceeds its budget" in done.stdout
    )
