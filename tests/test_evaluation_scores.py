"""Scores, intervals, likelihoods and closeness, against their definitions written out."""

import itertools
import math
import random

import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from kd.cache import TeacherCache
from kd.evaluation import (
    NATS,
    PERPLEXITY,
    Evaluation,
    closeness,
    compare_arms,
    compare_runs,
    evaluate,
    likelihood,
    pass_at_k,
    score,
)
from kd.evaluation.answers import judged
from kd.teachers import build_cache
from kd.traces import Exact, Sampling, Trace, Verdict
from kd_recipes._random_model import random_model


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    found = tmp_path_factory.mktemp("model")
    random_model(found)
    return found


@pytest.fixture(scope="module")
def model(folder):
    return AutoModelForCausalLM.from_pretrained(folder).eval()


def rows(*lengths):
    generator = torch.Generator().manual_seed(0)
    return [torch.randint(2, 258, (length,), generator=generator) for length in lengths]


@pytest.mark.parametrize(
    ("n", "right", "k"), [(5, 2, 1), (5, 2, 3), (6, 1, 6), (4, 0, 2), (4, 4, 1)]
)
def test_pass_at_k_is_the_share_of_draws_with_a_right_one(n, right, k):
    samples = [i < right for i in range(n)]
    draws = list(itertools.combinations(samples, k))
    assert pass_at_k(n, right, k) == pytest.approx(sum(map(any, draws)) / len(draws))


def test_pass_at_k_refuses_more_than_was_drawn():
    with pytest.raises(ValueError, match="k must be from 1 to the 4 samples of a problem, got 5"):
        pass_at_k(4, 2, 5)


def test_the_interval_covers_the_truth_about_95_times_in_100():
    """Samples of one problem share its difficulty: taking them as independent covers far less."""
    rng, covered, rounds = random.Random(0), 0, 300
    for _ in range(rounds):
        chances = [rng.betavariate(0.5, 0.5) for _ in range(80)]
        found = Evaluation(tuple(tuple(rng.random() < c for _ in range(8)) for c in chances))
        low, high = found.interval()
        covered += low <= 0.5 <= high
    assert 0.91 < covered / rounds < 0.99


def test_one_sample_each_has_wilsons_interval():
    found = Evaluation(((True,), (False,), (True,), (True,)))
    assert found.accuracy == 0.75
    assert found.interval() == score(["</think>1"] * 4, ["1", "2", "1", "1"]).interval


def test_every_problem_counts_and_a_lost_sample_is_wrong():
    problems = [Trace("a"), Trace("b")]
    answered = [
        (
            Trace("a", "t", "1").note(number=0, finish="length", completion_tokens=4),
            Verdict("correct"),
        ),
        (Trace("a", "", "2").note(number=0, completion_tokens=2), Verdict("unknown")),
    ]
    found = judged(problems, answered, 2)
    assert found.right == ((True, False), (False, False))
    assert (found.unfinished, found.undecided, found.tokens) == (0.25, 0.25, 3)
    assert found.samples == (("a\n\n", "<think>\nt\n</think>\n\n1", True),)


def test_a_local_model_is_asked_n_times(folder, model):
    tokenizer = AutoTokenizer.from_pretrained(folder)
    problems = [Trace("1+1", reference="2"), Trace("a longer one", reference="3")]
    calls = []
    found = evaluate(
        problems,
        Exact(),
        model=model,
        tokenizer=tokenizer,
        n=3,
        sampling=Sampling(1.0, 1.0, 4),
        chat=False,
        progress=calls.append,
    )
    assert [len(row) for row in found.right] == [3, 3] and calls[-1] == 6
    assert found.to_dict()["samples"] == 3
    with pytest.raises(ValueError, match="exactly one of model and server"):
        evaluate(problems, Exact())
    with pytest.raises(ValueError, match="problems must not be empty"):
        evaluate([], Exact(), model=model)


