"""Every shape of the public data sets is read to the same record; what fits none is reported."""

import gzip
import json
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from kd.traces import Trace, Yield, load, write_traces
from kd.traces.columns import ShapeError
from kd.traces.loading import to_dataset
from kd.traces.shapes import normalise, problem

FIXTURES = Path(__file__).parent / "fixtures" / "traces"

# file: (shape, first trace as (prompt, think, answer, reference), metadata it must carry)
EXPECTED = {
    "bespoke_stratos": (
        "conversations",
        "Return your final response within \\boxed{}. What is the remainder when 17 + 25 is "
        "divided by 5?",
        "17 + 25 = 42, and 42 = 8 * 5 + 2.\n\nWait, 8 * 5 is 40, so 2 is left.",
        "The remainder is \\boxed{2}.",
        "",
        {},
    ),
    "openthoughts_114k": (
        "conversations",
        "How many edges does a tree with 9 vertices have?",
        "A tree on n vertices has n - 1 edges.",
        "It has \\boxed{8} edges.",
        "",
        {},
    ),
    "openthoughts_metadata": (
        "pair",
        "Evaluate 3^4.",
        "3 * 3 = 9, and 9 * 9 = 81.",
        "The value is \\boxed{81}.",
        "3^4 = 81",
        {},
    ),
    "openthoughts3": (
        "conversations",
        "Print the squares of 1 to 3.",
        "Okay, 1, 4, 9.",
        "```python\nfor i in (1, 2, 3):\n    print(i * i)\n```",
        "",
        {"difficulty": 8},
    ),
    "mixture_of_thoughts": (
        "messages",
        "Which gas do plants take in?",
        "Photosynthesis uses carbon dioxide and water.",
        "Carbon dioxide.",
        "",
        {"num_tokens": 31},
    ),
    "openr1_math": (
        "messages",
        "Find $x$ with $2x + 3 = 11$.",
        "2x = 8, x = 4.",
        "$\\boxed{4}$",
        "4",
        {"uuid": "0b1f8a1e"},
    ),
    "sky_t1": ("conversations", "Is 91 prime?", "91 = 7 * 13.", "No: it is 7 times 13.", "", {}),
    "s1k": (
        "s1",
        "What is 2^7?",
        "Doubling from 2: 4, 8, 16, 32, 64, 128.",
        "2^7 = 128.",
        "128",
        {},
    ),
    "s1k_1_1": (
        "s1",
        "How many 2-element subsets has a 5-element set?",
        "Choose 2 of 5: 5 * 4 / 2 = 10.",
        "There are \\boxed{10}.",
        "10",
        {"deepseek_grade": "Yes"},
    ),
    "s1k_tokenized": (
        "s1",
        "How many faces has a cube?",
        "Top, bottom and four sides.",
        "6",
        "6",
        {},
    ),
    "limo": (
        "pair",
        "What is the sum of the first 10 odd numbers?",
        "",
        "Okay, the sum of the first n odd numbers is n^2.\n\nSo for n = 10 it is 100.\n\n"
        "**Final Answer**\n\n\\boxed{100}",
        "100",
        {},
    ),
    "deepseek_api": (
        "response",
        "9.11 or 9.8: which is greater?",
        "9.8 = 9.80 and 9.80 > 9.11.",
        "9.8 is greater.",
        "",
        {"finish": "stop", "completion_tokens": 27},
    ),
    "curator": (
        "curator",
        "What is the capital of Norway?",
        "Norway's capital is Oslo.",
        "The capital is Oslo.",
        "Oslo",
        {"finish": "stop"},
    ),
    "plain": ("pair", "Say hello in French.", "", "Bonjour.", "", {}),
}


@pytest.mark.parametrize("name", EXPECTED)
def test_every_public_shape_is_recognised_and_split(name):
    report = Yield()
    traces = list(load(FIXTURES / f"{name}.jsonl", report=report))
    shape, prompt, think, answer, reference, metadata = EXPECTED[name]
    first = traces[0]
    assert (first.prompt, first.think, first.answer) == (prompt, think, answer)
    assert first.reference == reference and first.metadata["shape"] == shape
    assert metadata.items() <= first.metadata.items()
    assert report["load"].kept == len(traces) and not report["load"].dropped


