"""Peers' row kernels for the compile-time checks, launched as their own launchers launch them.

Found on ``--peers DIR``, where their wheels were installed with ``pip install --no-deps --target
DIR liger-kernel==0.8.5 trl==1.16.0 flash-linear-attention==0.6.0 fla-core==0.6.0``. Tile sizes and
warps are those of their launchers' source.
"""

from __future__ import annotations

import importlib
import pathlib
import sys
from collections.abc import Callable
from typing import Any

import torch
import triton

from aot_cases import ROWS, VOCABULARIES, Case, dense_case, empty
from kd_kernels.launch import target_of

TRL_COLUMNS = 32_768  # of its vocabulary tiles

OPERATIONS = (  # (operation, package, kernels, bytes in torch around them, what those are)
    ("forward KL", "ours", ("dense forward_kl bf16 {v}",), 0, ""),
    ("forward KL", "ours (float32)", ("dense forward_kl fp32 {v}",), 0, ""),
    ("forward KL", "liger kl_div", ("liger kl_div forward {v}", "liger kl_div backward {v}"), 14,
     "two log-softmax, one backward"),
    ("forward KL", "liger fused linear", ("liger fused_linear_kl_div {v}",), 4, "teacher softmax"),
    ("forward KL", "fla fused linear", ("fla fused_kl_div {v}",), 0, ""),
    ("forward KL", "trl (float32)", ("trl statistics (float32 tiles) 32768",
     "trl forward_kl gradient (float32 tiles) 32768"), 0, "logits are projected twice"),
    ("reverse KL", "ours", ("dense reverse_kl bf16 {v}",), 0, ""),
    ("reverse KL", "ours (float32)", ("dense reverse_kl fp32 {v}",), 0, ""),
    ("reverse KL", "trl (float32)", ("trl statistics (float32 tiles) 32768",
     "trl reverse_kl gradient (float32 tiles) 32768"), 0, "logits are projected twice"),
    ("JSD", "ours", ("dense jsd bf16 {v}",), 0, ""),
    ("JSD", "ours (float32)", ("dense jsd fp32 {v}",), 0, ""),
    ("JSD", "liger jsd", ("liger jsd forward+backward {v}",), 26,
     "two log-softmax, one backward; a copy; a float32 loss tile zeroed and summed"),
    ("JSD", "trl (float32)", ("trl statistics (float32 tiles) 32768",
     "trl jsd value (float32 tiles) 32768", "trl jsd gradient (float32 tiles) 32768"), 0,
     "logits are projected three times"),
    ("total variation", "ours", ("dense total_variation bf16 {v}",), 0, ""),
    ("total variation", "liger tvd", ("liger tvd forward+backward {v}",), 14,
     "two softmax, one backward"),
    ("CE + total variation", "liger fused_ce_tvd", ("liger fused_ce_tvd forward {v}",
     "liger fused_ce_tvd backward {v}"), 0, ""),
    ("cross-entropy", "ours", ("dense none bf16 {v} ce=1",), 0, ""),
    ("cross-entropy", "liger cross_entropy", ("liger cross_entropy {v}",), 0, ""),
)  # fmt: skip


def numbers(*shape: int) -> torch.Tensor:
    return empty(*(shape or (ROWS,)), dtype=torch.float32)


def halves(vocab: int) -> torch.Tensor:
    return empty(ROWS, vocab, dtype=torch.bfloat16)


def warps_by_block(block: int) -> int:
    """Liger's rule."""
    return 32 if block >= 32_768 else 16 if block >= 8_192 else 8 if block >= 2_048 else 4


def case(
    name: str, vocab: int, launch: Callable[[], Any], bytes: float, loops: tuple[float, ...]
) -> Case:
    """loops: bytes read an element in each of the kernel's loops, or in its only pass."""
    return Case(
        f"{name} {vocab}",
        launch,
        bytes=bytes,
        one_read_bytes=bytes,
        least_bytes=6.0,
        read_bytes=loops[0],
        loop_bytes=loops,
        aligned=False,
        bounded=False,
    )


