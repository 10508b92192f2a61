"""Errors of every loss against the float64 oracle, beside plain PyTorch's own in the same dtype.

    make errors                                         # or: python benchmarks/error_table.py
    python benchmarks/error_table.py --dtype bfloat16   # one dtype

Prints Markdown. A cell is "value gradient" for float64, and "value gradient (k x)" for narrower
types, where k is the larger of the two errors over plain PyTorch's. An error is the largest
absolute one over the largest true value, of the per-token losses and of each tensor that gets a
gradient (the worst is shown), over several seeds. Two regimes are tried, student far from the
teacher and near it, and the worse is shown. The truth is the oracle on the same rounded inputs,
itself never rounded: a bfloat16 gradient cannot be nearer to it than a bfloat16 number can.

Bounds, and the exit status is 1 when one is broken: float64 <= 1e-10; narrower <= 2 x plain
PyTorch's error, plus four roundings (eps) of the largest true value.
"""

from __future__ import annotations

import argparse
import itertools
import platform
import sys
import time

import torch

import kd
from kd_bench import tables
from kd_bench.plain import plain_losses

DIVERGENCES = (
    kd.forward_kl,
    kd.reverse_kl,
    kd.jsd(0.5),
    kd.jsd(0.1),
    kd.skew_forward_kl(0.1),
    kd.skew_reverse_kl(0.1),
    kd.skew_reverse_kl(0.1, detach_mixture=True),
    kd.total_variation,
    kd.alpha_beta(0.2, 0.7),
    kd.adaptive_kl,
)
TEACHERS = ("logits", "hidden", "bucket", "uniform", "renormalize", "drop")
STUDENTS = ("logits", "hidden")
REGIMES = {"apart": 1.0, "near": 0.05}
TOKENS, VOCAB, HIDDEN, TEACHER_HIDDEN, TOP_K = 8, 131, 16, 24, 8
SEEDS = 2
FLOAT64_BOUND, PLAIN_FACTOR, ROUNDINGS = 1e-10, 2.0, 4.0


def build(student_form, teacher_form, gap, dtype, seed):
    """(student, teacher, leaves), the same numbers for every dtype up to rounding.

    The teacher is made from the student's hidden states moved by ``gap``, so that the two are as
    near as the regime says in every form.
    """
    g = torch.Generator().manual_seed(seed)

    def random(*shape):
        return torch.randn(*shape, generator=g, dtype=torch.float64)

    hidden, weight = random(TOKENS, HIDDEN), random(VOCAB, HIDDEN)
    t_hidden = torch.cat([hidden, gap * random(TOKENS, TEACHER_HIDDEN - HIDDEN)], 1)
    t_weight = torch.cat([weight, random(VOCAB, TEACHER_HIDDEN - HIDDEN)], 1)
    hidden, weight, t_hidden, t_weight = (x.to(dtype) for x in (hidden, weight, t_hidden, t_weight))
    if student_form == "hidden":
        leaves = [hidden, weight]
        student = kd.Hidden(hidden, weight)
    else:
        student = (hidden.double() @ weight.double().T).to(dtype)
        leaves = [student]
    for leaf in leaves:
        leaf.requires_grad_()
    if teacher_form == "hidden":
        return student, kd.Hidden(t_hidden.detach(), t_weight.detach()), leaves
    logits = (t_hidden.double() @ t_weight.double().T).detach()
    if teacher_form == "logits":
        return student, logits.to(dtype), leaves
    logprobs, ids = torch.log_softmax(logits, -1).topk(TOP_K)
    stored = logprobs if dtype == torch.float64 else logprobs.float()
    return student, kd.TopK(ids, stored, tail=teacher_form, tail_at_temperature="spread"), leaves


def exactly(student, leaves):
    """The same student over float64 copies of its leaves, so that its gradient is not rounded."""
    copies = [leaf.detach().double().requires_grad_() for leaf in leaves]
    return (copies[0] if isinstance(student, torch.Tensor) else kd.Hidden(*copies)), copies


def meaningful(divergence, teacher_form):
    if teacher_form == "drop":
        return divergence.name == "forward_kl"
    return not (teacher_form == "renormalize" and divergence.needs_teacher_support)


