"""Machine code of a launch on a GPU that is not here: compiled as it stands, and counted.

The launchers themselves run, on meta tensors, and their launches are compiled with the same tile
shapes and the same alignment of arguments. SASS and MUFU an element are static counts over the
loops that read logits (the whole kernel where it has none), divided by the elements that a thread
reads there. Needs triton alone.
"""

from __future__ import annotations

import dataclasses
import itertools
import os
import pathlib
import re
import subprocess
import tempfile
from typing import Any

os.environ.pop("TRITON_INTERPRET", None)

import torch  # noqa: E402
import triton  # noqa: E402
from triton.backends.compiler import GPUTarget  # noqa: E402
from triton.compiler import ASTSource  # noqa: E402
from triton.runtime.jit import JITFunction  # noqa: E402

from aot_cases import Case  # noqa: E402
from kd_kernels.launch import Target, compiling_for  # noqa: E402

ARCHES = ("sm_80", "sm_90", "sm_100", "gfx942")
LOAD, STORE = 0, 1
SASS_PER_BYTE, MUFU_PER_BYTE = 9.87, 1.23
TYPES = {
    torch.bfloat16: "bf16", torch.float16: "fp16", torch.float32: "fp32",
    torch.int64: "i64", torch.int32: "i32", torch.uint8: "u8",
}  # fmt: skip


@dataclasses.dataclass
class Report:
    """What the machine code of one launch says."""

    registers: int = 0
    spills: int = 0  # bytes of stack, or spilled registers
    shared: int = 0
    blocks: int = 0  # resident on one multiprocessor
    width: int = 0  # narrowest bulk access, bits
    sass: float = 0.0
    mufu: float = 0.0
    clusters: int = 1
    bytes: float = 0.0  # an element, read and written


def gpu_target(arch: str) -> tuple[GPUTarget, Target]:
    if arch.startswith("gfx"):
        return GPUTarget("hip", arch, 64), Target("hip")
    number = int(arch.removeprefix("sm_"))
    return GPUTarget("cuda", number, 32), Target("cuda", number)


def capture(case: Case, target: Target) -> tuple[Any, dict[str, Any], dict[str, Any]]:
    """(kernel, arguments by name, options) of the case's main launch on the target."""
    launches = []

    def record(self, *args, grid, warmup, **kwargs):
        launches.append((self, args, kwargs))

    original, JITFunction.run = JITFunction.run, record
    try:
        with compiling_for(target):
            case.launch()
    finally:
        JITFunction.run = original
    named = [launch for launch in launches if launch[0].fn.__name__.startswith(case.kernel)]
    kernel, args, kwargs = named[-1]
    values = dict(zip(kernel.arg_names, args, strict=False))
    values |= {k: v for k, v in kwargs.items() if k in kernel.arg_names}
    return kernel, values, {k: v for k, v in kwargs.items() if k not in kernel.arg_names}


def source(kernel: Any, values: dict[str, Any]) -> ASTSource:
    """The launch's signature, specialised as Triton's own launcher would."""
    signature, constants, attributes = {}, {}, {}
    for index, parameter in enumerate(kernel.params):
        value = values[parameter.name]
        if parameter.is_constexpr or value is None or (type(value) is int and value == 1):
            signature[parameter.name] = "constexpr"
            constants[(index,)] = value
            continue
        if isinstance(value, torch.Tensor):
            signature[parameter.name] = "*" + TYPES[value.dtype]
            aligned = value.storage_offset() * value.dtype.itemsize % 16 == 0
        elif isinstance(value, float):
            signature[parameter.name], aligned = "fp32", False
        else:
            signature[parameter.name] = "i32" if -(2**31) <= value < 2**31 else "i64"
            aligned = value % 16 == 0
        if aligned:
            attributes[(index,)] = [["tt.divisibility", 16]]
    return ASTSource(kernel, signature, constants, attributes)


