"""eval_loss is the mean over all trained tokens, however the rows are batched."""

import pytest
import torch
import training_cases as cases

from kd.training import (
    DistillationCollator,
    DistillationTrainer,
    Objective,
    compute_loss,
    linear,
    prepare_student,
)

PACKED = {"input_ids": [5, 6, 7, 8, 9], "labels": [5, 6, 7, 8, 9], "lengths": [2, 3]}
OBJECTIVES = {
    "labels": Objective(),
    "cache": cases.MIXED,
    "model": Objective(ce_weight=0.5, temperature=2.0, teacher=cases.student(seed=7).eval()),
}


def trainer(folder, objective, rows, size=2, cache=None, **options):
    settings = {"per_device_eval_batch_size": size, **options}
    return DistillationTrainer(
        cases.student(),
        cases.arguments(folder, **settings),
        objective=objective,
        train_dataset=cases.rows(8),
        eval_dataset=rows,
        data_collator=DistillationCollator(0, cache),
        report=False,
    )


@pytest.mark.parametrize("kind", ["plain", "weighted", "some weighted", "packed"])
@pytest.mark.parametrize("name", OBJECTIVES)
def test_any_batch_size_gives_the_token_mean(tmp_path, name, kind):
    rows = cases.rows(7, seed=5, weights="weighted" in kind)
    if kind == "some weighted":
        del rows[0]["weights"]
    if kind == "packed":
        rows = [*rows, PACKED]
    objective, cache = OBJECTIVES[name], cases.RandomCache() if name == "cache" else None
    everything = DistillationCollator(0, cache)(rows)
    with torch.no_grad():
        want = compute_loss(prepare_student(cases.student()).eval(), everything, objective)
    for size in (1, 2, 3, 4, 8):
        found = trainer(tmp_path, objective, rows, size, cache).evaluate()["eval_loss"]
        assert found == pytest.approx(float(want), rel=1e-6), size


def test_the_mean_of_batches_is_another_number():
    """The test above can fail: what transformers averages depends on the batches."""
    rows, model = cases.rows(7, seed=5), prepare_student(cases.student()).eval()
    with torch.no_grad():
        means = [float(compute_loss(model, DistillationCollator(0)([row]))) for row in rows]
        whole = float(compute_loss(model, DistillationCollator(0)(rows)))
    assert abs(sum(means) / 7 - whole) > 1e-2


def test_several_data_sets_and_other_prefixes(tmp_path):
    sets = {"short": cases.rows(3, seed=1), "long": cases.rows(5, seed=2)}
    found = trainer(tmp_path, Objective(), sets).evaluate()
    for name, rows in sets.items():
        alone = trainer(tmp_path, Objective(), rows, 8)
        assert found[f"eval_{name}_loss"] == pytest.approx(alone.evaluate()["eval_loss"], rel=1e-6)
        tested = alone.predict(rows, metric_key_prefix="test").metrics["test_loss"]
        assert tested == pytest.approx(found[f"eval_{name}_loss"], rel=1e-6)


def test_it_chooses_the_best_checkpoint(tmp_path):
    options = {
        "max_steps": 6,
        "learning_rate": 3e-2,
        "eval_strategy": "steps",
        "eval_steps": 1,
        "save_strategy": "steps",
        "save_steps": 1,
        "load_best_model_at_end": True,
    }
    rows = cases.rows(7, seed=5)
    made = trainer(tmp_path, Objective(), rows, 2, **options)
    made.train()
    log = {e["step"]: e["eval_loss"] for e in made.state.log_history if "eval_loss" in e}
    best = min(log, key=log.get)
    assert made.state.best_model_checkpoint.endswith(f"checkpoint-{best}")
    assert made.evaluate()["eval_loss"] == pytest.approx(log[best], rel=1e-5)


def test_schedules_do_not_change_what_is_measured(tmp_path):
    """Values of different steps are of one objective, the one at the schedules' end."""
    teacher = cases.student(seed=7).eval()
    scheduled = Objective(kd_weight=linear(0.1, 1.0), ce_weight=0.5, teacher=teacher)
    fixed = Objective(kd_weight=1.0, ce_weight=0.5, teacher=teacher)
    rows = cases.rows(7, seed=5)
    made, other = (trainer(tmp_path, each, rows) for each in (scheduled, fixed))
    wanted = other.evaluate()["eval_loss"]
    for step in (0, 3, 10):
        made.state.global_step, made.state.max_steps = step, 10
        assert made.evaluate()["eval_loss"] == pytest.approx(wanted, rel=1e-6)


def test_evaluation_does_not_count_as_training(tmp_path):
    made = trainer(tmp_path, Objective(), cases.rows(7, seed=5))
    before = float(made._tokens_seen)
    made.evaluate()
    assert float(made._tokens_seen) == before


def test_nothing_to_evaluate_is_refused(tmp_path):
    rows = [{"input_ids": [1, 2, 3], "labels": [-100] * 3}]
    with pytest.raises(ValueError, match="must have trained tokens, got 0 of 1 rows"):
        trainer(tmp_path, Objective(), rows).evaluate()
