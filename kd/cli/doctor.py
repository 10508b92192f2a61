"""``kd doctor``: what this machine has, what kd will use, and why."""

from __future__ import annotations

import argparse
import json
import os
import platform
import shutil
from importlib import metadata
from typing import Any

PACKAGES = {
    "torch": "needed",
    "safetensors": "needed for caches",
    "transformers": "models, Trainer and recipes",
    "accelerate": "training",
    "datasets": "loading trace sets",
    "tyro": "recipe settings on the command line",
    "rich": "progress bars",
    "matplotlib": "plots in reports",
    "triton": "fused kernels on a GPU",
    "mpmath": "checking mathematical answers",
    "peft": "LoRA students",
    "deepspeed": "ZeRO-3",
    "openai": "asking servers",
    "vllm": "a teacher server",
}
OLDEST = {"torch": (2, 6), "transformers": (5, 11)}


def add_parser(subparsers: Any) -> None:
    """Add ``kd doctor``."""
    parser = subparsers.add_parser(
        "doctor",
        help="what this machine has, and what kd will use",
        description="Shows versions, devices and memory, what kd will use of them, and why.",
    )
    parser.add_argument("--json", action="store_true", help="print it as JSON, for a bug report")
    parser.set_defaults(run=run)


def run(args: argparse.Namespace) -> int:
    """Print the findings; the status is 1 when something needed is missing or too old."""
    found = findings()
    if args.json:
        print(json.dumps(found, indent=1))
    else:
        for section in ("machine", "packages", "will use"):
            print(section)
            for name, value in found[section].items():
                print(f"  {name:<14} {value}")
        for problem in found["problems"]:
            print(f"problem: {problem}")
        if not found["problems"]:
            print("ready: kd run quickstart")
    return 1 if found["problems"] else 0


def findings() -> dict[str, Any]:
    """Everything ``kd doctor`` knows, as a JSON-able dict."""
    versions = {name: _version(name) for name in PACKAGES}
    packages = {
        name: version or f"not installed ({PACKAGES[name]})" for name, version in versions.items()
    }
    return {
        "machine": _machine(),
        "packages": packages,
        "will use": _choices(versions),
        "problems": _problems(versions),
    }


def _version(package: str) -> str | None:
    try:
        return metadata.version(package)
    except metadata.PackageNotFoundError:
        return None


def _machine() -> dict[str, str]:
    import torch

    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()
    found = {
        "system": f"{platform.system()} {platform.machine()}, Python {platform.python_version()}",
        "cores": f"{cores}, torch uses {torch.get_num_threads()} threads",
    }
    if hasattr(os, "sysconf") and "SC_PHYS_PAGES" in os.sysconf_names:
        memory = os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
        found["memory"] = f"{memory / 2**30:.1f} GiB"
    found["disk"] = f"{shutil.disk_usage('.').free / 2**30:.1f} GiB free here"
    if not torch.cuda.is_available():
        found["gpu"] = "none that torch can use"
    for index in range(torch.cuda.device_count()):
        device = torch.cuda.get_device_properties(index)
        found[f"gpu {index}"] = (
            f"{device.name}, {device.total_memory / 2**30:.0f} GiB, "
            f"compute capability {device.major}.{device.minor}"
        )
    return found


def _choices(versions: dict[str, str | None]) -> dict[str, str]:
    import torch

    if not torch.cuda.is_available():
        backend = "torch (chunked, in place), because there is no GPU"
    elif versions["triton"] is None:
        backend = "torch (chunked), because triton is not installed"
    else:
        backend = "triton on the GPU, torch on the CPU"
    bf16 = torch.cuda.is_available() and torch.cuda.is_bf16_supported()
    precision = "bf16 on the GPU" if bf16 else "float32"
    return {"losses": backend, "precision": precision}


def _problems(versions: dict[str, str | None]) -> list[str]:
    problems = []
    for name, oldest in OLDEST.items():
        version = versions[name]
        wanted = ".".join(map(str, oldest))
        if version is None:
            problems.append(f"{name} is not installed. Fix: pip install '{name}>={wanted}'")
            continue
        parts = version.split("+")[0].split(".")
        if tuple(int(part) for part in parts[:2] if part.isdigit()) < oldest:
            problems.append(f"{name} {version} is too old. Fix: pip install '{name}>={wanted}'")
    for name in ("safetensors", "accelerate", "tyro", "rich", "matplotlib"):
        if versions[name] is None:
            problems.append(f"{name} is not installed. Fix: pip install 'kd-llm[recipes]'")
    return problems
