"""A teacher that is given takes part, from one place, and shares nothing with the student."""

import copy

import pytest
import torch
import training_cases as cases
from torch import nn
from training_cases import teacher_model, with_record

import kd
from kd.training import (
    DistillationCollator,
    DistillationTrainer,
    Objective,
    Teacher,
    compute_loss,
    fit,
    linear,
    prepare_student,
)

ROWS = cases.rows(6)


class OtherCache(cases.RandomCache):
    """Another teacher: its targets are those of the reversed sequence."""

    def batch(self, sequences, length):
        return super().batch([sequence + 1 for sequence in sequences], length)


# --- weights --------------------------------------------------------------------------------------


def test_one_default_in_functions_and_classes():
    """kd_weight 1 and ce_weight 0; without a teacher the cross-entropy alone."""
    for teacher in (teacher_model(), cases.RandomCache(), [Teacher(teacher_model(), weight=0.5)]):
        made = Objective(teacher=teacher)
        assert (made.kd_weight, made.ce_weight) == (1.0, 0.0)
    for given, expected in (
        ({}, (0.0, 1.0)),
        ({"ce_weight": 0.3}, (0.0, 0.3)),
        ({"kd_weight": 0.0}, (0.0, 1.0)),
        ({"kd_weight": 0.4}, (0.4, 0.0)),
        ({"teacher": teacher_model(), "ce_weight": 0.5}, (1.0, 0.5)),
        ({"teacher": teacher_model(), "kd_weight": 0.5}, (0.5, 0.0)),
    ):
        made = Objective(**given)
        assert (made.kd_weight, made.ce_weight) == expected, given
    student, teacher = prepare_student(cases.student()), teacher_model()
    batch = DistillationCollator(0)(ROWS)
    logits = [model.eval()(batch["input_ids"]).logits for model in (student, teacher)]
    expected = kd.distillation_loss(logits[0], logits[1].detach(), labels=batch["shift_labels"])
    torch.testing.assert_close(compute_loss(student, batch, Objective(teacher=teacher)), expected)


@pytest.mark.parametrize("weight", [0, 0.0, linear(0.0, 0.0)])
def test_a_teacher_without_a_weight_is_refused(weight):
    with pytest.raises(ValueError, match="kd_weight must be above 0 where there is a teacher"):
        Objective(kd_weight=weight, ce_weight=1.0, teacher=cases.RandomCache())
    if weight == 0:
        with pytest.raises(ValueError, match="Teacher: weight must be a finite number above 0"):
            Objective(teacher=[Teacher(cases.RandomCache(), weight=weight), teacher_model()])
    rises = Objective(kd_weight=linear(0.0, 1.0), ce_weight=1.0, teacher=cases.RandomCache())
    assert not rises.at(0, 10).soft and rises.at(5, 10).soft


@pytest.mark.parametrize("name", ["kl", "forward-kl", "skew_forward_kl", "", None, 3])
def test_a_divergence_that_is_none_is_refused_at_once(name):
    with pytest.raises((TypeError, ValueError), match="Objective: divergence"):
        Objective(divergence=name)
    with pytest.raises(ValueError, match="forward_kl, reverse_kl"):
        Objective(divergence="kl")


# --- one place ------------------------------------------------------------------------------------

A, B = cases.RandomCache(), OtherCache()


@pytest.mark.parametrize(
    ("collator", "objective"),
    [
        # what the collator knows, what the objective knows
        ([Teacher(A, 0.2), Teacher(B, 0.8)], Objective(kd_weight=1.0)),
        ([Teacher(A, 0.2), Teacher(B, 0.8)], Objective(teacher=A)),
        ([Teacher(A, 0.2), Teacher(B, 0.8)], Objective(teacher=[A, B])),
        (A, Objective()),
        (A, Objective(teacher=B)),
        (A, Objective(teacher=[A, B])),
        (A, Objective(teacher=Teacher(A, 0.5))),
        (Teacher(A, domains=("x",)), Objective(kd_weight=1.0)),
        (teacher_model(), Objective()),
        (A, Objective(teacher=teacher_model())),
    ],
)
def test_two_places_that_contradict_are_refused(collator, objective, tmp_path):
    student = prepare_student(cases.student())
    rows = [{**row, "domain": "x"} for row in ROWS]
    batch = DistillationCollator(0, collator)(rows)
    with pytest.raises(ValueError, match="compute_loss: (batch must hold|objective must have)"):
        compute_loss(student, batch, objective)
    logits = torch.randn(*batch["shift_labels"].shape, cases.VOCABULARY)
    with pytest.raises(ValueError, match="Objective.loss: (batch must hold|objective must have)"):
        objective.loss(logits, batch)
    if objective.teacher is not None:
        with pytest.raises(ValueError, match="collator's cache must be the objective's teacher"):
            DistillationTrainer(
                student,
                cases.arguments(tmp_path),
                objective=objective,
                train_dataset=rows,
                data_collator=DistillationCollator(0, collator),
            )


