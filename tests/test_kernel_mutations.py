"""Defects put into the kernels on purpose: each must be caught by the test named for it.

A defect replaces one expression in the source that Triton's interpreter runs. Text that is not
found has gone stale and fails as well.
"""

import kernel_cases  # noqa: F401  before any kernel
import pytest
import test_kernel_dense as dense
import test_kernel_linear as linear_tests
import test_kernel_one_read as one_read
import test_kernel_shards as shard_tests
import test_kernel_sparse as sparse_tests
import test_kernel_sparse_one_read as sparse_one_read_tests
from loss_mutations import Mutation
from triton.runtime.interpreter import InterpretedFunction

from kd.losses import chunks, fused
from kd_kernels import (
    algebra,
    dense_one_read,
    dense_two_pass,
    head,
    scale,
    shard_rows,
    sparse_one_read,
    sparse_two_pass,
)

pytestmark = pytest.mark.filterwarnings("ignore:.*encountered:RuntimeWarning")  # numpy's -inf
EVERY = dense.test_every_divergence
KERNEL_DEFECTS = {
    "running sum not rescaled": (
        algebra.update_statistics, "total * shrink + tl", "total + tl", EVERY, "forward_kl", 1.0,
    ),
    "padding not masked": (
        algebra.load_logits, "columns < vocab, z,", "columns < limit, z,", dense.test_padding,
        "forward_kl", 65,
    ),
    "softmax's Jacobian left out": (
        algebra.logit_gradient, "h - softmax * h_sum", "h", EVERY, "jsd(0.5)", 1.0,
    ),
    "jsd's weights swapped": (
        algebra.terms, "((1.0 - beta) * LN2)", "(beta * LN2)", EVERY, "jsd(0.1)", 1.0,
    ),
    "0 * inf not stopped": (
        algebra.times, "tl.where(weight == 0.0, 0.0, weight * factor)", "weight * factor",
        dense.test_minus_infinity, "forward_kl",
    ),
    "soft cap's slope left out": (
        algebra.to_log2, "1.0 - capped * capped", "1.0", sparse_tests.test_softcap_and_scale,
    ),
    "gradient not divided by T": (
        dense_two_pass.dense_rows_two_pass, "kd * weight * gradient_scale / temperature",
        "kd * weight * gradient_scale", EVERY, "forward_kl", 2.0,
    ),
    "label not subtracted": (
        dense_two_pass.dense_rows_two_pass, "tl.where(columns == label, hard - 1.0, hard)", "hard",
        dense.test_hard_labels, "forward_kl", 1.0,
    ),
    "cross-entropy at the loss temperature": (
        dense_two_pass.dense_rows_two_pass, "z *= temperature", "z *= 1.0",
        dense.test_hard_labels, "forward_kl", 3.0,
    ),
    "masked rows computed": (
        dense_two_pass.dense_rows_two_pass, "if weight == 0.0:", "if weight < 0.0:",
        dense.test_masked_rows,
    ),
    "second segment's mass forgotten": (
        dense_one_read.dense_rows_one_read, "s_sum += s_sum_2", "s_sum += 0.0",
        one_read.test_every_divergence, "forward_kl", "two",
    ),
    "second segment stored over the first": (
        dense_one_read.dense_rows_one_read, "gradient, FIRST, vocab", "gradient, 0, vocab",
        one_read.test_every_divergence, "jsd(0.5)", "two",
    ),
    "adaptive_kl's head too large": (
        head.head_threshold, ">= head_mass", ">= 1.5 * head_mass", EVERY, "adaptive_kl", 1.0,
    ),
    "stored columns in the tail": (
        sparse_two_pass.without, 'tl.where(hits != 0, float("-inf"), z)', "z",
        sparse_tests.test_every_divergence, "forward_kl", "bucket",
    ),
    "a log-sum-exp rounded to its size": (
        sparse_two_pass.sparse_rows_two_pass, "(outcome - outcome_top) - log_sum", "outcome - lse",
        sparse_tests.test_saturated_student,
    ),
    "marks in half of each word": (
        sparse_one_read.mark_rows, "token & 31", "token & 15",
        sparse_one_read_tests.test_every_divergence, "jsd(0.5)", "bucket",
    ),
    "stored gradients not written": (
        sparse_one_read.store_slots, "mask=token >= 0", "mask=token > 1000",
        sparse_one_read_tests.test_every_divergence, "forward_kl", "bucket",
    ),
    "upstream gradient ignored": (
        scale.scale_in_place, "if scale == 1.0:", "if scale != 0.0:",
        linear_tests.test_reduced, "logits", {},
    ),
    "a shard's gap not rescaled": (
        shard_rows.fold_gap, "times(shrink, acc +", "(acc +",
        shard_tests.test_one_shard_is_the_plain_loss, "reverse_kl", "dense",
    ),
    "a shard's gradient without its shift": (
        shard_rows.shard_gradient_rows, "s - t - shift", "s - t",
        shard_tests.test_one_shard_is_the_plain_loss, "reverse_kl", "dense",
    ),
    "a shard's label not subtracted": (
        shard_rows.shard_gradient_rows, "tl.where(columns == label, hard - 1.0, hard)", "hard",
        shard_tests.test_one_shard_is_the_plain_loss, "jsd", "dense",
    ),
    "a shard's stored columns in the tail": (
        shard_rows.shard_statistics_rows, "if SLOTS > 0:\n            s = ",
        "if SLOTS < 0:\n            s = ",
        shard_tests.test_one_shard_is_the_plain_loss, "forward_kl", "sparse",
    ),
}  # fmt: skip


@pytest.mark.parametrize("name", KERNEL_DEFECTS)
def test_kernel_defect_is_caught(name, monkeypatch):
    kernel, old, new, caught_by, *arguments = KERNEL_DEFECTS[name]
    prepare = kernel.rewriter._prepare_source

    def mutated(lines):
        source = prepare(lines)
        assert source.count(old) == 1, f"stale: {old!r} occurs {source.count(old)} times"
        return source.replace(old, new)

    monkeypatch.setattr(kernel.rewriter, "_prepare_source", mutated)
    monkeypatch.delitem(InterpretedFunction.rewritten_fn, kernel.fn, raising=False)
    try:
        with pytest.raises(AssertionError):
            caught_by(*arguments)
        assert kernel.fn in InterpretedFunction.rewritten_fn  # the defect did run
    finally:
        InterpretedFunction.rewritten_fn.pop(kernel.fn, None)


HOST_DEFECTS = {
    "dW of the last chunk alone": Mutation(
        fused, "accumulate", "add=not first", "add=False", linear_tests.test_chunks_agree
    ),
}  # fmt: skip


@pytest.mark.parametrize("name", HOST_DEFECTS)
def test_host_defect_is_caught(name, monkeypatch):
    mutation = HOST_DEFECTS[name]
    monkeypatch.setattr(chunks, "INTERPRETER_BYTES", linear_tests.VOCAB * 10 * 2)
    mutation.apply(monkeypatch)
    with pytest.raises(AssertionError):
        mutation.caught_by(*mutation.arguments)
