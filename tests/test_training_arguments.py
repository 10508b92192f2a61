"""Every field of TrainingArguments does what it does in transformers' Trainer, or is refused.

The table in docs/training-arguments.md is made here: python tests/test_training_arguments.py
"""

import dataclasses
import json
import math
import shutil
from pathlib import Path

import pytest
import torch
import training_cases as cases
from datasets import Dataset
from transformers import Trainer, TrainingArguments

from kd.training import DistillationCollator, DistillationTrainer, Objective
from kd.training.arguments import HONOURED, OPTIONS, REFUSED, REPLACED

TABLE = Path(__file__).parents[1] / "docs" / "training-arguments.md"
ROWS = cases.rows(14)

# --- what each honoured field is shown by ---------------------------------------------------------

EPOCHS = {"max_steps": -1, "num_train_epochs": 1.0}
ADAM = {"optim": "adamw_torch", "learning_rate": 1e-3}
EVALUATED = {"eval_strategy": "steps", "eval_steps": 2, "per_device_eval_batch_size": 14}
BEST = {**EVALUATED, "save_strategy": "steps", "save_steps": 2, "load_best_model_at_end": True}

# The same weights as transformers' Trainer, and other ones than without the field (of ``base``).
CURVE = {
    "per_device_train_batch_size": ({"per_device_train_batch_size": 2}, {}),
    "num_train_epochs": ({**EPOCHS, "num_train_epochs": 1.5}, EPOCHS),
    "max_steps": ({"max_steps": 3}, {}),
    "learning_rate": ({"learning_rate": 0.03}, {}),
    "lr_scheduler_type": ({"lr_scheduler_type": "cosine"}, {}),
    "lr_scheduler_kwargs": (
        {"lr_scheduler_type": "cosine", "lr_scheduler_kwargs": {"num_cycles": 1.0}},
        {"lr_scheduler_type": "cosine"},
    ),
    "warmup_steps": ({"warmup_steps": 2}, {}),
    "optim": (ADAM, {"learning_rate": 1e-3}),
    "weight_decay": ({"weight_decay": 0.5}, {}),
    "adam_beta1": ({**ADAM, "adam_beta1": 0.5}, ADAM),
    "adam_beta2": ({**ADAM, "adam_beta2": 0.2}, ADAM),
    "adam_epsilon": ({**ADAM, "adam_epsilon": 0.1}, ADAM),
    "gradient_accumulation_steps": ({"gradient_accumulation_steps": 2}, {}),
    "max_grad_norm": ({"max_grad_norm": 0.1}, {}),
    "bf16": ({"bf16": True}, {}),
    "neftune_noise_alpha": ({"neftune_noise_alpha": 5.0}, {}),
    "dataloader_drop_last": ({**EPOCHS, "dataloader_drop_last": True}, EPOCHS),
    "seed": ({"seed": 7}, {}),
    "data_seed": ({"data_seed": 7}, {}),
    "train_sampling_strategy": ({"train_sampling_strategy": "sequential"}, {}),
    "length_column_name": (
        {"train_sampling_strategy": "group_by_length", "length_column_name": "size"},
        {"train_sampling_strategy": "group_by_length"},
    ),
    "accelerator_config": ({"accelerator_config": {"use_seedable_sampler": False}}, {}),
}
# The same weights as transformers' Trainer, and the same as without the field.
SAME_CURVE = {
    "gradient_checkpointing": {"gradient_checkpointing": True},
    "gradient_checkpointing_kwargs": {
        "gradient_checkpointing": True,
        "gradient_checkpointing_kwargs": {"use_reentrant": True},
    },
    "activation_checkpointing": {"activation_checkpointing": True},
    "activation_checkpointing_kwargs": {
        "activation_checkpointing": True,
        "activation_checkpointing_kwargs": {"use_reentrant": False},
    },
    "dataloader_num_workers": {"dataloader_num_workers": 1},
    "dataloader_persistent_workers": {
        "dataloader_num_workers": 1,
        "dataloader_persistent_workers": True,
    },
    "dataloader_prefetch_factor": {"dataloader_num_workers": 1, "dataloader_prefetch_factor": 4},
    "dataloader_multiprocessing_context": {
        "dataloader_num_workers": 1,
        "dataloader_multiprocessing_context": "forkserver",
    },
    "dataloader_in_order": {"dataloader_num_workers": 1, "dataloader_in_order": False},
    "dataloader_pin_memory": {"dataloader_pin_memory": False},
    "torch_empty_cache_steps": {"torch_empty_cache_steps": 1},
    "full_determinism": {"full_determinism": True},
    "skip_memory_metrics": {"skip_memory_metrics": False},
    "debug": {"debug": "underflow_overflow"},
    "log_level": {"log_level": "error"},
    "log_level_replica": {"log_level_replica": "error"},
    "log_on_each_node": {"log_on_each_node": False},
    "disable_tqdm": {"disable_tqdm": True},
    "use_cpu": {"use_cpu": True},
    "run_name": {"run_name": "night"},
    "do_train": {"do_train": True},
    "do_eval": {"do_eval": True, "eval_strategy": "no"},
    "do_predict": {"do_predict": True},
    "output_dir": {},
}
# The same entries in the log, at the same steps.
LOG = {
    "logging_strategy": {**EPOCHS, "num_train_epochs": 2.0, "logging_strategy": "epoch"},
    "logging_steps": {"logging_steps": 0.5},
    "logging_first_step": {"logging_steps": 3, "logging_first_step": True},
    "include_num_input_tokens_seen": {"include_num_input_tokens_seen": "non_padding"},
    "eval_strategy": {"eval_strategy": "epoch", **EPOCHS, "per_device_eval_batch_size": 14},
    "eval_steps": {**EVALUATED, "eval_steps": 3},
    "eval_delay": {**EVALUATED, "eval_delay": 3},
    "eval_on_start": {**EVALUATED, "eval_on_start": True},
    "per_device_eval_batch_size": EVALUATED,
    "prediction_loss_only": {**EVALUATED, "prediction_loss_only": True},
    "eval_accumulation_steps": {**EVALUATED, "eval_accumulation_steps": 1},
    "eval_do_concat_batches": {**EVALUATED, "eval_do_concat_batches": False},
    "eval_use_gather_object": {**EVALUATED, "eval_use_gather_object": True},
    "bf16_full_eval": {**EVALUATED, "bf16_full_eval": True},
    "load_best_model_at_end": {**BEST, "learning_rate": 3.0},
    "metric_for_best_model": {**BEST, "metric_for_best_model": "eval_loss"},
    "greater_is_better": {
        **BEST,
        "metric_for_best_model": "eval_loss",
        "greater_is_better": True,
    },
}
# The same checkpoints, with the same files beside our marker and the loss carried over.
SAVED = {
    "save_strategy": {**EPOCHS, "num_train_epochs": 2.0, "save_strategy": "epoch"},
    "save_steps": {"save_strategy": "steps", "save_steps": 3},
    "save_total_limit": {"save_strategy": "steps", "save_steps": 1, "save_total_limit": 2},
    "save_only_model": {"save_strategy": "steps", "save_steps": 2, "save_only_model": True},
    "save_on_each_node": {"save_strategy": "steps", "save_steps": 2, "save_on_each_node": True},
}
# Passed on to transformers and torch, and not run by a test on a CPU alone.
PASSED_ON = {
    "fp16": "a GPU",
    "fp16_full_eval": "a GPU",
    "tf32": "a GPU",
    "torch_compile": "minutes of compilation",
    "torch_compile_backend": "minutes of compilation",
    "torch_compile_mode": "minutes of compilation",
    "optim_args": "an optimizer of another package",
    "optim_target_modules": "a package of low-rank optimizers",
    "report_to": "a reporter's package",
    "project": "a reporter's package",
    "trackio_space_id": "a network",
    "trackio_bucket_id": "a network",
    "trackio_static_space_id": "a network",
    "push_to_hub": "a network",
    "hub_token": "a network",
    "hub_private_repo": "a network",
    "hub_model_id": "a network",
    "hub_always_push": "a network",
    "hub_revision": "a network",
    "ignore_data_skip": "nothing; on resume the data begins anew, as it says",
    "restore_callback_states_from_checkpoint": "callbacks with a state",
    "ddp_find_unused_parameters": "several processes: tests/training_ranks.py",
    "ddp_bucket_cap_mb": "several processes: tests/training_ranks.py",
    "ddp_broadcast_buffers": "several processes: tests/training_ranks.py",
    "ddp_static_graph": "several processes: tests/training_ranks.py",
    "ddp_backend": "several processes: tests/training_ranks.py",
    "ddp_timeout": "several processes: tests/training_ranks.py",
    "fsdp": "several processes: tests/training_ranks.py",
    "fsdp_config": "several processes: tests/training_ranks.py",
    "deepspeed": "several processes: tests/training_ranks.py",
    "local_rank": "several processes: tests/training_ranks.py",
    "resume_from_checkpoint": "a script: Trainer itself reads train()'s argument",
}
WRONG = {
    "label_smoothing_factor": [0.1],
    "average_tokens_across_devices": [False],
    "use_liger_kernel": [True],
    "liger_kernel_config": [{"rope": True}],
    "use_cache": [True],
    "auto_find_batch_size": [True],
    "label_names": [["labels"], ["shift_labels", "labels"]],
    "include_for_metrics": [["inputs"]],
    "batch_eval_metrics": [True],
    "enable_jit_checkpoint": [True],
    "hub_strategy": ["checkpoint", "all_checkpoints"],
    "parallelism_config": ["two"],
    "optim": ["lomo", "adalomo", "galore_adamw_layerwise", "apollo_adamw_layerwise"],
}


