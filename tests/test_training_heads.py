"""The head is what the model says: read from its forward, compared with its logits, or refused."""

import copy

import cache_cases
import pytest
import torch
import training_cases as cases
from training_cases import batch_of, inputs_of

import kd
from kd.heads import dense_logits, final_hidden, reading
from kd.heads.reading import PROBES
from kd.teachers import build_cache, build_hidden_cache
from kd.training import Objective, compute_loss, prepare_student
from kd.training.teachers import hidden_of

IDS = torch.arange(1, 9)[None]


def changed(after=None, before=None, loss=None, **options):
    """A student whose forward does something after its lm_head, before it, or to its loss."""
    model = cases.student(**options)
    own = type(model).forward.__get__(model)
    if before is not None:
        model.model.norm.register_forward_hook(lambda module, args, out: before(out))

    def forward(input_ids=None, labels=None, **kwargs):
        out = own(input_ids=input_ids, **kwargs)
        if after is not None:
            out.logits = after(out.logits)
        if labels is not None:
            out.loss = model.loss_function(out.logits, labels, cases.VOCABULARY)
            out.loss = out.loss if loss is None else loss(out.loss, out.logits)
        return out

    model.forward = forward
    return model


def check_exact(model):
    with torch.no_grad():
        own = model(input_ids=IDS).logits
    torch.testing.assert_close(dense_logits(final_hidden(model, input_ids=IDS)), own)


# --- what can be had ------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("after", "scale", "softcap"),
    [
        (lambda z: z, None, None),
        (lambda z: z * 0.0195, 0.0195, None),
        (lambda z: z / 8, 0.125, None),
        (lambda z: z.float() * 3.7, 3.7, None),
        (lambda z: 5 * torch.tanh(z / 5), None, 5.0),
        (lambda z: 0.5 * torch.tanh(z.float() * 0.3 / 0.5), 0.3, 0.5),
        (lambda z: 2 * torch.tanh(z / 5), 0.4, 2.0),
        (lambda z: (z * 2) / 2, None, None),
    ],
)
def test_scale_and_cap_are_measured_whatever_their_names(after, scale, softcap):
    model = changed(after)
    found = reading(prepare_student(model))
    assert (found.reason, found.weightless, found.untrainable) == (None, None, None)
    assert found.scale == (scale if scale is None else pytest.approx(scale, rel=2e-7))
    assert found.softcap == (softcap if softcap is None else pytest.approx(softcap, rel=2e-7))
    check_exact(model)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision_is_no_difference(dtype):
    model = changed(lambda z: 5 * torch.tanh(z * 0.7 / 5)).to(dtype)
    found = reading(prepare_student(model))
    assert found.scale == pytest.approx(0.7, rel=1e-6) and found.softcap == 5


@pytest.mark.parametrize(
    "before",
    [lambda h: h * 0.0195, lambda h: torch.tanh(h), lambda h: h / h.norm(dim=-1)[..., None]],
)
def test_what_is_done_to_hidden_states_is_seen_by_the_lm_head(before):
    model = prepare_student(changed(before=before))
    check_exact(model)
    batch = batch_of()
    labels = batch["shift_labels"].flatten()
    logits = model(input_ids=batch["input_ids"], attention_mask=batch["attention_mask"]).logits
    wanted = torch.nn.functional.cross_entropy(logits.flatten(0, 1), labels)
    torch.testing.assert_close(compute_loss(model, batch), wanted)


def test_an_attribute_that_the_model_ignores_is_ignored():
    model = cases.student()
    model.config.logit_scale = model.config.logits_scaling = 7.0
    model.config.final_logit_softcapping = 0.1
    assert reading(prepare_student(model)).scale is None
    check_exact(model)


def test_fewer_columns_than_rows_of_the_lm_head():
    model = prepare_student(changed(lambda z: z[..., :20]))
    assert reading(model).width == 20
    check_exact(model)
    loss = compute_loss(model, {"input_ids": IDS, "shift_labels": IDS})
    loss.backward()
    assert model.lm_head.weight.grad.shape[0] == cases.VOCABULARY


# --- what is refused ------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("after", "words"),
    [
        (lambda z: z**3, r"more to its lm_head's product than scale and softcap: \[0.00"),
        (lambda z: z + 0.5, "more to its lm_head's product"),
        (lambda z: z.clamp(-30, 30), "more to its lm_head's product"),
        (lambda z: z * -1, "more to its lm_head's product"),
        (lambda z: z * torch.arange(z.shape[1])[:, None], "more to its lm_head's product"),
        (lambda z: z.roll(1, 1), "more to its lm_head's product"),
        (lambda z: z[:, :-1], r"its logits of \[1, 8\] tokens are \[1, 7, 23\]"),
        (
            lambda z: z.roll(1, -1),
            r"own logit of a token is \S+ where its lm_head makes \S+\. Give",
        ),
        (lambda z: z - z.mean(-1, keepdim=True), "more to its|own logit of a token is"),
        (lambda z: torch.cat([z[..., :3] - 1, z[..., 3:]], -1), "own logit|more to its|token by"),
    ],
)
def test_anything_else_is_refused_with_numbers(after, words):
    with pytest.raises(TypeError, match=f"prepare_student: model must make its logits .*{words}"):
        prepare_student(changed(after))


