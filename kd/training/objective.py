"""What a step minimises: hard labels, one or several teachers, or a mix; and the bare loop."""

from __future__ import annotations

import copy
import dataclasses
import math
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

import kd
from kd.losses import Hidden
from kd.losses.checks import check_temperature, renamed_floor
from kd.losses.divergences import resolve
from kd.losses.inputs import TAILS
from kd.training.alignment import aligned_labels
from kd.training.faults import check_context
from kd.training.packs import documents_apart
from kd.training.schedules import Schedule
from kd.training.sharing import check_apart
from kd.training.teachers import MODEL_KEYS, STAMP, Teachers

SCHEDULED = ("kd_weight", "ce_weight", "temperature")


@dataclass(frozen=True)
class Objective:
    """kd_weight * T**2 * D(teacher, student) + ce_weight * cross-entropy, per trained token.

    ``Objective(teacher=teacher)`` is the divergence alone, ``Objective(kd_weight=0.5,
    ce_weight=0.5, temperature=2.0, teacher=teacher)`` a mix. The rule for weights that are left
    out: kd_weight is 1 and ce_weight 0, as in ``kd.distillation_loss``; without a teacher there is
    only the cross-entropy, with weight 1, so that ``Objective()`` is plain SFT.
    """

    kd_weight: float | Schedule = None  # type: ignore[assignment]
    """Weight of the divergence from the teacher; 1 when None, as in ``kd.distillation_loss``. 0
    with a teacher is refused."""
    ce_weight: float | Schedule = None  # type: ignore[assignment]
    """Weight of the cross-entropy on the labels; 0 when None, and 1 where nothing else is
    trained, without a teacher."""
    divergence: Any = "forward_kl"
    """A name, or kd.jsd(0.5), kd.skew_reverse_kl(0.1), ..."""
    temperature: float | Schedule = 1.0
    """Divides both models' logits in the soft part; the hard part is never affected."""
    scale_by_t2: bool = True
    """Multiply the soft part by temperature**2 (Hinton), so that the mix keeps its balance."""
    teacher_temperature: float = 1.0
    """What cached log-probabilities were captured at; a cache's own record counts, and another
    value than the record's is refused."""
    tail: str = "bucket"
    """What the probability outside the cached tokens means (see kd.TopK); likewise."""
    tail_at_temperature: str | None = None
    """How a cache without stored tails is read at another temperature than its own: "spread" or
    "one_outcome" (see kd.TopK). None refuses it before training starts."""
    vocab_size: int | None = None
    """Live tokens; the padded rows of the lm_head past it take no part. A teacher cache's own
    when None."""
    min_logprob: float | None = None
    """Lower bound on both sides' log-probabilities, for divergences that would be infinite where
    the teacher has probability zero (see kd.distillation_loss)."""
    backend: str = "auto"
    """Which implementation of the losses runs: auto, torch, triton, reference."""
    teacher: Any = dataclasses.field(default=None, compare=False, repr=False)
    """A causal LM in memory, a cache, a ``Teacher`` (weight, domains, offload), or a list of
    them: the one place that knows them, which the collator gets them from. None: SFT, or with a
    kd_weight one cache's targets that the batch holds."""

    floor: dataclasses.InitVar[float | None] = None
    """The former name of min_logprob; warns."""

    def __post_init__(self, floor: float | None) -> None:
        bound = renamed_floor("Objective", self.min_logprob, floor)
        object.__setattr__(self, "min_logprob", bound)
        object.__setattr__(self, "_given", (self.kd_weight, self.ce_weight))
        object.__setattr__(self, "teacher", Teachers.of(self.teacher))
        if self.kd_weight is None:
            object.__setattr__(self, "kd_weight", 0.0 if self.teacher is None else 1.0)
        soft = not _is_zero(self.kd_weight)
        object.__setattr__(self, "_taught", soft)
        if self.ce_weight is None:
            object.__setattr__(self, "ce_weight", 0.0 if soft else 1.0)
        self._check_options()
        if self.teacher is not None:
            self._agree_with(self.teacher)

    def _check_options(self) -> None:
        try:
            resolve(self.divergence)
        except (TypeError, ValueError) as error:
            raise type(error)(str(error).replace("distillation_loss:", "Objective:")) from None
        for name in SCHEDULED:
            value = getattr(self, name)
            ends = (value.start, value.end) if isinstance(value, Schedule) else (value,)
            least = 0 if name != "temperature" else 1e-6
            if not all(math.isfinite(end) and end >= least for end in ends):
                raise ValueError(
                    f"Objective: {name} must be a finite number "
                    f"{'above' if least else 'of at least'} 0, got {value}. "
                    "Turn a part off with a weight of 0."
                )
        if self.teacher is not None and not self._taught:  # type: ignore[attr-defined]
            raise ValueError(
                "Objective: kd_weight must be above 0 where there is a teacher, got "
                f"{self.kd_weight}. Leave the teacher out to train on the labels alone, or "
                "kd_weight for a weight of 1."
            )
        if _is_zero(self.kd_weight) and _is_zero(self.ce_weight):
            raise ValueError(
                "Objective: kd_weight or ce_weight must be above 0, got 0 and 0. "
                "Nothing would be trained."
            )

    def taught_by(self, teacher: Any) -> Objective:
        """The same objective with a teacher; weights that were left out are those of one."""
        kd_weight, ce_weight = self._given  # type: ignore[attr-defined]
        return dataclasses.replace(self, teacher=teacher, kd_weight=kd_weight, ce_weight=ce_weight)

    def _agree_with(self, teachers: Teachers) -> None:
        """Refuse what contradicts a cache's own record, and take its live vocabulary."""
        for member in teachers.members:
            meta = getattr(member.source, "meta", None)
            if member.kind not in ("sparse", "hidden") or meta is None:
                continue
            if member.kind == "sparse":
                self._check_form(float(meta.temperature), meta.tail)
                self._check_temperature(meta)
            if self.vocab_size is None:
                object.__setattr__(self, "vocab_size", meta.live_vocab)

    def _check_temperature(self, meta: Any) -> None:
        """Refuse now what the loss would refuse in a step, at both ends of a schedule."""
        wanted = self.temperature
        ends = (wanted.start, wanted.end) if isinstance(wanted, Schedule) else (wanted,)
        stored = tuple(getattr(meta, "tail_temperatures", ()))
        for end in ends if self.soft else ():
            check_temperature(
                "Objective",
                end,
                float(meta.temperature),
                meta.tail,
                stored,
                self.tail_at_temperature,
            )

    def _check_form(self, temperature: float, tail: str) -> None:
        if self.teacher_temperature not in (1.0, temperature):
            raise ValueError(
                "Objective: teacher_temperature must be what the cache was captured at, "
                f"{temperature}, got {self.teacher_temperature}. Leave it out."
            )
        if self.tail not in ("bucket", tail):
            raise ValueError(
                f"Objective: tail must be the cache's own, {tail!r}, got {self.tail!r}. "
                "Leave it out."
            )
        if tail == "drop" and self.temperature != temperature:
            raise ValueError(
                "Objective: temperature must be the one that sampled targets were captured at, "
                f"{temperature}, got {self.temperature}: dropped mass cannot be renormalised. "
                "Capture at that temperature, or use a top-k cache."
            )

    def at(self, step: int, total: int) -> Objective:
        """The objective of one optimiser step, counted from 0, of a run of ``total``."""
        scheduled = [name for name in SCHEDULED if isinstance(getattr(self, name), Schedule)]
        if not scheduled:
            return self
        now = copy.copy(self)
        for name in scheduled:
            object.__setattr__(now, name, getattr(self, name).at(step, total))
        return now

    @property
    def soft(self) -> bool:
        """Whether a teacher is asked."""
        return isinstance(self.kd_weight, Schedule) or self.kd_weight > 0

    def loss(
        self,
        student: Hidden | Tensor,
        batch: Mapping[str, Any],
        *,
        reduction: str = "mean",
        num_items: Any = None,
    ) -> Tensor:
        """The objective on the ``shift_labels`` of a batch, row by row of the student's."""
        for name in SCHEDULED:
            if isinstance(getattr(self, name), Schedule):
                raise TypeError(
                    f"Objective: {name} must be a number in a step, got a Schedule. Pass "
                    "objective.at(step, steps)."
                )
        labels = self.check_batch(batch, "Objective.loss")
        form = batch.get("teacher_form")
        if self.teacher is None and self.vocab_size is None and form is not None:
            now = copy.copy(self)  # the cache's own record counts, here as with teacher=cache
            object.__setattr__(now, "vocab_size", int(form[0, 2]) or None)
            if now.vocab_size is not None:
                return now.loss(student, batch, reduction=reduction, num_items=num_items)
        passes = list(self._passes(batch))
        if len(passes) > 1 and reduction == "mean" and num_items is None:
            num_items = trained_weight(labels, batch.get("weights")).clamp(min=1e-30)
        losses = [
            self._one(student, batch, *item, reduction=reduction, num_items=num_items)
            for item in passes
        ]
        return losses[0] if len(losses) == 1 else torch.stack(losses).sum(0)

    def check_batch(self, batch: Mapping[str, Any], asked: str) -> Tensor:
        """The aligned labels of a batch; refuses one whose teachers are not this objective's."""
        labels = aligned_labels(batch, asked)
        told = sorted(key for key in batch if key.startswith("teacher_"))
        stamps = [key for key in told if key.startswith(STAMP)]
        fix = "Give the collator the objective: DistillationCollator(pad_token_id, objective)."
        if self.teacher is not None and stamps not in ([], [self.teacher.stamp]):
            raise ValueError(
                f"{asked}: batch must hold what the objective's own teachers said, got targets of "
                f"other teachers, weights or domains. {fix}"
            )
        if self.teacher is None and told and not self._taught:  # type: ignore[attr-defined]
            raise ValueError(
                f"{asked}: batch must hold no teacher's targets where the objective has no "
                f"teacher, got {told}. Pass Objective(teacher=...) to learn from them, or give the "
                "collator no cache."
            )
        several = [key for key in told if key.removeprefix(STAMP)[-2:-1] == "_"]
        if self.teacher is None and told and (several or "domain" in batch):
            raise ValueError(
                f"{asked}: objective must have the teachers of the batch, which are several or "
                f"have domains, got none. Pass Objective(teacher=...). {fix}"
            )
        return labels

    def _passes(
        self, batch: Mapping[str, Any]
    ) -> Iterator[tuple[Any, float, float, Tensor | None]]:
        """(target or None, kd_weight, ce_weight, rows or None): their losses add up.

        The cross-entropy of a row goes with the first teacher of its domain, so that a row with
        one teacher is computed once.
        """
        if not self.soft:
            yield None, 0.0, self.ce_weight, None  # type: ignore[misc]
            return
        teachers = self.teacher
        if teachers is None:
            yield self.batch_target(batch), self.kd_weight, self.ce_weight, None  # type: ignore[misc]
            return
        everything = any(member.domains is None for member in teachers.members)
        names = range(-1 if everything else 0, len(teachers.domains))
        owed, asked = set(names), False  # owed: domains whose cross-entropy is still to come
        for number, member in enumerate(teachers.members):
            weight = self.kd_weight * member.weight
            if member.kind == "none" or weight == 0:
                continue
            target = teachers.target(
                number, batch, self.tail, self.teacher_temperature, self.tail_at_temperature
            )
            if target is None:
                continue
            mine = {name for name in names if teachers.teaches(number, name)}
            rows = teachers.mask(number, batch["domain"]) if member.domains is not None else None
            with_labels = self.ce_weight if mine <= owed else 0.0
            if with_labels:
                owed -= mine
            asked = True
            yield target, weight, with_labels, rows  # type: ignore[misc]
        if (
            not asked and not self.ce_weight
        ):  # no row of this batch has a teacher: zero, with a graph
            yield None, 0.0, 1.0, torch.zeros_like(batch["shift_labels"], dtype=torch.bool)
        if owed and self.ce_weight:
            rows = None
            if owed != set(names):
                left = torch.tensor(sorted(owed), device=batch["domain"].device)
                rows = torch.isin(batch["domain"], left)
            yield None, 0.0, self.ce_weight, rows  # type: ignore[misc]

    def _one(
        self,
        student: Hidden | Tensor,
        batch: Mapping[str, Any],
        target: Any,
        kd_weight: float,
        ce_weight: float,
        rows: Tensor | None,
        *,
        reduction: str,
        num_items: Any,
    ) -> Tensor:
        labels, weights = batch["shift_labels"], batch.get("weights")
        if rows is not None:
            labels = torch.where(rows, labels, torch.full_like(labels, -100))
        options: dict[str, Any] = {
            "weights": weights,
            "vocab_size": self.vocab_size,
            "reduction": reduction,
            "num_items": num_items,
            "backend": self.backend,
        }
        if target is None:
            loss = kd.cross_entropy(student, labels, **options)
            return loss if ce_weight == 1 else loss * ce_weight
        return kd.distillation_loss(
            student,
            target,
            divergence=self.divergence,
            temperature=self.temperature,  # type: ignore[arg-type]
            scale_by_t2=self.scale_by_t2,
            labels=labels,
            kd_weight=kd_weight,
            ce_weight=ce_weight,
            min_logprob=self.min_logprob,
            **options,
        )

    def targets(self, batch: Mapping[str, Any]) -> Iterator[tuple[Any, Tensor | None]]:
        """Every teacher's answer about a batch, and the rows it teaches (None: all)."""
        soft = dataclasses.replace(self, kd_weight=1.0, ce_weight=0.0)
        yield from ((target, rows) for target, _, _, rows in soft._passes(batch))

    def batch_target(self, batch: Mapping[str, Any]) -> kd.TopK:
        """The batch's cached targets as a ``kd.TopK``."""
        if batch.get("teacher_ids") is None:
            raise ValueError(
                "Objective: batch must hold teacher_ids and teacher_logprobs when kd_weight > 0, "
                f"got {sorted(batch)}. Give the collator a cache, give the objective a teacher, or "
                "set kd_weight=0."
            )
        temperature, tail = self.teacher_temperature, self.tail
        stored: list[float] = []
        form = batch.get("teacher_form")
        if form is not None:
            # Seven digits are what float32 carried: 0.7 is 0.7 again.
            temperature, number, _, weight, *stored = (
                float(f"{value:.7g}") for value in form[0].tolist()
            )
            tail = TAILS[int(number)]
            self._check_form(temperature, tail)
            if weight != 1:
                raise ValueError(
                    f"Objective: teacher must be given where its weight is not 1, got none for "
                    f"{weight:g}. Pass Objective(teacher=...) and DistillationCollator("
                    "pad_token_id, objective)."
                )
        return kd.TopK(
            batch["teacher_ids"],
            batch["teacher_logprobs"],
            tail=tail,
            temperature=temperature,
            tail_log_partition=batch.get("teacher_tails"),
            tail_temperatures=tuple(stored),
            tail_at_temperature=self.tail_at_temperature,
        )


