"""A hundred messy records, as people have them, and what becomes of each.

    python tests/messy_records.py

writes the files to a temporary folder, loads the folder, and prints a line for every record: the
question, thought and answer it was kept with, or the reason it was dropped for.
"""

# A record is one line of the tables below, however long.
# ruff: noqa: E501

from __future__ import annotations

import gzip
import json
import tempfile
from pathlib import Path
from typing import Any

from kd.traces import DropCounts, Trace, counts, load

# ("what it is", what is written, (question, thought, answer[, reference]) or the reason)
Q, A = "What is 2+3?", "5"
TURNS = [{"role": "user", "content": Q}, {"role": "assistant", "content": A}]
SHARED = [{"from": "human", "value": Q}, {"from": "gpt", "value": A}]
PLAIN = (Q, "", A)
CALL = [{"id": "c1", "type": "function", "function": {"name": "get_weather", "arguments": "{}"}}]


def _asked(answer: Any, **more: Any) -> dict[str, Any]:
    return {"messages": [TURNS[0], {"role": "assistant", "content": answer, **more}]}


def _parts(*parts: dict[str, Any]) -> dict[str, Any]:
    return {"messages": [{"role": "user", "content": list(parts)}, TURNS[1]]}


TEXT = {"type": "text", "text": Q}
THOUGHTS = {
    "R1's tags": "<think>\nso\n</think>\n\n5",
    "shouted tags": "<THINK>so</THINK>5",
    "Mistral's tags": "[THINK]so[/THINK]5",
    "Seed's tags": "<seed:think>so</seed:think>5",
    "Kimi's tags": "\u25c1think\u25b7so\u25c1/think\u25b75",
    "Cohere's tags": "<|START_THINKING|>so<|END_THINKING|><|START_RESPONSE|>5<|END_RESPONSE|>",
    "<thinking>": "<thinking>so</thinking>5",
    "<thought>": "<thought>\nso\n</thought>\n5",
    "<reasoning> and <answer>": "<reasoning>so</reasoning><answer>5</answer>",
    "<think> and <answer>": "<think>so</think> <answer> 5 </answer>",
    "Sky-T1's tags": "<|begin_of_thought|>so<|end_of_thought|>"
    "<|begin_of_solution|>5<|end_of_solution|>",
    "gpt-oss's channels": "<|channel|>analysis<|message|>so<|end|><|start|>assistant"
    "<|channel|>final<|message|>5<|return|>",
    "gpt-oss's channels, tokens stripped": "analysissoassistantfinal5",
    "a thought that the template opened": "so\n</think>\n5",
}
CHAT = {"prompt": [TURNS[0]]}
VERL = {
    "data_source": "openai/gsm8k",
    "prompt": [TURNS[0]],
    "ability": "math",
    "reward_model": {"style": "rule", "ground_truth": 5},
    "extra_info": {"split": "train", "index": 0},
}
BODY = {"object": "chat.completion", "choices": [{"finish_reason": "stop", "message": TURNS[1]}]}

