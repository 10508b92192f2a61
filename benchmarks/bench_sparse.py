"""Against a stored top-k teacher, forward and backward."""

import suites

SUITES = ("sparse", "linear-sparse")


def test_step(entry, benchmark):
    suites.run(entry, benchmark)
