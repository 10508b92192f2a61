"""Both sides as logits, forward and backward."""

import suites

SUITES = ("dense",)


def test_step(entry, benchmark):
    suites.run(entry, benchmark)
