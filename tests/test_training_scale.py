"""LoRA students, gradient checkpointing, bfloat16: the same loss and gradients."""

import warnings

import pytest
import torch
import training_cases as cases

from kd.training import DistillationCollator, DistillationTrainer, compute_loss, prepare_student

collate = DistillationCollator(0, cases.RandomCache())
MIXED = cases.MIXED


def lora_student(*targets, prepare_first=False, **options):
    peft = pytest.importorskip("peft")
    model = cases.student()
    if prepare_first:
        prepare_student(model)
    config = peft.LoraConfig(
        task_type="CAUSAL_LM", r=4, lora_alpha=8, target_modules=list(targets), **options
    )
    with warnings.catch_warnings(), torch.random.fork_rng():
        warnings.simplefilter("ignore")  # tied weights and a LoRA on one of them: meant
        torch.manual_seed(1)
        made = peft.get_peft_model(model, config)
        for name, parameter in made.named_parameters():
            if "lora_B" in name:  # they start at zero, where A has no gradient
                torch.nn.init.normal_(parameter, std=0.3)
    return made


def logits_gradients(model, batch):
    logits = model(input_ids=batch["input_ids"]).logits
    MIXED.loss(logits, batch).backward()
    return {n: p.grad for n, p in model.named_parameters() if p.grad is not None}


@pytest.mark.parametrize("prepare_first", [False, True])
@pytest.mark.parametrize(
    ("targets", "options"),
    [
        (("q_proj", "v_proj"), {}),
        (("q_proj", "lm_head"), {}),
        (("q_proj", "lm_head"), {"use_rslora": True}),
        (("q_proj",), {"modules_to_save": ["lm_head"]}),
    ],
)
def test_lora_gradients_equal_those_from_logits(targets, options, prepare_first):
    batch = collate(cases.rows(5, weights=True))
    plain = lora_student(*targets, **options)
    ours = prepare_student(lora_student(*targets, prepare_first=prepare_first, **options))
    expected = logits_gradients(plain, batch)
    compute_loss(ours, batch, MIXED).backward()
    found = {n: p.grad for n, p in ours.named_parameters() if p.grad is not None}
    assert found.keys() == expected.keys() and len(found) >= 4
    for name, gradient in expected.items():
        torch.testing.assert_close(found[name], gradient, rtol=1e-4, atol=1e-6, msg=name)
        assert gradient.abs().max() > 1e-5, name


def test_lora_of_the_head_that_the_loss_cannot_express():
    batch = collate(cases.rows(3))
    for options, words in (
        ({"lora_dropout": 0.1}, "must have lora_dropout=0, got 0.1"),
        ({"use_dora": True}, "must be a plain one, got DoRA"),
    ):
        model = lora_student("lm_head", **options)
        with pytest.raises(ValueError, match=words):  # dropout is none in eval mode
            compute_loss(prepare_student(model.eval()).train(), batch, MIXED)


def test_a_lora_student_is_trained_and_its_checkpoint_is_small(tmp_path):
    model = lora_student("q_proj", "v_proj")
    frozen = {n: p.clone() for n, p in model.named_parameters() if not p.requires_grad}
    trainer = DistillationTrainer(
        model,
        cases.arguments(tmp_path, max_steps=3, save_strategy="steps", save_steps=3),
        objective=MIXED,
        train_dataset=cases.rows(12),
        data_collator=collate,
    )
    trainer.train()
    for name, parameter in trainer.model.named_parameters():
        if name in frozen:
            assert torch.equal(parameter, frozen[name])
    files = {path.name for path in (tmp_path / "checkpoint-3").iterdir()}
    assert "adapter_model.safetensors" in files and "model.safetensors" not in files


@pytest.mark.parametrize("reentrant", [False, True])
def test_gradient_checkpointing_changes_nothing(reentrant):
    batch = collate(cases.rows(4))
    gradients = []
    for checkpointing in (False, True):
        model = prepare_student(cases.student()).train()
        if checkpointing:
            options = {"use_reentrant": reentrant}
            model.gradient_checkpointing_enable(gradient_checkpointing_kwargs=options)
            model.enable_input_require_grads()
        compute_loss(model, batch, MIXED).backward()
        gradients.append({n: p.grad for n, p in model.named_parameters()})
    for name, gradient in gradients[0].items():
        torch.testing.assert_close(gradients[1][name], gradient, msg=name)


@pytest.mark.parametrize("how", ["autocast", "weights"])
def test_bfloat16_is_as_close_as_plain_bfloat16(how):
    """Autocast and bfloat16 weights: no further from float32 than the loss of bfloat16 logits."""
    batch = collate(cases.rows(6))

    def gradient(dtype, fused):
        model = cases.student()
        if dtype == torch.bfloat16 and how == "weights":
            model = model.to(dtype)
        enabled = dtype == torch.bfloat16 and how == "autocast"
        with torch.autocast("cpu", torch.bfloat16, enabled=enabled):
            if fused:
                loss = compute_loss(prepare_student(model), batch, MIXED)
            else:
                loss = MIXED.loss(model(input_ids=batch["input_ids"]).logits, batch)
        loss.backward()
        assert loss.dtype == torch.float32
        return torch.cat([p.grad.float().flatten() for p in model.parameters()])

    true = gradient(torch.float32, False)
    ours, plain = (gradient(torch.bfloat16, fused) - true for fused in (True, False))
    assert plain.norm() > 1e-4 * true.norm()  # it is bfloat16
    assert ours.norm() <= 1.2 * plain.norm()


def test_a_prepared_student_is_copied_whole():
    import copy

    batch = collate(cases.rows(3))
    student = prepare_student(cases.student())
    expected = compute_loss(student, batch, MIXED)
    made = copy.deepcopy(student)
    with torch.no_grad():
        made.model.norm.weight.mul_(2)
    assert compute_loss(prepare_student(made), batch, MIXED) != expected
    assert compute_loss(student, batch, MIXED) == expected


def test_the_trainer_in_bfloat16_with_checkpointing_and_an_online_teacher(tmp_path):
    from kd.training import Objective

    trainer = DistillationTrainer(
        cases.student(),
        cases.arguments(
            tmp_path, max_steps=4, bf16=True, gradient_checkpointing=True, learning_rate=3e-2
        ),
        objective=Objective(
            kd_weight=1.0, ce_weight=0.0, teacher=cases.student(seed=7).to(torch.bfloat16)
        ),
        train_dataset=cases.rows(4),
        data_collator=DistillationCollator(0),
    )
    trainer.train()
    losses = [entry["loss"] for entry in trainer.state.log_history if "loss" in entry]
    assert losses[-1] < 0.9 * losses[0]
