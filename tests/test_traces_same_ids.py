"""What kd cache build captures is, id for id, what kd traces render makes and training reads."""

import importlib.util
import json
from functools import lru_cache

import pytest
import torch
from traces_cases import (
    CHATML_QWEN,
    LLAMA,
    QWEN3,
    R1_DISTILL,
    R1_PREFILLED,
    byte_tokenizer,
    tiny_model,
)

from kd.cache import TeacherCache
from kd.cli.main import main
from kd.teachers import build_cache
from kd.traces import Renderer, RenderError, Trace, render_rows
from kd.training import DistillationCollator

GEMMA = (  # merges nothing, has no system role of its own, ends turns its own way
    "{{ bos_token }}{% for message in messages %}<start_of_turn>"
    "{{ 'model' if message['role'] == 'assistant' else message['role'] }}\n"
    "{{ message['content'] | trim }}<end_of_turn>\n{% endfor %}"
    "{% if add_generation_prompt %}<start_of_turn>model\n{% endif %}"
)
MISTRAL = (  # ignores add_generation_prompt, and writes the system message into a question
    "{{ bos_token }}{% for message in messages %}{% if message['role'] == 'user' %}[INST] "
    "{% if loop.last and messages[0]['role'] == 'system' %}{{ messages[0]['content'] }}\n\n"
    "{% endif %}{{ message['content'] }}[/INST]{% elif message['role'] == 'assistant' %}"
    " {{ message['content'] }}{{ eos_token }}{% endif %}{% endfor %}"
)
DATED = "{{ bos_token }}Today is {{ strftime_now('%d %b %Y') }}.\n" + CHATML_QWEN
TEMPLATES = {
    "qwen2": (CHATML_QWEN, {}),
    "qwen3": (QWEN3, {"think_tokens": True}),
    "r1-distill": (R1_DISTILL, {"eos": "<|eos|>", "think_tokens": True}),
    "r1-prefilled": (R1_PREFILLED, {"eos": "<|eos|>"}),
    "llama": (LLAMA, {"eos": "<|eos|>", "bos": "<|im_start|>"}),
    "gemma": (GEMMA, {"eos": "<|eos|>", "bos": "<|im_start|>"}),
    "mistral": (MISTRAL, {"eos": "<|eos|>", "bos": "<|im_start|>"}),
    "dated": (DATED, {"bos": "<|eos|>"}),
}
THOUGHT = "Two and two.\n\nThat makes 4."
SAID = f"<think>\n{THOUGHT}\n</think>\n\nIt is **4**."
EARLIER = [{"role": "user", "content": "1+1?"}, {"role": "assistant", "content": "2"}]
ROWS = {
    "trace": {"prompt": "What is 2+2?", "think": THOUGHT, "answer": "It is **4**."},
    "messages": {
        "messages": [
            {"role": "system", "content": "Be brief."},
            {"role": "user", "content": "What is 2+2?"},
            {"role": "assistant", "content": SAID},
        ]
    },
    "history": {
        "messages": [
            *EARLIER,
            {"role": "user", "content": "And 2+2?"},
            {"role": "assistant", "content": SAID},
        ]
    },
    "pair": {"question": "What is two and two?", "response": SAID, "answer": 4},
    "reasoning": {
        "messages": [
            {"role": "user", "content": "So?"},
            {"role": "assistant", "content": "It is **4**.", "reasoning_content": THOUGHT},
        ]
    },
    "no-thought": {"prompt": "What is 2+2?", "response": "4"},
    "text": {"text": "The quick brown fox.\nIt jumps, 12 times."},
}


@lru_cache
def model():
    return tiny_model()


@pytest.fixture(params=TEMPLATES)
def tokenizer(request):
    template, options = TEMPLATES[request.param]
    return byte_tokenizer(template, **options)


@pytest.fixture
def folder(tmp_path, tokenizer):
    tokenizer.save_pretrained(tmp_path / "model")
    model().save_pretrained(tmp_path / "model")
    data = tmp_path / "data.jsonl"
    data.write_text("".join(json.dumps(row) + "\n" for row in ROWS.values()))
    return tmp_path


def kd(*arguments):
    return main(list(map(str, arguments)))


def rows_of(file):
    return [json.loads(line) for line in file.read_text().splitlines()]


