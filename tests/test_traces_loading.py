"""Every shape of the public data sets is read to the same record; what fits none is reported."""

import gzip
import json
import re
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from traces_cases import CHATML_QWEN, byte_tokenizer

from kd.traces import DropCounts, Lint, Renderer, Trace, load, write_traces
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
    report = DropCounts()
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
    report = DropCounts()
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
    report = DropCounts()
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
    report = DropCounts()
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
    report = DropCounts()
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
    report = DropCounts()
    assert [t.prompt for t in load(tmp_path / "x.parquet", report=report)] == ["good", "fine"]
    assert report["load"].dropped == {"invalid UTF-8": 1}


def test_your_own_column_names_can_be_given():
    columns = {"my_question": "prompt", "my_reply": "response"}
    traces = list(load([{"my_question": "q", "my_reply": "a"}], columns=columns))
    assert traces[0].prompt == "q"


T = "t."
ASK, SAY = {"role": "user", "content": "q"}, {"role": "assistant", "content": "a"}
PAIR = {"prompt": "q", "response": "a"}
LABELS = ["off", "on", True, False, 1, 0, "high", "None", "enabled", "no_think", "/no_think"]
LABELS += ["detailed thinking off", "thinking on", {"type": "enabled"}, "N/A", "v2", "o3-mini"]


@pytest.mark.parametrize("label", LABELS)
@pytest.mark.parametrize("column", ["reasoning", "thinking", "think", "Reasoning"])
def test_a_label_is_no_thought_in_any_shape(label, column):
    rows = [
        {**PAIR, column: label},
        {"prompt": "q", "answer": "a", column: label},
        {"messages": [ASK, SAY], column: label},
        {"messages": [ASK], "response": "a", column: label},
        {"messages": [ASK, {**SAY, column: label}]},
        {"input": [ASK], "output": "a", column: label},
    ]
    for row in rows:
        trace = normalise(row)
        assert (trace.prompt, trace.think, trace.answer) == ("q", "", "a"), row
    assert column.lower() not in normalise(rows[0]).think


@pytest.mark.parametrize("thought", ["Five.", "so and", "x = 4, then", "Okay. ", "\u5148\u52a0"])
def test_a_short_thought_is_a_thought(thought):
    assert normalise({**PAIR, "reasoning": thought}).think == thought.strip()
    assert normalise({"messages": [ASK, {**SAY, "reasoning": thought}]}).think == thought.strip()


@pytest.mark.parametrize("value, text", [(0, "0"), (0.0, "0.0"), (False, "False"), (True, "True")])
def test_values_that_python_calls_empty_are_answers_and_references(value, text):
    assert normalise({"question": "q", "response": "a", "answer": value}).reference == text
    assert normalise({"question": "q", "answer": value}).answer == text
    assert normalise({"question": value, "answer": "a"}).prompt == text
    assert normalise({"messages": [ASK, SAY], "ground_truth": value}).reference == text
    assert normalise({"messages": [ASK, {"role": "assistant", "content": value}]}).answer == text
    assert normalise({**PAIR, "reward_model": {"ground_truth": value}}).reference == text
    assert problem({"question": "q", "answer": value}).reference == text
    nested = {"prompt": [ASK], "reward_model": {"ground_truth": value}, "data_source": "x"}
    assert (problem(nested).reference, problem(nested).source) == (text, "x")
    for absent in (None, "", " ", float("nan"), [], {}):
        assert normalise({"question": "q", "response": "a", "answer": absent}).reference == ""
        assert normalise({"question": "q", "response": absent, "output": value}).answer == text


