"""pytest-benchmark suites: ``make bench``, or ``pytest benchmarks --benchmark-enable``.

``--smoke`` takes tiny shapes (the test suite's), ``--device cuda`` a card.
"""

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parent))  # for suites.py, which the bench files share


def pytest_addoption(parser):
    group = parser.getgroup("kd benchmarks")
    group.addoption("--smoke", action="store_true", help="tiny shapes: shows that it runs")
    group.addoption("--device", default="cpu", choices=("cpu", "cuda"))


def pytest_generate_tests(metafunc):
    """One test for each group and implementation of a file's suites."""
    suites = getattr(metafunc.module, "SUITES", None)
    if suites is None or "entry" not in metafunc.fixturenames:
        return
    import suites as cases

    config = metafunc.config
    entries = cases.entries(suites, config.getoption("device"), config.getoption("smoke"))
    metafunc.parametrize("entry", entries, ids=[entry.name for entry in entries])
