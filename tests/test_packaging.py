"""The layout that keeps `import transformers` working, and the layers of the library."""

import importlib.util
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest
import torch

import kd
from kd.losses import chunks

ROOT = Path(__file__).resolve().parent.parent
SOURCE_ROOTS = ("kernels", "recipes", "benchmarks", "tests")


def test_no_folder_shadows_a_library():
    """kernels/__init__.py would break every transformers model; see pyproject.toml."""
    found = [f"{folder}/__init__.py" for folder in SOURCE_ROOTS]
    found = [name for name in found if (ROOT / name).exists()]
    nested = [str(p.relative_to(ROOT)) for p in (ROOT / "tests").rglob("__init__.py")]
    assert not found + nested


def test_no_script_takes_a_library_name():
    """`python DIR/x.py` puts DIR first on sys.path, where x would hide the library x."""
    libraries = {"datasets", "evaluate", "kernels", "tokenizers", "transformers", "profile"}
    libraries |= set(sys.stdlib_module_names) | {"torch", "triton", "accelerate", "numpy"}
    scripts = [p for folder in SOURCE_ROOTS for p in (ROOT / folder).glob("*.py")]
    assert not [p.name for p in scripts if p.stem in libraries]


def test_nothing_forks_a_process_that_has_used_threads():
    """Its child would wait for threads that do not exist; only sandboxed programs may try."""
    forks = re.compile(
        r"\bos\.fork\(|get_context\(\s*['\"]fork['\"]|set_start_method\(['\"]fork['\"]"
    )
    found = [
        f"{path.relative_to(ROOT)}:{number}"
        for folder in ("kd", *SOURCE_ROOTS)
        for path in (ROOT / folder).rglob("*.py")
        if "sandbox" not in path.parts and path != Path(__file__)
        for number, line in enumerate(path.read_text().splitlines(), 1)
        if forks.search(line)
    ]
    assert not found


@pytest.mark.slow
def test_every_process_collects_the_same_tests():
    """Names made of a clock or a hash differ between the processes that share the tests."""
    command = [sys.executable, "-m", "pytest", "--collect-only", "-q", "-p", "no:cacheprovider"]
    listed = []
    for seed in ("1", "2"):  # each takes seconds: the clock differs too
        run = subprocess.run(
            command, cwd=ROOT, capture_output=True, env={**os.environ, "PYTHONHASHSEED": seed}
        )
        listed.append([line for line in run.stdout.split(b"\n") if b"::" in line])
    assert listed[0] == listed[1] and len(listed[0]) > 4000


def test_fresh_memory_is_nan():
    """What conftest.py promises to every other test."""
    assert torch.empty(3).isnan().all() and torch.ones(2).new_empty(2, 2).isnan().all()
    large = chunks.empty((3 << 20,), torch.float32, torch.device("cpu"))
    assert large.isnan().all()


def test_import_needs_torch_alone():
    """Heavy libraries load on first use; `import kd` works where they are missing."""
    code = (
        "import sys\n"
        "for name in ('triton', 'transformers', 'datasets', 'safetensors', 'accelerate'):\n"
        "    sys.modules[name] = None\n"
        "import kd, torch\n"
        "z = torch.randn(2, 5, requires_grad=True)\n"
        "kd.forward_kl(z, torch.randn(2, 5)).backward()\n"
    )
    path = {"PYTHONPATH": f"{ROOT}:{ROOT / 'kernels'}", "PATH": ""}
    done = subprocess.run([sys.executable, "-c", code], env=path, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr


def test_help_does_not_wait_for_torch():
    code = "import sys, kd.cli; kd.cli.main(['--help']); print('torch' in sys.modules, kd.__all__)"
    path = {"PYTHONPATH": str(ROOT), "PATH": ""}
    done = subprocess.run([sys.executable, "-c", code], env=path, capture_output=True, text=True)
    assert done.stdout.splitlines()[-1].startswith("False ['Divergence'"), done.stderr
    assert "forward_kl" in dir(kd) and kd.forward_kl is kd.losses.forward_kl
    with pytest.raises(AttributeError, match="has no attribute 'backward_kl'"):
        _ = kd.backward_kl


def test_what_the_wheels_readmes_name_is_in_the_wheel():
    """Paths below recipes/ that a README of a package names lie inside a package."""
    named = set()
    for readme in [*(ROOT / "kd").rglob("README.md"), ROOT / "recipes" / "README.md"]:
        named |= set(re.findall(r"(?<!kd_)recipes/[\w./-]+\.(?:yaml|py)", readme.read_text()))
    assert named
    for name in named:
        assert name.startswith("recipes/kd_recipes/") and (ROOT / name).is_file(), name


def test_every_test_that_the_docs_name_exists():
    missing, named = [], 0
    for page in (p for p in ROOT.rglob("*.md") if ".venv" not in p.parts):
        for row in page.read_text().splitlines():
            file = ""
            for of_file, name, alone in re.findall(
                r"\b(test_\w+\.py)(?:::(test_\w+))?|::(test_\w+)", row
            ):
                file, name, named = of_file or file, name or alone, named + 1
                path = ROOT / "tests" / file
                if not path.is_file() or (name and f"def {name}(" not in path.read_text()):
                    missing.append(f"{page.relative_to(ROOT)}: {file}::{name}")
    assert named > 100 and not missing, missing


def test_import_adds_little_to_torch():
    """Measured as import-time self cost of kd's own modules, not wall time of a busy machine."""
    done = subprocess.run(
        [sys.executable, "-X", "importtime", "-c", "import torch, kd"],
        env={"PYTHONPATH": str(ROOT), "PATH": ""},
        capture_output=True,
        text=True,
    )
    lines = [line.split("|") for line in done.stderr.splitlines() if line.count("|") == 2]
    cumulative = {name.strip(): int(total) for _, total, name in lines if total.strip().isdigit()}
    assert cumulative["kd"] < 300_000  # microseconds


def test_imports_keep_to_the_layers():
    if importlib.util.find_spec("importlinter") is None:
        pytest.skip("import-linter is not installed")
    code = "import sys; from importlinter.cli import lint_imports; sys.exit(lint_imports())"
    path = os.pathsep.join(str(ROOT / part) for part in ("", "kernels", "recipes"))
    done = subprocess.run(
        [sys.executable, "-c", code],
        cwd=ROOT,
        env={**os.environ, "PYTHONPATH": path},
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stdout + done.stderr
