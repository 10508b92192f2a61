"""Other libraries' losses, imported when they run and left out where they are not installed."""

from __future__ import annotations

import importlib
import importlib.util
import os
from collections.abc import Callable
from importlib import metadata
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from kd_bench.suite import (
    Answer,
    Implementation,
    Inputs,
    Problem,
    Step,
    parse_divergence,
    unknown_divergence,
)


def gradient_step(inputs: Inputs, loss_of: Callable[[Inputs], Tensor]) -> Step:
    """A step that gives ``loss_of(leaves)`` and the gradients of the student's leaves."""

    def step() -> Answer:
        names = ("logits",) if "logits" in inputs else ("hidden", "weight")
        leaves = {name: inputs[name].detach().requires_grad_() for name in names}
        loss = loss_of(leaves)
        return loss.detach(), dict(
            zip(names, torch.autograd.grad(loss, list(leaves.values())), strict=True)
        )

    return Step(step)


def beta_of(peer: str, problem: Problem) -> float:
    """TRL's and Liger's beta: 0 is forward KL, 1 reverse KL, between is GKD's JSD.

    Raises:
        ValueError: the divergence is none of these.
    """
    d = parse_divergence(problem.divergence)
    known = {"forward_kl": 0.0, "reverse_kl": 1.0, "jsd": d.beta}
    if d.name not in known:
        raise unknown_divergence(peer, d)
    return known[d.name]


def only(peer: str, problem: Problem, name: str) -> None:
    """Raise unless the problem's divergence is the only one that a peer has."""
    d = parse_divergence(problem.divergence)
    if d.name != name:
        raise unknown_divergence(peer, d)


def attribute(module: str, name: str) -> Any:
    return getattr(importlib.import_module(module), name)


def trl_chunked(problem: Problem, inputs: Inputs) -> Step:
    """TRL's ChunkedDivergenceFunction."""
    beta, teacher = beta_of("trl chunked", problem), inputs["teacher_hidden"]
    function = attribute("trl.kernels.chunked_divergence", "ChunkedDivergenceFunction")

    def loss_of(leaves: Inputs) -> Tensor:
        sides = leaves["hidden"], leaves["weight"], None, teacher, inputs["teacher_weight"], None
        return function.apply(*sides, beta)[0].mean()

    return gradient_step(inputs, loss_of)


def trl_gkd(problem: Problem, inputs: Inputs) -> Step:
    """GKDTrainer.generalized_jsd_loss on logits."""
    os.environ.setdefault("TRL_EXPERIMENTAL_SILENCE", "1")
    beta = beta_of("trl gkd", problem)
    function = attribute("trl.experimental.gkd.gkd_trainer", "GKDTrainer").generalized_jsd_loss
    teacher = inputs["teacher_logits"][None]
    options = {"beta": beta, "num_items_in_batch": len(inputs["logits"])}
    return gradient_step(inputs, lambda at: function(at["logits"][None], teacher, **options))


def liger_chunked(problem: Problem, inputs: Inputs, compiled: bool = False) -> Step:
    """Liger's chunked LigerFusedLinearJSDLoss, its hard loss switched off."""
    beta, hidden = beta_of("liger chunked", problem), inputs["hidden"]
    function = attribute("liger_kernel.chunked_loss", "LigerFusedLinearJSDLoss")(
        weight_hard_loss=0.0, weight_soft_loss=1.0, beta=beta, compiled=compiled
    )
    labels = torch.zeros(len(hidden), dtype=torch.long, device=hidden.device)
    teacher = inputs["teacher_hidden"], inputs["teacher_weight"], labels
    return gradient_step(inputs, lambda at: function(at["hidden"], at["weight"], *teacher))


def liger_chunked_compiled(problem: Problem, inputs: Inputs) -> Step:
    """The same with Liger's own torch.compile switched on, which is its default."""
    torch._dynamo.reset()
    return liger_chunked(problem, inputs, compiled=True)


def torchtune_chunked(problem: Problem, inputs: Inputs) -> Step:
    """torchtune's ForwardKLWithChunkedOutputLoss; the file alone, its package needs torchao."""
    only("torchtune chunked", problem, "forward_kl")
    package = Path(str(metadata.distribution("torchtune").locate_file("torchtune")))
    path = package / "modules/loss/kd_losses.py"
    spec = importlib.util.spec_from_file_location("torchtune_kd_losses", path)
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    hidden, weight = inputs["teacher_hidden"], inputs["teacher_weight"]
    chunks = min(8, len(hidden))
    function = module.ForwardKLWithChunkedOutputLoss(num_output_chunks=chunks)
    labels = torch.zeros(1, len(hidden), dtype=torch.long, device=hidden.device)

    def loss_of(leaves: Inputs) -> Tensor:
        student = [(h @ leaves["weight"].T)[None] for h in leaves["hidden"].chunk(chunks)]
        return function(student, [(h @ weight.T)[None] for h in hidden.chunk(chunks)], labels)

    return gradient_step(inputs, loss_of)


# --- Triton kernels: timed on a GPU alone, their answers checked in Triton's interpreter ----------

LIGER = "liger_kernel.transformers."


