"""What a measurement was taken on: versions, the device's own ceilings, memory."""

from __future__ import annotations

import functools
import gc
import os
import platform
import re
import shlex
import subprocess
import time
from collections.abc import Sequence
from importlib import metadata
from pathlib import Path
from typing import Any

import torch

import kd

PACKAGES = (
    "torch",
    "triton",
    "transformers",
    "trl",
    "liger-kernel",
    "torchtune",
    "pytest-benchmark",
)


def synchronize(device: str) -> None:
    if device != "cpu":
        torch.cuda.synchronize()


def release(device: str) -> None:
    """Give back what a failed step left."""
    gc.collect()
    if device != "cpu":
        torch.cuda.empty_cache()


def device_name(device: str) -> str:
    """The name of a processor or card, as it says itself."""
    if device != "cpu":
        return torch.cuda.get_device_name()
    try:
        for line in Path("/proc/cpuinfo").read_text().splitlines():
            if line.startswith("model name"):
                return line.partition(":")[2].strip()
    except OSError:
        pass
    return platform.processor() or platform.machine()


def folder_name(device: str) -> str:
    """``device_name`` as the name of a folder, with the number of cores of a CPU."""
    text = re.sub(r"[^a-z0-9]+", "-", device_name(device).lower()).strip("-")
    return f"{text}-{torch.get_num_threads()}-cores" if device == "cpu" else text


def machine_info(device: str) -> dict[str, Any]:
    """Device, versions and commit: the first line of every table."""
    found: dict[str, Any] = {
        "kind": device,
        "device": device_name(device),
        "threads": torch.get_num_threads(),
        "memory_bytes": total_memory(device),
        "system": f"{platform.system()} {platform.machine()}",
        "python": platform.python_version(),
        "kd": kd.__version__,
        "commit": _commit(),
    }
    for package in PACKAGES:
        try:
            found[package] = metadata.version(package)
        except metadata.PackageNotFoundError:
            continue
    return found


def _commit() -> str:
    """The commit of the source tree, with + where it has been changed."""
    root = Path(__file__).parents[2]
    if not (root / ".git").exists():
        return ""
    try:
        command = ["git", "-C", str(root), "describe", "--always", "--dirty=+", "--exclude=*"]
        return subprocess.run(command, capture_output=True, text=True, check=True).stdout.strip()
    except (OSError, subprocess.CalledProcessError):
        return ""


def command_line(arguments: Sequence[str]) -> str:
    """pytest's command as one would type it: no absolute path of this machine is in it."""
    own = [re.sub(r"(^|=)/.*/", r"\1", argument) for argument in arguments]
    return shlex.join(["pytest", *own])


def line_of(info: dict[str, Any]) -> str:
    """One line that says where numbers come from."""
    parts = [str(info["device"]), f"{info['threads']} threads"]
    parts += [f"{name} {info[name]}" for name in ("python", *PACKAGES) if name in info]
    parts.append(f"kd {info['kd']}" + (f" ({info['commit']})" if info.get("commit") else ""))
    return ", ".join(parts)


def total_memory(device: str) -> int:
    if device != "cpu":
        return torch.cuda.get_device_properties(0).total_memory
    return os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")


def free_memory(device: str) -> int:
    """Bytes that can be had without pushing anything out."""
    if device != "cpu":
        return torch.cuda.mem_get_info()[0]
    try:
        text = Path("/proc/meminfo").read_text()
        match = re.search(r"MemAvailable:\s+(\d+) kB", text)
        return int(match.group(1)) * 1024 if match else total_memory(device)
    except OSError:
        return total_memory(device)


def best_seconds(function: Any, device: str, budget: float) -> float:
    """Fastest of the repetitions that fit a budget, at least three."""
    function()
    synchronize(device)
    best, deadline, runs = float("inf"), time.perf_counter() + budget, 0
    while runs < 3 or time.perf_counter() < deadline:
        started = time.perf_counter()
        function()
        synchronize(device)
        best = min(best, time.perf_counter() - started)
        runs += 1
    return best


def ceilings(device: str, dtype: str, budget: float = 1.0, size: int = 0) -> dict[str, float]:
    """What the device can do, measured now: a copy in bytes/s, and FLOP/s of its best matmul.

    The matmul is the faster of a square one and a wide one (an lm_head's), since a CPU's bf16 is
    much better at the second.
    """
    size = size or (2048 if device == "cpu" else 8192)
    source = torch.ones(8 * size * size, dtype=torch.float32, device=device)
    target = torch.empty_like(source)
    copy = functools.partial(target.copy_, source)
    copied = 2 * source.nbytes / best_seconds(copy, device, budget)
    del source, target, copy
    rates = []
    for rows, inner, columns in ((size, size, size), (size // 4, size // 2, 16 * size)):
        a = torch.ones(rows, inner, dtype=getattr(torch, dtype), device=device)
        b = torch.ones(columns, inner, dtype=a.dtype, device=device)
        out = torch.empty(rows, columns, dtype=a.dtype, device=device)
        multiply = functools.partial(torch.mm, a, b.T, out=out)
        rates.append(2 * rows * inner * columns / best_seconds(multiply, device, budget))
    return {"copy_bytes_per_second": copied, f"matmul_{dtype}_flops_per_second": max(rates)}
