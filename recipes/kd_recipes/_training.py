"""How a recipe trains a student: the settings, and one run from a start to the model it keeps."""

from __future__ import annotations

import os
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from kd.files import read_json, write_json
from kd.models import device, fast_bf16, load_for_inference, load_model, load_tokenizer


@dataclass(frozen=True)
class Training:
    """How a student is trained; the same class for SFT and for KD."""

    epochs: float = 3.0  # passes over the traces
    learning_rate: float = 1e-5  # peak
    min_rate: float = 0.0  # share of the peak that the cosine ends at
    warmup: float = 0.1  # share of the steps
    batch: int = 96  # traces in an optimiser step, over all GPUs
    micro_batch: int = 1  # traces on one GPU at a time
    max_grad_norm: float = 1.0  # gradients are clipped to it
    weight_decay: float = 0.0  # of AdamW
    adam_beta2: float = 0.999  # of AdamW
    train_embeddings: bool = True  # train the embedding and the lm_head too
    kd_weight: float = 0.0  # weight of the divergence from the teacher
    ce_weight: float = 1.0  # weight of the cross-entropy on the trace
    temperature: float = 1.0  # softens teacher and student in the divergence
    checkpoints: int = 4  # written over the run; a killed run continues from the last whole one


def train(
    folder: Path,
    report: Any,
    *,
    start: str,
    tokenizer: str,
    rows: Path,
    training: Training,
    seed: int,
    cache: str = "",
    online: str = "",
    recompute: bool = True,
    **arguments: Any,
) -> dict[str, Any]:
    """Train one student, continuing from its last whole checkpoint, and keep its model.

    Args:
        folder: of the checkpoints and of the model.
        report: called with the share done.
        start: the model to begin with.
        tokenizer: the model whose tokenizer the student has.
        rows: a saved data set of {input_ids, labels}.
        training: the settings.
        seed: of the data order.
        cache: of the teacher's targets, for KD; or
        online: the teacher itself, kept in memory.
        recompute: on a GPU, activations are computed again in the backward instead of kept.
        **arguments: more of ``kd.training.fit``.
    """
    done = read_json(folder / "trained.json")
    if done:  # its checkpoints are gone; what follows it may have been interrupted
        return done
    from datasets import load_from_disk

    from kd.cache import TeacherCache
    from kd.training import DistillationCollator, Objective, fit, keep_student
    from kd.vocab import live_vocab

    data = load_from_disk(rows).select_columns(["input_ids", "labels"]).with_format("torch")
    tokens, teacher = load_tokenizer(tokenizer), None
    if training.kd_weight:
        teacher = TeacherCache(cache) if cache else load_for_inference(online)
    objective = Objective(
        kd_weight=training.kd_weight,
        ce_weight=training.ce_weight,
        temperature=training.temperature,
        vocab_size=live_vocab(tokens),
        teacher=teacher,
    )
    model = load_model(start)
    for layer in (model.get_input_embeddings(), model.get_output_embeddings()):
        layer.weight.requires_grad_(training.train_embeddings)
    log = fit(
        model,
        data,
        folder,
        collator=DistillationCollator(tokens.pad_token_id or 0, objective, attention_mask=False),
        objective=objective,
        steps=max(1, round(training.epochs * len(data) / training.batch)),
        learning_rate=training.learning_rate,
        seed=seed,
        warmup=training.warmup,
        checkpoints=training.checkpoints,
        tokenizer=tokens,
        report=report,
        **{**_arguments(training, recompute), **arguments},
    )
    done = {"model": str(keep_student(model, tokens, folder)), "seed": seed, "log": log}
    write_json(folder / "trained.json", done)
    return done


def _arguments(training: Training, recompute: bool) -> dict[str, Any]:
    gpu = device().type == "cuda"
    world = int(os.environ.get("WORLD_SIZE", "1"))
    micro = training.micro_batch if gpu else training.batch
    found: dict[str, Any] = {
        "batch_size": micro,
        "gradient_accumulation_steps": max(1, training.batch // (micro * world)),
        "max_grad_norm": training.max_grad_norm,
        "weight_decay": training.weight_decay,
        "adam_beta2": training.adam_beta2,
        "use_cpu": not gpu,
    }
    if training.min_rate:
        found["lr_scheduler_type"] = "cosine_with_min_lr"
        found["lr_scheduler_kwargs"] = {"min_lr_rate": training.min_rate}
    if gpu:
        found["bf16"] = fast_bf16()
        if recompute:
            found["gradient_checkpointing"] = True
    return found
