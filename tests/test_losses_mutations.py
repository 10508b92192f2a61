"""Defects put into the losses on purpose: each must be caught by the test that is named for it.

A mutation whose text is not found has gone stale and fails as well: the list then no longer says
what it claims. How they are put in: loss_mutations.py.
"""

import pytest
import test_losses_alignment as alignment
import test_losses_bounds as bounds
import test_losses_graphs as graphs
import test_losses_oracle as oracle
import test_losses_precision as precision
import test_losses_properties as properties
import test_losses_rows as rows
import test_losses_scale as scale
import test_losses_tails as tails
import torch
from loss_mutations import (
    CollatorDefect,
    Mutation,
    mask_every_pad,
    run,
    targets_by_position,
    targets_on_the_right,
    targets_one_late,
    unshift_labels,
)

from kd.losses import (
    api,
    autograd,
    checks,
    divergences,
    fused,
    rows_torch,
    sparse,
)
from kd.losses import (
    oracle as float64_oracle,
)
from kd.training import trainer


def edit(name, module, function, old, new, caught_by, *arguments, otherwise=()):
    made = Mutation(module, function, old, new, caught_by, arguments, otherwise)
    return pytest.param(made, id=name)


def oracle_case(name, teacher="logits", student="logits"):
    return (oracle.test_float64_agrees_with_the_oracle, name, teacher, student)