def errors_of(got, want):
    """[value error, worst gradient error], each relative to the largest true value."""
    found = [
        float((g.double() - w.double()).abs().max() / w.double().abs().max())
        for g, w in zip(got, want, strict=True)
    ]
    return [found[0], max(found[1:])]


def evaluate(losses, leaves):
    return [losses.detach(), *torch.autograd.grad(losses.sum(), leaves)]


def worst_errors(divergence, student_form, teacher_form, gap, dtype, backend):
    """(ours, plain PyTorch's): [value, gradient] errors, the largest over the seeds."""
    found = []
    for seed in range(SEEDS):
        case = build(student_form, teacher_form, gap, dtype, seed)
        student, teacher, leaves = case
        exact, copies = exactly(student, leaves)
        if isinstance(teacher, kd.Hidden):
            exact_teacher = kd.Hidden(teacher.hidden.double(), teacher.weight.double())
        else:
            exact_teacher = teacher
        truth = divergence(exact, exact_teacher, reduction="none", backend="reference")
        want = evaluate(truth, copies)
        ours = divergence(student, teacher, reduction="none", backend=backend)
        plain = plain_losses(divergence, student, teacher)
        found.append([errors_of(evaluate(x, leaves), want) for x in (ours, plain)])
    return [
        [max(column) for column in zip(*side, strict=True)] for side in zip(*found, strict=True)
    ]


def cell(divergence, student_form, teacher_form, dtype, backend):
    """(text, ok) of one combination, the worse of the two regimes."""
    worst = None
    eps = torch.finfo(dtype).eps
    for gap in REGIMES.values():
        got, plain = worst_errors(divergence, student_form, teacher_form, gap, dtype, backend)
        text = f"{got[0]:.0e} {got[1]:.0e}"
        if dtype == torch.float64:
            score = max(got)
            ok = score <= FLOAT64_BOUND
        else:
            bounds = [PLAIN_FACTOR * p + ROUNDINGS * eps for p in plain]
            ok = all(g <= bound for g, bound in zip(got, bounds, strict=True))
            score = max(g / max(p, eps) for g, p in zip(got, plain, strict=True))
            text += f" ({score:.1f} x)"
        if worst is None or (not ok, score) > (not worst[2], worst[0]):
            worst = (score, text, ok)
    return worst[1], worst[2]


def table(dtype, backend):
    """(one dtype's table, the combinations that break their bound)."""
    broken, rows = [], []
    for divergence, student_form in itertools.product(DIVERGENCES, STUDENTS):
        rows.append([str(divergence), student_form])
        for teacher_form in TEACHERS:
            if not meaningful(divergence, teacher_form):
                rows[-1].append("refused")
                continue
            text, ok = cell(divergence, student_form, teacher_form, dtype, backend)
            rows[-1].append(text if ok else f"**{text}**")
            if not ok:
                broken.append(f"{divergence}, {student_form} x {teacher_form}, {dtype}: {text}")
    columns = ["divergence", "student", *(f"teacher: {teacher}" for teacher in TEACHERS)]
    return tables.markdown(columns, rows, text=columns), broken


def main(argv=None):
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    names = ("float64", "float32", "bfloat16", "float16")
    parser.add_argument("--dtype", choices=names, action="append", help="default: all but float16")
    parser.add_argument("--backend", default="torch", choices=("torch", "triton", "auto"))
    args = parser.parse_args(argv)
    started = time.perf_counter()
    print(f"Errors against the float64 oracle; torch {torch.__version__}, {platform.machine()}.")
    sizes = f"vocabulary {VOCAB}, hidden {HIDDEN} and {TEACHER_HIDDEN}, K {TOP_K}"
    print(f"{SEEDS} seeds, {TOKENS} tokens, {sizes}.")
    broken = []
    for name in args.dtype or names[:3]:
        made, more = table(getattr(torch, name), args.backend)
        print(f"\n### {name}, backend {args.backend}\n\n{made}", flush=True)
        broken += more
    print(f"\nBounds: float64 <= {FLOAT64_BOUND:g}; narrower <= {PLAIN_FACTOR:g} x plain PyTorch.")
    print(f"{len(broken)} broken, {time.perf_counter() - started:.0f} s.")
    for line in broken:
        print(f"BROKEN: {line}")
    return 1 if broken else 0


if __name__ == "__main__":
    sys.exit(main())