def on_log_probabilities(inputs: Inputs, function: Callable[[Tensor, Tensor], Tensor]) -> Step:
    """``function`` of both sides' log-probabilities, which PyTorch makes of the logits."""

    def loss_of(leaves: Inputs) -> Tensor:
        log_q = torch.log_softmax(leaves["logits"], -1)
        return function(log_q, torch.log_softmax(inputs["teacher_logits"], -1))

    return gradient_step(inputs, loss_of)


def liger_kl(problem: Problem, inputs: Inputs) -> Step:
    """LigerKLDIVLoss of two log-softmaxes."""
    only("liger kl_div", problem, "forward_kl")
    made = attribute(LIGER + "kl_div", "LigerKLDIVLoss")(reduction="batchmean", log_target=True)
    return on_log_probabilities(inputs, made)


def liger_jsd(problem: Problem, inputs: Inputs) -> Step:
    """LigerJSD of two log-softmaxes."""
    beta = beta_of("liger jsd", problem)
    return on_log_probabilities(inputs, attribute(LIGER + "jsd", "LigerJSD")(beta=beta))


def liger_linear_jsd(problem: Problem, inputs: Inputs) -> Step:
    """LigerFusedLinearJSD."""
    beta = beta_of("liger fused linear jsd", problem)
    function = attribute(LIGER + "fused_linear_jsd", "LigerFusedLinearJSD")(jsd_beta=beta)
    teacher = inputs["teacher_hidden"], inputs["teacher_weight"], None
    return gradient_step(inputs, lambda at: function(at["hidden"], at["weight"], *teacher))


def liger_linear_kl(problem: Problem, inputs: Inputs) -> Step:
    """liger_fused_linear_kl_div; the teacher's softmax is made beside it, in PyTorch."""
    only("liger fused linear kl", problem, "forward_kl")
    function = attribute(LIGER + "functional", "liger_fused_linear_kl_div")

    def loss_of(leaves: Inputs) -> Tensor:
        logits = inputs["teacher_hidden"] @ inputs["teacher_weight"].T
        target = torch.softmax(logits, -1, dtype=torch.float32)
        return function(leaves["hidden"], leaves["weight"], target)

    return gradient_step(inputs, loss_of)


def liger_linear_ce(problem: Problem, inputs: Inputs) -> Step:
    """LigerFusedLinearCrossEntropyLoss."""
    module = LIGER + "fused_linear_cross_entropy"
    function = attribute(module, "LigerFusedLinearCrossEntropyLoss")()
    return gradient_step(inputs, lambda at: function(at["weight"], at["hidden"], inputs["labels"]))


def fla_linear_kl(problem: Problem, inputs: Inputs) -> Step:
    """fla's FusedKLDivLoss."""
    only("fla fused kl", problem, "forward_kl")
    function = attribute("fla.modules.fused_kl_div", "FusedKLDivLoss")()
    hidden, weight = inputs["teacher_hidden"], inputs["teacher_weight"]
    return gradient_step(inputs, lambda at: function(at["hidden"], hidden, at["weight"], weight))


def cut_cross_entropy(problem: Problem, inputs: Inputs) -> Step:
    """Apple's linear_cross_entropy, exact: no gradient is filtered away."""
    function = attribute("cut_cross_entropy", "linear_cross_entropy")
    return gradient_step(
        inputs, lambda at: function(at["hidden"], at["weight"], inputs["labels"], filter_eps=None)
    )


# --- who takes part in which suite ----------------------------------------------------------------

BETA = ("forward_kl", "reverse_kl", "jsd")
FORWARD = ("forward_kl",)
ENTROPY = "cross-entropy H(p, q): larger than the KL by the teacher's entropy"


def on_gpu(name: str, build: Any, divergences: tuple[str, ...], copies: float) -> Implementation:
    packages = {"fla": "flash-linear-attention", "cut": "cut-cross-entropy"}
    package = packages.get(name[:3], "liger-kernel")
    return Implementation(name, build, package, divergences, copies, needs_gpu=True)


PEERS: dict[str, tuple[Implementation, ...]] = {
    "linear": (
        Implementation("trl chunked", trl_chunked, "trl", BETA, 2),
        Implementation(
            "torchtune chunked", torchtune_chunked, "torchtune", FORWARD, 6, ENTROPY, True
        ),
        Implementation("liger chunked", liger_chunked, "liger-kernel", BETA, 8),
        Implementation("liger chunked compiled", liger_chunked_compiled, "liger-kernel", BETA, 6),
        on_gpu("liger fused linear jsd", liger_linear_jsd, BETA, 3),
        on_gpu("liger fused linear kl", liger_linear_kl, FORWARD, 3),
        on_gpu("fla fused kl", fla_linear_kl, FORWARD, 2),
    ),
    "dense": (
        Implementation("trl gkd", trl_gkd, "trl", BETA, 9),
        on_gpu("liger kl_div", liger_kl, FORWARD, 6),
        on_gpu("liger jsd", liger_jsd, BETA, 7),
    ),
    "cross-entropy": (
        on_gpu("liger fused linear ce", liger_linear_ce, (), 1),
        on_gpu("cut cross-entropy", cut_cross_entropy, (), 0.5),
    ),
}
