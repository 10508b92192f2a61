"""The check before a run: a sound set-up passes, mistakes are named with their numbers."""

import random
import types

import pytest
import torch

from kd.teachers import build_cache
from kd.training import DistillationCollator, Objective, check, preflight, prepare_student
from kd_recipes import _arithmetic as arithmetic
from kd_recipes.quickstart import TEACHER_FILE, load_teacher

TOKENIZER = arithmetic.tokenizer()


def solved(count=8, seed=3):
    rng = random.Random(seed)
    asked = [arithmetic.problem(rng) for _ in range(count)]
    return [
        arithmetic.encode(TOKENIZER, question, arithmetic.solve(question, rng))
        for question in asked
    ]


@pytest.fixture(scope="module")
def teacher():
    return load_teacher(TEACHER_FILE, 128, 4)


@pytest.fixture(scope="module")
def cache(teacher, tmp_path_factory):
    folder = tmp_path_factory.mktemp("check") / "cache"
    sequences = [row["input_ids"] for row in solved()]
    return build_cache(teacher, sequences, folder, tokenizer=TOKENIZER, top_k=8, progress=False)


def student(seed=0):
    return arithmetic.model(32, 1, seed)


def run(rows=None, targets=None, model=None, **options):
    objective = Objective(**{"kd_weight": 0.9, "ce_weight": 0.1, "teacher": targets, **options})
    collator = DistillationCollator(0, targets)
    return check(model or student(), collator, rows or solved(), objective, tokenizer=TOKENIZER)


def test_a_sound_setup(cache):
    found = run(targets=cache)
    assert found.problems == [] and "no problem found" in str(found)
    first = solved()[0]
    cut = first["labels"].count(-100)
    prompt, completion = first["input_ids"][:cut], first["input_ids"][cut:]
    assert found.rows[0] == f"{TOKENIZER.decode(prompt)}⟦{TOKENIZER.decode(completion)}⟧"
    assert found.facts["cross-entropy, ours"] == found.facts["cross-entropy, model's"]
    trained = sum(label != -100 for row in solved()[:4] for label in row["labels"])
    assert found.facts["tokens with targets"] == f"{trained} of {trained} trained"
    assert float(found.facts["teacher likes the label"].split("%")[0]) > 95


def test_a_teacher_in_memory_and_plain_sft(teacher):
    found = run(targets=teacher)
    assert found.problems == [] and "teacher: same likeliest token" in found.facts
    found = check(student(), DistillationCollator(0), solved(), tokenizer=TOKENIZER)
    assert found.problems == [] and "tokens with targets" not in found.facts


class Changed:
    """A cache whose rows are moved, or of which some are missing."""

    def __init__(self, cache, change):
        self.cache, self.change, self.meta = cache, change, cache.meta

    def __contains__(self, sequence):
        return sequence in self.cache

    def batch(self, sequences, length):
        found = self.cache.batch(sequences, length)
        fields = {k: getattr(found, k, None) for k in dir(found) if not k.startswith("_")}
        ids, logprobs = self.change(found.ids, found.logprobs)
        return types.SimpleNamespace(**{**fields, "ids": ids, "logprobs": logprobs})


@pytest.mark.parametrize("places", [1, -1])
def test_targets_one_place_off(cache, places):
    moved = Changed(cache, lambda ids, lp: (ids.roll(places, 1), lp.roll(places, 1)))
    (problem,) = run(targets=moved).problems
    assert f"when shifted by {places:+d}" in problem and "stand at the token" in problem


def test_targets_of_another_model_or_template(cache):
    generator = torch.Generator().manual_seed(0)

    def other(ids, logprobs):
        scores = torch.rand(*ids.shape[:2], len(TOKENIZER), generator=generator)
        made = scores.topk(ids.shape[-1]).indices.flip(-1)
        made[..., 1:] = made[..., :1]  # one token a row, likely another than the label
        return made, logprobs.masked_fill(logprobs > -1e9, -3.0)

    (problem,) = run(targets=Changed(cache, other)).problems
    assert "must find the traces likely" in problem


def test_targets_that_are_missing(cache):
    empty = Changed(cache, lambda ids, lp: (ids * 0 - 1, lp - float("inf")))
    problems = run(targets=empty).problems
    assert any("most trained tokens must have teacher targets, got 0 of" in p for p in problems)


def test_the_end_token_is_not_trained(cache):
    rows = solved()
    for row in rows:
        row["labels"][-1] = -100
    (problem,) = run(rows, cache).problems
    assert "no row trains an end token" in problem and repr(TOKENIZER.eos_token) in problem


def test_rows_that_end_with_another_token_than_generation(cache):
    rows = solved()
    for row in rows:
        row["labels"] = [label if label != TOKENIZER.eos_token_id else 0 for label in row["labels"]]
    found = run(rows, cache)
    assert any("but generation stops at '<eos>'" in remark for remark in found.remarks)


