"""Best-fit packing: many short sequences in one row, each blind to its neighbours."""

from __future__ import annotations

from bisect import bisect_left, insort
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any

from kd.traces.tokens import IGNORE


@dataclass
class Pack:
    """Sequences that share one row.

    Attributes:
        input_ids: their tokens, one after another.
        labels: theirs too; the first token of each sequence is never a label, so that no
            sequence is trained to predict the next one's start.
        position_ids: counted from 0 in each sequence. transformers' sdpa, eager and flex attention
            read the borders from them when no attention mask is given; flash attention in a batch
            of a single row only; recurrent layers and ALiBi not at all (``isolates_documents``).
        lengths: of the sequences.
    """

    input_ids: list[int] = field(default_factory=list)
    labels: list[int] = field(default_factory=list)
    position_ids: list[int] = field(default_factory=list)
    lengths: list[int] = field(default_factory=list)

    def add(self, input_ids: Sequence[int], labels: Sequence[int]) -> None:
        """Append a sequence."""
        self.input_ids.extend(input_ids)
        self.labels.append(IGNORE)
        self.labels.extend(labels[1:])
        self.position_ids.extend(range(len(input_ids)))
        self.lengths.append(len(input_ids))


def best_fit(lengths: Sequence[int], capacity: int) -> list[list[int]]:
    """Distribute sequences over rows, longest first, each into the fullest row it still fits.

    Args:
        lengths: of the sequences.
        capacity: of a row; no sequence may be longer.

    Returns:
        The indices in each row; O(n log n).
    """
    if capacity < 1:
        raise ValueError(f"best_fit: capacity must be at least 1, got {capacity}.")
    order = sorted(range(len(lengths)), key=lambda i: (-lengths[i], i))
    if order and lengths[order[0]] > capacity:
        raise ValueError(
            f"best_fit: lengths must be at most capacity ({capacity}), got "
            f"{lengths[order[0]]} at {order[0]}. Drop or shorten it before packing."
        )
    rows: list[list[int]] = []
    by_room: dict[int, list[int]] = {}  # room left -> rows
    rooms: list[int] = []  # the rooms that exist, ascending
    for i in order:
        need = lengths[i]
        at = bisect_left(rooms, need)
        if at == len(rooms):
            row, room = len(rows), capacity
            rows.append([])
        else:
            room = rooms[at]
            row = by_room[room].pop()
            if not by_room[room]:
                del by_room[room]
                rooms.pop(at)
        rows[row].append(i)
        room -= need
        if room > 0:
            if room not in by_room:
                by_room[room] = []
                insort(rooms, room)
            by_room[room].append(row)
    return rows


def pack(
    rendered: Iterable[tuple[Sequence[int], Sequence[int]]], capacity: int, *, window: int = 20_000
) -> Iterator[Pack]:
    """Pack (input_ids, labels) pairs into rows of at most ``capacity`` tokens.

    Args:
        rendered: what ``render`` returned.
        capacity: tokens in a row.
        window: sequences held in memory and fitted together; rows that a window leaves less
            than 98 % full are taken apart and fitted again with the next one.

    Yields:
        Full rows; every sequence is in exactly one, whole.
    """
    held: list[tuple[Sequence[int], Sequence[int]]] = []
    for input_ids, labels in rendered:
        if not len(input_ids):
            continue
        held.append((input_ids, labels))
        if len(held) >= window:
            packs, held = _fit(held, capacity, 0.98)
            if len(held) > window // 2:  # nothing fits well: let the emptier ones go as they are
                more, held = _fit(held, capacity, 0.0)
                packs.extend(more)
            yield from packs
    yield from _fit(held, capacity, 0.0)[0]


def _fit(
    held: list[tuple[Sequence[int], Sequence[int]]], capacity: int, fullness: float
) -> tuple[list[Pack], list[tuple[Sequence[int], Sequence[int]]]]:
    packs: list[Pack] = []
    left: list[tuple[Sequence[int], Sequence[int]]] = []
    for row in best_fit([len(ids) for ids, _ in held], capacity):
        if sum(len(held[i][0]) for i in row) < fullness * capacity:
            left.extend(held[i] for i in row)
            continue
        made = Pack()
        for i in row:
            made.add(*held[i])
        packs.append(made)
    return packs, left


def efficiency(packs: Iterable[Pack], capacity: int) -> float:
    """The share of row positions that hold a token."""
    sizes = [len(made.input_ids) for made in packs]
    return sum(sizes) / (capacity * len(sizes)) if sizes else 1.0


