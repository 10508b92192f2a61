"""The cases of the tensor-parallel tests: whole inputs, and a rank's shard of them.

37 live tokens of 40 columns: with four shards the last holds 7 and the padding.
"""

import dataclasses

import torch
from loss_cases import DIVERGENCES

import kd

TOKENS, VOCAB, WIDTH, HIDDEN, TEACHER_HIDDEN = 5, 37, 40, 6, 7
BOTH = ("torch", "triton")
RANKS = (2, 4)


@dataclasses.dataclass(frozen=True)
class Case:
    """Inputs by form, options of the loss, and how many all-reduces its forward may take."""

    student: str = "logits"
    teacher: str = "logits"
    collectives: int = 1
    backends: tuple[str, ...] = BOTH
    dtype: torch.dtype = torch.float32
    change: str = ""
    options: dict = dataclasses.field(default_factory=dict)


def _labels():
    return torch.tensor([0, 36, -100, 9, 20])  # shards' ends, one ignored


HARD = dict(labels=_labels(), ce_weight=0.4)
ONE = ("forward_kl", "reverse_kl", "skew_forward_kl(0)", "skew_reverse_kl(0)")


def _cases():
    found = {}
    for name, divergence in DIVERGENCES.items():
        options = dict(divergence=divergence, reduction="none", temperature=1.5)
        if name != "adaptive_kl":
            found[f"dense {name}"] = Case(collectives=1 if name in ONE else 2, options=options)
        found[f"sparse {name}"] = Case(teacher="bucket", options=options, backends=("torch",))
    for name in ("forward_kl", "jsd(0.5)", "reverse_kl"):
        d = DIVERGENCES[name]
        few = 1 if name in ONE else 2
        found[f"mean {name}"] = Case(collectives=few, options=dict(divergence=d, **HARD))
        hot = dict(divergence=d, temperature=2.0, **HARD)
        found[f"hot {name}"] = Case(collectives=few, options=hot)
        found[f"hot sparse {name}"] = Case(teacher="bucket", options=hot)
        found[f"float64 {name}"] = Case(
            collectives=few, dtype=torch.float64, backends=("torch",), options=hot
        )
        found[f"collapsed {name}"] = Case(
            collectives=few, change="collapsed", options=dict(divergence=d, reduction="none")
        )
        found[f"far {name}"] = Case(
            collectives=few, change="far", options=dict(divergence=d, reduction="none")
        )
    for name in ("forward_kl", "jsd(0.5)", "total_variation", "skew_forward_kl(0.1)"):
        found[f"minus infinity {name}"] = Case(
            collectives=1 if name in ONE else 2,
            change="minus infinity",
            options=dict(divergence=DIVERGENCES[name], reduction="none"),
        )
    for tail in ("renormalize", "drop", "uniform"):
        found[f"tail {tail}"] = Case(teacher=tail, options=dict(**HARD))
    found["bounded"] = Case(
        collectives=2, options=dict(divergence="reverse_kl", min_logprob=-5.0, reduction="sum")
    )
    found["cross-entropy"] = Case(teacher="none", options=dict(kd_weight=0.0, **HARD))
    weights = torch.tensor([1.0, 0.0, 2.0, 0.5, 1.0])
    for teacher in ("logits", "hidden", "bucket", "uniform"):
        options = dict(weights=weights, divergence="reverse_kl", temperature=2.0, **HARD)
        found[f"linear {teacher}"] = Case("hidden", teacher, options=options)
        found[f"linear tokens {teacher}"] = Case(
            "hidden", teacher, options=dict(options, reduction="none")
        )
    found["linear jsd"] = Case("hidden", "hidden", 2, options=dict(divergence="jsd", num_items=3))
    return found


