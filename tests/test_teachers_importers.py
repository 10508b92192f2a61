"""Other tools' files become caches whose rows are aligned with ours."""

import json

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch

from kd.teachers.distillkit import Packed
from kd.teachers.importers import import_cache

LIVE = 1000


def big_endian_bits(values, width):
    """Integers as their bits, highest first, filled up to a byte."""
    bits = [(int(value) >> shift) & 1 for value in values for shift in range(width - 1, -1, -1)]
    return np.packbits(np.array(bits + [0] * (-len(bits) % 8), np.uint8))


def rows(length, k, seed=0):
    generator = torch.Generator().manual_seed(seed)
    top = (3 * torch.randn(length, LIVE, generator=generator)).log_softmax(-1).topk(k)
    return top.indices.numpy(), top.values.numpy()


def write_jsonl(path, records):
    path.write_text("".join(json.dumps(record) + "\n" for record in records))


def test_distillkit_exact_values(tmp_path):
    """All 12 values exact, differences from the one before: nothing is approximated."""
    config = {"d": LIVE, "k": 12, "exact_k": 12, "exact_dtype": "float32", "residual_bins": []}
    ids, logprobs = rows(6, 12)
    deltas = np.diff(logprobs, axis=1, prepend=0).astype("<f4")
    records = {
        "input_ids": pa.array([[5, 6, 7, 8, 9, 10]], pa.list_(pa.uint64())),
        "compressed_logprobs": [[row.view(np.uint8).tolist() for row in deltas]],
        "bytepacked_indices": [[big_endian_bits(row, 10).tolist() for row in ids]],
    }
    pq.write_table(pa.table(records), tmp_path / "a.parquet")
    cache = import_cache(
        tmp_path / "a.parquet", tmp_path / "cache", layout="distillkit", live_vocab=LIVE,
        teacher="t", codec="float32", compression=config,
    )  # fmt: skip
    found = cache.lookup([5, 6, 7, 8, 9, 10])
    assert np.array_equal(found.ids.numpy(), ids)
    np.testing.assert_allclose(found.logprobs.numpy(), logprobs, atol=1e-5)


def test_distillkit_polynomials_and_residual_bins():
    """Values made from known coefficients and integers come back as those."""
    config = {
        "d": 151_936, "k": 10, "exact_k": 2, "exact_dtype": "bfloat16",
        "polynomial_terms": [0, 1, "sqrt"], "term_dtype": "float32", "delta_encoding": False,
        "residual_bins": [{"scale_dtype": "float16", "element_bits": 3, "num_elements": 5}],
    }  # fmt: skip
    exact = np.array([-0.5, -1.25], "<f4")  # both exact in bfloat16
    terms = np.array([-3.0, -0.25, -0.5], "<f4")
    numbers = np.array([0, 7, 4, 3, 1])
    data = np.concatenate([
        (exact.view(np.uint32) >> 16).astype("<u2").view(np.uint8), terms.view(np.uint8),
        np.array([0.25], "<f2").view(np.uint8), big_endian_bits(numbers, 3),
    ])  # fmt: skip
    packed = Packed(config, 151_936)
    assert packed.value_bytes() == len(data) == 2 * 2 + 3 * 4 + 2 + 2
    at = np.arange(8)
    wanted = -3.0 - 0.25 * at - 0.5 * np.sqrt(at)
    wanted[:5] += (numbers - 4) * 0.25
    np.testing.assert_allclose(packed.logprobs(data[None])[0], [-0.5, -1.25, *wanted], rtol=1e-6)
    ids = np.array([151_935, 0, 7, 65_536, 32_768, 5, 6, 8, 9, 10])
    assert packed.ids(big_endian_bits(ids, 18)[None])[0].tolist() == ids.tolist()


@pytest.mark.parametrize(
    ("change", "words"),
    [({"k": 13}, "must be .* bytes with this compression, got"), ({"d": 3000}, "must be")],
)
def test_distillkit_with_another_configuration_is_refused(tmp_path, change, words):
    config = {"d": LIVE, "k": 12, "exact_k": 12, "residual_bins": [], "delta_encoding": False}
    ids, logprobs = rows(2, 12)
    record = {
        "input_ids": [5, 6],
        "compressed_logprobs": [row.astype("<f4").view(np.uint8).tolist() for row in logprobs],
        "bytepacked_indices": [big_endian_bits(row, 10).tolist() for row in ids],
    }
    write_jsonl(tmp_path / "a.jsonl", [record])
    options = {"layout": "distillkit", "live_vocab": LIVE, "teacher": "t"}
    with pytest.raises(ValueError, match=words):
        import_cache(
            tmp_path / "a.jsonl", tmp_path / "c", compression={**config, **change}, **options
        )
    with pytest.raises(ValueError, match="compression must be given for layout 'distillkit'"):
        import_cache(tmp_path / "a.jsonl", tmp_path / "c", **options)
    assert not (tmp_path / "c").exists()


