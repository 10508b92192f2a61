"""How a defect is put into the losses: in the source of one function, or around the collator.

A source mutation replaces one expression and swaps the function's code, so that every module that
imported the function sees the defect.
"""

import dataclasses
import inspect
import textwrap

import torch

from kd.training import DistillationCollator


@dataclasses.dataclass(frozen=True)
class Mutation:
    """``old`` becomes ``new`` in module.function, and ``caught_by`` must then fail."""

    module: object
    function: str
    old: str
    new: str
    caught_by: object
    arguments: tuple = ()
    otherwise: tuple = ()  # further (old, new), for code that may be written in two ways

    def apply(self, monkeypatch):
        function = plain_function(self)
        source = textwrap.dedent(inspect.getsource(function))
        source = source[source.index("def ") :]  # without decorators
        pairs = [(self.old, self.new), *self.otherwise]
        found = [pair for pair in pairs if source.count(pair[0]) == 1]
        assert found, f"stale: {self.old!r} in {self.function}"
        mutated = "from __future__ import annotations\n" + source.replace(*found[0])
        code = compile(mutated, f"<mutated {self.function}>", "exec")
        made = {}
        exec(code, function.__globals__, made)
        monkeypatch.setattr(function, "__code__", made[function.__name__].__code__)


def plain_function(mutation):
    """The Python function behind a static method, a method or a decorated function."""
    found = mutation.module
    for name in mutation.function.split("."):
        found = getattr(found, name)
    return inspect.unwrap(getattr(found, "__func__", found))


class CollatorDefect:
    """What the collator returns, spoilt: ``spoil(batch, rows, collator)`` changes it in place."""

    def __init__(self, spoil, caught_by):
        self.spoil, self.caught_by, self.arguments = spoil, caught_by, ()

    def apply(self, monkeypatch):
        original = DistillationCollator.__call__

        def spoilt(collator, rows):
            batch = original(collator, rows)
            self.spoil(batch, rows, collator)
            return batch

        monkeypatch.setattr(DistillationCollator, "__call__", spoilt)


def move_targets(batch, move):
    for key in ("teacher_ids", "teacher_logprobs"):
        if key in batch:
            batch[key] = move(batch[key])


def unshift_labels(batch, rows, collator):
    batch["shift_labels"] = batch["shift_labels"].roll(1, 1)


def targets_one_late(batch, rows, collator):
    move_targets(batch, lambda targets: targets.roll(1, 1))


def targets_on_the_right(batch, rows, collator):
    width = batch["shift_labels"].shape[1]
    lengths = [len(row["input_ids"]) for row in rows]

    def move(targets):
        return torch.stack([t.roll(width - n, 0) for t, n in zip(targets, lengths, strict=True)])

    move_targets(batch, move)


def targets_by_position(batch, rows, collator):
    order = sorted(range(len(rows)), key=lambda i: rows[i]["input_ids"])
    move_targets(batch, lambda targets: targets[order])


def mask_every_pad(batch, rows, collator):
    batch["shift_labels"][batch["shift_labels"] == collator.pad_token_id] = -100


def run(mutation):
    """The test itself; of a hypothesis test the one example that is named."""
    test = mutation.caught_by
    if hasattr(test, "hypothesis"):
        test = test.hypothesis.inner_test
    test(*mutation.arguments)
