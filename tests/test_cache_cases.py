"""The list of faults a teacher cache has to withstand, and the test of each.

case                                             | tests
1  killed in the middle of a shard               | test_cache_kill::test_three_kills, test_cache_kill::test_fifty_kills
2  temporary files of the killed                 | test_cache_faults::test_temporary_files_are_swept_by_the_next_writer, test_cache_faults::test_a_shard_published_just_before_a_kill_is_taken_in
3  truncated shard                               | test_cache_faults::test_truncated_shard
4  flipped bit in the data                       | test_cache_faults::test_flipped_bit_in_the_data, test_cache_attacks::test_random_damage_is_refused_or_without_effect
5  flipped bit or edit in the manifest           | test_cache_faults::test_flipped_bit_in_the_manifest, test_cache_attacks::test_hostile_values_anywhere_in_a_signed_manifest
6  missing, extra, swapped shards                | test_cache_faults::test_missing_shard, test_cache_faults::test_extra_shard_is_seen_by_verify_and_by_no_reader, test_cache_faults::test_swapped_shards, test_cache_faults::test_shard_of_another_cache
7  the writer's block raised                     | test_cache_faults::test_an_exception_commits_nothing_and_marks_the_cache
8  two writers on one folder                     | test_cache_faults::test_two_writers_of_one_rank, test_cache_faults::test_two_writers_on_one_shard_name
9  disk full                                     | test_cache_faults::test_disk_full, test_cache_faults::test_disk_full_in_the_middle_of_a_capture
10 read-only, no hard links, odd clocks          | test_cache_faults::test_a_read_only_folder_can_be_read, test_cache_faults::test_modification_times_do_not_matter, test_cache_cases::test_a_file_system_without_hard_links
11 huge header, a million tensors                | test_cache_faults::test_huge_header, test_cache_faults::test_headers_that_lie, test_cache_attacks::test_hostile_values_anywhere_in_a_signed_header
12 names and links that leave the folder         | test_cache_faults::test_paths_that_leave_the_folder, test_cache_faults::test_links_that_leave_the_folder
13 pickle                                        | test_cache_faults::test_no_pickle_is_ever_read, test_cache_faults::test_foreign_files
14 newer version, unknown features               | test_cache_faults::test_newer_version, test_cache_faults::test_unknown_required_feature, test_cache_faults::test_unknown_optional_field_is_no_error
15 tokenizer of another size                     | test_cache_core::test_a_mismatch_shows_both_sides, test_teachers_doctor::test_another_tokenizer
16 another tokenizer of the same size            | test_vocab_fingerprint::test_the_vocabulary_alone_does_not_tell_them_apart, test_vocab_fingerprint::test_a_difference_is_noticed_and_named
17 padded lm_head                                | test_cache_core::test_expectations_that_are_met, test_teachers_build::test_dead_columns_are_left_out_of_the_softmax
18 another teacher, revision or dtype            | test_teachers_build::test_another_model_is_refused_and_nothing_is_changed, test_cache_core::test_one_field_may_be_allowed_to_differ, test_teachers_doctor::test_another_teacher
19 text, template or packing changed             | test_cache_core::test_a_missing_sequence_is_named, test_teachers_doctor::test_truncated_and_changed_sequences, test_teachers_doctor::test_rows_off_by_one
20 k out of bounds, more than cached, fewer      | test_teachers_build::test_k_past_the_vocabulary_is_refused, test_cache_rows::test_asking_for_more_tokens_than_are_cached, test_cache_core::test_a_smaller_k_keeps_the_likeliest
21 ids past 16 bits                              | test_cache_codecs::test_ids_do_not_wrap, test_cache_attacks::test_signed_damage_never_gets_past_the_reader
22 NaN or +inf from the teacher                  | test_teachers_build::test_bad_logits_name_the_sequence_and_the_row
23 -inf from the teacher                         | test_cache_rows::test_minus_infinity_is_an_empty_slot, test_teachers_selection::test_fewer_live_logits_than_k, test_cache_cases::test_masked_teacher_tokens_reach_the_loss_as_zeros
24 non-finite student                            | test_cache_cases::test_a_student_that_is_not_finite_shows_in_the_loss, test_training_faults::test_a_loss_that_is_nan_stops_and_names_the_row
25 a batch or row without a trained token        | test_cache_cases::test_a_batch_without_a_trained_token, test_training_student::test_masked_batch_is_zero_with_a_graph
26 lengths of 0, 1 and too many                  | test_teachers_build::test_zero_and_over_length_sequences_are_refused, test_cache_rows::test_any_length, test_cache_rows::test_a_batch_that_is_too_short_is_refused
27 rows that are no distribution                 | test_cache_rows::test_bad_rows_are_named, test_cache_rows::test_verify_reads_every_row, test_teachers_doctor::test_values_of_another_temperature
28 little probability covered                    | test_teachers_doctor::test_low_coverage_is_warned_of
29 resumed by another number of ranks            | test_teachers_ranks::test_two_ranks_store_what_one_does, test_teachers_ranks::test_four_ranks_store_what_one_does, test_cache_cases::test_one_rank_goes_on_where_two_were_stopped
"""  # noqa: E501

import errno
import math
import os
import re
from pathlib import Path

import cache_cases as cases
import pytest
import torch

import kd
from kd.cache import CacheWriter, TeacherCache
from kd.teachers import build, build_cache
from kd.training import DistillationCollator, Objective, compute_loss, prepare_student

HERE = Path(__file__).parent