def distillkit_record(config, ids, logprobs, tokens):
    """What DistillKit's compressor writes of values that are all exact."""
    values = logprobs
    if config.get("delta_encoding", True):
        values = np.diff(logprobs, axis=1, prepend=0)
    kind = {"float32": "<f4", "float16": "<f2"}[config.get("exact_dtype", "float32")]
    return {
        "input_ids": tokens,
        "compressed_logprobs": [row.astype(kind).view(np.uint8).tolist() for row in values],
        "bytepacked_indices": [big_endian_bits(row, 10).tolist() for row in ids],
    }


@pytest.mark.parametrize(
    "made, read",
    [
        ({"delta_encoding": True}, {"delta_encoding": False}),
        ({"delta_encoding": False}, {"delta_encoding": True}),
        ({"exact_dtype": "float16"}, {"exact_dtype": "bfloat16"}),
        ({"k": 12, "exact_k": 12}, {"exact_k": 6, "exact_dtype": "float64"}),
    ],
)
def test_distillkit_with_another_setting_of_the_same_size_is_refused(tmp_path, made, read):
    config = {"d": LIVE, "k": 12, "exact_k": 12, "residual_bins": [], "delta_encoding": False}
    ids, logprobs = rows(5, 12)
    record = distillkit_record({**config, **made}, ids, logprobs, [1, 2, 3, 4, 5])
    write_jsonl(tmp_path / "a.jsonl", [record])
    options = {"layout": "distillkit", "live_vocab": LIVE, "teacher": "t"}
    with pytest.raises(ValueError, match="record 0 .* is not the one the file was made with"):
        import_cache(
            tmp_path / "a.jsonl", tmp_path / "c", compression={**config, **made, **read}, **options
        )
    right = {"teacher": {"logprob_compressor": {**config, **made}}}  # as the whole YAML nests it
    cache = import_cache(
        tmp_path / "a.jsonl", tmp_path / "d", compression=right, codec="float32", **options
    )
    np.testing.assert_allclose(cache.lookup([1, 2, 3, 4, 5]).logprobs, logprobs, atol=2e-2)


def test_distillkit_captured_with_vllm_has_no_last_row(tmp_path):
    config = {"d": LIVE, "k": 12, "exact_k": 12, "residual_bins": []}
    ids, logprobs = rows(4, 12)
    record = distillkit_record(config, ids, logprobs, [1, 2, 3, 4, 5])
    write_jsonl(tmp_path / "a.jsonl", [record])
    cache = import_cache(
        tmp_path / "a.jsonl", tmp_path / "c", layout="distillkit", live_vocab=LIVE, teacher="t",
        codec="float32", compression=config,
    )  # fmt: skip
    found = cache.lookup([1, 2, 3, 4, 5])
    assert np.array_equal(found.ids[:4].numpy(), ids) and (found.ids[4] == -1).all()


def listed(ids, logprobs):
    """A server's prompt_logprobs: nothing for the first token, then rows for the next ones."""
    rows = zip(ids, logprobs, strict=True)
    return [None] + [
        {str(i): {"logprob": float(v)} for i, v in zip(*row, strict=True)} for row in rows
    ]


@pytest.mark.parametrize("place", ["top", "choice", "batch"])
def test_server_responses(tmp_path, place):
    ids, logprobs = rows(3, 4)
    tokens = [7, int(ids[0, 2]), int(ids[1, 0])]
    body = {"prompt_token_ids": tokens, "prompt_logprobs": listed(ids[:2], logprobs[:2])}
    choices = {"choices": [body], "model": "m"}
    record = {
        "top": body,
        "choice": choices,
        "batch": {"custom_id": "1", "response": {"status_code": 200, "body": choices}},
    }[place]
    write_jsonl(tmp_path / "a.jsonl", [record, {"choices": [{"text": "none"}]}])
    cache = import_cache(
        tmp_path / "a.jsonl", tmp_path / "cache", layout="logprobs", live_vocab=LIVE, teacher="t",
        codec="float32",
    )  # fmt: skip
    found = cache.lookup(tokens)
    assert np.array_equal(found.ids[:2].numpy(), ids[:2])  # element 1 is for the token after 7
    assert (found.ids[2] == -1).all()
    assert cache.manifest.counters == {"records_without_logprobs": 1}


