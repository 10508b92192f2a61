"""``--dry-run``: the memory, time and disk that a recipe will need, with what is assumed.

These are estimates from arithmetic, not measurements: a training token costs 6 floating-point
operations per parameter (8 with recomputed activations) and attention's share on top; hardware is
taken to reach a stated part of its peak.
"""

from __future__ import annotations

import math
import os
from dataclasses import dataclass
from typing import Any

from kd.models import load_config
from kd_recipes._offline_qwen import OFFLINE, SIZES

GIB = 2**30
UTILISATION = 0.35
FITS = 0.92  # of a GPU's memory
# Vendors' dense bf16 figures, in TFLOP/s.
PEAKS = {
    "B200": 2250.0,
    "H200": 989.0,
    "H100": 989.0,
    "A100": 312.0,
    "L40S": 362.0,
    "RTX 4090": 165.0,
    "A10": 125.0,
}
UNKNOWN = "A100"
# Bytes of a cached token at k = 64, compact codec, ids spread over Qwen's vocabulary (measured,
# kd/cache/README.md), and how they scale with k.
BYTES_PER_TOKEN = 110.9


@dataclass(frozen=True)
class Hardware:
    """What a recipe may use.

    Attributes:
        gpus: their number; 0 is a CPU.
        memory: of one, in GiB.
        name: what they are; decides the peak.
        assumed: the user named it, or the name is a guess.
    """

    gpus: int
    memory: float
    name: str = UNKNOWN
    assumed: bool = False

    @property
    def peak(self) -> float:
        """Dense bf16 TFLOP/s of one."""
        return next((peak for key, peak in PEAKS.items() if key in self.name), PEAKS[UNKNOWN])

    def __str__(self) -> str:
        if not self.gpus:
            return f"a CPU with {self.memory:.0f} GiB of memory"
        kind = f"{self.name} ({self.peak:.0f} TFLOP/s bf16)"
        note = ", assumed" if self.assumed else ""
        return f"{self.gpus} x {kind} with {self.memory:.0f} GiB each{note}"


def find_hardware(gpus: int = 0, gpu_memory: float = 0.0, gpu: str = "") -> Hardware:
    """What is here, or what the user named.

    Args:
        gpus: the number to assume; 0 looks.
        gpu_memory: GiB of each; 80 when only ``gpus`` is given.
        gpu: a name such as "H100".
    """
    import torch

    if gpus:
        return Hardware(gpus, gpu_memory or 80.0, gpu or UNKNOWN, assumed=True)
    if torch.cuda.is_available():
        first = torch.cuda.get_device_properties(0)
        memory = gpu_memory or first.total_memory / GIB
        return Hardware(torch.cuda.device_count(), memory, gpu or first.name)
    known = hasattr(os, "sysconf") and "SC_PHYS_PAGES" in os.sysconf_names
    size = os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE") if known else 0
    return Hardware(0, size / GIB, "CPU")


@dataclass(frozen=True)
class Shape:
    """The sizes of a Qwen-like decoder.

    Attributes:
        hidden: width.
        layers: depth.
        heads: of the queries.
        kv_heads: of the keys and values.
        feed_forward: width inside the MLP.
        rows: of the lm_head.
        tied: embedding and lm_head are one matrix.
    """

    hidden: int
    layers: int
    heads: int
    kv_heads: int
    feed_forward: int
    rows: int
    tied: bool

    @property
    def body(self) -> int:
        """Parameters of the layers."""
        kv = self.hidden * self.kv_heads // self.heads
        attention = 2 * self.hidden**2 + 2 * self.hidden * kv + self.hidden + 2 * kv
        return self.layers * (attention + 3 * self.hidden * self.feed_forward + 2 * self.hidden)

    @property
    def parameters(self) -> int:
        return self.body + self.hidden + self.rows * self.hidden * (1 if self.tied else 2)

    @classmethod
    def of(cls, config: Any) -> Shape:
        """From a transformers config."""
        return cls(
            config.hidden_size,
            config.num_hidden_layers,
            config.num_attention_heads,
            getattr(config, "num_key_value_heads", config.num_attention_heads),
            config.intermediate_size,
            config.vocab_size,
            bool(getattr(config, "tie_word_embeddings", False)),
        )


