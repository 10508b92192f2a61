"""Small real tokenizers, templates and models for the trace tests; nothing is downloaded."""

from __future__ import annotations

import json
from functools import lru_cache
from pydoc_data.topics import topics

import torch
from tokenizers import Tokenizer, decoders, models, normalizers, pre_tokenizers, trainers
from transformers import PreTrainedTokenizerFast, Qwen2Config, Qwen2ForCausalLM

CHATML_QWEN = (
    "{% if messages[0]['role'] != 'system' %}<|im_start|>system\nYou are a helpful assistant."
    "<|im_end|>\n{% endif %}{% for message in messages %}<|im_start|>{{ message['role'] }}\n"
    "{{ message['content'] }}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)
# R1-Distill's habit: everything before </think> of an assistant's turn is deleted.
R1_DISTILL = (
    "{% for message in messages %}{% if message['role'] == 'system' %}{{ message['content'] }}"
    "{% elif message['role'] == 'user' %}<|User|>{{ message['content'] }}"
    "{% else %}<|Assistant|>{{ message['content'].split('</think>')[-1] }}<|eos|>{% endif %}"
    "{% endfor %}{% if add_generation_prompt %}<|Assistant|>{% endif %}"
)
R1_PREFILLED = R1_DISTILL.replace(
    "{% if add_generation_prompt %}<|Assistant|>",
    "{% if add_generation_prompt %}<|Assistant|><think>\n",
)
# Qwen3's habit: a turn without a thought gets an empty one; the thought of the last turn stays.
QWEN3 = (
    "{% for message in messages %}<|im_start|>{{ message['role'] }}\n"
    "{% if message['role'] == 'assistant' %}{% if '</think>' in message['content'] %}"
    "{{ message['content'] }}{% else %}<think>\n\n</think>\n\n{{ message['content'] }}{% endif %}"
    "{% else %}{{ message['content'] }}{% endif %}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n"
    "{% if enable_thinking is defined and not enable_thinking %}<think>\n\n</think>\n\n{% endif %}"
    "{% endif %}"
)
LLAMA = (
    "{{ bos_token }}{% for message in messages %}[{{ message['role'] }}]\n{{ message['content'] }}"
    "<|eos|>{% endfor %}{% if add_generation_prompt %}[assistant]\n{% endif %}"
)


def byte_tokenizer(
    template: str | None,
    *,
    eos: str = "<|im_end|>",
    pad: str = "<|pad|>",
    think_tokens: bool = False,
    normalise: bool = False,
    bos: str | None = None,
) -> PreTrainedTokenizerFast:
    """A byte-level tokenizer of 256 letters and special tokens, as small as one can be."""
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    special = ["<|pad|>", "<|im_start|>", "<|im_end|>", "<|eos|>", "<|User|>", "<|Assistant|>"]
    vocabulary = {token: i for i, token in enumerate(special + alphabet)}
    backend = Tokenizer(models.BPE(vocab=vocabulary, merges=[], unk_token=None))
    if normalise:
        backend.normalizer = normalizers.NFC()
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    backend.decoder = decoders.ByteLevel()
    extra = [token for token in special if token not in (eos, pad)]
    if think_tokens:
        extra += ["<think>", "</think>"]
    options = {"bos_token": bos} if bos else {}
    made = PreTrainedTokenizerFast(
        tokenizer_object=backend,
        eos_token=eos,
        pad_token=pad,
        additional_special_tokens=extra,
        clean_up_tokenization_spaces=False,
        **options,
    )
    made.chat_template = template
    return made


SPECIAL = ["<unk>", "<s>", "</s>", "[INST]", "[/INST]"]
BYTES = [f"<0x{number:02X}>" for number in range(256)]
LLAMA2 = (
    "{{ bos_token }}{% for message in messages %}{% if message['role'] == 'user' %}[INST] "
    "{{ message['content'] }} [/INST]{% else %} {{ message['content'] }} {{ eos_token }}"
    "{% endif %}{% endfor %}"
)
TEXTS = sorted(text for text in topics.values())[:12]


def metaspace(words):
    """As a sentence becomes words for training: a word has its space before it."""
    return pre_tokenizers.Metaspace(prepend_scheme="always", split=words)


@lru_cache
def sentencepiece(kind):
    """A small vocabulary with SentencePiece's habits, trained on Python's documentation."""
    if kind.startswith("unigram"):
        made = Tokenizer(models.Unigram())
        trainer = trainers.UnigramTrainer(vocab_size=700, unk_token="<unk>", show_progress=False)
    else:
        made = Tokenizer(models.BPE(unk_token="<unk>"))
        trainer = trainers.BpeTrainer(vocab_size=700, show_progress=False)
    made.pre_tokenizer = metaspace(True)
    made.train_from_iterator(TEXTS, trainer)
    state = json.loads(made.to_str())["model"]
    if kind.startswith("unigram"):
        pieces = [(token, 0.0) for token in (*SPECIAL, *BYTES)]
        pieces += [(token, score) for token, score in state["vocab"] if token != "<unk>"]
        made = Tokenizer(models.Unigram(pieces, unk_id=0, byte_fallback=True))
    else:
        tokens = dict.fromkeys([*SPECIAL, *BYTES, *state["vocab"]])
        merges = [tuple(pair) for pair in state["merges"]]
        vocabulary = {token: number for number, token in enumerate(tokens)}
        made = Tokenizer(models.BPE(vocabulary, merges, byte_fallback=True, unk_token="<unk>"))
    if kind.endswith("legacy"):  # Llama 2: a space before every stretch of text
        steps = [normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")]
        made.normalizer = normalizers.Sequence(steps)
    else:  # a space before the first stretch alone
        made.pre_tokenizer = pre_tokenizers.Metaspace(prepend_scheme="first", split=False)
    steps = [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse()]
    made.decoder = decoders.Sequence([*steps, decoders.Strip(" ", 1, 0)])
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=made,
        bos_token="<s>",
        eos_token="</s>",
        unk_token="<unk>",
        additional_special_tokens=["[INST]", "[/INST]"],
        clean_up_tokenization_spaces=False,
    )
    tokenizer.chat_template = LLAMA2
    return tokenizer


@lru_cache
def qwen():
    from kd.vocab import qwen_tokenizer

    return qwen_tokenizer("qwen2.5")


def tiny_model(vocab_size: int = 320, *, attention: str = "eager", seed: int = 0):
    """A random Qwen2 of two layers."""
    torch.manual_seed(seed)
    config = Qwen2Config(
        vocab_size=vocab_size,
        hidden_size=32,
        intermediate_size=64,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        max_position_embeddings=512,
        initializer_range=0.2,
        bos_token_id=None,
        eos_token_id=2,
        pad_token_id=0,
    )
    return Qwen2ForCausalLM._from_config(config, attn_implementation=attention).eval()
