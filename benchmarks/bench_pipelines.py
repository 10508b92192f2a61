"""Cache written and read, capture, a training step, a whole recipe."""

import suites

SUITES = ("cache-write", "cache-read", "capture", "training", "recipe")


def test_step(entry, benchmark):
    suites.run(entry, benchmark)
