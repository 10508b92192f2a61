"""Teachers in memory, in caches, several at once; schedules; what a cache says of itself."""

import dataclasses

import datasets
import pytest
import torch
import training_cases as cases
from training_cases import teacher_model, with_record
from transformers import TrainingArguments

import kd
from kd.training import (
    DistillationCollator,
    DistillationTrainer,
    Objective,
    Teacher,
    compute_loss,
    cosine,
    linear,
    prepare_student,
)
from kd.training.checks import check_domains
from kd.training.rows import trained_weight
from kd.training.teachers import Teachers

PLAIN = {"temperature": 2.0, "vocab_size": cases.VOCABULARY}
SOFT = {**PLAIN, "tail_at_temperature": "spread"}


def logits_of(model, batch):
    with torch.no_grad():
        return model(input_ids=batch["input_ids"], use_cache=False).logits


@pytest.mark.parametrize("weights", [False, True])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_online_equals_full_logits(dtype, weights):
    """The teacher's hidden states and lm_head stand for its logits, in any dtype."""
    teacher = teacher_model(dtype=dtype).train()
    objective = Objective(kd_weight=0.7, ce_weight=0.3, teacher=teacher, **SOFT)
    batch = DistillationCollator(0)(cases.rows(5, weights=weights))
    student = prepare_student(cases.student())
    loss = compute_loss(student, batch, objective)
    loss.backward()
    plain = cases.student()
    expected = kd.distillation_loss(
        plain(input_ids=batch["input_ids"]).logits,
        logits_of(teacher, batch).float(),
        labels=batch["shift_labels"],
        weights=batch.get("weights"),
        kd_weight=0.7,
        ce_weight=0.3,
        **PLAIN,
    )
    expected.backward()
    bound = 1e-5 if dtype == torch.float32 else 3e-2
    torch.testing.assert_close(loss, expected, rtol=bound, atol=bound)
    for ours, theirs in zip(student.parameters(), plain.parameters(), strict=True):
        torch.testing.assert_close(ours.grad, theirs.grad, rtol=bound, atol=bound)
    assert not teacher.training  # dropout of a teacher would be noise in its targets
    assert all(parameter.grad is None for parameter in teacher.parameters())


def test_a_teacher_that_is_offloaded_says_the_same():
    batch = DistillationCollator(0)(cases.rows(4))
    student = prepare_student(cases.student())
    here = Objective(kd_weight=1.0, ce_weight=0.0, teacher=teacher_model(), **SOFT)
    away_model = teacher_model()
    away = Objective(
        kd_weight=1.0, ce_weight=0.0, teacher=Teacher(away_model, offload=True), **SOFT
    )
    expected = compute_loss(student, batch, here)
    for _ in range(2):
        torch.testing.assert_close(compute_loss(student, batch, away), expected)
    layer = away_model.model.layers[0].mlp.up_proj.weight
    assert layer.device.type == "meta"  # its place between two visits


def test_cached_hidden_states_equal_the_teacher_in_memory(tmp_path):
    from kd.cache import HiddenCache
    from kd.teachers import build_hidden_cache

    rows, teacher = cases.rows(5), teacher_model()
    sequences = [row["input_ids"] for row in rows]
    build_hidden_cache(teacher, sequences, tmp_path / "cache", progress=False)  # bfloat16
    cache = HiddenCache(tmp_path / "cache")
    student = prepare_student(cases.student())
    losses = []
    for source in (cache, teacher):
        objective = Objective(kd_weight=0.7, ce_weight=0.3, teacher=source, **SOFT)
        batch = DistillationCollator(0, objective.teacher)(rows)
        losses.append(compute_loss(student, batch, objective))
    torch.testing.assert_close(*losses, rtol=2e-2, atol=1e-3)


def test_packs_reach_an_online_teacher_as_documents():
    from kd.traces import pack

    rows = cases.rows(8)
    objective = Objective(kd_weight=1.0, ce_weight=0.5, teacher=teacher_model(), **SOFT)
    packs = pack([(row["input_ids"], row["labels"]) for row in rows], 24)
    packed = [
        {"input_ids": made.input_ids, "labels": made.labels, "lengths": made.lengths}
        for made in packs
    ]
    student, collate = prepare_student(cases.student()), DistillationCollator(0)
    torch.testing.assert_close(
        compute_loss(student, collate(packed), objective),
        compute_loss(student, collate(rows), objective),
        rtol=1e-5,
        atol=1e-6,
    )


