"""The house stays one road: no import circles, and a call that walks no further than it did."""

import kernel_cases  # noqa: F401  before any kernel
import pytest

import structure_table


def test_no_import_circles():
    assert structure_table.circles() == []


@pytest.mark.filterwarnings("ignore:.*encountered:RuntimeWarning")  # numpy's -inf
@pytest.mark.parametrize(
    ("backend", "files", "functions", "changes"), [("torch", 8, 66, 18), ("triton", 12, 78, 90)]
)
def test_one_loss_walks_no_further(backend, files, functions, changes):
    walked = structure_table.walk(structure_table.one_loss(backend))
    assert walked[0] <= files and walked[1] <= functions and walked[2] <= changes, walked


def test_a_circle_is_seen(monkeypatch):
    """The measure itself: two modules that import each other are one group."""
    import grimp

    class Graph:
        modules = {"a", "b", "c"}

        def find_upstream_modules(self, name):
            return {"a": {"b"}, "b": {"a"}, "c": {"a", "b"}}[name]

    monkeypatch.setattr(grimp, "build_graph", lambda *_, **__: Graph())
    assert structure_table.circles() == [["a", "b"]]
