"""Peers' row kernels for the compile-time checks, launched as their own launchers launch them.

Found on ``--peers DIR``, where their wheels were installed with ``pip install --no-deps --target
DIR liger-kernel==0.8.5 trl==1.16.0 flash-linear-attention==0.6.0 fla-core==0.6.0``. Tile sizes and
warps are those of their launchers' source.
"""

from __future__ import annotations

import contextlib
import importlib
import pathlib
import sys
from collections.abc import Callable
from operator import attrgetter
from typing import Any

import torch
import triton

from aot_cases import ROWS, VOCABULARIES, Case, dense_case, empty
from aot_machine import Report, cost
from kd_bench import tables
from kd_kernels.launch import target_of

Launch, Bytes = Callable[[], Any], tuple[float, ...]
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


def cases_of(
    vocab: int, launches: dict[str, tuple[Launch, float, tuple[float, ...]]]
) -> list[Case]:
    """{kernel: (launch, bytes an element, bytes read an element in each of its loops)} as cases."""
    return [
        Case(
            f"{name} {vocab}",
            launch,
            bytes=moved,
            one_read_bytes=moved,
            least_bytes=6.0,
            read_bytes=loops[0],
            loop_bytes=loops,
            aligned=False,
            bounded=False,
        )
        for name, (launch, moved, loops) in launches.items()
    ]


def liger_cases(vocab: int) -> list[Case]:
    kl, tvd, both, hard, jsd_loss, kl_loss = (
        importlib.import_module(f"liger_kernel.ops.{name}")
        for name in ("kl_div", "tvd", "fused_ce_tvd", "cross_entropy", "backends._triton.jsd",
                     "backends._triton.kl_div")
    )  # fmt: skip

    def halves() -> torch.Tensor:
        return empty(ROWS, vocab, dtype=torch.bfloat16)

    def ids() -> torch.Tensor:
        return empty(ROWS, dtype=torch.int64)

    def kl_backward() -> None:
        with contextlib.suppress(NotImplementedError):  # then it looks at a meta tensor's value
            kl.kldiv_backward_triton(halves(), numbers(1), halves(), True)

    def cross_entropy() -> None:
        """Its launcher counts the labels first, which meta tensors do not have."""
        target = target_of(torch.device("meta"))
        warps = 16 if target.kind == "hip" else 8 if target.arch >= 100 else 32
        hard.liger_cross_entropy_kernel[(ROWS,)](
            X_ptr=halves(), X_stride=vocab, Y_ptr=ids(), Y_stride=1, weight_ptr=None,
            loss_ptr=numbers(), z_loss_ptr=None, loss_stride=1, token_accuracy_ptr=None,
            token_accuracy_stride=0, predicted_tokens_ptr=None, predicted_tokens_stride=0,
            n_cols=vocab, n_non_ignore=ROWS, sum_non_ignore_weight=1.0, weight_sum=0.0,
            ignore_index=-100, lse_square_scale=0.0, label_smoothing=0.0, reduction="mean",
            softcap=None, RETURN_Z_LOSS=False, RETURN_TOKEN_ACCURACY=False,
            RETURN_PREDICTED_TOKENS=False, HAS_WEIGHT=False, HAS_SOFTCAPPING=False,
            HAS_GRADIENTS=True, num_warps=warps,
            BLOCK_SIZE=min(hard.MAX_FUSED_SIZE, triton.next_power_of_2(vocab)),
        )  # fmt: skip

    def rows() -> list[torch.Tensor]:
        return [numbers() for _ in range(5)]

    return cases_of(vocab, {
        "liger kl_div forward": (
            lambda: kl.kldiv_forward_triton(halves(), halves(), True, "batchmean", 1e-10), 4, (4,)
        ),
        "liger kl_div backward": (kl_backward, 4, (2,)),
        "liger jsd forward+backward": (
            lambda: jsd_loss.jsd_loss_and_grad_triton(halves(), halves(), None, 0.5, -100, ROWS),
            10, (4,),
        ),
        "liger tvd forward+backward": (
            lambda: tvd.tv_distance_forward_triton(halves(), halves(), None, "sum", -100, False),
            6, (4,),
        ),
        "liger fused_linear_kl_div": (
            lambda: kl_loss.kl_loss_and_grad_triton(
                halves(), halves(), None, -100, 2.0, 1e-10, 1.0
            ),
            12, (2, 4, 4),
        ),
        "liger fused_ce_tvd forward": (
            lambda: both.fused_ce_tvd_forward(halves(), halves(), ids(), -100), 8, (4, 4)
        ),
        "liger fused_ce_tvd backward": (
            lambda: both.fused_ce_tvd_backward(
                *rows()[:2], halves(), halves(), ids(), *rows()[2:], -100
            ),
            6, (4,),
        ),
        "liger cross_entropy": (cross_entropy, 6, (2, 2)),
    })  # fmt: skip