@pytest.mark.parametrize(
    "change, words",
    [
        (lambda rows: [None] * 3, "row 0: it must be a mapping"),
        (lambda rows: [None, rows[2], rows[1]], "row 0: .* own next token"),
        (lambda rows: [rows[0], rows[1], {}], "row 1: .* own next token"),
        (lambda rows: [None, rows[1], {**rows[2], "4": {"logprob": 3.0}}], "of 4 must be at most"),
        (lambda rows: [None, rows[1], {**rows[2], "x": {"logprob": -3.0}}], "named 'N'"),
        (lambda rows: [None, rows[1], {**rows[2], "4": {"logprob": None}}], "must be a number"),
        (lambda rows: [None, rows[1], {**rows[2], str(LIVE): {"logprob": -9.0}}], "live_vocab"),
        (lambda rows: rows[:2], "one element a token .3., got 2"),
    ],
)
def test_a_servers_rows_are_not_believed(tmp_path, change, words):
    ids, logprobs = rows(3, 4)
    record = {
        "prompt_token_ids": [7, int(ids[0, 2]), int(ids[1, 0])],
        "prompt_logprobs": change(listed(ids[:2], logprobs[:2] - 0.5)),
    }
    write_jsonl(tmp_path / "a.jsonl", [record])
    with pytest.raises(ValueError, match=f"record 0 of .*{words}"):
        import_cache(
            tmp_path / "a.jsonl", tmp_path / "c", layout="logprobs", live_vocab=LIVE, teacher="t"
        )


@pytest.mark.parametrize("layout", ["logprobs", "axolotl"])
@pytest.mark.parametrize(
    "records",
    [
        [],
        [{"input_ids": [1, 2], "text": "no rows"}] * 3,
        [{"input_ids": [1, 2], "logprobs": [], "prompt_logprobs": []}],
        [{"custom_id": "1", "input_ids": [1], "response": {"status_code": 500, "body": None}}],
    ],
)
def test_an_import_of_nothing_is_an_error(tmp_path, layout, records):
    write_jsonl(tmp_path / "a.jsonl", records)
    for source in (tmp_path / "a.jsonl", tmp_path):
        with pytest.raises(
            ValueError, match=f"log-probabilities in .*, got none in {len(records)}"
        ):
            import_cache(source, tmp_path / "c", layout=layout, live_vocab=9, teacher="t")
    assert not (tmp_path / "c").exists()


def test_a_folder_without_data_is_an_error(tmp_path):
    (tmp_path / "readme.md").write_text("nothing")
    with pytest.raises(FileNotFoundError, match=r"must hold \.parquet, .* files, got readme.md"):
        import_cache(tmp_path, tmp_path / "c", layout="axolotl", live_vocab=9, teacher="t")
    (tmp_path / ".cache").mkdir()
    write_jsonl(tmp_path / ".cache" / "a.jsonl", [{}])  # the Hub's client keeps unfinished files so
    with pytest.raises(FileNotFoundError):
        import_cache(tmp_path, tmp_path / "c", layout="axolotl", live_vocab=9, teacher="t")


@pytest.mark.parametrize("kind", ["parquet", "arrow", "jsonl"])
def test_folders_in_folders_and_links_are_read(tmp_path, kind):
    """A dataset's repository: data/train-*.parquet, links to blobs, datasets' save_to_disk."""
    ids, logprobs = rows(3, 4)
    record = {"input_ids": [4, 5, 6], "target_token_ids": ids.tolist(),
              "target_logprobs": logprobs.tolist()}  # fmt: skip
    folder = tmp_path / "repository" / "data" / "deep"
    folder.mkdir(parents=True)
    blob = tmp_path / "blob"
    table = pa.Table.from_pylist([record])
    if kind == "parquet":
        pq.write_table(table, blob)
    elif kind == "arrow":
        with pa.ipc.new_stream(blob, table.schema) as stream:
            stream.write_table(table)
    else:
        write_jsonl(blob, [record])
    (folder / f"train-00000-of-00001.{kind}").symlink_to(blob)
    cache = import_cache(
        tmp_path / "repository", tmp_path / "cache", layout="axolotl", live_vocab=LIVE,
        teacher="t", codec="float32",
    )  # fmt: skip
    assert np.array_equal(cache.lookup([4, 5, 6]).ids[:2].numpy(), ids[1:])