def test_likelihood_is_that_of_plain_logits(model):
    sequences = rows(9, 30, 17)
    labels = sequences[1].clone()
    labels[:12] = -100
    mixed = [sequences[0], {"input_ids": sequences[1], "labels": labels}, sequences[2]]
    found = likelihood(model, mixed, batch_size=2)
    for i, (ids, wanted) in enumerate(
        zip(sequences, (sequences[0], labels, sequences[2]), strict=True)
    ):
        with torch.no_grad():
            logits = model(input_ids=ids[None]).logits[0, :-1].float()
        loss = torch.nn.functional.cross_entropy(logits, wanted[1:], reduction="none")
        assert found.nats[i] == pytest.approx(float(loss.sum()), rel=1e-5)
        assert found.tokens[i] == int((wanted[1:] != -100).sum())
    assert found.perplexity == pytest.approx(math.exp(sum(found.nats) / sum(found.tokens)))
    low, high = found.interval
    assert low < found.perplexity < high


def test_likelihood_refuses_what_cannot_be_scored(model):
    with pytest.raises(ValueError, match="at least one token to predict"):
        likelihood(model, [torch.tensor([3])])
    with pytest.raises(ValueError, match="at most the model's 512 tokens, got 600"):
        likelihood(model, rows(600))


def test_closeness_is_the_definition_written_out(model, folder, tmp_path):
    sequences = rows(20, 33)
    build_cache(model, sequences, tmp_path / "cache", top_k=8, codec="float32", progress=False)
    cache = TeacherCache(tmp_path / "cache")
    torch.manual_seed(1)
    student = AutoModelForCausalLM.from_pretrained(folder)
    with torch.no_grad():
        for weight in student.parameters():
            weight.add_(0.05 * torch.randn_like(weight))
    likely, found = closeness(student, cache, sequences, batch_size=2)
    kl, same, gaps = [], [], []
    for ids in sequences:
        with torch.no_grad():
            p = model(input_ids=ids[None]).logits[0, :-1].double().softmax(-1)
            q = student(input_ids=ids[None]).logits[0, :-1].double().softmax(-1)
        top = p.topk(8)
        mine = q.gather(-1, top.indices)
        rest, mine_rest = 1 - top.values.sum(-1), 1 - mine.sum(-1)
        kl += (
            (top.values * (top.values / mine).log()).sum(-1) + rest * (rest / mine_rest).log()
        ).tolist()
        same += (p.argmax(-1) == q.argmax(-1)).tolist()
        confidence, token = q.max(-1)
        kept = (top.indices == token[:, None]).any(-1)
        theirs = p.gather(-1, token[:, None]).squeeze(-1) * kept
        gaps += [(int(c * 10), float(c), float(t)) for c, t in zip(confidence, theirs, strict=True)]
    assert found.tokens == len(kl) == sum(likely.tokens)
    assert found.kl == pytest.approx(sum(kl) / len(kl), rel=1e-3)
    assert found.top1 == pytest.approx(sum(same) / len(same))
    bins = {b: [(c, t) for i, c, t in gaps if i == b] for b in {i for i, _, _ in gaps}}
    gap = sum(abs(sum(c for c, _ in v) - sum(t for _, t in v)) for v in bins.values()) / len(gaps)
    assert found.calibration == pytest.approx(gap, abs=1e-4)


def test_a_model_is_as_close_to_itself_as_can_be(model, tmp_path):
    sequences = rows(40)
    build_cache(model, sequences, tmp_path / "cache", top_k=258, codec="float32", progress=False)
    _, found = closeness(model, TeacherCache(tmp_path / "cache"), sequences)
    assert found.top1 == 1.0 and found.kl < 1e-5 and found.calibration < 1e-5


def test_words_for_arms_and_runs():
    arms = {"sft": [30.0, 31.0, 30.5], "kd": [26.0, 26.5, 26.2]}
    assert compare_arms(arms, "sft", "kd", PERPLEXITY).startswith("kd beats sft by 4.27")
    assert compare_arms(arms, "kd", "sft", PERPLEXITY).startswith("sft LOSES to kd by 4.27")
    unclear = compare_arms({"sft": [1.0, 2.0], "kd": [2.0, 1.1]}, "sft", "kd", PERPLEXITY)
    assert "does NOT beat" in unclear
    first, second = [3.0, 3.1, 2.9, 3.0], [2.5, 2.7, 2.4, 2.6]
    found = compare_runs("ce", "kd", first, second, NATS, "blocks")
    assert found.startswith("kd is better than ce by 0.450 nats") and "one seed" in found
    assert "is WORSE than" in compare_runs("kd", "ce", second, first, NATS)
    assert "do NOT differ" in compare_runs("a", "b", [1.0, 0.0, 1.0], [0.0, 1.0, 1.0])
