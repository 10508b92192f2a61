"""Files as they come: marked, packed, cut, damaged, misnamed; what is readable is kept and the
rest is counted. And written: whatever a trace holds, the file appears."""

import bz2
import datetime
import gzip
import itertools
import json
import tempfile
import warnings
from pathlib import Path

import pyarrow
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from pyarrow import parquet

from kd.traces import DropCounts, JsonlTraces, Trace, load, write_traces
from kd.traces.records import is_lines, read_records

LINES = ['{"prompt": "q%d", "response": "\u00e9"}' % i for i in range(1, 5)]  # noqa: UP031
TEXT = "\n".join(LINES) + "\n"


def loaded(path):
    """(prompts kept, reason to count) of a file or folder."""
    report = DropCounts()
    kept = [trace.prompt for trace in load(path, report=report)]
    counted = report["load"]
    assert counted.seen == len(kept) + sum(counted.dropped.values())
    return kept, counted.dropped


def zstd(data):
    return pyarrow.Codec("zstd").compress(data, asbytes=True)


@pytest.mark.parametrize(
    "data",
    [
        TEXT.encode("utf-8-sig"),
        TEXT.encode("utf-16"),
        TEXT.encode("utf-16-le"),
        TEXT.encode("utf-16-be"),
        TEXT.encode("utf-32"),
        TEXT.replace("\n", "\r\n").encode("utf-16"),
        TEXT.replace("\n", "\r\n").encode(),
        TEXT.replace("\n", "\r").encode(),
        TEXT.replace("\n", "\n\n \n").encode(),
        TEXT.replace("\n", "").encode(),
        TEXT.rstrip("\n").replace("\n", ",\n").encode(),
        f"[{TEXT.rstrip().replace(chr(10), ', ')}]".encode(),
        f"[{TEXT.rstrip().replace(chr(10), ',' + chr(10))}]".encode(),
        json.dumps([json.loads(line) for line in LINES], indent=2).encode(),
        "\n".join(json.dumps(json.loads(line), indent=1) for line in LINES).encode(),
        json.dumps({"data": [json.loads(line) for line in LINES]}).encode(),
        json.dumps({"rows": [{"row": json.loads(line)} for line in LINES]}).encode(),
        json.dumps({"rows": [{"row": json.loads(line)} for line in LINES]}, indent=2).encode(),
        gzip.compress(TEXT.encode(), mtime=0),
        b"".join(gzip.compress(f"{line}\n".encode(), mtime=0) for line in LINES),
        gzip.compress(TEXT.encode(), mtime=0) + bytes(512),
        gzip.compress(TEXT.encode("utf-16"), mtime=0),
        zstd(TEXT.encode()),
        zstd(TEXT[:80].encode()) + zstd(TEXT[80:].encode()),
    ],
    ids=map(str, itertools.count()),
)
@pytest.mark.parametrize("name", ["x.jsonl", "x.json", "x.jsonl.gz", "x.jsonl.zst", "X.JSONL"])
def test_a_file_is_what_its_bytes_say_under_any_name(tmp_path, data, name):
    (tmp_path / name).write_bytes(data)
    assert loaded(tmp_path / name) == (["q1", "q2", "q3", "q4"], {})


BIG = "".join(
    json.dumps({"prompt": str(i), "response": f"{i * 7919}"}) + "\n" for i in range(20000)
)


@pytest.mark.parametrize("pack", [gzip.compress, zstd])
@pytest.mark.parametrize("share", [0.3, 0.9])
def test_packed_lines_that_were_cut_are_kept_up_to_the_cut(tmp_path, pack, share):
    packed = pack(BIG.encode())
    path = tmp_path / "cut.jsonl.gz"
    path.write_bytes(packed[: int(share * len(packed))])
    kept, dropped = loaded(path)
    assert kept == [str(i) for i in range(len(kept))] and len(kept) > 0.4 * share * 20000
    assert dropped == {"file is cut": 1}


