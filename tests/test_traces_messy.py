"""A hundred messy records go in, and each is kept as it should be or dropped with its reason."""

import messy_records
import pytest

from kd.traces import Trace


@pytest.fixture(scope="module")
def loaded(tmp_path_factory):
    folder = tmp_path_factory.mktemp("messy")
    expected = messy_records.write(folder)
    return expected, *messy_records.outcomes(folder)


def test_a_hundred_records_are_accounted_for(loaded):
    expected, found, report = loaded
    counted = report["load"]
    assert len(expected) == 100 == counted.seen == counted.kept + sum(counted.dropped.values())
    assert found.keys() == expected.keys()


def test_each_is_kept_as_it_should_be_or_dropped_for_its_reason(loaded):
    expected, found, _ = loaded
    for place, (what, wanted) in expected.items():
        became = found[place]
        if isinstance(became, Trace):
            became = (became.prompt, became.think, became.answer, became.reference)
            wanted = (*wanted, "")[:4] if isinstance(wanted, tuple) else wanted
        assert became == wanted, what
