"""Where a student's soft targets come from: caches, models in memory, or several of both."""

from __future__ import annotations

import dataclasses
import hashlib
import math
import weakref
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import Tensor

import kd
from kd.heads import causal_lm, final_hidden, reading
from kd.training.batches import (
    FLAT_KEYS,
    HIDDEN,
    MODEL_KEYS,
    RECORD,
    SPARSE,
    STAMP,
    Target,
    keyed,
    mapped,
    record_entry,
    top_k_of,
)

Document = tuple[int, int, Tensor, int]  # row of the batch, where it starts, its tokens, domain


@dataclass(frozen=True)
class Teacher:
    """One source of soft targets.

    Attributes:
        source: a ``kd.cache.TeacherCache``, a ``kd.cache.HiddenCache``, a causal LM (any dtype,
            any device; it is never trained), or None for rows that have hard labels only.
        weight: multiplies this teacher's divergence.
        domains: the values of the rows' ``domain`` column that it teaches; None for all.
        offload: keep a model's decoder in CPU memory and bring it to the student's device layer
            by layer, with accelerate's hooks.
    """

    source: Any
    weight: float = 1.0
    domains: tuple[str, ...] | None = None
    offload: bool = False

    def __post_init__(self) -> None:
        if not (math.isfinite(self.weight) and self.weight > 0):
            raise ValueError(
                f"Teacher: weight must be a finite number above 0, got {self.weight}. Leave out a "
                "teacher that is to take no part."
            )
        if isinstance(self.domains, str) or (self.domains is not None and not self.domains):
            raise ValueError(
                "Teacher: domains must be a tuple of names, or None for every row, got "
                f"{self.domains!r}."
            )
        if self.kind == "unknown":
            raise TypeError(
                "Teacher: source must be a TeacherCache, a HiddenCache, a causal LM or None, got "
                f"{type(self.source).__name__}. Open a folder with kd.cache.TeacherCache(path), "
                "load a model with AutoModelForCausalLM.from_pretrained."
            )

    @property
    def kind(self) -> str:
        """ "sparse" or "hidden" (caches), "model", or "none"."""
        if self.source is None:
            return "none"
        if callable(getattr(self.source, "batch", None)):
            return "hidden" if getattr(self.meta, "selection", "") == "hidden" else "sparse"
        return "model" if isinstance(self.source, torch.nn.Module) else "unknown"

    @property
    def cached(self) -> bool:
        return self.kind in ("sparse", "hidden")

    @property
    def meta(self) -> Any:
        """What a cache says about itself, or None."""
        return getattr(self.source, "meta", None)

    @property
    def record(self) -> dict[str, Any] | None:
        """How a cache's sparse rows are to be read, where it says so."""
        if self.kind != "sparse" or self.meta is None:
            return None
        return {
            "temperature": float(self.meta.temperature),
            "tail": self.meta.tail,
            "tail_temperatures": list(getattr(self.meta, "tail_temperatures", ())),
            "live_vocab": getattr(self.meta, "live_vocab", None),
            "weight": self.weight,
        }


