"""What a teacher's token ids mean to a student: checked id by id, never assumed from a size.

Two models of "the same vocabulary" may pad their lm_heads to other widths (Qwen2.5: 151,936 or
152,064 rows for 151,665 tokens) and may give some ids other meanings (R1-Distill-Qwen re-uses ids
151643 to 151649). The first is no difference; the second has to be decided token by token.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from kd.vocab.fingerprint import PROBES, added_tokens, probe_ids

# R1-Distill-Qwen to Qwen: the end of the turn has a counterpart; the others have none in Qwen2.5,
# and where a student has the same token at another id (Qwen3's <think>), that id is taken.
R1_TO_QWEN: Mapping[str, str | None] = {
    "<｜end▁of▁sentence｜>": "<|im_end|>",
    "<｜User｜>": None,
    "<｜Assistant｜>": None,
    "<｜begin▁of▁sentence｜>": None,
    "<|EOT|>": None,
    "<think>": None,
    "</think>": None,
}
SHOWN = 12


def live_vocab(tokenizer: Any) -> int:
    """Number of ids that mean something to a tokenizer: one more than its largest."""
    return max(tokenizer.get_vocab().values()) + 1


def check_width(tokenizer: Any, rows: int, name: str = "model") -> int:
    """The live vocabulary, which must fit into a model's lm_head.

    Raises:
        ValueError: the lm_head has fewer rows than the tokenizer has tokens.
    """
    live = live_vocab(tokenizer)
    if rows < live:
        raise ValueError(
            f"vocabulary: {name} must have a row for each of the tokenizer's {live} tokens, got "
            f"{rows} rows. Use the model's own tokenizer, or resize the model's embeddings."
        )
    return live


@dataclass(frozen=True)
class VocabularyDiff:
    """Where two vocabularies differ.

    Attributes:
        teacher_live: ids that mean something to the teacher.
        student_live: likewise to the student.
        special: (id, the teacher's token, the student's) where at least one of the two is an
            added token; None where a side has no such id.
        ordinary: the same for ids that are ordinary tokens on both sides.
        probes: texts that the two cut into other ordinary tokens.
    """

    teacher_live: int
    student_live: int
    special: tuple[tuple[int, str | None, str | None], ...]
    ordinary: tuple[tuple[int, str | None, str | None], ...]
    probes: tuple[str, ...]

    @property
    def same(self) -> bool:
        return not (self.special or self.ordinary or self.probes)

    def __str__(self) -> str:
        lines = [f"{self.teacher_live} tokens of the teacher, {self.student_live} of the student"]
        for name, found in (("special", self.special), ("ordinary", self.ordinary)):
            lines += [f"  {name} id {i}: teacher {a!r}, student {b!r}" for i, a, b in found[:SHOWN]]
            if len(found) > SHOWN:
                lines.append(f"  ... and {len(found) - SHOWN} more {name} ids")
        lines += [f"  {text!r} is cut into other tokens" for text in self.probes[:2]]
        return "\n".join(lines)


def vocabulary_diff(teacher: Any, student: Any) -> VocabularyDiff:
    """Compare two tokenizers id by id, and on fixed texts.

    Args:
        teacher: a transformers tokenizer.
        student: another.
    """
    sides = [{int(i): token for token, i in t.get_vocab().items()} for t in (teacher, student)]
    added = added_tokens(teacher).keys() | added_tokens(student).keys()
    special: list[tuple[int, str | None, str | None]] = []
    ordinary: list[tuple[int, str | None, str | None]] = []
    for i in sorted(set(sides[0]) | set(sides[1])):
        a, b = sides[0].get(i), sides[1].get(i)
        if a != b:
            (special if i in added else ordinary).append((i, a, b))
    probes = []
    for text in PROBES:
        left, right = probe_ids(teacher, text), probe_ids(student, text)
        if left != right and not (added & set(left) or added & set(right)):
            probes.append(text)
    live = live_vocab(teacher), live_vocab(student)
    return VocabularyDiff(*live, tuple(special), tuple(ordinary), tuple(probes))


@dataclass(frozen=True)
class VocabularyContract:
    """Which student id each teacher id stands for.

    Attributes:
        teacher_live: ids that mean something to the teacher.
        student_live: likewise to the student; pass it to the losses as ``vocab_size``.
        remap: teacher ids that are another id of the student.
        masked: teacher ids that are nothing to the student; their probability joins the tail.
    """

    teacher_live: int
    student_live: int
    remap: Mapping[int, int] = field(default_factory=dict)
    masked: frozenset[int] = frozenset()

    @property
    def trivial(self) -> bool:
        """Every id means the same to both."""
        return not self.remap and not self.masked

    def table(self) -> Tensor:
        """[teacher_live] the student's id of every teacher id; -1 where there is none."""
        ids = torch.arange(self.teacher_live)
        ids[ids >= self.student_live] = -1
        for teacher, student in self.remap.items():
            ids[teacher] = student
        ids[sorted(self.masked)] = -1
        return ids

    def translate(self, ids: Tensor, logprobs: Tensor) -> tuple[Tensor, Tensor]:
        """A teacher's sparse rows [..., K] in the student's ids.

        A masked token's slot is emptied, so that its probability joins the row's tail; slots that
        hold something come first.

        Args:
            ids: the teacher's ids; -1 is an empty slot.
            logprobs: their log-probabilities.
        """
        if ids.numel() and int(ids.max()) >= self.teacher_live:
            raise ValueError(
                f"translate: ids must be below the teacher's {self.teacher_live} live tokens, got "
                f"{int(ids.max())}. The cache belongs to another teacher."
            )
        found = torch.where(ids >= 0, self.table()[ids.clamp(min=0)], ids)
        logprobs = logprobs.masked_fill(found < 0, -torch.inf)
        if ids.shape[-1] == 0:
            return found, logprobs
        order = (found < 0).to(torch.int8).argsort(dim=-1, stable=True)
        return found.gather(-1, order), logprobs.gather(-1, order)

    def to_dict(self) -> dict[str, Any]:
        """For a cache's description and for reports."""
        return {
            "teacher_live": self.teacher_live,
            "student_live": self.student_live,
            "remap": {str(a): b for a, b in sorted(self.remap.items())},
            "masked": sorted(self.masked),
        }

    @classmethod
    def from_dict(cls, record: Mapping[str, Any]) -> VocabularyContract:
        """What ``to_dict`` wrote, also after a way through JSON."""
        remap = {int(a): b for a, b in record["remap"].items()}
        masked = frozenset(record["masked"])
        return cls(record["teacher_live"], record["student_live"], remap, masked)