@pytest.mark.parametrize(
    "row, words",
    [
        ([{"token": "7", "logprob": -1.0}], "named 'token_id:N'"),
        ([{"token": "token_id:x", "logprob": -1.0}], "named 'token_id:N'"),
        ([{"token": " the", "logprob": -1.0}], "named 'token_id:N'"),
        ([{"token": 7, "logprob": -1.0}], "named 'token_id:N'"),
        ([{"token": "token_id:7", "logprob": 0.5}], "of 7 must be at most 0, got 0.5"),
        ([{"token": "token_id:7", "logprob": float("nan")}], "must be at most 0, got nan"),
        ([{"token": "token_id:7", "logprob": None}], "must be numbers, got None"),
        ([{"token": "token_id:7", "logprob": -1.0}] * 2, "different, got 7 twice"),
        ([{"token": "token_id:7"}], "must have axolotl's columns"),
    ],
)
def test_axolotls_rows_are_not_believed(tmp_path, row, words):
    write_jsonl(tmp_path / "a.jsonl", [{"input_ids": [4, 5], "logprobs": [row]}])
    with pytest.raises(ValueError, match=words):
        import_cache(
            tmp_path / "a.jsonl", tmp_path / "c", layout="axolotl", live_vocab=LIVE, teacher="t"
        )


@pytest.mark.parametrize("form", ["columns", "lists"])
def test_axolotl_rows_move_up_by_one(tmp_path, form):
    """Axolotl's row t is the distribution of token t itself."""
    ids, logprobs = rows(4, 3)
    if form == "columns":
        record = {
            "input_ids": [4, 5, 6, 7],
            "target_token_ids": ids.tolist(),
            "target_logprobs": logprobs.tolist(),
            "target_mask": [[0] * 3, [1] * 3, [1] * 3, [1] * 3],
        }
    else:  # rows of the completion alone: the last three tokens
        record = {
            "input_ids": [4, 5, 6, 7],
            "logprobs": [
                [{"token": f"token_id:{i}", "logprob": float(v)} for i, v in zip(*row, strict=True)]
                for row in zip(ids[1:], logprobs[1:], strict=True)
            ],
        }
    write_jsonl(tmp_path / "a.jsonl", [record])
    cache = import_cache(
        tmp_path / "a.jsonl", tmp_path / "cache", layout="axolotl", live_vocab=LIVE, teacher="t",
        codec="float32",
    )  # fmt: skip
    found = cache.lookup([4, 5, 6, 7])
    assert np.array_equal(found.ids[:3].numpy(), ids[1:])
    np.testing.assert_array_equal(found.logprobs[:3].numpy(), logprobs[1:])
    assert (found.ids[3] == -1).all()


def test_rows_that_cannot_be_aligned_are_refused(tmp_path):
    options = {"layout": "axolotl", "live_vocab": LIVE, "teacher": "t"}
    record = {"input_ids": [4], "target_token_ids": [[1], [2]], "target_logprobs": [[-1], [-1]]}
    write_jsonl(tmp_path / "a.jsonl", [record])
    with pytest.raises(ValueError, match="at most one row a token .1., got 2"):
        import_cache(tmp_path / "a.jsonl", tmp_path / "c", **options)
    (tmp_path / "b.jsonl").write_text("{oops\n")
    with pytest.raises(ValueError, match="line 1 of .*b.jsonl must be JSON"):
        import_cache(tmp_path / "b.jsonl", tmp_path / "c", **options)
    with pytest.raises(ValueError, match="layout must be one of distillkit, logprobs, axolotl"):
        import_cache(tmp_path / "b.jsonl", tmp_path / "c", **{**options, "layout": "csv"})


def test_only_the_likeliest_are_kept_when_asked(tmp_path):
    ids, logprobs = rows(2, 5)
    record = {
        "input_ids": [1, 2], "target_token_ids": ids[:, ::-1].tolist(),
        "target_logprobs": logprobs[:, ::-1].tolist(),
    }  # fmt: skip
    write_jsonl(tmp_path / "a.jsonl", [record])
    cache = import_cache(
        tmp_path / "a.jsonl", tmp_path / "cache", layout="axolotl", live_vocab=LIVE, teacher="t",
        top_k=2, codec="float32",
    )  # fmt: skip
    assert cache.lookup([1, 2]).ids[0].tolist() == ids[1, :2].tolist()
