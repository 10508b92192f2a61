"""The record, splitting completions, the yield's book-keeping, simple verifiers, generation."""

import json

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from traces_cases import CHATML_QWEN, R1_PREFILLED, byte_tokenizer, tiny_model

from kd.traces import (
    DropCounts,
    Exact,
    Sampling,
    Trace,
    Verdict,
    generate_local,
    split_completion,
    verify,
)


def test_a_trace_survives_json_and_its_id_depends_on_content_alone():
    trace = Trace("q", "t", "a", source="s", metadata={"n": [1, {"x": None}]})
    again = Trace.from_dict(json.loads(json.dumps(trace.to_dict())))
    assert again == trace and again.id == trace.id
    assert trace.replace(source="other").id == trace.id
    # moving a character over a border changes the id
    assert Trace("qt", "", "a").id != Trace("q", "t", "a").id


def test_a_trace_refuses_what_is_not_text():
    with pytest.raises(TypeError, match="Trace: answer must be text, got int"):
        Trace("q", "t", 5)
    with pytest.raises(TypeError, match="Trace: metadata must be a mapping, got list"):
        Trace("q", metadata=[1])


@pytest.mark.parametrize(
    "text, think, answer",
    [
        ("<think>\na b\n</think>\n\nc", "a b", "c"),
        ("a b\n</think>\nc", "a b", "c"),  # the template opened the thought
        ("just c", "", "just c"),
        ("<think>never ends", "never ends", ""),
        ("<think></think>c", "", "c"),
        (
            "<|begin_of_thought|>\n\nt\n\n<|end_of_thought|>\n\n<|begin_of_solution|>\n\nc\n\n"
            "<|end_of_solution|>",
            "t",
            "c",
        ),
        ("<thinking>t</thinking>c", "t", "c"),
        ("<reasoning>t</reasoning><answer>c</answer>", "t", "c"),
        # what does not fit stays visible
        ("<think>a<think>b</think>c</think>d", "a<think>b", "c</think>d"),
        ("hello <think>a</think>b", "hello <think>a", "b"),
        ("a</think>b<think>c", "a", "b<think>c"),
        ("<think>a<|end_of_thought|>b", "a<|end_of_thought|>b", ""),
    ],
)
def test_completions_split_at_their_tags_and_lose_nothing(text, think, answer):
    assert split_completion(text) == (think, answer)


def test_a_completion_of_a_prefilled_thought_that_never_ends_has_no_answer():
    assert split_completion("so far", prefilled=True) == ("so far", "")


@given(st.lists(st.tuples(st.sampled_from("abc"), st.booleans()), max_size=30), st.integers(0, 30))
def test_yields_account_for_every_record_and_merge_to_the_whole(records, cut):
    def count(rows):
        report = DropCounts()
        stage = report.stage("s")
        for reason, good in rows:
            stage.keep() if good else stage.drop(reason, Trace(reason))
        return report

    whole = count(records)
    merged = count(records[:cut]).merge(count(records[cut:]))
    assert merged.to_dict() | {} == whole.to_dict()
    stage = whole["s"]
    assert stage.seen == len(records) == stage.kept + sum(stage.dropped.values())
    assert (
        DropCounts.from_dict(json.loads(json.dumps(whole.to_dict()))).to_dict() == whole.to_dict()
    )


def test_the_table_names_stages_reasons_and_counts():
    report = DropCounts()
    report.stage("lint").keep(3)
    report.stage("lint").drop("empty answer", Trace("q", "x" * 5000), "nothing after </think>")
    table = report.table()
    assert "lint" in table and "empty answer" in table and "75.0" in table
    example = report["lint"].examples["empty answer"][0]
    assert example["detail"] == "nothing after </think>" and len(example["think"]) < 600


def test_verify_keeps_order_counts_reasons_and_survives_a_crashing_verifier():
    traces = [Trace(str(i), "t", str(i % 3), reference="1") for i in range(30)]

    def crash_on_two(trace):
        if trace.answer == "2":
            raise RuntimeError("boom")
        return Exact()(trace)

    for workers in (1, 4):
        kept, report = verify(traces, crash_on_two, workers=workers)
        assert [trace.prompt for trace in kept] == [str(i) for i in range(1, 30, 3)]
        assert report["verify"].dropped == {
            "wrong: different text": 10,
            "error: verifier crashed": 10,
        }
        assert report["verify"].notes["statuses"] == {"wrong": 10, "correct": 10, "error": 10}
        assert kept[0].metadata["verdict"]["status"] == "correct"


def test_verify_continues_from_its_journal_but_not_for_another_reference_or_verifier(tmp_path):
    asked = []

    class Counting:
        def __init__(self, name):
            self.name = name

        def __repr__(self):
            return self.name

        def __call__(self, trace):
            asked.append(trace.prompt)
            return Verdict("correct" if trace.prompt != "bad" else "error")

    journal = tmp_path / "verdicts.jsonl"
    traces = [Trace("a", reference="1"), Trace("bad")]
    verify(traces, Counting("one"), journal=journal)
    with journal.open("a") as file:
        file.write('{"trace": "torn')  # killed while writing
    verify(traces, Counting("one"), journal=journal)
    assert asked == ["a", "bad", "bad"]  # an error is tried again, the rest is not
    verify([Trace("a", reference="2")], Counting("one"), journal=journal)
    verify(traces[:1], Counting("two"), journal=journal)
    assert asked[3:] == ["a", "a"]
    verify([Trace("a", reference="2")], Counting("one"), journal=journal)
    assert len(asked) == 5


def test_generation_carries_the_problem_over_and_repeats_under_its_seed():
    tokenizer, model = byte_tokenizer(CHATML_QWEN), tiny_model()
    problems = [Trace("1+1=", reference="2", source="s"), "a longer question", "b"]
    options = dict(sampling=Sampling(temperature=1.0, max_new_tokens=8), n=2, batch_size=4)
    first = list(generate_local(model, tokenizer, problems, **options))
    torch.manual_seed(5)
    again = list(generate_local(model, tokenizer, problems, **options))
    assert first == again and len(first) == 6
    asked = [trace for trace in first if trace.prompt == "1+1="]
    assert {trace.metadata["sample"] for trace in asked} == {0, 1}
    assert all(trace.reference == "2" and trace.source == "s" for trace in asked)
    assert asked[0].answer != asked[1].answer
    for trace in first:
        long = trace.metadata["finish"] == "length"
        assert (trace.metadata["completion_tokens"] == 8) == long
    with pytest.raises(ValueError, match="Sampling: top_p must lie in"):
        Sampling(top_p=0)


def test_a_sample_is_the_same_in_any_batch_when_greedy():
    tokenizer, model = byte_tokenizer(R1_PREFILLED), tiny_model()
    sampling = Sampling(temperature=0, max_new_tokens=6)
    alone = list(generate_local(model, tokenizer, ["x", "12345"], sampling=sampling, batch_size=1))
    together = list(generate_local(model, tokenizer, ["x", "12345"], sampling=sampling))
    assert alone == together
    assert all(trace.think and not trace.answer for trace in alone)  # opened by the template