def plain_collator(rows):
    """Labels as transformers' models take them: not shifted."""
    length = max(len(row["input_ids"]) for row in rows)

    def padded(name, value):
        return torch.tensor([row[name] + [value] * (length - len(row[name])) for row in rows])

    ids = padded("input_ids", 0)
    lengths = torch.tensor([len(row["input_ids"]) for row in rows])
    mask = (torch.arange(length) < lengths[:, None]).long()
    return {"input_ids": ids, "labels": padded("labels", -100), "attention_mask": mask}


def arguments(folder, **fields):
    settings = {"max_steps": 4, "optim": "sgd", "learning_rate": 0.1, **fields}
    return cases.arguments(folder, **settings)


def rows_for(fields):
    """With two columns of lengths, one of which sorts the rows in another way."""
    other = [7 * n % 14 for n in range(14)]
    rows = [{**row, "length": 20 - n, "size": other[n]} for n, row in enumerate(cases.rows(14))]
    return Dataset.from_list(rows)


def trained(ours, folder, **fields):
    """(trainer, weights) after a run of our trainer or of transformers'."""
    shutil.rmtree(folder, ignore_errors=True)
    data = {"train_dataset": rows_for(fields), "eval_dataset": cases.rows(14, seed=5)}
    if ours:
        options = {"objective": Objective(), "report": False}
        made = DistillationTrainer(
            cases.student(),
            arguments(folder, **fields),
            data_collator=DistillationCollator(0),
            **data,
            **options,
        )
    else:
        plain = arguments(folder, remove_unused_columns=False, **fields)
        made = Trainer(cases.student(), plain, data_collator=plain_collator, **data)
    made.train()
    weights = torch.cat([p.detach().float().flatten() for p in made.model.parameters()])
    return made, weights


