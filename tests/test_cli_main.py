"""The command line: help that teaches, errors in one line, completion, doctor."""

import json
import os
import re
import shutil
import subprocess
import sys

import pytest

from kd.cli import doctor
from kd.cli.main import AREAS, main, one_line


def test_help_teaches_the_first_steps(capsys):
    assert main([]) == 0
    printed = capsys.readouterr().out
    for expected in ("kd run quickstart", "kd run heal", "kd doctor", "--debug", *AREAS):
        assert expected in printed


@pytest.mark.parametrize("command", sorted(AREAS))
def test_every_area_has_help(command, capsys):
    assert main([command, "--help"]) == 0
    assert f"usage: kd {command}" in capsys.readouterr().out


def test_recipes_are_listed_with_their_presets(capsys):
    assert main(["recipes"]) == 0
    printed = capsys.readouterr().out
    for name in ("quickstart", "heal", "r1_to_qwen", "stratos", "sky_t1", "logit_kd"):
        assert f"\n{name}" in "\n" + printed
    assert "32B" in printed and "kd run quickstart" in printed
    assert main(["recipes", "r1_to_qwen"]) == 0
    assert "--dry-run" in capsys.readouterr().out


@pytest.mark.parametrize("name", ["heal", "quickstart", "r1_to_qwen"])
def test_every_setting_of_a_recipe_is_explained(name, capsys):
    assert main(["run", name, "--help"]) == 0
    printed = " ".join(re.sub("[│╭╮╰╯─]", " ", capsys.readouterr().out).split())
    assert "All presets" in printed and "--seeds [INT [INT ...]] " in printed
    options = re.findall(r" (--[\w.-]+)(?:, --no-\S+)? ([^-].*?) \(default: ", printed)
    assert len(options) > 15
    for option, text in options:  # the kind of value, and what it is for
        assert len(re.sub(r"^(STR|INT|FLOAT|\[INT \[INT \.\.\.\]\])", "", text)) > 4, option


def test_errors_are_one_line_and_a_traceback_on_request(capsys, monkeypatch):
    assert main(["run", "no_such_recipe"]) == 1
    error = capsys.readouterr().err
    assert error.count("\n") == 1 and "List them with: kd recipes" in error
    assert main(["run", "heal", "no_such_preset"]) == 1
    assert "PRESET must be one of default" in capsys.readouterr().err
    with pytest.raises(ValueError, match="NAME must be one of"):
        main(["run", "no_such_recipe", "--debug"])
    monkeypatch.setenv("KD_DEBUG", "1")
    with pytest.raises(ValueError, match="NAME must be one of"):
        main(["run", "no_such_recipe"])


def test_one_line_names_the_fix_or_the_type():
    assert one_line(ValueError("a\n  b")) == "error: a b"
    missing = ModuleNotFoundError("No module named 'tyro'", name="tyro")
    assert "pip install tyro" in one_line(missing) and "kd-llm[recipes]" in one_line(missing)
    assert one_line(KeyError("x")).startswith("error: KeyError: ")


def test_interrupted_says_how_to_go_on(capsys, monkeypatch):
    def interrupt(_):
        raise KeyboardInterrupt

    monkeypatch.setattr(sys.modules["kd.cli.main"], "_dispatch", interrupt)
    assert main(["doctor"]) == 130
    assert "run the same command again to continue" in capsys.readouterr().err


def test_a_wrong_option_is_status_two(capsys):
    assert main(["doctor", "--no-such-option"]) == 2
    assert "unrecognized arguments" in capsys.readouterr().err


def completed(line, folder):
    """What kd answers to a shell that has this line when Tab is pressed."""
    answer = folder / "answer"
    environment = os.environ | {
        "_ARGCOMPLETE": "1",
        "_ARGCOMPLETE_SHELL": "bash",
        "_ARGCOMPLETE_IFS": "\n",
        "_ARGCOMPLETE_STDOUT_FILENAME": str(answer),
        "_ARGCOMPLETE_SUPPRESS_SPACE": "1",
        "COMP_LINE": line,
        "COMP_POINT": str(len(line)),
    }
    answer.write_text("")
    subprocess.run([sys.executable, "-m", "kd"], env=environment, check=True)
    return {word.strip() for word in answer.read_text().split("\n") if word}