class Teachers:
    """All teachers of a run, in order.

    Args:
        members: at least one; with ``domains`` on any of them, every row needs a ``domain``.
    """

    def __init__(self, members: Sequence[Teacher]) -> None:
        self.members = tuple(members)
        names = [name for member in members for name in member.domains or ()]
        self.domains = tuple(dict.fromkeys(names))
        self._offloaded: set[int] = set()
        self.apart_from: weakref.WeakSet[Any] = weakref.WeakSet()  # students compared already
        same = [  # what two lists of teachers must have in common to stand for each other
            (one.kind, float(one.weight), one.domains, one.meta or type(one.source).__name__)
            for one in members
        ]
        self.stamp = STAMP + hashlib.sha256(repr(same).encode()).hexdigest()[:12]
        if all(member.kind == "none" for member in members):
            raise ValueError("Teachers: at least one must have a source, got none.")

    @classmethod
    def of(cls, teacher: Any) -> Teachers | None:
        """From what a user gives: None, a source, a Teacher, or a sequence of either."""
        if teacher is None or isinstance(teacher, cls):
            return teacher
        several = teacher if isinstance(teacher, (list, tuple)) else [teacher]
        return cls([item if isinstance(item, Teacher) else Teacher(item) for item in several])

    def same(self, other: Teachers) -> bool:
        """Whether both ask the same sources, with the same weights and domains."""
        pairs = zip(self.members, other.members, strict=False)
        return self.stamp == other.stamp and all(
            a.source is b.source or a.meta is not None for a, b in pairs
        )

    def to(self, device: Any) -> Teachers:
        """Move every model that is not offloaded."""
        for member in self.members:
            if member.kind == "model" and not member.offload:
                member.source.to(device)
        return self

    # --- what the collator asks -------------------------------------------------------------------

    def domain_of(self, row: Mapping[str, Any], number: int = 0) -> int:
        """The number of a row's domain (of its ``number``-th document), -1 for any other."""
        if not self.domains:
            return -1
        found = row["domains"][number] if "domains" in row else row.get("domain")
        if found in self.domains:
            return self.domains.index(found)
        if any(member.domains is None for member in self.members):
            return -1
        raise ValueError(
            f"DistillationCollator: domain must be one of {', '.join(self.domains)}, got "
            f"{found!r}. Add a Teacher for it, or Teacher(None, domains=({found!r},)) to train it "
            "on its labels alone."
        )

    def teaches(self, number: int, domain: int) -> bool:
        member = self.members[number]
        return member.domains is None or (domain >= 0 and self.domains[domain] in member.domains)

    def cached(self, shape: tuple[int, int], documents: Sequence[Document]) -> dict[str, Tensor]:
        """The caches' part of a batch of ``shape`` [B, L]."""
        batch: dict[str, Tensor] = {}
        for number, member in enumerate(self.members):
            if not member.cached:
                continue
            mine = [item for item in documents if self.teaches(number, item[3])]
            for name, values in _looked_up(member, shape, mine).items():
                batch[keyed(f"teacher_{name}", number)] = values
            if member.record is not None:
                batch[keyed(RECORD, number)] = record_entry(member.record, shape[0])
        batch[self.stamp] = torch.zeros(shape[0], dtype=torch.int8)
        if self.domains:
            domain = torch.full(shape, -1, dtype=torch.long)
            for row, start, tokens, which in documents:
                domain[row, start : start + len(tokens)] = which
            batch["domain"] = domain
        return batch

    # --- what the loss asks -----------------------------------------------------------------------

    @torch.no_grad()
    def forward(self, batch: Mapping[str, Any]) -> dict[str, Any]:
        """The batch with what every model in memory says about it."""
        found = dict(batch)
        inputs = {key: batch[key] for key in MODEL_KEYS if batch.get(key) is not None}
        for number, member in enumerate(self.members):
            if member.kind != "model":
                continue
            mine = None if member.domains is None else self.mask(number, batch["domain"]).any(1)
            if mine is None or bool(mine.all()):
                found[keyed("teacher_hidden", number)] = self._run(member, inputs)
            elif bool(mine.any()):
                some = {k: v if k in FLAT_KEYS else v[mine] for k, v in inputs.items()}
                said = self._run(member, some)
                found[keyed("teacher_hidden", number)] = mapped(said, partial(_spread, mine))
        return found

    def _run(self, member: Teacher, inputs: dict[str, Any]) -> kd.Hidden | Tensor:
        model, device = member.source, inputs["input_ids"].device
        if member.offload and id(model) not in self._offloaded:
            from accelerate import cpu_offload

            reading(model)  # compared while its weights are at hand
            cpu_offload(causal_lm(model).get_decoder(), execution_device=device)
            self._offloaded.add(id(model))
        if model.training:
            model.eval()
        if not member.offload:
            there = next(model.parameters()).device
            inputs = {k: v.to(there) if isinstance(v, Tensor) else v for k, v in inputs.items()}
        return _on(hidden_of(model, inputs), device)

    def target(
        self, number: int, flat: Mapping[str, Any], record: Mapping[str, Any], rule: str | None
    ) -> Target | None:
        """What a teacher says about flattened rows [N, ...]; None where it was not asked.

        Args:
            number: the teacher's.
            flat: per-token entries of a batch, flattened.
            record: how rows are read of caches that do not say themselves.
            rule: the ``tail_at_temperature`` of ``kd.TopK``.
        """
        member = self.members[number]
        if member.kind == "model":
            return flat.get(keyed("teacher_hidden", number))
        needed = keyed("teacher_ids" if member.kind == "sparse" else "teacher_hidden", number)
        if flat.get(needed) is None:
            raise ValueError(
                f"Objective: batch must hold {needed}, got {sorted(flat)}. Give the collator the "
                "same teachers: DistillationCollator(pad_token_id, objective.teacher)."
            )
        if member.kind == "sparse":
            return top_k_of(flat, number, member.record or record, rule)
        made = kd.Hidden(flat[needed], **vars(member.source.head))
        return _on(made, made.hidden.device)

    def mask(self, number: int, domain: Tensor) -> Tensor:
        """Which of the rows a teacher teaches."""
        wanted = [at for at in range(-1, len(self.domains)) if self.teaches(number, at)]
        return torch.isin(domain, torch.tensor(wanted, device=domain.device))