def liger_cases(vocab: int) -> list[Case]:
    ops = "liger_kernel.ops."
    kl, jsd, tvd = (importlib.import_module(ops + m) for m in ("kl_div", "jsd", "tvd"))
    both = importlib.import_module(ops + "fused_ce_tvd")
    linear = importlib.import_module(ops + "fused_linear_kl_div")
    hard = importlib.import_module(ops + "cross_entropy")

    def tile(limit: int) -> dict[str, int]:
        block = min(limit, triton.next_power_of_2(vocab))
        return dict(BLOCK_SIZE=block, num_warps=warps_by_block(block))

    def kl_forward() -> None:
        kl._kldiv_kernel_forward[(ROWS,)](
            halves(vocab), vocab, halves(vocab), vocab, numbers(), 1, vocab, eps=1e-10,
            log_target=True, reduction=3, **tile(kl.MAX_FUSED_SIZE),
        )  # fmt: skip

    def kl_backward() -> None:
        kl._kldiv_kernel_backward[(ROWS,)](
            halves(vocab), vocab, halves(vocab), vocab, vocab, log_target=True,
            **tile(kl.MAX_FUSED_SIZE),
        )  # fmt: skip

    def jsd_both() -> None:
        jsd._jsd_kernel[(ROWS,)](
            halves(vocab), vocab, halves(vocab), vocab, numbers(ROWS, vocab), vocab, halves(vocab),
            vocab, numbers(1), 0.5, ROWS, -100, vocab, BLOCK_SIZE=4096, HAS_LABEL=False,
            num_warps=4,
        )  # fmt: skip

    def tvd_both() -> None:
        tvd._tv_distance_kernel[(ROWS,)](
            halves(vocab), vocab, halves(vocab), vocab, numbers(), 1, halves(vocab), vocab,
            numbers(1), -100, vocab, 1.0, HAS_LABEL=False, reduction=3, **tile(tvd.MAX_FUSED_SIZE),
        )  # fmt: skip

    def linear_kl() -> None:
        linear._kl_div_kernel[(ROWS,)](
            halves(vocab), vocab, halves(vocab), vocab, numbers(), 1, numbers(1), -100, vocab, 2.0,
            1e-10, 1.0, HAS_LABEL=False, **tile(linear.MAX_FUSED_SIZE),
        )  # fmt: skip

    def ce_tvd_forward() -> None:
        both._fused_ce_tvd_forward_kernel[(ROWS,)](
            halves(vocab), vocab, halves(vocab), vocab, empty(ROWS, dtype=torch.int64),
            *(numbers() for _ in range(5)), vocab, ignore_index=-100, **tile(both.MAX_FUSED_SIZE),
        )  # fmt: skip

    def ce_tvd_backward() -> None:
        both._fused_ce_tvd_backward_kernel[(ROWS,)](
            halves(vocab), vocab, halves(vocab), vocab, empty(ROWS, dtype=torch.int64),
            *(numbers() for _ in range(5)), halves(vocab), vocab, vocab, ignore_index=-100,
            **tile(both.MAX_FUSED_SIZE),
        )  # fmt: skip

    def cross_entropy() -> None:
        target = target_of(torch.device("meta"))
        warps = 16 if target.kind == "hip" else 8 if target.arch >= 100 else 32
        hard.liger_cross_entropy_kernel[(ROWS,)](
            X_ptr=halves(vocab), X_stride=vocab, Y_ptr=empty(ROWS, dtype=torch.int64), Y_stride=1,
            weight_ptr=None, loss_ptr=numbers(), z_loss_ptr=None, loss_stride=1,
            token_accuracy_ptr=None, token_accuracy_stride=0, predicted_tokens_ptr=None,
            predicted_tokens_stride=0, n_cols=vocab, n_non_ignore=ROWS, sum_non_ignore_weight=1.0,
            weight_sum=0.0, ignore_index=-100, lse_square_scale=0.0, label_smoothing=0.0,
            reduction="mean", softcap=None, RETURN_Z_LOSS=False, RETURN_TOKEN_ACCURACY=False,
            RETURN_PREDICTED_TOKENS=False, HAS_WEIGHT=False, HAS_SOFTCAPPING=False,
            HAS_GRADIENTS=True,
            BLOCK_SIZE=min(hard.MAX_FUSED_SIZE, triton.next_power_of_2(vocab)), num_warps=warps,
        )  # fmt: skip

    return [
        case("liger kl_div forward", vocab, kl_forward, 4, (4,)),
        case("liger kl_div backward", vocab, kl_backward, 4, (2,)),
        case("liger jsd forward+backward", vocab, jsd_both, 10, (4,)),
        case("liger tvd forward+backward", vocab, tvd_both, 6, (4,)),
        case("liger fused_linear_kl_div", vocab, linear_kl, 12, (2, 4, 4)),
        case("liger fused_ce_tvd forward", vocab, ce_tvd_forward, 8, (4, 4)),
        case("liger fused_ce_tvd backward", vocab, ce_tvd_backward, 6, (4,)),
        case("liger cross_entropy", vocab, cross_entropy, 6, (2, 2)),
    ]


