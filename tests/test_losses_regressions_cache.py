"""The alignment defects of other caches, on the real cache: from a teacher to the loss and back."""

import cache_cases
import pytest
import torch

from kd.cache import TeacherCache
from kd.teachers import build_cache
from kd.training import DistillationCollator, Objective

VOCABULARY = 61
SOFT = Objective(kd_weight=1.0, ce_weight=0.0, vocab_size=VOCABULARY)


@pytest.fixture(scope="module")
def teacher():
    return cache_cases.teacher(vocabulary=VOCABULARY).eval()


@pytest.fixture(scope="module")
def sequences():
    generator = torch.Generator().manual_seed(0)
    lengths = (9, 4, 12, 7, 5, 10)
    return [torch.randint(1, VOCABULARY, (n,), generator=generator) for n in lengths]


@pytest.fixture(scope="module")
def cache(teacher, sequences, tmp_path_factory):
    path = tmp_path_factory.mktemp("regressions") / "cache"
    build_cache(teacher, sequences, path, top_k=16, codec="float32", progress=False)
    return TeacherCache(path)


def rows_of(sequences):
    return [{"input_ids": s, "labels": s.clone()} for s in sequences]


def soft_losses(model, batch):
    with torch.no_grad():
        logits = model(input_ids=batch["input_ids"], attention_mask=batch["attention_mask"]).logits
    return SOFT.loss(logits, batch, reduction="none")


def test_a_student_equal_to_its_teacher_has_no_loss_on_any_row(teacher, cache, sequences):
    """One row late or early, every row's target is another row's distribution."""
    batch = DistillationCollator(0, cache)(rows_of(sequences))
    losses = soft_losses(teacher, batch)
    assert losses.max() < 1e-5
    late = {**batch, "teacher_ids": batch["teacher_ids"].roll(1, 1)}
    late["teacher_logprobs"] = batch["teacher_logprobs"].roll(1, 1)
    trained = batch["shift_labels"] != -100
    assert soft_losses(teacher, late)[trained].median() > 0.05  # the defect would be seen


def test_order_batching_and_length_do_not_move_a_row(teacher, cache, sequences):
    """Keyed by step, by position or by rank, a shuffled epoch pairs rows of other sequences."""
    collate = DistillationCollator(0, cache, pad_to_multiple_of=16)
    for order in ([5, 3, 1], [0], [2, 4, 0, 1, 3, 5, 2]):
        batch = collate(rows_of([sequences[i] for i in order]))
        assert soft_losses(teacher, batch).max() < 1e-5


def test_a_longer_or_shorter_sequence_is_another_sequence(cache, sequences):
    """A template that adds a trailing newline must not be matched from the right, or cut."""
    for other in (torch.cat([sequences[0], torch.tensor([7])]), sequences[0][:-1]):
        assert other not in cache
        with pytest.raises(KeyError):
            cache.lookup(other)
        with pytest.raises(KeyError):
            DistillationCollator(0, cache)(rows_of([sequences[1], other]))