@pytest.mark.parametrize(
    "record, expected",
    [
        ({"prompt": [ASK], "response": "<think>t</think>a"}, ("q", "t", "a")),
        ({"prompt": [ASK], "response": "a", "reasoning_content": "t."}, ("q", "t.", "a")),
        ({"prompt": {"role": ["user"], "content": ["q"]}, "output": "a"}, ("q", "", "a")),
        ({"prompt": "q", "completion": [SAY]}, ("q", "", "a")),
        ({"prompt": "q", "response": {**SAY, "reasoning_content": "t."}}, ("q", "t.", "a")),
        ({"prompt": "q", "response": {"content": "a"}}, ("q", "", "a")),
        ({"input": json.dumps([ASK]), "output": "a"}, ("q", "", "a")),
        ({"conversation": [ASK, SAY], "turn": 1}, ("q", "", "a")),
        ({"turns": 2, **PAIR}, ("q", "", "a")),
        ({"dialogue": "two speak", **PAIR}, ("q", "", "a")),
        ({"instruction": "i", "context": "c", "response": "a"}, ("i\n\nc", "", "a")),
        (
            {"prompt": '{"content": "no turn"}', "response": "a"},
            ('{"content": "no turn"}', "", "a"),
        ),
        ({"prompt": "[1, 2] sorted?", "response": "[1, 2]"}, ("[1, 2] sorted?", "", "[1, 2]")),
        ({"prompt": "q", "response": json.dumps([SAY])}, ("q", "", json.dumps([SAY]))),
        ({"messages": [{"role": "\u7528\u6237", "content": "q"}, SAY]}, ("q", "", "a")),
        ({"messages": [ASK, {"role": "ai", "parts": [{"text": "a"}]}]}, ("q", "", "a")),
        ({"messages": [ASK, {**SAY, "content": {"type": "text", "text": "a"}}]}, ("q", "", "a")),
        (
            {
                "messages": [
                    ASK,
                    {**SAY, "reasoning_details": [{"type": "reasoning.text", "text": T}]},
                ]
            },
            ("q", "t.", "a"),
        ),
        ({"messages": [ASK, {**SAY, "reasoning": "<think>t.</think>"}]}, ("q", "t.", "a")),
        (
            {"messages": [ASK, {**SAY, "content": f"<think>{T}</think>a", "think": T}]},
            ("q", T, "a"),
        ),
        ({"messages": [ASK, {**SAY, "reasoning": {"content": "t."}}]}, ("q", "t.", "a")),
        ({"messages": [ASK, SAY], "reasoning": "t."}, ("q", "t.", "a")),
        ({"prompt": [ASK], "completion": [SAY], "thinking": "t."}, ("q", "t.", "a")),
        ({"messages": [ASK, SAY, ASK, SAY], "reasoning": "whose?"}, ("q", "", "a")),
        ({"question": "q", "generations": ["<think>t.</think>a"]}, ("q", "t.", "a")),
        ({"row_idx": 0, "row": PAIR}, ("q", "", "a")),
    ],
)
def test_turns_and_texts_are_told_apart(record, expected):
    trace = normalise(record)
    assert (trace.prompt, trace.think, trace.answer) == expected


@pytest.mark.parametrize(
    "text, think",
    [
        ("<THINK>t</THINK>\na", "t"),
        ("<Thought>t</Thought>\n<Output>a</Output>", "t"),
        ("<think>t</think>\n<response>\na\n</response>", "t"),
        ("<think>t</think><ANSWER>a</ANSWER>", "t"),
        ("[THINK]t, [x] and <b>[/THINK]a", "t, [x] and <b>"),
        ("\u25c1think\u25b7\u25c1/think\u25b7a", ""),
        ("Here is my thought process:\nt\nHere is my response:\na", "t"),
        ("Here are my reasoning steps:\nt\n[BEGIN FINAL RESPONSE]\na\n[END FINAL RESPONSE]", "t"),
        ("<unused94>thought\nt<unused95>a", "t"),
        ("<|channel|>final<|message|>a<|return|>", ""),
        (
            "<|channel|>analysis<|message|>t<|end|><|start|>assistant<|channel|>analysis<|message|>"
            "u<|end|><|start|>assistant<|channel|>final<|message|>a",
            "t\n\nu",
        ),
        ("<seed:think>\nt\n</seed:think>\na", "t"),
    ],
)
def test_thoughts_of_other_families_are_split_and_pass_the_lint(text, think):
    trace = normalise({"prompt": "q", "response": text})
    assert (trace.think, trace.answer) == (think, "a")
    assert Lint()(trace) is None


@pytest.mark.parametrize(
    "answer",
    [
        "<|channel|>commentary to=functions.f<|message|>{}<|call|>",
        "<scratchpad>t</scratchpad>a",
        "<|thinking|>t<|/thinking|>a",
        "<think>t</think>a</seed:think>",
        "<think>t</think>a [/THINK] b",
        "\u25c1think\u25b7 a \u25c1think\u25b7",
        "<|channel>thought\nt<channel|>a",
        "<rationale>t</rationale>a",
    ],
)
def test_marks_that_nobody_has_understood_do_not_pass_as_plain_answers(answer):
    trace = normalise({"prompt": "q", "response": answer})
    reason = Lint()(trace.replace(answer=trace.answer or "a"))
    assert reason == "nested or second think tag"


