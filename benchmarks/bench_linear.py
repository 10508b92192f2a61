"""Student and teacher as hidden states and lm_head, forward and backward."""

import suites

SUITES = ("linear",)


def test_step(entry, benchmark):
    suites.run(entry, benchmark)