ALIGNED = alignment.test_teacher_rows_are_aligned_with_the_labels
MUTATIONS = [
    *(
        pytest.param(CollatorDefect(spoil, caught_by), id=name)
        for name, spoil, caught_by in (
            (
                "labels unshifted",
                unshift_labels,
                alignment.test_completion_mask_is_shifted_with_its_labels,
            ),
            ("cache rows one position late", targets_one_late, ALIGNED),
            ("cache rows aligned on the right", targets_on_the_right, ALIGNED),
            (
                "cache rows in another order than the batch",
                targets_by_position,
                alignment.test_targets_follow_their_sequence_under_shuffling,
            ),
            (
                "every pad id masked",
                mask_every_pad,
                alignment.test_stop_token_is_learnt_when_pad_is_eos,
            ),
        )
    ),
    edit(
        "T**2 missing in the dense gradient",
        *(rows_torch, "final_loss_", "aim.kd_weight / temperature"),
        "aim.kd_weight / temperature**3",
        scale.test_t2_is_in_the_gradient_as_it_is_in_the_value,
    ),
    edit(
        "1/T missing in the dense gradient",
        *(rows_torch, "final_loss_", "aim.kd_weight / temperature"),
        "aim.kd_weight",
        *(properties.test_temperature_divides_the_logits, "forward_kl", 0, 1.0, 3.0),
    ),
    edit(
        "T**2 missing in the dense value",
        *(rows_torch, "final_loss_", "aim.kd_weight * dense_divergence_"),
        "aim.kd_weight / temperature**2 * dense_divergence_",
        scale.test_t2_is_in_the_gradient_as_it_is_in_the_value,
    ),
    edit(
        "T**2 missing everywhere",
        *(api, "distillation_loss", "(temperature**2 if scale_by_t2 else 1.0)", "1.0"),
        scale.test_t2_is_the_same_for_every_backend_and_form,
    ),
    edit(
        "T**2 missing in one backend",
        *(api, "_reference", "kd_weight=objective.kd_weight", "kd_weight=1.0"),
        scale.test_t2_is_the_same_for_every_backend_and_form,
    ),
    edit(
        "mean over the vocabulary",
        *(api, "_computed", "scale_of(problem.weight, reduction, num_items)"),
        "scale_of(problem.weight, reduction, num_items) / problem.columns",
        scale.test_mean_is_over_tokens_and_not_over_the_vocabulary,
    ),
    edit(
        "divided by the token count twice",
        *(api, "scale_of", "return 1 / counted", "return 1 / counted**2"),
        scale.test_tokens_are_divided_by_once,
    ),
    edit(
        "num_items ignored",
        *(api, "scale_of", "return 1.0 / num_items", "return 1.0 / weight.sum()"),
        scale.test_uneven_microbatches_and_ranks_add_up_to_the_one_batch_gradient,
    ),
    edit(
        "mean over all rows, masked ones too",
        *(api, "scale_of", "total = weight.sum()", "total = torch.ones_like(weight).sum()"),
        scale.test_mean_divides_by_the_unmasked_weight,
    ),
    edit(
        "denominator counted on the raw rows",
        *(trainer, "DistillationTrainer._get_num_items_in_batch"),
        *('aligned_labels(batch, "DistillationTrainer")', 'batch["input_ids"]'),
        scale.test_denominator_counts_the_labels_the_loss_sees,
    ),
    edit(
        "ignore_index forgotten",
        *(api, "_row_weights", "(labels != ignore_index)", "(labels == labels)"),
        *(
            properties.test_masking_rows_is_removing_them,
            "forward_kl",
            0,
            [True, False] * 2 + [True],
            False,
        ),
    ),
    edit(
        "per-token weights forgotten",
        *(api, "_row_weights", "if weights is not None", "if False"),
        scale.test_mean_divides_by_the_unmasked_weight,
    ),
    edit(
        "masked rows keep what was in memory",
        *(rows_torch, "rows", "gradient[~counts] = 0", "gradient[~counts] = 1"),
        rows.test_masked_rows_cost_nothing_and_get_zero_gradient,
    ),
    edit(
        "hard-label gradient dropped, dense",
        *(rows_torch, "final_loss_", "z.add_(hard)", "z.clone().add_(hard)"),
        scale.test_hard_label_gradient_is_not_dropped,
    ),
    edit(
        "hard-label gradient dropped, sparse",
        *(rows_torch, "sparse_loss_", "-aim.ce_weight * weight", "0 * weight"),
        scale.test_hard_label_gradient_is_not_dropped,
    ),
    edit(
        "softmax of the hard label dropped, sparse",
        *(rows_torch, "sparse_loss_", "g = g + aim.ce_weight * log_q.to(z.dtype).exp()", "pass"),
        scale.test_hard_label_gradient_is_not_dropped,
    ),
    edit(
        "half cross-entropy by default",
        *(api, "distillation_loss", "ce_weight=float(ce_weight)"),
        "ce_weight=float(ce_weight) or (0.0 if labels is None else 0.5)",
        scale.test_labels_alone_bring_in_no_hard_loss,
    ),
    edit(
        "loss temperature divides the hard part's logits",
        *(rows_torch, "final_loss_", "hard = z.clone()", "hard = z / temperature"),
        *oracle_case("forward_kl"),
    ),
    edit(
        "capture temperature taken for the loss's",
        *(sparse, "at_temperature", "if ratio == 1", "if True"),
        scale.test_temperature_of_capture_or_sampling_is_not_the_loss_temperature,
    ),
    edit(
        "student's softcap ignored",
        *(rows_torch, "finish_", "if cap is None", "if True"),
        scale.test_softcap_and_logit_scale_are_part_of_the_logits,
    ),
    edit(
        "softcap's slope missing in the gradient",
        *(rows_torch, "block_loss_", "if slope is not None", "if False"),
        scale.test_softcap_and_logit_scale_are_part_of_the_logits,
    ),
    edit(
        "teacher's softcap ignored",
        *(
            rows_torch,
            "block_loss_",
            "tile.teacher_transform)",
            "(tile.teacher_transform[0], None))",
        ),
        scale.test_softcap_and_logit_scale_are_part_of_the_logits,
    ),
    edit(
        "teacher's logit scale ignored",
        *(
            rows_torch,
            "block_loss_",
            "tile.teacher_transform)",
            "(None, tile.teacher_transform[1]))",
        ),
        scale.test_softcap_and_logit_scale_are_part_of_the_logits,
    ),
    edit(
        "labels shifted inside the loss",
        *(api, "solve", "labels.reshape(-1)", "labels.reshape(-1).roll(-1)"),
        alignment.test_completion_mask_is_shifted_with_its_labels,
    ),
    edit(
        "teacher shifted inside the loss",
        *(api, "flat", "ids=source.ids.reshape(-1, source.ids.shape[-1])"),
        "ids=source.ids.reshape(-1, source.ids.shape[-1]).roll(1, 0)",
        alignment.test_teacher_rows_are_aligned_with_the_labels,
    ),
    edit(
        "both sides renormalised over the top-k",
        *(sparse, "outcome_terms", "p, q = log_p.exp(), log_q.exp()"),
        "log_p = log_p - log_p[:, :-1].logsumexp(-1, keepdim=True);"
        "log_q = log_q - log_q[:, :-1].logsumexp(-1, keepdim=True);"
        "log_p[:, -1] = log_q[:, -1] = -1e4;"
        "p, q = log_p.exp(), log_q.exp()",
        tails.test_student_mass_outside_the_top_k_costs,
    ),
    edit(
        "tail's gradient not spread over its tokens",
        *(rows_torch, "sparse_loss_", "z.mul_(g[:, -1:])", "z.mul_(0)"),
        *(properties.test_gradient_of_a_row_sums_to_zero, "forward_kl", 0, 1.0),
    ),
    edit(
        "top-k not renormalised where asked",
        *(sparse, "canonical", "log_p - norm)", "log_p)"),
        *oracle_case("forward_kl", "renormalize"),
    ),
    edit(
        "raw mass renormalised",
        *(sparse, "canonical", 'teacher.tail == "renormalize"', 'teacher.tail != "bucket"'),
        tails.test_raw_mass_loss_is_not_clamped_at_zero,
    ),
    edit(
        "raw mass loss clamped at zero",
        *(sparse, "outcome_terms", "return phi.sum(-1)", "return phi.sum(-1).clamp(min=0)"),
        tails.test_raw_mass_loss_is_not_clamped_at_zero,
    ),
    edit(
        "student's tail as log(1 - sum)",
        *(rows_torch, "sparse_loss_"),
        "outcomes = torch.cat([top - peak, (tail_peak - peak) + tail_log_sum], -1)",
        "outcomes = torch.cat([top - peak, (tail_peak - peak) + tail_log_sum], -1);"
        "whole = outcomes.logsumexp(-1, keepdim=True);"
        "rest = torch.log(1 - (top - peak - whole).exp().sum(-1, keepdim=True));"
        "outcomes = torch.cat([top - peak, whole + rest], -1)",
        *(tails.test_tail_stays_finite_where_the_student_saturates, torch.float32),
    ),
    edit(
        "teacher's tail as log(1 - sum)",
        *(sparse, "log_complement", ".clamp(max=-least)", ""),
        tails.test_saturated_teacher_has_a_tail_of_its_rounding_and_no_infinity,
    ),
    edit(
        "repeated ids not summed",
        *(sparse, "merge_duplicates", "if ids.shape[1] < 2", "if True"),
        *(properties.test_repeated_ids_are_summed, "forward_kl", 0, [0.5, 0.2, 0.9]),
    ),
    edit(
        "empty slots counted",
        *(sparse, "merge_duplicates", "logprobs.masked_fill(ids < 0, -torch.inf)", "logprobs"),
        *(properties.test_empty_slots_hold_nothing, "forward_kl", 0, False, -0.3),
    ),
    edit(
        "bias of the logits left out",
        *(fused, "project", "out.add_(source.bias[:columns])", "out"),
        *oracle_case("forward_kl", "logits", "hidden_options"),
    ),
    edit(
        "padded columns take part",
        *(checks, "vocabulary", "return vocab_size", "return min(widths.values())"),
        rows.test_padded_columns_have_no_probability,
    ),
    edit(
        "padded columns get a gradient",
        *(rows_torch, "rows", "gradient[:, vocab:] = 0", "gradient[:, vocab:] = 1"),
        rows.test_padded_columns_have_no_probability,
    ),
    edit(
        "JSD's beta flipped",
        *(
            divergences,
            "_jsd",
            "h = (1 - d.beta)",
            "d = dataclasses.replace(d, beta=1 - d.beta); h = (1 - d.beta)",
        ),
        rows.test_jsd_beta_weighs_the_teacher,
    ),
    edit(
        "JSD's end points accepted",
        *(divergences, "Divergence.__post_init__", "if not holds(self)", "if False"),
        rows.test_jsd_beta_weighs_the_teacher,
    ),
    edit(
        "bf16 log-normaliser, forward KL",
        *(
            rows_torch,
            "dense_forward_kl",
            "normalisers.view(-1)",
            "normalisers.bfloat16().view(-1)",
        ),
        precision.test_bf16_logits_are_normalised_in_float32,
    ),
    edit(
        "bf16 log-normaliser, other divergences",
        *(rows_torch, "dense_divergence_", "torch.log_softmax(student, -1, out=student)"),
        "student.sub_(student.logsumexp(-1, keepdim=True).bfloat16())",
        precision.test_bf16_logits_are_normalised_in_float32,
    ),
    edit(
        "bf16 log-normaliser, cross-entropy",
        *(rows_torch, "cross_entropy_", "peak - target + log_sum"),
        "(peak + log_sum).bfloat16().float() - target",
        precision.test_bf16_logits_are_normalised_in_float32,
    ),
    edit(
        "forward KL of what does not sum to one",
        *(divergences, "_forward_kl", " + (q - p)", ""),
        *(bounds.test_bounded_torch_agrees_with_the_oracle, "forward_kl", "logits", "logits"),
    ),
    edit(
        "rounding of the normalisers not cancelled, reverse KL",
        *(divergences, "_reverse_kl", "h + (p - q)", "h"),
        precision.test_small_losses_keep_their_digits,
    ),
    edit(
        "reverse KL's gradient reversed",
        *(divergences, "_reverse_kl", "h + (p - q), h", "h + (p - q), -h"),
        *oracle_case("reverse_kl"),
    ),
    edit(
        "gradient flows through a detached mixture",
        *(divergences, "_skew_reverse_kl", "if not d.detach_mixture", "if True"),
        *oracle_case("skew_reverse_kl(0.1, detach_mixture)"),
    ),
    edit(
        "softmax's Jacobian incomplete, dense",
        *(rows_torch, "dense_divergence_", "value=-1", "value=0"),
        *(properties.test_gradient_of_a_row_sums_to_zero, "reverse_kl", 0, 1.0),
    ),
    edit(
        "softmax's Jacobian incomplete, sparse",
        *(sparse, "outcome_terms", "h - q * h.sum(-1, keepdim=True)", "h"),
        *(properties.test_gradient_of_a_row_sums_to_zero, "reverse_kl", 0, 1.0),
    ),
    edit(
        "lower bound ignored",
        *(divergences, "bounded_terms", "if min_logprob is None", "if True"),
        rows.test_reverse_kl_onto_a_teacher_zero_is_infinite_unless_bounded,
    ),
    edit(
        "lm_head gradient accumulated in bf16",
        *(fused, "product_", "here.add_(product)", "here.copy_(here.to(product) + product)"),
        precision.test_lm_head_gradient_accumulates_in_float32,
    ),
    edit(
        "upstream gradient ignored, scalar",
        *(autograd, "ReducedLoss.backward"),
        "scaled(gradient, factor, dtype, reuse=not keep, kernel=ctx.fused)",
        "gradient",
        graphs.test_backward_twice_and_upstream_scale,
    ),
    edit(
        "upstream gradient ignored, scalar, graph freed",
        *(
            autograd,
            "scaled",
            "torch.mul(gradient, factor.to(gradient.dtype), out=out)",
            "gradient",
        ),
        *oracle_case("forward_kl"),
    ),
    edit(
        "upstream gradient ignored, per token",
        *(autograd, "TokenLoss.backward", "run(problem, weight,"),
        "run(problem, torch.ones_like(weight),",
        *oracle_case("forward_kl"),
    ),
    edit(
        "lower bound of the teacher's side alone",
        *(divergences, "bounded_terms", "log_q.clamp(min=min_logprob)", "log_q"),
        *(bounds.test_bounded_torch_agrees_with_the_oracle, "jsd(0.5)", "logits", "logits"),
    ),
    edit(
        "gradient below the lower bound",
        *(divergences, "bounded_terms", "h.masked_fill(log_q < min_logprob, 0.0)", "h"),
        *(bounds.test_bounded_torch_agrees_with_the_oracle, "jsd(0.5)", "logits", "logits"),
    ),
    edit(
        "ties decided by the exponential of a logarithm",
        *(rows_torch, "dense_divergence_", 'd.name == "total_variation"', "False"),
        *(precision.test_total_variation_is_as_good_as_a_softmax, "torch", 1e-2),
    ),
    edit(
        "high temperatures in float32",
        *(rows_torch, "dense_divergence_", "aim.temperature >= WIDE_TEMPERATURE", "False"),
        *(precision.test_high_temperatures, "torch", "forward_kl", "logits", 1e3),
    ),
    edit(
        "1 / N before the loss scale, half logits",
        *(autograd, "reduced", "student.dtype == torch.float16", "False"),
        *(precision.test_half_logits_under_a_loss_scale, "torch", "forward_kl"),
    ),
    edit(
        "1 / N before the loss scale, half hidden states",
        *(autograd, "in_units", "not half", "True"),
        *(precision.test_half_hidden_states_under_a_loss_scale, "torch", "forward_kl", "mean"),
    ),
    edit(
        "half gradients in units too small for them",
        *(autograd, "in_units", "/ 32)", "* 1e5)"),
        *(precision.test_half_hidden_states_under_a_loss_scale, "torch", "forward_kl", "mean"),
    ),
    edit(
        "upstream gradient rounded to the logits' dtype",
        *(autograd, "scaled", "gradient[block].to(factor.dtype) * factor"),
        "gradient[block] * factor.to(gradient.dtype)",
        *(precision.test_upstream_gradients_are_not_rounded_to_the_logits,),
        *("torch", torch.bfloat16, False),
    ),
    edit(
        "one row of padding and tokens taken for a row of tokens",
        *(rows_torch, "rows", "live = None if gradient is None else _columns(gradient, vocab)"),
        "live = gradient",
        *(rows.test_one_row_with_padding, (1, 8), "cross_entropy", "torch", True),
    ),
    edit(
        "teacher kept beside autograd",
        *(autograd, "TokenLoss.forward", "take_out(problem, saved)", "problem"),
        *(graphs.test_a_teacher_changed_before_backward_is_refused, "logits", "torch"),
    ),
    edit(
        "any denominator taken",
        *(checks, "denominator", "not 0 < value < math.inf", "False"),
        *(scale.test_a_denominator_is_finite_and_above_zero, torch.tensor, -3.0),
    ),
    edit(
        "bad denominator on a device flips the sign",
        *(api, "scale_of", "(count > 0) & count.isfinite()", "count == count"),
        scale.test_a_denominator_that_cannot_be_looked_at_makes_nan,
    ),
    edit(
        "no distribution taken for zeros",
        *(float64_oracle, "log_softmax", "logits * torch.nan", "logits"),
        *(rows.test_a_row_of_minus_infinity_is_nan_and_alone_so,),
        *("reference", "student", "forward_kl"),
    ),
    edit(
        "no graph where nothing counts, reference",
        *(float64_oracle, "per_token_loss", "logits[row, :0].sum()", "logits.new_zeros(())"),
        *(rows.test_nothing_that_counts_is_zero_with_a_graph, "reference", "mean", "labels"),
    ),
    edit(
        "graph-less zero where nothing is trained",
        *(api, "solve", "    problem = Problem("),
        "    if not bool(weight.any()):\n        return like.new_zeros(())\n    problem = Problem(",
        *(graphs.test_rank_without_tokens_still_has_a_graph, "hidden"),
    ),
]


