"""A divergence is everywhere: oracle, kernels, README, benchmarks, public names.

And the walk-through of CONTRIBUTING.md that adds one is what it says.
"""

import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import kernel_cases  # noqa: F401  before any kernel
import pytest
import torch
from loss_cases import DIVERGENCES

import kd
from kd.losses.divergences import DEFINITIONS
from kd.losses.oracle import divergence_of
from kd_bench import plain

ROOT = Path(__file__).parents[1]
DIFF = re.search(r"```diff\n(.*?)```", (ROOT / "CONTRIBUTING.md").read_text(), re.DOTALL)


@pytest.mark.parametrize("name", DEFINITIONS)
def test_every_divergence_is_everywhere(name):
    assert name in kd.__all__
    tried = [d for d in DIVERGENCES.values() if d.name == name]
    algebra = (ROOT / "kernels" / "kd_kernels" / "algebra.py").read_text()
    log_p, log_q = torch.randn(2, 5, dtype=torch.float64).log_softmax(-1)
    for d in tried:
        assert f'"{d.kernel}"' in algebra, f"kd_kernels.algebra.terms has no branch {d.kernel}"
        exact = divergence_of(d, log_p, log_q, None)
        twin = plain.divergence_of(d, log_p[None], log_q[None])
        torch.testing.assert_close(exact, twin[0])
    assert tried, "tests/loss_cases.py tries every divergence"
    assert f"| `kd.{name}" in (ROOT / "README.md").read_text(), "readme_table.py --write"


def test_the_same_divergences_are_everywhere():
    assert plain.TWINS.keys() == DEFINITIONS.keys() == {d.name for d in DIVERGENCES.values()}


def copy_of_the_tree(folder: Path) -> Path:
    for part in ("kd", "kernels", "benchmarks", "tests"):
        ignored = shutil.ignore_patterns("__pycache__", "results")
        shutil.copytree(ROOT / part, folder / part, ignore=ignored)
    for file in ("README.md", "CONTRIBUTING.md", "pyproject.toml"):
        shutil.copy(ROOT / file, folder)
    return folder


def run(folder: Path, *command: str) -> subprocess.CompletedProcess:
    path = os.pathsep.join(str(folder / part) for part in (".", "kernels", "benchmarks", "tests"))
    env = {**os.environ, "PYTHONPATH": path, "TRITON_INTERPRET": "1"}
    return subprocess.run(command, cwd=folder, env=env, capture_output=True, text=True)


def apply(folder: Path, without: str = "") -> None:
    assert DIFF is not None
    parts = re.split(r"(?=^diff --git )", DIFF.group(1), flags=re.MULTILINE)
    kept = "".join(part for part in parts if part and not (without and without in part.split()[2]))
    done = subprocess.run(
        ["git", "apply", "--verbose"], cwd=folder, input=kept, capture_output=True, text=True
    )
    assert done.returncode == 0, f"CONTRIBUTING.md's diff no longer applies: {done.stderr}"
    table = run(folder, sys.executable, "-c", WRITE_TABLE)
    assert table.returncode == 0, table.stderr


WRITE_TABLE = """
from pathlib import Path
import readme_table
from kd_bench import tables
readme = Path("README.md")
marks = (readme_table.MARK.format("divergences", side) for side in ("begin", "end"))
text = tables.put_between(readme, readme.read_text(), *marks, readme_table.divergences())
readme.write_text(text)
"""
TESTS = [
    "tests/test_losses_registry.py",
    "tests/test_losses_oracle.py::test_float64_agrees_with_the_oracle",
    "tests/test_kernel_dense.py::test_every_divergence",
    "tests/test_kernel_sparse.py",
]


def test_the_walk_through_adds_a_divergence(tmp_path):
    """Applied as it is printed: every form agrees with the oracle, in torch and by the kernels."""
    folder = copy_of_the_tree(tmp_path)
    apply(folder)
    done = run(folder, sys.executable, "-m", "pytest", "-q", "-k", "hellinger", *TESTS)
    assert done.returncode == 0 and " passed" in done.stdout, done.stdout[-3000:]


@pytest.mark.slow
@pytest.mark.parametrize("forgotten", ["divergences.py", "oracle.py", "algebra.py", "plain.py"])
def test_a_part_that_is_forgotten_fails(tmp_path, forgotten):
    folder = copy_of_the_tree(tmp_path)
    apply(folder, without=forgotten)
    done = run(folder, sys.executable, "-m", "pytest", "-q", "-k", "everywhere", TESTS[0])
    assert done.returncode == 1, done.stdout[-3000:]
