"""Packs: each document as if it were alone, whatever the model and its attention, or a refusal."""

import copy
import itertools
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from training_cases import RandomCache, rows, student
from transformers import AutoConfig, AutoModelForCausalLM
from transformers.masking_utils import ALL_MASK_ATTENTION_FUNCTIONS
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

from kd.traces import isolates_documents
from kd.training import DistillationCollator, Objective, Teacher, compute_loss, prepare_student
from kd.training.packs import documents_apart, flattened

FLASH = "flash_of_tests"
SIZES = {
    "vocab_size": 23,
    "hidden_size": 16,
    "intermediate_size": 32,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "num_key_value_heads": 2,
    "max_position_embeddings": 64,
    "pad_token_id": 0,
    "initializer_range": 0.3,
}
LEAKY = {
    "bloom": {"n_layer": 2, "n_head": 2},
    "opt": {"ffn_dim": 32, "word_embed_proj_dim": 16},
    "mamba": {"state_size": 4},
    "mamba2": {"state_size": 4, "num_heads": 4, "head_dim": 8, "n_groups": 1, "chunk_size": 8},
}
MAMBA = {"mamba_n_heads": 4, "mamba_d_head": 8, "mamba_d_state": 4, "mamba_n_groups": 1}
HYBRIDS = {
    "falcon_h1": {**MAMBA, "mamba_d_ssm": 32, "mamba_chunk_size": 8},
    "bamba": {**MAMBA, "attn_layer_indices": [1]},
    "jamba": {"attn_layer_offset": 1, "attn_layer_period": 2, "num_experts": 2},
}


def tiny(kind, **options):
    attention = options.pop("attn_implementation", None)
    config = AutoConfig.for_model(kind, **{**SIZES, **options})
    with torch.random.fork_rng():
        torch.manual_seed(0)
        return AutoModelForCausalLM.from_config(config, attn_implementation=attention)


def packs(seed=0, weights=False, domains=False):
    """Three packs of two, one and three documents."""
    made, documents = [], iter(rows(6, seed, weights))
    for count in (2, 1, 3):
        taken = list(itertools.islice(documents, count))
        row = {key: [i for one in taken for i in one[key]] for key in taken[0]}
        row["lengths"] = [len(one["input_ids"]) for one in taken]
        if domains:
            row["domains"] = ["a", "b", "a"][:count]
        made.append(row)
    return made


def alone(model, **options):
    """The loss of the same documents, one a row."""
    return compute_loss(model, DistillationCollator(0)(rows(6, **options)))


def flash(module, query, key, value, mask, scaling=None, position_ids=None, **options):
    """What transformers' flash attention does: several rows are never looked into."""
    length, borders = query.shape[2], [0, query.shape[2]]
    if options.get("cu_seq_lens_q") is not None:
        borders = options["cu_seq_lens_q"].tolist()
    elif len(query) == 1 and position_ids is not None:
        borders = [*(position_ids[0] == 0).nonzero()[:, 0].tolist(), length]
    groups = query.shape[1] // key.shape[1]
    key, value = (t.repeat_interleave(groups, 1) for t in (key, value))
    parts = [
        torch.nn.functional.scaled_dot_product_attention(
            query[:, :, a:b], key[:, :, a:b], value[:, :, a:b], is_causal=True, scale=scaling
        )
        for a, b in itertools.pairwise(borders)
    ]
    return torch.cat(parts, 2).transpose(1, 2), None


@pytest.fixture
def flash_attention(monkeypatch):
    monkeypatch.setitem(ALL_ATTENTION_FUNCTIONS._global_mapping, FLASH, flash)
    monkeypatch.setitem(
        ALL_MASK_ATTENTION_FUNCTIONS._global_mapping, FLASH, lambda *args, **kwargs: None
    )


def with_flash(model):
    model.config._attn_implementation = FLASH
    return model


def gradient(model):
    found = torch.cat([p.grad.flatten() for p in model.parameters() if p.grad is not None])
    model.zero_grad()
    return found


# --- by architecture ------------------------------------------------------------------------------