def test_a_hook_on_the_lm_head_is_refused():
    model = cases.student()
    model.lm_head.register_forward_hook(lambda module, args, out: out * 0.5)
    with pytest.raises(TypeError, match="got Qwen2ForCausalLM: its own logit of a token is"):
        prepare_student(model)


@pytest.mark.parametrize("times", [0, 2])
def test_one_call_of_one_lm_head(times):
    model = cases.student()
    own = type(model).forward.__get__(model)

    def forward(input_ids=None, **kwargs):
        out = own(input_ids=input_ids, **kwargs)
        if times == 2:
            own(input_ids=input_ids, **kwargs)
        else:
            out.logits = model.model(input_ids).last_hidden_state @ model.lm_head.weight.T
        return out

    if times == 0:
        model.get_output_embeddings = lambda: torch.nn.Linear(16, cases.VOCABULARY)
    model.forward = forward
    with pytest.raises(TypeError, match=f"it calls its lm_head {times} times in a forward"):
        prepare_student(model)


def test_a_parameter_after_the_lm_head_is_refused_unless_frozen():
    scale = torch.nn.Parameter(torch.tensor(0.5))
    model = changed(lambda z: z * scale)
    with pytest.raises(TypeError, match="it trains a parameter that follows its lm_head"):
        prepare_student(model)
    assert reading(model).reason is None  # as a teacher it is exact
    check_exact(model)
    scale.requires_grad_(False)
    assert reading(prepare_student(changed(lambda z: z * scale))).scale == 0.5


def test_a_loss_term_that_needs_logits_is_refused():
    model = changed(loss=lambda loss, z: loss + 1e-2 * z.logsumexp(-1).square().mean())
    with pytest.raises(TypeError, match=r"adds \S+ to its loss, which depends on its logits"):
        prepare_student(model)


def test_the_z_loss_of_bamba_is_refused_by_name():
    from family_cases import OVERRIDES, tiny

    assert reading(prepare_student(tiny("bamba"))).untrainable is None
    OVERRIDES["bamba"] = {"z_loss_coefficient": 0.1}
    with pytest.raises(TypeError, match=r"BambaForCausalLM: it adds \S+ to its loss, .* z-loss"):
        prepare_student(tiny("bamba"))
    del OVERRIDES["bamba"]


def test_a_wrapped_model_is_refused_with_the_way_out():
    with pytest.raises(
        TypeError, match="not be wrapped yet, got DataParallel. Prepare the model in"
    ):
        prepare_student(torch.nn.DataParallel(cases.student()))


def test_encoder_decoders_are_refused_by_name():
    from transformers import BartConfig, BartForConditionalGeneration, T5Config
    from transformers import T5ForConditionalGeneration as T5

    t5 = T5(T5Config(vocab_size=23, d_model=16, d_kv=8, d_ff=16, num_layers=1, num_heads=2))
    sizes = dict.fromkeys(["encoder_layers", "decoder_layers"], 1)
    sizes |= dict.fromkeys(["encoder_attention_heads", "decoder_attention_heads"], 2)
    sizes |= dict.fromkeys(["encoder_ffn_dim", "decoder_ffn_dim", "d_model"], 16)
    bart = BartForConditionalGeneration(BartConfig(vocab_size=23, **sizes))
    for model in (t5, bart):
        words = f"must be decoder-only, got the encoder-decoder {type(model).__name__}"
        with pytest.raises(TypeError, match=words):
            prepare_student(model)
        with pytest.raises(TypeError, match=words):
            hidden_of(model, {"input_ids": IDS})


# --- once, and without a trace --------------------------------------------------------------------


def count_forwards(model):
    calls = []
    model.model.register_forward_pre_hook(lambda *args: calls.append(1))
    return calls


def test_the_comparison_leaves_no_trace():
    model = cases.student(attention_dropout=0.5).train()
    model.model.layers[0].eval()  # a user's own mixture of flags
    flags = [module.training for module in model.modules()]
    before = {name: value.clone() for name, value in model.state_dict().items()}
    state = torch.get_rng_state()
    prepare_student(model)
    assert torch.equal(state, torch.get_rng_state())
    assert flags == [module.training for module in model.modules()]
    assert all(parameter.grad is None for parameter in model.parameters())
    assert "_loss_function" not in vars(model) and model.lm_head._kd_seen is None
    for name, value in model.state_dict().items():
        assert torch.equal(value, before[name])


