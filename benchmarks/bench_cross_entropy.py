"""Fused linear cross-entropy on hard labels."""

import suites

SUITES = ("cross-entropy",)


def test_step(entry, benchmark):
    suites.run(entry, benchmark)