@pytest.mark.parametrize("packed", [False, True], ids=["rows", "packs"])
def test_every_row_that_training_renders_is_in_the_cache(folder, tokenizer, packed, capsys):
    data, cache = folder / "data.jsonl", folder / "cache"
    options = ["--pack", 400] if packed else []
    teacher = ["--tokenizer", folder / "model"]
    assert kd("traces", "render", data, "-o", folder / "rows.jsonl", *teacher, *options) == 0
    build = ["cache", "build", "--teacher", folder / "model", "--output", cache, "--top-k", 4]
    assert kd(*build, "--data", data) == 0, capsys.readouterr().err
    rows, opened = rows_of(folder / "rows.jsonl"), TeacherCache(cache)
    batch = DistillationCollator(0, opened)(rows)  # looks every document up
    assert (batch["teacher_ids"][batch["shift_labels"] != -100] >= 0).all()
    documents = sum(len(row.get("lengths", [1])) for row in rows)
    assert documents == len(ROWS) == len(opened)
    # the thought is in what was captured, whatever the template does to thoughts
    texts = [tokenizer.decode(ids) for ids in opened.sequences()]
    assert sum(THOUGHT in text for text in texts) == 5
    # the rendered rows are the same data: nothing is captured again
    assert kd(*build, "--data", folder / "rows.jsonl") == 0
    assert len(TeacherCache(cache)) == len(ROWS)
    assert kd("cache", "doctor", cache, "--teacher", folder / "model", "--data", data) in (0, 1)
    assert f"{len(ROWS)} of {len(ROWS)}" in capsys.readouterr().out


def test_the_library_takes_the_same_records(folder, tokenizer):
    records = [*ROWS.values(), Trace("1+2?", "so", "3"), "plain text"]
    cache = build_cache(
        model(), records, folder / "cache", tokenizer=tokenizer, top_k=4, progress=False
    )
    for row in render_rows(records, Renderer(tokenizer)):
        assert row.input_ids in cache
    assert len(cache) == len(records)
    with pytest.raises(RenderError, match="must not contain special tokens"):
        list(render_rows([Trace("a<|im_end|>", "t", "b")], Renderer(tokenizer)))


def test_what_training_leaves_out_is_left_out_and_counted(folder, capsys):
    bad = [
        {"prompt": "a<|im_end|>", "response": "b"},
        {"title": "no shape"},
        {"messages": [{"role": "user", "content": "unanswered"}]},
        {"text": "  "},
    ]
    with (folder / "data.jsonl").open("a") as file:
        file.write("".join(json.dumps(row) + "\n" for row in bad) + "not json\n")
    data, cache = folder / "data.jsonl", folder / "cache"
    build = ["cache", "build", "--teacher", folder / "model", "--output", cache, "--top-k", 4]
    assert kd(*build, "--data", data) == 0
    shown = capsys.readouterr().out
    for reason in ("special token in the text", "no known shape", "empty text", "not JSON"):
        assert reason in shown
    assert len(TeacherCache(cache)) == len(ROWS)
    assert kd("traces", "render", data, "--tokenizer", folder / "model") == 0
    again = capsys.readouterr().out
    assert [line for line in shown.splitlines() if line.startswith("  - ")] == [
        line for line in again.splitlines() if line.startswith("  - ")
    ]
    (folder / "data.jsonl").write_text(json.dumps(bad[0]) + "\n")
    assert kd(*build[:-4], "--output", folder / "none", "--data", data) == 1
    assert "got none in" in capsys.readouterr().err


def padded(ids, side):
    filler, mask = [0] * 5, [1] * len(ids)
    if side == "right":
        return {"input_ids": ids + filler, "attention_mask": mask + [0] * 5}
    return {"input_ids": filler + ids, "attention_mask": [0] * 5 + mask}


A, B, C = [5, 6, 7], [8, 9], [10, 11, 12, 13]
PACKS = {
    "lengths": {"input_ids": A + B + C, "lengths": [3, 2, 4]},
    "positions": {"input_ids": A + B + C, "position_ids": [0, 1, 2, 0, 1, 0, 1, 2, 3]},
    "both": {
        "input_ids": A + B + C,
        "position_ids": [0, 1, 2, 0, 1, 0, 1, 2, 3],
        "lengths": [3, 2, 4],
    },
    "padded-pack": {"input_ids": A + B + C, "lengths": [3, 2, 4], "attention_mask": [1] * 9},
}


@pytest.mark.parametrize("row", PACKS.values(), ids=PACKS)
@pytest.mark.parametrize("kind", [list, torch.tensor], ids=["lists", "tensors"])
def test_packs_are_taken_apart_as_the_collator_does(row, kind, tmp_path):
    row = {name: kind(values) for name, values in row.items()}
    assert [found.input_ids for found in render_rows([row], None)] == [A, B, C]
    cache = build_cache(model(), [row], tmp_path / "cache", top_k=4, progress=False)
    assert len(cache) == 3 and all(ids in cache for ids in (A, B, C))
    DistillationCollator(0, cache)([{**row, "labels": row["input_ids"]}])


