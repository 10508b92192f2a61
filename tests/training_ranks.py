"""One rank of the data-parallel tests: torchrun training_ranks.py OUT MODE.

Writes the gradients that an optimiser step would apply, gathered whole, from rank 0.
"""

import os
import sys
from pathlib import Path

import torch
import torch.distributed as dist
import training_cases as cases

from kd.training import DistillationCollator, compute_loss, prepare_student

COUNT = 10
# Rows of each rank's microbatches: uneven on purpose, and rank 1 has one fewer token-rich row.
SPLITS = {0: [[0, 1, 2], [3]], 1: [[4, 5], [6, 7, 8, 9]]}


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
    model = prepare_student(cases.student())
    if mode == "ddp":
        model = torch.nn.parallel.DistributedDataParallel(model)
    else:
        from torch.distributed.device_mesh import init_device_mesh
        from torch.distributed.fsdp import fully_shard

        mesh = init_device_mesh("cpu", (world,))
        for layer in model.model.layers:
            fully_shard(layer, mesh=mesh)
        fully_shard(model, mesh=mesh)
    rows, collate = cases.rows(COUNT, weights=True), DistillationCollator(0, cases.RandomCache())
    batches = [collate([rows[i] for i in part]) for part in SPLITS[rank]]
    tokens = sum((b["weights"] * (b["labels"] != -100)).sum() for b in batches)
    dist.all_reduce(tokens)
    for batch in batches:
        loss = compute_loss(model, batch, cases.MIXED, num_items=tokens)
        (loss * world).backward()  # DDP and FSDP average over ranks; the sum is wanted
    return gradients(model)


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
    if mode == "trainer-fsdp2":
        options |= {
            "fsdp": True,
            "fsdp_config": {
                "version": 2,
                "auto_wrap_policy": "TRANSFORMER_BASED_WRAP",
                "transformer_layer_cls_to_wrap": ["Qwen2DecoderLayer"],
            },
        }
    args = cases.arguments(folder, max_grad_norm=0.0, **options)
    made = DistillationTrainer(
        cases.student(),
        args,
        objective=cases.MIXED,
        train_dataset=cases.rows(12, weights=True),
        data_collator=DistillationCollator(0, cases.RandomCache()),
        callbacks=[Catch()],
    )
    made.train()
    return caught


def main():
    out, mode = Path(sys.argv[1]), sys.argv[2]
    torch.set_num_threads(1)
    if mode.startswith("trainer"):
        found = trainer(mode, out.parent / "training")
    else:
        dist.init_process_group("gloo")
        found = bare_loop(mode)
    if int(os.environ["RANK"]) == 0:
        torch.save(found, out)
    dist.destroy_process_group()


if __name__ == "__main__":
    main()
