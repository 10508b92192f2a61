"""What two batches of a run show: what is trained, whether the targets fit, what does nothing."""

from __future__ import annotations

import dataclasses
import itertools
import math
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import partial
from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import cross_entropy

from kd.training.batches import MODEL_KEYS
from kd.training.loss import compute_loss, flat_targets
from kd.training.metrics import NAMES, StepMetrics, top_tokens
from kd.training.objective import Objective
from kd.training.packs import documents_apart
from kd.training.rows import IGNORE

ROWS_SHOWN = 2
CHARACTERS = 400
SAME = 2e-3
"""Relative difference from the model's own loss that rounding explains (bfloat16: 2e-2)."""
NEVER_IDLE = ("teacher", "backend", "kd_weight", "ce_weight", "vocab_size")
OPEN, CLOSE = "⟦", "⟧"
Batch = Mapping[str, Any]


@dataclass
class Check:
    """The result of ``check``.

    Attributes:
        title: of the page, or empty.
        problems: what will spoil the run, each with both numbers and the way out.
        remarks: what is worth a look.
        facts: name to value, in the order of the printed page.
        rows: the first rows as text, trained tokens between ⟦ and ⟧.
    """

    title: str = ""
    problems: list[str] = field(default_factory=list)
    remarks: list[str] = field(default_factory=list)
    facts: dict[str, str] = field(default_factory=dict)
    rows: list[str] = field(default_factory=list)

    def __str__(self) -> str:
        lines = [self.title] if self.title else []
        lines += [f"row {number}: {text}" for number, text in enumerate(self.rows)]
        width = max((len(name) for name in self.facts), default=0)
        lines += ["", *(f"{name:<{width}}  {value}" for name, value in self.facts.items()), ""]
        lines += [f"PROBLEM  {text}" for text in self.problems]
        lines += [f"remark   {text}" for text in self.remarks]
        if not self.problems:
            lines.append("no problem found")
        return "\n".join(lines)


# --- the batches ----------------------------------------------------------------------------------


def first_rows(rows: Any, count: int) -> list[Mapping[str, Any]]:
    if hasattr(rows, "__len__") and hasattr(rows, "__getitem__"):
        return [rows[index] for index in range(min(count, len(rows)))]
    return [row for row, _ in zip(rows, range(count), strict=False)]


def on_device_of(batch: Batch, student: Any) -> dict[str, Any]:
    device = next(student.parameters()).device
    return {k: v.to(device) if isinstance(v, Tensor) else v for k, v in batch.items()}


@contextmanager
def own_gradients(student: Any) -> Iterator[None]:
    """While open, the student has no gradients; its own come back."""
    kept = [(p, p.grad) for p in student.parameters()]
    for parameter, _ in kept:
        parameter.grad = None
    try:
        yield
    finally:
        for parameter, gradient in kept:
            parameter.grad = gradient


def _labels(row: Mapping[str, Any]) -> list[int]:
    return torch.as_tensor(row["labels"]).tolist()


def shown(row: Mapping[str, Any], tokenizer: Any) -> str:
    """A row as text, its trained tokens between brackets."""
    pairs = zip(torch.as_tensor(row["input_ids"]).tolist(), _labels(row), strict=True)
    pieces = []
    for trained, group in itertools.groupby(pairs, lambda pair: pair[1] != IGNORE):
        part = [token for token, _ in group]
        text = tokenizer.decode(part) if tokenizer is not None else " ".join(map(str, part))
        if len(text) > CHARACTERS:
            text = f"{text[: CHARACTERS // 2]} ... {text[-CHARACTERS // 2 :]}"
        pieces.append(f"{OPEN}{text}{CLOSE}" if trained else text)
    return "".join(pieces).replace("\n", "\\n")


def count_tokens(found: Check, made: Sequence[Batch], rows: Sequence[Mapping[str, Any]]) -> None:
    trained = sum(int((batch["shift_labels"] != IGNORE).sum()) for batch in made)
    places = sum(batch["input_ids"].numel() for batch in made)
    real = sum(len(row["input_ids"]) for row in rows)
    found.facts["rows, tokens"] = f"{len(rows)}, {real:,} ({1 - real / places:.0%} padding beside)"
    found.facts["trained tokens"] = f"{trained:,} ({trained / real:.0%} of the tokens)"
    untrained = [n for n, row in enumerate(rows) if set(_labels(row)) == {IGNORE}]
    if not trained:
        found.problems.append(
            f"no token is trained: labels must differ from -100 somewhere, got -100 in all "
            f"{real:,} tokens of {len(rows)} rows. Unmask the completion."
        )
    elif untrained:
        found.remarks.append(f"{len(untrained)} of {len(rows)} rows train nothing: {untrained}")
    if trained and trained >= real - len(rows):
        found.remarks.append(
            "every token is trained, the prompts too. Mask a prompt with -100 to train the "
            "completion alone."
        )