def test_teachers_by_weight_add_up():
    batch_rows = cases.rows(5, weights=True)
    model, cache = teacher_model(), with_record()
    student = prepare_student(cases.student())

    def loss(teacher, ce):
        objective = Objective(kd_weight=0.5, ce_weight=ce, teacher=teacher, **SOFT)
        return compute_loss(
            student, DistillationCollator(0, objective.teacher)(batch_rows), objective
        )

    both = loss([Teacher(model, weight=0.25), Teacher(cache, weight=2.0)], 0.3)
    one, other = loss(model, 0.0), loss(cache, 0.0)
    hard = compute_loss(student, DistillationCollator(0)(batch_rows), Objective(ce_weight=0.3))
    torch.testing.assert_close(both, 0.25 * one + 2.0 * other + hard)


def test_teachers_by_domain_teach_their_rows():
    rows = cases.rows(6)
    for row, domain in zip(rows, ["math", "code", "chat"] * 2, strict=True):
        row["domain"] = domain
    model, cache = teacher_model(), with_record()
    teachers = [
        Teacher(cache, domains=("math",)),
        Teacher(model, domains=("code",)),
        Teacher(None, domains=("chat",)),
    ]
    objective = Objective(kd_weight=0.7, ce_weight=0.3, teacher=teachers, **SOFT)
    student = prepare_student(cases.student())
    batch = DistillationCollator(0, objective.teacher)(rows)
    total = trained_weight(batch["shift_labels"])
    found = compute_loss(student, batch, objective)
    parts = {
        "math": dataclasses.replace(objective, teacher=cache),
        "code": dataclasses.replace(objective, teacher=model),
        "chat": Objective(ce_weight=0.3, vocab_size=cases.VOCABULARY),
    }
    expected = torch.zeros(())
    for name, part in parts.items():
        mine = [row for row in rows if row["domain"] == name]
        own = DistillationCollator(0, part.teacher)(mine)
        expected = expected + compute_loss(student, own, part, num_items=total)
    torch.testing.assert_close(found, expected, rtol=1e-5, atol=1e-6)
    # a batch without a row of some teacher's, also when nothing else is left to train
    soft = dataclasses.replace(objective, ce_weight=0.0)
    chat = [row for row in rows if row["domain"] == "chat"]
    loss = compute_loss(student, DistillationCollator(0, soft.teacher)(chat), soft)
    assert loss.item() == 0 and loss.requires_grad


def test_a_domain_without_a_teacher_is_refused():
    teachers = Teachers.of([Teacher(with_record(), domains=("math",))])
    row = {**cases.rows(1)[0], "domain": "poems"}
    with pytest.raises(ValueError, match=r"domain must be one of math, got 'poems'\. Add a Teach"):
        DistillationCollator(0, teachers)([row])


@pytest.mark.parametrize("kind", ["list", "dataset", "packs"])
def test_a_teacher_of_domains_that_no_row_has_is_refused(kind):
    """A misspelt domain: its rows would go to the other teacher, or to their labels, unseen."""
    rows = [{**row, "domain": "math"} for row in cases.rows(3)]
    if kind == "packs":
        rows = [{**row, "domains": [row.pop("domain")], "lengths": [9]} for row in rows]
    if kind == "dataset":
        rows = datasets.Dataset.from_list([{"domain": row["domain"]} for row in rows])
    members = [Teacher(with_record()), Teacher(with_record(), domains=("maths", "Math"))]
    words = r"got domains=\('maths', 'Math'\) for rows whose domains are 'math' \(3\)"
    with pytest.raises(ValueError, match=words):
        check_domains(rows, Teachers.of(members))
    check_domains(
        rows, Teachers.of([members[0], Teacher(with_record(), domains=("maths", "math"))])
    )
    check_domains(rows, Teachers.of(members[:1]))
    bare = [{"input_ids": [1]}] if kind == "list" else datasets.Dataset.from_list([{"text": "a"}])
    with pytest.raises(ValueError, match="rows whose domains are None|are none"):
        check_domains(bare, Teachers.of(members))


def test_the_trainer_looks_for_the_domains_first(tmp_path):
    teachers = [Teacher(teacher_model()), Teacher(teacher_model(), domains=("poems",))]
    made = DistillationTrainer(
        model=cases.student(), args=TrainingArguments(str(tmp_path), report_to=[], max_steps=1),
        objective=Objective(teacher=teachers),
        train_dataset=[{**row, "domain": "math"} for row in cases.rows(4)],
    )  # fmt: skip
    with pytest.raises(ValueError, match="a teacher must teach some rows"):
        made.train()


