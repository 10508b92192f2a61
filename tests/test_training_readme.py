"""The loop of kd/training/README.md runs as it stands there."""

import re
from pathlib import Path

import torch
import training_cases as cases

import kd.training
from kd.training import DistillationCollator, Objective, compute_loss, prepare_student

README = Path(kd.training.__file__).parent / "README.md"


def block(start):
    blocks = re.findall(r"```python\n(.*?)```", README.read_text(), re.DOTALL)
    return next(text for text in blocks if text.startswith(start))


def test_the_bare_accelerate_loop():
    from accelerate import Accelerator
    from accelerate.state import AcceleratorState
    from torch.utils.data import DataLoader

    AcceleratorState._reset_state(True)
    rows, cache = cases.rows(12), cases.RandomCache((1, 1.5, 2, 3, 4))
    names = {"Accelerator": lambda: Accelerator(cpu=True), "DataLoader": DataLoader, "torch": torch}
    names |= {name: getattr(kd.training, name) for name in kd.training.__all__ if name[0] != "_"}
    names |= {"student": cases.student(), "rows": rows, "cache": cache, "pad_token_id": 0}
    code = block("accelerator = Accelerator()")
    assert len(code.strip().splitlines()) <= 12
    exec(code, names)
    # the same by hand
    student = prepare_student(cases.student())
    optimizer = torch.optim.AdamW(student.parameters(), lr=1e-4)
    objective = Objective(kd_weight=0.5, ce_weight=0.5, temperature=2.0, teacher=cache)
    for start in range(0, 12, 4):
        batch = DistillationCollator(0, cache)(rows[start : start + 4])
        loss = compute_loss(student, batch, objective)
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
    torch.testing.assert_close(names["loss"], loss)
    for ours, theirs in zip(names["student"].parameters(), student.parameters(), strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-5, atol=1e-6)


def test_the_trainers_example(tmp_path, monkeypatch):
    from transformers import TrainingArguments

    monkeypatch.chdir(tmp_path)
    code = block("trainer = DistillationTrainer(")

    def arguments(folder, **options):
        return TrainingArguments(folder, max_steps=1, use_cpu=True, report_to=[], **options)

    names = {name: getattr(kd.training, name) for name in kd.training.__all__}
    names |= {"student": cases.student(), "teacher": cases.student(seed=7), "pad_token_id": 0}
    names |= {"rows": cases.rows(8), "tokenizer": None, "TrainingArguments": arguments}
    exec(code, names)
    assert names["trainer"].state.global_step == 1


def test_links_and_names_exist():
    text = README.read_text()
    for name in re.findall(r"`((?:tests|recipes)/[\w./]+)`", text):
        assert (README.parents[2] / name).exists(), name


def test_the_first_snippet_is_one_loss_before_and_after(tmp_path):
    """With every token cached; the shift of Hugging Face's labels is in it."""
    from torch.nn import functional

    import kd
    from kd.teachers import build_cache

    text = (README.parents[2] / "README.md").read_text()
    code = re.search(r"```python\n(.*?)```", text, re.DOTALL).group(1)
    shift, before, after = re.split(r"# before.*\n|# after.*\n", code)
    batch = [torch.tensor(row["input_ids"]) for row in cases.rows(30) if len(row["labels"]) == 9]
    input_ids = torch.stack(batch)
    labels = input_ids.masked_fill(torch.arange(9) < 3, -100)
    student, teacher = cases.student().eval(), cases.student(seed=7).eval()
    cache = build_cache(
        teacher, batch, tmp_path, top_k=cases.VOCABULARY - 1, codec="float32", progress=False
    )
    names = {"F": functional, "kd": kd, "student": student, "teacher": teacher, "cache": cache}
    names |= {"input_ids": input_ids, "labels": labels}
    found = []
    for part in (before, after):
        exec(shift + part, names)
        found.append(names["loss"])
        names["labels"] = labels
    assert len(batch) > 1
    torch.testing.assert_close(*found, rtol=1e-4, atol=1e-6)
    own = student(input_ids, labels=labels).loss  # and the labels are where the model has them
    hard = kd.cross_entropy(
        student(input_ids).logits, functional.pad(labels[:, 1:], (0, 1), value=-100)
    )
    torch.testing.assert_close(hard, own)
