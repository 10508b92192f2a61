"""Top-k log-probabilities out of a teacher's logits."""

import suites

SUITES = ("selection",)


def test_step(entry, benchmark):
    suites.run(entry, benchmark)
