"""Where a student's soft targets come from: caches, models in memory, or several of both.

A teacher's part of a batch is one or two tensors, ``[B, L, ...]`` and aligned with the student's
rows: ``teacher_ids`` and ``teacher_logprobs`` from a cache of sparse targets, ``teacher_hidden``
from a hidden-state cache (both put there by the collator) or from a model in memory (put there by
``Teachers.forward``), or ``teacher_logits`` from a model whose lm_head is not a plain matrix. The
second teacher's keys end in ``_1``, and so on.
"""

from __future__ import annotations

import dataclasses
import hashlib
import math
import weakref
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

import kd
from kd.heads import causal_lm, final_hidden, reading
from kd.losses.inputs import TAILS

Document = tuple[int, int, Tensor, int]  # row of the batch, where it starts, its tokens, domain
STAMP = "teacher_stamp_"  # of a batch: in a key's name, so that no GPU is waited for to read it
FLAT_KEYS = ("cu_seq_lens_q", "cu_seq_lens_k", "max_length_q", "max_length_k")  # of one row
MODEL_KEYS = ("input_ids", "attention_mask", "position_ids", "inputs_embeds", *FLAT_KEYS)


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
            meta = getattr(self.source, "meta", None)
            return "hidden" if getattr(meta, "selection", "") == "hidden" else "sparse"
        return "model" if isinstance(self.source, torch.nn.Module) else "unknown"


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
        self.stamp = STAMP + hashlib.sha256(repr(self._record()).encode()).hexdigest()[:12]
        if not any(member.kind != "none" for member in members):
            raise ValueError("Teachers: at least one must have a source, got none.")

    @classmethod
    def of(cls, teacher: Any) -> Teachers | None:
        """From what a user gives: None, a source, a Teacher, or a sequence of either."""
        if teacher is None or isinstance(teacher, cls):
            return teacher
        several = teacher if isinstance(teacher, (list, tuple)) else [teacher]
        return cls([item if isinstance(item, Teacher) else Teacher(item) for item in several])

    def _record(self) -> list[Any]:
        """What two lists of teachers must have in common to stand for each other."""
        metas = [getattr(member.source, "meta", None) for member in self.members]
        return [
            (
                member.kind,
                float(member.weight),
                member.domains,
                type(member.source).__name__ if meta is None else meta,
            )
            for member, meta in zip(self.members, metas, strict=True)
        ]

    def same(self, other: Teachers) -> bool:
        """Whether both ask the same sources, with the same weights and domains."""
        pairs = zip(self.members, other.members, strict=False)
        return self.stamp == other.stamp and all(
            a.source is b.source or getattr(a.source, "meta", None) is not None for a, b in pairs
        )

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
            if member.kind not in ("sparse", "hidden"):
                continue
            mine = [item for item in documents if self.teaches(number, item[3])]
            for name, (values, empty) in _looked_up(member, shape, mine).items():
                batch[keyed(name, number)] = _placed(values, empty, shape, mine)
            meta = getattr(member.source, "meta", None)
            if member.kind == "sparse" and meta is not None:
                live = float(getattr(meta, "live_vocab", None) or 0)
                form = torch.tensor(
                    [
                        float(meta.temperature),
                        float(TAILS.index(meta.tail)),
                        live,
                        member.weight,
                        *getattr(meta, "tail_temperatures", ()),
                    ]
                )
                batch[keyed("teacher_form", number)] = form.expand(shape[0], -1).clone()
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
        for number, member in enumerate(self.members):
            if member.kind != "model":
                continue
            inputs = {key: batch[key] for key in MODEL_KEYS if batch.get(key) is not None}
            rows = None
            if member.domains is not None:
                rows = self.mask(number, batch["domain"]).any(1).nonzero().squeeze(1)
                if len(rows) < len(batch["input_ids"]):
                    inputs = {
                        key: value if key in FLAT_KEYS else value[rows]
                        for key, value in inputs.items()
                    }
            if rows is None or len(rows):
                said = self._run(member, inputs)
                found[keyed("teacher_hidden", number)] = _spread(
                    said, rows, len(batch["input_ids"])
                )
        return found

    def _run(self, member: Teacher, inputs: dict[str, Tensor]) -> kd.Hidden | Tensor:
        model = member.source
        device = inputs["input_ids"].device
        if member.offload and id(model) not in self._offloaded:
            offload(model, device)
            self._offloaded.add(id(model))
        if model.training:
            model.eval()
        if not member.offload:
            there = next(model.parameters()).device
            inputs = {
                key: value.to(there) if isinstance(value, Tensor) else value
                for key, value in inputs.items()
            }
        return _on(hidden_of(model, inputs), device)

    def target(
        self,
        number: int,
        flat: Mapping[str, Any],
        tail: str,
        temperature: float,
        tail_at_temperature: str | None = None,
    ) -> kd.TopK | kd.Hidden | Tensor | None:
        """What a teacher says about flattened rows [N, ...]; None where it was not asked.

        ``tail`` and ``temperature`` are for caches that do not say themselves;
        ``tail_at_temperature`` is the rule where they do not store it (kd.TopK).
        """
        member = self.members[number]
        needed = keyed("teacher_ids" if member.kind == "sparse" else "teacher_hidden", number)
        if member.kind != "model" and flat.get(needed) is None:
            raise ValueError(
                f"Objective: batch must hold {needed}, got {sorted(flat)}. Give the collator the "
                "same teachers: DistillationCollator(pad_token_id, objective.teacher)."
            )
        if member.kind == "model":
            return flat.get(keyed("teacher_hidden", number))
        if member.kind == "hidden":
            head = member.source.head
            hidden = flat[keyed("teacher_hidden", number)]
            made = kd.Hidden(hidden, head.weight, head.bias, head.logit_scale, head.softcap)
            return _on(made, hidden.device)
        meta = getattr(member.source, "meta", None)
        return kd.TopK(
            flat[keyed("teacher_ids", number)],
            flat[keyed("teacher_logprobs", number)],
            tail=tail if meta is None else meta.tail,
            temperature=temperature if meta is None else float(meta.temperature),
            tail_log_partition=flat.get(keyed("teacher_tails", number)),
            tail_temperatures=tuple(getattr(meta, "tail_temperatures", ())),
            tail_at_temperature=tail_at_temperature,
        )

    def mask(self, number: int, domain: Tensor) -> Tensor:
        """Which of the rows a teacher teaches."""
        wanted = [at for at in range(-1, len(self.domains)) if self.teaches(number, at)]
        return torch.isin(domain, torch.tensor(wanted, device=domain.device))

    def to(self, device: Any) -> Teachers:
        """Move every model that is not offloaded."""
        for member in self.members:
            if member.kind == "model" and not member.offload:
                member.source.to(device)
        return self


