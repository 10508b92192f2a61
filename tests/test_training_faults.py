"""What goes wrong in a run is said in one line, and costs no more than it must."""

import json
import os
import random
import signal
import subprocess
import sys
import threading
from pathlib import Path

import pytest
import torch
import training_cases as cases
from training_cases import At
from training_cases import faulty_trainer as trainer

from kd.training import (
    DistillationCollator,
    Objective,
    compute_loss,
    last_complete_checkpoint,
    prepare_student,
)
from kd.training.checkpoints import MARKER, checkpoints_in
from kd.training.checks import check_coverage, context_length
from kd.training.trainer import TrainingInterrupted

TIMED = ("tokens_per_second", "peak_memory_gib", "train_runtime")
TIMED += ("train_samples_per_second", "train_steps_per_second")


def outcome(made):
    log = [{k: v for k, v in e.items() if k not in TIMED} for e in made.state.log_history]
    return log, [p.detach().clone() for p in made.model.parameters()]


def assert_same_outcome(found, expected):
    assert found[0] == expected[0]
    for one, other in zip(found[1], expected[1], strict=True):
        assert torch.equal(one, other)


@pytest.fixture(scope="module")
def undisturbed(tmp_path_factory):
    made = trainer(tmp_path_factory.mktemp("undisturbed"))
    made.train()
    return outcome(made)


def killed(*arguments):
    """Run training_kill.py in a fresh interpreter; it must have died by SIGKILL."""
    tests = Path(__file__).parent
    command = [sys.executable, tests / "training_kill.py", *map(str, arguments)]
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join([str(tests), *sys.path])}
    done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=240)
    assert done.returncode == -signal.SIGKILL, f"{arguments}: {done.stderr}"


def test_killed_at_a_random_step_and_resumed_is_bit_for_bit_the_same(tmp_path, undisturbed):
    killed(tmp_path, random.SystemRandom().randint(1, 7))
    again = trainer(tmp_path)
    again.train(resume_from_checkpoint=True)
    assert_same_outcome(outcome(again), undisturbed)


def test_killed_while_it_writes_a_checkpoint(tmp_path, undisturbed):
    """The torn one has the highest number; it is passed over, and says so."""
    killed(tmp_path, "mark", "checkpoint-4")
    assert [path.name for path in checkpoints_in(tmp_path)] == ["checkpoint-2", "checkpoint-4"]
    again = trainer(tmp_path)
    with pytest.warns(UserWarning, match=f"checkpoint-4 has no {MARKER}.*trying the one before"):
        again.train(resume_from_checkpoint=True)
    assert_same_outcome(outcome(again), undisturbed)


@pytest.mark.parametrize("damage", ["truncated", "flipped", "missing", "marker"])
def test_damaged_checkpoints_are_passed_over(tmp_path, damage):
    trainer(tmp_path, max_steps=4).train()
    newest = tmp_path / "checkpoint-4"
    weights = newest / "model.safetensors"
    data = bytearray(weights.read_bytes())
    if damage == "truncated":
        weights.write_bytes(data[:-1])
    elif damage == "flipped":
        data[-5] ^= 1
        weights.write_bytes(data)
    elif damage == "missing":
        (newest / "optimizer.pt").unlink()
    else:
        (newest / MARKER).write_text("{")
    with pytest.warns(UserWarning, match="checkpoint-4 (has|lacks)"):
        assert last_complete_checkpoint(tmp_path) == tmp_path / "checkpoint-2"


def test_old_checkpoints_go_only_when_the_new_one_is_whole(tmp_path, monkeypatch):
    from kd.training import trainer as module

    seen, real = [], module.mark_complete

    def mark(folder):
        seen.append([path.name for path in checkpoints_in(tmp_path)])
        return real(folder)

    monkeypatch.setattr(module, "mark_complete", mark)
    trainer(tmp_path, save_total_limit=1).train()
    assert seen == [
        ["checkpoint-2"],
        ["checkpoint-2", "checkpoint-4"],
        ["checkpoint-4", "checkpoint-6"],
        ["checkpoint-6", "checkpoint-8"],
    ]
    assert [path.name for path in checkpoints_in(tmp_path)] == ["checkpoint-8"]


