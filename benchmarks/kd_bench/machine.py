"""What a measurement was taken on: versions, the device's own ceilings, memory."""

from __future__ import annotations

import functools
import os
import platform
import re
import shlex
import subprocess
import sys
import threading
import time
from importlib import metadata
from pathlib import Path
from typing import Any

import torch

import kd

PACKAGES = ("torch", "triton", "transformers", "trl", "liger-kernel", "torchtune")


def synchronize(device: str) -> None:
    if device != "cpu":
        torch.cuda.synchronize()


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


def command_line(argv: list[str] | None = None) -> str:
    """The command that is running, as one would type it: no path of this machine is in it."""
    program, *arguments = sys.argv if argv is None else argv
    if Path(program).name == "__main__.py":
        words = ["python", "-m", Path(program).parent.name]
    elif program.endswith(".py"):
        words = ["python", _own_name(program)]
    else:
        words = [Path(program).name]
    for argument in arguments:
        option, equals, value = argument.partition("=")
        if equals and option.startswith("-"):
            words.append(f"{option}={_own_name(value)}")
        else:
            words.append(_own_name(argument))
    return shlex.join(words)


def _own_name(argument: str) -> str:
    """A path below the working folder or the source tree relative to it; another, its name."""
    path = Path(argument)
    if not path.is_absolute():
        return argument
    for base in (Path.cwd(), Path(__file__).parents[2]):
        if path.is_relative_to(base):
            return str(path.relative_to(base))
    return path.name


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


class PeakMemory:
    """How far memory rose inside a ``with`` block: ``extra`` bytes.

    On a GPU the allocator's own peak. On Linux the kernel's high-water mark of resident memory,
    reset at the start; elsewhere a thread that looks every two milliseconds.
    """

    def __init__(self, device: str) -> None:
        self.device, self.extra = device, 0
        self._sampler: _Sampler | None = None

    def __enter__(self) -> PeakMemory:
        if self.device != "cpu":
            torch.cuda.synchronize()
            torch.cuda.reset_peak_memory_stats()
            self.before = torch.cuda.memory_allocated()
            return self
        try:
            Path("/proc/self/clear_refs").write_text("5")
        except OSError:
            self._sampler = _Sampler()
        self.before = resident("VmRSS")
        return self

    def __exit__(self, *exception: object) -> None:
        if self.device != "cpu":
            self.extra = torch.cuda.max_memory_allocated() - self.before
        elif self._sampler is not None:
            self.extra = self._sampler.stop() - self.before
        else:
            self.extra = resident("VmHWM") - self.before


class _Sampler(threading.Thread):
    def __init__(self) -> None:
        super().__init__(daemon=True)
        self.peak, self._done = 0, threading.Event()
        self.start()

    def run(self) -> None:
        while not self._done.wait(0.002):
            self.peak = max(self.peak, resident("VmRSS"))

    def stop(self) -> int:
        self._done.set()
        self.join()
        return max(self.peak, resident("VmRSS"))


def resident(field: str) -> int:
    """VmRSS or VmHWM of this process in bytes."""
    try:
        match = re.search(rf"{field}:\s+(\d+) kB", Path("/proc/self/status").read_text())
        return int(match.group(1)) * 1024 if match else 0
    except OSError:
        import resource

        unit = 1 if sys.platform == "darwin" else 1024
        return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit


def best_seconds(function: Any, device: str, budget: float = 1.0) -> float:
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


def ceilings(device: str, dtypes: tuple[str, ...], size: int = 0) -> dict[str, float]:
    """What the device can do, measured now: a copy in bytes/s, and FLOP/s of its best matmul.

    The matmul is the faster of a square one and a wide one (an lm_head's), since a CPU's bf16 is
    much better at the second.
    """
    size = size or (2048 if device == "cpu" else 8192)
    source = torch.ones(8 * size * size, dtype=torch.float32, device=device)
    target = torch.empty_like(source)
    seconds = best_seconds(functools.partial(target.copy_, source), device)
    found = {"copy_bytes_per_second": 2 * source.numel() * 4 / seconds}
    del source, target
    for name in dtypes:
        key = f"matmul_{name}_flops_per_second"
        for rows, inner, columns in ((size, size, size), (size // 4, size // 2, 16 * size)):
            a = torch.ones(rows, inner, dtype=getattr(torch, name), device=device)
            b = torch.ones(columns, inner, dtype=a.dtype, device=device)
            out = torch.empty(rows, columns, dtype=a.dtype, device=device)
            seconds = best_seconds(functools.partial(torch.mm, a, b.T, out=out), device)
            found[key] = max(found.get(key, 0.0), 2 * rows * inner * columns / seconds)
    return found