def _is_zero(weight: float | Schedule) -> bool:
    return (weight.start, weight.end) == (0, 0) if isinstance(weight, Schedule) else weight == 0


def trained_weight(labels: Tensor, weights: Tensor | None = None) -> Tensor:
    """How many tokens count, or their weights' sum: what a mean over tokens divides by."""
    trained = labels != -100
    return (trained if weights is None else weights * trained).sum().float()


Observer = Callable[[Hidden, dict[str, Any]], None]
TOKEN_KEYS = ("shift_labels", "weights", "domain", "token_class")


def flat_targets(batch: Mapping[str, Any]) -> dict[str, Any]:
    """The per-token entries of a batch with batch and length made one dimension."""
    flat: dict[str, Any] = {}
    for key, value in batch.items():
        if value is None:
            continue
        if isinstance(value, Hidden):
            flat[key] = dataclasses.replace(value, hidden=value.hidden.flatten(0, 1))
        elif key.startswith(("teacher_form", STAMP)):
            flat[key] = value
        elif key in TOKEN_KEYS or key.startswith("teacher_"):
            flat[key] = value.flatten(0, 1)
    return flat


def head_loss(
    objective: Objective,
    batch: Mapping[str, Any],
    num_items: Any = None,
    observe: Observer | None = None,
) -> Callable[[Hidden], Tensor]:
    """What the student's lm_head computes instead of logits (see kd.training.student)."""

    def loss(student: Hidden) -> Tensor:
        flat = dataclasses.replace(student, hidden=student.hidden.flatten(0, 1))  # [N, H]
        targets = flat_targets(batch)
        if observe is not None:
            with torch.no_grad():
                observe(flat, targets)
        return objective.loss(flat, targets, num_items=num_items)

    return loss


