"""The printed table of errors: it passes as it is, and fails when a loss is wrong."""

import dataclasses

import pytest
import torch

import error_table
import kd
from kd.losses import divergences
from kd_bench.plain import plain_losses


def test_float64_holds_its_bound(capsys):
    assert error_table.main(["--dtype", "float64"]) == 0
    printed = capsys.readouterr().out
    assert "0 broken" in printed
    assert printed.count("\n| ") == len(error_table.DIVERGENCES) * len(error_table.STUDENTS) + 1


@pytest.mark.parametrize("dtype", ["float64", "bfloat16"])
def test_a_wrong_gradient_breaks_the_table(dtype, capsys, monkeypatch):
    def wrong(d, p, q, log_p, log_q, head):
        return p * (log_p - log_q) + (q - p), -1.1 * p

    monkeypatch.setattr(error_table, "DIVERGENCES", (kd.forward_kl,))
    assert error_table.main(["--dtype", dtype]) == 0
    right = divergences.DEFINITIONS["forward_kl"]  # what sparse teachers use
    spoilt = dataclasses.replace(right, terms=wrong)
    monkeypatch.setitem(divergences.DEFINITIONS, "forward_kl", spoilt)
    assert error_table.main(["--dtype", dtype]) == 1
    assert "BROKEN: forward_kl, logits x bucket" in capsys.readouterr().out


def test_plain_pytorch_is_the_oracle_in_float64():
    """The yardstick computes the same thing: its errors are rounding and nothing else."""
    for d in error_table.DIVERGENCES:
        for teacher_form in error_table.TEACHERS:
            if not error_table.meaningful(d, teacher_form):
                continue
            for temperature in (1.0, 2.0) if teacher_form != "drop" else (1.0,):
                student, teacher, leaves = error_table.build(
                    "hidden", teacher_form, 1.0, torch.float64, 0
                )
                plain = plain_losses(d, student, teacher, temperature)
                options = dict(temperature=temperature, reduction="none", backend="reference")
                want = error_table.evaluate(d(student, teacher, **options), leaves)
                assert max(error_table.errors_of(error_table.evaluate(plain, leaves), want)) < 1e-9