def test_lost_parts_and_called_tools_are_counted_by_name_and_do_not_pass_the_lint():
    picture = {"type": "image_url", "image_url": {"url": "x"}}
    call = {"function": {"name": "look_up", "arguments": "{}"}}
    tool = {"role": "tool", "name": "look_up", "content": "4"}
    rows = [
        {"messages": [{"role": "user", "content": [picture, picture, "q"]}, SAY]},
        {"messages": [{"role": "user", "content": "<image>\nq"}, SAY], "image": "x.jpg"},
        {"messages": [ASK, {**SAY, "tool_calls": [call]}]},
        {"messages": [ASK, {**SAY, "function_call": {"name": "add"}}]},
        {"messages": [ASK, {**SAY, "content": [{"type": "tool_use", "name": "add"}, "a"]}]},
        {"messages": [ASK, {**SAY, "tool_calls": [call]}, tool, SAY]},
        {"messages": [ASK, {**SAY, "content": None, "tool_calls": json.dumps([call])}]},
        {"messages": [ASK, {**SAY, "tool_calls": []}]},
        {"messages": [ASK, {**SAY, "tool_calls": None}]},
    ]
    report = DropCounts()
    kept = list(load(rows, report=report))
    reasons = ["parts that are not text"] * 2 + ["tool call"] * 3 + [None] * 2
    assert [Lint()(trace) for trace in kept] == reasons
    counted = report["load"]
    assert counted.dropped == {"tool turns": 1, "tool call without an answer": 1}
    assert counted.notes["tools"] == {"look_up": 3, "add": 2}
    assert re.search(r"= tool called: look_up +3\n", report.table())
    assert re.search(r"= part that is not text: image_url +2\n", report.table())
    renderer = Renderer(byte_tokenizer(CHATML_QWEN))
    outcomes = [outcome for _, outcome in renderer.render_all(kept[2:])]
    assert [getattr(outcome, "reason", None) for outcome in outcomes] == ["tool call"] * 3 + [
        None
    ] * 2
    assert counted.notes["lost_parts"] == {"image_url": 2, "image, video or audio": 1}


def test_folders_that_datasets_saved_are_read(tmp_path):
    from datasets import Dataset, DatasetDict

    Dataset.from_list([PAIR] * 3).save_to_disk(tmp_path / "one")
    DatasetDict({"a": Dataset.from_list([PAIR]), "b": Dataset.from_list([PAIR])}).save_to_disk(
        tmp_path / "two"
    )
    assert [trace.source for trace in load(tmp_path / "one")] == ["one"] * 3
    assert [trace.prompt for trace in load(tmp_path / "two")] == ["q", "q"]


def test_several_answers_are_taken_when_asked_for_and_else_counted():
    rows = [
        {"question": "q", "responses": ["a", "b"]},
        {"question": "q", "output": ["a", "b"]},
        {"prompt": [ASK], "completions": ["a", "b"]},
        {"problem": "q", "generations": ["a", "b"]},
    ]
    report = DropCounts()
    assert not list(load(rows, report=report)) and report["load"].dropped == {"several answers": 4}
    kept = list(load(rows, all_samples=True))
    assert [trace.answer for trace in kept] == ["a", "b"] * 4
    assert {trace.prompt for trace in kept} == {"q"}


def test_records_by_their_names_and_api_errors(tmp_path):
    (tmp_path / "x.json").write_text(json.dumps({"id1": PAIR, "id2": PAIR}, indent=1))
    assert len(list(load(tmp_path / "x.json"))) == 2
    failed = {"response": {"status_code": 429, "body": {"error": {"message": "slow down"}}}}
    with pytest.raises(ShapeError, match="teacher failed: .*slow down"):
        normalise({"custom_id": "1", **failed})


def test_problems_come_from_any_record_with_a_question():
    asked = problem({"question": "1+1?", "answer": 2, "system": "s", "difficulty": 3})
    assert (asked.prompt, asked.reference, asked.system) == ("1+1?", "2", "s")
    assert asked.think == asked.answer == "" and asked.metadata["difficulty"] == 3
    chat = problem({"messages": [{"role": "user", "content": "hi"}]})
    assert chat.prompt == "hi" and chat.answer == ""
    with pytest.raises(ShapeError, match="empty prompt"):
        problem({"answer": "2"})