QWEN25 = {
    "0.5B": Shape(896, 24, 14, 2, 4864, 151_936, True),
    "1.5B": Shape(1536, 28, 12, 2, 8960, 151_936, True),
    "7B": Shape(3584, 28, 28, 4, 18_944, 152_064, False),
    "14B": Shape(5120, 48, 40, 8, 13_824, 152_064, False),
    "32B": Shape(5120, 64, 40, 8, 27_648, 152_064, False),
}


def training_memory(shape: Shape, length: int, gpus: int) -> dict[str, float]:
    """GiB on one GPU, by what takes it, with one sequence of that many tokens at a time.

    Weights, gradients and Adam are float32 and sharded over all GPUs; activations are recomputed.
    """
    gathered = 2 * (2 * shape.body / shape.layers) + 2 * shape.rows * shape.hidden
    boundaries = 2 * shape.layers * length * shape.hidden
    kv = shape.hidden * shape.kv_heads // shape.heads
    one_layer = 2 * length * (8 * shape.hidden + 4 * kv + 6 * shape.feed_forward)
    head = 4 * length * shape.hidden * 3 + 4 * 1024 * shape.rows  # hidden, its gradient, one chunk
    parts = {
        "weights, gradients, Adam (sharded)": 16 * shape.parameters / gpus,
        "gathered layers and lm_head": gathered,
        "kept activations": boundaries,
        "one layer's activations": one_layer,
        "loss": head,
    }
    return {name: value / GIB for name, value in parts.items()}


def full_logits(shape: Shape, length: int) -> float:
    """GiB that student and teacher logits and their gradient would add in float32."""
    return 3 * 4 * length * shape.rows / GIB


def training_hours(shape: Shape, tokens: float, length: int, hardware: Hardware) -> float:
    """Hours for so many tokens: forward, backward of twice that, and the forward recomputed."""
    return 4 * forward_hours(shape, tokens, length, hardware)


def forward_hours(shape: Shape, tokens: float, length: int, hardware: Hardware) -> float:
    """Hours for a forward pass over so many tokens."""
    attention = 4 * shape.layers * length / 2 * shape.hidden  # causal, per token
    per_token = 2 * (shape.body + shape.rows * shape.hidden) + attention
    peak = hardware.peak * 1e12 * hardware.gpus if hardware.gpus else 1e11
    return tokens * per_token / (UTILISATION * peak) / 3600


def least_gpus(shape: Shape, length: int, memory: float) -> int:
    """The fewest GPUs of that many GiB on which training fits; 0 where more do not help."""
    for gpus in (1, 2, 4, 8, 16, 32, 64, 128, 256, 512):
        if sum(training_memory(shape, length, gpus).values()) <= FITS * memory:
            return gpus
    return 0


def show_hours(hours: float) -> str:
    """Hours as text, in the unit that reads best."""
    if hours < 1 / 60:
        return f"{3600 * hours:.0f} s"
    if hours < 1.5:
        return f"{60 * hours:.0f} min"
    return f"{hours:.1f} h" if hours < 48 else f"{hours / 24:.1f} days"


def show_bytes(size: float) -> str:
    """Bytes as text."""
    power = min(4, int(math.log(max(size, 1), 1000)))
    return f"{size / 1000**power:.1f} {('B', 'kB', 'MB', 'GB', 'TB')[power]}"


def shape_of(config: Any) -> Shape:
    """The student's sizes: of the preset's size, of the offline model, or of the model itself."""
    if config.shape or config.student != OFFLINE:
        return QWEN25.get(config.shape) or Shape.of(load_config(config.student))
    size = SIZES["student"]
    return Shape(size["hidden"], size["layers"], 2, 2, 176, size["rows"], True)


