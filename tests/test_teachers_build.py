"""build_cache stores what the teacher's own forward gives, and continues where it was stopped."""

import cache_cases as cases
import pytest
import torch

from kd.cache import TeacherCache
from kd.teachers import build_cache, cache_meta
from kd.teachers.logits import LogitSource


def check(cache, model, sequences, k, temperature=1.0, live=61):
    """Every row equals the log-softmax of the model's own logits."""
    for input_ids in sequences:
        with torch.no_grad():
            logits = model(input_ids[None].long()).logits[0, :, :live].float()
        wanted = (logits / temperature).log_softmax(-1)
        found = cache.lookup(input_ids)
        assert found.ids.shape == (len(input_ids), k)
        torch.testing.assert_close(found.logprobs, wanted.gather(1, found.ids), atol=1e-5, rtol=0)
        best = wanted.topk(k).values
        torch.testing.assert_close(
            found.logprobs.sort(-1, descending=True)[0], best, atol=1e-5, rtol=0
        )


@pytest.mark.parametrize("temperature", [1.0, 2.0])
def test_rows_are_the_teachers_distribution_for_the_next_token(tmp_path, temperature):
    model, sequences = cases.teacher(), cases.texts(20)
    cache = build_cache(
        model, sequences, tmp_path / "cache", top_k=5, codec="float32", temperature=temperature,
        batch_tokens=100, shard_tokens=50, progress=False,
    )  # fmt: skip
    assert cache.meta.temperature == temperature and len(cache.manifest.shards) > 2
    check(cache, model, sequences, 5, temperature)


def test_dead_columns_are_left_out_of_the_softmax(tmp_path):
    model, sequences = cases.teacher(), cases.texts(6, vocabulary=50)
    cache = build_cache(
        model,
        sequences,
        tmp_path / "cache",
        top_k=50,
        codec="float32",
        live_vocab=50,
        progress=False,
    )
    assert (cache.meta.live_vocab, cache.meta.padded_vocab) == (50, 61)
    check(cache, model, sequences, 50, live=50)
    total = cache.lookup(sequences[0]).logprobs.exp().sum(-1)
    torch.testing.assert_close(total, torch.ones_like(total))


@pytest.mark.parametrize("model_class", ["Gemma2ForCausalLM", "CohereForCausalLM"])
def test_softcap_and_logit_scale_are_the_models_own(tmp_path, model_class):
    import transformers

    options = {"final_logit_softcapping": 2.0, "head_dim": 8} if "Gemma" in model_class else {}
    config = getattr(transformers, model_class.replace("ForCausalLM", "Config"))(
        vocab_size=61, hidden_size=16, intermediate_size=32, num_hidden_layers=2,
        num_attention_heads=2, num_key_value_heads=1, initializer_range=0.5, **options,
    )  # fmt: skip
    torch.manual_seed(0)
    model, sequences = getattr(transformers, model_class)(config).eval(), cases.texts(5)
    cache = build_cache(
        model, sequences, tmp_path / "cache", top_k=6, codec="float32", progress=False
    )
    check(cache, model, sequences, 6)


def test_a_head_that_does_something_else_is_noticed(tmp_path):
    model, sequences = cases.teacher(), cases.texts(5)
    own = model.forward

    def forward(*args, **kwargs):
        out = own(*args, **kwargs)
        out.logits = out.logits * 0.25 + torch.linspace(0, 3, 61)
        return out

    model.forward = forward
    cache = build_cache(
        model, sequences, tmp_path / "cache", top_k=6, codec="float32", progress=False
    )
    check(cache, model, sequences, 6)


def test_a_second_run_computes_nothing(tmp_path):
    model, sequences = cases.teacher(), cases.texts(20)
    build_cache(model, sequences[:9], tmp_path / "cache", top_k=5, progress=False)
    first = build_cache(model, sequences, tmp_path / "cache", top_k=5, progress=False)
    calls = []
    model.register_forward_pre_hook(lambda *_: calls.append(1))
    model.model.register_forward_pre_hook(lambda *_: calls.append(1))
    second = build_cache(model, sequences, tmp_path / "cache", top_k=5, progress=False)
    assert not calls and second.content_digest() == first.content_digest()


def test_repeated_sequences_are_stored_once(tmp_path):
    model, sequences = cases.teacher(), cases.texts(5)
    cache = build_cache(model, sequences * 3, tmp_path / "cache", top_k=5, progress=False)
    assert len(cache) == 5


