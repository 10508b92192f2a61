"""What ``DistillationTrainer`` makes of every field of transformers' ``TrainingArguments``.

A field is honoured, replaced by a value that the loss or the checkpoints need, or refused where the
trainer would pass it by. One that this module does not know, of a newer transformers, is refused as
soon as it is set: docs/training-arguments.md has the table, made by the test that tries each field.
"""

from __future__ import annotations

import dataclasses
import operator
from collections.abc import Callable, Mapping
from typing import Any

HONOURED = frozenset(
    """
    output_dir per_device_train_batch_size num_train_epochs max_steps learning_rate
    lr_scheduler_type lr_scheduler_kwargs warmup_steps optim_args weight_decay adam_beta1
    adam_beta2 adam_epsilon optim_target_modules gradient_accumulation_steps max_grad_norm bf16
    fp16 bf16_full_eval fp16_full_eval tf32 activation_checkpointing activation_checkpointing_kwargs
    gradient_checkpointing gradient_checkpointing_kwargs torch_compile torch_compile_backend
    torch_compile_mode neftune_noise_alpha torch_empty_cache_steps logging_strategy logging_steps
    logging_first_step log_on_each_node include_num_input_tokens_seen log_level log_level_replica
    disable_tqdm report_to run_name project trackio_space_id trackio_bucket_id
    trackio_static_space_id eval_strategy eval_steps eval_delay per_device_eval_batch_size
    eval_on_start save_only_model save_strategy save_steps save_on_each_node save_total_limit
    push_to_hub hub_token hub_private_repo hub_model_id hub_always_push hub_revision
    load_best_model_at_end metric_for_best_model greater_is_better ignore_data_skip
    restore_callback_states_from_checkpoint full_determinism seed data_seed use_cpu
    accelerator_config dataloader_drop_last dataloader_num_workers dataloader_pin_memory
    dataloader_persistent_workers dataloader_prefetch_factor dataloader_multiprocessing_context
    dataloader_in_order train_sampling_strategy length_column_name ddp_find_unused_parameters
    ddp_bucket_cap_mb ddp_broadcast_buffers ddp_static_graph ddp_backend ddp_timeout fsdp
    fsdp_config deepspeed debug skip_memory_metrics do_train do_eval do_predict local_rank
    resume_from_checkpoint prediction_loss_only eval_accumulation_steps eval_do_concat_batches
    eval_use_gather_object
    """.split()
)
"""Fields that do what transformers says they do."""

REPLACED: Mapping[str, tuple[Any, str]] = {
    "remove_unused_columns": (False, "the collator needs every column"),
    "logging_nan_inf_filter": (False, "a NaN must be seen, not averaged away"),
}
"""Fields whose value is always this one, and why."""


REFUSED: Mapping[str, tuple[str, str]] = {
    "label_smoothing_factor": (
        "be 0",
        "The objective has no smoothed labels: a teacher's probabilities are what they stand for",
    ),
    "average_tokens_across_devices": (
        "be True",
        "The loss is the mean over the tokens of all ranks, so that any split gives one gradient",
    ),
    "use_liger_kernel": (
        "be False",
        "Liger replaces the forward that this loss lives in, and the loss is already fused",
    ),
    "liger_kernel_config": ("be None", "It belongs to use_liger_kernel"),
    "use_cache": ("be False", "Training reads no past keys"),
    "auto_find_batch_size": (
        "be False",
        "A batch that shrinks on its way would be another run on resume. Choose "
        "per_device_train_batch_size and gradient_accumulation_steps: any split gives one gradient",
    ),
    "label_names": ("be None", "A batch's labels are its shift_labels"),
    "include_for_metrics": ("be empty", "It belongs to compute_metrics"),
    "batch_eval_metrics": ("be False", "It belongs to compute_metrics"),
    "enable_jit_checkpoint": (
        "be False",
        "Ctrl-C and SIGTERM already finish the step in hand and write a checkpoint",
    ),
    "hub_strategy": (
        "be end or every_save",
        "A checkpoint would be pushed before the marker that says that it is whole",
    ),
    "parallelism_config": (
        "be None",
        "The loss knows no sequences or heads that are split over ranks. Use fsdp or deepspeed",
    ),
    "optim": (
        "step after the whole backward",
        "A gradient that is not finite could not be kept from the weights",
    ),
}
"""Fields that the trainer would pass by: the rule in words, and what to do."""


def _text(value: Any) -> str:
    return str(getattr(value, "value", value))


RIGHT: Mapping[str, Callable[[Any], bool]] = {
    "average_tokens_across_devices": bool,
    "label_names": lambda value: value in (None, ["shift_labels"]),
    "hub_strategy": lambda value: _text(value) in ("end", "every_save"),
    "parallelism_config": lambda value: value is None,
    "optim": lambda value: "lomo" not in _text(value) and not _text(value).endswith("layerwise"),
}
"""Which values of ``REFUSED`` fields are right, where that is not nothing at all."""

OPTIONS: Mapping[str, str] = {
    "compute_loss_func": "The loss is the objective's. Pass objective=Objective(...), or use "
    "kd.training.compute_loss in a loop of your own.",
    "compute_metrics": "Evaluation makes no logits. Read eval_loss, or score the student with "
    "kd.evaluation.",
    "preprocess_logits_for_metrics": "Evaluation makes no logits. Read eval_loss, or score the "
    "student with kd.evaluation.",
}
"""Arguments of ``Trainer`` itself that are refused, and what to do."""


def _defaults(arguments: Any) -> dict[str, Any]:
    """Of the fields that have one."""
    found = {}
    for field in dataclasses.fields(arguments):
        if field.default is not dataclasses.MISSING:
            found[field.name] = field.default
        elif field.default_factory is not dataclasses.MISSING:
            found[field.name] = field.default_factory()
    return found


def apply_arguments(arguments: Any, options: Mapping[str, Any]) -> None:
    """Refuse what would be passed by, and set what the trainer needs.

    Args:
        arguments: ``TrainingArguments``, changed in place where a field is ``REPLACED``.
        options: what else ``Trainer`` was given.

    Raises:
        ValueError: naming the field, its value, and the way out.
    """
    for name, why in OPTIONS.items():
        if options.get(name) is not None:
            raise ValueError(f"DistillationTrainer: {name} must be None, got one. {why}")
    if arguments.n_gpu > 1:
        raise ValueError(
            f"DistillationTrainer: a process must see one GPU, got {arguments.n_gpu} "
            "(transformers would use torch.nn.DataParallel). Start with `torchrun "
            "--nproc_per_node N` or `accelerate launch`, or set CUDA_VISIBLE_DEVICES."
        )
    for name, default in _defaults(arguments).items():
        value = getattr(arguments, name)
        if name in REFUSED:
            rule, way_out = REFUSED[name]
            if not RIGHT.get(name, operator.not_)(value):
                raise ValueError(
                    f"DistillationTrainer: TrainingArguments.{name} must {rule}, got {value!r}. "
                    f"{way_out}."
                )
        elif name in REPLACED:
            setattr(arguments, name, REPLACED[name][0])
        elif name not in HONOURED and value != default and (value or default):
            raise ValueError(
                f"DistillationTrainer: TrainingArguments.{name} must keep its default {default!r}, "
                f"got {value!r}. This version of kd does not know the field, so it might pass it "
                "by. Leave it out, or use a newer kd."
            )
