"""What a step minimises: hard labels, one or several teachers, or a mix."""

from __future__ import annotations

import copy
import dataclasses
import math
import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

import kd
from kd.losses.checks import check_temperature, renamed_floor
from kd.losses.divergences import resolve
from kd.training.batches import STAMP, Target, record_in, top_k_of
from kd.training.rows import aligned_labels, trained_weight
from kd.training.schedules import Schedule, ends
from kd.training.teachers import Teachers

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
        given = (self.kd_weight, self.ce_weight)
        self._set(min_logprob=bound, _given=given, teacher=Teachers.of(self.teacher))
        if self.kd_weight is None:
            self._set(kd_weight=0.0 if self.teacher is None else 1.0)
        self._set(_taught=any(ends(self.kd_weight)))
        if self.ce_weight is None:
            self._set(ce_weight=0.0 if self._taught else 1.0)  # type: ignore[attr-defined]
        self._check_options()
        for member in () if self.teacher is None else self.teacher.members:
            if member.record is not None:
                self._check_record(member.record)
                for temperature in ends(self.temperature) if self.soft else ():
                    check_temperature(
                        "Objective",
                        temperature,
                        member.record["temperature"],
                        member.record["tail"],
                        member.record["tail_temperatures"],
                        self.tail_at_temperature,
                    )
            if self.vocab_size is None and member.cached and member.meta is not None:
                self._set(vocab_size=member.meta.live_vocab)

    def _set(self, **values: Any) -> None:
        for name, value in values.items():
            object.__setattr__(self, name, value)

    def _check_options(self) -> None:
        try:
            resolve(self.divergence)
        except (TypeError, ValueError) as error:
            raise type(error)(str(error).replace("distillation_loss:", "Objective:")) from None
        for name in SCHEDULED:
            value = getattr(self, name)
            least = 0 if name != "temperature" else 1e-6
            if not all(math.isfinite(end) and end >= least for end in ends(value)):
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
        if not (any(ends(self.kd_weight)) or any(ends(self.ce_weight))):
            raise ValueError(
                "Objective: kd_weight or ce_weight must be above 0, got 0 and 0. "
                "Nothing would be trained."
            )

    def _check_record(self, record: Mapping[str, Any]) -> None:
        """Refuse what contradicts a cache's own record."""
        temperature, tail = record["temperature"], record["tail"]
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

    def taught_by(self, teacher: Any) -> Objective:
        """The same objective with a teacher; weights that were left out are those of one."""
        kd_weight, ce_weight = self._given  # type: ignore[attr-defined]
        return dataclasses.replace(self, teacher=teacher, kd_weight=kd_weight, ce_weight=ce_weight)

    def at(self, step: int, total: int) -> Objective:
        """The objective of one optimiser step, counted from 0, of a run of ``total``."""
        scheduled = self.scheduled
        if not scheduled:
            return self
        now = copy.copy(self)
        now._set(**{name: getattr(self, name).at(step, total) for name in scheduled})
        return now

    @property
    def scheduled(self) -> list[str]:
        """The fields that are schedules."""
        return [name for name in SCHEDULED if isinstance(getattr(self, name), Schedule)]

    @property
    def soft(self) -> bool:
        """Whether a teacher is asked."""
        return isinstance(self.kd_weight, Schedule) or self.kd_weight > 0

    def loss(
        self,
        student: kd.Hidden | Tensor,
        batch: Mapping[str, Any],
        *,
        reduction: str = "mean",
        num_items: Any = None,
    ) -> Tensor:
        """The objective on the ``shift_labels`` of a batch, row by row of the student's."""
        for name in self.scheduled:
            raise TypeError(
                f"Objective: {name} must be a number in a step, got a Schedule. Pass "
                "objective.at(step, steps)."
            )
        labels = self.check_batch(batch, "Objective.loss")
        passes = list(self._passes(batch))
        if len(passes) > 1 and reduction == "mean" and num_items is None:
            num_items = trained_weight(labels, batch.get("weights")).clamp(min=1e-30)
        vocab_size = self.vocab_size
        if vocab_size is None and self.teacher is None:  # the cache's own record counts
            vocab_size = (record_in(batch) or {}).get("live_vocab")
        options: dict[str, Any] = {
            "weights": batch.get("weights"),
            "vocab_size": vocab_size,
            "reduction": reduction,
            "num_items": num_items,
            "backend": self.backend,
        }
        losses = []
        for target, kd_weight, ce_weight, rows in passes:
            mine = labels if rows is None else labels.masked_fill(~rows, -100)
            if target is None:
                loss = kd.cross_entropy(student, mine, **options)
                losses.append(loss if ce_weight == 1 else loss * ce_weight)
                continue
            losses.append(
                kd.distillation_loss(
                    student,
                    target,
                    divergence=self.divergence,
                    temperature=self.temperature,  # type: ignore[arg-type]
                    scale_by_t2=self.scale_by_t2,
                    labels=mine,
                    kd_weight=kd_weight,
                    ce_weight=ce_weight,
                    min_logprob=self.min_logprob,
                    **options,
                )
            )
        return losses[0] if len(losses) == 1 else torch.stack(losses).sum(0)

    def check_batch(self, batch: Mapping[str, Any], asked: str) -> Tensor:
        """The aligned labels of a batch; refuses one whose teachers are not this objective's."""
        labels = aligned_labels(batch, asked)
        told = sorted(key for key in batch if key.startswith("teacher_"))
        stamps = [key for key in told if key.startswith(STAMP)]
        fix = "Give the collator the objective: DistillationCollator(pad_token_id, objective)."
        if self.teacher is not None:
            if stamps not in ([], [self.teacher.stamp]):
                raise ValueError(
                    f"{asked}: batch must hold what the objective's own teachers said, got targets "
                    f"of other teachers, weights or domains. {fix}"
                )
            return labels
        if told and not self._taught:  # type: ignore[attr-defined]
            raise ValueError(
                f"{asked}: batch must hold no teacher's targets where the objective has no "
                f"teacher, got {told}. Pass Objective(teacher=...) to learn from them, or give the "
                "collator no cache."
            )
        several = [key for key in told if re.search(r"_\d+$", key) and key not in stamps]
        if told and (several or "domain" in batch):
            raise ValueError(
                f"{asked}: objective must have the teachers of the batch, which are several or "
                f"have domains, got none. Pass Objective(teacher=...). {fix}"
            )
        return labels

    def _passes(
        self, batch: Mapping[str, Any]
    ) -> Iterator[tuple[Target | None, float, float, Tensor | None]]:
        """(target or None, kd_weight, ce_weight, rows or None): their losses add up.

        The cross-entropy of a row goes with the first teacher of its domain, so that a row with
        one teacher is computed once.
        """
        kd_weight, ce_weight = float(self.kd_weight), float(self.ce_weight)  # type: ignore[arg-type]
        teachers = self.teacher
        if not self.soft:
            yield None, 0.0, ce_weight, None
            return
        if teachers is None:
            yield self._target_in(batch), kd_weight, ce_weight, None
            return
        everything = any(member.domains is None for member in teachers.members)
        names = set(range(-1 if everything else 0, len(teachers.domains)))
        owed, asked = set(names), False  # owed: domains whose cross-entropy is still to come
        for number, member in enumerate(teachers.members):
            if member.kind == "none":
                continue
            target = teachers.target(number, batch, self._record, self.tail_at_temperature)
            if target is None:
                continue
            mine = {name for name in names if teachers.teaches(number, name)}
            rows = teachers.mask(number, batch["domain"]) if member.domains is not None else None
            with_labels = ce_weight if mine <= owed else 0.0
            if with_labels:
                owed -= mine
            asked = True
            yield target, kd_weight * member.weight, with_labels, rows
        if not asked and not ce_weight:  # no row has a teacher: zero, with a graph
            yield None, 0.0, 1.0, torch.zeros_like(batch["shift_labels"], dtype=torch.bool)
        if owed and ce_weight:
            rows = None
            if owed != names:
                left = torch.tensor(sorted(owed), device=batch["domain"].device)
                rows = torch.isin(batch["domain"], left)
            yield None, 0.0, ce_weight, rows

    def targets(self, batch: Mapping[str, Any]) -> Iterator[tuple[Target, Tensor | None]]:
        """Every teacher's answer about a batch, and the rows it teaches (None: all)."""
        soft = dataclasses.replace(self, kd_weight=1.0, ce_weight=0.0)
        yield from (
            (target, rows) for target, _, _, rows in soft._passes(batch) if target is not None
        )

    @property
    def _record(self) -> dict[str, Any]:
        """How rows of caches are read that do not say it themselves."""
        return {
            "tail": self.tail,
            "temperature": self.teacher_temperature,
            "tail_temperatures": (),
            "weight": 1.0,
        }

    def _target_in(self, batch: Mapping[str, Any]) -> kd.TopK:
        """The cached targets that a batch holds, for an objective without a teacher."""
        if batch.get("teacher_ids") is None:
            raise ValueError(
                "Objective: batch must hold teacher_ids and teacher_logprobs when kd_weight > 0, "
                f"got {sorted(batch)}. Give the collator a cache, give the objective a teacher, or "
                "set kd_weight=0."
            )
        record = record_in(batch) or self._record
        self._check_record(record)
        if record["weight"] != 1:
            raise ValueError(
                f"Objective: teacher must be given where its weight is not 1, got none for "
                f"{record['weight']:g}. Pass Objective(teacher=...) and DistillationCollator("
                "pad_token_id, objective)."
            )
        return top_k_of(batch, 0, record, self.tail_at_temperature)