def whole(case):
    """(student, teacher, leaves, options) of the whole vocabulary."""
    g = torch.Generator().manual_seed(0)

    def random(*shape, scale=1.0):
        made = scale * torch.randn(*shape, generator=g, dtype=torch.float64)
        return made.to(case.dtype)

    logits, other = random(TOKENS, WIDTH, scale=2.0), random(TOKENS, WIDTH, scale=2.0)
    logits[:, VOCAB:], other[:, VOCAB:] = 50.0, -50.0  # padding counts for nothing
    _change(case.change, logits, other)
    student, leaves = logits, [logits]
    if case.student == "hidden":
        hidden, weight, bias = random(TOKENS, HIDDEN), random(WIDTH, HIDDEN), random(WIDTH)
        a, b = random(2, HIDDEN), random(WIDTH, 2)
        leaves = [hidden, weight, bias, a, b]
        student = kd.Hidden(hidden, weight, bias, logit_scale=1.3, softcap=6.0, lora=(a, b, 0.5))
    teacher = other
    if case.teacher == "hidden":
        teacher = kd.Hidden(random(TOKENS, TEACHER_HIDDEN), random(WIDTH, TEACHER_HIDDEN))
    elif case.teacher == "none":
        teacher = None
    elif case.teacher != "logits":
        logprobs, ids = torch.log_softmax(other[:, :VOCAB], -1).topk(5)
        ids[0, 1], ids[1, 0] = -1, ids[1, 2]
        ids[3, 4] = 9  # the label of its row
        logprobs[1, :3] -= 1
        teacher = kd.TopK(ids, logprobs, tail=case.teacher)
        if case.teacher in ("bucket", "uniform"):
            left = torch.log_softmax(other[:, :VOCAB], -1).scatter(1, ids.clamp(min=0), -torch.inf)
            stored = torch.stack([(left / t).logsumexp(-1) for t in (1.0, 1.5, 4.0)], -1)
            teacher = dataclasses.replace(
                teacher, tail_log_partition=stored, tail_temperatures=(1.0, 1.5, 4.0)
            )
    return student, teacher, leaves, dict(case.options, vocab_size=VOCAB)


def _change(change, student, teacher):
    if change == "collapsed":  # onto tokens of different shards
        student[:, 25] += 200.0
        teacher[:2, 25] += 200.0
        teacher[2:, 3] += 20.0
    elif change == "far":  # logits that overflow exp in float64 as they stand
        student += 3000.0
        teacher -= 3000.0
        student[:, 30:VOCAB] -= 4000.0
        teacher[:, 30:VOCAB] -= 4000.0
    elif change == "minus infinity":  # a shard's columns and half of another's
        student[0, 10:25] = teacher[0, 10:25] = -torch.inf
        teacher[1, ::2] = student[1, ::2] = -torch.inf
        teacher[2, 20:] = -torch.inf


def shard(case, rank, ranks):
    """(student, teacher, leaves, options) of one rank's columns."""
    student, teacher, _, options = whole(case)
    width = WIDTH // ranks
    columns = slice(rank * width, (rank + 1) * width)

    def cut(source):
        if isinstance(source, torch.Tensor):
            return source[:, columns].clone()
        if not isinstance(source, kd.Hidden):
            return source
        low = source.lora and (source.lora[0], source.lora[1][columns].clone(), source.lora[2])
        bias = None if source.bias is None else source.bias[columns].clone()
        weight = source.weight[columns].clone()
        return kd.Hidden(
            source.hidden, weight, bias, source.logit_scale, source.softcap, low
        )  # fmt: skip

    student, teacher = cut(student), cut(teacher)
    leaves = [student]
    if isinstance(student, kd.Hidden):
        a, b, _ = student.lora
        leaves = [student.hidden, student.weight, student.bias, a, b]
    return student, teacher, leaves, options


def upstream(loss):
    return torch.linspace(0.5, 1.5, loss.numel(), dtype=torch.float64).reshape(loss.shape)


def cases(ranks):
    """Every case on two ranks; on four, one of each kind."""
    kinds = ("mean", "hot sparse", "far", "minus infinity", "linear logits", "linear tokens bucket")
    return {n: c for n, c in _cases().items() if ranks == 2 or n.startswith(kinds)}