def test_a_weight_of_the_collators_alone_is_refused():
    batch = DistillationCollator(0, Teacher(with_record(2.0), 0.2))(ROWS)
    with pytest.raises(ValueError, match="teacher must be given where its weight is not 1, got"):
        compute_loss(prepare_student(cases.student()), batch, Objective(kd_weight=1.0))


def test_a_caches_own_vocabulary_counts_whoever_knows_it():
    cache = with_record(2.0)
    student = prepare_student(cases.student())
    student.resize_token_embeddings(cases.VOCABULARY + 9)
    batch = DistillationCollator(0, cache)(ROWS)
    told = compute_loss(student, batch, Objective(teacher=cache, temperature=2.0))
    torch.testing.assert_close(
        compute_loss(student, batch, Objective(kd_weight=1.0, temperature=2.0)), told
    )
    wider = Objective(kd_weight=1.0, temperature=2.0, vocab_size=cases.VOCABULARY + 9)
    assert (compute_loss(student, batch, wider) - told).abs() > 1e-4


@pytest.mark.parametrize("given", ["objective", "teachers", "member", "list"])
def test_the_collator_gets_its_teachers_from_the_objective(given):
    cache = with_record(2.0)
    objective = Objective(teacher=[Teacher(cache, weight=0.3)], temperature=2.0)
    source = {
        "objective": objective,
        "teachers": objective.teacher,
        "member": Teacher(cache, weight=0.3),
        "list": [Teacher(cache, weight=0.3)],
    }[given]
    student = prepare_student(cases.student())
    loss = compute_loss(student, DistillationCollator(0, source)(ROWS), objective)
    alone = Objective(teacher=cache, temperature=2.0)
    whole = compute_loss(student, DistillationCollator(0, alone)(ROWS), alone)
    torch.testing.assert_close(loss, 0.3 * whole)


def test_the_trainer_takes_a_teacher_wherever_it_is_written(tmp_path):
    """In the objective, in the collator, as TRL's trainers do: the same objective and loss."""
    teacher, found = teacher_model(), []
    for options in (
        {"objective": Objective(teacher=teacher)},
        {"teacher_model": teacher},
        {"teacher_model": Teacher(teacher), "objective": Objective()},
        {"teacher_model": [teacher], "data_collator": DistillationCollator(0)},
        {"data_collator": DistillationCollator(0, teacher)},
        {"data_collator": DistillationCollator(0, teacher), "objective": Objective()},
    ):
        trainer = DistillationTrainer(
            cases.student(),
            cases.arguments(tmp_path / str(len(found))),
            train_dataset=ROWS,
            **options,
        )
        trainer.train()
        assert (trainer.objective.kd_weight, trainer.objective.ce_weight) == (1.0, 0.0)
        found.append(trainer.state.log_history[0]["loss"])
    assert found == [found[0]] * 6
    tempered = DistillationTrainer(
        cases.student(),
        cases.arguments(tmp_path),
        teacher_model=teacher,
        objective=Objective(temperature=2.0, ce_weight=0.5),
    )
    made = tempered.objective
    assert (made.kd_weight, made.ce_weight, made.temperature) == (1.0, 0.5, 2.0)


def test_a_teacher_given_twice_or_in_the_wrong_place_is_refused(tmp_path):
    args = cases.arguments(tmp_path)
    with pytest.raises(ValueError, match="a teacher must be given once"):
        DistillationTrainer(
            cases.student(), args, teacher_model=teacher_model(), objective=Objective(teacher=A)
        )
    with pytest.raises(ValueError, match="collator's cache must be the objective's teacher"):
        DistillationTrainer(
            cases.student(), args, teacher_model=A, data_collator=DistillationCollator(0, B)
        )
    with pytest.raises(ValueError, match="kd_weight must be above 0 where there is a teacher"):
        DistillationTrainer(
            cases.student(), args, teacher_model=A, objective=Objective(kd_weight=0.0)
        )
    with pytest.raises(
        TypeError, match="args must be TrainingArguments, got Qwen2.*teacher_model="
    ):
        DistillationTrainer(cases.student(), teacher_model())
    with pytest.raises(TypeError, match="got str. Open a folder .*load a model with"):
        DistillationTrainer(cases.student(), args, teacher_model="Qwen/Qwen2.5-7B")


