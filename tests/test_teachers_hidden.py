"""The hidden-state tier: the teacher's whole distribution comes back, by the same interface."""

import cache_cases as cases
import pytest
import torch

import kd
from kd.cache import HiddenCache, TeacherCache
from kd.cache.info import cache_info
from kd.cache.verify import verify_cache
from kd.teachers import build_hidden_cache


@pytest.fixture(scope="module")
def model():
    return cases.teacher()


def build(model, sequences, path, **options):
    options = {"progress": False, "batch_tokens": 60, "shard_tokens": 100, **options}
    return build_hidden_cache(model, sequences, path, **options)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
@pytest.mark.parametrize("codec", ["hidden_bf16", "hidden_fp8"])
def test_targets_are_the_teachers_logits(tmp_path, codec, dtype):
    model, sequences = cases.teacher().to(dtype), cases.texts(15)
    cache = build(model, sequences, tmp_path / "cache", codec=codec)
    assert len(cache) == 15 and len(cache.manifest.shards) > 1
    for tokens in sequences:
        with torch.no_grad():
            wanted = model(tokens[None]).logits[0].float().log_softmax(-1)
        found = cache.lookup(tokens)
        assert found.hidden.shape == (len(tokens), 16) and found.weight.shape == (61, 16)
        got = (found.hidden.float() @ found.weight.float().T).log_softmax(-1)
        kl = (wanted.exp() * (wanted - got)).sum(-1)
        assert kl.max() < {"hidden_bf16": 1e-3, "hidden_fp8": 2e-2}[codec]


def test_a_bfloat16_teacher_is_stored_exactly(tmp_path):
    model, tokens = cases.teacher().bfloat16(), torch.arange(1, 20)
    cache = build(model, [tokens], tmp_path / "cache")
    with torch.no_grad():
        wanted = model.model(tokens[None]).last_hidden_state[0]
    assert torch.equal(cache.lookup(tokens).hidden, wanted)


def test_batches_feed_the_loss(tmp_path, model):
    sequences = cases.texts(4)
    cache = build(model, sequences, tmp_path / "cache")
    batch = cache.batch(sequences, 40)
    teacher = kd.Hidden(batch.hidden, batch.weight, batch.bias, batch.logit_scale, batch.softcap)
    labels = torch.full((4, 40), -100)
    for row, tokens in zip(labels, sequences, strict=True):
        row[: len(tokens)] = 1
    with torch.no_grad():
        own = torch.stack([
            torch.nn.functional.pad(model(t[None]).logits[0], (0, 0, 0, 40 - len(t)))
            for t in sequences
        ])  # fmt: skip
    options = {"labels": labels, "temperature": 2.0, "vocab_size": batch.live_vocab}
    assert kd.distillation_loss(own, teacher, **options) < 1e-3
    assert kd.distillation_loss(torch.zeros(4, 40, 61), teacher, **options) > 1e-2
    packed = cache.packed([sequences[:2], sequences[2:]], 80)
    first = len(sequences[0])
    assert torch.equal(packed.hidden[0, :first], batch.hidden[0, :first])
    assert torch.equal(packed.hidden[0, first : first + 3], batch.hidden[1, :3])


def test_it_resumes_verifies_and_describes_itself(tmp_path, model):
    sequences = cases.texts(15)
    build(model, sequences[:6], tmp_path / "cache")
    cache = build(model, sequences, tmp_path / "cache")
    whole = build(model, sequences[::-1], tmp_path / "whole", batch_tokens=60)
    assert len(cache) == len(whole) == 15
    assert verify_cache(tmp_path / "cache").sound
    assert "hidden_bf16" in cache_info(tmp_path / "cache").text()


def test_each_tier_is_opened_by_its_own_reader(tmp_path, model):
    build(model, cases.texts(2), tmp_path / "cache")
    with pytest.raises(ValueError, match="must hold sparse targets, got hidden states"):
        TeacherCache(tmp_path / "cache")


def test_a_changed_or_missing_head_is_refused(tmp_path, model):
    sequences = cases.texts(2)
    build(model, sequences, tmp_path / "cache")
    head = tmp_path / "cache" / "lm_head.safetensors"
    data = bytearray(head.read_bytes())
    data[-3] ^= 1
    head.write_bytes(data)
    with pytest.raises(ValueError, match="lm_head.safetensors must have SHA-256"):
        HiddenCache(tmp_path / "cache").lookup(sequences[0])
    head.unlink()
    with pytest.raises(FileNotFoundError, match="lm_head.safetensors must be in"):
        HiddenCache(tmp_path / "cache").lookup(sequences[0])


def test_infinite_states_and_odd_heads_are_refused(tmp_path):
    poisoned = cases.teacher()
    poisoned.model.norm.register_forward_hook(lambda m, a, out: out.index_fill(1, torch.tensor([2]), float("inf")))  # noqa: E501  # fmt: skip
    with pytest.raises(ValueError, match="own logit|NaN or infinity in row 2"):
        build(poisoned, [torch.arange(5)], tmp_path / "a")
    odd = cases.teacher()
    own = odd.forward

    def forward(*args, **kwargs):
        out = own(*args, **kwargs)
        out.logits = out.logits**3
        return out

    odd.forward = forward
    with pytest.raises(ValueError, match="Qwen2ForCausalLM: it does more .* than scale"):
        build(odd, [torch.arange(5)], tmp_path / "b")