BASES = {}


def base(folder, fields):
    key = json.dumps(fields, sort_keys=True)
    if key not in BASES:
        BASES[key] = trained(True, folder, **fields)[1]
    return BASES[key]


def difference(one, other):
    return float((one - other).norm() / other.norm())


@pytest.fixture(autouse=True)
def global_state():
    """full_determinism and the log levels are the process's own."""
    from transformers.utils import logging

    level, benchmark = logging.get_verbosity(), torch.backends.cudnn.benchmark
    yield
    logging.set_verbosity(level)
    torch.backends.cudnn.benchmark = benchmark


@pytest.mark.parametrize("name", CURVE)
def test_fields_that_change_the_run_change_it_as_in_transformers(name, tmp_path):
    fields, without = CURVE[name]
    ours = trained(True, tmp_path / "ours", **fields)[1]
    theirs = trained(False, tmp_path / "theirs", **fields)[1]
    bound = 3e-3 if name == "bf16" else 1e-5
    assert difference(ours, theirs) < bound
    if name != "bf16":  # its own rounding is all that it changes
        assert difference(ours, base(tmp_path / "base", without)) > 20 * bound


SLOW = ("dataloader_multiprocessing_context",)  # its workers import everything again


@pytest.mark.parametrize(
    "name",
    [pytest.param(n, marks=[pytest.mark.slow] if n in SLOW else []) for n in SAME_CURVE],
)
def test_fields_that_must_not_change_the_run(name, tmp_path):
    ours = trained(True, tmp_path / "ours", **SAME_CURVE[name])[1]
    theirs = trained(False, tmp_path / "theirs", **SAME_CURVE[name])[1]
    assert difference(ours, theirs) < 1e-5
    assert difference(ours, base(tmp_path / "base", {})) < 1e-6