@pytest.mark.parametrize("side", ["left", "right"])
def test_padding_is_taken_off_as_the_collator_does(side, tmp_path):
    cache = build_cache(model(), [padded(C, side)], tmp_path / "c", top_k=4, progress=False)
    row = padded(C, side)
    DistillationCollator(0, cache)([{**row, "labels": row["input_ids"]}])
    assert C in cache and row["input_ids"] not in cache


@pytest.mark.parametrize(
    "row, words",
    [
        ({"input_ids": A + B, "lengths": [3, 3]}, "lengths must be positive and add up"),
        ({"input_ids": A + B, "position_ids": [1, 2, 3, 0, 1]}, "must count from 0"),
        ({"input_ids": A + B, "position_ids": [0, 1, 2]}, "position_ids must be as long as"),
        ({"input_ids": A + B, "attention_mask": [1, 1, 1, 2, 2]}, "attention_mask must be 1 on"),
        ({"input_ids": A + B, "attention_mask": [1, 0, 1, 1, 1]}, "attention_mask must be 1 on"),
        ({"input_ids": A + B, "seq_lengths": [3, 2]}, "Call the column lengths"),
        ({"input_ids": A + [0, 0], "lengths": [3], "attention_mask": [1, 1, 1, 0, 0]}, "all 1"),
    ],
)
def test_rows_that_the_collator_refuses_are_not_captured(row, words, tmp_path):
    with pytest.raises(ValueError, match=words):
        build_cache(model(), [row], tmp_path / "cache", top_k=4, progress=False)
    with pytest.raises(ValueError):
        DistillationCollator(0)([{**row, "labels": row["input_ids"]}])


def test_text_without_a_tokenizer_is_refused(tmp_path):
    with pytest.raises(ValueError, match="must have input_ids where there is no tokenizer"):
        build_cache(model(), ["text"], tmp_path / "cache", top_k=4, progress=False)


def test_texts_need_no_chat_template_and_begin_once(tmp_path):
    tokenizer = byte_tokenizer(None, bos="<|User|>")
    from tokenizers.processors import TemplateProcessing

    number = tokenizer.convert_tokens_to_ids("<|User|>")
    tokenizer.backend_tokenizer.post_processor = TemplateProcessing(
        single="<|User|> $A", special_tokens=[("<|User|>", number)]
    )
    ids = [tokenizer(text).input_ids for text in ("one", "two")]
    cache = build_cache(
        model(), ["one", {"text": "<|User|>two"}], tmp_path / "cache", tokenizer=tokenizer,
        top_k=4, progress=False,
    )  # fmt: skip
    assert ids[0] in cache and ids[1] in cache and ids[1].count(number) == 1
    with pytest.raises(ValueError, match="must have a chat template"):
        build_cache(
            model(), [Trace("q", "t", "a")], tmp_path / "other", tokenizer=tokenizer, top_k=4
        )


def test_ids_alone_need_no_template_that_works(one, tmp_path):
    """A template of images and text, say, that takes no plain text."""
    byte_tokenizer("{{ messages[0]['content'][0].text.nothing }}").save_pretrained(
        tmp_path / "model"
    )
    assert one("ids.jsonl", [{"input_ids": A}, {"input_ids": B + C, "lengths": [2, 4]}]) == 0
    assert len(TeacherCache(one.cache)) == 3
    assert one("a.jsonl", asked(1), "--append") == 1


@pytest.mark.skipif(importlib.util.find_spec("datasets") is None, reason="needs datasets")
def test_a_saved_dataset_is_read_row_by_row(folder):
    from datasets import Dataset

    from kd.teachers.data import TrainingData

    Dataset.from_list([{"input_ids": A}, {"input_ids": C}]).save_to_disk(folder / "saved")
    assert list(TrainingData(str(folder / "saved"), None)) == [A, C]


def test_the_students_template_is_used_where_it_differs(tmp_path, capsys):
    """A base model as teacher: its own template would give keys that training never looks up."""
    byte_tokenizer(R1_DISTILL).save_pretrained(tmp_path / "teacher")
    model().save_pretrained(tmp_path / "teacher")
    student = byte_tokenizer(CHATML_QWEN)
    student.save_pretrained(tmp_path / "student")
    (tmp_path / "data.jsonl").write_text(json.dumps(ROWS["trace"]) + "\n")
    build = ["cache", "build", "--teacher", tmp_path / "teacher", "--output", tmp_path / "cache"]
    build += ["--data", tmp_path / "data.jsonl", "--top-k", 4, "--tokenizer"]
    assert kd(*build, tmp_path / "student") == 0
    (row,) = render_rows(tmp_path / "data.jsonl", Renderer(student))
    assert row.input_ids in TeacherCache(tmp_path / "cache")
    other = byte_tokenizer(CHATML_QWEN)
    other.add_tokens(["<unheard of>"])
    other.save_pretrained(tmp_path / "other")
    assert kd(*build, tmp_path / "other") == 1
    assert "must have the teacher's vocabulary" in capsys.readouterr().err


