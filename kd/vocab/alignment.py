"""Which row of a teacher's sequence says the same as a row of the student's.

Teacher and student render one trace each in their own way: another prompt, ``<think>`` as one
token or as several, another end of turn. Their completions are the same text all the same, so a
token of the student belongs to the teacher's token that covers the same bytes of it.
"""

from __future__ import annotations

import os
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from kd.vocab.contract import VocabularyContract
from kd.vocab.fingerprint import added_tokens, byte_letters


def token_bytes(tokenizer: Any) -> dict[int, bytes]:
    """The bytes every id of a byte-level tokenizer stands for.

    Raises:
        ValueError: the tokenizer is not a byte-level one.
    """
    byte_of = {letter: byte for byte, letter in enumerate(byte_letters())}
    added, found = added_tokens(tokenizer), {}
    for token, i in tokenizer.get_vocab().items():
        if i not in added and not byte_of.keys() >= set(token):
            raise ValueError(
                "token_bytes: tokenizer must be byte-level, as those of Qwen, Llama 3, DeepSeek "
                f"and GPT are, got token {token!r}. Align by hand or distil from the traces alone."
            )
        text = token.encode() if i in added else bytes(byte_of[letter] for letter in token)
        found[int(i)] = text
    return found


class Aligner:
    """Aligns completions of a teacher's tokens with those of a student's.

    Args:
        teacher: the teacher's tokenizer.
        student: the student's.
        contract: of the two.
    """

    def __init__(self, teacher: Any, student: Any, contract: VocabularyContract) -> None:
        self.table = contract.table().tolist()
        self.student = token_bytes(student)
        self.teacher = token_bytes(teacher)
        for theirs, ours in contract.remap.items():
            self.teacher[theirs] = self.student[ours]

    def __call__(self, teacher_ids: Sequence[int], student_ids: Sequence[int]) -> Tensor:
        """For each token of the student's completion the teacher's token at the same bytes.

        Args:
            teacher_ids: the completion, without the prompt.
            student_ids: the same completion in the student's tokens.

        Returns:
            [len(student_ids)] int64 places in ``teacher_ids``; -1 where the teacher has no token
            of that span and meaning.

        Raises:
            ValueError: the two are not the same text.
        """
        theirs = b"".join(self.teacher[token] for token in teacher_ids)
        ours = b"".join(self.student[token] for token in student_ids)
        if theirs != ours:
            same = len(os.path.commonprefix([theirs, ours]))
            raise ValueError(
                "Aligner: both completions must be the same text, got "
                f"{theirs[same : same + 40]!r} from the teacher and {ours[same : same + 40]!r} "
                f"from the student at byte {same}. Render both from one trace, with the same tags."
            )
        places, at = {}, 0
        for i, token in enumerate(teacher_ids):
            places[at] = (i, self.table[token])
            at += len(self.teacher[token])
        found = torch.full((len(student_ids),), -1, dtype=torch.long)
        here = 0
        for j, token in enumerate(student_ids):
            i, same_token = places.get(here, (-1, -1))
            if same_token == token:
                found[j] = i
            here += len(self.student[token])
        return found


def place_rows(
    ids: Tensor, logprobs: Tensor, places: Tensor, teacher_start: int, student_start: int
) -> tuple[Tensor, Tensor]:
    """The teacher's rows [L, K] where the student's sequence needs them; other rows are empty.

    Row i is the distribution of the token after token i, so a completion token at place j is
    predicted by the row before it. The first token of a sequence without a prompt, on either side,
    is predicted by no row and takes none.

    Args:
        ids: of the teacher's whole sequence, translated to the student's ids.
        logprobs: likewise.
        places: what an ``Aligner`` returned for the completions.
        teacher_start: length of the teacher's prompt.
        student_start: length of the student's prompt.

    Returns:
        ids and logprobs, [student_start + len(places), K].
    """
    length = student_start + len(places)
    out_ids = torch.full((length, ids.shape[-1]), -1, dtype=torch.long)
    out_logprobs = torch.full((length, ids.shape[-1]), -torch.inf)
    here = (places >= 0).nonzero().squeeze(1)
    ours, theirs = student_start + here - 1, teacher_start + places[here] - 1
    predicted = (ours >= 0) & (theirs >= 0)
    out_ids[ours[predicted]] = ids[theirs[predicted]]
    out_logprobs[ours[predicted]] = logprobs[theirs[predicted]]
    return out_ids, out_logprobs