def measure(case: Case, arch: str) -> Report:
    gpu, target = gpu_target(arch)
    kernel, values, options = capture(case, target)
    compiled = triton.compile(source(kernel, values), target=gpu, options=options)
    warps = options.get("num_warps", 4)
    report = Report(shared=compiled.metadata.shared, clusters=options.get("num_ctas", 1))
    report.bytes = case.one_read_bytes if report.clusters > 1 else case.bytes
    if gpu.backend == "hip":
        _read_amd(report, compiled.asm["amdgcn"], case)
    else:
        _read_nvidia(report, compiled.asm["cubin"], case)
        threads = 32 * warps
        by_registers = 65536 // (-(-report.registers // 8) * 8 * threads)
        by_shared = (227 << 10) // max(1, report.shared + 1024)
        report.blocks = min(by_registers, by_shared, 2048 // threads, 32)
    return report


def _tool(name: str) -> str:
    folder = pathlib.Path(triton.__file__).parent / "backends" / "nvidia" / "bin"
    return str(folder / name)


def _read_nvidia(report: Report, cubin: bytes, case: Case) -> None:
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(cubin)
        file.flush()
        usage = _run(_tool("cuobjdump"), "-res-usage", file.name)
        listing = _run(_tool("nvdisasm"), "-c", file.name)
    report.registers = int(re.findall(r"REG:(\d+)", usage)[-1])
    report.spills = int(re.findall(r"STACK:(\d+)", usage)[-1])
    label, instruction = r"\s*(\.L_x?_?\w+):", r"\s*/\*[0-9a-f]{4,}\*/\s+(.*?);"
    jump = r"\bBRA\b.*`\((\.L\w+)\)"
    _count(report, listing, case, (label, instruction, jump), _bits)


def _read_amd(report: Report, assembly: str, case: Case) -> None:
    report.registers = int(re.findall(r"\.vgpr_count:\s+(\d+)", assembly)[-1])
    report.spills = int(re.findall(r"\.vgpr_spill_count:\s+(\d+)", assembly)[-1])
    label, instruction, jump = (
        r"(\.LBB\w+):",
        r"\t([a-z]\w+(?:\s.*)?)",
        r"s_c?branch\w*\s+(\.LBB\w+)",
    )
    _count(report, assembly, case, (label, instruction, jump), _amd_bits)


def _count(report: Report, text: str, case: Case, patterns: tuple[str, ...], bits: Any) -> None:
    """Instructions an element over the loops that read logits, and the narrowest bulk access."""
    label, instruction, jump = patterns
    code, labels, loops = [], {}, []
    for line in text.splitlines():
        if found := re.match(label, line):
            labels[found[1]] = len(code)
        if found := re.match(instruction, line):
            code.append(found[1])
    for end, line in enumerate(code):
        found = re.search(jump, line)
        if found and labels[found[1]] <= end:
            loops.append(code[labels[found[1]] : end + 1])
    loops = [loop for loop in loops if any(bits(line, LOAD) >= 32 for line in loop)]
    widths = []
    uneven = len(case.loop_bytes) == len(loops)
    sizes = iter(case.loop_bytes) if uneven and loops else itertools.repeat(case.read_bytes)
    for region in loops or [code]:
        loads = [b for b in (bits(line, LOAD) for line in region) if b]
        bulk = [b for b in loads if b >= (32 if loops else case.bulk)] or loads
        widths += bulk + [
            b for b in (bits(line, STORE) for line in region) if b > (32 if loops else 64)
        ]
        elements = sum(bulk) / 8 / next(sizes)
        report.sass += len([line for line in region if "NOP" not in line]) / elements
        report.mufu += sum("MUFU" in line for line in region) / elements
    report.width = min(widths, default=0)


def _bits(instruction: str, kind: int) -> int:
    """Width in bits of an NVIDIA global load or store; 0 for other instructions."""
    found = re.search(rf"\b{('LDG', 'STG')[kind]}\.([\w.]+)", instruction)
    if not found:
        return 0
    parts = found[1].split(".")
    named = {"256": 256, "128": 128, "64": 64, "U16": 16, "S16": 16, "U8": 8, "S8": 8}
    return next((named[part] for part in parts if part in named), 32)


def _amd_bits(instruction: str, kind: int) -> int:
    """Width in bits of an AMD global load or store; 0 for other instructions."""
    found = re.match(rf"(?:global|buffer)_{('load', 'store')[kind]}_(\w+)", instruction)
    if not found:
        return 0
    named = {"dwordx4": 128, "dwordx3": 96, "dwordx2": 64, "dword": 32, "ubyte": 8, "byte": 8}
    return named.get(found[1].split("_")[0], 16)


def _run(*command: str) -> str:
    return subprocess.run(command, capture_output=True, text=True, check=True).stdout


def cost(report: Report) -> float:
    """The slowest of bytes, instructions and MUFU, in bytes an element."""
    return max(report.bytes, report.sass / SASS_PER_BYTE, report.mufu / MUFU_PER_BYTE)
