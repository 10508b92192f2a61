"""Every causal LM family of the installed transformers, tiny, with multipliers other than 1.

python tests/family_cases.py --write    # docs/families.md, from what each of them does
"""

import argparse
import dataclasses
import re
import time
from pathlib import Path

import torch

from kd.heads import dense_logits, final_hidden, lm_head, reading
from kd.training import compute_loss, prepare_student

OUTCOMES = ("exact", "refused", "not made")
VOCABULARY, EXPERTS, LARGEST = 64, 4, 8_000_000
PAGE = Path(__file__).parents[1] / "docs" / "families.md"


def _each(names, value):
    return dict.fromkeys(names.split(), value)


# Sizes by the names that configs use for them; a name that a config does not have is left out.
SIZES = {
    **_each("vocab_size vocab_size_per_layer_input", VOCABULARY),
    **_each("hidden_size d_model n_embd dim dim_model embedding_size hidden_size_global", 32),
    **_each("word_embed_proj_dim", 32),
    **_each("intermediate_size ffn_dim d_inner n_inner dff dim_ff feed_forward_size", 32),
    **_each("encoder_ffn_dim decoder_ffn_dim embedding_dim attention_hidden_size", 32),
    **_each("moe_intermediate_size shared_expert_intermediate_size", 16),
    **_each("hidden_size_per_layer_input expert_ffn_hidden_size", 16),
    **_each("ffn_hidden_size emb_dim", 32),
    **_each("num_hidden_layers n_layer n_layers num_layers num_blocks", 2),
    **_each("encoder_layers decoder_layers num_encoder_layers num_decoder_layers", 2),
    **_each("num_attention_heads n_head n_heads num_heads index_n_heads", 4),
    **_each("encoder_attention_heads decoder_attention_heads", 4),
    **_each("num_encoder_attention_heads num_decoder_attention_heads", 4),
    **_each("num_key_value_heads num_kv_heads multi_query_group_num", 2),
    **_each("head_dim d_head d_kv dim_head qk_rope_head_dim qk_nope_head_dim v_head_dim", 8),
    **_each("kv_lora_rank q_lora_rank o_lora_rank rotary_dim pronunciation_embed_dim", 8),
    **_each("linear_key_head_dim linear_value_head_dim linear_head_dim index_head_dim", 8),
    **_each("linear_num_key_heads linear_num_value_heads linear_num_heads", 4),
    **_each("mamba_n_heads mamba_d_head mamba_d_state mamba_headdim state_size", 8),
    **_each("chunk_size mamba_chunk_size shape_embed_dim index_topk sliding_window", 16),
    **_each("pronunciation_vocab_size shape_vocab_size", 16),
    **_each("max_position_embeddings n_positions n_ctx max_seq_len", 64),
    **_each("num_experts num_local_experts n_routed_experts", EXPERTS),
    **_each("num_experts_per_tok num_experts_per_token moe_topk top_k_experts", 2),
    **_each("n_group topk_group num_expert_group first_k_dense_replace", 1),
    **_each("n_shared_experts zero_expert_num", 1),
    **_each("pad_token_id bos_token_id eos_token_id", 0),
    **_each("output_router_logits is_decoder", True),
    **_each("router_aux_loss_coef aux_loss_coef", 0.2),
    "initializer_range": 0.3,
    "use_cache": False,
}
MULTIPLIER = re.compile("logit|lm_head|multiplier|mup|scal|soft_?cap")
PER_LAYER = {"layer_types": ["sliding_attention", "full_attention"], "global_head_dim": 8}
HYBRID = {
    "attention_hidden_size": ...,
    "num_hidden_layers": 4,
    "layers_block_type": ["mamba", "hybrid"] * 2,
}
ROPE = {"rope_type": "default", "rope_theta": 1e4}
# What a family's own default or its sizes need beside that; ``...`` leaves a size out.
OVERRIDES = {
    "blt": {"encoder_hash_byte_group_vocab": 16},
    "cohere_compass_text": {"rope_parameters": {"full_attention": ROPE, "sliding_attention": ROPE}},
    "dbrx": {
        "attn_config": {"kv_n_heads": 2, "rope_theta": 1e4, "clip_qkv": 8.0},
        "ffn_config": {"hidden_size": 32},
    },
    "deepseek_v4": {"num_hidden_layers": 4},
    "falcon_h1": {"mamba_d_ssm": 64},
    "flint": {"num_hidden_layers": 4},
    "gemma3n_text": {"num_kv_shared_layers": 0},
    "gemma4_text": PER_LAYER,
    "gemma4_unified_text": PER_LAYER,
    "gpt_neo": {"attention_types": [[["global", "local"], 1]]},
    "inkling2_text": {"unpadded_vocab_size": 62},
    "inkling_text": {"unpadded_vocab_size": 62},
    "lfm2_moe": {"layer_types": ["conv", "full_attention"], "num_dense_layers": 1},
    "mamba2": {"num_heads": 8},
    "prophetnet": {"num_hidden_layers": ...},
    "reformer": {
        **{"axial_pos_embds": False, "attn_layers": ["local", "lsh"], "num_buckets": 2},
        **_each("local_attn_chunk_length lsh_attn_chunk_length", 5),
        **_each("hidden_dropout_prob local_attention_probs_dropout_prob", 0.0),
    },
    "rwkv": {"rescale_every": 0},
    "xlnet": {"max_position_embeddings": ..., "use_mems_eval": False},
    "xmod": {"default_language": "en_XX"},
    "zamba": HYBRID,
    "zamba2": HYBRID,
    "zaya": {"num_experts_per_tok": 1},
}


