"""What a row may say, and that nothing a row says is ignored."""

import pytest
import torch
import training_cases as cases

from kd.training import DistillationCollator, DistillationTrainer, compute_loss, prepare_student

ROW = {"input_ids": [5, 6, 7, 8], "labels": [-100, -100, 7, 8]}
OTHER = {"input_ids": [9, 4, 3], "labels": [-100, 4, 3]}


def loss_of(rows, **options):
    return compute_loss(prepare_student(cases.student()), DistillationCollator(0, **options)(rows))


def same(batch, other):
    assert set(batch) == set(other)
    for key, value in batch.items():
        assert torch.equal(value, other[key]), key


@pytest.mark.parametrize("pad", [None, True, "0", 1.0, -1, object()])
def test_a_pad_token_that_is_none_is_refused(pad):
    with pytest.raises(ValueError, match="pad_token_id must be a token's number.*eos_token_id"):
        DistillationCollator(pad)
    assert DistillationCollator(torch.tensor(3)).pad_token_id == 3


@pytest.mark.parametrize("cache", ["/path", ["/path"], 7, [[cases.RandomCache()]]])
def test_a_cache_that_is_none_is_refused_before_the_first_batch(cache):
    with pytest.raises(TypeError, match=r"source must be a TeacherCache.*kd.cache.TeacherCache\("):
        DistillationCollator(0, cache)


@pytest.mark.parametrize(
    ("row", "missing"),
    [
        ({"text": "two and two"}, "'text'.*no input_ids or labels"),
        ({"input_ids": [1, 2], "completion_mask": [0, 1]}, "'completion_mask'.*no labels"),
        ({"labels": [1, 2], "tokens": [1, 2]}, "'tokens'.*no input_ids"),
        ({"input_ids": [1, 2], "labels": None}, "no labels"),
        ({}, "no input_ids or labels"),
    ],
)
def test_a_row_without_its_columns_says_which_it_has(row, missing):
    with pytest.raises(
        ValueError, match="rows must have input_ids and labels, got row 1.*" + missing
    ):
        DistillationCollator(0)([ROW, row])


def test_weights_may_be_in_any_row():
    """A row without weights counts 1 a token, wherever the first row with weights stands."""
    weighted = {**OTHER, "weights": [0.0, 0.5, 2.0]}
    for rows, expected in (
        ([ROW, weighted], [[1.0, 1, 1, 0], [0.5, 2, 0, 0]]),
        ([weighted, ROW], [[0.5, 2, 0, 0], [1.0, 1, 1, 0]]),
        ([{**ROW, "weights": None}, weighted], [[1.0, 1, 1, 0], [0.5, 2, 0, 0]]),
    ):
        assert DistillationCollator(0)(rows)["weights"].tolist() == expected
    every = [{**ROW, "weights": [1] * 4}, weighted]
    torch.testing.assert_close(loss_of([ROW, weighted]), loss_of(every))


@pytest.mark.parametrize(
    "weights",
    [[False, True, True, False], [0, 1, 1, 0], torch.tensor([0, 1, 1, 0]), [0.0, 1.0, 1.0, 0.0]],
)
def test_a_mask_is_a_weight(weights):
    batch = DistillationCollator(0)([{**ROW, "weights": weights}])
    assert batch["weights"].dtype == torch.float32
    assert batch["weights"].tolist() == [[1, 1, 0, 0]]


@pytest.mark.parametrize(
    "wrong", [[0, 1], [1.0] * 5, [0, -1, 1, 1], [0, float("nan"), 1, 1], [[1] * 4]]
)
def test_weights_that_are_none_are_refused(wrong):
    with pytest.raises(ValueError, match="weights must be"):
        DistillationCollator(0)([{**ROW, "weights": wrong}])


@pytest.mark.parametrize("left", [0, 3])
@pytest.mark.parametrize("right", [0, 2])
def test_padding_that_a_row_brings_is_taken_away(left, right):
    """Padded on either side, also with a pad that has a label: the batch of the bare row."""
    size = len(ROW["input_ids"])
    padded = {
        "input_ids": [8] * left + ROW["input_ids"] + [8] * right,
        "labels": [8] * left + ROW["labels"] + [8] * right,
        "weights": [9.0] * left + [0.5, 0.5, 2.0, 1.0] + [9.0] * right,
        "attention_mask": [0] * left + [1] * size + [0] * right,
    }
    bare = {**ROW, "weights": [0.5, 0.5, 2.0, 1.0]}
    cache = cases.RandomCache()
    same(
        DistillationCollator(0, cache)([padded, OTHER]),
        DistillationCollator(0, cache)([bare, OTHER]),
    )


@pytest.mark.parametrize(
    "row",
    [
        {**ROW, "attention_mask": [1, 0, 1, 1]},
        {**ROW, "attention_mask": [0, 0, 0, 0]},
        {**ROW, "attention_mask": [1, 1, 2, 2]},  # documents, as packers count them
        {**ROW, "attention_mask": [1, 1, 1]},
        {**ROW, "attention_mask": [0, 1, 1, 1], "lengths": [2, 2]},
    ],
)
def test_a_mask_that_cannot_be_honoured_is_refused(row):
    with pytest.raises(ValueError, match="attention_mask must be"):
        DistillationCollator(0)([row])


