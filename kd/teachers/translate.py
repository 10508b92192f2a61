"""A teacher's cache in the student's ids, for a pair whose special tokens or templates differ."""

from __future__ import annotations

import dataclasses
import re
from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor

from kd.cache import CacheWriter, SparseTargets, TeacherCache
from kd.cache.tails import add_entries
from kd.vocab import Aligner, VocabularyContract, place_rows, tokenizer_fingerprint


class Pair(NamedTuple):
    """One trace as both sides see it; ``*_start`` is where the completion begins."""

    teacher_ids: Any
    teacher_start: int
    student_ids: Any
    student_start: int


# What one side's chat template writes before a completion, and the other's leaves to the model.
_OPENING = re.compile(rb"(?:\s|</?think>)+")


def places_of(align: Aligner, theirs: Sequence[int], ours: Sequence[int]) -> Tensor:
    """``Aligner`` for completions of which one may have the opening of a thought, or an empty one,
    before what both have: that is in the other's prompt, or nowhere.

    Args:
        align: of the two tokenizers.
        theirs: the teacher's completion.
        ours: the student's.

    Returns:
        [len(ours)] int64 places in ``theirs``, -1 where there is none.

    Raises:
        ValueError: the completions differ in anything else.
    """
    a, b = b"".join(align.teacher[i] for i in theirs), b"".join(align.student[i] for i in ours)
    skipped = _tokens(theirs, align.teacher, a, b), _tokens(ours, align.student, b, a)
    found = align(theirs[skipped[0] :], ours[skipped[1] :])
    opening = torch.full((skipped[1],), -1, dtype=torch.long)
    return torch.cat([opening, torch.where(found >= 0, found + skipped[0], found)])


def _tokens(ids: Sequence[int], table: Mapping[int, bytes], text: bytes, other: bytes) -> int:
    """Tokens of the opening that ``text`` has before ``other``."""
    opening = text[: len(text) - len(other)]
    if not text.endswith(other) or not _OPENING.fullmatch(opening):
        return 0
    count = size = 0
    while size < len(opening):
        size += len(table[ids[count]])
        count += 1
    return count if size == len(opening) else 0


def _tails(found: SparseTargets, contract: VocabularyContract, row: Tensor) -> Tensor | None:
    """The stored tails at rows ``row`` of a sequence (-1: none), with the tokens in them that are
    nothing to the student; None where the cache stores none."""
    if found.tail_log_partition is None:
        return None
    masked = (found.ids >= 0) & (contract.table()[found.ids.clamp(min=0)] < 0)
    tails = add_entries(
        found.tail_log_partition.numpy(),
        found.logprobs[masked].numpy(),
        masked.nonzero()[:, 0].numpy(),
        [found.temperature / t for t in found.tail_temperatures],
    )
    return torch.where(row[:, None] >= 0, torch.from_numpy(tails)[row], 0.0)


def translate_cache(
    cache: TeacherCache,
    pairs: Iterable[Pair],
    path: str | Path,
    *,
    teacher: Any,
    student: Any,
    contract: VocabularyContract,
    padded_vocab: int,
    progress: Callable[[int], None] | None = None,
) -> dict[str, Any]:
    """Write a cache for the student's sequences from one of the teacher's; a rerun continues.

    A token of a completion takes the teacher's row at the same bytes of text. Where the teacher
    has no such row (the pieces of ``<think>``), the row stays empty and adds nothing to the loss.

    Args:
        cache: of the teacher's sequences.
        pairs: every trace once.
        path: the new cache's folder.
        teacher: the teacher's tokenizer.
        student: the student's.
        contract: between the two.
        padded_vocab: rows of the student's lm_head.
        progress: called with the number of traces done.

    Returns:
        {"tokens": completion tokens, "covered": those that have a row, "mass": the mean
        probability a covered row keeps in the student's vocabulary}.
    """
    align = Aligner(teacher, student, contract)
    meta = dataclasses.replace(
        cache.meta,
        teacher={**cache.meta.teacher, "translated": contract.to_dict()},
        tokenizer=tokenizer_fingerprint(student),
        live_vocab=contract.student_live,
        padded_vocab=padded_vocab,
    )
    tokens = covered = done = 0
    mass = 0.0
    with CacheWriter(path, meta) as writer:
        for pair in pairs:
            theirs, ours = list(map(int, pair.teacher_ids)), list(map(int, pair.student_ids))
            places = places_of(align, theirs[pair.teacher_start :], ours[pair.student_start :])
            found = cache.lookup(torch.tensor(theirs))
            rows = contract.translate(found.ids, found.logprobs)
            starts = pair.teacher_start, pair.student_start
            ids, logprobs = place_rows(*rows, places, *starts)
            input_ids = torch.tensor(ours)
            if input_ids not in writer:
                number = torch.arange(len(theirs))[:, None]
                row = place_rows(number, number.float(), places, *starts)[0].squeeze(1)
                followed = None
                if cache.meta.realised:  # by the same token on both sides
                    followed = torch.where(row >= 0, cache.realised(theirs)[row], torch.nan)
                writer.add(input_ids, ids, logprobs, _tails(found, contract, row), followed)
            here = places >= 0
            tokens, covered = tokens + len(places), covered + int(here.sum())
            mass += float(logprobs.exp().sum())
            done += 1
            if progress is not None:
                progress(done)
    return {"tokens": tokens, "covered": covered, "mass": mass / max(covered, 1)}
