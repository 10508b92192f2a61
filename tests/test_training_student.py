"""A prepared student computes its loss at the lm_head, and is otherwise untouched."""

import pytest
import torch
import training_cases as cases

import kd
from kd.training import DistillationCollator, Objective, compute_loss, prepare_student

MIXED = cases.MIXED


def batch_of(objective=MIXED, **options):
    return cases.batch_of(cache=cases.RandomCache() if objective.soft else None, **options)


@pytest.mark.parametrize("objective", [Objective(), Objective(ce_weight=0.25), MIXED])
@pytest.mark.parametrize("weights", [False, True])
def test_loss_and_gradients_equal_those_from_logits(objective, weights):
    batch = batch_of(objective=objective, weights=weights)
    plain, prepared = cases.student(), prepare_student(cases.student())
    logits = plain(input_ids=batch["input_ids"], attention_mask=batch["attention_mask"]).logits
    expected = objective.loss(logits, batch)
    expected.backward()
    loss = compute_loss(prepared, batch, objective)
    loss.backward()
    torch.testing.assert_close(loss, expected, rtol=1e-5, atol=1e-6)
    for (name, ours), theirs in zip(prepared.named_parameters(), plain.parameters(), strict=True):
        torch.testing.assert_close(ours.grad, theirs.grad, rtol=1e-4, atol=1e-6, msg=name)


def test_logits_are_never_made(monkeypatch):
    model = prepare_student(cases.student())
    monkeypatch.setattr(
        model.lm_head, "_kd_head_forward", lambda *a, **k: pytest.fail("lm_head made logits")
    )
    compute_loss(model, batch_of(), MIXED).backward()


def test_padding_on_the_right_needs_no_mask():
    batch = batch_of()
    model = prepare_student(cases.student())
    with_mask = compute_loss(model, batch, MIXED)
    del batch["attention_mask"]
    torch.testing.assert_close(compute_loss(model, batch, MIXED), with_mask, rtol=1e-5, atol=1e-6)


def test_ordinary_forward_and_generate_are_unchanged():
    plain, prepared = cases.student(), prepare_student(prepare_student(cases.student()))
    ids = torch.arange(1, 9)[None]
    assert torch.equal(plain(ids).logits, prepared(ids).logits)
    options = {"max_new_tokens": 5, "do_sample": False, "pad_token_id": 0}
    assert torch.equal(plain.generate(ids, **options), prepared.generate(ids, **options))


def test_not_a_causal_lm():
    with pytest.raises(TypeError, match="must be a causal LM with an lm_head"):
        prepare_student(torch.nn.Linear(2, 2))


def test_objective_refuses_nonsense():
    with pytest.raises(ValueError, match="kd_weight or ce_weight must be above 0"):
        Objective(kd_weight=0.0, ce_weight=0.0)
    with pytest.raises(ValueError, match="kd_weight must be a finite number of at least 0"):
        Objective(kd_weight=-1.0)
    batch = DistillationCollator(0)(cases.rows(2))
    with pytest.raises(ValueError, match="must hold teacher_ids .* Give the collator a cache"):
        compute_loss(prepare_student(cases.student()), batch, MIXED)


def test_masked_batch_is_zero_with_a_graph():
    batch = batch_of()
    batch["shift_labels"].fill_(-100)
    model = prepare_student(cases.student())
    loss = compute_loss(model, batch, MIXED)
    loss.backward()
    assert loss.item() == 0
    assert all(p.grad is None or not p.grad.any() for p in model.parameters())
    ((target, rows),) = MIXED.targets(batch)
    assert isinstance(target, kd.TopK) and rows is None
