"""The loss where ranks hold shards of the vocabulary (tensor parallel): logits never leave a rank.

Forward and reverse KL, cross-entropy and every divergence of a sparse teacher take one SUM
all-reduce of a few numbers a row; jsd, total variation, the skewed and alpha-beta divergences take
a second one, of two numbers a row. How: kd.losses.rows_sharded; a rank's own part:
kd.losses.columns.
"""

from __future__ import annotations

import dataclasses
from typing import Any

import torch.distributed as dist
from torch import Tensor

from kd.losses import checks
from kd.losses.api import solve
from kd.losses.divergences import Divergence, resolve
from kd.losses.inputs import Hidden, Student, Teacher, TopK
from kd.losses.problem import Objective
from kd.losses.rows_sharded import Shard

WHERE = "vocab_parallel_loss"


def vocab_parallel_loss(
    student: Student,
    teacher: Teacher | None,
    *,
    group: Any = None,
    first_token: int | None = None,
    vocab_size: int | None = None,
    divergence: str | Divergence = "forward_kl",
    temperature: float = 1.0,
    scale_by_t2: bool = True,
    labels: Tensor | None = None,
    ignore_index: int = -100,
    kd_weight: float = 1.0,
    ce_weight: float = 0.0,
    weights: Tensor | None = None,
    reduction: str = "mean",
    num_items: float | Tensor | None = None,
    min_logprob: float | None = None,
    reduce_hidden: bool = True,
    backend: str = "auto",
    floor: float | None = None,
) -> Tensor:
    """``kd.distillation_loss`` where each rank of ``group`` holds a shard of the vocabulary.

    Every rank calls it with the same rows and gets the same loss; each gets the gradient of what it
    holds. Nothing of [N, V] crosses ranks: at most ranks * 7 + K + 1 numbers a row.

    Args:
        student: this rank's logits [..., V_rank], or ``kd.Hidden`` with the hidden states whole,
            as on every rank, and this rank's rows of the lm_head (and of bias and LoRA's B).
        teacher: logits [..., V_rank] or ``kd.Hidden``, sharded as the student is; or ``kd.TopK``
            with ids of the whole vocabulary, the same on every rank; None for cross-entropy alone.
        group: the process group of the shards; None is the default one.
        first_token: the token of this rank's first column. None: shards of equal width, in order
            of rank. With it, shards may differ in width; vocab_size is then needed.
        vocab_size: number of live tokens of the whole vocabulary; None is all columns.
        labels: [...] token ids of the whole vocabulary, the same on every rank.
        reduce_hidden: add up the hidden states' gradient over ranks, one more all-reduce. False
            where the layer below does it (Megatron's copy region, sequence parallelism).
        divergence, temperature, scale_by_t2, ignore_index, kd_weight, ce_weight, weights,
            reduction, num_items, min_logprob, floor, backend: as in ``kd.distillation_loss``;
            no adaptive_kl but on a sparse teacher, and no backend="reference".

    Returns:
        A scalar, or [...] for reduction="none"; the same on every rank.

    Raises:
        TypeError, ValueError: naming the argument, the rule and the value.
        RuntimeError: torch.distributed is not initialised.

    Source: Shoeybi et al. 2019 (Megatron-LM), https://arxiv.org/abs/1909.08053, section 3, for the
        sharded softmax.
    """
    if floor is not None:
        min_logprob = checks.renamed_floor(WHERE, min_logprob, floor)
    chosen = resolve(divergence)
    checks.options(
        WHERE, temperature, kd_weight, ce_weight, reduction, num_items, backend, min_logprob
    )
    checks.combination(WHERE, chosen, teacher, temperature, ce_weight, labels, min_logprob)
    _check_shardable(chosen, teacher, kd_weight, backend)
    shard, vocab = _shard(student, teacher, group, first_token, vocab_size, reduce_hidden)
    checks.inputs(WHERE, student, _local(teacher), labels, weights, None)
    objective = Objective(
        divergence=chosen,
        temperature=float(temperature),
        kd_weight=0.0 if teacher is None else kd_weight * (temperature**2 if scale_by_t2 else 1.0),
        ce_weight=float(ce_weight),
        vocab_size=vocab,
        min_logprob=min_logprob,
    )
    return solve(
        WHERE,
        student,
        teacher,
        labels,
        weights,
        objective,
        ignore_index=ignore_index,
        reduction=reduction,
        num_items=num_items,
        overwrite=False,
        backend=backend,
        shard=shard,
    )