# --- another file, the same file, another day -----------------------------------------------------


@pytest.fixture
def one(tmp_path):
    """A teacher, and a command that builds a cache of a file of rows."""
    byte_tokenizer(DATED, bos="<|eos|>").save_pretrained(tmp_path / "model")
    model().save_pretrained(tmp_path / "model")

    def build(name, rows=None, *options):
        if rows is not None:
            (tmp_path / name).write_text("".join(json.dumps(row) + "\n" for row in rows))
        arguments = ["--teacher", tmp_path / "model", "--output", tmp_path / "cache", "--top-k", 4]
        return kd("cache", "build", *arguments, "--data", tmp_path / name, *options)

    build.cache = tmp_path / "cache"
    return build


def asked(*numbers):
    return [
        {"prompt": f"{i}+{i}?", "think": "Let me see: one more.", "answer": str(2 * i)}
        for i in numbers
    ]


def test_other_data_is_added_only_when_told_and_both_are_named(one, capsys):
    assert one("a.jsonl", asked(1, 2, 3)) == 0
    before = {file.name: file.read_bytes() for file in one.cache.iterdir()}
    capsys.readouterr()
    assert one("b.jsonl", asked(3, 4, 5, 6)) == 1
    error = capsys.readouterr().err
    assert "cache holds 3 sequences of a.jsonl; b.jsonl has 4, of which 3 are not" in error
    assert "--append" in error
    assert {file.name: file.read_bytes() for file in one.cache.iterdir()} == before
    assert one("b.jsonl", None, "--append") == 0
    assert len(TeacherCache(one.cache)) == 6
    for name in ("a.jsonl", "b.jsonl"):  # both are known by then
        assert one(name) == 0
    assert kd("cache", "info", one.cache) == 0
    shown = capsys.readouterr().out
    assert "a.jsonl" in shown and "b.jsonl" in shown


def test_a_part_of_what_is_cached_needs_no_word(one, capsys):
    assert one("a.jsonl", asked(1, 2, 3)) == 0
    capsys.readouterr()
    assert one("part.jsonl", asked(2)) == 0
    assert "a system prompt to 1 traces" in capsys.readouterr().out  # though it was read twice
    assert one("shuffled.jsonl", asked(3, 1, 2)) == 0
    assert len(TeacherCache(one.cache)) == 3


def test_the_same_data_continues_whatever_its_name_and_limit(one, tmp_path):
    assert one("a.jsonl", asked(1, 2, 3), "--limit", 1) == 0
    assert one("a.jsonl") == 0
    (tmp_path / "moved.jsonl").write_bytes((tmp_path / "a.jsonl").read_bytes())
    assert one("moved.jsonl") == 0 and len(TeacherCache(one.cache)) == 3


def test_a_grown_file_and_an_unnamed_cache_are_other_data(one, tmp_path, capsys):
    assert one("a.jsonl", asked(1, 2)) == 0
    assert one("a.jsonl", asked(1, 2, 3)) == 1
    assert "holds 2 sequences of a.jsonl; a.jsonl has 3, of which 1 are" in capsys.readouterr().err
    manifest = TeacherCache(one.cache).manifest
    manifest.sources = []
    (one.cache / "manifest.json").write_bytes(manifest.to_bytes())
    assert one("a.jsonl") == 1
    assert "2 sequences of data it does not name" in capsys.readouterr().err


def test_another_date_is_another_rendering_and_is_shown(one, capsys):
    assert one("a.jsonl", asked(1), "--date", "2026-11-26") == 0
    assert "told 2026-11-26" in capsys.readouterr().out
    assert one("a.jsonl", None, "--date", "2026-11-27") == 1
    error = capsys.readouterr().err
    assert "rendered otherwise" in error and "2026-11-26" in error and "2026-11-27" in error
    assert one("a.jsonl", None, "--date", "2026-11-26") == 0
    assert kd("cache", "info", one.cache) == 0
    assert "told the date 2026-11-26" in capsys.readouterr().out
    teacher = ["--teacher", one.cache.parent / "model", "--data", one.cache.parent / "a.jsonl"]
    assert kd("cache", "doctor", one.cache, *teacher) in (0, 1)
    assert "1 of 1" in capsys.readouterr().out  # rendered with the cache's own date
    assert one("a.jsonl", None, "--date", "26.11.2026") == 1
    assert "date must be a day like 2026-01-31, got '26.11.2026'" in capsys.readouterr().err


