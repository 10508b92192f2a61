"""Caches of random targets for the cache tests."""

import json

import numpy as np
import torch

from kd.cache import CacheMeta, CacheWriter, TeacherCache, manifest


def meta(live=1000, top_k=8, codec="float32", **options):
    """The identity of a small cache; every field can be given."""
    fields = {
        "teacher": {"id": "teacher", "revision": "a1", "config_hash": "c0ffee", "dtype": "float32"},
        "tokenizer": {"fingerprint": "f00d"},
        "live_vocab": live,
        "padded_vocab": live + 7,
        "top_k": top_k,
        "codec": codec,
    }
    return CacheMeta(**{**fields, **options})


def targets(length, k, live, seed=0, scale=3.0):
    """input_ids [L], ids [L, k] and log-probs [L, k] of the k likeliest of random logits."""
    generator = torch.Generator().manual_seed(seed)
    input_ids = torch.randint(0, live, (length,), generator=generator)
    logits = scale * torch.randn(length, live, generator=generator)
    top = logits.log_softmax(-1).topk(k)
    return input_ids, top.indices, top.values


def sequences(count, k=8, live=1000, seed=0, lengths=(1, 30)):
    """Targets of sequences whose lengths vary."""
    rng = np.random.default_rng(seed)
    return [
        targets(int(rng.integers(lengths[0], lengths[1] + 1)), k, live, seed=1000 * seed + i)
        for i in range(count)
    ]


def write(path, items, identity=None, **options):
    """Write a cache and open it."""
    with CacheWriter(path, identity or meta(), **options) as writer:
        for item in items:
            writer.add(*item)
    return TeacherCache(path)


def teacher(seed=0, vocabulary=61, **options):
    """A Qwen2 of a few thousand parameters."""
    from transformers import Qwen2Config, Qwen2ForCausalLM

    config = Qwen2Config(
        vocab_size=vocabulary,
        hidden_size=16,
        intermediate_size=32,
        num_hidden_layers=2,
        num_attention_heads=2,
        num_key_value_heads=1,
        max_position_embeddings=64,
        use_cache=False,
        pad_token_id=0,
        **{"initializer_range": 0.5, "tie_word_embeddings": True, **options},
    )
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        return Qwen2ForCausalLM(config).eval()


def texts(count, vocabulary=61, seed=0, longest=40):
    """Random token sequences of 1 to ``longest`` tokens."""
    rng = np.random.default_rng(seed)
    return [
        torch.from_numpy(rng.integers(0, vocabulary, int(rng.integers(1, longest + 1))))
        for _ in range(count)
    ]


class Changed:
    """A tensor's place in a shard, with other bytes."""

    def __init__(self, data):
        self.data = data

    def read(self, first, last):
        return self.data[first:last]


def shards(folder):
    """Its shards' files, in order."""
    return sorted(folder.glob("shard-*"))


def rewrite_manifest(folder, change):
    """Change a manifest, and sign it again."""
    body = json.loads((folder / "manifest.json").read_text())
    change(body)
    body["digest"] = manifest.digest_of(body)
    (folder / "manifest.json").write_text(json.dumps(body))


def snapshot(folder):
    """Name and bytes of every file that belongs to the format."""
    return {item.name: item.read_bytes() for item in folder.iterdir() if item.name[0] != "."}
