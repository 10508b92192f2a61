"""Random models in the shapes of real ones: their steps cost what the real ones' cost."""

from __future__ import annotations

from typing import Any

import torch


def make_model(hidden: int, layers: int, vocab: int, seed: int, dtype: torch.dtype) -> Any:
    """A Qwen2 with a tied lm_head and heads of 64; the same weights for the same seed."""
    from transformers import Qwen2Config, Qwen2ForCausalLM

    config = Qwen2Config(
        vocab_size=vocab,
        hidden_size=hidden,
        intermediate_size=4 * hidden,
        num_hidden_layers=layers,
        num_attention_heads=max(1, hidden // 64),
        num_key_value_heads=1,
        tie_word_embeddings=True,
        use_cache=False,
        pad_token_id=0,
        bos_token_id=1,
        eos_token_id=2,
    )
    state = torch.random.get_rng_state()
    torch.manual_seed(seed)
    try:
        return Qwen2ForCausalLM(config).to(dtype)
    finally:
        torch.random.set_rng_state(state)


def matmul_parameters(hidden: int, layers: int, vocab: int) -> int:
    """Weights that every token is multiplied with: projections, MLPs and the lm_head."""
    kv = 2 * hidden * min(hidden, 64)
    return layers * (2 * hidden**2 + kv + 12 * hidden**2) + vocab * hidden
