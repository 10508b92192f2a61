"""Tiny students, rows and runs for the training tests."""

import random
import types

import torch
from transformers import TrainerCallback

from kd.training import DistillationCollator, DistillationTrainer, Objective

VOCABULARY = 23
MIXED = Objective(
    kd_weight=0.7,
    ce_weight=0.3,
    temperature=2.0,
    tail_at_temperature="spread",
    vocab_size=VOCABULARY,
)


def student(seed=0, tie_word_embeddings=True, **options):
    """A Qwen2 of 8k parameters."""
    from transformers import Qwen2Config, Qwen2ForCausalLM

    config = Qwen2Config(
        vocab_size=VOCABULARY,
        hidden_size=16,
        intermediate_size=32,
        num_hidden_layers=2,
        num_attention_heads=2,
        num_key_value_heads=1,
        max_position_embeddings=32,
        tie_word_embeddings=tie_word_embeddings,
        use_cache=False,
        pad_token_id=0,
        initializer_range=0.3,
        **options,
    )
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        return Qwen2ForCausalLM(config)


def rows(count, seed=0, weights=False):
    """Sequences of 3 to 12 tokens, the first few of each not trained on."""
    generator = random.Random(seed)
    made = []
    for _ in range(count):
        length = generator.randint(3, 12)
        ids = [generator.randrange(1, VOCABULARY) for _ in range(length)]
        prompt = generator.randint(1, length - 1)
        row = {"input_ids": ids, "labels": [-100] * prompt + ids[prompt:]}
        if weights:
            row["weights"] = [generator.choice((0.0, 0.5, 2.0)) for _ in ids]
        made.append(row)
    return made


class RandomCache:
    """Top-4 targets that depend on the sequence alone, as a content-addressed cache's do.

    With ``tail_temperatures`` it says what it is and holds the tails, as a built cache does.
    """

    def __init__(self, tail_temperatures=()):
        self.tail_temperatures = tuple(tail_temperatures)
        if tail_temperatures:
            self.meta = types.SimpleNamespace(
                temperature=1.0,
                tail="bucket",
                live_vocab=VOCABULARY,
                selection="top_k",
                tail_temperatures=self.tail_temperatures,
            )

    def batch(self, sequences, length):
        ids = torch.full((len(sequences), length, 4), -1)
        logprobs = torch.full((len(sequences), length, 4), float("-inf"))
        tails = torch.zeros(len(sequences), length, len(self.tail_temperatures))
        for row, sequence in enumerate(sequences):
            generator = torch.Generator().manual_seed(int(sequence.sum()))
            logits = 2 * torch.randn(len(sequence), VOCABULARY, generator=generator)
            top = logits.log_softmax(-1).topk(4)
            ids[row, : len(sequence)] = top.indices
            logprobs[row, : len(sequence)] = top.values
            left = logits.log_softmax(-1).scatter(1, top.indices, -torch.inf)
            for number, temperature in enumerate(self.tail_temperatures):
                tails[row, : len(sequence), number] = (left / temperature).logsumexp(-1)
        found = types.SimpleNamespace(ids=ids, logprobs=logprobs)
        if self.tail_temperatures:
            found.tail_log_partition = tails
        return found


def teacher_model(seed=7, dtype=torch.float32):
    """A model that shares nothing with ``student()``."""
    return student(seed=seed).to(dtype)


def with_record(temperature=1.0, tail="bucket", live=VOCABULARY):
    """A RandomCache that says what it is, without stored tails."""
    cache = RandomCache()
    cache.meta = types.SimpleNamespace(
        temperature=temperature, tail=tail, live_vocab=live, selection="top_k"
    )
    return cache


def batch_of(count=5, cache=None, **options):
    """A collated batch of ``rows(count, **options)``."""
    return DistillationCollator(0, cache)(rows(count, **options))


def inputs_of(batch):
    """What a model's own forward takes of a batch."""
    return {name: batch[name] for name in ("input_ids", "attention_mask")}


def arguments(folder, **options):
    """TrainingArguments without reports, bars or a GPU."""
    from transformers import TrainingArguments

    settings = {
        "output_dir": str(folder),
        "max_steps": 1,
        "per_device_train_batch_size": 4,
        "learning_rate": 1e-2,
        "logging_steps": 1,
        "save_strategy": "no",
        "report_to": [],
        "disable_tqdm": True,
        "use_cpu": True,
        "dataloader_pin_memory": False,
    }
    return TrainingArguments(**{**settings, **options})


class At(TrainerCallback):
    """Does something at the end of one step."""

    def __init__(self, step, action):
        self.step, self.action = step, action

    def on_step_end(self, args, state, control, model=None, **kwargs):
        if state.global_step == self.step:
            self.action(model)


def faulty_trainer(folder, *callbacks, data=None, collator=None, objective=None, **options):
    """8 steps with dropout, a checkpoint every 2 and a log every 3."""
    settings = {"max_steps": 8, "save_strategy": "steps", "save_steps": 2, "logging_steps": 3}
    return DistillationTrainer(
        student(attention_dropout=0.2),
        arguments(folder, **{**settings, **options}),
        objective=objective or MIXED,
        train_dataset=data or rows(13),
        data_collator=collator or DistillationCollator(0, RandomCache()),
        callbacks=list(callbacks),
        report=False,
    )
