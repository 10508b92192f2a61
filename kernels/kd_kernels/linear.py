"""Fused linear: the matmuls around the row kernels, a chunk of tokens at a time.

    logits = sum of hidden_i @ weight_i.T + bias        float32, though hidden and weight are bf16
    row kernel: logits -> losses, dlogits (bf16)
    dhidden_i = dlogits @ weight_i,  dweight_i += dlogits.T @ hidden_i        accumulated in float32

Logits stay float32: at student ~ teacher (logit gap 0.05 at magnitude 25) bf16 logits give a
gradient that is all rounding (109 % relative error), float32 ones none. No [N, V] tensor exists.

hidden_i [c, H_i], weight_i [V, H_i], logits [c, V] of one chunk of c tokens.

Reads 14 B and writes 6 B of logits per element and chunk with a teacher's logits in float32 beside
them (8 of them in the row kernel's second pass), floor 12 and 6, ours 20 in all; FLOPs
6*N*V*Hs + 2*N*V*Ht, the floor: each matmul runs once.
"""

from __future__ import annotations

import functools

import torch
from torch import Tensor

CHUNK_BYTES_CPU = 64 << 20
"""Chunk buffers where there is no GPU (the interpreter)."""


def project(pairs: tuple, bias: Tensor | None, vocab: int) -> Tensor:
    """Sum of matmuls plus bias, [R, vocab], float32 out of bf16 where torch can."""
    (x, w), *more = pairs
    narrow = x.dtype in (torch.bfloat16, torch.float16)
    kind = {"out_dtype": torch.float32} if narrow and x.is_cuda and has_out_dtype() else {}
    if narrow and not x.is_cuda:  # the interpreter: the float32 logits that a GPU would have
        pairs = tuple((x.float(), w.float()) for x, w in pairs)
        (x, w), *more = pairs
    out = torch.mm(x, w[:vocab].T, **kind)
    for x, w in more:
        out = torch.addmm(out, x, w[:vocab].T, **kind)
    return out if bias is None else out.add_(bias[:vocab])


@functools.cache
def has_out_dtype() -> bool:
    return "dtype" in torch.ops.aten.addmm.overloads() and torch.version.hip is None


def chunk_tokens(count: int, row_bytes: int, device: torch.device) -> int:
    """Tokens of a chunk: even chunks of a sixteenth of the device's memory.

    float32 accumulation of dW moves 8 * V * H bytes a chunk, which the matmul hides from about
    1,000 tokens up: an 80 GB device takes 3,300 at a vocabulary of 152k.
    """
    budget = CHUNK_BYTES_CPU
    if device.type == "cuda":
        budget = torch.cuda.get_device_properties(device).total_memory // 16
    size = max(1, budget // max(1, row_bytes))
    size = size // 128 * 128 if size >= 128 else size
    even = -(-count // -(-count // size)) if count else 1
    return min(size, -(-even // 128) * 128)


def add_product(out: Tensor, a: Tensor, b: Tensor, *, add: bool) -> None:
    """out [+]= a @ b, accumulated in out's float32 from narrower factors."""
    if out.dtype == a.dtype:
        torch.addmm(out, a, b, out=out) if add else torch.mm(a, b, out=out)
    elif a.is_cuda and has_out_dtype():
        wide = {"out_dtype": torch.float32, "out": out}
        torch.addmm(out, a, b, **wide) if add else torch.mm(a, b, **wide)  # type: ignore[call-overload]
    elif add:
        out.addmm_(a.float(), b.float())
    else:
        torch.mm(a.float(), b.float(), out=out)