def test_rows_say_themselves_which_day_they_were_told(one, tmp_path, capsys):
    assert one("a.jsonl", asked(1, 2), "--date", "2026-11-26") == 0
    folder, rows = tmp_path / "model", tmp_path / "rows.jsonl"
    options = ["--tokenizer", folder, "--date", "2026-11-27"]
    assert kd("traces", "render", tmp_path / "a.jsonl", "-o", rows, *options) == 0
    capsys.readouterr()
    assert one("rows.jsonl") == 1  # other ids than those of the day before
    assert one("rows.jsonl", None, "--append") == 0
    assert "told 2026" not in capsys.readouterr().out  # nothing was rendered
    assert [entry["rendering"]["date"] for entry in TeacherCache(one.cache).manifest.sources] == [
        "2026-11-26",
        "2026-11-27",
    ]


def test_long_rows_are_left_out_as_render_does(one, tmp_path, capsys):
    rows = [*asked(1, 2), {"prompt": "q" * 600, "response": "a"}]
    assert one("a.jsonl", rows) == 1  # longer than the teacher can read
    assert "at most 512 tokens" in capsys.readouterr().err
    assert one("a.jsonl", None, "--max-tokens", 300) == 0
    assert "longer than 300 tokens" in capsys.readouterr().out
    out, options = tmp_path / "rows.jsonl", ["--tokenizer", tmp_path / "model", "--max-tokens", 300]
    assert kd("traces", "render", tmp_path / "a.jsonl", "-o", out, *options) == 0
    assert [row["input_ids"] in TeacherCache(one.cache) for row in rows_of(out)] == [True, True]


def test_tags_and_template_options_are_recorded_and_found_again(one, tmp_path, capsys):
    """Qwen3 with its switch: what is captured with options is found by doctor and training."""
    template = CHATML_QWEN.replace(
        "assistant\n{% endif %}", "assistant\n{{ '<think></think>' if not thinks }}{% endif %}"
    )
    byte_tokenizer(template).save_pretrained(tmp_path / "model")
    assert one("a.jsonl", asked(1, 2)) == 1
    assert "chat template closes the thought" in capsys.readouterr().out
    options = ["--template-option", "thinks=true", "--tags", "compact"]
    assert one("a.jsonl", None, *options) == 0
    cache, data, folder = one.cache, tmp_path / "a.jsonl", tmp_path / "model"
    assert kd("cache", "doctor", cache, "--teacher", folder, "--data", data) in (0, 1)
    assert "2 of 2" in capsys.readouterr().out
    out = tmp_path / "rows.jsonl"
    assert kd("traces", "render", data, "-o", out, "--tokenizer", folder, *options) == 0
    assert all(row["input_ids"] in TeacherCache(cache) for row in rows_of(out))
    assert one("a.jsonl", None, "--template-option", "thinks=true") == 1
    assert "rendered otherwise" in capsys.readouterr().err
    assert one("a.jsonl", None, "--template-option", "thinks") == 1
    assert "must be NAME=VALUE" in capsys.readouterr().err


def test_tomorrow_finds_what_today_captured(one, tmp_path, monkeypatch):
    import datetime

    from transformers.utils import chat_template_utils

    assert one("a.jsonl", asked(1, 2)) == 0

    class Tomorrow(datetime.datetime):
        @classmethod
        def now(cls, tz=None):
            return datetime.datetime(2031, 5, 4, tzinfo=tz)

    monkeypatch.setattr(chat_template_utils, "datetime", Tomorrow)
    tokenizer = byte_tokenizer(DATED, bos="<|eos|>")
    said = [{"role": "user", "content": "q"}]
    assert "04 May 2031" in tokenizer.apply_chat_template(said, tokenize=False)  # the patch works
    model_folder = tmp_path / "model"
    out = tmp_path / "rows.jsonl"
    assert kd("traces", "render", tmp_path / "a.jsonl", "-o", out, "--tokenizer", model_folder) == 0
    rows = rows_of(out)
    assert all(row["input_ids"] in TeacherCache(one.cache) for row in rows)
    assert {row["date"] for row in rows} == {"2026-01-01"}
    DistillationCollator(0, TeacherCache(one.cache))(rows)