def test_every_case_has_a_test_that_exists():
    rows = re.findall(r"^(\d+) .*?\| (.+)$", __doc__, re.MULTILINE)
    assert [int(number) for number, _ in rows] == list(range(1, 30))
    for _, tests in rows:
        for item in tests.split(", "):
            file, name = item.split("::")
            assert f"\ndef {name}(" in (HERE / f"{file}.py").read_text(), item


@pytest.mark.parametrize("code", [errno.EPERM, errno.ENOTSUP, errno.EMLINK])
def test_a_file_system_without_hard_links(tmp_path, monkeypatch, code):
    def refuse(*_):
        raise OSError(code, os.strerror(code))

    monkeypatch.setattr(os, "link", refuse)
    items = cases.sequences(20)
    cache = cases.write(tmp_path, items, shard_tokens=64)
    assert len(cache) == 20 and len(cache.manifest.shards) > 1
    assert not [path for path in tmp_path.iterdir() if path.name.startswith(".tmp-")]


def cached_batch(folder, label=torch.clone):
    """A student, and a collated batch of three sequences with a teacher's cached rows."""
    sequences = cases.texts(3, seed=4, longest=12)
    cache = build_cache(cases.teacher(), sequences, folder, top_k=8, progress=False)
    rows = [{"input_ids": s, "labels": label(s)} for s in sequences]
    batch = DistillationCollator(pad_token_id=0, cache=cache)(rows)
    return prepare_student(cases.teacher(seed=1)), batch


def test_masked_teacher_tokens_reach_the_loss_as_zeros(tmp_path):
    """A teacher that allows three tokens: rows of three entries, a finite loss and gradient."""
    teacher = cases.teacher()
    allowed = torch.full((61,), -torch.inf)
    allowed[[5, 6, 60]] = 0.0
    teacher.lm_head.register_forward_hook(lambda module, args, logits: logits + allowed)
    sequences = cases.texts(2)
    cache = build_cache(teacher, sequences, tmp_path, top_k=8, progress=False)
    found = cache.batch(sequences, 40)
    assert set(found.ids.unique().tolist()) == {-1, 5, 6, 60}
    student = torch.randn(2, 40, 61, requires_grad=True)
    target = kd.TopK(found.ids, found.logprobs, found.tail, found.temperature)
    for divergence in ("forward_kl", "reverse_kl", kd.jsd(0.5)):
        loss = kd.distillation_loss(student, target, divergence=divergence, min_logprob=-30.0)
        (gradient,) = torch.autograd.grad(loss, student)
        assert math.isfinite(loss.item()) and bool(gradient.isfinite().all())


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_a_student_that_is_not_finite_shows_in_the_loss(tmp_path, value):
    """It is never hidden: the loss is no finite number, and the row can be named."""
    student, batch = cached_batch(tmp_path)
    objective = Objective(kd_weight=1.0, ce_weight=0.0)
    assert math.isfinite(compute_loss(student, batch, objective).item())
    with torch.no_grad():
        student.model.norm.weight[3] = value
    assert not math.isfinite(compute_loss(student, batch, objective).item())
    logits = student(input_ids=batch["input_ids"]).logits
    with pytest.raises(ValueError, match="check: student_logits must be finite, got .* at row"):
        kd.check("student_logits", logits)


def test_a_batch_without_a_trained_token(tmp_path):
    student, batch = cached_batch(tmp_path, lambda s: torch.full_like(s, -100))
    assert (batch["shift_labels"] == -100).all() and (batch["teacher_ids"] >= 0).any()
    loss = compute_loss(student, batch, Objective(kd_weight=0.5, ce_weight=0.5))
    loss.backward()
    assert loss.item() == 0
    assert all(p.grad is None or not p.grad.any() for p in student.parameters())


def test_a_row_without_a_trained_token_adds_nothing(tmp_path):
    objective = Objective(kd_weight=0.5, ce_weight=0.5)
    _, batch = cached_batch(tmp_path)
    batch["shift_labels"][1] = -100
    gradients = []
    for rows in ([0, 1, 2], [0, 2]):
        student = prepare_student(cases.teacher(seed=1))
        compute_loss(student, {k: v[rows] for k, v in batch.items()}, objective).backward()
        gradients.append(torch.cat([p.grad.flatten() for p in student.parameters()]))
    assert torch.allclose(*gradients, atol=1e-6)


def test_one_rank_goes_on_where_two_were_stopped(tmp_path, monkeypatch):
    """Which batches exist depends on the sequences alone, not on who computed them before."""
    options = {"top_k": 8, "batch_tokens": 60, "shard_tokens": 100, "progress": False}
    sequences = cases.texts(40, seed=3)
    whole = build_cache(cases.teacher(), sequences, tmp_path / "whole", **options)
    monkeypatch.setattr(build, "_wait_for_all", lambda world: None)
    monkeypatch.setenv("WORLD_SIZE", "2")
    monkeypatch.setenv("RANK", "0")
    build_cache(cases.teacher(), sequences, tmp_path / "cache", limit=25, **options)
    monkeypatch.setenv("RANK", "1")
    monkeypatch.setattr(CacheWriter, "__exit__", die)
    with pytest.raises(ValueError, match="must have ended"):
        build_cache(cases.teacher(), sequences, tmp_path / "cache", limit=25, **options)
    monkeypatch.undo()
    with pytest.raises(ValueError, match="capture of .* must have ended, got writers of rank .1"):
        TeacherCache(tmp_path / "cache")
    build_cache(cases.teacher(), sequences, tmp_path / "cache", **options)
    found = TeacherCache(tmp_path / "cache")
    assert found.content_digest() == whole.content_digest() and len(found) == 40


def die(self, kind, error, trace):
    """What a kill leaves: published shards, an open writer, no lock."""
    self._thread.shutdown(cancel_futures=True)
    self._lock.release()
