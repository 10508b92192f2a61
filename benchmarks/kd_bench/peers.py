"""Other libraries' losses, imported when they run and left out where they are not installed.

``KD_PEERS=folder`` adds a folder of packages (pip install --no-deps --target folder ...).
"""

from __future__ import annotations

import importlib
import importlib.util
import os
import sys
from collections.abc import Callable
from importlib import metadata
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from kd_bench.inputs import parse_divergence
from kd_bench.steps import (
    LINEAR_LEAVES,
    Answer,
    Implementation,
    Inputs,
    Step,
    leaves,
    with_gradients,
)


def add_peers_to_path() -> None:
    """Make the packages of ``KD_PEERS`` importable, after everything that is installed."""
    for folder in os.environ.get("KD_PEERS", "").split(os.pathsep):
        if folder and folder not in sys.path:
            sys.path.append(folder)


def version_of(package: str | None) -> str | None:
    """Installed version of a package, None where it is not installed; "" for torch and kd."""
    if package is None:
        return ""
    try:
        return metadata.version(package)
    except metadata.PackageNotFoundError:
        return None


def _beta(divergence: str) -> float:
    """TRL's and Liger's beta: 0 is forward KL, 1 reverse KL, between is GKD's JSD."""
    d = parse_divergence(divergence)
    return {"forward_kl": 0.0, "reverse_kl": 1.0}.get(d.name, d.beta)


def build_trl_chunked(suite: str, divergence: str, inputs: Inputs) -> Step:
    """TRL's ChunkedDivergenceFunction."""
    function = importlib.import_module("trl.kernels.chunked_divergence").ChunkedDivergenceFunction
    teacher, beta = (inputs["teacher_hidden"], inputs["teacher_weight"]), _beta(divergence)

    def step() -> Answer:
        wanted = leaves(inputs, LINEAR_LEAVES)
        per_token, _ = function.apply(
            wanted["hidden"], wanted["weight"], None, teacher[0], teacher[1], None, beta
        )
        return with_gradients(per_token.mean(), wanted)

    return step


def build_trl_gkd(suite: str, divergence: str, inputs: Inputs) -> Step:
    """GKDTrainer.generalized_jsd_loss on logits."""
    os.environ.setdefault("TRL_EXPERIMENTAL_SILENCE", "1")
    module = importlib.import_module("trl.experimental.gkd.gkd_trainer")
    function, beta = module.GKDTrainer.generalized_jsd_loss, _beta(divergence)

    def step() -> Answer:
        wanted = leaves(inputs, ("logits",))
        z, t = wanted["logits"], inputs["teacher_logits"]
        loss = function(z[None], t[None], beta=beta, num_items_in_batch=len(z))
        return with_gradients(loss, wanted)

    return step


def build_liger(suite: str, divergence: str, inputs: Inputs, compiled: bool = False) -> Step:
    """Liger's chunked LigerFusedLinearJSDLoss, its hard loss switched off."""
    module = importlib.import_module("liger_kernel.chunked_loss")
    function = module.LigerFusedLinearJSDLoss(
        weight_hard_loss=0.0, weight_soft_loss=1.0, beta=_beta(divergence), compiled=compiled
    )
    labels = torch.zeros(len(inputs["hidden"]), dtype=torch.long, device=inputs["hidden"].device)

    def step() -> Answer:
        wanted = leaves(inputs, LINEAR_LEAVES)
        teacher = (inputs["teacher_hidden"], inputs["teacher_weight"])
        loss = function(wanted["hidden"], wanted["weight"], *teacher, labels)
        return with_gradients(loss, wanted)

    return step


def build_liger_compiled(suite: str, divergence: str, inputs: Inputs) -> Step:
    """The same with Liger's own torch.compile switched on, which is its default."""
    return build_liger(suite, divergence, inputs, compiled=True)


def build_torchtune(suite: str, divergence: str, inputs: Inputs) -> Step:
    """torchtune's ForwardKLWithChunkedOutputLoss; the file alone, its package needs torchao."""
    path = Path(str(metadata.distribution("torchtune").locate_file("torchtune")))
    spec = importlib.util.spec_from_file_location("kd_losses", path / "modules/loss/kd_losses.py")
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    chunks = min(8, len(inputs["hidden"]))
    function = module.ForwardKLWithChunkedOutputLoss(num_output_chunks=chunks)
    device = inputs["hidden"].device
    labels = torch.zeros(1, len(inputs["hidden"]), dtype=torch.long, device=device)

    def step() -> Answer:
        wanted = leaves(inputs, LINEAR_LEAVES)
        student = [(h @ wanted["weight"].T)[None] for h in wanted["hidden"].chunk(chunks)]
        teacher = [
            (h @ inputs["teacher_weight"].T)[None] for h in inputs["teacher_hidden"].chunk(chunks)
        ]
        return with_gradients(function(student, teacher, labels), wanted)

    return step


