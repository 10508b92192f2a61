"""One rank of the data-parallel tests: torchrun training_ranks.py OUT MODE.

Writes the gradients that an optimiser step would apply, gathered whole, from rank 0.

    python tests/training_ranks.py --table        # every mode on 1, 2 and 4 processes, as a table
"""

import os
import subprocess
import sys
import tempfile
from pathlib import Path

import torch
import torch.distributed as dist
import training_cases as cases

from kd.training import DistillationCollator, Objective, compute_loss, prepare_student

COUNT = 10
# Rows of each rank's microbatches on two processes: uneven on purpose.
SPLITS = {0: [[0, 1, 2], [3]], 1: [[4, 5], [6, 7, 8, 9]]}
MODES = ("ddp", "fsdp2", "zero3", "online-ddp", "online-fsdp2", "trainer-ddp", "trainer-fsdp2")
MODES += ("trainer-zero3", "trainer-online-ddp", "trainer-online-fsdp2")


EVALUATED = cases.rows(7, seed=5, weights=True)  # in twos: one of two ranks gets a row twice


def parts_of(rank, world):
    """The rows of a rank's two microbatches."""
    if world == 2:
        return SPLITS[rank]
    mine = list(range(rank, COUNT, world))
    return [mine[:-1], mine[-1:]]


def objective_of(mode):
    """Targets from a cache, or from a teacher in memory; and the collator they need."""
    if "online" not in mode:
        return cases.MIXED, DistillationCollator(0, cases.RandomCache())
    teacher = cases.student(seed=7)
    objective = Objective(
        kd_weight=0.7,
        ce_weight=0.3,
        temperature=2.0,
        tail_at_temperature="spread",
        vocab_size=cases.VOCABULARY,
        teacher=teacher,
    )
    return objective, DistillationCollator(0)


def student_of(mode):
    """The student; one whose lm_head is sharded by itself, and so not tied."""
    return cases.student(tie_word_embeddings="head" not in mode)


def whole_batch(mode):
    """The gradient of the whole batch in one piece, on one process."""
    objective, collate = objective_of(mode)
    batch = collate(cases.rows(12 if mode.startswith("trainer") else COUNT, weights=True))
    tokens = (batch["weights"] * (batch["shift_labels"] != -100)).sum()
    model = prepare_student(student_of(mode))
    compute_loss(model, batch, objective, num_items=tokens).backward()
    found = {name: parameter.grad for name, parameter in model.named_parameters()}
    if evaluates(mode):
        with torch.no_grad():
            loss = compute_loss(model.eval(), collate(EVALUATED), objective)
        found["eval_loss"] = loss[None]
    return found


def evaluates(mode):
    return mode.startswith("trainer") and mode.endswith("ddp")


def gradients(model):
    found = {}
    for name, parameter in model.named_parameters():
        grad = parameter.grad
        full = grad.full_tensor() if hasattr(grad, "full_tensor") else grad
        found[name.removeprefix("module.")] = full.clone()
    return found


def bare_loop(mode):
    """The ten lines of one's own loop, under DDP or FSDP2."""
    rank, world = dist.get_rank(), dist.get_world_size()
    model = student_of(mode)
    if "late" not in mode:  # else its head is compared in the first forward, already sharded
        prepare_student(model)
    if mode.endswith("zero3"):
        return zero3(model, rank, world)
    if mode.endswith("ddp"):
        model = torch.nn.parallel.DistributedDataParallel(model)
    else:
        from torch.distributed.device_mesh import init_device_mesh
        from torch.distributed.fsdp import fully_shard

        mesh = init_device_mesh("cpu", (world,))
        for layer in model.model.layers:
            fully_shard(layer, mesh=mesh)
        if "head" in mode:
            fully_shard(model.lm_head, mesh=mesh)
        fully_shard(model, mesh=mesh)
        prepare_student(model)
    objective, collate = objective_of(mode)
    batches, tokens = share_of(rank, world, collate)
    for batch in batches:
        loss = compute_loss(model, batch, objective, num_items=tokens)
        (loss * world).backward()  # DDP and FSDP average over ranks; the sum is wanted
    return gradients(model)


