"""What a measurement was taken on: versions, the device's own ceilings, memory."""

from __future__ import annotations

import gc
import os
import platform
import re
import shlex
from collections.abc import Callable, Sequence
from importlib import metadata
from pathlib import Path
from typing import Any

import psutil
import torch
from torch.utils.benchmark import Timer

import kd

PACKAGES = ("torch", "triton", "transformers", "trl", "liger-kernel", "torchtune")


def version_of(package: str | None) -> str | None:
    """Installed version of a package, None where it is not installed; "" for torch and kd."""
    if package is None:
        return ""
    try:
        return metadata.version(package)
    except metadata.PackageNotFoundError:
        return None


def synchronize(device: str) -> None:
    if device != "cpu":
        torch.cuda.synchronize()


def release(device: str) -> None:
    """Give back what the step before has left."""
    gc.collect()
    if device != "cpu":
        torch.cuda.empty_cache()


def one_card() -> str:
    """The first of the cards that may be used: trainers would spread over all."""
    return os.environ.get("CUDA_VISIBLE_DEVICES", "0").split(",")[0]


def free_memory(device: str) -> int:
    """Bytes that can be had without pushing anything out."""
    return psutil.virtual_memory().available if device == "cpu" else torch.cuda.mem_get_info()[0]


def device_name(device: str) -> str:
    """The name of a processor or card, as it says itself."""
    if device != "cpu":
        return torch.cuda.get_device_name()
    path = Path("/proc/cpuinfo")
    named = re.search(r"model name\s*: (.*)", path.read_text() if path.exists() else "")
    return named[1].strip() if named else platform.processor() or platform.machine()


def folder_name(device: str) -> str:
    """``device_name`` as the name of a folder, with the number of threads of a CPU."""
    text = re.sub(r"[^a-z0-9]+", "-", device_name(device).lower()).strip("-")
    return f"{text}-{torch.get_num_threads()}-cores" if device == "cpu" else text


def machine_info(device: str, commit: str = "") -> dict[str, Any]:
    """Device and versions, for the first line of every table."""
    found: dict[str, Any] = {
        "kind": device,
        "device": device_name(device),
        "threads": torch.get_num_threads(),
        "system": f"{platform.system()} {platform.machine()}",
        "python": platform.python_version(),
        "kd": kd.__version__,
        "commit": commit,
    }
    versions = {package: version_of(package) for package in PACKAGES}
    return found | {package: version for package, version in versions.items() if version}


def line_of(info: dict[str, Any]) -> str:
    """One line that says where numbers come from."""
    parts = [str(info["device"]), f"{info['threads']} threads"]
    parts += [f"{name} {info[name]}" for name in ("python", *PACKAGES) if name in info]
    parts.append(f"kd {info['kd']}" + (f" ({info['commit']})" if info["commit"] else ""))
    return ", ".join(parts)


def command_line(arguments: Sequence[str]) -> str:
    """pytest's command as one would type it: no absolute path of this machine is in it."""
    own = [re.sub(r"(^|=)/.*/", r"\1", argument) for argument in arguments]
    return shlex.join(["pytest", *own])


def ceilings(device: str, dtype: str, budget: float) -> dict[str, float]:
    """What the device can do, measured now: a copy in bytes/s, and FLOP/s of its best matmul.

    The matmul is the faster of a square one and a wide one (an lm_head's), since a CPU's bf16 is
    much better at the second. ``budget`` is seconds for each of the three.
    """

    def fastest(function: Callable[..., Any], *arguments: Any, **options: Any) -> float:
        given = {"function": function, "arguments": arguments, "options": options}
        timer = Timer(  # it waits for the device
            "function(*arguments, **options)", globals=given, num_threads=torch.get_num_threads()
        )
        return min(timer.blocked_autorange(min_run_time=budget).times)

    size = 2048 if device == "cpu" else 8192
    source = torch.ones(8 * size * size, dtype=torch.float32, device=device)
    target = torch.empty_like(source)
    copied = 2 * source.nbytes / fastest(target.copy_, source)
    del source, target
    rates = []
    for rows, inner, columns in ((size, size, size), (size // 4, size // 2, 16 * size)):
        a = torch.ones(rows, inner, dtype=getattr(torch, dtype), device=device)
        b = torch.ones(columns, inner, dtype=a.dtype, device=device)
        out = torch.empty(rows, columns, dtype=a.dtype, device=device)
        rates.append(2 * rows * inner * columns / fastest(torch.mm, a, b.T, out=out))
    return {"copy_bytes_per_second": copied, f"matmul_{dtype}_flops_per_second": max(rates)}