def test_a_damaged_gzip_keeps_what_comes_before_the_damage(tmp_path):
    packed = bytearray(gzip.compress(BIG.encode(), mtime=0))
    packed[len(packed) // 2] ^= 0xFF
    (tmp_path / "x.jsonl.gz").write_bytes(packed)
    report = DropCounts()
    kept = list(load(tmp_path / "x.jsonl.gz", report=report))
    assert len(kept) > 4000 and "file is cut" in report["load"].dropped
    assert "what follows is lost" in report["load"].examples["file is cut"][0]["detail"]


@pytest.mark.parametrize(
    "data, kept, dropped",
    [
        (TEXT[:-20].encode(), 3, {"not JSON": 1}),
        (b'{"prompt": "a", "resp' + TEXT.encode(), 3, {"not JSON": 1}),
        (b"oops\n" + TEXT.encode(), 4, {"not JSON": 1}),
        (f"[{TEXT.rstrip().replace(chr(10), ',')}"[:-3].encode(), 3, {"not JSON": 1}),
        (f"[{LINES[0]},\n{{oops}},\n{LINES[1]}]".encode(), 2, {"not JSON": 1}),
        (b"\0" * 600 + TEXT.encode(), 4, {"NUL bytes": 1}),
        (TEXT.encode().replace(b"q2", b"q\0\0"), 3, {"NUL bytes": 1}),
        (TEXT.encode() + b"\0" * 50, 4, {"NUL bytes": 1}),
        (LINES[0].encode("utf-16")[:-3], 0, {"invalid utf-16-le": 1}),
        (TEXT.encode("utf-16")[:-3], 3, {"invalid utf-16-le": 1}),
        (TEXT.encode("latin-1"), 0, {"invalid UTF-8": 4}),
        (b'{"prompt": "a", "prompt": "b", "response": "c"}', 0, {"duplicate keys": 1}),
        (
            b'{"messages": [{"role": "user", "content": "a", "content": "b"}]}',
            0,
            {"duplicate keys": 1},
        ),
        (b"", 0, {}),
    ],
)
def test_what_cannot_be_read_costs_itself_alone(tmp_path, data, kept, dropped):
    (tmp_path / "x.jsonl").write_bytes(data)
    found = loaded(tmp_path / "x.jsonl")
    assert (len(found[0]), found[1]) == (kept, dropped)


def test_a_folder_names_the_data_that_it_does_not_read(tmp_path):
    (tmp_path / "a.jsonl").write_text(TEXT)
    (tmp_path / "b.csv").write_text("prompt,response\na,b\n")
    (tmp_path / "c.jsonl.bz2").write_bytes(bz2.compress(TEXT.encode()))
    (tmp_path / "d.parquet").write_bytes(b"PAR1 cut")
    (tmp_path / "README.md").write_text("not data")
    kept, dropped = loaded(tmp_path)
    assert len(kept) == 4 and dropped == {"file not read": 3}
    with pytest.raises(ValueError, match=r"must end with .*got c.jsonl.bz2. Rename or convert"):
        list(read_records(tmp_path / "c.jsonl.bz2"))


def test_null_columns_of_parquet_are_absent(tmp_path):
    table = pyarrow.table(
        {
            "prompt": ["a", "b", None],
            "think": pyarrow.nulls(3),
            "response": ["1", None, "3"],
            "messages": pyarrow.nulls(3, pyarrow.list_(pyarrow.string())),
            "ground_truth": [0, 1, 2],
        }
    )
    parquet.write_table(table, tmp_path / "x.parquet")
    report = DropCounts()
    (trace,) = load(tmp_path / "x.parquet", report=report)
    assert (trace.prompt, trace.think, trace.answer, trace.reference) == ("a", "", "1", "0")
    assert report["load"].dropped == {"empty answer": 1, "empty prompt": 1}


def test_a_damaged_row_group_loses_its_rows_and_counts_them(tmp_path):
    table = pyarrow.table({"prompt": [f"q{i}" for i in range(40)], "response": ["a" * 200] * 40})
    path = tmp_path / "x.parquet"
    parquet.write_table(table, path, row_group_size=10, compression="zstd", use_dictionary=False)
    data = bytearray(path.read_bytes())
    at = parquet.ParquetFile(path).metadata.row_group(1).column(0).data_page_offset
    data[at : at + 60] = bytes(60)
    path.write_bytes(data)
    kept, dropped = loaded(path)
    assert kept == [f"q{i}" for i in range(40) if not 10 <= i < 20]
    assert dropped == {"damaged Parquet": 10}


@settings(max_examples=300, deadline=None)
@given(
    st.lists(
        st.sampled_from([*b'{}[]",:\n\r\0\xff 1a', 0xEF, 0xBB, 0xBF, 0x1F, 0x8B]), max_size=60
    ).map(bytes),
    st.sampled_from([bytes, gzip.compress, zstd]),
    st.integers(0, 400),
)
def test_no_bytes_whatsoever_stop_a_load(data, pack, cut):
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "x.jsonl"
        path.write_bytes(pack(data + LINES[0].encode() + data)[:cut])
        kept, dropped = loaded(path)
    if cut == 400 and pack is not bytes:
        assert kept or dropped


ODD = [
    "half a pair \ud83d",
    "the other half \ude00",
    "a pair in two halves \ud83d\ude00",
    "\x00 and \x1b and \u2028",
]


@pytest.mark.parametrize("suffix", [".jsonl", ".jsonl.gz", ".parquet"])
@pytest.mark.parametrize(
    "field", ["prompt", "think", "answer", "system", "metadata", "deep", "key"]
)
def test_no_text_stops_a_write(tmp_path, suffix, field):
    traces = [Trace(f"q{i}", "t", "a") for i in range(300)]
    for i, text in enumerate(ODD):
        held = {"metadata": text, "deep": [{"x": [text]}], "key": {text: 1}}
        odd = {"metadata": {"note": held[field]}} if field in held else {field: text}
        traces[i * 70] = traces[i * 70].replace(**odd)
    path = tmp_path / f"x{suffix}"
    with pytest.warns(UserWarning, match=r"lone surrogates in 3 of 300 rows .* written as U\+FFFD"):
        assert write_traces(path, traces) == 300
    kept, dropped = loaded(path)
    assert len(kept) == 300 and not dropped
    if field == "answer":
        answers = [list(load(path))[i * 70].answer for i in range(4)]
        assert answers == [
            "half a pair \ufffd",
            "the other half \ufffd",
            "a pair in two halves \U0001f600",
            ODD[3],
        ]


@pytest.mark.parametrize("suffix", [".jsonl", ".parquet"])
def test_metadata_that_json_cannot_hold_is_written_as_text(tmp_path, suffix):
    day = datetime.date(2026, 11, 1)
    row = {"prompt": "q", "response": "a", "images": [{"bytes": b"\x89PNG"}], "when": [day]}
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        write_traces(tmp_path / f"x{suffix}", load([row]))
    (trace,) = load(tmp_path / f"x{suffix}")
    assert trace.metadata["images"] == [{"bytes": "<4 bytes>"}]
    assert trace.metadata["when"] == ["2026-11-01"]


def test_lines_that_hold_no_trace_are_counted_when_a_file_is_mixed(tmp_path):
    path = tmp_path / "x.jsonl"
    path.write_text(TEXT + "oops\n[1]\n" + LINES[0] + LINES[1] + "\n")
    report = DropCounts()
    held = JsonlTraces(path, report=report)
    assert [trace.prompt for trace in held] == ["q1", "q2", "q3", "q4"]
    assert report["load"].dropped == {"not JSON": 2, "not an object": 1}
    assert is_lines(path)
    path.write_bytes(TEXT.encode("utf-8-sig"))
    assert not is_lines(path)
