"""Training steps: forward, backward, AdamW and zeroing, through each library's own trainer.

Every implementation starts from the same seed and takes the same batch. The truth is the plain
loss of the same model in float64 (transformers keeps norms and rotary positions in float32); the
error is that of the gradients of the embedding, an MLP's projection and the last norm.
"""

from __future__ import annotations

import importlib
import tempfile
from pathlib import Path
from typing import Any

import torch

from kd_bench.models import make_model
from kd_bench.shapes import Shape
from kd_bench.steps import Answer, Inputs, Truth

NAMES = {  # (implementation, objective) of the suite: what `build_trainer` calls it
    ("kd", "sft"): "kd SFT",
    ("trl sft trainer", "sft"): "TRL SFTTrainer",
    ("pytorch", "sft"): "plain logits SFT",
    ("kd", "forward_kl"): "kd online",
    ("kd cached", "forward_kl"): "kd cached top-32",
    ("trl gkd trainer", "forward_kl"): "TRL GKDTrainer",
    ("pytorch", "forward_kl"): "plain logits KD",
}
CHECKED_IDS = 512
IGNORED = 8  # tokens of each sequence that are not trained on


def _model(size: dict[str, Any], who: str, seed: int, dtype: torch.dtype) -> Any:
    hidden, layers = size[who]
    return make_model(hidden, layers, size["vocab"], seed, dtype)


def make_rows(vocab: int, batch: tuple[int, int]) -> list[dict[str, list[int]]]:
    import random

    rng = random.Random(0)
    ids = [[rng.randrange(3, vocab) for _ in range(batch[1])] for _ in range(batch[0])]
    return [{"input_ids": row, "labels": [-100] * IGNORED + row[IGNORED:]} for row in ids]


def make_tokenizer() -> Any:
    from tokenizers import Tokenizer, models
    from transformers import PreTrainedTokenizerFast

    made = Tokenizer(models.WordLevel({"<pad>": 0, "<s>": 1, "</s>": 2}, unk_token="<pad>"))
    return PreTrainedTokenizerFast(tokenizer_object=made, pad_token="<pad>", eos_token="</s>")