def test_a_model_is_compared_once_and_again_when_it_changed():
    model, batch = cases.student(), batch_of()
    calls = count_forwards(model)
    prepare_student(model)
    assert len(calls) == 2
    prepare_student(model)
    compute_loss(model, batch)
    hidden_of(model, {"input_ids": IDS})
    assert len(calls) == 4
    model.config.final_logit_softcapping = 3.0  # any number: what it does is measured
    compute_loss(model, batch)
    assert len(calls) == 7
    model.set_output_embeddings(torch.nn.Linear(16, cases.VOCABULARY))
    compute_loss(model, batch)
    assert len(calls) == 10


def test_a_cap_that_is_switched_off_after_preparing_is_seen():
    from transformers import Gemma2Config, Gemma2ForCausalLM

    sizes = {"hidden_size": 16, "intermediate_size": 32, "num_hidden_layers": 1, "head_dim": 8}
    sizes |= {"num_attention_heads": 2, "num_key_value_heads": 1, "vocab_size": 23}
    torch.manual_seed(0)
    model = Gemma2ForCausalLM(Gemma2Config(**sizes, final_logit_softcapping=0.05)).eval()
    check_exact(prepare_student(model))
    model.config.final_logit_softcapping = None
    check_exact(model)
    assert reading(model).softcap is None


def test_a_student_on_the_meta_device_is_compared_in_its_first_forward():
    for after, words in (
        (lambda z: z * 0.25, None),
        (lambda z: z + 1, "head_loss: model must make"),
    ):
        with torch.device("meta"):
            model = changed(after)
        prepare_student(model)
        assert reading(model) is None
        model.to_empty(device="cpu")
        model.load_state_dict(cases.student().state_dict())
        model.model.rotary_emb = cases.student().model.rotary_emb
        if words is None:
            compute_loss(model, batch_of())
            assert reading(model).scale == 0.25
        else:
            with pytest.raises(TypeError, match=words):
                compute_loss(model, batch_of())


def test_a_copy_of_a_prepared_student_is_its_own():
    model = prepare_student(changed(lambda z: z * 0.25))
    plain = prepare_student(cases.student())
    other = copy.deepcopy(plain)
    with torch.no_grad():
        other.lm_head.weight.mul_(2)
    one, two = (final_hidden(m, input_ids=IDS) for m in (plain, other))
    assert one.weight is not two.weight and not torch.equal(dense_logits(one), dense_logits(two))
    assert reading(model).scale == 0.25


@pytest.mark.parametrize("layers", [["lm_head"], ["q_proj"]])
def test_a_student_that_peft_wraps_after_it_was_prepared(layers):
    from peft import LoraConfig, get_peft_model

    plain = prepare_student(cases.student(tie_word_embeddings=False))
    options = {"r": 2, "init_lora_weights": False, "target_modules": layers}
    model = get_peft_model(plain, LoraConfig(**options)).eval()  # no second prepare_student
    batch = batch_of()
    logits = model(**inputs_of(batch)).logits.flatten(0, 1)
    wanted = torch.nn.functional.cross_entropy(logits, batch["shift_labels"].flatten())
    torch.testing.assert_close(compute_loss(model, batch), wanted)
    with model.disable_adapter():
        bare = compute_loss(model, batch)
    assert abs(bare.item() - wanted.item()) > 1e-3


# --- placements -----------------------------------------------------------------------------------


def test_weights_that_accelerate_brings_for_each_layer():
    from accelerate import cpu_offload

    wanted = compute_loss(prepare_student(cases.student()), batch_of())
    for prepared_first in (False, True):
        model = cases.student()
        if prepared_first:
            prepare_student(model)
        cpu_offload(model, execution_device=torch.device("cpu"))
        with torch.no_grad():
            found = compute_loss(prepare_student(model), batch_of())
        torch.testing.assert_close(found, wanted.detach())


def test_compiled_the_forward_is_one_graph_and_is_not_compiled_again():
    from torch._dynamo.utils import counters

    torch._dynamo.reset()
    counters.clear()
    model, batch = prepare_student(cases.student()), batch_of(cache=cases.RandomCache())
    wanted = compute_loss(model, batch, cases.MIXED)
    wanted.backward()
    expected = model.model.layers[0].mlp.up_proj.weight.grad.clone()
    compiled = torch.compile(model, backend="aot_eager")
    graphs = []
    for _ in range(4):
        model.zero_grad()
        loss = compute_loss(compiled, batch, cases.MIXED)
        loss.backward()
        graphs.append(counters["stats"]["unique_graphs"])
        torch.testing.assert_close(loss, wanted)
        torch.testing.assert_close(model.model.layers[0].mlp.up_proj.weight.grad, expected)
    assert graphs[1] == graphs[-1] and graphs[0] <= 3, graphs


