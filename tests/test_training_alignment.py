"""Aligned labels are declared: a batch without shift_labels is refused, whoever made it."""

import pytest
import torch
import training_cases as cases
from transformers import (
    DataCollatorForLanguageModeling,
    DataCollatorForSeq2Seq,
    DataCollatorWithFlattening,
    default_data_collator,
)

from kd.training import DistillationCollator, Objective, compute_loss, prepare_student
from kd.training.trainer import DistillationTrainer

ROWS = [{"input_ids": [3, 4, 5, 6], "labels": [-100, 4, 5, 6]}] * 4
WAY_OUT = "must hold shift_labels .*DistillationCollator"


class Tokenizer:
    """What transformers' padding collators ask of one, with rows of one length."""

    pad_token, pad_token_id, padding_side, mask_token = "pad", 0, "right", None

    def pad(self, features, **options):
        keys = [key for key in features[0] if key != "labels"]
        return {key: torch.tensor([row[key] for row in features]) for key in keys}


def by_hand(rows):
    return {key: torch.tensor([row[key] for row in rows]) for key in ("input_ids", "labels")}


COLLATORS = {
    "default": default_data_collator,
    "language modeling": DataCollatorForLanguageModeling(Tokenizer(), mlm=False),
    "seq2seq": DataCollatorForSeq2Seq(Tokenizer(), return_tensors="pt"),
    "flattening": DataCollatorWithFlattening(return_tensors="pt"),
    "by hand": by_hand,
}


@pytest.mark.parametrize("name", COLLATORS)
def test_a_batch_that_does_not_say_is_refused(name, tmp_path):
    collator = COLLATORS[name]
    rows = [{"input_ids": row["input_ids"]} for row in ROWS] if name[0] == "l" else ROWS
    batch = collator([dict(row) for row in rows])
    assert batch["labels"].shape == batch["input_ids"].shape
    student = prepare_student(cases.student())
    with pytest.raises(ValueError, match="compute_loss: batch " + WAY_OUT):
        compute_loss(student, batch)
    flat = {key: value for key, value in batch.items() if isinstance(value, torch.Tensor)}
    with pytest.raises(ValueError, match="Objective.loss: batch " + WAY_OUT):
        Objective().loss(torch.zeros(*batch["labels"].shape, cases.VOCABULARY), flat)
    trainer = DistillationTrainer(
        student,
        cases.arguments(tmp_path),
        train_dataset=rows,
        eval_dataset=rows,
        data_collator=collator,
    )
    with pytest.raises(ValueError, match=WAY_OUT):
        trainer.train()
    with pytest.raises(ValueError, match=WAY_OUT):
        trainer.evaluate()


def test_the_way_out_is_the_models_own_loss():
    """The line the error gives, the collator and transformers' own shift are one loss."""
    student = prepare_student(cases.student())
    batch = by_hand(ROWS)
    own = student(**batch).loss
    batch["shift_labels"] = torch.nn.functional.pad(batch.pop("labels")[:, 1:], (0, 1), value=-100)
    torch.testing.assert_close(compute_loss(student, batch), own)
    torch.testing.assert_close(compute_loss(student, DistillationCollator(0)(ROWS)), own)


def test_labels_beside_shift_labels_must_agree():
    student = prepare_student(cases.student())
    batch = DistillationCollator(0)(ROWS)
    alone = compute_loss(student, batch)
    torch.testing.assert_close(compute_loss(student, {**batch, **by_hand(ROWS)}), alone)
    wrong = [
        {"labels": batch["shift_labels"]},  # aligned labels under the old name
        {"labels": by_hand(ROWS)["labels"].roll(1, 0).roll(1, 1)},
        {"labels": torch.full_like(batch["shift_labels"], -100)},
        {"labels": by_hand(ROWS)["labels"][:, :-1]},
    ]
    for more in wrong:
        with pytest.raises(ValueError, match="shift_labels must be labels moved by one"):
            compute_loss(student, {**batch, **more})