def share_of(rank, world, collate):
    """A rank's microbatches, and the trained tokens of the whole step."""
    rows = cases.rows(COUNT, weights=True)
    batches = [collate([rows[i] for i in part]) for part in parts_of(rank, world)]
    tokens = sum((b["weights"] * (b["shift_labels"] != -100)).sum() for b in batches)
    dist.all_reduce(tokens)
    return batches, tokens


def zero3(model, rank, world):
    """DeepSpeed ZeRO-3: the weights are sharded, also the lm_head's, and gathered by its hooks."""
    import deepspeed
    from deepspeed.utils import safe_get_full_grad

    objective, collate = objective_of("zero3")
    batches, tokens = share_of(rank, world, collate)
    config = {
        "train_micro_batch_size_per_gpu": 1,
        "gradient_accumulation_steps": len(batches),
        "zero_optimization": {"stage": 3, "stage3_param_persistence_threshold": 0},
        "zero_allow_untested_optimizer": True,
        "zero_force_ds_cpu_optimizer": False,
    }
    optimizer = torch.optim.SGD(model.parameters(), lr=0.0)
    engine, *_ = deepspeed.initialize(model=model, optimizer=optimizer, config=config)
    prepare_student(engine.module)
    for batch in batches:
        loss = compute_loss(engine, batch, objective, num_items=tokens)
        engine.backward(loss * world * len(batches))  # it divides by the microbatches
    named = [(name.removeprefix("module."), p) for name, p in engine.named_parameters()]
    return {name: safe_get_full_grad(parameter) for name, parameter in named}


def fsdp2(mode):
    """TrainingArguments of FSDP2, where a mode asks for it."""
    if not mode.endswith("fsdp2"):
        return {}
    config = {
        "version": 2,
        "auto_wrap_policy": "TRANSFORMER_BASED_WRAP",
        "transformer_layer_cls_to_wrap": ["Qwen2DecoderLayer"],
    }
    return {"fsdp": True, "fsdp_config": config}


def trainer(mode, folder):
    """The same rows through DistillationTrainer; the gradient is caught before the optimiser."""
    from transformers import TrainerCallback

    from kd.training import DistillationTrainer

    caught = {}

    class Catch(TrainerCallback):
        def on_pre_optimizer_step(self, args, state, control, model=None, **kwargs):
            caught.update(gradients(model))

    steps = 4 // int(os.environ["WORLD_SIZE"])
    options = {"per_device_train_batch_size": 3, "gradient_accumulation_steps": steps}
    args = cases.arguments(folder, max_grad_norm=0.0, **options, **fsdp2(mode))
    objective, collate = objective_of(mode)
    made = DistillationTrainer(
        cases.student(),
        args,
        objective=objective,
        train_dataset=cases.rows(12, weights=True),
        data_collator=collate,
        callbacks=[Catch()],
    )
    made.train()
    if evaluates(mode):
        fresh = cases.arguments(folder, per_device_eval_batch_size=2)
        other = DistillationTrainer(
            cases.student(), fresh, objective=objective, data_collator=collate
        )
        caught["eval_loss"] = torch.tensor([other.evaluate(EVALUATED)["eval_loss"]])
    return caught


def launch(out, mode, processes=2):
    """The gradients of a mode on so many processes of this machine."""
    root = Path(__file__).parents[1]
    paths = [root, root / "kernels", root / "recipes", root / "tests"]
    environment = {
        **os.environ,
        "PYTHONPATH": os.pathsep.join([*map(str, paths), os.environ.get("PYTHONPATH", "")]),
        "OMP_NUM_THREADS": "1",
        "ACCELERATE_USE_CPU": "true",
        "DS_ACCELERATOR": "cpu",
    }
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node"]
    command += [str(processes), str(Path(__file__)), str(out), mode]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=240)
    if done.returncode:
        raise RuntimeError(done.stderr[-3000:])
    return torch.load(out, weights_only=True)


def difference(found, expected):
    """The error of the whole gradient as one vector, relative to its length."""
    assert found.keys() == expected.keys()
    length = sum(value.double().square().sum() for value in expected.values()).sqrt()
    error = sum((found[n] - expected[n]).double().square().sum() for n in expected).sqrt()
    assert length > 1e-2
    return float(error / length)


