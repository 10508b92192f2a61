"""Who takes part: ours, the bare matmuls, PyTorch as written by hand, and the peers.

Each implementation takes a suite's inputs and returns a function that makes one step: a mean loss
over tokens and its gradients.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

import kd
from kd_bench import peers, pipelines
from kd_bench.inputs import parse_divergence
from kd_bench.shapes import ALL_SUITES, PIPELINE_SUITES
from kd_bench.steps import (
    LINEAR_LEAVES,
    Answer,
    Implementation,
    Inputs,
    Step,
    leaves,
    with_gradients,
)

# --- ours -----------------------------------------------------------------------------------------


def build_kd(suite: str, divergence: str, inputs: Inputs, overwrite: bool = False) -> Step:
    """kd.distillation_loss or kd.cross_entropy; capture, cache, trainer, recipe."""
    if suite in PIPELINE_SUITES:
        return pipelines.build("kd", suite, divergence, inputs)
    if suite == "selection":
        return build_selection(suite, divergence, inputs)
    teacher = our_teacher(inputs)

    def step() -> Answer:
        if "logits" in inputs:
            wanted = leaves(inputs, ("logits",))
            student: Any = wanted["logits"]
            if overwrite:  # the caller's logits become the gradient: no longer a leaf
                student = Overwritable.apply(student)
        else:
            wanted = leaves(inputs, LINEAR_LEAVES)
            student = kd.Hidden(wanted["hidden"], wanted["weight"])
        if suite == "cross-entropy":
            return with_gradients(kd.cross_entropy(student, inputs["labels"]), wanted)
        loss = kd.distillation_loss(
            student,
            teacher,
            divergence=parse_divergence(divergence),
            overwrite_student_logits=overwrite,
        )
        return with_gradients(loss, wanted)

    return step


class Overwritable(torch.autograd.Function):
    """A view of a leaf that may be overwritten: stands for a model's output."""

    @staticmethod
    def forward(ctx: Any, logits: Tensor) -> Tensor:
        return logits.view_as(logits)

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> Tensor:
        return gradient


def build_kd_in_place(suite: str, divergence: str, inputs: Inputs) -> Step:
    """The student's logits are given up; each step works on what the last one left there."""
    return build_kd(suite, divergence, inputs, overwrite=True)


def our_teacher(inputs: Inputs) -> Any:
    if "ids" in inputs:
        return kd.TopK(inputs["ids"], inputs["logprobs"])
    if "teacher_logits" in inputs:
        return inputs["teacher_logits"]
    if "teacher_hidden" in inputs:
        return kd.Hidden(inputs["teacher_hidden"], inputs["teacher_weight"])
    return None


SELECTED = 64
SELECTION_BYTES = 32 << 20