@pytest.mark.parametrize("attention", ["sdpa", "eager"])
@pytest.mark.parametrize("kind", ["qwen2", "llama", "phi3", "mixtral"])
def test_rows_of_packs_have_the_loss_of_single_documents(kind, attention):
    model = prepare_student(tiny(kind, attn_implementation=attention)).eval()
    packed = compute_loss(model, DistillationCollator(0)(packs()))
    assert abs(packed - alone(model)) < 1e-5


@pytest.mark.parametrize("kind", LEAKY)
def test_models_that_mix_documents_are_refused_by_name(kind):
    model = prepare_student(tiny(kind, **LEAKY[kind]))
    batch = DistillationCollator(0)(packs())
    with pytest.raises(TypeError, match=rf"{type(model).__name__}.*attn_implementation.*unpacked"):
        compute_loss(model, batch)
    assert alone(model).isfinite()
    with pytest.raises(TypeError, match=f"a teacher {type(model).__name__}"):
        compute_loss(prepare_student(student()), batch, Objective(teacher=model))


@pytest.mark.parametrize("kind", HYBRIDS)
def test_hybrids_are_decided_by_measurement(kind):
    """The verdict is that of their logits behind one document and behind another."""
    model = prepare_student(tiny(kind, **HYBRIDS[kind])).eval()
    ids = torch.tensor([[3, 4, 5, 6, 7, 8], [9, 10, 11, 6, 7, 8]])
    positions = torch.tensor([[0, 1, 2, 0, 1, 2]] * 2)
    with torch.no_grad():
        logits = model(input_ids=ids, position_ids=positions, use_cache=False).logits
    apart = bool((logits[0, 3:] - logits[1, 3:]).abs().max() < 1e-5)
    assert isolates_documents(model) == apart
    batch = DistillationCollator(0)(packs())
    if apart:
        assert abs(compute_loss(model, batch) - alone(model)) < 1e-5
    else:
        with pytest.raises(TypeError, match=type(model).__name__):
            compute_loss(model, batch)


def test_a_leak_is_found_in_every_precision_and_at_any_size_of_weights():
    for dtype, spread in itertools.product((torch.float32, torch.bfloat16), (0.3, 0.02)):
        for kind in ("bloom", "opt", "mamba"):
            model = tiny(kind, **LEAKY[kind], **{"initializer_range": spread}).to(dtype)
            assert not isolates_documents(model), (kind, dtype, spread)
        for kind in ("qwen2", "mixtral"):
            model = tiny(kind, initializer_range=spread).to(dtype)
            assert isolates_documents(model), (kind, dtype, spread)


def test_it_is_measured_once_and_again_for_another_attention(flash_attention):
    model = prepare_student(student()).train()
    calls = []
    model.model.register_forward_pre_hook(lambda *args: calls.append(1))
    plain, packed = DistillationCollator(0)(rows(3)), DistillationCollator(0)(packs())
    compute_loss(model, plain)
    assert len(calls) == 1  # nothing is measured before packs come
    before = torch.get_rng_state()
    compute_loss(model, packed)
    assert len(calls) > 2
    assert torch.equal(before, torch.get_rng_state())
    assert model.training and all(module.training for module in model.modules())
    assert all(p.grad is None for p in model.parameters())
    count = len(calls)
    compute_loss(model, packed)
    assert len(calls) == count + 1
    with_flash(model)
    compute_loss(model, packed)
    assert len(calls) > count + 2


def test_the_verdict_is_that_of_the_attention_in_use(monkeypatch):
    """An attention under a name of its own that never looks for borders is refused."""
    monkeypatch.setitem(
        ALL_ATTENTION_FUNCTIONS._global_mapping,
        FLASH,
        lambda *args, **kwargs: flash(*args[:5], scaling=kwargs.get("scaling")),
    )
    monkeypatch.setitem(
        ALL_MASK_ATTENTION_FUNCTIONS._global_mapping, FLASH, lambda *args, **kwargs: None
    )
    model, batch = prepare_student(student()), DistillationCollator(0)(packs())
    compute_loss(model, batch)
    with pytest.raises(TypeError, match=f"attn_implementation='{FLASH}'"):
        compute_loss(with_flash(model), batch)


# --- one row --------------------------------------------------------------------------------------