@dataclasses.dataclass
class Verdict:
    """What became of a family.

    Attributes:
        outcome: "exact"; "refused", by prepare_student's words; or "not made", where transformers
            cannot make it tiny.
        detail: what it does around its lm_head; why it was refused or not made.
    """

    family: str
    architecture: str
    outcome: str
    detail: str


def names():
    from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING_NAMES

    return list(MODEL_FOR_CAUSAL_LM_MAPPING_NAMES)


def tiny_config(kind, overrides=()):
    """A config class's own defaults made small, multipliers and caps other than 1."""
    from transformers import PretrainedConfig

    base = kind()
    known = {field.name for field in dataclasses.fields(kind)} | set(vars(base))
    chosen = {name: value for name, value in SIZES.items() if name in known}
    heads = [vars(base).get(f"num_{kind_}_heads") for kind_ in ("key_value", "attention")]
    if heads[0] == heads[1] is not None:
        chosen["num_key_value_heads"] = chosen["num_attention_heads"]  # as in the original
    for name, value in vars(base).items():
        if isinstance(value, PretrainedConfig):
            chosen[name] = tiny_config(type(value))
        if name.startswith("_") or not MULTIPLIER.search(name) or name in chosen:
            continue
        if isinstance(value, float):
            chosen[name] = 0.6 * value + 0.11
        elif value is None and "logit" in name:
            chosen[name] = 2.0 if "cap" in name else 0.7
    chosen.update(overrides)
    left_out = [name for name, value in chosen.items() if value is ...]
    return kind(**{name: value for name, value in chosen.items() if name not in left_out})


def architecture(family):
    from transformers import CONFIG_MAPPING
    from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING

    return MODEL_FOR_CAUSAL_LM_MAPPING[CONFIG_MAPPING[family]]


def tiny(family):
    """The family's model in eval mode; on the meta device where it does not become small."""
    from transformers import CONFIG_MAPPING, AutoModelForCausalLM

    config = tiny_config(CONFIG_MAPPING[family], OVERRIDES.get(family, {}))
    make = AutoModelForCausalLM.from_config
    if family.startswith("musicgen"):  # a decoder of sound, inside the config of the whole
        make, config = architecture(family)._from_config, config.decoder
    with torch.device("meta"):
        model = make(config)
    if sum(parameter.numel() for parameter in model.parameters()) > LARGEST:
        return model
    with torch.random.fork_rng():
        torch.manual_seed(0)
        return make(config).train(family == "reformer")  # which has no gradient in eval mode


def batch():
    """Two sequences of ten tokens; the first three of one of them are not trained on."""
    generator = torch.Generator().manual_seed(1)
    input_ids = torch.randint(2, VOCABULARY - 2, (2, 10), generator=generator)
    labels = input_ids.clone()
    labels[0, :3] = -100
    shifted = torch.full_like(labels, -100)
    shifted[:, :-1] = labels[:, 1:]
    return input_ids, labels, shifted