def test_schedules():
    falls = cosine(1.0, 0.0)
    assert [falls.at(step, 5) for step in range(5)] == pytest.approx(
        [1.0, 0.8535534, 0.5, 0.1464466, 0.0]
    )
    rises = linear(1.0, 3.0, steps=4, delay=2)
    assert [rises.at(step, 100) for step in (0, 2, 4, 6, 99)] == [1.0, 1.0, 2.0, 3.0, 3.0]
    warm = linear(4.0, 1.0)
    objective = Objective(
        kd_weight=falls,
        ce_weight=linear(0.0, 1.0),
        temperature=warm,
        tail_at_temperature="spread",
    )
    now = objective.at(2, 5)
    assert (now.kd_weight, now.ce_weight, now.temperature) == (0.5, 0.5, 2.5)
    batch = DistillationCollator(0, cases.RandomCache())(cases.rows(3))
    student = prepare_student(cases.student())
    fixed = Objective(kd_weight=0.5, ce_weight=0.5, temperature=2.5, tail_at_temperature="spread")
    assert compute_loss(student, batch, now) == compute_loss(student, batch, fixed)
    with pytest.raises(TypeError, match=r"kd_weight must be a number .* objective\.at"):
        compute_loss(student, batch, objective)
    with pytest.raises(ValueError, match="shape must be one of linear, cosine"):
        from kd.training import Schedule

        Schedule(0.0, 1.0, "square")


def test_a_cache_says_how_it_is_read():
    """A bare loop gets the capture's temperature and tail from the batch; nothing is retyped."""
    student, rows = prepare_student(cases.student()), cases.rows(4)
    cache = with_record(temperature=2.0)
    batch = DistillationCollator(0, cache)(rows)
    told = Objective(kd_weight=1.0, ce_weight=0.0, teacher_temperature=2.0, **SOFT)
    plain = DistillationCollator(0, cases.RandomCache())(rows)
    expected = compute_loss(student, plain, told)
    for objective in (
        Objective(kd_weight=1.0, ce_weight=0.0, **SOFT),
        Objective(kd_weight=1.0, ce_weight=0.0, teacher=cache, temperature=2.0),
    ):
        assert compute_loss(student, batch, objective) == expected
    assert Objective(teacher=cache, temperature=2.0).vocab_size == cases.VOCABULARY


def test_what_contradicts_a_cache_is_refused():
    with pytest.raises(ValueError, match=r"must be what the cache was captured at, 2\.0, got 3\.0"):
        Objective(kd_weight=1.0, teacher_temperature=3.0, teacher=with_record(temperature=2.0))
    with pytest.raises(ValueError, match="tail must be the cache's own, 'drop', got 'uniform'"):
        Objective(kd_weight=1.0, tail="uniform", teacher=with_record(tail="drop"))
    for temperature in (2.0, linear(1.0, 2.0)):
        with pytest.raises(ValueError, match="dropped mass cannot be renormalised"):
            Objective(kd_weight=1.0, temperature=temperature, teacher=with_record(tail="drop"))
    batch = DistillationCollator(0, with_record(temperature=2.0))(cases.rows(2))
    wrong = Objective(kd_weight=1.0, teacher_temperature=3.0, **SOFT)
    with pytest.raises(ValueError, match="captured at, 2.0, got 3.0"):
        compute_loss(prepare_student(cases.student()), batch, wrong)
    with pytest.raises(TypeError, match="source must be a TeacherCache"):
        Objective(kd_weight=1.0, teacher="teacher")
    with pytest.raises(ValueError, match="batch must hold teacher_ids.*Give the collator the same"):
        compute_loss(
            prepare_student(cases.student()),
            DistillationCollator(0)(cases.rows(2)),
            Objective(kd_weight=1.0, teacher=with_record(), **SOFT),
        )


def test_the_trainer_keeps_the_teacher_apart(tmp_path):
    """Never in the optimiser, never in a checkpoint; logged are both parts and the schedule."""
    from safetensors import safe_open

    from kd.training import DistillationTrainer

    teacher = teacher_model()
    before = [parameter.clone() for parameter in teacher.parameters()]
    trainer = DistillationTrainer(
        cases.student(),
        cases.arguments(tmp_path, max_steps=3, save_strategy="steps", save_steps=3),
        objective=Objective(
            kd_weight=linear(1.0, 0.5), ce_weight=0.5, teacher=teacher, divergence="reverse_kl"
        ),
        train_dataset=cases.rows(12),
        data_collator=DistillationCollator(0),
    )
    trainer.train()
    for was, parameter in zip(before, teacher.parameters(), strict=True):
        assert torch.equal(was, parameter)
    student = {id(parameter) for parameter in trainer.model.parameters()}
    optimised = {id(p) for group in trainer.optimizer.param_groups for p in group["params"]}
    assert optimised <= student
    with safe_open(tmp_path / "checkpoint-3" / "model.safetensors", "pt") as stored:
        names = set(stored.keys())
    assert names <= set(trainer.model.state_dict())
    log = [entry for entry in trainer.state.log_history if "loss" in entry]
    assert [entry["kd_weight"] for entry in log] == [1.0, 0.75, 0.5]
    for entry in log:
        assert {"ce", "kd", "teacher_top1_agreement", "grad_norm", "peak_memory_gib"} <= set(entry)
        assert "teacher_mass" not in entry  # a teacher with all its logits leaves nothing out
    with pytest.raises(ValueError, match="a teacher must be another object than the student"):
        DistillationTrainer(
            teacher,
            cases.arguments(tmp_path / "other"),
            objective=Objective(kd_weight=1.0, teacher=teacher),
            train_dataset=cases.rows(4),
            data_collator=DistillationCollator(0),
        )