@pytest.mark.parametrize("name", LOG)
def test_fields_that_change_the_log(name, tmp_path):
    found, weights = [], []
    for ours in (True, False):
        made, weight = trained(ours, tmp_path / str(ours), **LOG[name])
        entries = [
            {k: e[k] for k in ("step", "loss", "eval_loss", "num_input_tokens_seen") if k in e}
            for e in made.state.log_history
        ]
        best = Path(made.state.best_model_checkpoint or "").name
        found.append((entries, best))
        weights.append(weight)
    assert found[0][1] == found[1][1]
    assert len(found[0][0]) == len(found[1][0]) and len(found[0][0]) > 0
    loose = 2e-2 if name == "bf16_full_eval" else 1e-4
    for mine, other in zip(*(entries for entries, _ in found), strict=True):
        assert mine == pytest.approx(other, rel=loose)
    assert difference(*weights) < 1e-5


@pytest.mark.parametrize("name", SAVED)
def test_fields_that_change_the_checkpoints(name, tmp_path):
    def listing(folder):
        ours = {"COMPLETE.json", "kd_state.json"}
        return {
            path.name: sorted(f.name for f in path.iterdir() if f.name not in ours)
            for path in folder.glob("checkpoint-*")
        }

    trained(True, tmp_path / "ours", **SAVED[name])
    trained(False, tmp_path / "theirs", **SAVED[name])
    mine, other = listing(tmp_path / "ours"), listing(tmp_path / "theirs")
    assert mine == other and mine


@pytest.mark.parametrize("name, value", [(n, v) for n, values in WRONG.items() for v in values])
def test_fields_that_would_be_passed_by_are_refused(name, value, tmp_path):
    made = arguments(tmp_path)
    setattr(made, name, value)
    with pytest.raises(ValueError, match=rf"TrainingArguments\.{name} must .*got .*\. [A-Z]"):
        DistillationTrainer(cases.student(), made, train_dataset=ROWS)


def test_defaults_and_no_ops_are_accepted(tmp_path):
    made = arguments(tmp_path, label_smoothing_factor=0.0, label_names=["shift_labels"])
    trainer = DistillationTrainer(
        cases.student(), made, train_dataset=ROWS, data_collator=DistillationCollator(0)
    )
    for name, (value, _) in REPLACED.items():
        assert getattr(trainer.args, name) == value


def test_a_field_of_a_newer_transformers_is_refused_once_it_is_set(tmp_path):
    @dataclasses.dataclass
    class Newer(TrainingArguments):
        loss_of_the_future: float = 0.0
        empty_by_default: list | None = None

        def __post_init__(self):
            super().__post_init__()
            self.empty_by_default = self.empty_by_default or []

    data = {"train_dataset": ROWS, "data_collator": DistillationCollator(0)}
    for value, refused in ((0.0, False), (0.5, True)):
        made = Newer(str(tmp_path), loss_of_the_future=value, use_cpu=True, report_to=[])
        if refused:
            with pytest.raises(ValueError, match="loss_of_the_future must keep its default 0.0"):
                DistillationTrainer(cases.student(), made, **data)
        else:
            DistillationTrainer(cases.student(), made, **data)


