"""Healing a pruned model: every stage on a tiny random model, and what refuses bad input."""

import math

import pytest
import torch
from transformers import AutoModelForCausalLM

from kd import models
from kd.cli.main import main
from kd.evaluation import texts
from kd.files import read_json
from kd_recipes import heal
from kd_recipes._pruning import block_influence, least_influential, without_layers
from kd_recipes._random_model import random_model


@pytest.fixture(scope="module")
def finished(tmp_path_factory):
    folder = tmp_path_factory.mktemp("heal") / "run"
    assert main(["run", "heal", "smoke", "--output", str(folder)]) == 0
    return folder


def result(folder, stage):
    return read_json(folder / stage / "stage.json")["result"]


def test_the_report_has_every_arm_and_both_kinds_of_text(finished):
    found = result(finished, "report")
    for part in ("test", "other"):
        assert set(found[part]) == {*heal.ARMS.values(), "before", "teacher", "verdict"}
        values = [*found[part][heal.ARMS["kd"]], found[part]["before"], found[part]["teacher"]]
        assert all(1 < value < 1e4 and math.isfinite(value) for value in values)
    page = (finished / "report" / "report.html").read_text()
    assert page.count("data:image/png;base64,") == 3 and 'src="http' not in page
    for expected in ("Influence of the layers", "calibration gap", "whole model"):
        assert expected in page


def test_the_healed_models_are_kept_and_their_checkpoints_are_not(finished):
    for student in ("ce-0", "ce-1", "kd-0", "kd-1"):
        folder = finished / "students" / student
        assert not list(folder.glob("checkpoint-*"))
        model = AutoModelForCausalLM.from_pretrained(folder / "model")
        assert model.config.num_hidden_layers == len(model.model.layers) == 4
    pruned = AutoModelForCausalLM.from_pretrained(finished / "prune" / "model")
    frozen = model.get_input_embeddings().weight
    assert torch.equal(frozen, pruned.get_input_embeddings().weight)
    layer = model.model.layers[0].mlp.up_proj.weight
    assert not torch.equal(layer, pruned.model.layers[0].mlp.up_proj.weight)


def test_a_rerun_skips_and_one_more_seed_trains_only_that(finished, capsys):
    assert main(["run", "heal", "smoke", "--output", str(finished), "--workers", "2"]) == 0
    assert capsys.readouterr().out.count("unchanged, skipped") == 7


def test_a_pruned_model_still_generates_with_a_cache(tmp_path):
    """Layers carry their number into the key-value cache: a gap would break decoding."""
    random_model(tmp_path)
    model = without_layers(AutoModelForCausalLM.from_pretrained(tmp_path), [1, 3]).eval()
    ids = torch.arange(5, 15)[None]
    with torch.no_grad():
        cached = model.generate(ids, max_new_tokens=8, do_sample=False, use_cache=True)
        plain = model.generate(ids, max_new_tokens=8, do_sample=False, use_cache=False)
    assert torch.equal(cached, plain)


def test_the_layer_that_does_nothing_has_no_influence(tmp_path):
    random_model(tmp_path)
    model = AutoModelForCausalLM.from_pretrained(tmp_path).eval()
    with torch.no_grad():
        model.model.layers[2].mlp.down_proj.weight.zero_()
        model.model.layers[2].self_attn.o_proj.weight.zero_()
    influence = block_influence(model, [torch.arange(2, 66), torch.arange(100, 164)])
    # (the embedding of the padding, id 0, is zero: it has no direction)
    assert len(influence) == 6 and abs(influence[2]) < 1e-6 < min(influence[:2] + influence[3:])
    assert least_influential(influence, 1) == [2]
    with pytest.raises(ValueError, match="drop_layers must be from 0 to 5, got 6"):
        least_influential(influence, 6)


def test_text_of_ones_own(tmp_path):
    (tmp_path / "a.txt").write_text("one two three")
    (tmp_path / "b.jsonl").write_text('{"text": "four"}\n\n{"text": "five"}\n')
    assert texts.documents(tmp_path) == ["one two three"]
    assert sorted(texts.documents(tmp_path / "b.jsonl")) == ["five", "four"]
    (tmp_path / "c.jsonl").write_text('{"content": "four"}\n')
    with pytest.raises(ValueError, match='must be an object with "text"'):
        texts.documents(tmp_path / "c.jsonl")
    with pytest.raises(ValueError, match="must be a file or a folder, got .*missing"):
        texts.documents(tmp_path / "d.txt")


def test_too_little_text_says_how_much_is_needed(tmp_path, capsys):
    (tmp_path / "short.txt").write_text("too short")
    text = ["--text", str(tmp_path / "short.txt"), "--output", str(tmp_path / "run")]
    assert main(["run", "heal", "smoke", *text]) == 1
    error = capsys.readouterr().err
    assert "must hold at least 20 blocks of 64 tokens, got 0" in error and error.count("\n") == 1


@pytest.mark.parametrize(
    ("raised", "told"),
    [
        ("401 Client Error: access to model x/y is restricted, gated", "hf auth login"),
        ("We couldn't connect to 'https://huggingface.co'", "hf download x/y"),
        ("x/y is not a valid model identifier listed on", "Check the spelling"),
    ],
)
def test_a_model_that_cannot_be_had_says_what_to_do(monkeypatch, capsys, tmp_path, raised, told):
    import transformers

    def refuse(*_, **__):
        raise OSError(raised)

    monkeypatch.setattr(transformers.AutoTokenizer, "from_pretrained", refuse)
    arguments = ["run", "heal", "--model", "x/y", "--output", str(tmp_path / "run")]
    assert main(arguments) == 1
    error = capsys.readouterr().err
    assert told in error and "x/y" in error and error.count("\n") == 1


def test_a_missing_folder_is_not_looked_up_on_the_hub(tmp_path, capsys):
    arguments = ["--model", str(tmp_path / "no"), "--output", str(tmp_path / "run")]
    assert main(["run", "heal", *arguments]) == 1
    assert "must be an existing folder or a hub id" in capsys.readouterr().err


def test_without_package_and_network_both_ways_out_are_named(monkeypatch, capsys, tmp_path):
    def refuse(name):
        raise OSError("load: tokenizer must be reachable, got X, while the hub is not.")

    monkeypatch.setattr(heal, "packaged_smollm2", lambda: None)
    monkeypatch.setattr(heal, "load_tokenizer", refuse)
    assert main(["run", "heal", "--output", str(tmp_path / "run")]) == 1
    error = capsys.readouterr().err
    assert models.SMOLLM2_INSTALL in error and "kd run heal smoke" in error
