"""What is looked at before and while a student is trained, each problem said in one line.

A teacher has nothing in common with its student: no module, no parameter, no storage. A teacher
that is its student's own base (``get_peft_model`` changes a model in place) has the student's
answer as its own: a divergence of zero for ever, and ``teacher.eval()`` switches off the student's
dropout. A shared lm_head or embedding would be a teacher that training moves.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterator, Mapping
from typing import Any

import torch
from torch import Tensor, nn

from kd.heads import text_config
from kd.training.teachers import Teachers

# --- the student's context ------------------------------------------------------------------------


def context_length(config: Any) -> int | None:
    """Tokens a model can read: its positions, times RoPE scaling; None when it has no limit."""
    text = text_config(config)
    most = getattr(text, "max_position_embeddings", None)
    if not isinstance(most, int) or most < 1:
        return None
    scaling = getattr(text, "rope_scaling", None) or getattr(text, "rope_parameters", None) or {}
    factor = scaling.get("factor") if isinstance(scaling, Mapping) else None
    original = scaling.get("original_max_position_embeddings") if factor else None
    return max(most, int(original * factor)) if original else most


def check_context(config: Any, batch: Mapping[str, Any]) -> None:
    """Refuse a batch of single documents that is longer than the model's context."""
    most, length = context_length(config), batch["input_ids"].shape[1]
    if most is None or length <= most or batch.get("position_ids") is not None:
        return
    raise ValueError(
        f"compute_loss: a batch must have at most {most} tokens in a row, the student's "
        f"max_position_embeddings, got {length}. Filter or truncate the traces, or scale its RoPE."
    )


# --- the rows of a run ----------------------------------------------------------------------------


def check_coverage(rows: Any, teachers: Teachers | None) -> int:
    """Look every document of a dataset up in the caches that teach it, before training.

    Returns:
        How many are missing from a cache opened with on_missing="skip".

    Raises:
        KeyError: naming the first sequence that an on_missing="error" cache lacks.
    """
    members = () if teachers is None else teachers.members
    caches = [(n, m.source) for n, m in enumerate(members) if m.cached]
    caches = [(n, cache) for n, cache in caches if hasattr(cache, "__contains__")]
    if teachers is None or not caches or not hasattr(rows, "__len__"):
        return 0
    missing = 0
    for index in range(len(rows)):
        row = rows[index]
        ids = torch.as_tensor(row["input_ids"])
        sizes = [int(size) for size in row["lengths"]] if "lengths" in row else [len(ids)]
        for number, document in enumerate(ids.split(sizes)):
            domain = teachers.domain_of(row, number)
            for at, cache in caches:
                if not teachers.teaches(at, domain) or document in cache:
                    continue
                if getattr(cache, "on_missing", "error") != "skip":
                    raise KeyError(
                        "DistillationTrainer: every sequence must be in the teacher cache, got "
                        f"row {index} ({len(document)} tokens, starting with "
                        f"{document[:8].tolist()}) that is not in {cache.path}. Build the cache "
                        "from the same rendered rows, or open it with on_missing='skip'."
                    )
                missing += 1
    return missing


def check_domains(rows: Any, teachers: Teachers | None) -> None:
    """Refuse a teacher whose domains no row of a dataset has: it would never teach.

    Raises:
        ValueError: naming its domains and those of the rows.
    """
    if teachers is None or not teachers.domains or not hasattr(rows, "__len__"):
        return
    names = getattr(rows, "column_names", None)
    if names is not None:  # a datasets.Dataset: the columns, without the tokens beside them
        kept = rows.select_columns([name for name in ("domain", "domains") if name in names])
        rows = list(kept) if kept.column_names else []
    found = Counter(
        item
        for row in (rows[index] for index in range(len(rows)))
        for item in (row["domains"] if "domains" in row else [row.get("domain")])
    )
    for member in teachers.members:
        if member.domains is None or found.keys() & set(member.domains):
            continue
        there = ", ".join(f"{name!r} ({n})" for name, n in found.most_common(8)) or "none"
        raise ValueError(
            f"DistillationTrainer: a teacher must teach some rows, got domains={member.domains!r} "
            f"for rows whose domains are {there}. Name one of theirs, or leave this teacher out."
        )


# --- a batch whose loss is not finite -------------------------------------------------------------


def bad_batch(batch: Mapping[str, Any], loss_of: Callable[[dict[str, Any]], Tensor] | None) -> str:
    """Names the rows of a batch whose loss is not finite.

    Args:
        batch: as the collator made it.
        loss_of: the loss of a part of the batch; None to leave the rows unexamined.
    """
    ids = batch["input_ids"]
    rows = list(range(len(ids)))
    if loss_of is not None:
        with torch.no_grad():
            parts = [{k: _row(v, i, len(ids)) for k, v in batch.items()} for i in rows]
            rows = [i for i in rows if not bool(torch.isfinite(loss_of(parts[i])))]
    if not rows:
        return "no row of the batch by itself"
    if len(rows) == len(ids) and loss_of is not None:
        start = "every row of the batch, so the weights themselves may not be finite"
    else:
        start = f"row {rows[0]} of the batch" if loss_of else "the batch"
    return f"{start} (input_ids start with {ids[rows[0], :8].tolist()})"


def _row(value: Any, row: int, count: int) -> Any:
    is_row = isinstance(value, Tensor) and value.ndim > 0 and len(value) == count
    return value[row : row + 1] if is_row else value


# --- teacher and student --------------------------------------------------------------------------


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