def hidden_of(model: Any, inputs: Mapping[str, Any]) -> kd.Hidden | Tensor:
    """Final hidden states [B, L, H] of a causal LM with its lm_head, through its own forward.

    The logits [B, L, V] instead, where they are not the lm_head's product with hidden states,
    scaled and softcapped at most (a quantised lm_head too: it is no matrix to multiply by).

    Raises:
        TypeError: the model is an encoder-decoder.
    """
    found = reading(model)
    if found is not None and (found.reason or found.weightless):
        return model(**inputs, use_cache=False).logits.detach()
    return final_hidden(model, **inputs)


def _spread(rows: Tensor, values: Tensor) -> Tensor:
    """Values of some rows [B] of a batch, zeros for the others."""
    whole = values.new_zeros((len(rows), *values.shape[1:]))
    whole[rows] = values
    return whole


def _on(said: Any, device: torch.device) -> Any:
    """A teacher's answer with its head on the student's device."""
    if isinstance(said, Tensor):
        return said.to(device)
    parts = {name: getattr(said, name) for name in ("hidden", "weight", "bias")}
    moved = {name: part.to(device) for name, part in parts.items() if part is not None}
    return dataclasses.replace(said, **moved)


def _looked_up(
    member: Teacher, shape: tuple[int, int], documents: Sequence[Document]
) -> dict[str, Tensor]:
    """A cache's rows of some documents where those are in a batch of ``shape``, by field."""
    sequences = [tokens for _, _, tokens, _ in documents]
    a_row_each = [row for row, start, _, _ in documents if not start] == list(range(shape[0]))
    a_row_each &= len(sequences) == shape[0]
    longest = max((len(tokens) for tokens in sequences), default=0)
    found = member.source.batch(sequences, shape[1] if a_row_each else longest)
    looked_up = {}
    for name, empty in (HIDDEN if member.kind == "hidden" else SPARSE).items():
        values = getattr(found, name, None)
        if values is not None and not a_row_each:
            placed = values.new_full((*shape, values.shape[-1]), empty)
            for at, (row, start, tokens, _) in enumerate(documents):
                placed[row, start : start + len(tokens)] = values[at, : len(tokens)]
            values = placed
        if values is not None:
            looked_up[name] = values
    return looked_up