def vocabulary_contract(
    teacher: Any, student: Any, *, special: Mapping[str, str | None] | None = None
) -> VocabularyContract:
    """Settle what every id of the teacher means to the student.

    Ids with the same token on both sides need no word, and a teacher's token that the student has
    at another id is that id. Every other differing token must be named in ``special``.

    Args:
        teacher: the teacher's tokenizer.
        student: the student's.
        special: the teacher's token to the student's that it stands for, or to None, which masks
            it; ``kd.vocab.R1_TO_QWEN`` is that of R1-Distill-Qwen and Qwen.

    Raises:
        ValueError: a differing special token is not settled, or ordinary tokens differ; the
            message shows the differences.
    """
    diff = vocabulary_diff(teacher, student)
    if diff.ordinary or diff.probes:
        raise ValueError(
            "vocabulary_contract: tokenizers must agree on every ordinary token, got "
            f"{len(diff.ordinary)} that differ:\n{diff}\nDistil from a teacher of the student's "
            "tokenizer family, or from its traces alone."
        )
    decided = dict(special or {})
    vocabulary = {token: int(i) for token, i in student.get_vocab().items()}
    remap: dict[int, int] = {}
    masked: set[int] = set()
    unsettled = []
    for i, token, _ in diff.special:
        if token is None:
            continue  # the student's own token, which the teacher never names
        target = decided.get(token)
        if target is None and token in vocabulary:
            target = token
        if target is not None and target not in vocabulary:
            raise ValueError(
                f"vocabulary_contract: special must name tokens of the student, got {target!r} "
                f"for {token!r}. Use None to mask it."
            )
        if target is not None:
            remap[i] = vocabulary[target]
        elif token in decided:
            masked.add(i)
        else:
            unsettled.append(token)
    if unsettled:
        raise ValueError(
            "vocabulary_contract: special must settle every differing token of the teacher, got "
            f"none for {', '.join(map(repr, unsettled[:SHOWN]))}:\n{diff}\nMap each to a token of "
            "the student or to None; special=kd.vocab.R1_TO_QWEN for R1-Distill-Qwen to Qwen2.5."
        )
    return VocabularyContract(diff.teacher_live, diff.student_live, remap, frozenset(masked))