def _check_prepared(model: Any) -> None:
    modules = model.modules() if isinstance(model, torch.nn.Module) else ()
    if modules and not any(getattr(m, "_kd_original_forward", None) is not None for m in modules):
        raise TypeError(
            "compute_loss: model must be one that prepare_student was called on, got "
            f"{type(model).__name__}. Call kd.training.prepare_student(model) once, before DDP, "
            "FSDP or accelerate wrap it."
        )


def compute_loss(
    model: Any,
    batch: Mapping[str, Any],
    objective: Objective | None = None,
    *,
    num_items: Any = None,
    observe: Observer | None = None,
) -> Tensor:
    """The loss of one batch through a prepared student, for a training loop of one's own.

    Args:
        model: the student after ``prepare_student``, bare or wrapped by DDP, FSDP or accelerate.
        batch: what ``DistillationCollator`` returns; one without ``shift_labels`` is refused.
        objective: what to minimise; plain cross-entropy when None. One with schedules is passed
            as ``objective.at(step, steps)``. Its models in memory are run here.
        num_items: trained tokens of the whole optimiser step, over all microbatches and ranks;
            the loss is divided by it, so that any split gives the one-batch gradient. The batch's
            own count when None. Under DDP multiply the loss by the number of ranks, as DDP
            averages.
        observe: called without gradient with all rows [N, H] and their targets, for metrics.

    Returns:
        A scalar with a graph. What the model itself adds to its loss (the routers' of a mixture of
        experts with ``output_router_logits=True``, times the model's coefficient) is in it, as a
        mean over the step's microbatches, weighted by their trained tokens. Not without gradient:
        the loss of an evaluation is a mean over tokens, whatever its batches.
    """
    objective = objective or Objective()
    objective.check_batch(batch, "compute_loss")
    _check_prepared(model)
    check_apart(model, objective.teacher)
    config = getattr(getattr(model, "module", model), "config", None)
    if config is not None:
        check_context(config, batch)
    batch = documents_apart(model, batch, objective.teacher if objective.soft else None)
    inputs = {key: batch[key] for key in MODEL_KEYS if batch.get(key) is not None}
    if objective.soft and objective.teacher is not None:
        batch = objective.teacher.forward(batch)
    output = model(**inputs, head_loss=head_loss(objective, batch, num_items, observe))
    loss, added = output["loss"], output["aux_loss"]
    if added is None or not torch.is_grad_enabled():
        return loss
    if num_items is not None:  # a mean over microbatches and ranks, weighted by their tokens
        added = added * (trained_weight(batch["shift_labels"], batch.get("weights")) / num_items)
    return loss + added.to(loss.device)