def keyed(name: str, number: int) -> str:
    """The batch's key of a teacher's part."""
    return name if number == 0 else f"{name}_{number}"


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


def _on(said: Any, device: torch.device) -> Any:
    """A teacher's answer with its head on the student's device."""
    if isinstance(said, Tensor):
        return said.to(device)
    moved = {
        name: getattr(said, name).to(device)
        for name in ("hidden", "weight", "bias")
        if getattr(said, name) is not None
    }
    return dataclasses.replace(said, **moved)


def _spread(said: Any, rows: Tensor | None, count: int) -> Any:
    """The answer about some rows of a batch of ``count``, zeros for the others."""
    if rows is None or len(rows) == count:
        return said
    values = said if isinstance(said, Tensor) else said.hidden
    whole = values.new_zeros((count, *values.shape[1:]))
    whole[rows] = values
    return whole if isinstance(said, Tensor) else dataclasses.replace(said, hidden=whole)


def offload(model: Any, device: torch.device) -> None:
    """Leave the decoder's weights in CPU memory; a layer visits ``device`` while it computes."""
    from accelerate import cpu_offload

    reading(model)  # compared while its weights are at hand
    cpu_offload(causal_lm(model).get_decoder(), execution_device=device)


def _looked_up(
    member: Teacher, shape: tuple[int, int], documents: Sequence[Document]
) -> dict[str, tuple[Tensor, float]]:
    """A cache's rows of some documents, [D, longest, ...], and what an empty row holds."""
    sequences = [tokens for _, _, tokens, _ in documents]
    length = max((len(tokens) for tokens in sequences), default=0)
    if len(sequences) == shape[0] and all(start == 0 for _, start, _, _ in documents):
        length = shape[1]
    if not sequences:  # nothing of this domain in the batch: one empty slot
        if member.kind == "hidden":
            size = int(member.source.meta.selection_options["hidden_size"])
            return {"teacher_hidden": (torch.zeros(0, 0, size), 0.0)}
        stored = getattr(getattr(member.source, "meta", None), "tail_temperatures", ())
        return {
            "teacher_ids": (torch.zeros(0, 0, 1, dtype=torch.long), -1),
            "teacher_logprobs": (torch.zeros(0, 0, 1), -math.inf),
            **({"teacher_tails": (torch.zeros(0, 0, len(stored)), 0.0)} if stored else {}),
        }
    found = member.source.batch(sequences, length)
    if member.kind == "hidden":
        return {"teacher_hidden": (found.hidden, 0.0)}
    looked = {"teacher_ids": (found.ids, -1), "teacher_logprobs": (found.logprobs, -math.inf)}
    tails = getattr(found, "tail_log_partition", None)
    return looked if tails is None else {**looked, "teacher_tails": (tails, 0.0)}


def _placed(
    values: Tensor, empty: float, shape: tuple[int, int], documents: Sequence[Document]
) -> Tensor:
    """Documents' rows [D, longest, ...] put where the documents are in the batch."""
    if values.shape[:2] == shape and [item[0] for item in documents] == list(range(shape[0])):
        return values
    placed = values.new_full((*shape, values.shape[-1]), empty)
    for at, (row, start, tokens, _) in enumerate(documents):
        placed[row, start : start + len(tokens)] = values[at, : len(tokens)]
    return placed


__all__ = ["Teacher", "Teachers", "hidden_of"]