def test_system_messages_sources_and_domains_are_carried():
    stratos = next(load(FIXTURES / "bespoke_stratos.jsonl", domain="math"))
    assert stratos.system.startswith("Your role as an assistant")
    assert (stratos.source, stratos.domain) == ("bespoke_stratos", "math")
    mixture = next(load(FIXTURES / "mixture_of_thoughts.jsonl", name="ignored"))
    assert mixture.source == "llama-nemotron-post-training/science"
    tokenized = next(load(FIXTURES / "s1k_tokenized.jsonl"))
    assert tokenized.system.startswith("You are Qwen") and tokenized.domain == "math"


def test_the_rest_of_the_shapes_in_mixed_files():
    api = list(load(FIXTURES / "deepseek_api.jsonl"))
    assert [(t.prompt, t.think, t.answer) for t in api[1:]] == [
        ("Name a noble gas.", "Helium, neon, argon.", "Argon."),
        ("Count to a million.", "Let me count", ""),
    ]
    assert api[2].metadata["finish"] == "length"
    curated = list(load(FIXTURES / "curator.jsonl"))[1]
    assert (curated.think, curated.answer, curated.domain) == ("12 * 12 = 144.", "144", "math")
    plain = list(load(FIXTURES / "plain.jsonl"))
    assert plain[1].prompt == "Sort the list.\n\n3 1 2" and plain[1].answer == "1 2 3"
    assert (plain[2].prompt, plain[2].think, plain[2].answer) == ("2 + 3?", "Five.", "5")
    assert plain[3].metadata["id"] == 3 and plain[3].reference == "2"


def test_every_sample_of_a_record_can_be_asked_for():
    report = Yield()
    traces = list(load(FIXTURES / "openr1_math.jsonl", all_samples=True, report=report))
    assert [(t.think, t.answer) for t in traces] == [
        ("2x = 8, x = 4.", "$\\boxed{4}$"),
        ("Let me see, 2x = 14", ""),
    ]
    assert [t.metadata["correctness_math_verify"] for t in traces] == [True, False]
    assert traces[1].reference == "4" and traces[1].metadata["sample"] == 1


def test_multiple_turns_become_history_without_the_earlier_thoughts():
    turns = [
        ("user", "a"),
        ("assistant", "<think>x</think>b"),
        ("user", "c"),
        ("assistant", "<think>y</think>d"),
    ]
    trace = normalise({"messages": [{"role": r, "content": c} for r, c in turns]})
    assert (trace.prompt, trace.think, trace.answer) == ("c", "y", "d")
    assert trace.metadata["history"] == [
        {"role": "user", "content": "a"},
        {"role": "assistant", "content": "b"},
    ]


def test_what_fits_no_shape_is_counted_with_its_index_and_keys():
    report = Yield()
    kept = list(load(FIXTURES / "malformed.jsonl", report=report))
    assert [trace.answer for trace in kept] == ["the one good record"]
    stage = report["load"]
    assert stage.dropped == {
        "mixed roles": 1,
        "question without an answer": 1,
        "unknown role": 1,
        "no known shape": 1,
        "empty answer": 1,
        "content is not text": 1,
        "not JSON": 1,
        "not an object": 1,
        "invalid UTF-8": 2,
        "no turns": 1,
        "empty prompt": 1,
        "response without its prompt": 1,
        "teacher failed": 1,
        "turn without text": 1,
    }
    unknown = stage.examples["no known shape"][0]
    assert unknown["index"] == 2 and unknown["keys"] == "title, body"
    assert "narrator" in stage.examples["unknown role"][0]["detail"]
    assert stage.seen == 16


KEYS = st.sampled_from(
    "prompt response messages conversations role from content value choices message question text "
    "generations think answer metadata system generic_request response_message error".split()
)
json_values = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False) | st.text(max_size=8),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(KEYS, inner, max_size=4),
    max_leaves=12,
)


@settings(max_examples=300, deadline=None)
@given(st.dictionaries(KEYS, json_values, max_size=6), st.booleans())
def test_no_record_whatsoever_stops_a_load(record, all_samples):
    report = Yield()
    kept = list(load([record], report=report, all_samples=all_samples))
    assert report["load"].seen == len(kept) + sum(report["load"].dropped.values()) >= 1
    for trace in kept:
        assert json.loads(json.dumps(trace.to_dict())) == trace.to_dict()
    try:
        problem(record)
    except ShapeError:
        pass