def test_flash_attention_gets_one_row(flash_attention):
    model = prepare_student(student()).eval()
    batch = DistillationCollator(0)(packs())
    right = compute_loss(model, batch)
    assert abs(right - alone(model)) < 1e-5
    with_flash(model)
    ids, positions = batch["input_ids"], batch["position_ids"]
    with torch.no_grad():  # the fault: its rows are single documents
        logits = model(input_ids=ids, position_ids=positions).logits
    wrong = torch.nn.functional.cross_entropy(logits.flatten(0, 1), batch["shift_labels"].flatten())
    assert abs(wrong - right) > 1e-3
    assert not isolates_documents(model)
    assert isolates_documents(model, flat=True)
    assert abs(compute_loss(model, batch) - right) < 1e-6


@pytest.mark.parametrize("case", ["labels", "weights", "cache", "model", "several", "domains"])
def test_one_row_has_the_loss_and_the_gradient_of_several(case, flash_attention):
    tails = RandomCache((1.0, 2.0))
    teachers = {
        "labels": None,
        "weights": None,
        "cache": RandomCache(),
        "model": student(1),
        "several": [Teacher(tails, 0.3), Teacher(student(1), 0.7), Teacher(student(2), 0.1)],
        "domains": [
            Teacher(tails, domains=("a",)),
            Teacher(student(1), 0.5, domains=("b",)),
        ],
    }[case]
    objective = Objective()
    if teachers is not None:
        objective = Objective(kd_weight=0.7, ce_weight=0.3, teacher=teachers)
    given = packs(weights=case in ("weights", "several"), domains=case == "domains")
    batch = DistillationCollator(0, objective, pad_to_multiple_of=5)(given)
    model = prepare_student(student()).double()
    losses, gradients = [], []
    for one, attention in ((batch, "sdpa"), (flattened(batch), "sdpa"), (batch, FLASH)):
        model.config._attn_implementation = attention
        losses.append(compute_loss(model, one, objective))
        losses[-1].backward()
        gradients.append(gradient(model))
    for loss, found in zip(losses[1:], gradients[1:], strict=True):
        assert abs(loss - losses[0]) < 1e-6
        assert (found - gradients[0]).norm() < 1e-6 * gradients[0].norm()


def test_a_teacher_with_flash_attention_gets_one_row_too(flash_attention):
    model, teacher = prepare_student(student()), student(1)
    objective = Objective(teacher=teacher)
    batch = DistillationCollator(0, objective)(packs())
    right = compute_loss(model, batch, objective)
    with_flash(teacher)
    assert abs(compute_loss(model, batch, objective) - right) < 1e-6


def test_a_flattened_batch_says_where_documents_begin():
    batch = flattened(DistillationCollator(0)(packs()))
    lengths = [len(row["input_ids"]) for row in rows(6)]
    width = max(sum(row["lengths"]) for row in packs())
    expected = []
    for row in packs():
        expected += row["lengths"] + [width - sum(row["lengths"])] * (sum(row["lengths"]) < width)
    assert batch["cu_seq_lens_q"].diff().tolist() == expected
    assert batch["input_ids"].shape == (1, 3 * width)
    assert batch["max_length_k"] == max(max(lengths), max(expected))
    assert batch["cu_seq_lens_q"].dtype == torch.int32


# --- the form of the batch ------------------------------------------------------------------------


def test_packs_beside_an_attention_mask_are_refused():
    model, batch = prepare_student(student()), DistillationCollator(0)(packs())
    shape = batch["input_ids"].shape
    for mask in (torch.ones(shape).long(), torch.ones(3, 1, shape[1], shape[1]).bool()):
        with pytest.raises(ValueError, match="attention_mask must be left out"):
            compute_loss(model, {**batch, "attention_mask": mask})


def test_positions_of_padding_are_no_packs():
    """Left padding with the positions that transformers counts for it is a single document."""
    batch = DistillationCollator(0)(rows(3))
    moved = {key: value.flip(1) for key, value in batch.items()}
    mask = moved["attention_mask"]
    moved["position_ids"] = (mask.cumsum(1) - 1).masked_fill(mask == 0, 1)
    model = prepare_student(tiny("opt", **LEAKY["opt"]))
    assert documents_apart(model, moved) is moved
    plain = {**batch, "position_ids": torch.arange(batch["input_ids"].shape[1])[None]}
    assert documents_apart(model, plain) is plain