def table(modes):
    print("relative difference from the whole batch's gradient on one process, float32\n")
    print("| | 1 process | 2 processes | 4 processes |\n|---|---|---|---|")
    for mode in modes:
        cells = []
        for processes in (1, 2, 4):
            with tempfile.TemporaryDirectory() as folder:
                try:
                    found = launch(Path(folder) / "out.pt", mode, processes)
                    cells.append(f"{difference(found, whole_batch(mode)):.1e}")
                except RuntimeError as error:
                    missing = "No module named 'deepspeed'" in str(error)
                    cells.append("not installed" if missing else "failed")
        print(f"| {mode} | {' | '.join(cells)} |", flush=True)


def trainer_zero3(folder):
    """ZeRO-3 steps inside its backward: the gradient is what one SGD step of rate 1 changes."""
    import deepspeed

    from kd.training import DistillationTrainer

    steps = 4 // int(os.environ["WORLD_SIZE"])
    config = {
        "train_micro_batch_size_per_gpu": "auto",
        "gradient_accumulation_steps": "auto",
        "zero_optimization": {"stage": 3, "stage3_param_persistence_threshold": 0},
        "zero_allow_untested_optimizer": True,
        "zero_force_ds_cpu_optimizer": False,
    }
    args = cases.arguments(
        folder,
        max_grad_norm=0.0,
        optim="sgd",
        learning_rate=1.0,
        lr_scheduler_type="constant",
        per_device_train_batch_size=3,
        gradient_accumulation_steps=steps,
        deepspeed=config,
    )
    objective, collate = objective_of("zero3")
    made = DistillationTrainer(
        cases.student(),
        args,
        objective=objective,
        train_dataset=cases.rows(12, weights=True),
        data_collator=collate,
        report=False,
    )
    before = {name: value.detach() for name, value in cases.student().named_parameters()}
    made.train()
    named = {n.removeprefix("module."): p for n, p in made.model.named_parameters()}
    with deepspeed.zero.GatheredParameters(list(named.values())):
        return {name: before[name] - named[name].detach() for name in before if name in named}


def long_run(mode, folder):
    """Four steps, a checkpoint after two; "stop": rank 1 alone is told to stop in the second."""
    import signal

    from transformers import TrainerCallback

    from kd.training import DistillationTrainer
    from kd.training.trainer import TrainingInterrupted

    class Stop(TrainerCallback):
        def on_step_begin(self, args, state, control, **kwargs):
            if mode.startswith("stop") and args.process_index == 1 and state.global_step == 1:
                os.kill(os.getpid(), signal.SIGTERM)

    def run(where, resume, *callbacks):
        objective, collate = objective_of(mode)
        made = DistillationTrainer(
            cases.student(),
            cases.arguments(where, max_steps=4, save_strategy="steps", save_steps=2, **fsdp2(mode)),
            objective=objective,
            train_dataset=cases.rows(16),
            data_collator=collate,
            callbacks=list(callbacks),
            report=False,
        )
        try:
            made.train(resume_from_checkpoint=resume)
        except TrainingInterrupted:
            assert made.state.global_step in (2, 3), made.state.global_step
            return None
        full = {
            n: getattr(p, "full_tensor", lambda p=p: p)() for n, p in made.model.named_parameters()
        }
        return {name.removeprefix("module."): p.detach().clone() for name, p in full.items()}

    whole = run(folder / "whole", False)
    if mode.startswith("stop"):
        assert run(folder / "parts", True, Stop()) is None
    else:
        import shutil

        run(folder / "parts", True)
        if int(os.environ["RANK"]) == 0:
            shutil.rmtree(folder / "parts" / "checkpoint-4")
        dist.barrier()
    again = run(folder / "parts", True)
    return {f"{part}.{n}": v for part, d in (("a", whole), ("b", again)) for n, v in d.items()}


def main():
    if sys.argv[1:2] == ["--table"]:
        return table(sys.argv[2:] or MODES)
    out, mode = Path(sys.argv[1]), sys.argv[2]
    torch.set_num_threads(1)
    if mode.startswith(("stop", "resume")):
        found = long_run(mode, out.parent)
    elif mode == "trainer-zero3":
        found = trainer_zero3(out.parent / "training")
    elif mode.startswith("trainer"):
        found = trainer(mode, out.parent / "training")
    else:
        dist.init_process_group("gloo")
        found = bare_loop(mode)
    if int(os.environ["RANK"]) == 0:
        torch.save(found, out)
    dist.destroy_process_group()


if __name__ == "__main__":
    main()
