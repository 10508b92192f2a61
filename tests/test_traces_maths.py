"""math-verify and reasoning-gym in a killable worker: right on 100 pairs, unmoved by hostility."""

import time

import pytest

pytest.importorskip("math_verify")
from kd.traces import Trace, Yield, verify
from kd.traces.verifiers.process import Maths, ReasoningGym, Worker, gym_problems

# (reference, an equal answer, a different one)
PAIRS = [
    (r"\frac{1}{2}", r"\boxed{0.5}", r"\boxed{0.25}"),
    ("0.5", r"\boxed{\frac{1}{2}}", r"\boxed{\frac{1}{3}}"),
    (r"\sqrt{8}", r"\boxed{2\sqrt{2}}", r"\boxed{2\sqrt{3}}"),
    ("(1,2)", r"\boxed{(1, 2)}", r"\boxed{(2, 1)}"),
    ("x^2-1", r"\boxed{(x-1)(x+1)}", r"\boxed{(x-1)^2}"),
    (r"\frac{3}{4}", r"\boxed{\dfrac{6}{8}}", r"\boxed{\dfrac{4}{3}}"),
    ("[0,1]", r"\boxed{[0, 1]}", r"\boxed{(0, 1)}"),
    (r"\pi/2", r"\boxed{\frac{\pi}{2}}", r"\boxed{\pi}"),
    ("2x+3", r"\boxed{3 + 2x}", r"\boxed{2x - 3}"),
    ("-7", r"so \boxed{-7}.", r"so \boxed{7}."),
    *((str(n), rf"thus \boxed{{{n}}}", rf"thus \boxed{{{n + 1}}}") for n in range(25)),
    *((f"{n}/7", rf"\boxed{{\frac{{{2 * n}}}{{14}}}}", rf"\boxed{{{n}/8}}") for n in range(1, 16)),
]


def test_the_verdicts_of_100_pairs_are_right():
    assert len(PAIRS) == 50
    traces, wanted = [], []
    for reference, right, wrong in PAIRS:
        traces += [Trace("q", "t", a, reference=reference) for a in (right, wrong)]
        wanted += ["correct", "wrong"]
    kept, report = verify(traces, Maths(), keep=("correct", "wrong"), workers=2)
    assert report["verify"].dropped == {}
    found = [trace.metadata["verdict"]["status"] for trace in kept]
    bad = [(t.reference, t.answer) for t, f, w in zip(traces, found, wanted, strict=True) if f != w]
    assert not bad


HOSTILE = [
    (r"\boxed{9^{9^{9^{9}}}}", "1"),
    ("(" * 3000 + "1" + ")" * 3000, "1"),
    (r"\boxed{" + "1" * 5_000 + "}", "1"),
    (r"\boxed{\frac{1}{}}\frac", "1/2"),
    (r"\boxed{100000000!}", "x+1"),
    ("x" * 2_000_000, "1"),
    (r"\boxed{__import__('os').system('true')}", "1"),
]


def test_hostile_answers_end_soon_and_are_never_correct():
    verifier = Maths(seconds=1)
    started = time.monotonic()
    for answer, reference in HOSTILE:
        assert verifier(Trace("q", "t", answer, reference=reference)).status in ("wrong", "unknown")
    assert time.monotonic() - started < 30 * len(HOSTILE)  # starting anew included
    # and the next honest one is judged as ever
    assert verifier(Trace("q", "t", r"\boxed{2/4}", reference="1/2")).correct


def test_what_cannot_be_compared_is_unknown_not_wrong():
    verifier = Maths()
    assert verifier(Trace("q", "t", "5")).reason == "no reference"
    assert verifier(Trace("q", "t", "", reference="5")).reason == "no answer"
    long = verifier(Trace("q", "t", "5", reference="5" * 10_000))
    assert (long.status, long.reason) == ("unknown", "reference too long")


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
    kept, report = verify(right + wrong, ReasoningGym(), report=Yield())
    assert [t.answer for t in kept] == [t.answer for t in right]
    assert report["verify"].dropped == {"wrong: scored below 1": 4}
    assert ReasoningGym()(Trace("q", "t", "a")).label() == "unknown: not a reasoning-gym item"