def test_limit(tmp_path):
    cache = build_cache(
        cases.teacher(), iter(cases.texts(20)), tmp_path / "cache", top_k=5, limit=7,
        progress=False,
    )  # fmt: skip
    assert len(cache) == 7


def test_another_model_is_refused_and_nothing_is_changed(tmp_path):
    sequences = cases.texts(5)
    build_cache(cases.teacher(), sequences, tmp_path / "cache", top_k=5, progress=False)
    before = {item: item.read_bytes() for item in (tmp_path / "cache").iterdir()}
    with pytest.raises(ValueError, match="teacher.weights_hash: the cache has"):
        build_cache(cases.teacher(seed=1), sequences, tmp_path / "cache", top_k=5, progress=False)
    with pytest.raises(ValueError, match="temperature: the cache has 1.0, this run has 2.0"):
        build_cache(
            cases.teacher(), sequences, tmp_path / "cache", top_k=5, temperature=2.0, progress=False
        )
    after = {item: item.read_bytes() for item in (tmp_path / "cache").iterdir()}
    assert {k: v for k, v in before.items() if not k.name.startswith(".")} == {
        k: v for k, v in after.items() if not k.name.startswith(".")
    }
    TeacherCache(tmp_path / "cache", expect=cache_meta(cases.teacher(), top_k=5))


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_bad_logits_name_the_sequence_and_the_row(tmp_path, value):
    model, sequences = cases.teacher(), [t.clamp(max=59) for t in cases.texts(4, longest=9)]
    victim = sequences[2]
    victim[-1] = 60
    at = []
    model.model.embed_tokens.register_forward_pre_hook(lambda _, args: at.append(args[0] == 60))

    def poison(module, args, hidden):
        return hidden.masked_fill(at[-1][..., None], value)

    model.model.norm.register_forward_hook(poison)
    options = {"top_k": 5, "progress": False, "batch_tokens": 8}
    with pytest.raises(ValueError, match=rf"row {len(victim) - 1} of sequence .*{len(victim)} tok"):
        build_cache(model, sequences, tmp_path / "error", **options)
    with pytest.raises(ValueError, match="capture of .* must have ended"):
        TeacherCache(tmp_path / "error")
    dropped = build_cache(model, sequences, tmp_path / "drop", on_bad_rows="drop", **options)
    assert victim not in dropped and len(dropped) == 3
    assert dropped.manifest.counters == {"dropped_sequences": 1}
    masked = build_cache(model, sequences, tmp_path / "mask", on_bad_rows="mask", **options)
    assert (masked.lookup(victim).ids[-1] == -1).all()
    assert (masked.lookup(victim).ids[:-1] >= 0).all()


def test_k_past_the_vocabulary_is_refused(tmp_path):
    with pytest.raises(ValueError, match="top_k must be from 1 to live_vocab .61., .* got 62"):
        build_cache(cases.teacher(), cases.texts(2), tmp_path / "cache", top_k=62)


def test_zero_and_over_length_sequences_are_refused(tmp_path):
    model = cases.teacher()
    with pytest.raises(ValueError, match="sequence 1: input_ids must hold at least one token"):
        build_cache(model, [[1, 2], []], tmp_path / "cache", progress=False, top_k=4)
    with pytest.raises(ValueError, match="at most 64 tokens, got 65 in sequence 0"):
        build_cache(model, [[1] * 65], tmp_path / "cache", progress=False, top_k=4)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("kind", ["plain", "bias", "hooked"])
def test_chunks_are_the_models_logits_whatever_their_size(dtype, kind):
    model = cases.teacher(tie_word_embeddings=False).to(dtype)
    if kind == "bias":
        head = torch.nn.Linear(16, 61, bias=True, dtype=dtype)
        model.set_output_embeddings(head)
    if kind == "hooked":
        model.lm_head.register_forward_hook(lambda module, args, logits: logits * 0.5)
    tokens = torch.randint(0, 61, (3, 20))
    lengths = [20, 13, 7]
    with torch.no_grad():
        whole = model(input_ids=tokens).logits
    wanted = torch.cat([row[:n] for row, n in zip(whole, lengths, strict=True)])[:, :60]
    rows = [row[:n].numpy() for row, n in zip(tokens, lengths, strict=True)]
    for size in (1, 7, 40, None):
        source = LogitSource(model, 60, chunk_rows=size)
        for _ in range(2):  # buffers are used again
            found = torch.cat([part.clone() for part in source.chunks(rows)])
            error = (found.float() - wanted.float()).abs().max()
            assert error <= (2**-6 if dtype == torch.bfloat16 else 1e-5), error