def estimate(config: Any) -> str:
    """What a ``kd_recipes.reasoning.Config`` will need, as text for the terminal."""
    hardware = find_hardware(config.gpus, config.gpu_memory, config.gpu)
    student = shape_of(config)
    teacher = QWEN25.get(config.teacher.removesuffix("-Instruct").rpartition("-")[2])
    traces, mean = config.max_traces or config.rows_expected, config.mean_tokens
    mean = min(mean, config.max_length)
    tokens = traces * mean
    lines = [
        f"[bold]{config.recipe}[/]: an estimate from arithmetic, nothing was measured or started",
        f"hardware        {hardware}",
        f"student         {student.parameters / 1e9:.2f} billion parameters, sequences of up "
        f"to {config.max_length:,} tokens",
        f"traces          {traces:,} of {mean:,} tokens: {tokens / 1e6:.0f} million",
    ]
    if config.source:
        lines.append(f"settings        {config.source}")
    lines += ["", *_memory(config, student, teacher, hardware)]
    lines += ["", *_time(config, student, teacher, hardware, tokens, mean)]
    lines.append(f"disk\n{_row('a checkpoint and the model', show_bytes(20 * student.parameters))}")
    if config.kd.epochs and not config.online:
        size = tokens * BYTES_PER_TOKEN * (0.35 + 0.65 * config.top_k / 64)
        lines.append(_row(f"cache of the top {config.top_k}", show_bytes(size)))
    lines.append(
        f"\nassumed: {100 * UTILISATION:.0f} % of the peak, everything sharded over all GPUs "
        "(FSDP2 or ZeRO-3), float32 master weights and AdamW, activations recomputed, one "
        "sequence at a time."
    )
    return "\n".join(lines)


def _row(name: str, value: str) -> str:
    return f"  {name:<36} {value:>9}"


def _memory(config: Any, student: Shape, teacher: Shape | None, hardware: Hardware) -> list[str]:
    count, length = max(1, hardware.gpus), config.max_length
    parts = training_memory(student, length, count)
    if config.online and teacher is not None and config.kd.epochs:
        parts["teacher in bf16 (sharded)"] = 2 * teacher.parameters / count / GIB
    total = sum(parts.values())
    lines = [f"memory of {'one GPU' if hardware.gpus else 'the CPU'} in training, GiB"]
    lines += [f"  {name:<36} {value:7.1f}" for name, value in parts.items()]
    fits = total <= FITS * hardware.memory
    verdict = f"of {hardware.memory:.0f}: {'fits' if fits else 'TOO MUCH'}"
    lines.append(f"  {'together':<36} {total:7.1f}  {verdict}")
    if not fits and hardware.gpus:
        fewest = least_gpus(student, length, hardware.memory)
        more = f"{fewest} of these GPUs would do" if fewest else "more GPUs do not help"
        lines.append(f"  {more}; so would LoRA, a shorter --max-length, or --student of less size")
    lines.append(
        f"  (full logits of both models would add {full_logits(student, length):.0f} GiB; they are "
        "never made)"
    )
    return lines


def _time(
    config: Any,
    student: Shape,
    teacher: Shape | None,
    hardware: Hardware,
    tokens: float,
    mean: int,
) -> list[str]:
    hours = {"SFT": training_hours(student, config.sft.epochs * tokens, mean, hardware)}
    if config.kd.epochs:
        if teacher is not None:
            times = config.kd.epochs if config.online else 1
            hours["teacher's forward"] = forward_hours(teacher, times * tokens, mean, hardware)
        hours["KD"] = training_hours(student, config.kd.epochs * tokens, mean, hardware)
    hours["together"] = sum(hours.values())
    return ["time", *(_row(name, show_hours(value)) for name, value in hours.items())]


def require_gpu(config: Any) -> None:
    """Refuse a preset for GPUs on a machine without one.

    Raises:
        ValueError: it says what the preset needs, and offers the offline one.
    """
    if find_hardware().gpus:
        return
    fewest = least_gpus(shape_of(config), config.max_length, 80.0)
    raise ValueError(
        f"{config.recipe}: this preset must run on GPUs, about {fewest} of 80 GB, got none. "
        f"Every stage on a CPU: kd run {config.recipe} offline. The estimate alone: add --dry-run."
    )