STORED = (1.0, 1.2, 1.6, 2.5, 4.0)


def test_stored_tails_reach_the_loss_by_either_road():
    """The objective's cache, the batch's own record, packs, and a teacher of some rows."""
    cache, rows = cases.RandomCache(STORED), cases.rows(5)
    student = prepare_student(cases.student())
    batch = DistillationCollator(0, cache)(rows)
    plain = cases.student()(input_ids=batch["input_ids"]).logits
    found = cache.batch(
        [torch.tensor(row["input_ids"]) for row in rows], batch["input_ids"].shape[1]
    )
    teacher = kd.TopK(
        found.ids,
        found.logprobs,
        tail_log_partition=found.tail_log_partition,
        tail_temperatures=STORED,
    )
    options = {"temperature": 2.0, "vocab_size": cases.VOCABULARY}
    want = kd.distillation_loss(plain, teacher, labels=batch["shift_labels"], **options)
    held = Objective(kd_weight=1.0, ce_weight=0.0, teacher=cache, **options)
    told = Objective(kd_weight=1.0, ce_weight=0.0, **options)
    for objective in (held, told):
        torch.testing.assert_close(compute_loss(student, batch, objective), want)
    some = [{**row, "domain": "a" if n % 2 else "b"} for n, row in enumerate(rows)]
    parts = [Teacher(cache, domains=("a",)), Teacher(cases.RandomCache(STORED), domains=("b",))]
    objective = Objective(kd_weight=1.0, ce_weight=0.0, teacher=parts, **options)
    for chosen in (some, some[:1]):  # the second has nothing for one of the teachers
        batch = DistillationCollator(0, objective.teacher)(chosen)
        alone = DistillationCollator(0, cache)(chosen)
        torch.testing.assert_close(
            compute_loss(student, batch, objective), compute_loss(student, alone, held)
        )


@pytest.mark.parametrize("temperature", [0.5, 2.0, linear(1.0, 2.0), linear(4.0, 1.0)])
def test_a_cache_without_tails_is_refused_before_training(temperature):
    with pytest.raises(ValueError, match=r"Objective: temperature .*1\.44.*'one_outcome'"):
        Objective(kd_weight=1.0, temperature=temperature, teacher=with_record())
    named = {"tail_at_temperature": "one_outcome"}
    Objective(kd_weight=1.0, temperature=temperature, teacher=with_record(), **named)
    Objective(kd_weight=1.0, temperature=temperature, teacher=with_record(tail="renormalize"))
    with pytest.raises(ValueError, match="must be one of spread, one_outcome"):
        Objective(kd_weight=1.0, temperature=2.0, teacher=with_record(), tail_at_temperature="even")


def test_a_temperature_outside_the_stored_ones_is_refused():
    cache = cases.RandomCache(STORED)
    for temperature in (0.9, 4.5, linear(1.0, 5.0)):
        with pytest.raises(ValueError, match=r"or from 1 to 4 \(stored tails\)"):
            Objective(kd_weight=1.0, temperature=temperature, teacher=cache)
    batch = DistillationCollator(0, cache)(cases.rows(2))
    with pytest.raises(ValueError, match=r"distillation_loss: temperature .* got 5"):
        compute_loss(
            prepare_student(cases.student()),
            batch,
            Objective(kd_weight=1.0, temperature=5.0, vocab_size=cases.VOCABULARY),
        )
    untold = Objective(kd_weight=1.0, temperature=2.0, vocab_size=cases.VOCABULARY)
    with pytest.raises(ValueError, match="distillation_loss: temperature must be what"):
        batch = DistillationCollator(0, cases.RandomCache())(cases.rows(2))
        compute_loss(prepare_student(cases.student()), batch, untold)