# --- the student's own ----------------------------------------------------------------------------


def lora(base):
    from peft import LoraConfig, get_peft_model

    return get_peft_model(base, LoraConfig(r=2, target_modules=["q_proj"], lora_dropout=0.5))


class Wrapped(nn.Module):
    """As DDP, FSDP and accelerate wrap: the model is a registered child."""

    def __init__(self, module):
        super().__init__()
        self.module = module

    def forward(self, *args, **kwargs):
        return self.module(*args, **kwargs)


def tied(part):
    """Another model that shares one tensor with the student."""

    def make(student):
        teacher = teacher_model()
        if part == "lm_head":
            teacher.lm_head.weight = student.lm_head.weight
        elif part == "view":
            teacher.lm_head.weight = nn.Parameter(student.lm_head.weight.data[:, :])
        elif part == "half":  # a view of a part of the same storage
            both = torch.randn(2, *student.lm_head.weight.shape)
            student.lm_head.weight = nn.Parameter(both[0])
            teacher.lm_head.weight = nn.Parameter(both[1])
        elif part == "layer":
            teacher.model.layers[1] = student.model.layers[0]
        elif part == "offloaded":
            from accelerate import cpu_offload

            teacher.model.embed_tokens.weight = student.model.embed_tokens.weight
            cpu_offload(teacher, execution_device="cpu")
        return student, teacher

    return make


PAIRS = {
    "itself": lambda student: (student, student),
    "wrapped": lambda student: (student, Wrapped(student)),
    "wrapped student": lambda student: (Wrapped(student), student),
    "compiled": lambda student: (student, torch.compile(student)),
    "compiled student": lambda student: (torch.compile(student), student),
    "peft of its base": lambda student: (lora(student), student),
    "base of its peft": lambda student: (student, lora(student)),
    "two adapters": lambda student: (lora(student), lora(student)),
    "a Teacher": lambda student: (student, Teacher(student, weight=0.5)),
    "in a list": lambda student: (student, [cases.RandomCache(), Teacher(Wrapped(student))]),
    "to be offloaded": lambda student: (student, Teacher(student, offload=True)),
    "its decoder": lambda student: (student, student.model),
    **{part: tied(part) for part in ("lm_head", "view", "half", "layer", "offloaded")},
}


@pytest.mark.parametrize("name", PAIRS)
@pytest.mark.filterwarnings(
    "ignore:Already found a `peft_config`", "ignore:You are trying to modify"
)
def test_a_teacher_that_is_the_students_own_is_refused(name, tmp_path):
    student, teacher = PAIRS[name](prepare_student(cases.student()))
    student.train()
    objective = Objective(teacher=teacher)
    with pytest.raises(ValueError, match="compute_loss: a teacher must .*share nothing.*Load"):
        batch = DistillationCollator(0, objective)(ROWS)
        compute_loss(student, batch, objective)
    assert all(module.training for module in student.modules())  # its dropout stays on
    if "student" in name:
        return
    with pytest.raises(ValueError, match="DistillationTrainer: a teacher must .*share nothing"):
        DistillationTrainer(student, cases.arguments(tmp_path), objective=objective)
    with pytest.raises(ValueError, match="DistillationTrainer: a teacher must .*share nothing"):
        DistillationTrainer(student, cases.arguments(tmp_path), teacher_model=teacher)
    with pytest.raises(ValueError, match="a teacher must .*share nothing"):
        fit(
            student,
            ROWS,
            tmp_path,
            objective=objective,
            steps=1,
            batch_size=2,
            learning_rate=1e-3,
            use_cpu=True,
        )
    assert all(module.training for module in student.modules())


def test_a_teacher_of_its_own_is_taken():
    base = cases.student()
    own = copy.deepcopy(base)
    for teacher in (own, Wrapped(cases.student(seed=7)).module, lora(cases.student(seed=7))):
        student = prepare_student(lora(copy.deepcopy(base)))
        student.train()
        loss = compute_loss(student, DistillationCollator(0)(ROWS), Objective(teacher=teacher))
        assert loss.item() >= 0 and student.training and not teacher.training


def test_a_student_that_was_not_prepared_is_named():
    batch = DistillationCollator(0)(ROWS)
    for student in (cases.student(), Wrapped(cases.student()), lora(cases.student())):
        with pytest.raises(
            TypeError, match=r"prepare_student was called on, got.*prepare_student\("
        ):
            compute_loss(student, batch)
