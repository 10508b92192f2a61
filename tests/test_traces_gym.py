"""reasoning-gym's scorers in a worker that can be killed."""

import pytest

from kd.traces import DropCounts, Trace, verifier, verify
from kd.traces.verifiers.process import ReasoningGym, Worker, gym_problems


def test_a_worker_that_hangs_or_dies_is_replaced(monkeypatch, tmp_path):
    from kd.traces.verifiers import process

    script = tmp_path / "worker.py"
    script.write_text(
        "import json, sys, time\n"
        "print('ready', flush=True)\n"
        "for line in sys.stdin:\n"
        "    r = json.loads(line)\n"
        "    if r['do'] == 'hang': time.sleep(60)\n"
        "    if r['do'] == 'die': sys.exit(3)\n"
        "    nonce = 'forged' if r['do'] == 'forge' else r['nonce']\n"
        "    print(json.dumps([nonce, 'correct', '', '']), flush=True)\n"
    )
    monkeypatch.setattr(process, "_WORKER", script)
    worker = Worker()
    assert worker.ask({"do": "answer"}, 10).correct
    assert worker.ask({"do": "hang"}, 0.5).label() == "unknown: verifier timed out"
    assert worker.ask({"do": "die"}, 10).label() == "error: verifier crashed"
    assert worker.ask({"do": "forge"}, 10).label() == "error: verifier crashed"
    assert worker.ask({"do": "answer"}, 10).correct
    worker.close()
    script.write_text("import no_such_library")
    assert worker.ask({"do": "answer"}, 10).label() == "error: verifier crashed"


def test_reasoning_gym_items_are_scored_by_their_own_scorer():
    pytest.importorskip("reasoning_gym")
    problems = gym_problems("chain_sum", 4, seed=1, min_terms=2, max_terms=3)
    assert problems == gym_problems("chain_sum", 4, seed=1, min_terms=2, max_terms=3)
    right = [p.replace(think="t", answer=f"The answer is {p.reference}") for p in problems]
    wrong = [p.replace(think="t", answer="12345") for p in problems]
    kept, report = verify(right + wrong, ReasoningGym(), report=DropCounts())
    assert [t.answer for t in kept] == [t.answer for t in right]
    assert report["verify"].dropped == {"wrong: scored below 1": 4}
    (grid,) = gym_problems("mini_sudoku", 1, seed=1)
    solved = f"It is solved:\n\n{grid.reference}"
    assert "\n" in grid.reference
    assert ReasoningGym()(grid.replace(answer=grid.reference)).correct
    assert not ReasoningGym()(grid.replace(answer=solved.replace("4", "3"))).correct
    assert ReasoningGym()(Trace("q", "t", "a")).label() == "unknown: not a reasoning-gym item"


FAMILIES = (
    "chain_sum", "basic_arithmetic", "fraction_simplification", "gcd", "decimal_arithmetic",
    "complex_arithmetic", "calendar_arithmetic", "letter_counting", "number_sorting",
    "base_conversion", "simple_equations", "leg_counting", "caesar_cipher", "syllogism",
    "prime_factorization",
)  # fmt: skip


def test_verdicts_are_those_of_reasoning_gyms_own_scorers():
    """Right answers in four styles, and the answers to other problems of the family."""
    reasoning_gym = pytest.importorskip("reasoning_gym")
    styles = ("%s", "The answer is %s.", r"\boxed{%s}", "**Answer:** %s\n\nHope this helps!")
    counts = {"same": 0, "unknown": 0}
    for family in FAMILIES:
        scorer = reasoning_gym.create_dataset(family, size=6, seed=3)
        items = [scorer[i] for i in range(6)]
        for item, other in zip(items, items[1:] + items[:1], strict=True):
            answers = [style.replace("%s", str(item["answer"])) for style in styles]
            for text, given in [(a, item["answer"]) for a in answers] + [
                (str(other["answer"]), other["answer"])
            ]:
                right = float(scorer.score_answer(str(given), item)) >= 1.0
                found = verifier("maths")(Trace("q", "t", text, reference=str(item["answer"])))
                if found.status == "unknown":
                    counts["unknown"] += 1
                    continue
                assert found.correct == right, (family, item["answer"], text, found)
                counts["same"] += 1
    assert counts["same"] > 400 and counts["unknown"] < 15