RECORDS: list[tuple[str, Any, Any]] = [
    # conversations
    ("messages", {"messages": TURNS}, PLAIN),
    ("messages as JSON text", {"messages": json.dumps(TURNS)}, PLAIN),
    ("messages as Python's text", {"messages": repr(TURNS)}, PLAIN),
    ("each turn as JSON text", {"messages": [json.dumps(turn) for turn in TURNS]}, PLAIN),
    ("messages as a dict of lists", {"messages": {"role": ["user", "assistant"], "content": [Q, A]}}, PLAIN),
    ("dict of lists, unequal", {"messages": {"role": ["user"], "content": [Q, A]}}, "no turns"),
    ("messages inside conversation", {"conversation": {"messages": TURNS}}, PLAIN),
    ("a bare list of turns", TURNS, PLAIN),
    ("a record as JSON text", json.dumps({"messages": TURNS}), PLAIN),
    ("ShareGPT", {"conversations": SHARED}, PLAIN),
    ("ShareGPT with null columns", {"conversations": [{**t, "role": None} for t in SHARED]}, PLAIN),
    ("a dialogue that is text", {"dialogue": "A: hi. B: ho.", "summary": "hi"}, "no known shape"),
    ("the answer beside its question's turn", {"messages": [TURNS[0]], "answer": A, "reasoning": "so it is"}, (Q, "so it is", A)),
    ("a conversation that ends with the user", {"messages": [*TURNS, TURNS[0]]}, "question without an answer"),
    ("two questions in a row", {"messages": [TURNS[0], *TURNS]}, "mixed roles"),
    ("an unknown speaker", {"messages": [{"role": "narrator", "content": "x"}, *TURNS]}, "unknown role"),
    ("only a system message", {"messages": [{"role": "system", "content": "x"}]}, "mixed roles"),
    ("two system messages", {"system": "a", "messages": [{"role": "system", "content": "b"}, *TURNS]}, "two system messages"),
    # contents
    ("parts of text", _parts(TEXT), PLAIN),
    ("text and an image", _parts(TEXT, {"type": "image_url", "image_url": {"url": "x"}}), PLAIN),
    ("an image alone", _parts({"type": "image_url", "image_url": {"url": "x"}}), "content is not text"),
    ("Anthropic's thinking part", _asked([{"type": "thinking", "thinking": "so"}, {"type": "text", "text": A}]), (Q, "so", A)),
    ("null content", _asked(None), "empty answer"),
    ("null content, cut in its thought", _asked(None, reasoning="so and"), (Q, "so and", "")),
    ("a refusal", _asked(None, refusal="I cannot."), "refusal"),
    ("a thought twice", _asked("<think>so it is</think>5", reasoning_content="so it is"), (Q, "so it is", A)),
    # tools
    ("an answer that also calls a tool", _asked(A, tool_calls=CALL), PLAIN),
    ("a call instead of an answer", _asked(None, tool_calls=CALL), "tool call without an answer"),
    ("a tool's result", {"messages": [TURNS[0], {"role": "assistant", "content": "", "tool_calls": CALL}, {"role": "tool", "content": "4"}, TURNS[1]]}, "tool turns"),
    ("ShareGPT's function_call", {"conversations": [SHARED[0], {"from": "function_call", "value": "{}"}, {"from": "observation", "value": "4"}, SHARED[1]]}, "tool turns"),
    # labels that are named like thoughts
    ("reasoning: off", {"input": Q, "output": A, "reasoning": "off"}, PLAIN),
    ("reasoning: on, the thought in the text", {"input": Q, "output": "<think>so</think>5", "reasoning": "on"}, (Q, "so", A)),
    ("thinking: true", {"prompt": Q, "response": A, "thinking": True}, PLAIN),
    ("think: false", {"prompt": Q, "think": False, "answer": A}, PLAIN),
    ("reasoning: high", {"prompt": Q, "response": A, "reasoning": "high"}, PLAIN),
    ("reasoning: {effort: low}", {"prompt": Q, "response": A, "reasoning": {"effort": "low"}}, PLAIN),
    ("a thought that is one", {"prompt": Q, "response": A, "reasoning": "Five."}, (Q, "Five.", A)),
    # values
    ("the answer is 0", {"question": "2-2?", "response": "\\boxed{0}", "answer": 0}, ("2-2?", "", "\\boxed{0}", "0")),
    ("the answer is 0.0", {"question": "2-2?", "response": "0", "answer": 0.0}, ("2-2?", "", "0", "0.0")),
    ("the answer is false", {"question": "Is 91 prime?", "answer": False}, ("Is 91 prime?", "", "False")),
    ("the response is 0", {"question": "2-2?", "response": 0, "answer": "0"}, ("2-2?", "", "0", "0")),
    ("a null reference", {"question": Q, "response": A, "answer": None}, PLAIN),
    ("NaN for the first of two answers", {"question": Q, "response": float("nan"), "answer": A}, PLAIN),
    ("a null answer", {"question": Q, "response": None}, "empty answer"),
    ("a blank question", {"question": " ", "response": A}, "empty prompt"),
    ("a list of references", {"question": Q, "response": A, "ground_truth": ["5"]}, (*PLAIN, "5")),
    ("two answers", {"question": Q, "responses": ["5", "6"], "response": ["5", "6"]}, "several answers"),
    ("half a surrogate pair", {"question": Q, "response": "\ud83d"}, "invalid UTF-8"),
    ("half a pair in another column", {"question": Q, "response": A, "note": "\ud83d"}, PLAIN),
    # shapes
    ("Alpaca", {"instruction": "Add.", "input": "2 3", "output": A}, ("Add.\n\n2 3", "", A)),
    ("names in capitals", {"Question": Q, "Complex_CoT": "so it is", "Response": A}, (Q, "so it is", A)),
    ("verl, to be answered", VERL, (Q, "", "", "5")),
    ("verl, answered", {**VERL, "response": A}, (*PLAIN, "5")),
    ("Llama-Nemotron", {"input": [TURNS[0]], "output": A, "category": "math", "reasoning": "off", "system_prompt": "detailed thinking off"}, PLAIN),
    ("prompt as turns beside a response", {**CHAT, "response": A}, PLAIN),
    ("TRL's prompt and completion", {**CHAT, "completion": [TURNS[1]]}, PLAIN),
    ("prompt as JSON text of turns", {"prompt": json.dumps([TURNS[0]]), "response": A}, PLAIN),
    ("OpenAI's batch, answered", {"messages": [TURNS[0]], "response": {"status_code": 200, "body": BODY}}, PLAIN),
    ("OpenAI's batch without its request", {"custom_id": "1", "response": {"status_code": 200, "body": BODY}}, "response without its prompt"),
    ("OpenAI's batch, the request alone", {"custom_id": "1", "body": {"messages": [TURNS[0]]}}, "request without its response"),
    ("OpenAI's batch, failed", {"custom_id": "1", "response": None, "error": {"code": 500}}, "teacher failed"),
    ("s1K", {"question": Q, "thinking_trajectories": ["so it is"], "attempt": A, "solution": "5"}, (Q, "so it is", A, "5")),
    ("a preference pair", {"prompt": Q, "chosen": A, "rejected": "6"}, "preference pair"),
    ("a question alone", {"question": Q}, "question without an answer"),
    ("text alone", {"text": "Once upon a time"}, "no known shape"),
    ("a number", 7, "not an object"),
    *((f"thought in {name}", {"prompt": Q, "response": text}, (Q, "so", A)) for name, text in THOUGHTS.items()),
]  # fmt: skip
# lines that no JSON writer makes
LINE = json.dumps({"prompt": Q, "response": A}).encode()
LINES: list[tuple[str, bytes, Any]] = [
    ("a byte-order mark in the middle", b"\xef\xbb\xbf" + LINE, PLAIN),
    ("a line of Windows", LINE + b"\r", PLAIN),
    ("two records on a line, the first", LINE + LINE, PLAIN),
    ("two records on a line, the second", b"", PLAIN),
    ("a comma at the end", LINE + b",", PLAIN),
    ("half a line", LINE[:20], "not JSON"),
    ("Latin-1", b'{"prompt": "caf\xe9", "response": "5"}', "invalid UTF-8"),
    ("a hole of NUL bytes", b"\0" * 40, "NUL bytes"),
    ("a key twice, differently", b'{"prompt": "a", "response": "1", "response": "2"}', "duplicate keys"),
    ("a key twice, the same", b'{"prompt": "What is 2+3?", "response": "5", "response": "5"}', PLAIN),
]  # fmt: skip


