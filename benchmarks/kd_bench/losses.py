"""Losses as steps: inputs, the float64 truth, and what kd and plain PyTorch make of them.

The truth is computed by the oracle on the first tokens of the same rounded inputs. Of an lm_head's
gradient it keeps the rows of some tokens of the vocabulary; everything else is whole.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

import kd
from kd_bench import plain
from kd_bench.peers import gradient_step
from kd_bench.suite import DTYPES, Answer, Inputs, Problem, Step, Truth, parse_divergence

CHECKED_TOKENS, CHECKED_IDS = 8, 512
SELECTED, SELECTION_BYTES = 64, 32 << 20  # of a capture: top-k, and the logits it takes at once
BARE_BYTES = 300 << 20  # of the bare GEMM's buffer
FUSED = ("linear", "linear-sparse", "cross-entropy")
ROWWISE = ("hidden", "teacher_hidden", "logits", "teacher_logits", "ids", "logprobs", "labels")


# --- inputs and truth -----------------------------------------------------------------------------


def make_inputs(problem: Problem) -> Inputs:
    """The tensors of a problem. Logits have a spread of about 2, as a model's do."""
    suite, s, dtype = problem.suite.name, problem.shape, DTYPES[problem.dtype]
    g, made = torch.Generator().manual_seed(0), {}

    def random(rows: int, columns: int, scale: float) -> Tensor:
        return (scale * torch.randn(rows, columns, generator=g)).to(dtype)

    if suite in FUSED:
        made["hidden"] = random(s.tokens, s.student_hidden, 1.0)
        made["weight"] = random(s.vocab, s.student_hidden, 2 * s.student_hidden**-0.5)
    if suite == "linear":
        made["teacher_hidden"] = random(s.tokens, s.teacher_hidden, 1.0)
        made["teacher_weight"] = random(s.vocab, s.teacher_hidden, 2 * s.teacher_hidden**-0.5)
    if suite in ("dense", "dense-loaded", "sparse"):
        made["logits"] = random(s.tokens, s.vocab, 2.0)
    if suite in ("dense", "dense-loaded", "selection"):
        made["teacher_logits"] = random(s.tokens, s.vocab, 2.0)
    if suite in ("linear-sparse", "sparse"):
        stride = max(1, s.vocab // s.top_k)
        first = torch.randint(0, stride, (s.tokens, s.top_k), generator=g)
        made["ids"] = first + stride * torch.arange(s.top_k)  # distinct in a row
        masses = torch.randn(s.tokens, s.top_k + 1, generator=g).mul_(2).log_softmax(-1)
        made["logprobs"] = masses[:, :-1].contiguous()
    if suite == "cross-entropy":
        made["labels"] = torch.randint(0, s.vocab, (s.tokens,), generator=g)
    return made


def first_rows(inputs: Inputs) -> Inputs:
    """The same inputs with the first tokens alone; the student's logits are a copy."""
    few = {name: t[:CHECKED_TOKENS] if name in ROWWISE else t for name, t in inputs.items()}
    return few | ({"logits": few["logits"].clone()} if "logits" in few else {})


def slabs(vocab: int, size: int = 16_384) -> list[slice]:
    return [slice(start, min(start + size, vocab)) for start in range(0, vocab, size)]


def exact_matmul(hidden: Tensor, weight: Tensor) -> Tensor:
    """hidden @ weight.T in float64, a slab of the vocabulary at a time."""
    return torch.cat([hidden.double() @ weight[s].double().T for s in slabs(len(weight))], 1)


def exact_answer(problem: Problem, inputs: Inputs) -> Truth:
    """The mean over ``inputs``' tokens and its gradients, by the float64 oracle."""
    if "logits" in inputs:
        z = inputs["logits"].double()
    else:
        z = exact_matmul(inputs["hidden"], inputs["weight"])
    z.requires_grad_()
    ids = torch.randperm(z.shape[1], generator=torch.Generator().manual_seed(1))[:CHECKED_IDS]
    if "labels" in inputs:
        loss = kd.cross_entropy(z, inputs["labels"], backend="reference")
        ids = torch.cat([ids, inputs["labels"]]).unique()
    else:
        teacher = teacher_of(inputs)
        if isinstance(teacher, kd.Hidden):
            teacher = exact_matmul(teacher.hidden, teacher.weight)
        elif isinstance(teacher, Tensor):
            teacher = teacher.double()
        loss = parse_divergence(problem.divergence)(z, teacher, backend="reference")
    (dz,), loss = torch.autograd.grad(loss, z), loss.detach()
    if "logits" in inputs:
        return Truth(float(loss), {"logits": dz})
    weight = inputs["weight"]
    d_hidden = sum(dz[:, s] @ weight[s].double() for s in slabs(len(weight)))
    d_weight = dz[:, ids].T @ inputs["hidden"].double()
    return Truth(float(loss), {"hidden": d_hidden, "weight": d_weight}, ids)


def exact_selection(problem: Problem, inputs: Inputs) -> Truth:
    logprobs = torch.log_softmax(inputs["teacher_logits"].double(), -1)
    return Truth(float(logprobs.amax(-1).mean()), {"logprobs": logprobs})


def selection_errors(answer: Answer, truth: Truth) -> tuple[float, float]:
    """Relative error of the mean of the largest log p, absolute error of log p."""
    value, results = answer
    exact = truth.results["logprobs"].gather(1, results["ids"].cpu())
    worst = float((results["logprobs"].cpu().double() - exact).abs().max())
    return abs(float(value) - truth.value) / abs(truth.value), worst


# --- who takes part -------------------------------------------------------------------------------


def teacher_of(inputs: Inputs) -> Any:
    if "ids" in inputs:
        return kd.TopK(inputs["ids"], inputs["logprobs"])
    if "teacher_logits" in inputs:
        return inputs["teacher_logits"]
    return kd.Hidden(inputs["teacher_hidden"], inputs["teacher_weight"])


class Overwritable(torch.autograd.Function):
    """A view of a leaf that may be overwritten: stands for a model's output."""

    @staticmethod
    def forward(ctx: Any, logits: Tensor) -> Tensor:
        return logits.view_as(logits)

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> Tensor:
        return gradient


def build_kd(problem: Problem, inputs: Inputs, overwrite: bool = False) -> Step:
    """kd.distillation_loss or kd.cross_entropy."""

    def loss_of(leaves: Inputs) -> Tensor:
        student = leaves.get("logits")
        if student is None:
            student = kd.Hidden(leaves["hidden"], leaves["weight"])
        elif overwrite:  # the caller's logits become the gradient: no longer a leaf
            student = Overwritable.apply(student)
        if "labels" in inputs:
            return kd.cross_entropy(student, inputs["labels"])
        return kd.distillation_loss(
            student,
            teacher_of(inputs),
            divergence=parse_divergence(problem.divergence),
            overwrite_student_logits=overwrite,
        )

    return gradient_step(inputs, loss_of)


def build_kd_in_place(problem: Problem, inputs: Inputs) -> Step:
    """The student's logits are given up; each step works on what the last one left there."""
    return build_kd(problem, inputs | {"logits": inputs["logits"].clone()}, overwrite=True)


def build_pytorch(problem: Problem, inputs: Inputs, compiled: bool = False) -> Step:
    """Logits of both sides, log-softmax, the divergence as one writes it by hand, autograd."""

    def loss_of(leaves: Inputs) -> Tensor:
        z = leaves["logits"] if "logits" in leaves else leaves["hidden"] @ leaves["weight"].T
        if "labels" in inputs:
            return F.cross_entropy(z.float(), inputs["labels"])
        d = parse_divergence(problem.divergence)
        if "ids" in inputs:
            return plain.plain_losses(d, z, teacher_of(inputs)).mean()
        t = inputs.get("teacher_logits")
        if t is None:
            t = inputs["teacher_hidden"] @ inputs["teacher_weight"].T
        return plain.written_by_hand(d, F.log_softmax(t, -1), F.log_softmax(z, -1))

    return gradient_step(inputs, torch.compile(loss_of, dynamic=False) if compiled else loss_of)


def build_pytorch_compiled(problem: Problem, inputs: Inputs) -> Step:
    torch._dynamo.reset()  # what other problems compiled must not count against its limit
    return build_pytorch(problem, inputs, compiled=True)


def build_bare_gemm(problem: Problem, inputs: Inputs) -> Step:
    """Each GEMM once, through one buffer of at most ``BARE_BYTES``; its numbers mean nothing."""
    hidden, weight = inputs["hidden"], inputs["weight"]
    teacher = inputs.get("teacher_hidden"), inputs.get("teacher_weight")
    rows = max(1, min(len(hidden), BARE_BYTES // (len(weight) * hidden.itemsize)))
    buffer = hidden.new_empty((rows, len(weight)))

    def step() -> Answer:
        d_hidden, d_weight = torch.empty_like(hidden), torch.empty_like(weight)
        for start in range(0, len(hidden), rows):
            part = hidden[start : start + rows]
            z = buffer[: len(part)]
            if teacher[0] is not None:
                torch.mm(teacher[0][start : start + rows], teacher[1].T, out=z)
            torch.mm(part, weight.T, out=z)
            torch.mm(z, weight, out=d_hidden[start : start + rows])
            torch.addmm(d_weight, z.T, part, beta=int(start > 0), out=d_weight)
        return hidden.new_zeros(()), {"hidden": d_hidden, "weight": d_weight}

    return Step(step)


def build_selection(problem: Problem, inputs: Inputs) -> Step:
    """What capture does: chunks of rows, top-k of the logits, less their log-sum-exp."""
    from kd.teachers.selection import top_k_rows

    logits = inputs["teacher_logits"]
    rows = max(1, SELECTION_BYTES // (4 * logits.shape[-1]))

    def step() -> Answer:
        parts = [top_k_rows(chunk, SELECTED, 1.0) for chunk in logits.split(rows)]
        ids, logprobs, _ = (torch.cat(side) for side in zip(*parts, strict=True))
        return logprobs[:, 0].mean(), {"logprobs": logprobs, "ids": ids}

    return Step(step)


def build_plain_selection(problem: Problem, inputs: Inputs) -> Step:
    def step() -> Answer:
        top = F.log_softmax(inputs["teacher_logits"].float(), dim=-1).topk(SELECTED, dim=-1)
        return top.values[:, 0].mean(), {"logprobs": top.values, "ids": top.indices}

    return Step(step)