def test_borders_that_only_flash_attention_reads_are_refused():
    model, batch = prepare_student(tiny("llama")), DistillationCollator(0)(packs())
    right, batch = compute_loss(model, batch), flattened(batch)
    model.config.max_position_embeddings = 128
    assert abs(compute_loss(model, batch) - right) < 1e-6
    counted = torch.arange(batch["input_ids"].shape[1])[None]
    for positions in (None, counted):
        with pytest.raises(ValueError, match="position_ids must start at 0 in every document"):
            compute_loss(model, {**batch, "position_ids": positions})


def test_a_model_is_measured_in_wrappers_and_adapters(tmp_path):
    from peft import LoraConfig, get_peft_model

    batch = DistillationCollator(0)(packs())
    lora = get_peft_model(tiny("opt", **LEAKY["opt"]), LoraConfig(target_modules=["q_proj"], r=2))
    with pytest.raises(TypeError, match="OPTForCausalLM"):
        compute_loss(prepare_student(lora), batch)
    torch.distributed.init_process_group(
        "gloo", init_method=f"file://{tmp_path}/store", rank=0, world_size=1
    )
    try:
        leaky = torch.nn.parallel.DistributedDataParallel(
            prepare_student(tiny("opt", **LEAKY["opt"]))
        )
        with pytest.raises(TypeError, match="OPTForCausalLM"):
            compute_loss(leaky, batch)
        good = torch.nn.parallel.DistributedDataParallel(prepare_student(student()))
        assert compute_loss(good, batch).isfinite()
        _sharded_is_measured_at_once()
    finally:
        torch.distributed.destroy_process_group()


def _sharded_is_measured_at_once():
    """Not at the first packs, which another rank may not have: then it would wait for ever."""
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.fsdp import fully_shard

    mesh = init_device_mesh("cpu", (1,))
    for made, apart in ((student(), True), (tiny("opt", **LEAKY["opt"]), False)):
        reference = prepare_student(copy.deepcopy(made)).eval()
        model = fully_shard(prepare_student(made).eval(), mesh=mesh)
        calls = []
        model.register_forward_pre_hook(lambda *args, seen=calls: seen.append(1))
        plain = DistillationCollator(0)(rows(3))
        loss = compute_loss(model, plain)
        assert abs(loss - compute_loss(reference, plain)) < 1e-5
        assert len(calls) > 1
        loss.backward()
        count, packed = len(calls), DistillationCollator(0)(packs())
        if apart:
            assert abs(compute_loss(model, packed) - compute_loss(reference, packed)) < 1e-5
            assert len(calls) == count + 1
        else:
            with pytest.raises(TypeError, match="OPTForCausalLM"):
                compute_loss(model, packed)
            assert len(calls) == count


@pytest.mark.slow
def test_a_rank_with_packs_does_not_wait_for_one_without():
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node=2"]
    root = Path(__file__).parents[1]
    paths = [str(root / part) for part in ("", "kernels", "recipes")]
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(paths), "OMP_NUM_THREADS": "1"}
    done = subprocess.run(
        [*command, __file__], env=environment, capture_output=True, text=True, timeout=120
    )
    assert done.returncode == 0, done.stderr[-3000:]


def _packs_on_the_second_rank_only():
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.fsdp import fully_shard

    torch.distributed.init_process_group("gloo")
    reference, model = prepare_student(student()), prepare_student(student())
    mesh = init_device_mesh("cpu", (2,))
    for layer in (*model.model.layers, model):
        fully_shard(layer, mesh=mesh)
    given = packs() if torch.distributed.get_rank() else rows(3)
    batch = DistillationCollator(0)(given)
    for _ in range(2):
        loss = compute_loss(model, batch)
        loss.backward()
        assert abs(loss - compute_loss(reference, batch)) < 1e-5
    torch.distributed.destroy_process_group()


if __name__ == "__main__":
    _packs_on_the_second_rank_only()