def look_at_ends(
    found: Check, rows: Sequence[Mapping[str, Any]], student: Any, tokenizer: Any
) -> None:
    """Whether the student learns to stop, by a token at which generation stops."""
    ends_of_rows = [[label for label in _labels(row) if label != IGNORE][-2:] for row in rows]
    ends_of_rows = [end for end in ends_of_rows if end]
    if not ends_of_rows or getattr(tokenizer, "eos_token_id", None) is None:
        return
    stops = getattr(getattr(student, "generation_config", None), "eos_token_id", None)
    stops = {stops} if isinstance(stops, int) else set(stops or ())
    stops.add(tokenizer.eos_token_id)
    if any(stops & set(end) for end in ends_of_rows):  # a template may leave a line break behind it
        return
    last = {end[-1] for end in ends_of_rows}
    got = ", ".join(repr(tokenizer.decode([token])) for token in sorted(last)[:4])
    wanted = " or ".join(repr(tokenizer.decode([token])) for token in sorted(stops))
    if all(IGNORE not in _labels(row)[1:] for row in rows if set(_labels(row)) != {IGNORE}):
        found.remarks.append(f"rows are plain text: none ends with {wanted}")
    elif last <= set(tokenizer.added_tokens_decoder):
        found.remarks.append(
            f"rows end with {got}, but generation stops at {wanted}. Set the student's "
            "generation_config.eos_token_id before it is used."
        )
    else:
        found.problems.append(
            f"no row trains an end token: its last trained token must be {wanted} for the student "
            f"to learn to stop, got {got}. Append it to the completion."
        )


# --- the loss -------------------------------------------------------------------------------------


@torch.no_grad()
def compare_losses(found: Check, student: Any, made: Sequence[Batch], objective: Objective) -> None:
    """Our cross-entropy beside what the model's own logits give on the same labels."""
    hard = dataclasses.replace(objective, teacher=None, kd_weight=0.0, ce_weight=1.0, temperature=1)
    ours = own = tokens = 0.0
    for batch in made:
        labels = batch["shift_labels"]
        beside = ("weights", "domain")
        bare = {k: v for k, v in batch.items() if k not in beside and not k.startswith("teacher_")}
        ours += float(compute_loss(student, bare, hard, num_items=1.0))  # the sum
        read = documents_apart(student, batch)
        inputs = {key: read[key] for key in MODEL_KEYS if read.get(key) is not None}
        logits = student(**inputs, use_cache=False).logits.flatten(0, 1).float()
        logits = logits[:, : objective.vocab_size]
        own += float(cross_entropy(logits, labels.flatten(), ignore_index=IGNORE, reduction="sum"))
        tokens += int((labels != IGNORE).sum())
    if not tokens:
        return
    ours, own = ours / tokens, own / tokens
    found.facts["cross-entropy, ours"] = f"{ours:.4f}"
    found.facts["cross-entropy, model's"] = f"{own:.4f}"
    narrow = next(student.parameters()).dtype in (torch.bfloat16, torch.float16)
    if not abs(ours - own) <= (10 if narrow else 1) * SAME * max(abs(own), 1.0):
        found.problems.append(
            f"our cross-entropy must be the model's own on the same labels, got {ours:.4f} and "
            f"{own:.4f}. Report the model's family, with its transformers version."
        )


@torch.no_grad()
def compare_teacher(
    found: Check, student: Any, made: Sequence[Batch], objective: Objective
) -> None:
    """Coverage, agreement, and whether the targets stand at the labels that they are about."""
    metrics = StepMetrics()
    for batch in made:
        compute_loss(student, batch, objective, observe=partial(metrics.observe, objective))
    sums = dict(zip(NAMES, metrics.sums.tolist(), strict=True))
    taught, trained, said = sums["taught"], sums["tokens"], metrics.summary()
    found.facts["tokens with targets"] = f"{taught:,.0f} of {trained:,.0f} trained"
    for name, words in (
        ("kd", "divergence"),
        ("teacher_top1_agreement", "same likeliest token"),
        ("teacher_mass", "mass of cached tokens"),
    ):
        if name in said:
            found.facts[f"teacher: {words}"] = f"{said[name]:.4f}"
    if trained and taught < 0.5 * trained:
        found.problems.append(
            f"most trained tokens must have teacher targets, got {taught:,.0f} of {trained:,.0f}. "
            "Build the cache from these rows, with this template and tokenizer."
        )
    fits = _fits(made, objective)
    if not fits:
        return
    here, best = fits[0], max(fits, key=lambda shift: fits[shift])
    found.facts["teacher likes the label"] = f"{here:.1%} of tokens (in its top 8)"
    if best != 0 and fits[best] > here + 0.1:
        found.problems.append(
            f"teacher targets must stand at the token that they predict, got the label among the "
            f"teacher's top 8 at {here:.1%} of tokens here and at {fits[best]:.1%} when shifted by "
            f"{best:+d}. Capture the cache again, row i about the token after token i."
        )
    elif here < 0.3:
        found.problems.append(
            f"the teacher must find the traces likely, got the label among its top 8 at {here:.1%} "
            "of tokens. Look at its chat template, its tokenizer, and whether the cache is of "
            "these rows."
        )


