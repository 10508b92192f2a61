"""Training steps: forward, backward, AdamW and zeroing, through each library's own trainer.

Every implementation starts from the same seed and takes the same batch. The truth is the plain
loss of the same model in float64 on one sequence (transformers keeps norms and rotary positions in
float32); the error is that of the gradients of the embedding, an MLP projection and the last norm.
"""

from __future__ import annotations

import functools
import importlib
import tempfile
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from kd_bench.models import make_model, matmul_parameters
from kd_bench.suite import (
    DTYPES,
    SMOKE_MODELS,
    Answer,
    Implementation,
    Inputs,
    Problem,
    Shape,
    Step,
    Suite,
    Truth,
)

CHECKED_IDS, CHECKED_TOKENS = 512, 32
IGNORED = 8  # tokens of each sequence that are not trained on


def make_batch(problem: Problem) -> Inputs:
    """input_ids, labels and attention_mask [S, L]; labels are Hugging Face's, not shifted."""
    s, g = problem.shape, torch.Generator().manual_seed(0)
    ids = torch.randint(3, s.vocab, (max(1, s.tokens // s.length), s.length), generator=g)
    labels = ids.clone()
    labels[:, :IGNORED] = -100
    return {"input_ids": ids, "labels": labels, "attention_mask": torch.ones_like(ids)}


def one_sequence(inputs: Inputs) -> Inputs:
    return {name: tensor[:1, :CHECKED_TOKENS] for name, tensor in inputs.items()}


def trained_tokens(inputs: Inputs) -> Tensor:
    return (inputs["labels"][:, 1:] != -100).sum()


def student_of(problem: Problem) -> Any:
    s = problem.shape
    return make_model(s.student_hidden, s.layers, s.vocab, 0, DTYPES[problem.dtype])


def teacher_of(problem: Problem) -> Any:
    """The teacher; None for supervised fine-tuning."""
    s = problem.shape
    if problem.divergence == "sft":
        return None
    return make_model(s.teacher_hidden, s.layers, s.vocab, 1, DTYPES[problem.dtype]).eval()


def plain_loss(teacher: Any, wide: torch.dtype = torch.float32) -> Any:
    """What a loop without a library does: all logits of both models, then the loss."""

    def loss_of(model: Any, inputs: Any, num_items_in_batch: Any = None, **_: Any) -> Any:
        ids, labels = inputs["input_ids"], inputs["labels"][:, 1:].flatten()
        logits = model(input_ids=ids).logits[:, :-1].flatten(0, 1).to(wide)
        if teacher is None:
            return F.cross_entropy(logits, labels, reduction="sum") / num_items_in_batch
        with torch.no_grad():
            wanted = teacher(input_ids=ids).logits[:, :-1].flatten(0, 1).to(wide)
        sides = F.log_softmax(logits, -1), F.log_softmax(wanted, -1)
        found = F.kl_div(*sides, reduction="none", log_target=True)
        return found[labels != -100].sum() / num_items_in_batch

    return loss_of


def exact_step(problem: Problem, inputs: Inputs) -> Truth:
    """Loss and gradients in float64, from all logits."""
    student, teacher = student_of(problem).double(), teacher_of(problem)
    loss_of = plain_loss(None if teacher is None else teacher.double(), torch.float64)
    loss = loss_of(student, inputs, trained_tokens(inputs))
    loss.backward()
    order = torch.Generator().manual_seed(1)
    ids = torch.randperm(problem.shape.vocab, generator=order)[:CHECKED_IDS]
    gradients = gradients_of(student)
    return Truth(loss.item(), gradients | {"weight": gradients["weight"][ids]}, ids)


def gradients_of(model: Any) -> dict[str, Tensor]:
    """What is compared: gradients of the tied lm_head, of the first MLP and of the last norm."""
    body = model.model
    parts = {"weight": body.embed_tokens, "mlp": body.layers[0].mlp.down_proj, "norm": body.norm}
    return {name: part.weight.grad.detach().clone() for name, part in parts.items()}


# --- the trainers ---------------------------------------------------------------------------------


class TrainingStep(Step):
    """A trainer's own step on one batch, then AdamW; ``check`` is the step's gradients alone."""

    def __init__(self, make: Any, problem: Problem, inputs: Inputs) -> None:
        self.folder, self.tokens = tempfile.TemporaryDirectory(), trained_tokens(inputs)
        device = inputs["input_ids"].device.type
        options = {
            "output_dir": self.folder.name,
            "per_device_train_batch_size": len(inputs["input_ids"]),
            "learning_rate": 1e-5,
            "logging_steps": 1000,
            "max_steps": 1000,
            "report_to": [],
            "use_cpu": device == "cpu",
            "bf16": False,
            "save_strategy": "no",
            "dataloader_pin_memory": False,
            "disable_tqdm": True,
        }
        teacher = teacher_of(problem)
        teacher = None if teacher is None else teacher.to(device)
        self.trainer, self.batch = make(student_of(problem), teacher, inputs, options)
        self.trainer.model.train()
        self.trainer.create_optimizer()

    def backward(self) -> Tensor:
        model = self.trainer.model
        return self.trainer.training_step(model, dict(self.batch), self.tokens).detach()

    def __call__(self) -> Answer:
        loss = self.backward()
        self.trainer.optimizer.step()
        self.trainer.model.zero_grad()
        return loss, {}

    def check(self) -> Answer:
        loss = self.backward()
        found = gradients_of(self.trainer.accelerator.unwrap_model(self.trainer.model))
        self.trainer.model.zero_grad()
        return loss, found


def rows_of(inputs: Inputs) -> list[dict[str, list[int]]]:
    sides = inputs["input_ids"].tolist(), inputs["labels"].tolist()
    return [{"input_ids": ids, "labels": labels} for ids, labels in zip(*sides, strict=True)]


def kd_trainer(
    student: Any, teacher: Any, inputs: Inputs, options: Any, cached: bool = False
) -> Any:
    """(DistillationTrainer, its batch), the teacher online or its top 32 from a cache."""
    from transformers import TrainingArguments

    from kd.teachers import build_cache
    from kd.training import DistillationCollator, DistillationTrainer, Objective

    rows, objective = rows_of(inputs), Objective()
    if cached:
        folder = Path(options["output_dir"]) / "cache"
        sequences = [row["input_ids"] for row in rows]
        teacher = build_cache(teacher, sequences, folder, top_k=32, progress=False)
    if teacher is not None:
        objective = Objective(kd_weight=1.0, ce_weight=0.0, teacher=teacher)
    made = DistillationTrainer(
        student,
        TrainingArguments(**options),
        objective=objective,
        train_dataset=rows,
        data_collator=DistillationCollator(0, attention_mask=False),
        report=False,
    )
    made.state.max_steps = 1000
    return made, made.data_collator(rows)


def trl_trainer(student: Any, teacher: Any, inputs: Inputs, options: Any) -> Any:
    """(SFTTrainer or GKDTrainer, the batch)."""
    from datasets import Dataset
    from tokenizers import Tokenizer, models
    from transformers import PreTrainedTokenizerFast

    words = Tokenizer(models.WordLevel({"<pad>": 0, "<s>": 1, "</s>": 2}, unk_token="<pad>"))
    options = {**options, "dataset_kwargs": {"skip_prepare_dataset": True}}
    options["gradient_checkpointing"] = False
    given = {
        "train_dataset": Dataset.from_list(rows_of(inputs)),
        "processing_class": PreTrainedTokenizerFast(
            tokenizer_object=words, pad_token="<pad>", eos_token="</s>"
        ),
    }
    if teacher is None:
        trl = importlib.import_module("trl")
        return trl.SFTTrainer(model=student, args=trl.SFTConfig(**options), **given), inputs
    gkd = importlib.import_module("trl.experimental.gkd")
    args = gkd.GKDConfig(**options, lmbda=0.0, beta=0.0)
    return gkd.GKDTrainer(model=student, teacher_model=teacher, args=args, **given), inputs


def plain_trainer(student: Any, teacher: Any, inputs: Inputs, options: Any) -> Any:
    """(transformers.Trainer with the plain loss, the batch)."""
    from transformers import Trainer, TrainingArguments

    made = Trainer(student, TrainingArguments(**options), train_dataset=rows_of(inputs))
    made.compute_loss = plain_loss(teacher)
    return made, inputs


def implementation(name: str, make: Any, *divergences: str, **options: Any) -> Implementation:
    build = functools.partial(TrainingStep, make)
    return Implementation(name, build, divergences=divergences, **options)


def memory_needed(problem: Problem, _: Implementation) -> int:
    """Weights, gradients, two moments and a teacher; logits of both sides in float32, twice."""
    s = problem.shape
    weights = matmul_parameters(max(s.student_hidden, s.teacher_hidden), s.layers, s.vocab)
    return 5 * weights * problem.itemsize + 16 * s.tokens * s.vocab


TRAINING = Suite(
    "training",
    inputs=make_batch,
    few=one_sequence,
    truth=exact_step,
    implementations=(
        implementation("kd", kd_trainer),
        implementation("pytorch", plain_trainer),
        implementation(
            "kd cached",
            functools.partial(kd_trainer, cached=True),
            "forward_kl",
            note="a stored top-32: another number",
            approximate=True,
        ),
        implementation("trl sft trainer", trl_trainer, "sft", package="trl"),
        implementation("trl gkd trainer", trl_trainer, "forward_kl", package="trl"),
    ),
    memory=memory_needed,
    flops=lambda s: 6 * s.tokens * matmul_parameters(s.student_hidden, s.layers, s.vocab),
)
TRAINED = Shape("qwen2-4x256<-4x512", 128, 151_936, 256, 512, 32, layers=4, length=64)
GPU_TRAINED = Shape("qwen2-8x896<-8x1536", 4096, 151_936, 896, 1536, 32, layers=8, length=512)


def problems(device: str, tokens: int | None, smoke: bool) -> list[Problem]:
    """What a run measures; ``tokens`` is of the losses alone."""
    cpu = (SMOKE_MODELS if smoke else TRAINED, "float32")
    shape, dtype = cpu if smoke or device == "cpu" else (GPU_TRAINED, "bfloat16")
    return [Problem(TRAINING, shape, dtype, divergence) for divergence in ("sft", "forward_kl")]


def test_training(row, measure):
    measure(row)