def fla_cases(vocab: int) -> list[Case]:
    ops = importlib.import_module("fla.modules.fused_kl_div.ops")

    def launch() -> None:
        block = min(ops.MAX_FUSED_SIZE, triton.next_power_of_2(vocab))
        warps = 16 if target_of(torch.device("meta")).kind == "hip" else 32
        ops.kl_div_kernel[(ROWS,)](
            logits=halves(vocab), target_logits=halves(vocab), loss=numbers(), s_logits=vocab,
            s_loss=1, reduction="batchmean", N=ROWS, V=vocab, BV=block, num_warps=warps,
        )  # fmt: skip

    return [case("fla fused_kl_div", vocab, launch, 10, (4, 4))]


def trl_cases() -> list[Case]:
    """Tiles of 32,768 columns in float32, whatever the vocabulary."""
    ops = importlib.import_module("trl.kernels.chunked_divergence")
    columns, block = TRL_COLUMNS, importlib.import_module("trl.kernels.chunked_logprob")._BLOCK_SIZE
    scales = (1.0, 1.0, 1.0, 1.0, 1.0)
    caps = dict(S_HAS_SOFTCAP=False, T_HAS_SOFTCAP=False, BLOCK_SIZE=block)

    def rows() -> tuple[Any, ...]:
        return numbers(ROWS, columns), columns, numbers(ROWS, columns), columns

    def stats() -> None:
        found = (numbers() for _ in range(7))
        ops._stats_kernel[(ROWS,)](*rows(), *found, columns, *scales, **caps)

    def jsd() -> None:
        found = (numbers() for _ in range(4))
        ops._jsd_kernel[(ROWS,)](*rows(), *found, columns, 0.5, *scales, **caps)

    def backward(mode: int) -> Callable[[], None]:
        def launch() -> None:
            found = (numbers() for _ in range(4))
            ops._backward_kernel[(ROWS, columns // block)](
                *rows(), *found, columns, 0.5, *scales, MODE=mode, **caps
            )

        return launch

    return [
        case("trl statistics (float32 tiles)", columns, stats, 8, (8,)),
        case("trl jsd value (float32 tiles)", columns, jsd, 8, (8,)),
        case("trl forward_kl gradient (float32 tiles)", columns, backward(0), 12, (8,)),
        case("trl reverse_kl gradient (float32 tiles)", columns, backward(1), 12, (8,)),
        case("trl jsd gradient (float32 tiles)", columns, backward(2), 12, (8,)),
    ]


def peer_cases(folder: pathlib.Path) -> list[Case]:
    """Ours and theirs: every vocabulary, bf16 (TRL: float32, its own tiles)."""
    sys.path.append(str(folder))
    ours = ("forward_kl", "reverse_kl", "jsd", "total_variation")
    found = [dense_case(d, "bf16", vocab) for d in ours for vocab in VOCABULARIES]
    found += [dense_case(d, "fp32", 128_256) for d in ours[:3]]  # beside TRL's float32 tiles
    found += [dense_case("none", "bf16", vocab, ce=1.0) for vocab in VOCABULARIES]
    for vocab in VOCABULARIES:
        found += liger_cases(vocab)
    for vocab in VOCABULARIES:
        found += fla_cases(vocab)
    return found + trl_cases()


def versions(folder: pathlib.Path) -> str:
    """ "liger_kernel 0.8.5, trl 1.16.0, ...", as installed there."""
    names = (p.name.removesuffix(".dist-info") for p in sorted(folder.glob("*.dist-info")))
    kept = (name.replace("-", " ") for name in names if name.startswith(("liger", "trl", "fla")))
    return ", ".join(kept)


def summary(found: dict[str, Any], arch: str, vocab: int, cost: Callable[[Any], float]) -> str:
    """Value and gradient from logits in memory, each operation's kernels together.

    cost: of a report, in bytes an element, what its counts take at the machine's balance.
    """
    lines = [
        f"Value and gradient from logits, {arch}, V = {vocab:,}, of all the operation's kernels.",
        "B/el: theirs and torch's beside them (read from source: a minimum, each torch pass at its",
        "own lower bound). bound: bytes an element that take as long as the slowest of bytes,",
        "instructions and MUFU: the ratio of two bounds is the ratio of two best times.",
        "",
        "| operation | package | kernels | spills | SASS/el | B/el | bound | in torch beside |",
        "|---|---|---:|---:|---:|---:|---:|---|",
    ]
    for operation, package, names, around, what in OPERATIONS:
        reports = [found.get(f"{name.format(v=vocab)} {arch}") for name in names]
        if None in reports:
            continue
        spills, sass = max(r.spills for r in reports), sum(r.sass for r in reports)
        moved = sum(r.bytes for r in reports) + around
        bound = sum(cost(r) for r in reports) + around
        lines.append(
            f"| {operation} | {package} | {len(reports)} | {spills} | {sass:.0f} | {moved:g} | "
            f"{bound:.1f} | {what} |"
        )
    return "\n".join(lines)