@pytest.mark.parametrize("mutation", MUTATIONS)
def test_the_defect_is_caught(mutation, monkeypatch):
    mutation.apply(monkeypatch)
    with pytest.raises((AssertionError, pytest.fail.Exception)):
        run(mutation)


def test_every_test_of_a_known_fault_catches_its_defect():
    """Faults that shipped in other distillation code: named for the fault, shown to catch it."""
    caught = {param.values[0].caught_by.__name__ for param in MUTATIONS}
    known = (alignment, scale, tails, precision, rows, graphs)
    named = {n for module in known for n in vars(module) if n in KNOWN_FAULTS}
    assert named == KNOWN_FAULTS and named <= caught, KNOWN_FAULTS - (named & caught)


KNOWN_FAULTS = {
    "test_t2_is_in_the_gradient_as_it_is_in_the_value",
    "test_t2_is_the_same_for_every_backend_and_form",
    "test_mean_is_over_tokens_and_not_over_the_vocabulary",
    "test_tokens_are_divided_by_once",
    "test_uneven_microbatches_and_ranks_add_up_to_the_one_batch_gradient",
    "test_denominator_counts_the_labels_the_loss_sees",
    "test_hard_label_gradient_is_not_dropped",
    "test_labels_alone_bring_in_no_hard_loss",
    "test_temperature_of_capture_or_sampling_is_not_the_loss_temperature",
    "test_softcap_and_logit_scale_are_part_of_the_logits",
    "test_completion_mask_is_shifted_with_its_labels",
    "test_teacher_rows_are_aligned_with_the_labels",
    "test_targets_follow_their_sequence_under_shuffling",
    "test_stop_token_is_learnt_when_pad_is_eos",
    "test_student_mass_outside_the_top_k_costs",
    "test_raw_mass_loss_is_not_clamped_at_zero",
    "test_tail_stays_finite_where_the_student_saturates",
    "test_saturated_teacher_has_a_tail_of_its_rounding_and_no_infinity",
    "test_padded_columns_have_no_probability",
    "test_jsd_beta_weighs_the_teacher",
    "test_bf16_logits_are_normalised_in_float32",
    "test_small_losses_keep_their_digits",
    "test_lm_head_gradient_accumulates_in_float32",
    "test_rank_without_tokens_still_has_a_graph",
}