# --- Triton kernels: timed on a GPU alone, their answers checked in Triton's interpreter ----------

_LIGER = "liger_kernel.transformers."


def _liger(module: str, name: str, **options: Any) -> Any:
    return getattr(importlib.import_module(_LIGER + module), name)(**options)


def _logits_step(inputs: Inputs, function: Callable[[Tensor, Tensor], Tensor]) -> Step:
    """``function`` of both sides' log-probabilities, which PyTorch makes of the logits."""

    def step() -> Answer:
        wanted = leaves(inputs, ("logits",))
        log_q = torch.log_softmax(wanted["logits"], -1)
        loss = function(log_q, torch.log_softmax(inputs["teacher_logits"], -1))
        return with_gradients(loss, wanted)

    return step


def build_liger_kl(suite: str, divergence: str, inputs: Inputs) -> Step:
    """LigerKLDIVLoss of two log-softmaxes."""
    return _logits_step(
        inputs, _liger("kl_div", "LigerKLDIVLoss", reduction="batchmean", log_target=True)
    )


def build_liger_jsd(suite: str, divergence: str, inputs: Inputs) -> Step:
    """LigerJSD of two log-softmaxes."""
    return _logits_step(inputs, _liger("jsd", "LigerJSD", beta=_beta(divergence)))


def build_liger_linear_jsd(suite: str, divergence: str, inputs: Inputs) -> Step:
    """LigerFusedLinearJSD."""
    function = _liger("fused_linear_jsd", "LigerFusedLinearJSD", jsd_beta=_beta(divergence))
    teacher = (inputs["teacher_hidden"], inputs["teacher_weight"])

    def step() -> Answer:
        wanted = leaves(inputs, LINEAR_LEAVES)
        return with_gradients(function(wanted["hidden"], wanted["weight"], *teacher, None), wanted)

    return step


def build_liger_linear_kl(suite: str, divergence: str, inputs: Inputs) -> Step:
    """liger_fused_linear_kl_div; the teacher's softmax is made beside it, in PyTorch."""
    function = importlib.import_module(_LIGER + "functional").liger_fused_linear_kl_div

    def step() -> Answer:
        wanted = leaves(inputs, LINEAR_LEAVES)
        logits = inputs["teacher_hidden"] @ inputs["teacher_weight"].T
        target = torch.softmax(logits, -1, dtype=torch.float32)
        return with_gradients(function(wanted["hidden"], wanted["weight"], target), wanted)

    return step


def build_liger_linear_ce(suite: str, divergence: str, inputs: Inputs) -> Step:
    """LigerFusedLinearCrossEntropyLoss."""
    function = _liger("fused_linear_cross_entropy", "LigerFusedLinearCrossEntropyLoss")

    def step() -> Answer:
        wanted = leaves(inputs, LINEAR_LEAVES)
        loss = function(wanted["weight"], wanted["hidden"], inputs["labels"])
        return with_gradients(loss, wanted)

    return step


def build_fla(suite: str, divergence: str, inputs: Inputs) -> Step:
    """fla's FusedKLDivLoss."""
    function = importlib.import_module("fla.modules.fused_kl_div").FusedKLDivLoss()
    teacher = (inputs["teacher_hidden"], inputs["teacher_weight"])

    def step() -> Answer:
        wanted = leaves(inputs, LINEAR_LEAVES)
        loss = function(wanted["hidden"], teacher[0], wanted["weight"], teacher[1])
        return with_gradients(loss, wanted)

    return step


def _triton(
    name: str, suite: str, build: Any, divergences: tuple[str, ...], copies: float, **options: Any
) -> Implementation:
    package = "flash-linear-attention" if name.startswith("fla") else "liger-kernel"
    return Implementation(
        name, (suite,), build, package, divergences, copies, needs_gpu=True, **options
    )


_ALL = ("forward_kl", "reverse_kl", "jsd")
TRITON_PEERS = (
    _triton("liger kl_div", "dense", build_liger_kl, ("forward_kl",), 6),
    _triton("liger jsd", "dense", build_liger_jsd, _ALL, 7),
    _triton("liger fused linear jsd", "linear", build_liger_linear_jsd, _ALL, 3),
    _triton("liger fused linear kl", "linear", build_liger_linear_kl, ("forward_kl",), 3),
    _triton("liger fused linear ce", "cross-entropy", build_liger_linear_ce, (), 1),
    _triton("fla fused kl", "linear", build_fla, ("forward_kl",), 2),
)
