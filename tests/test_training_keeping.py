"""A trained student is kept whole, also where every rank holds a part of it."""

import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
import training_cases as cases
from transformers import AutoModelForCausalLM, AutoTokenizer

from kd.training import fit, keep_student
from kd_recipes._random_model import random_model

ROOT = Path(__file__).parents[1]
SHARDED = """
import sys
import torch.distributed as dist
from torch.distributed.fsdp import fully_shard
import training_cases as cases
from kd.training import keep_student

class Tokenizer:
    def save_pretrained(self, folder):
        (folder / "tokenizer").write_text("x")

dist.init_process_group("gloo")
model = cases.student()
for layer in (*model.model.layers, model):
    fully_shard(layer)
keep_student(model, Tokenizer(), sys.argv[1])
dist.barrier()
dist.destroy_process_group()
"""


def test_the_model_stays_and_its_checkpoints_go(tmp_path):
    random_model(tmp_path / "start")
    model = AutoModelForCausalLM.from_pretrained(tmp_path / "start")
    tokenizer = AutoTokenizer.from_pretrained(tmp_path / "start")
    settings = {"steps": 2, "batch_size": 2, "learning_rate": 1e-3, "use_cpu": True}
    fit(model, cases.rows(4), tmp_path / "run", tokenizer=tokenizer, checkpoints=2, **settings)
    assert list((tmp_path / "run").glob("checkpoint-*"))
    kept = keep_student(model, tokenizer, tmp_path / "run")
    assert kept == tmp_path / "run" / "model" and not list(kept.parent.glob("checkpoint-*"))
    read = AutoModelForCausalLM.from_pretrained(kept).state_dict()
    assert all(torch.equal(value, read[name]) for name, value in model.state_dict().items())
    assert AutoTokenizer.from_pretrained(kept).get_vocab() == tokenizer.get_vocab()


@pytest.mark.skipif(not torch.distributed.is_available(), reason="torch.distributed is missing")
def test_the_parts_of_two_ranks_become_one_model(tmp_path):
    script = tmp_path / "sharded.py"
    script.write_text(SHARDED)
    paths = os.pathsep.join(str(ROOT / part) for part in (".", "kernels", "recipes", "tests"))
    command = ["-m", "torch.distributed.run", "--nproc_per_node", "2", "--standalone"]
    done = subprocess.run(
        [sys.executable, *command, str(script), str(tmp_path / "run")],
        env={**os.environ, "PYTHONPATH": paths},
        timeout=200,
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stderr[-2000:]
    read = AutoModelForCausalLM.from_pretrained(tmp_path / "run" / "model").state_dict()
    whole = cases.student().state_dict()
    assert read.keys() == whole.keys()
    assert all(torch.equal(value, read[name]) for name, value in whole.items())
