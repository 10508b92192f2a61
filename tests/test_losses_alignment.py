"""Row i is compared with row i: what the collator shifts, and that nothing else does."""

import math
from unittest import mock

import torch
import training_cases

import kd
from kd.training import DistillationCollator, Objective

SEQUENCE = [4, 9, 2, 7, 5]  # two tokens of prompt, three of completion


ROW = {"input_ids": SEQUENCE, "labels": [-100, -100, 2, 7, 5]}


F64 = torch.float64


def perfect_logits(batch, wrong_row=None):
    """Logits that predict every next token, but one row's."""
    logits = torch.zeros(*batch["input_ids"].shape, 11, dtype=F64)
    logits[:, :-1].scatter_(2, batch["input_ids"][:, 1:, None], 30.0)
    if wrong_row is not None:
        logits[:, wrong_row] = 0.0
        logits[:, wrong_row, 10] = 30.0
    return logits


class NextTokenCache:
    """A teacher sure of each next token, found by what the sequence is (as kd.cache does)."""

    def batch(self, sequences, length):
        ids = torch.full((len(sequences), length, 1), -1)
        logprobs = torch.full((len(sequences), length, 1), -torch.inf)
        for i, sequence in enumerate(sequences):
            ids[i, : len(sequence) - 1, 0] = sequence[1:]
            logprobs[i, : len(sequence) - 1] = math.log(0.999)
        return mock.Mock(ids=ids, logprobs=logprobs, tail_log_partition=None)


def test_completion_mask_is_shifted_with_its_labels():
    """Masked by the unshifted labels, the first completion token is never learnt."""
    batch = DistillationCollator(0)([ROW])
    losses = [
        float(kd.cross_entropy(perfect_logits(batch, wrong), batch["shift_labels"]))
        for wrong in range(5)
    ]
    # Rows 1, 2, 3 predict tokens 2, 3, 4, the completion; rows 0 and 4 are outside it.
    assert [loss > 1 for loss in losses] == [False, True, True, True, False]


def test_teacher_rows_are_aligned_with_the_labels():
    """One row late (or right-aligned past a template's trailing newline), a student is taught to
    repeat the token it has just read."""
    short = {"input_ids": SEQUENCE[:3], "labels": [-100, 9, 2]}
    for rows in ([ROW], [ROW, short]):
        batch = DistillationCollator(0, NextTokenCache())(rows)
        soft = Objective(kd_weight=1.0, ce_weight=0.0)
        right = soft.loss(perfect_logits(batch), batch, reduction="none")
        wrong = soft.loss(torch.zeros(*batch["shift_labels"].shape, 11), batch, reduction="none")
        trained = batch["shift_labels"] != -100
        assert right.max() < 0.05 and (wrong[trained] > 1).all() and wrong[~trained].eq(0).all()


def test_targets_follow_their_sequence_under_shuffling():
    """Keyed by step or position, a shuffled sampler or gradient accumulation pairs wrong rows."""
    rows = training_cases.rows(6)
    collate = DistillationCollator(0, training_cases.RandomCache())
    whole = collate(rows)
    order = [4, 0, 5, 2, 1, 3]
    shuffled = collate([rows[i] for i in order])
    for key in ("teacher_ids", "teacher_logprobs", "shift_labels"):
        assert torch.equal(shuffled[key], whole[key][order])
    for i, row in enumerate(rows):
        alone = collate([row])["teacher_logprobs"]
        assert torch.equal(alone[0], whole["teacher_logprobs"][i, : alone.shape[1]])


def test_stop_token_is_learnt_when_pad_is_eos():
    """Masking every pad id masks the end of the answer too: the student never stops."""
    eos = 5
    batch = DistillationCollator(pad_token_id=eos)([ROW, {"input_ids": [4], "labels": [-100]}])
    assert batch["shift_labels"][0].tolist() == [-100, 2, 7, eos, -100]
    assert batch["shift_labels"][1].eq(-100).all()