@pytest.mark.parametrize("name", OPTIONS)
def test_arguments_of_trainer_itself(name, tmp_path):
    with pytest.raises(ValueError, match=f"{name} must be None, got one. .*"):
        DistillationTrainer(
            cases.student(), arguments(tmp_path), train_dataset=ROWS, **{name: lambda *_: 0.0}
        )


def test_several_gpus_in_one_process_are_refused(tmp_path):
    made = arguments(tmp_path)
    made._n_gpu = 2
    with pytest.raises(ValueError, match="must see one GPU, got 2 .*torchrun"):
        DistillationTrainer(cases.student(), made, train_dataset=ROWS)


@pytest.mark.parametrize("removed", [(), ("optimizer.pt",), ("scheduler.pt",)])
def test_a_checkpoint_without_its_optimizer_is_not_resumed(removed, tmp_path):
    """save_only_model=True, or files that somebody removed to save space."""
    fields = {"save_strategy": "steps", "save_steps": 2, "save_only_model": not removed}
    trained(True, tmp_path, **fields)
    checkpoint = tmp_path / "checkpoint-2"
    for name in removed:
        (checkpoint / name).unlink()
    made = DistillationTrainer(
        cases.student(),
        arguments(tmp_path, **fields),
        train_dataset=rows_for({}),
        data_collator=DistillationCollator(0),
        report=False,
    )
    with pytest.raises(ValueError, match="must have the optimizer's state, got .* without "):
        made.train(resume_from_checkpoint=str(checkpoint))
    assert made.state.global_step == 0


def test_parts_of_the_loss_are_logged_for_shares_and_epochs(tmp_path):
    for fields in ({"logging_steps": 0.5}, {**EPOCHS, "logging_strategy": "epoch"}):
        made, _ = trained(True, tmp_path, **fields)
        logged = [entry for entry in made.state.log_history if "loss" in entry]
        assert logged and all(math.isfinite(entry["ce"]) for entry in logged)


# --- the table ------------------------------------------------------------------------------------


def shown_by(name):
    for fields, words in (
        (CURVE, "the same weights as transformers' Trainer, others than without the field"),
        (SAME_CURVE, "the same weights as transformers' Trainer, and as without the field"),
        (LOG, "the same log as transformers' Trainer"),
        (SAVED, "the same checkpoints as transformers' Trainer"),
    ):
        if name in fields and name not in REFUSED:
            return "honoured", words
    if name in PASSED_ON:
        return "passed on", f"not run on a CPU alone: needs {PASSED_ON[name]}"
    if name in REPLACED:
        value, why = REPLACED[name]
        return f"always `{value}`", why
    rule, way_out = REFUSED[name]
    return f"must {rule}", way_out


def table():
    names = sorted({field.name for field in dataclasses.fields(TrainingArguments)})
    lines = [
        "# Fields of TrainingArguments",
        "",
        "What `kd.training.DistillationTrainer` makes of every field of transformers' "
        "`TrainingArguments`. Made and checked by `tests/test_training_arguments.py`, which runs "
        "both trainers with each field. `Trainer`'s own "
        + ", ".join(f"`{name}`" for name in OPTIONS)
        + " are refused. A field that a newer transformers adds is refused once it is set.",
        "",
        "| field | here | shown by, or why |",
        "|---|---|---|",
    ]
    lines += ["| `{}` | {} | {} |".format(name, *shown_by(name)) for name in names]
    return "\n".join(lines) + "\n"


def test_every_field_is_in_exactly_one_place():
    names = {field.name for field in dataclasses.fields(TrainingArguments)}
    shown = [set(CURVE) - set(REFUSED), set(SAME_CURVE), set(LOG), set(SAVED), set(PASSED_ON)]
    assert set.union(*shown) == HONOURED & names
    assert sum(map(len, shown)) == len(HONOURED & names)
    assert set(WRONG) == set(REFUSED)
    assert names - HONOURED - set(REFUSED) - set(REPLACED) == set()


def test_the_table_in_the_docs_is_this_one():
    assert TABLE.read_text() == table(), f"run: python {Path(__file__).name}"


if __name__ == "__main__":
    TABLE.write_text(table())
    print(f"wrote {TABLE.name}")