@pytest.mark.parametrize(
    "name",
    ["token_type_ids", "completion_mask", "assistant_masks", "special_tokens_mask", "seq_lengths"]
    + ["shift_labels", "pixel_values", "decoder_input_ids", "inputs_embeds", "label_ids"],
)
def test_columns_that_would_be_ignored_are_refused_by_name(name):
    with pytest.raises(ValueError, match=f"no column that would be ignored, got row 1 .*{name}"):
        DistillationCollator(0)([ROW, {**OTHER, name: [0, 1, 1]}])
    same(DistillationCollator(0)([{**ROW, name: None}]), DistillationCollator(0)([ROW]))


def test_columns_that_are_no_inputs_may_stay():
    more = {"id": 7, "text": "so", "domain": "maths", "start": 2, "prompt": "and"}
    same(DistillationCollator(0)([{**ROW, **more}]), DistillationCollator(0)([ROW]))


def test_positions_say_where_documents_begin():
    packed = {"input_ids": [5, 6, 7, 8, 9], "labels": [5, 6, 7, 8, 9]}
    told = DistillationCollator(0)([{**packed, "lengths": [2, 3]}])
    assert told["shift_labels"].tolist() == [[6, -100, 8, 9, -100]]
    for more in ({}, {"lengths": [2, 3]}):
        row = {**packed, "position_ids": [0, 1, 0, 1, 2], **more}
        same(DistillationCollator(0)([row]), told)
    plain = {**packed, "position_ids": [0, 1, 2, 3, 4]}
    same(DistillationCollator(0)([plain]), DistillationCollator(0)([packed]))
    for wrong in ([1, 2, 3, 4, 5], [0, 1, 1, 2, 3], [0, 2, 4, 6, 8]):
        with pytest.raises(ValueError, match="position_ids must count from 0"):
            DistillationCollator(0)([{**packed, "position_ids": wrong}])
    with pytest.raises(ValueError, match="position_ids must count from 0"):
        DistillationCollator(0)([{**plain, "lengths": [2, 3]}])


@pytest.mark.parametrize("labels", [[6, 7, 8, -100], [-100, 7, 8, -100], [-100, -100, 8, -100]])
def test_labels_that_were_shifted_before_are_refused(labels):
    with pytest.raises(ValueError, match="labels must be the row's own tokens.*do not shift"):
        DistillationCollator(0)([{**ROW, "labels": labels}])


def test_labels_of_ones_own_are_allowed():
    """Other tokens than the row's, where they are no shift: a user's own decision."""
    batch = DistillationCollator(0)([{**ROW, "labels": [-100, 2, 3, 4]}])
    assert batch["shift_labels"].tolist() == [[2, 3, 4, -100]]
    repeated = {"input_ids": [5, 5, 5], "labels": [5, 5, 5]}  # equal to its own shift
    assert DistillationCollator(0)([repeated])["shift_labels"].tolist() == [[5, 5, -100]]


@pytest.mark.parametrize("ids", [[], [[1, 2]], 3])
def test_a_row_is_one_sequence(ids):
    with pytest.raises(ValueError, match="input_ids must be a list of at least one token"):
        DistillationCollator(0)([{"input_ids": ids, "labels": ids}])


def test_the_trainers_collator_is_ours(tmp_path):
    """Without one given, HF rows train on the next token: the model's own loss."""
    rows = [ROW, {**OTHER, "input_ids": [9, 4, 3, 2], "labels": [-100, 4, 3, 2]}]
    student = cases.student()
    batch = {key: torch.tensor([row[key] for row in rows]) for key in ROW}
    own = student(**batch).loss.item()
    trainer = DistillationTrainer(
        student, cases.arguments(tmp_path), train_dataset=rows, eval_dataset=rows
    )
    assert isinstance(trainer.data_collator, DistillationCollator)
    assert trainer.evaluate()["eval_loss"] == pytest.approx(own, rel=1e-5)
    trainer.train()
    assert trainer.state.log_history[-2]["loss"] == pytest.approx(own, rel=1e-5)


def test_the_pad_token_comes_from_tokenizer_or_model(tmp_path):
    class Tokenizer:
        pad_token_id = 9

    class Processor:
        tokenizer = Tokenizer()

    def collator(student, **options):
        return DistillationTrainer(student, cases.arguments(tmp_path), **options).data_collator

    student = cases.student()
    for given in (Tokenizer(), Processor()):
        assert collator(student, processing_class=given).pad_token_id == 9
    student.config.pad_token_id, student.generation_config.pad_token_id = 3, 4
    assert collator(student).pad_token_id == 4
    student.generation_config.pad_token_id = None
    assert collator(student).pad_token_id == 3
    for none in (None, -1):
        student.config.pad_token_id = none
        with pytest.raises(ValueError, match="neither processing_class nor the model.*pad token"):
            collator(student)
