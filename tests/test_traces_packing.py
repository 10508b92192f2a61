"""Packing: rows are full, every sequence is whole and once, and neighbours cannot be seen."""

import random

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from traces_cases import tiny_model

from kd.traces import best_fit, collate_packs, efficiency, isolates_documents, pack


@given(st.lists(st.integers(0, 50), max_size=60), st.integers(50, 120))
def test_every_sequence_is_packed_once_and_no_row_overflows(lengths, capacity):
    rows = best_fit(lengths, capacity)
    assert sorted(i for row in rows for i in row) == list(range(len(lengths)))
    sums = [sum(lengths[i] for i in row) for row in rows]
    assert all(total <= capacity for total in sums)
    # best fit decreasing: at most one row is half empty
    assert sum(total * 2 <= capacity for total in sums) <= 1


def trace_like_lengths(count, seed=0):
    """Log-normal, as reasoning traces are: median 3,000 tokens, a long tail, cut at 16,384."""
    rng = random.Random(seed)
    return [min(16_384, max(30, int(rng.lognormvariate(8.0, 0.9)))) for _ in range(count)]


@pytest.mark.parametrize("capacity", [16_384, 32_768])
def test_rows_are_97_percent_full_on_trace_like_lengths(capacity):
    sequences = (([0] * length, [0] * length) for length in trace_like_lengths(2_000))
    packs = list(pack(sequences, capacity, window=500))
    full = efficiency(packs, capacity)
    assert full >= 0.97, full
    assert sum(len(made.lengths) for made in packs) == 2_000


def test_an_over_long_sequence_is_refused_by_index():
    with pytest.raises(
        ValueError, match=r"best_fit: lengths must be at most capacity \(4\), got 5"
    ):
        best_fit([3, 5], 4)


@pytest.mark.parametrize("attention", ["eager", "sdpa"])
def test_packed_losses_and_logits_equal_the_unpacked(attention):
    model = tiny_model(attention=attention).double()
    generator = torch.Generator().manual_seed(1)
    rendered = []
    for length in (17, 5, 30, 9, 22, 1, 13):
        ids = torch.randint(6, 320, (length,), generator=generator).tolist()
        rendered.append((ids, [-100] * (length // 3) + ids[length // 3 :]))
    packs = list(pack(rendered, 40))
    batch = collate_packs(packs, pad_token_id=0)
    with torch.no_grad():
        packed = model(**{**batch, "labels": None}).logits
    by_ids = {tuple(ids): labels for ids, labels in rendered}
    total, count = torch.zeros((), dtype=torch.float64), 0
    for row, made in enumerate(packs):
        start = 0
        for length in made.lengths:
            ids = made.input_ids[start : start + length]
            with torch.no_grad():
                alone = model(input_ids=torch.tensor([ids])).logits[0]
            assert torch.allclose(packed[row, start : start + length], alone, atol=1e-5, rtol=0)
            target = torch.tensor(by_ids[tuple(ids)])[1:]
            total += torch.nn.functional.cross_entropy(
                alone[:-1], target, reduction="sum", ignore_index=-100
            )
            count += int((target != -100).sum())
            start += length
    loss = torch.nn.functional.cross_entropy(
        packed[:, :-1].flatten(0, 1), batch["labels"][:, 1:].flatten(), ignore_index=-100
    )
    assert abs(loss - total / count) < 1e-5


@pytest.mark.parametrize("attention", ["eager", "sdpa"])
def test_a_flat_batch_has_no_padding_and_the_same_logits(attention):
    model = tiny_model(attention=attention)
    rendered = [(list(range(6, 6 + n)), list(range(6, 6 + n))) for n in (9, 8, 5, 4, 3)]
    packs = list(pack(rendered, 12))
    rows, flat = collate_packs(packs, 0), collate_packs(packs, 0, flat=True)
    assert flat["input_ids"].shape == (1, 29) and flat["cu_seq_lens_q"][-1] == 29
    with torch.no_grad():
        left = model(**{**rows, "labels": None}).logits
        right = model(**{**flat, "labels": None}).logits[0]
    sizes = [len(made.input_ids) for made in packs]
    for row, part in zip(left, right.split(sizes), strict=True):
        assert torch.allclose(row[: len(part)], part, atol=1e-5, rtol=0)


@pytest.mark.parametrize("broken", ["position_ids", "use_cache"])
def test_without_the_borders_or_with_a_cache_neighbours_do_leak(broken):
    """The tests above can fail: one long causal row gives other logits."""
    model = tiny_model()
    packs = list(pack([([7, 8, 9], [7, 8, 9]), ([10, 11], [10, 11])], 5))
    batch = {**collate_packs(packs, pad_token_id=0), "labels": None}
    with torch.no_grad():
        good = model(**batch).logits
        leaky = model(**{**batch, broken: {"position_ids": None, "use_cache": True}[broken]}).logits
    assert (good - leaky)[0, 3:].abs().max() > 1e-3


def test_models_that_mix_documents_are_found_out():
    model = tiny_model()
    assert isolates_documents(model)
    forward = model.forward
    model.forward = lambda **batch: forward(**{**batch, "position_ids": None})
    assert not isolates_documents(model)
