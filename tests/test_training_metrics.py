"""What is logged by default, and where it goes."""

import json

import pytest
import torch
import training_cases as cases
from transformers import TrainerCallback

import kd
from kd.training import DistillationCollator, DistillationTrainer, Objective, TokenClasses, fit
from kd.training.loss import flat_targets
from kd.training.metrics import ANSWER, DIGIT, THINK, StepMetrics

TEXTS = ["<pad>", "a ", "1", "</th", "ink>", "42", "b"] + [f"w{i} " for i in range(16)]


class Words:
    """A tokenizer whose end-of-thought marker is two tokens."""

    def decode(self, ids):
        return "".join(TEXTS[token] for token in ids)


def test_classes_of_tokens():
    row = {"input_ids": [1, 2, 3, 4, 5, 6], "labels": [-100, 2, 3, 4, 5, 6]}
    plain = {"input_ids": [1, 6, 2], "labels": [1, 6, 2]}
    kinds = TokenClasses(Words())(DistillationCollator(0)([row, plain]))
    assert kinds.tolist() == [
        [THINK | DIGIT, THINK, THINK, ANSWER | DIGIT, ANSWER, 0],
        [0, DIGIT, 0, 0, 0, 0],  # without a marker there are no thoughts and no answer
    ]
    pack = {"input_ids": [1, 3, 4, 6] + [1, 6, 2], "lengths": [4, 3]}
    pack["labels"] = pack["input_ids"]
    kinds = TokenClasses(Words())(DistillationCollator(0)([pack]))
    assert kinds.tolist() == [[THINK, THINK, ANSWER, 0, 0, DIGIT, 0]]


def observed(objective, batch, batches=1):
    student = cases.student()
    metrics = StepMetrics()
    with torch.no_grad():
        hidden = student.model(batch["input_ids"]).last_hidden_state
        flat = kd.Hidden(hidden.flatten(0, 1), student.lm_head.weight)
        if objective.teacher is not None:
            batch = objective.teacher.forward(batch)
        for _ in range(batches):
            metrics.observe(objective, flat, flat_targets(batch))
    return metrics.summary(), student(batch["input_ids"]).logits.detach()


def test_against_logits():
    batch = DistillationCollator(0, cases.RandomCache())(cases.rows(6, weights=True))
    batch["token_class"] = TokenClasses(Words())(batch)
    objective = Objective(kd_weight=0.7, ce_weight=0.3, temperature=2.0, teacher_temperature=2.0)
    found, logits = observed(objective, batch, batches=2)
    rows = batch["shift_labels"] != -100
    labels = batch["shift_labels"][rows]
    expected = torch.nn.functional.cross_entropy(logits[rows], labels)
    assert found["ce"] == pytest.approx(expected.item(), rel=1e-5)
    teacher = kd.TopK(batch["teacher_ids"], batch["teacher_logprobs"], temperature=2.0)
    each = kd.forward_kl(logits, teacher, temperature=2.0, reduction="none")[rows]
    assert found["kd"] == pytest.approx(each.mean().item(), rel=1e-5)
    assert found["teacher_mass"] == pytest.approx(
        batch["teacher_logprobs"][rows].exp().sum(-1).mean().item(), rel=1e-5
    )
    best = batch["teacher_ids"].gather(-1, batch["teacher_logprobs"].argmax(-1, keepdim=True))
    same = (logits.argmax(-1) == best.squeeze(-1))[rows].float().mean()
    assert found["teacher_top1_agreement"] == pytest.approx(same.item())
    digits = (batch["token_class"][rows] & DIGIT) > 0
    assert digits.any()
    assert found["kd_digit"] == pytest.approx(each[digits].mean().item(), rel=1e-5)


def test_a_teacher_in_memory_that_is_the_student():
    objective = Objective(kd_weight=1.0, ce_weight=0.0, teacher=cases.student())
    found, _ = observed(objective, DistillationCollator(0)(cases.rows(5)))
    assert found["kd"] == pytest.approx(0, abs=1e-6) and found["teacher_top1_agreement"] == 1
    assert "teacher_mass" not in found


def test_reporters_and_files_get_everything(tmp_path):
    """transformers hands ``on_log`` to TensorBoard, W&B and trackio."""
    logged = []

    class Reporter(TrainerCallback):
        def on_log(self, args, state, control, logs=None, **kwargs):
            logged.append(dict(logs))

    rows = cases.rows(12)
    for row in rows:
        row["input_ids"][-2:] = row["labels"][-2:] = [4, 2]
        row["input_ids"][-3], row["labels"][-3] = 3, 3
    trainer = DistillationTrainer(
        cases.student(),
        cases.arguments(tmp_path, max_steps=4, logging_steps=2),
        objective=cases.MIXED,
        token_classes=TokenClasses(Words()),
        train_dataset=rows,
        data_collator=DistillationCollator(0, cases.RandomCache()),
        callbacks=[Reporter()],
    )
    trainer.train()
    names = {"loss", "ce", "kd", "teacher_mass", "teacher_top1_agreement", "grad_norm"}
    names |= {"tokens_per_second", "peak_memory_gib", "kd_think", "kd_answer", "kd_digit"}
    assert [names <= set(entry) for entry in logged if "loss" in entry] == [True, True]
    lines = [json.loads(line) for line in (tmp_path / "metrics.jsonl").read_text().splitlines()]
    assert lines[0]["step"] == 2 and lines[0]["kd"] == logged[0]["kd"]
    page = (tmp_path / "training.html").read_text()
    assert (tmp_path / "training.png").stat().st_size > 10_000
    assert "data:image/png;base64," in page and "teacher_mass" in page


def test_nothing_is_observed_between_logs(tmp_path, monkeypatch):
    seen = []
    monkeypatch.setattr(StepMetrics, "observe", lambda self, *_: seen.append(1))
    fit(
        cases.student(),
        cases.rows(12),
        tmp_path,
        collator=DistillationCollator(0, cases.RandomCache()),
        objective=cases.MIXED,
        steps=6,
        batch_size=4,
        learning_rate=1e-3,
        checkpoints=0,
        logging_steps=3,
        tokenizer=Words(),
        use_cpu=True,
    )
    assert len(seen) == 2