def judge(family):
    """Make the family; compare logits, loss and gradients with its own."""
    name = ""
    try:
        name = architecture(family).__name__
        model = tiny(family)
    except Exception as error:  # whatever a config class raises: it is in the table
        said = " ".join(str(error).split()).split(". ")[0]
        return Verdict(family, name, "not made", f"{type(error).__name__}: {said}"[:160])
    try:
        prepare_student(model)
    except TypeError as error:
        said = re.sub(r"^.*?, got \w+(, which|:) ", "", str(error))
        return Verdict(family, name, "refused", said.split(". ")[0])
    assert next(model.parameters()).device.type == "cpu", "too large to be compared"
    compare(model)
    return Verdict(family, name, "exact", described(model))


def compare(model):
    """Assert that logits, the loss on labels and its gradients are the model's own."""
    input_ids, labels, shifted = batch()
    with torch.no_grad():
        own = seeded(lambda: model(input_ids=input_ids)).logits
    assert own.std() > 1e-3 and own.isfinite().all(), f"logits say nothing: {own.std()}"
    ours = dense_logits(seeded(lambda: final_hidden(model, input_ids=input_ids)))
    close(ours, own, "logits")

    wanted = seeded(lambda: model(input_ids=input_ids, labels=labels)).loss
    aligned = torch.nn.functional.cross_entropy(own.flatten(0, 1), labels.flatten())
    if (wanted - aligned).abs() < 1e-5:  # its own loss does not shift
        wanted = seeded(lambda: model(input_ids=input_ids, labels=shifted)).loss
    expected = gradients(model, wanted)
    rows = {"input_ids": input_ids, "shift_labels": shifted}
    loss = seeded(lambda: compute_loss(model, rows))
    close(loss, wanted, "loss")
    found = gradients(model, loss)
    assert set(found) <= set(expected)
    for name, gradient in expected.items():
        close(found.get(name, torch.zeros_like(gradient)), gradient, f"gradient of {name}")


def seeded(call):
    """For a model that draws in eval mode (Reformer's hashes)."""
    torch.manual_seed(0)
    return call()


def gradients(model, loss):
    model.zero_grad()
    loss.backward()
    return {n: p.grad.clone() for n, p in model.named_parameters() if p.grad is not None}


def described(model):
    """What the reading found, in words, and whether there is a bias and a router loss."""
    found, words = reading(model), []
    if found.scale is not None:
        words.append(f"logits × {found.scale:.4g}")
    if found.softcap is not None:
        words.append(f"softcap {found.softcap:.4g}")
    if found.width is not None:
        words.append(f"first {found.width} columns")
    if getattr(lm_head(model), "bias", None) is not None:
        words.append("bias")
    labels = batch()[0]
    added = model(input_ids=labels, head_loss=lambda seen: seen.hidden.sum())["aux_loss"]
    if added is not None and float(added) != 0:
        words.append("router loss")
    return ", ".join(words)


def close(ours, own, what):
    error, size = float((ours - own).abs().max()), float(own.abs().max())
    assert error <= 1e-4 * size + 1e-6, f"{what}: off by {error:.2e} of {size:.2e}"


def page(verdicts):
    """The text of docs/families.md."""
    import transformers

    count = {name: sum(v.outcome == name for v in verdicts) for name in OUTCOMES}
    lines = [
        "# Model families",
        "",
        f"Every causal LM of transformers {transformers.__version__}",
        "(`MODEL_FOR_CAUSAL_LM_MAPPING`), made tiny from its config with multipliers and caps",
        "other than 1 and router losses on, and compared with itself: its logits, its loss on",
        "labels and every gradient of that loss, to 1e-4 of the largest value in float32.",
        "",
        f"**{count['exact']} exact, {count['refused']} refused** by `prepare_student` in the words",
        f"below, {count['not made']} not made (listed with the error, here or of transformers).",
        "Written by `python tests/family_cases.py --write`; a test fails when it is stale.",
        "",
        "| family | class | verdict | what follows its lm_head, or why not |",
        "|---|---|---|---|",
    ]
    for v in verdicts:
        detail = v.detail.replace("|", "\\|")
        lines.append(f"| {v.family} | {v.architecture} | {v.outcome} | {detail} |")
    return "\n".join(lines) + "\n"


def main():
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("families", nargs="*", help="all by default")
    parser.add_argument("--write", action="store_true", help=f"write {PAGE.name}")
    chosen = parser.parse_args()
    started = time.perf_counter()
    verdicts = [judge(family) for family in chosen.families or names()]
    text = page(verdicts)
    print(text)
    print(f"{len(verdicts)} families in {time.perf_counter() - started:.0f} s")
    if chosen.write:
        PAGE.write_text(text)


if __name__ == "__main__":
    main()