def _local(teacher: Teacher | None) -> Teacher | None:
    """The teacher without its ids' count, which is the whole vocabulary's to bound."""
    if isinstance(teacher, TopK):
        return dataclasses.replace(
            teacher, ids=teacher.ids[..., :1], logprobs=teacher.logprobs[..., :1]
        )
    return teacher


def _check_shardable(
    divergence: Divergence, teacher: Teacher | None, kd_weight: float, backend: str
) -> None:
    if backend == "reference":
        raise ValueError(
            f"{WHERE}: backend must be auto, torch or triton, got 'reference'. Gather the logits "
            "and call kd.distillation_loss to compare with it."
        )
    if teacher is None and kd_weight != 0:
        raise ValueError(
            f"{WHERE}: teacher must be given where kd_weight is {kd_weight}, got None. Pass "
            "kd_weight=0 for cross-entropy alone."
        )
    dense = not isinstance(teacher, TopK) or teacher.tail == "uniform"
    if divergence.name == "adaptive_kl" and dense:
        raise ValueError(
            f"{WHERE}: divergence must be one whose sums are the shards' sums, got adaptive_kl, "
            "whose head needs the teacher's most probable tokens of the whole row. Pass the "
            "teacher as kd.TopK, or take skew_forward_kl."
        )


def _shard(
    student: Student,
    teacher: Teacher | None,
    group: Any,
    first_token: int | None,
    vocab_size: int | None,
    reduce_hidden: bool,
) -> tuple[Shard, int]:
    """(this rank's columns, the number of live tokens)."""
    if not dist.is_available() or not dist.is_initialized():
        raise RuntimeError(
            f"{WHERE}: torch.distributed must be initialised, got no process group. Call "
            "torch.distributed.init_process_group, or kd.distillation_loss on one device."
        )
    rank, ranks, width = dist.get_rank(group), dist.get_world_size(group), checks.width(student)
    if rank < 0:
        raise ValueError(f"{WHERE}: group must hold this rank, {dist.get_rank()}, got another's.")
    if isinstance(teacher, (Tensor, Hidden)) and checks.width(teacher) != width:
        raise ValueError(
            f"{WHERE}: teacher must be sharded as the student is, {width} columns on this rank, "
            f"got {checks.width(teacher)}. Pad or cut the whole lm_heads to one width, then shard."
        )
    if first_token is not None and vocab_size is None:
        raise ValueError(f"{WHERE}: vocab_size must be given with first_token, got None.")
    first = rank * width if first_token is None else first_token
    vocab = ranks * width if vocab_size is None else vocab_size
    if not isinstance(vocab, int) or vocab < 1 or (first_token is None and vocab > ranks * width):
        raise ValueError(
            f"{WHERE}: vocab_size must be an integer between 1 and the shards' {ranks * width} "
            f"columns, got {vocab_size!r}."
        )
    if first < 0:
        raise ValueError(f"{WHERE}: first_token must be >= 0, got {first_token}.")
    if isinstance(teacher, TopK) and teacher.ids.shape[-1] > vocab:
        raise ValueError(
            f"{WHERE}: teacher holds {teacher.ids.shape[-1]} entries a row, more than the {vocab} "
            "live tokens. Slice ids and logprobs, or correct vocab_size."
        )
    live = max(0, min(width, vocab - first))
    return Shard(group, rank, ranks, first, live, reduce_hidden), vocab