@pytest.mark.parametrize("trained", ["nothing", "everything", "some rows"])
def test_what_is_trained(trained):
    rows = solved()
    for number, row in enumerate(rows):
        if trained == "everything":
            row["labels"] = list(row["input_ids"])
        elif trained == "nothing" or number % 2:
            row["labels"] = [-100] * len(row["input_ids"])
    found = check(student(), DistillationCollator(0), rows, tokenizer=TOKENIZER)
    if trained == "nothing":
        assert any("no token is trained" in problem for problem in found.problems)
    elif trained == "everything":
        assert any("the prompts too" in remark for remark in found.remarks)
    else:
        assert any("2 of 4 rows train nothing: [1, 3]" in remark for remark in found.remarks)


def test_a_loss_that_is_not_the_models_own(monkeypatch):
    model = prepare_student(student())
    real = model._kd_original_forward

    def other(*args, **kwargs):
        output = real(*args, **kwargs)
        output.logits = output.logits * 1.5
        return output

    monkeypatch.setattr(model, "_kd_original_forward", other)
    (problem,) = check(model, DistillationCollator(0), solved(), tokenizer=TOKENIZER).problems
    assert "must be the model's own on the same labels, got" in problem


def test_fields_that_change_nothing(cache):
    found = run(targets=cache, vocab_size=len(TOKENIZER), scale_by_t2=False)
    assert any("scale_by_t2=False" in remark for remark in found.remarks)
    found = check(
        student(),
        DistillationCollator(0),
        [{**row, "weights": [1.0] * len(row["labels"])} for row in solved()],
        Objective(),
    )
    assert any("weights of the rows" in remark for remark in found.remarks)


def test_frozen_and_unreached_parameters():
    model = student()
    model.requires_grad_(False)
    model.extra = torch.nn.Parameter(torch.ones(3))
    found = check(model, DistillationCollator(0), solved(), tokenizer=TOKENIZER)
    assert found.facts["trained parameters"].startswith("3 of ")
    assert any("gradient must not be zero" in problem for problem in found.problems)


def test_nothing_is_left_behind(cache):
    model = student().train()
    model.lm_head.weight.grad = torch.ones_like(model.lm_head.weight)
    before = {name: value.clone() for name, value in model.state_dict().items()}
    state = torch.get_rng_state()
    run(targets=cache, model=model)
    assert torch.equal(torch.get_rng_state(), state)
    assert model.training and all(module.training for module in model.modules())
    assert torch.equal(model.lm_head.weight.grad, torch.ones_like(model.lm_head.weight))
    assert [name for name, p in model.named_parameters() if p.grad is not None] == [
        name for name, p in model.named_parameters() if p is model.lm_head.weight
    ]
    for name, value in model.state_dict().items():
        assert torch.equal(value, before[name])


def test_no_rows():
    with pytest.raises(ValueError, match="rows must hold at least one row, got none"):
        check(student(), DistillationCollator(0), [])


def test_three_mistakes_are_all_named(cache):
    rows = solved()
    for row in rows:
        row["labels"][-1] = -100
    moved = Changed(cache, lambda ids, lp: (ids.roll(1, 1), lp.roll(1, 1)))
    found = str(run(rows, moved, scale_by_t2=False))
    assert found.count("PROBLEM") == 2 and found.count("remark") == 1
    assert "shifted by +1" in found and "end token" in found and "scale_by_t2=False" in found


def test_a_recipe_is_checked_and_not_trained(tmp_path, capsys, monkeypatch):
    from kd.cli import main

    command = ["run", "quickstart", "smoke", "--output", str(tmp_path / "run"), "--check"]
    assert main(command) == 0
    said = capsys.readouterr().out
    assert said.count("no problem found") == 2  # one a kind of student
    assert "4 trainings, 0 problems; none was started" in said
    assert not list((tmp_path / "run" / "students").glob("*/*"))
    real = preflight.check

    def unlabelled(model, collator, rows, *args, **options):
        made = [{**row, "labels": torch.full_like(row["labels"], -100)} for row in rows]
        return real(model, collator, made, *args, **options)

    monkeypatch.setattr(preflight, "check", unlabelled)
    assert main(command) == 1
    assert "PROBLEM  no token is trained" in capsys.readouterr().out


def test_a_finished_recipe_has_nothing_to_check(tmp_path, capsys):
    from kd.cli import main

    command = ["run", "quickstart", "smoke", "--output", str(tmp_path / "run"), "--steps", "2"]
    assert main(command) == 0
    assert main([*command, "--check"]) == 0
    assert "nothing to check: every training of this run is done" in capsys.readouterr().out