def _fits(made: Sequence[Batch], objective: Objective) -> dict[int, float]:
    """How often a label is among the teacher's top 8, where it stands and one place off."""
    hits = {0: 0.0, -1: 0.0, 1: 0.0}
    counts = dict.fromkeys(hits, 0)
    for batch in made:
        asked = batch if objective.teacher is None else objective.teacher.forward(batch)
        for target, rows in objective.targets(flat_targets(asked)):
            top = top_tokens(target, objective.vocab_size, 8)
            if rows is not None:
                top = top.masked_fill(~rows[:, None], -1)
            top = top.unflatten(0, batch["shift_labels"].shape)  # [B, L, <= 8]
            for shift in hits:
                labels = batch["shift_labels"].roll(shift, dims=1)
                usable = (labels != IGNORE) & (top >= 0).any(-1)
                usable[:, 0 if shift > 0 else -1] &= shift == 0  # rolled in from the other end
                hits[shift] += float((top == labels[..., None]).any(-1)[usable].sum())
                counts[shift] += int(usable.sum())
    if not counts[0]:
        return {}
    return {shift: hits[shift] / max(counts[shift], 1) for shift in hits}


# --- what does nothing ----------------------------------------------------------------------------


@torch.no_grad()
def idle_fields(found: Check, student: Any, made: Sequence[Batch], objective: Objective) -> None:
    """Fields that were set and leave the loss of these batches as it would be without them."""

    def losses(changed: Objective, batches: Sequence[Batch] = made) -> list[float]:
        return [float(compute_loss(student, batch, changed)) for batch in batches]

    def same(others: list[float]) -> bool:
        return all(math.isclose(a, b, rel_tol=1e-7) for a, b in zip(now, others, strict=True))

    now, idle = losses(objective), []
    for item in dataclasses.fields(objective):
        value = getattr(objective, item.name)
        if item.name in NEVER_IDLE or value == item.default:
            continue
        try:
            default: Any = {item.name: item.default}
            without = losses(dataclasses.replace(objective, **default))
        except (ValueError, TypeError):
            continue  # it is needed
        if same(without):
            idle.append(f"{item.name}={value!r}")
    if all(batch.get("weights") is not None for batch in made):
        bare = [{k: v for k, v in batch.items() if k != "weights"} for batch in made]
        if same(losses(objective, bare)):
            idle.append("weights of the rows")
    if idle:
        found.remarks.append(f"changes nothing on these batches: {', '.join(idle)}")


def gradients(found: Check, student: Any, made: Sequence[Batch], objective: Objective) -> None:
    total = 0.0
    for batch in made:
        loss = compute_loss(student, batch, objective)
        total += float(loss.detach())
        if loss.requires_grad:
            loss.backward()
    trained = [(name, p) for name, p in student.named_parameters() if p.requires_grad]
    count = sum(p.numel() for _, p in trained)
    everything = sum(p.numel() for p in student.parameters())
    norms = [p.grad.float().norm() for _, p in trained if p.grad is not None]
    norm = float(torch.stack(norms).norm()) / len(made) if norms else 0.0
    found.facts["loss of the objective"] = f"{total / len(made):.4f}"
    found.facts["gradient norm"] = f"{norm:.4g}"
    found.facts["trained parameters"] = f"{count:,} of {everything:,}"
    if not math.isfinite(total) or not math.isfinite(norm):
        found.problems.append(
            f"loss and gradient must be finite, got {total / len(made)} and {norm}. Look at the "
            "batch with kd.check."
        )
    elif norm == 0:
        found.problems.append("the gradient must not be zero, got 0: nothing would be trained.")
    without = [name for name, p in trained if p.grad is None or not p.grad.any()]
    if without and norm > 0:
        found.remarks.append(
            f"{len(without)} trained tensors get no gradient from these batches: "
            f"{', '.join(without[:3])}{' ...' if len(without) > 3 else ''}"
        )