def test_under_data_parallel():
    model, batch = prepare_student(cases.student()), batch_of()
    wanted = compute_loss(model, batch)
    torch.testing.assert_close(compute_loss(torch.nn.DataParallel(model), batch), wanted)


# --- teachers and evaluation ----------------------------------------------------------------------


class Quantised(torch.nn.Module):
    """An lm_head of integers or float8: its product is right, and its weight is not its matrix."""

    def __init__(self, linear, dtype):
        super().__init__()
        self.step = linear.weight.abs().max() / 127
        self.register_buffer("weight", (linear.weight.detach() / self.step).round().to(dtype))

    def forward(self, hidden):
        return hidden @ (self.weight.float() * self.step).T


def check_cached(cache, own):
    found = cache.lookup(IDS[0])
    logprobs = own[0].log_softmax(-1)
    assert torch.equal(found.ids.long().sort(-1).values, logprobs.topk(4).indices.sort(-1).values)
    wanted = logprobs.gather(-1, found.ids.long())
    torch.testing.assert_close(found.logprobs, wanted, rtol=3e-2, atol=5e-2)  # the codec's


@pytest.mark.parametrize("dtype", [torch.int8, torch.float8_e4m3fn])
def test_a_quantised_lm_head_teaches_by_its_logits_and_is_no_student(tmp_path, dtype):
    model = cache_cases.teacher(tie_word_embeddings=False)
    head = Quantised(model.lm_head, dtype)
    model.set_output_embeddings(head)
    with torch.no_grad():
        own = model(input_ids=IDS).logits
    torch.testing.assert_close(hidden_of(model, {"input_ids": IDS}), own)
    cache = build_cache(model, [IDS[0]], tmp_path / "a", top_k=4, progress=False)
    check_cached(cache, own)
    with pytest.raises(ValueError, match="Quantised, is no matrix of floating-point numbers. Use"):
        build_hidden_cache(model, [IDS[0]], tmp_path / "b", progress=False)
    with pytest.raises(TypeError, match="its lm_head, a Quantised, is no matrix"):
        prepare_student(model)


def test_a_teacher_with_a_multiplier_is_itself_everywhere(tmp_path):
    from family_cases import tiny

    model = tiny("falcon_h1")
    ids = IDS
    with torch.no_grad():
        own = model(input_ids=ids).logits
    objective = Objective(kd_weight=1.0, ce_weight=0.0, teacher=tiny("falcon_h1"))
    loss = compute_loss(prepare_student(model), {"input_ids": ids, "shift_labels": ids}, objective)
    assert abs(loss.item()) < 1e-6
    cache = build_hidden_cache(tiny("falcon_h1"), [ids[0]], tmp_path / "hidden", progress=False)
    found = cache.lookup(ids[0])
    assert found.logit_scale == pytest.approx(0.71, rel=1e-6)
    made = kd.Hidden(found.hidden, found.weight, found.bias, found.logit_scale, found.softcap)
    torch.testing.assert_close(dense_logits(made), own[0], rtol=2e-2, atol=2e-2)
    sparse = build_cache(tiny("falcon_h1"), [ids[0]], tmp_path / "top", top_k=4, progress=False)
    check_cached(sparse, own)


def test_a_cache_of_fewer_columns_than_rows_of_the_lm_head(tmp_path):
    from family_cases import tiny

    model = tiny("inkling_text")
    sparse = build_cache(model, [IDS[0]], tmp_path / "a", top_k=4, progress=False)
    hidden = build_hidden_cache(model, [IDS[0]], tmp_path / "b", progress=False)
    for cache in (sparse, hidden):
        assert (cache.meta.live_vocab, cache.meta.padded_vocab) == (62, 62)
    assert hidden.head.weight.shape == (62, 32)


@pytest.mark.parametrize("family", ["falcon_h1", "recurrent_gemma", "bert", "inkling_text"])
def test_likelihood_is_the_models_own(family):
    from family_cases import tiny

    from kd.evaluation.likelihood import likelihood

    model = tiny(family)
    with torch.no_grad():
        logits = model(input_ids=IDS).logits
    wanted = torch.nn.functional.cross_entropy(logits[0, :-1], IDS[0, 1:])
    assert likelihood(model, [IDS[0]]).mean == pytest.approx(float(wanted), rel=1e-5)


def test_the_probes_hold_a_slope_and_a_saturated_cap():
    assert PROBES[0] < 1e-2 and PROBES[1] == 1 and PROBES[-1] == max(PROBES)
