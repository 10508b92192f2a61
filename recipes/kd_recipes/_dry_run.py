"""``--dry-run``: memory, time and disk of a recipe as a table, and the refusal without a GPU."""

from __future__ import annotations

from dataclasses import dataclass

from kd.recipe.estimate import (
    GIB,
    UTILISATION,
    Hardware,
    Shape,
    find_hardware,
    forward_hours,
    full_logits,
    least_gpus,
    show_bytes,
    show_hours,
    training_hours,
    training_memory,
)

# Bytes of a cached token at k = 64, compact codec, ids spread over Qwen's vocabulary (measured,
# kd/cache/README.md), and how they scale with k.
BYTES_PER_TOKEN = 110.9


@dataclass(frozen=True)
class Need:
    """What a recipe is about to do."""

    name: str
    student: Shape
    teacher: Shape | None
    length: int
    rows: int
    mean_tokens: int
    sft_epochs: float
    kd_epochs: float
    top_k: int
    online: bool
    source: str
    offline: str


def estimate(need: Need, gpus: int = 0, gpu_memory: float = 0.0, gpu: str = "") -> str:
    """The estimate as text for the terminal."""
    hardware = find_hardware(gpus, gpu_memory, gpu)
    tokens = need.rows * need.mean_tokens
    lines = [
        f"[bold]{need.name}[/]: an estimate from arithmetic, nothing was measured or started",
        f"hardware        {hardware}",
        f"student         {need.student.parameters / 1e9:.2f} billion parameters, sequences of up "
        f"to {need.length:,} tokens",
        f"traces          {need.rows:,} of {need.mean_tokens:,} tokens: {tokens / 1e6:.0f} million",
    ]
    if need.source:
        lines.append(f"settings        {need.source}")
    lines += ["", *_memory(need, hardware), "", *_time(need, hardware, tokens)]
    lines.append(
        f"\nassumed: {100 * UTILISATION:.0f} % of the peak, everything sharded over all GPUs "
        "(FSDP2 or ZeRO-3), float32 master weights and AdamW, activations recomputed, one "
        "sequence at a time."
    )
    return "\n".join(lines)


def _memory(need: Need, hardware: Hardware) -> list[str]:
    count = max(1, hardware.gpus)
    parts = training_memory(need.student, need.length, count)
    if need.online and need.teacher is not None and need.kd_epochs:
        parts["teacher in bf16 (sharded)"] = 2 * need.teacher.parameters / count / GIB
    total = sum(parts.values())
    where = "one GPU" if hardware.gpus else "the CPU"
    lines = [f"memory of {where} in training, GiB"]
    lines += [f"  {name:<36} {value:7.1f}" for name, value in parts.items()]
    fits = total <= 0.92 * hardware.memory
    fewest = least_gpus(need.student, need.length, hardware.memory)
    verdict = f"of {hardware.memory:.0f}: fits" if fits else f"of {hardware.memory:.0f}: TOO MUCH"
    lines.append(f"  {'together':<36} {total:7.1f}  {verdict}")
    if not fits and hardware.gpus:
        more = f"{fewest} of these GPUs would do" if fewest else "more GPUs do not help"
        lines.append(f"  {more}; so would LoRA, a shorter --max-length, or --student of less size")
    lines.append(
        f"  (full logits of both models would add {full_logits(need.student, need.length):.0f} "
        "GiB; they are never made)"
    )
    return lines


def _time(need: Need, hardware: Hardware, tokens: float) -> list[str]:
    mean = need.mean_tokens
    rows = [("SFT", training_hours(need.student, need.sft_epochs * tokens, mean, hardware))]
    if need.kd_epochs:
        if need.teacher is not None:
            hours = forward_hours(need.teacher, tokens, mean, hardware)
            times = need.kd_epochs if need.online else 1
            rows.append(("teacher's forward", times * hours))
        rows.append(("KD", training_hours(need.student, need.kd_epochs * tokens, mean, hardware)))
    lines = ["time"]
    lines += [f"  {name:<36} {show_hours(hours):>9}" for name, hours in rows]
    lines.append(f"  {'together':<36} {show_hours(sum(hours for _, hours in rows)):>9}")
    disk = 16 * need.student.parameters + 4 * need.student.parameters
    lines.append(f"disk\n  {'a checkpoint and the model':<36} {show_bytes(disk):>9}")
    if need.kd_epochs and not need.online:
        size = tokens * BYTES_PER_TOKEN * (0.35 + 0.65 * need.top_k / 64)
        lines.append(f"  {f'cache of the top {need.top_k}':<36} {show_bytes(size):>9}")
    return lines


def require_gpu(need: Need) -> None:
    """Refuse a GPU preset on a machine without one.

    Raises:
        ValueError: it says what the preset needs, and offers the offline one.
    """
    hardware = find_hardware()
    if hardware.gpus:
        return
    fewest = least_gpus(need.student, need.length, 80.0)
    raise ValueError(
        f"{need.name}: this preset must run on GPUs, about {fewest} of 80 GB, got none. "
        f"Every stage on a CPU: {need.offline}. The estimate alone: add --dry-run."
    )
