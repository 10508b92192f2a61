"""The configuration files for 1, 8 and 64 GPUs, read by accelerate itself."""

from pathlib import Path

import pytest

FILES = sorted((Path(__file__).parents[1] / "recipes" / "kd_recipes" / "configs").glob("*.yaml"))
KINDS = {"single": "NO", "ddp": "MULTI_GPU", "fsdp2": "FSDP", "zero3": "DEEPSPEED"}


def test_every_engine_has_its_sizes():
    names = {path.stem for path in FILES}
    sized = {f"{kind}_{count}" for kind in ("ddp", "fsdp2", "zero3") for count in (8, 64)}
    assert names == {"single"} | sized


@pytest.mark.parametrize("path", FILES, ids=lambda path: path.stem)
def test_accelerate_reads_it_as_meant(path):
    from accelerate.commands.config.config_args import load_config_from_file
    from accelerate.commands.launch import launch_command_parser

    found = load_config_from_file(str(path))
    kind, _, count = path.stem.partition("_")
    assert found.distributed_type == KINDS[kind]
    assert found.num_processes == int(count or 1)
    assert found.num_machines == max(1, found.num_processes // 8)
    assert found.mixed_precision == "bf16"
    options = {action.dest for action in launch_command_parser()._actions}
    for section in (found.fsdp_config, found.deepspeed_config):
        assert set(section) <= options, "a key the launcher does not know"


@pytest.mark.parametrize("path", [p for p in FILES if "fsdp2" in p.stem], ids=lambda p: p.stem)
def test_the_launcher_hands_fsdp2_on(path):
    from accelerate.commands.config.config_args import load_config_from_file
    from accelerate.commands.launch import launch_command_parser
    from accelerate.utils.launch import prepare_multi_gpu_env

    arguments = launch_command_parser().parse_args(["--config_file", str(path), "script.py"])
    for name, value in load_config_from_file(str(path)).fsdp_config.items():
        setattr(arguments, name, value)
    arguments.use_fsdp, arguments.num_processes, arguments.main_process_port = True, 8, 29500
    arguments.num_machines, arguments.mixed_precision = 1, "bf16"
    arguments.dynamo_backend, arguments.num_cpu_threads_per_process = "no", 1
    environment = prepare_multi_gpu_env(arguments)
    assert environment["ACCELERATE_USE_FSDP"] == "true"
    assert environment["FSDP_VERSION"] == "2"
    assert environment["FSDP_TRANSFORMER_CLS_TO_WRAP"] == "Qwen2DecoderLayer"
    assert environment["FSDP_RESHARD_AFTER_FORWARD"].lower() == "true"