def write(folder: Path) -> dict[tuple[str, int], tuple[str, Any]]:
    """Write the files; what each record, by (file, index), is and should become."""
    expected: dict[tuple[str, int], tuple[str, Any]] = {}

    def put(name: str, data: bytes, *rows: tuple[str, Any]) -> None:
        (folder / name).write_bytes(data)
        expected.update({(name, i): row for i, row in enumerate(rows)})

    texts = [json.dumps(record).encode() for _, record, _ in RECORDS]
    put("records.jsonl", b"\n\n".join(texts), *((name, wanted) for name, _, wanted in RECORDS))
    lines = b"\n".join(line for _, line, _ in LINES if line)
    put("lines.jsonl", lines, *((name, wanted) for name, _, wanted in LINES))
    for mark, encoding in (("utf-8", "utf-8-sig"), ("UTF-16", "utf-16"), ("UTF-32", "utf-32")):
        what = f"a file that begins with the mark of {mark}"
        put(f"{mark}.jsonl", LINE.decode().encode(encoding), (what, PLAIN))
    whole, cut = (
        gzip.compress(LINE + b"\n", mtime=0),
        gzip.compress((LINE + b"\n") * 3 + bytes(2000), mtime=0),
    )
    put("members.jsonl.gz", whole + whole, ("gzip, a member", PLAIN), ("gzip, another", PLAIN))
    rows = [("gzip that was cut, a record", PLAIN)] * 3
    put("cut.jsonl.gz", cut[:-8], *rows, ("gzip that was cut, the cut", "file is cut"))
    put(
        "array.json",
        json.dumps([{"prompt": Q, "response": A}], indent=2).encode(),
        ("an array", PLAIN),
    )
    return expected


def outcomes(folder: Path) -> tuple[dict[tuple[str, int], Trace | str], DropCounts]:
    """What became of each record, by (file, index): the trace, or the reason of its drop."""
    report, found = DropCounts(), {}
    shown, counts.EXAMPLES = counts.EXAMPLES, 1000
    try:
        for file in sorted(folder.iterdir()):
            for trace in load(file, report=report):
                found[file.name, trace.metadata["index"]] = trace
    finally:
        counts.EXAMPLES = shown
    for reason, examples in report["load"].examples.items():
        for example in examples:
            found[example["file"], example["index"]] = reason
    return found, report


def main() -> None:
    with tempfile.TemporaryDirectory() as name:
        expected = write(Path(name))
        found, report = outcomes(Path(name))
    print(
        "| record | kept, or why not | question | thought | answer | reference |\n"
        + "|---" * 6
        + "|"
    )
    for place, (what, _) in expected.items():
        became = found[place]
        cells = [f"dropped: {became}", "", "", "", ""] if isinstance(became, str) else None
        if isinstance(became, Trace):
            texts = (became.prompt, became.think, became.answer, became.reference)
            cells = ["kept", *(text.replace("\n", " ") for text in texts)]
        print(f"| {what} | {' | '.join(cells or [])} |")
    counted = report["load"]
    lost = len(expected) - len(found)
    print(
        f"\n{counted.seen} in, {counted.kept} kept, {sum(counted.dropped.values())} dropped, {lost} lost"
    )


if __name__ == "__main__":
    main()