@pytest.mark.parametrize("suffix", [".jsonl", ".jsonl.gz", ".parquet"])
def test_traces_survive_every_file_format(tmp_path, suffix):
    traces = [
        Trace(
            "q\u2028\n", "t\u00e9", "a", reference="r", metadata={"n": {"x": [1, None, "\u00df"]}}
        ),
        Trace("second", metadata={}),
    ] * 300
    path = tmp_path / f"traces{suffix}"
    assert write_traces(path, iter(traces)) == 600
    report = Yield()
    again = [t.replace(metadata=dict(t.metadata)) for t in load(path, report=report)]
    assert [(t.id, t.reference) for t in again] == [(t.id, t.reference) for t in traces]
    assert again[0].metadata["n"] == {"x": [1, None, "\u00df"]}
    assert not list(tmp_path.glob(".*"))


def test_a_writer_that_fails_leaves_the_old_file(tmp_path):
    path = tmp_path / "traces.jsonl"
    write_traces(path, [Trace("old")])

    def failing():
        yield Trace("new")
        raise RuntimeError("killed")

    with pytest.raises(RuntimeError):
        write_traces(path, failing())
    assert [t.prompt for t in load(path)] == ["old"] and len(list(tmp_path.iterdir())) == 1


def test_folders_json_arrays_gzip_and_datasets_are_read(tmp_path):
    (tmp_path / "a.json").write_text(json.dumps([{"prompt": "1", "response": "x"}]))
    with gzip.open(tmp_path / "b.jsonl.gz", "wt") as file:
        file.write('{"prompt": "2", "response": "x"}\n')
    (tmp_path / "notes.txt").write_text("not a record")
    assert [(t.prompt, t.source) for t in load(tmp_path)] == [("1", "a"), ("2", "b")]
    dataset = to_dataset([Trace("q", "t", "a", metadata={"k": 1})])
    assert [(t.think, t.metadata["k"]) for t in load(dataset)] == [("t", 1)]


def test_unreadable_sources_are_refused_with_the_fix(tmp_path):
    with pytest.raises(FileNotFoundError, match="load: path must exist, got .*gone.jsonl"):
        list(load(tmp_path / "gone.jsonl"))
    (tmp_path / "bad.parquet").write_bytes(b"PAR1 but not really")
    with pytest.raises(ValueError, match="must be a Parquet file"):
        list(load(tmp_path / "bad.parquet"))
    (tmp_path / "x.csv").write_text("a,b")
    with pytest.raises(ValueError, match="path must end with .jsonl"):
        list(load(tmp_path / "x.csv"))


def test_parquet_with_invalid_text_loses_only_that_row(tmp_path):
    import pyarrow
    from pyarrow import parquet

    column = pyarrow.array([b"good", b"caf\xe9", b"fine"], pyarrow.binary()).view(pyarrow.string())
    table = pyarrow.table({"prompt": column, "response": ["1", "2", "3"]})
    parquet.write_table(table, tmp_path / "x.parquet")
    report = Yield()
    assert [t.prompt for t in load(tmp_path / "x.parquet", report=report)] == ["good", "fine"]
    assert report["load"].dropped == {"invalid UTF-8": 1}


def test_your_own_column_names_can_be_given():
    columns = {"my_question": "prompt", "my_reply": "response"}
    traces = list(load([{"my_question": "q", "my_reply": "a"}], columns=columns))
    assert traces[0].prompt == "q"


def test_problems_come_from_any_record_with_a_question():
    asked = problem({"question": "1+1?", "answer": 2, "system": "s", "difficulty": 3})
    assert (asked.prompt, asked.reference, asked.system) == ("1+1?", "2", "s")
    assert asked.think == asked.answer == "" and asked.metadata["difficulty"] == 3
    chat = problem({"messages": [{"role": "user", "content": "hi"}]})
    assert chat.prompt == "hi" and chat.answer == ""
    with pytest.raises(ShapeError, match="empty prompt"):
        problem({"answer": "2"})
