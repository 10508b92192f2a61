"""The collator is the one place that shifts."""

import types

import pytest
import torch

from kd.training import DistillationCollator

ROWS = [
    {"input_ids": [5, 6, 7, 8], "labels": [-100, -100, 7, 8]},
    {"input_ids": torch.tensor([9, 4]), "labels": torch.tensor([-100, 4])},
]


class PositionCache:
    """Teacher whose only token at row i of a sequence is the sequence's own token i."""

    def batch(self, sequences, length):
        ids = torch.full((len(sequences), length, 1), -1)
        logprobs = torch.full((len(sequences), length, 1), float("-inf"))
        for row, sequence in enumerate(sequences):
            ids[row, : len(sequence), 0] = sequence
            logprobs[row, : len(sequence)] = 0.0
        return types.SimpleNamespace(ids=ids, logprobs=logprobs)


def test_labels_are_the_next_tokens():
    batch = DistillationCollator(0)(ROWS)
    assert batch["input_ids"].tolist() == [[5, 6, 7, 8], [9, 4, 0, 0]]
    assert batch["shift_labels"].tolist() == [[-100, 7, 8, -100], [4, -100, -100, -100]]
    assert batch["attention_mask"].tolist() == [[1, 1, 1, 1], [1, 1, 0, 0]]


def test_teacher_rows_are_not_shifted_again():
    batch = DistillationCollator(0, PositionCache())(ROWS)
    assert batch["teacher_ids"][..., 0].tolist() == [[5, 6, 7, 8], [9, 4, -1, -1]]
    assert batch["teacher_logprobs"].shape == (2, 4, 1)


def test_weights_move_with_their_labels():
    rows = [{**ROWS[0], "weights": [0.0, 0.0, 0.5, 2.0]}, {**ROWS[1], "weights": [0.0, 3.0]}]
    batch = DistillationCollator(0)(rows)
    assert batch["weights"].tolist() == [[0.0, 0.5, 2.0, 0.0], [3.0, 0.0, 0.0, 0.0]]


def test_length_is_rounded_up():
    batch = DistillationCollator(0, pad_to_multiple_of=8, attention_mask=False)(ROWS)
    assert batch["input_ids"].shape == (2, 8)
    assert "attention_mask" not in batch


def test_labels_of_another_length_are_refused():
    with pytest.raises(ValueError, match="labels must be as long as input_ids, got 3 and 4"):
        DistillationCollator(0)([{"input_ids": [1, 2, 3, 4], "labels": [1, 2, 3]}])


def test_one_token_sequence_trains_nothing():
    batch = DistillationCollator(0)([{"input_ids": [3], "labels": [3]}])
    assert batch["shift_labels"].tolist() == [[-100]]