def common(folder: str, batch: int, device: str) -> dict[str, Any]:
    return {
        "output_dir": folder,
        "per_device_train_batch_size": batch,
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


def build_trainer(
    name: str, size: dict[str, Any], folder: str, dtype: Any, device: str = "cpu"
) -> tuple[Any, Any, Any]:
    """(trainer, batch, trained tokens) of an implementation."""
    from datasets import Dataset
    from transformers import Trainer, TrainingArguments

    vocab, rows = size["vocab"], make_rows(size["vocab"], size["batch"])
    student = _model(size, "student", 0, dtype)
    data = Dataset.from_list(rows)
    teacher = None
    if name in ("kd online", "kd cached top-32", "TRL GKDTrainer", "plain logits KD"):
        teacher = _model(size, "teacher", 1, dtype).eval().to(device)
    raw = {key: torch.tensor([row[key] for row in rows]) for key in ("input_ids", "labels")}
    raw["attention_mask"] = torch.ones_like(raw["input_ids"])
    tokens = (raw["labels"][:, 1:] != -100).sum()
    options = common(folder, size["batch"][0], device)
    if name.startswith("TRL"):
        return trl_trainer(name, student, teacher, data, options), raw, tokens
    args = TrainingArguments(**options)
    if name.startswith("plain"):
        made = Trainer(student, args, train_dataset=data)
        made.compute_loss = plain_loss(teacher)
        return made, raw, tokens
    return ours(name, student, teacher, rows, args, vocab, folder), None, tokens


def ours(
    name: str, student: Any, teacher: Any, rows: Any, args: Any, vocab: int, folder: str
) -> Any:
    from kd.training import DistillationCollator, DistillationTrainer, Objective

    objective = Objective()
    if name == "kd online":
        objective = Objective(kd_weight=1.0, ce_weight=0.0, teacher=teacher)
    elif name == "kd cached top-32":
        from kd.teachers import build_cache

        cache = build_cache(
            teacher, [row["input_ids"] for row in rows], Path(folder) / "cache", progress=False
        )
        objective = Objective(kd_weight=1.0, ce_weight=0.0, teacher=cache)
    made = DistillationTrainer(
        student,
        args,
        objective=objective,
        train_dataset=rows,
        data_collator=DistillationCollator(0, attention_mask=False),
        report=False,
    )
    made.state.max_steps = 1000
    return made


def trl_trainer(name: str, student: Any, teacher: Any, data: Any, options: Any) -> Any:
    extra = {"dataset_kwargs": {"skip_prepare_dataset": True}, "gradient_checkpointing": False}
    if name == "TRL SFTTrainer":
        trl = importlib.import_module("trl")
        args = trl.SFTConfig(**options, **extra)
        return trl.SFTTrainer(
            model=student, args=args, train_dataset=data, processing_class=make_tokenizer()
        )
    gkd = importlib.import_module("trl.experimental.gkd")
    args = gkd.GKDConfig(**options, **extra, lmbda=0.0, beta=0.0)
    return gkd.GKDTrainer(
        model=student,
        teacher_model=teacher,
        args=args,
        train_dataset=data,
        processing_class=make_tokenizer(),
    )


def plain_loss(teacher: Any, wide: torch.dtype = torch.float32) -> Any:
    """What a loop without a library does: all logits of both models, then the loss."""
    from torch.nn import functional

    def loss_of(model: Any, inputs: Any, num_items_in_batch: Any = None, **_: Any) -> Any:
        ids, labels = inputs["input_ids"], inputs["labels"][:, 1:].flatten()
        logits = model(input_ids=ids).logits[:, :-1].flatten(0, 1)
        if teacher is None:
            summed = functional.cross_entropy(logits.to(wide), labels, reduction="sum")
            return summed / num_items_in_batch
        with torch.no_grad():
            wanted = teacher(input_ids=ids).logits[:, :-1].flatten(0, 1)
        rows = labels != -100
        found = functional.kl_div(
            functional.log_softmax(logits.to(wide), -1),
            functional.log_softmax(wanted.to(wide), -1),
            reduction="none",
            log_target=True,
        )
        return found[rows].sum() / num_items_in_batch

    return loss_of


# --- as a suite of make bench ---------------------------------------------------------------------


def make(shape: Shape, dtype: torch.dtype) -> Inputs:
    """train_size (student, teacher, layers, vocabulary, batch), and the dtype by example."""
    count = max(1, shape.tokens // shape.length)
    size = [shape.student_hidden, shape.teacher_hidden, shape.layers, shape.vocab, count]
    return {
        "train_size": torch.tensor([*size, shape.length]),
        "train_like": torch.zeros(1).to(dtype),
    }


def size_of(inputs: Inputs) -> dict[str, Any]:
    student, teacher, layers, vocab, count, length = inputs["train_size"].tolist()
    return {
        "student": (student, layers),
        "teacher": (teacher, layers),
        "vocab": vocab,
        "batch": (count, length),
    }


def truth(divergence: str, inputs: Inputs) -> Truth:
    """Loss and gradients in float64, from all logits."""
    size, dtype = size_of(inputs), inputs["train_like"].dtype
    vocab, rows = size["vocab"], make_rows(size["vocab"], size["batch"])
    student = _model(size, "student", 0, dtype).double()
    teacher = None
    if divergence != "sft":
        teacher = _model(size, "teacher", 1, dtype).double().eval()
    batch = {key: torch.tensor([row[key] for row in rows]) for key in ("input_ids", "labels")}
    tokens = (batch["labels"][:, 1:] != -100).sum()
    loss = plain_loss(teacher, torch.float64)(student, batch, tokens)
    loss.backward()
    ids = torch.randperm(vocab, generator=torch.Generator().manual_seed(1))[:CHECKED_IDS]
    gradients = gradients_of(student)
    return Truth(float(loss.detach()), gradients | {"weight": gradients["weight"][ids]}, ids)


def gradients_of(model: Any) -> dict[str, torch.Tensor]:
    """What is compared: gradients of the tied lm_head, of the first MLP and of the last norm."""
    body = model.model
    parts = {
        "weight": body.embed_tokens.weight,
        "mlp": body.layers[0].mlp.down_proj.weight,
        "norm": body.norm.weight,
    }
    return {name: part.grad.detach().clone() for name, part in parts.items()}


class TrainingStep:
    """A trainer's own step on one batch, then AdamW."""

    def __init__(self, name: str, divergence: str, inputs: Inputs) -> None:
        self.folder = tempfile.TemporaryDirectory()
        like, size = inputs["train_like"], size_of(inputs)
        made = build_trainer(
            NAMES[name, divergence], size, self.folder.name, like.dtype, like.device.type
        )
        self.trainer, batch, self.tokens = made
        self.batch = self.trainer.data_collator(self.trainer.train_dataset) if not batch else batch
        self.trainer.model.train()
        self.trainer.create_optimizer()

    def backward(self) -> torch.Tensor:
        loss = self.trainer.training_step(self.trainer.model, dict(self.batch), self.tokens)
        return loss.detach()

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