def fla_cases(vocab: int) -> list[Case]:
    ops = importlib.import_module("fla.modules.fused_kl_div.ops")

    def launch() -> None:
        logits = [empty(ROWS, vocab, dtype=torch.bfloat16) for _ in range(2)]
        block = min(ops.MAX_FUSED_SIZE, triton.next_power_of_2(vocab))
        warps = 16 if target_of(torch.device("meta")).kind == "hip" else 32
        ops.kl_div_kernel[(ROWS,)](
            *logits, numbers(), vocab, 1, "batchmean", N=ROWS, V=vocab, BV=block, num_warps=warps
        )

    return cases_of(vocab, {"fla fused_kl_div": (launch, 10, (4, 4))})


def trl_cases() -> list[Case]:
    """Tiles of 32,768 columns in float32, whatever the vocabulary."""
    ops = importlib.import_module("trl.kernels.chunked_divergence")
    columns, block = TRL_COLUMNS, importlib.import_module("trl.kernels.chunked_logprob")._BLOCK_SIZE
    scales = (1.0, 1.0, 1.0, 1.0, 1.0)
    caps = dict(S_HAS_SOFTCAP=False, T_HAS_SOFTCAP=False, BLOCK_SIZE=block)

    def launch(kernel: Any, of_rows: int, *more: float, blocks: int = 0, **options: Any) -> Launch:
        def launch() -> None:
            tiles = numbers(ROWS, columns), columns, numbers(ROWS, columns), columns
            found = (numbers() for _ in range(of_rows))
            grid = (ROWS, blocks) if blocks else (ROWS,)
            kernel[grid](*tiles, *found, columns, *more, *scales, **options, **caps)

        return launch

    backward = [
        launch(ops._backward_kernel, 4, 0.5, blocks=columns // block, MODE=mode)
        for mode in range(3)
    ]
    return cases_of(columns, {
        "trl statistics (float32 tiles)": (launch(ops._stats_kernel, 7), 8, (8,)),
        "trl jsd value (float32 tiles)": (launch(ops._jsd_kernel, 4, 0.5), 8, (8,)),
        "trl forward_kl gradient (float32 tiles)": (backward[0], 12, (8,)),
        "trl reverse_kl gradient (float32 tiles)": (backward[1], 12, (8,)),
        "trl jsd gradient (float32 tiles)": (backward[2], 12, (8,)),
    })  # fmt: skip


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


def summary(found: dict[str, Report], arch: str, vocab: int) -> str:
    """Value and gradient from logits in memory, each operation's kernels together."""
    rows = []
    for operation, package, names, around, what in OPERATIONS:
        reports = [found.get(f"{name.format(v=vocab)} {arch}") for name in names]
        if None in reports:
            continue
        spills, sass = max(r.spills for r in reports), sum(r.sass for r in reports)
        moved, bound = (sum(of) + around for of in (map(attrgetter("bytes"), reports),
                                                    map(cost, reports)))  # fmt: skip
        numbers = [len(reports), spills, f"{sass:.0f}", f"{moved:g}", f"{bound:.1f}"]
        rows.append([operation, package, *numbers, what])
    columns = ["operation", "package", "kernels", "spills", "SASS/el", "B/el", "bound",
               "in torch beside"]  # fmt: skip
    return (
        f"Value and gradient from logits, {arch}, V = {vocab:,}, of all the operation's kernels.\n"
        "B/el: theirs and torch's beside them (read from source: a minimum, each torch pass at\n"
        "its own lower bound). bound: bytes an element that take as long as the slowest of\n"
        "bytes, instructions and MUFU: the ratio of two bounds is the ratio of two best times.\n\n"
        + tables.markdown(columns, rows, text=["package", "in torch beside"])
    )