def collate_packs(
    packs: Sequence[Pack], pad_token_id: int, *, length: int | None = None, flat: bool = False
) -> dict[str, Any]:
    """A batch of packs for a transformers model, which keeps documents apart if it can at all.

    There is no attention mask and no cache on purpose: with either, transformers takes a row for
    a single sequence and neighbours see each other. Labels are not shifted.

    Args:
        packs: one per row.
        pad_token_id: fills the rows; the padding is a document of its own, never trained on.
        length: of every row; the longest pack's when None.
        flat: put everything into one row without padding, and add the borders as
            ``cu_seq_lens_q`` and so on. Flash attention needs this form: with several rows it
            does not look for borders.

    Returns:
        input_ids, labels, position_ids [B, length], ``use_cache=False``.
    """
    import torch

    longest = max(len(made.input_ids) for made in packs)
    length = longest if length is None else length
    if length < longest:
        raise ValueError(
            f"collate_packs: length must be at least the longest pack, got {length} for {longest}."
        )
    batch: dict[str, list[list[int]]] = {"input_ids": [], "labels": [], "position_ids": []}
    for made in packs:
        missing = 0 if flat else length - len(made.input_ids)
        batch["input_ids"].append(made.input_ids + [pad_token_id] * missing)
        batch["labels"].append(made.labels + [IGNORE] * missing)
        batch["position_ids"].append(made.position_ids + list(range(missing)))
    if flat:
        batch = {name: [[i for row in rows for i in row]] for name, rows in batch.items()}
    made_batch: dict[str, Any] = {
        name: torch.tensor(rows, dtype=torch.long) for name, rows in batch.items()
    }
    if flat:
        lengths = [length for made in packs for length in made.lengths]
        borders = torch.tensor([0, *lengths]).cumsum(0, dtype=torch.int32)
        made_batch |= {"cu_seq_lens_q": borders, "cu_seq_lens_k": borders}
        made_batch |= {"max_length_q": max(lengths), "max_length_k": max(lengths)}
    return made_batch | {"use_cache": False}


def isolates_documents(model: Any, *, flat: bool = False, device: Any = None) -> bool:
    """Whether a causal LM keeps packed documents apart; recurrent layers and ALiBi do not.

    The logits of a document are compared behind two different ones, in a batch of two rows as
    ``collate_packs`` makes them, in eval mode and without gradient. Random state and training
    flags are as before.

    Args:
        model: any that takes ``input_ids``, ``position_ids`` and ``use_cache``.
        flat: both rows in one, with ``cu_seq_lens_q`` and so on, as flash attention needs it.
        device: of its input; that of its embeddings when None.

    Returns:
        True where they differ by rounding only: by less than 1e-5 of the largest logit in float32
        (3e-2 in bfloat16), and by less than a twentieth of what they do as one document.
    """
    import torch

    embeddings = model.get_input_embeddings()
    home = embeddings.weight.device
    size = getattr(embeddings, "num_embeddings", None) or embeddings.weight.shape[0]
    tokens = [(size // 2 + i) % size for i in range(9)]  # away from special ones
    firsts, second = (tokens[:3], tokens[3:6]), [tokens[6], tokens[7], tokens[6], tokens[8]]
    if device is None:
        device = torch.device("cpu") if home.type == "meta" else home

    def logits(order: tuple[int, int], packed: bool) -> Any:
        """Of the second documents, [2, 4, V]."""
        packs = [Pack(), Pack()]
        for made, which in zip(packs, order, strict=True):
            for document in (firsts[which], second) if packed else (firsts[which] + second,):
                made.add(document, document)
        batch = collate_packs(packs, 0, flat=flat and packed)
        moved = {k: v.to(device) if hasattr(v, "to") else v for k, v in batch.items()}
        moved.pop("labels")
        found = model(**moved).logits
        return found.unflatten(1, (2, -1))[0, :, -4:] if flat and packed else found[:, -4:]

    def change(packed: bool) -> tuple[float, float, Any]:
        """Largest difference, largest logit, and the logits' dtype."""
        left, right = logits((0, 1), packed), logits((1, 0), packed)
        moved = torch.where(left == right, 0.0, (left.float() - right.float()).abs())
        largest = torch.where(left.isfinite(), left.float().abs(), 0.0).max()
        return float(moved.max()), float(largest), left.dtype

    flags = [(module, module.training) for module in model.modules()]
    model.eval()
    try:
        with torch.no_grad(), torch.random.fork_rng([device] if device.type == "cuda" else []):
            (leaked, largest, dtype), (as_one, _, _) = change(True), change(False)
    finally:
        for module, flag in flags:
            module.training = flag
    rounding = {torch.bfloat16: 3e-2, torch.float16: 4e-3}.get(dtype, 1e-5)
    return leaked <= min(rounding * largest, as_one / 20)