def test_a_loss_that_is_nan_stops_and_names_the_row(tmp_path):
    rows = cases.rows(32)

    class Poisoned(cases.RandomCache):
        def batch(self, sequences, length):
            found = super().batch(sequences, length)
            for row, sequence in enumerate(sequences):
                if sequence.tolist() == rows[9]["input_ids"]:
                    found.logprobs[row] = float("nan")
            return found

    made = trainer(tmp_path, data=rows, collator=DistillationCollator(0, Poisoned()))
    words = r"must be finite, got nan at step \d from row \d of the batch \(input_ids start with \["
    with pytest.raises(FloatingPointError, match=words) as caught:
        made.train()
    assert str(rows[9]["input_ids"][:8])[1:-1] in str(caught.value)
    assert all(torch.isfinite(parameter).all() for parameter in made.model.parameters())
    for path in checkpoints_in(tmp_path):
        assert (path / MARKER).is_file()


def test_a_gradient_that_is_nan_never_reaches_the_weights(tmp_path):
    def poison(model):
        model.model.norm.weight.register_hook(lambda gradient: gradient * float("nan"))

    made = trainer(tmp_path, At(4, poison))
    with pytest.raises(FloatingPointError, match="gradient's norm must be finite, got nan at st"):
        made.train()
    assert all(torch.isfinite(parameter).all() for parameter in made.model.parameters())
    assert last_complete_checkpoint(tmp_path) == tmp_path / "checkpoint-4"


def test_weights_that_are_nan_are_told_from_a_bad_row(tmp_path):
    def poison(model):
        with torch.no_grad():
            model.model.norm.weight.fill_(float("nan"))

    with pytest.raises(FloatingPointError, match="every row of the batch, so the weights themsel"):
        trainer(tmp_path, At(3, poison)).train()


def test_a_full_disk_leaves_the_checkpoint_before(tmp_path, undisturbed):
    """The kernel itself says ENOSPC: the optimizer's file of the second checkpoint is /dev/full."""
    if not os.path.exists("/dev/full"):
        pytest.skip("no /dev/full here")

    def full(model):
        from kd.training import trainer as module

        module.shutil.rmtree = lambda path: None
        (tmp_path / "checkpoint-4").mkdir()
        (tmp_path / "checkpoint-4" / "optimizer.pt").symlink_to("/dev/full")

    import shutil

    real = shutil.rmtree
    try:
        with pytest.raises(OSError, match=r"checkpoint-4 must fit on the disk.*checkpoint-2 befo"):
            trainer(tmp_path, At(3, full)).train()
    finally:
        shutil.rmtree = real
    with pytest.warns(UserWarning, match="checkpoint-4 has no"):
        assert last_complete_checkpoint(tmp_path) == tmp_path / "checkpoint-2"
    shutil.rmtree(tmp_path / "checkpoint-4")
    again = trainer(tmp_path)
    again.train(resume_from_checkpoint=True)
    assert_same_outcome(outcome(again), undisturbed)


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_ctrl_c_saves_and_the_run_goes_on_later(tmp_path, undisturbed, number):
    before = signal.getsignal(number)
    made = trainer(tmp_path, At(4, lambda model: os.kill(os.getpid(), number)))  # seen in step 5
    with pytest.raises(TrainingInterrupted, match=r"stopped at step 5 of 8; checkpoint-5 is writ"):
        made.train()
    assert signal.getsignal(number) is before
    assert last_complete_checkpoint(tmp_path) == tmp_path / "checkpoint-5"
    again = trainer(tmp_path)
    again.train(resume_from_checkpoint=True)
    assert_same_outcome(outcome(again), undisturbed)


def test_ctrl_c_twice_stops_at_once(tmp_path):
    def twice(model):
        os.kill(os.getpid(), signal.SIGINT)
        os.kill(os.getpid(), signal.SIGINT)

    with pytest.raises(KeyboardInterrupt) as caught:
        trainer(tmp_path, At(3, twice)).train()
    assert not isinstance(caught.value, TrainingInterrupted)
    assert last_complete_checkpoint(tmp_path) == tmp_path / "checkpoint-2"


def test_training_outside_the_main_thread_leaves_signals_alone(tmp_path):
    done = []
    thread = threading.Thread(target=lambda: done.append(trainer(tmp_path, max_steps=1).train()))
    thread.start()
    thread.join()
    assert len(done) == 1


