"""A cache's rows from the teacher to the loss and back: each at its token, whatever is trained."""

import math

import cache_cases
import pytest
import torch

import kd
from kd.cache import TeacherCache
from kd.teachers import build_cache
from kd.training import DistillationCollator, Objective, compute_loss, prepare_student

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


def cached_batch(folder, label=torch.clone):
    """A student, and a collated batch of three sequences with a teacher's cached rows."""
    sequences = cache_cases.texts(3, seed=4, longest=12)
    cache = build_cache(cache_cases.teacher(), sequences, folder, top_k=8, progress=False)
    rows = [{"input_ids": s, "labels": label(s)} for s in sequences]
    batch = DistillationCollator(pad_token_id=0, cache=cache)(rows)
    return prepare_student(cache_cases.teacher(seed=1)), batch


def test_masked_teacher_tokens_reach_the_loss_as_zeros(tmp_path):
    """A teacher that allows three tokens: rows of three entries, a finite loss and gradient."""
    teacher = cache_cases.teacher()
    allowed = torch.full((61,), -torch.inf)
    allowed[[5, 6, 60]] = 0.0
    teacher.lm_head.register_forward_hook(lambda module, args, logits: logits + allowed)
    sequences = cache_cases.texts(2)
    cache = build_cache(teacher, sequences, tmp_path, top_k=8, progress=False)
    found = cache.batch(sequences, 40)
    assert set(found.ids.unique().tolist()) == {-1, 5, 6, 60}
    student = torch.randn(2, 40, 61, requires_grad=True)
    target = kd.TopK(found.ids, found.logprobs, found.tail, found.temperature)
    for divergence in ("forward_kl", "reverse_kl", kd.jsd(0.5)):
        loss = kd.distillation_loss(student, target, divergence=divergence, min_logprob=-30.0)
        (gradient,) = torch.autograd.grad(loss, student)
        assert math.isfinite(loss.item()) and bool(gradient.isfinite().all())


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_a_student_that_is_not_finite_shows_in_the_loss(tmp_path, value):
    """It is never hidden: the loss is no finite number, and the row can be named."""
    student, batch = cached_batch(tmp_path)
    objective = Objective(kd_weight=1.0, ce_weight=0.0)
    assert math.isfinite(compute_loss(student, batch, objective).item())
    with torch.no_grad():
        student.model.norm.weight[3] = value
    assert not math.isfinite(compute_loss(student, batch, objective).item())
    logits = student(input_ids=batch["input_ids"]).logits
    with pytest.raises(ValueError, match="check: student_logits must be finite, got .* at row"):
        kd.check("student_logits", logits)


def test_a_batch_without_a_trained_token(tmp_path):
    student, batch = cached_batch(tmp_path, lambda s: torch.full_like(s, -100))
    assert (batch["shift_labels"] == -100).all() and (batch["teacher_ids"] >= 0).any()
    loss = compute_loss(student, batch, Objective(kd_weight=0.5, ce_weight=0.5))
    loss.backward()
    assert loss.item() == 0
    assert all(p.grad is None or not p.grad.any() for p in student.parameters())


def test_a_row_without_a_trained_token_adds_nothing(tmp_path):
    objective = Objective(kd_weight=0.5, ce_weight=0.5)
    _, batch = cached_batch(tmp_path)
    batch["shift_labels"][1] = -100
    gradients = []
    for rows in ([0, 1, 2], [0, 2]):
        student = prepare_student(cache_cases.teacher(seed=1))
        compute_loss(student, {k: v[rows] for k, v in batch.items()}, objective).backward()
        gradients.append(torch.cat([p.grad.flatten() for p in student.parameters()]))
    assert torch.allclose(*gradients, atol=1e-6)
