"""Any split of a batch over microbatches, packs and ranks gives the one-batch gradient."""

import pytest
import torch
import training_cases as cases
import training_ranks as ranks

from kd.traces import pack
from kd.training import DistillationCollator, Objective, compute_loss, prepare_student

collate = DistillationCollator(0, cases.RandomCache())
MIXED = cases.MIXED


def gradients_of(batches, objective=MIXED, weighted=True):
    model = prepare_student(cases.student())
    trained = [(b["shift_labels"] != -100) * b.get("weights", torch.ones(())) for b in batches]
    tokens = sum(part.sum() for part in trained)
    for batch in batches:
        compute_loss(model, batch, objective, num_items=tokens).backward()
    return {name: parameter.grad for name, parameter in model.named_parameters()}


def assert_same(found, expected, bound=1e-6):
    """The whole gradient, as one vector, is the same to 1e-6 of its length."""
    error = ranks.difference(found, expected)
    assert error <= bound, f"differs by {error:.2e} of the gradient's length"


@pytest.mark.parametrize("objective", [Objective(), MIXED])
@pytest.mark.parametrize("weights", [False, True])
# even, uneven, one row at a time, and a microbatch without any trained token
@pytest.mark.parametrize("split", ["5+5", "1+9", "1x10", "masked"])
def test_microbatches(split, weights, objective):
    collated = collate if objective.soft else DistillationCollator(0)
    rows = cases.rows(10, weights=weights)
    masked = {**rows[0], "labels": [-100] * len(rows[0]["input_ids"])}
    parts = {
        "5+5": [rows[:5], rows[5:]],
        "1+9": [rows[:1], rows[1:]],
        "1x10": [[row] for row in rows],
        "masked": [rows, [masked]],
    }[split]
    assert_same(
        gradients_of([collated(part) for part in parts], objective),
        gradients_of([collated(rows)], objective),
    )


def test_without_the_common_denominator_they_differ():
    """The test can fail: a mean per microbatch is another gradient."""
    rows = cases.rows(10)
    model = prepare_student(cases.student())
    for part in (rows[:1], rows[1:]):
        (compute_loss(model, collate(part), MIXED) / 2).backward()
    found = {name: parameter.grad for name, parameter in model.named_parameters()}
    with pytest.raises(AssertionError, match="of the gradient's length"):
        assert_same(found, gradients_of([collate(rows)]))


def test_packing():
    """Rows of several documents give the gradient of the documents one by one."""
    rows = cases.rows(12, weights=False)
    packs = list(pack([(row["input_ids"], row["labels"]) for row in rows], 24))
    assert len(packs) < 8
    packed = [
        {"input_ids": made.input_ids, "labels": made.labels, "lengths": made.lengths}
        for made in packs
    ]
    expected = gradients_of([collate(rows)])
    assert_same(gradients_of([collate(packed)]), expected)
    assert_same(gradients_of([collate([row]) for row in packed]), expected)
    forgotten = [{key: row[key] for key in ("input_ids", "labels")} for row in packed]
    with pytest.raises(AssertionError, match="of the gradient's length"):
        assert_same(gradients_of([collate(forgotten)]), expected)


def test_trainer_accumulation_equals_one_batch(tmp_path):
    from kd.training import DistillationTrainer

    def weights_after(batch, accumulate, folder):
        trainer = DistillationTrainer(
            cases.student(),
            cases.arguments(
                tmp_path / folder,
                per_device_train_batch_size=batch,
                gradient_accumulation_steps=accumulate,
                optim="sgd",
                learning_rate=1.0,
                lr_scheduler_type="constant",
                max_grad_norm=0.0,
            ),
            objective=MIXED,
            train_dataset=cases.rows(12, weights=True),
            data_collator=collate,
        )
        before = {name: value.detach().clone() for name, value in trainer.model.named_parameters()}
        trainer.train()
        return {n: before[n] - value.detach() for n, value in trainer.model.named_parameters()}

    whole = weights_after(12, 1, "whole")
    assert_same(weights_after(3, 4, "quarters"), whole)
    assert_same(weights_after(5, 3, "uneven"), whole)


slow = pytest.mark.slow


def marked(mode, processes):
    return pytest.param(mode, processes, marks=slow)


@pytest.mark.parametrize(
    ("mode", "processes"),
    [
        ("fsdp2", 2),
        marked("ddp", 2),
        marked("ddp", 4),
        marked("fsdp2", 4),
        marked("online-ddp", 4),
        marked("online-fsdp2", 2),
        marked("late-fsdp2", 2),
        marked("head-fsdp2", 2),
        marked("late-head-fsdp2", 2),
        marked("zero3", 2),
        marked("late-zero3", 2),
        ("trainer-ddp", 2),
        marked("trainer-ddp", 1),
        marked("trainer-ddp", 4),
        marked("trainer-fsdp2", 2),
        marked("trainer-zero3", 2),
        marked("trainer-online-ddp", 2),
        marked("trainer-online-fsdp2", 4),
    ],
)
def test_several_processes_equal_one(tmp_path, mode, processes):
    """Uneven microbatches and ranks, per-token weights; a teacher from a cache or in memory."""
    if mode.endswith("zero3"):
        pytest.importorskip("deepspeed")
    found = ranks.launch(tmp_path / "out.pt", mode, processes)
    assert ranks.difference(found, ranks.whole_batch(mode)) <= 1e-6


@slow
@pytest.mark.parametrize("mode", ["stop-ddp", "resume-ddp", "resume-fsdp2"])
def test_two_processes_stop_together_and_go_on(tmp_path, mode):
    """One rank alone gets the signal; sharded checkpoints are marked and resumed too."""
    found = ranks.launch(tmp_path / "out.pt", mode, 2)
    names = [name[2:] for name in found if name.startswith("a.")]
    assert len(names) > 10
    for name in names:
        assert torch.equal(found[f"a.{name}"], found[f"b.{name}"]), name