def test_a_folder_of_another_run_is_refused(tmp_path):
    trainer(tmp_path, max_steps=2).train()
    with pytest.raises(FileExistsError, match="must be free of checkpoints.*with checkpoint-2"):
        trainer(tmp_path, max_steps=2).train()
    other = trainer(tmp_path, max_steps=2, learning_rate=0.5)
    with pytest.raises(FileExistsError, match=r"learning_rate: 0\.01 there, 0\.5 here"):
        other.train(resume_from_checkpoint=True)
    data = trainer(tmp_path, max_steps=2, data=cases.rows(13, seed=1))
    with pytest.raises(FileExistsError, match="another run .data: "):
        data.train(resume_from_checkpoint=True)
    named = trainer(tmp_path, max_steps=3, learning_rate=0.5)  # whoever names one knows
    named.train(resume_from_checkpoint=str(tmp_path / "checkpoint-2"))
    assert named.state.global_step == 3
    (tmp_path / "training.json").unlink()
    with pytest.raises(FileExistsError, match=r"another run \(model: \(unknown\) there"):
        trainer(tmp_path, max_steps=2).train(resume_from_checkpoint=True)


def test_longer_than_the_students_context(tmp_path):
    row = {"input_ids": [1] * 40, "labels": [1] * 40}
    made = trainer(
        tmp_path, data=[row] * 4, collator=DistillationCollator(0), objective=Objective()
    )
    with pytest.raises(ValueError, match="at most 32 tokens, the student's context, got 40 in row"):
        made.train()
    with pytest.raises(ValueError, match="at most 32 tokens in a row.*got 40"):
        compute_loss(prepare_student(cases.student()), DistillationCollator(0)([row]))
    pack = {"input_ids": [1] * 40, "labels": [1] * 40, "lengths": [20, 20]}
    batch = DistillationCollator(0, max_length=32)([pack])
    compute_loss(prepare_student(cases.student()), batch)  # two documents that fit
    config = cases.student().config
    config.rope_parameters = {"factor": 4.0, "original_max_position_embeddings": 32}
    assert context_length(config) == 128


@pytest.fixture
def cached(tmp_path):
    from kd.teachers import build_cache

    rows = cases.rows(6)
    sequences = [row["input_ids"] for row in rows]
    teacher, path = cases.student(seed=7).eval(), tmp_path / "cache"
    build_cache(teacher, sequences[:5], path, top_k=4, progress=False)
    return rows, path


def test_a_sequence_the_cache_lacks_is_named_before_training(tmp_path, cached):
    from kd.cache import TeacherCache

    rows, path = cached
    collator = DistillationCollator(0, TeacherCache(path))
    objective = Objective(kd_weight=1.0, ce_weight=0.0)
    made = trainer(tmp_path / "run", data=rows, collator=collator, objective=objective)
    with pytest.raises(KeyError, match=r"row 5 \(\d+ tokens, starting with .*on_missing='skip'"):
        made.train()
    assert made.state.global_step == 0


def test_missing_sequences_are_skipped_and_counted_on_request(tmp_path, cached, capsys):
    """They keep their labels and add nothing to the soft part."""
    from kd.cache import TeacherCache

    rows, path = cached
    cache = TeacherCache(path, on_missing="skip")
    collator = DistillationCollator(0, cache)
    objective = Objective(kd_weight=1.0, ce_weight=0.5, vocab_size=cases.VOCABULARY)
    student = prepare_student(cases.student())
    loss = compute_loss(student, collator(rows[5:]), objective)
    hard = compute_loss(student, DistillationCollator(0)(rows[5:]), Objective(ce_weight=0.5))
    torch.testing.assert_close(loss, hard)
    made = trainer(tmp_path / "run", data=rows, collator=collator, objective=objective)
    made.train()
    assert "1 sequences are not in the teacher cache" in capsys.readouterr().out
    log = [entry for entry in made.state.log_history if "kd" in entry]
    assert log[-1]["skipped_sequences"] >= 1
    assert check_coverage(rows, made.objective.teacher) == 1


def test_metrics_are_on_disk_line_by_line(tmp_path):
    made = trainer(tmp_path)
    made.train()
    lines = [json.loads(line) for line in (tmp_path / "metrics.jsonl").read_text().splitlines()]
    assert [line["step"] for line in lines if "loss" in line] == [3, 6]


def test_a_run_shorter_than_logging_steps_has_its_page(tmp_path):
    made = trainer(tmp_path, logging_steps=500)
    made.write_report = True
    made.train()
    assert [e["step"] for e in made.state.log_history if "loss" in e] == [8]
    assert (tmp_path / "training.html").is_file()
    assert "ce" in made.state.log_history[0] and "kd" in made.state.log_history[0]


def test_who_wants_no_log_gets_none(tmp_path):
    made = trainer(tmp_path, logging_strategy="no")
    made.train()
    assert not [entry for entry in made.state.log_history if "loss" in entry]
