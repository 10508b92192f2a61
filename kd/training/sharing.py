"""A teacher has nothing in common with its student: no module, no parameter, no storage.

A teacher that is its student's own base (``get_peft_model`` changes a model in place) has the
student's answer as its own: a divergence of zero for ever, and ``teacher.eval()`` switches off the
student's dropout. A shared lm_head or embedding would be a teacher that training moves.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

from torch import Tensor, nn

from kd.training.teachers import Teachers


def check_apart(student: Any, teachers: Teachers | None, asked: str = "compute_loss") -> None:
    """Refuse a teacher that shares anything with the student, however either is wrapped.

    Wrappers (peft, DDP, FSDP, torch.compile, accelerate's hooks) register what they wrap, so that
    ``modules()`` reaches it. Each student is compared once.

    Raises:
        ValueError: naming what is shared.
    """
    if teachers is None or student in teachers.apart_from or not isinstance(student, nn.Module):
        return
    modules = {id(module): name or "the whole model" for name, module in student.named_modules()}
    tensors = {key: name for name, tensor in _tensors(student) for key in _keys(tensor)}
    for member in teachers.members:
        source = member.source
        head = None if isinstance(source, nn.Module) else getattr(source, "head", None)
        shared = _shared(source, modules, tensors) if isinstance(source, nn.Module) else None
        weight = getattr(head, "weight", None)  # a hidden-state cache's lm_head
        if shared is None and isinstance(weight, Tensor):
            shared = next((tensors[key] for key in _keys(weight) if key in tensors), None)
        if shared is not None:
            raise ValueError(
                f"{asked}: a teacher must be another object than the student and share nothing "
                f"with it, got {type(source).__name__} with the student's own {shared}. Load the "
                "teacher a second time (get_peft_model and tied weights change a model in place), "
                "or take copy.deepcopy of it before the student is made."
            )
    teachers.apart_from.add(student)


def _shared(model: nn.Module, modules: dict[int, str], tensors: dict[Any, str]) -> str | None:
    for module in model.modules():
        if id(module) in modules:
            return modules[id(module)]
    for _, tensor in _tensors(model):
        for key in _keys(tensor):
            if key in tensors:
                return tensors[key]
    return None


def _tensors(model: nn.Module) -> Iterator[tuple[str, Tensor]]:
    """Parameters, and those that accelerate's hooks keep in CPU memory while they are away."""
    yield from model.named_parameters()
    for name, module in model.named_modules():
        hook = getattr(module, "_hf_hook", None)
        for one in getattr(hook, "hooks", None) or [hook]:  # a SequentialHook has several
            kept = getattr(one, "weights_map", None) or {}
            for parameter, _ in module.named_parameters(recurse=False) if len(kept) else ():
                value = kept[parameter]
                if isinstance(value, Tensor):
                    yield f"{name}.{parameter}", value


def _keys(tensor: Tensor) -> list[Any]:
    """What two tensors have in common when one is the other, or a view of its storage."""
    local: Any = tensor.to_local() if hasattr(tensor, "to_local") else tensor
    keys: list[Any] = [id(tensor)]
    if local.device.type != "meta":
        address = local.untyped_storage().data_ptr()
        if address:  # 0: sharded away, as ZeRO-3 does
            keys.append((str(local.device), address))
    return keys