@pytest.mark.parametrize(
    "line, expected",
    [
        ("kd ", {"run", "recipes", "cache", "evaluate", "completion"}),
        ("kd run ", {"heal", "quickstart"}),
        ("kd recipes ", {"heal", "quickstart"}),
        ("kd run r1_to_qwen ", {"offline", "7B"}),
        ("kd run r1_to_qwen 7B --", {"--dry-run", "--kd.learning-rate", "--check"}),
        ("kd cache ", {"verify", "build"}),
        ("kd cache build --", {"--teacher"}),
        ("kd cache build --selection ", {"top_p", "hybrid"}),
    ],
)
def test_completion_knows_commands_recipes_presets_and_options(line, expected, tmp_path):
    pytest.importorskip("argcomplete")
    assert expected <= completed(line, tmp_path)


@pytest.mark.skipif(shutil.which("bash") is None, reason="needs bash")
def test_the_bash_script_completes(tmp_path, capsys):
    pytest.importorskip("argcomplete")
    assert main(["completion", "bash"]) == 0
    (tmp_path / "kd.sh").write_text(capsys.readouterr().out)
    (tmp_path / "kd").write_text(f'#!/bin/sh\nexec {sys.executable} -m kd "$@"\n')
    (tmp_path / "kd").chmod(0o755)
    script = (
        f"PATH={tmp_path}:$PATH; source {tmp_path}/kd.sh\n"
        't() { COMP_LINE="$*" COMP_POINT=${#COMP_LINE}; COMP_WORDS=("$@"); COMP_TYPE=9\n'
        "COMP_CWORD=$(($# - 1)); _python_argcomplete kd; echo ${COMPREPLY[@]}; }\n"
        "t kd ev; t kd run hea; t kd run r1_to_qwen off; t kd run heal --drop; t kd cache veri\n"
    )
    found = subprocess.run(["bash", "-c", script], capture_output=True, text=True, check=True)
    assert found.stdout.split() == ["evaluate", "heal", "offline", "--drop-layers", "verify"]
    for shell, mark in (("zsh", "compdef"), ("fish", "complete --command kd")):
        assert main(["completion", shell]) == 0
        assert mark in capsys.readouterr().out


@pytest.mark.parametrize("command", ["", *sorted(set(AREAS) - {"doctor"})])
def test_help_loads_neither_torch_nor_transformers(command):
    words = [command, "--help"] if command else ["--help"]
    code = (
        "import sys; from kd.cli import main; "
        f"status = main({words!r}); "
        "heavy = {'torch', 'transformers', 'matplotlib'}; "
        "assert status == 0; print(sorted(heavy & {*sys.modules}))"
    )
    found = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert found.stdout.endswith("[]\n"), found.stdout[-200:]


def test_doctor_says_what_will_be_used_and_why(capsys):
    status = main(["doctor"])
    printed = capsys.readouterr().out
    assert status in (0, 1)
    for expected in ("cores", "memory", "torch", "losses", "precision"):
        assert expected in printed
    assert main(["doctor", "--json"]) == status
    assert '"will use"' in capsys.readouterr().out


def test_doctor_finds_what_is_missing_or_too_old(monkeypatch, capsys):
    real, changed = doctor._version, {"tyro": None, "torch": "2.1.0"}
    monkeypatch.setattr(doctor, "_version", lambda n: changed[n] if n in changed else real(n))
    assert main(["doctor"]) == 1
    printed = capsys.readouterr().out
    assert "torch 2.1.0 is too old. Fix: pip install 'torch>=2.6'" in printed
    assert "tyro is not installed. Fix:" in printed


@pytest.mark.parametrize(
    "command",
    [
        ["cache", "build", "--teacher", "./nowhere", "--data", "rows.jsonl", "--output", "cache"],
        ["traces", "generate", "problems.jsonl", "-o", "out.jsonl", "--model", "./nowhere"],
        ["traces", "render", "traces.jsonl", "-o", "out.jsonl", "--tokenizer", "./nowhere"],
        ["evaluate", "one=./nowhere", "--problems", "problems.jsonl"],
    ],
    ids=lambda command: " ".join(command[:2]),
)
def test_a_model_that_is_not_there_is_named(command, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    row = {"question": "2+2?", "thought": "so", "answer": "4", "reference": "4", "text": "a b"}
    for name in ("rows", "problems", "traces"):
        (tmp_path / f"{name}.jsonl").write_text(json.dumps(row) + "\n")
    assert main(command) == 1
    error = capsys.readouterr().err
    assert "./nowhere, which does not exist" in error and "Repo id" not in error