def build_selection(suite: str, divergence: str, inputs: Inputs) -> Step:
    """What capture does: chunks of rows, top-k of the logits, less their log-sum-exp."""
    from kd.teachers.selection import top_k_rows

    logits = inputs["teacher_logits"]
    rows = max(1, SELECTION_BYTES // (4 * logits.shape[-1]))

    def step() -> Answer:
        parts = [top_k_rows(chunk, SELECTED, 1.0) for chunk in logits.split(rows)]
        ids, logprobs = (torch.cat(side) for side in zip(*parts, strict=True))
        return logprobs[:, 0].mean(), {"logprobs": logprobs, "ids": ids}

    return step


# --- the floor, and PyTorch by hand ---------------------------------------------------------------


def build_matmuls(suite: str, divergence: str, inputs: Inputs, chunk: int) -> Step:
    """The matmuls alone, each once, through one buffer; its numbers mean nothing."""
    hidden, weight = inputs["hidden"], inputs["weight"]
    teacher = (inputs.get("teacher_hidden"), inputs.get("teacher_weight"))
    rows = min(chunk, len(hidden))
    buffer = hidden.new_empty((rows, len(weight)))

    def step() -> Answer:
        d_hidden, d_weight = torch.empty_like(hidden), torch.empty_like(weight)
        for start in range(0, len(hidden), rows):
            part = hidden[start : start + rows]
            z = buffer[: len(part)]
            if teacher[0] is not None and teacher[1] is not None:
                torch.mm(teacher[0][start : start + rows], teacher[1].T, out=z)
            torch.mm(part, weight.T, out=z)
            torch.mm(z, weight, out=d_hidden[start : start + rows])
            if start == 0:
                torch.mm(z.T, part, out=d_weight)
            else:
                torch.addmm(d_weight, z.T, part, out=d_weight)
        return hidden.new_zeros(()), {"hidden": d_hidden, "weight": d_weight}

    return step


def kl_div_loss(student_logits: Tensor, teacher_logits: Tensor, divergence: str) -> Tensor:
    """Mean over tokens, as GKD's reference code writes it: log-softmax and F.kl_div on [N, V]."""
    d = parse_divergence(divergence)
    log_q = F.log_softmax(student_logits, dim=-1)
    log_p = F.log_softmax(teacher_logits, dim=-1)
    if d.name == "forward_kl":
        terms = F.kl_div(log_q, log_p, reduction="none", log_target=True)
    elif d.name == "reverse_kl":
        terms = F.kl_div(log_p, log_q, reduction="none", log_target=True)
    else:
        beta = torch.tensor(d.beta, dtype=log_q.dtype, device=log_q.device)
        log_m = torch.logsumexp(
            torch.stack([log_q + torch.log1p(-beta), log_p + torch.log(beta)]), dim=0
        )
        kl_p = F.kl_div(log_m, log_p, reduction="none", log_target=True)
        kl_q = F.kl_div(log_m, log_q, reduction="none", log_target=True)
        terms = beta * kl_p + (1 - beta) * kl_q
    return terms.sum() / len(student_logits)


def build_pytorch(suite: str, divergence: str, inputs: Inputs, compiled: bool = False) -> Step:
    """Logits of both sides, log-softmax, F.kl_div, autograd."""
    if suite in PIPELINE_SUITES:
        return pipelines.build("pytorch", suite, divergence, inputs)
    if suite == "selection":
        return _build_full_log_softmax(inputs)

    def loss_of(wanted: dict[str, Tensor]) -> Tensor:
        z = wanted["logits"] if "logits" in wanted else wanted["hidden"] @ wanted["weight"].T
        if suite == "cross-entropy":
            return F.cross_entropy(z.float(), inputs["labels"])
        if "ids" in inputs:
            return _sparse_forward_kl(z, inputs["ids"], inputs["logprobs"])
        t = inputs.get("teacher_logits")
        if t is None:
            t = inputs["teacher_hidden"] @ inputs["teacher_weight"].T
        return kl_div_loss(z, t, divergence)

    function = torch.compile(loss_of, dynamic=False) if compiled else loss_of
    names = ("logits",) if "logits" in inputs else LINEAR_LEAVES

    def step() -> Answer:
        wanted = leaves(inputs, names)
        return with_gradients(function(wanted), wanted)

    return step


def build_pytorch_compiled(suite: str, divergence: str, inputs: Inputs) -> Step:
    """The same under torch.compile."""
    return build_pytorch(suite, divergence, inputs, compiled=True)


def _sparse_forward_kl(z: Tensor, ids: Tensor, logprobs: Tensor) -> Tensor:
    """Forward KL to K tokens and one tail bucket, mean over tokens."""
    log_q = F.log_softmax(z.float(), dim=-1)
    tail_q = torch.logsumexp(log_q.scatter(1, ids, -torch.inf), -1)
    tail_p = torch.log1p(-logprobs.exp().sum(-1))
    top = (logprobs.exp() * (logprobs - log_q.gather(1, ids))).sum(-1)
    return (top + tail_p.exp() * (tail_p - tail_q)).mean()


def _build_full_log_softmax(inputs: Inputs) -> Step:
    logits = inputs["teacher_logits"]

    def step() -> Answer:
        top = F.log_softmax(logits.float(), dim=-1).topk(min(SELECTED, logits.shape[-1]), dim=-1)
        return top.values[:, 0].mean(), {"logprobs": top.values, "ids": top.indices}

    return step


# --- all of them ----------------------------------------------------------------------------------

LINEAR = ("linear", "linear-sparse", "cross-entropy")
DENSE_KL = ("forward_kl", "reverse_kl", "jsd")
IMPLEMENTATIONS = {
    made.name: made
    for made in (
        Implementation("kd", tuple(ALL_SUITES), build_kd, copies=1.2),
        Implementation("kd in place", ("dense", "sparse"), build_kd_in_place, copies=0.2),
        *(
            Implementation(
                f"matmuls alone, chunk {chunk}",
                LINEAR,
                lambda s, d, i, c=chunk: build_matmuls(s, d, i, c),  # type: ignore[misc]
                note="the floor: each matmul once, one buffer",
            )
            for chunk in (128, 256, 512)
        ),
        Implementation(
            "pytorch", tuple(s for s in ALL_SUITES if s != "recipe"), build_pytorch, copies=7
        ),
        Implementation(
            "pytorch compiled",
            (*LINEAR, "dense", "sparse"),
            build_pytorch_compiled,
            divergences=DENSE_KL,
            copies=7,
        ),
        Implementation("trl gkd", ("dense",), peers.build_trl_gkd, "trl", DENSE_KL, copies=9),
        Implementation(
            "trl chunked", ("linear",), peers.build_trl_chunked, "trl", DENSE_KL, copies=2
        ),
        Implementation(
            "torchtune chunked",
            ("linear",),
            peers.build_torchtune,
            "torchtune",
            ("forward_kl",),
            copies=6,
            note="cross-entropy H(p, q): larger than the KL by the teacher's entropy",
        ),
        Implementation(
            "liger chunked", ("linear",), peers.build_liger, "liger-kernel", DENSE_KL, 8
        ),
        Implementation(
            "liger chunked compiled",
            ("linear",),
            peers.build_liger_compiled,
            "liger-kernel",
            DENSE_KL,
            copies=6,
        ),
        *peers.TRITON_PEERS,
        *pipelines.IMPLEMENTATIONS,
    )
}
