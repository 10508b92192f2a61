"""What a model adds to its loss (a mixture of experts: its routers') is added as the model does."""

import copy

import pytest
import torch
import training_cases as cases
from training_cases import batch_of, inputs_of

from kd.training import DistillationCollator, Objective, compute_loss, prepare_student


def experts(**options):
    from transformers import Qwen3MoeConfig, Qwen3MoeForCausalLM

    sizes = dict.fromkeys(["hidden_size", "intermediate_size", "moe_intermediate_size"], 16)
    sizes |= {"num_hidden_layers": 2, "num_attention_heads": 2, "num_key_value_heads": 1}
    sizes |= {"num_experts": 4, "num_experts_per_tok": 2, "head_dim": 8, "initializer_range": 0.3}
    sizes |= {"output_router_logits": True, "router_aux_loss_coef": 0.25} | options
    torch.manual_seed(0)
    return Qwen3MoeForCausalLM(Qwen3MoeConfig(vocab_size=cases.VOCABULARY, **sizes)).eval()


def own_loss(model, batch):
    """The model's own, which shifts: (with its router loss, that times the coefficient)."""
    labels = batch["shift_labels"].roll(1, 1)
    labels[:, 0] = -100
    out = model(**inputs_of(batch), labels=labels)
    return out.loss, 0.25 * out.aux_loss


def test_the_routers_loss_is_added_as_the_model_does():
    model, batch = experts(), batch_of()
    wanted, routers = own_loss(model, batch)
    wanted.backward()
    expected = {name: parameter.grad.clone() for name, parameter in model.named_parameters()}
    model.zero_grad()
    loss = compute_loss(prepare_student(model), batch)
    loss.backward()
    assert routers > 0.3 and loss.item() == pytest.approx(wanted.item(), rel=1e-6)
    for name, parameter in model.named_parameters():
        torch.testing.assert_close(parameter.grad, expected[name], rtol=1e-4, atol=1e-7, msg=name)
    soft = Objective(kd_weight=1.0, ce_weight=0.0, teacher=copy.deepcopy(model))
    assert compute_loss(model, batch, soft).item() == pytest.approx(routers.item(), rel=1e-6)


def test_an_evaluation_is_a_mean_over_tokens_whatever_its_batches():
    model, rows = prepare_student(experts()), cases.rows(6)
    means = []
    for size in (1, 2, 6):
        nats = tokens = 0.0
        for start in range(0, 6, size):
            batch = DistillationCollator(0)(rows[start : start + size])
            count = int((batch["shift_labels"] != -100).sum())
            with torch.no_grad():
                nats += compute_loss(model, batch).item() * count
            tokens += count
        means.append(nats / tokens)
    assert means == pytest.approx([own_loss_without(model, DistillationCollator(0)(rows))] * 3)


def test_router_losses_are_asked_for_or_not():
    model, batch = experts(output_router_logits=False), batch_of()
    plain = compute_loss(prepare_student(model), batch)
    assert plain.item() == pytest.approx(own_loss_without(model, batch), rel=1e-6)
    model.config.output_router_logits = True  # a later change
    assert compute_loss(model, batch).item() > plain.item() + 0.3


def own_loss_without(model, batch):
    logits = model(**inputs_of(batch)).logits.flatten(0, 1)
    return torch.nn.functional.cross_entropy(logits, batch["shift_labels"].flatten()).item()


def test_router_losses_of_microbatches_are_a_mean_weighted_by_their_tokens():
    model = prepare_student(experts())
    rows = cases.rows(7)
    parts = [DistillationCollator(0)(rows[:2]), DistillationCollator(0)(rows[2:])]
    tokens = [int((part["shift_labels"] != -100).sum()) for part in parts]
    total = sum(compute_loss(model, part, num_items=sum(tokens)) for part in parts)
    wanted = 0.0
    for part, count in zip(parts, tokens, strict=True):
        wanted += own_loss(model, part)[0].item() * count / sum(tokens)
    assert tokens[0] != tokens[1] and total.item() == pytest.approx(wanted, rel=1e-6)


@pytest.mark.parametrize("accumulation", [1, 3])
def test_the_trainer_weighs_router_losses_as_one_batch_would(tmp_path, accumulation):
    """A microbatch repeated: the step's loss is that of one, router loss included."""
    from kd.training import DistillationTrainer

    model, rows = experts(), cases.rows(2)
    wanted, _ = own_loss(model, DistillationCollator(0)(rows))
    sizes = {"per_device_train_batch_size": 2, "gradient_accumulation_steps": accumulation}
    trainer = DistillationTrainer(
        model,
        cases.arguments(tmp_path, learning_rate=0.0, logging_strategy="steps", **sizes),
        objective=Objective(),
        train_dataset=rows * accumulation,
        data_collator=DistillationCollator(0),
    )
    trainer._get_train_sampler = lambda *args: torch.utils.data.SequentialSampler(
        trainer.train_dataset
    )
    trainer.train()
    logged = [entry["loss"] for entry in trainer.state.log_history if "loss" in entry]
    assert logged == pytest.approx([wanted.item()], rel=1e-5)


def test_a_lora_student_of_experts_has_its_router_loss():
    from peft import LoraConfig, get_peft_model

    model, batch = experts(), batch_of()
    wanted, _ = own_loss(model, batch)
    student = get_peft_model(model, LoraConfig(r=2, target_modules=["q_proj", "lm_head"]))
    loss = compute_loss(prepare_student(student.eval()), batch)
    assert loss.item() == pytest.approx(wanted.item(), rel=1e-6)
