"""A local model's logits, a chunk of rows at a time: [B, L, V] never exists."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor
from torch.nn.utils.rnn import pad_sequence

from kd.heads import HeadReading, lm_head, observing, reading

CHUNK_ROWS = 256


class LogitSource:
    """Calls a causal LM without its lm_head once a batch, and its lm_head once a chunk of rows.

    Where its logits are not its lm_head's output, scaled and softcapped at most (``kd.heads``), the
    model's own forward is used instead, with the whole batch's logits in memory.

    Args:
        model: a transformers causal LM on its device, in any dtype, quantised or not.
        live_vocab: tokens that exist; columns past it are dropped.
        chunk_rows: rows of a chunk: enough that reading the head's weight for each is no cost.

    Raises:
        TypeError: the model is an encoder-decoder.
    """

    def __init__(self, model: Any, live_vocab: int, chunk_rows: int | None = None) -> None:
        self.model, self.live_vocab = model, live_vocab
        self.head = lm_head(model)
        self.reading = reading(model) or HeadReading(reason="it is sharded")
        self.chunk_rows = chunk_rows or CHUNK_ROWS
        self._buffer: Tensor | None = None

    @property
    def device(self) -> torch.device:
        return self.model.get_input_embeddings().weight.device

    @torch.inference_mode()
    def chunks(self, sequences: Sequence[NDArray[np.integer]]) -> Iterator[Tensor]:
        """Logits of every row of a batch of sequences, end to end, as chunks [<= chunk_rows,
        live_vocab]; a chunk is overwritten by the next."""
        input_ids, real = self._padded(sequences)
        if self.reading.reason is not None:
            logits = self.model(input_ids=input_ids, use_cache=False).logits
            for part in logits[real.to(logits.device)].split(self.chunk_rows):
                yield part[:, : self.live_vocab]
            return
        for part in self._hidden(input_ids, real).split(self.chunk_rows):
            yield self._chunk(part)[:, : self.live_vocab]

    @torch.inference_mode()
    def hidden_rows(self, sequences: Sequence[NDArray[np.integer]]) -> Tensor:
        """Final hidden states of every row of a batch of sequences, end to end, [N, H].

        Raises:
            ValueError: when the model's logits are not its head's weight times them.
        """
        trouble = self.reading.reason or self.reading.weightless
        if trouble is not None:
            raise ValueError(
                "build_hidden_cache: model must be a decoder and an lm_head, whose product (scaled "
                f"and softcapped) is its logits, got {type(self.model).__name__}: {trouble}. Use "
                "build_cache."
            )
        return self._hidden(*self._padded(sequences))

    def _padded(self, sequences: Sequence[NDArray[np.integer]]) -> tuple[Tensor, Tensor]:
        """Input ids [B, L], and where they are real: causal attention makes a mask needless."""
        rows = [torch.from_numpy(tokens.astype(np.int64)) for tokens in sequences]
        input_ids = pad_sequence(rows, batch_first=True)
        lengths = torch.tensor([len(row) for row in rows])
        return input_ids.to(self.device), torch.arange(input_ids.shape[1]) < lengths[:, None]

    def _hidden(self, input_ids: Tensor, real: Tensor) -> Tensor:
        """Final hidden states of the real rows, [N, H]."""
        with observing(self.model) as seen:
            self.model(input_ids=input_ids, use_cache=False)
        return seen[0][real.to(seen[0].device)]

    def _head(self, hidden: Tensor) -> Tensor:
        weight = getattr(self.head, "weight", hidden)
        return self.reading.applied(self.head(hidden.to(weight.device)))

    def _chunk(self, hidden: Tensor) -> Tensor:
        """``_head`` into one buffer where that is the same: on a CPU, pages of memory that are new
        for every chunk cost a sixth of the product itself."""
        weight = getattr(self.head, "weight", None)
        plain = type(self.head) is torch.nn.Linear and not (
            self.head._forward_hooks or self.head._forward_pre_hooks
        )
        if not plain or weight is None or weight.dtype != hidden.dtype:
            return self._head(hidden)
        if hidden.device.type != "cpu" or weight.device.type != "cpu":
            return self._head(hidden)
        if self._buffer is None or self._buffer.shape[0] < len(hidden):
            self._buffer = torch.empty(len(hidden), len(weight), dtype=weight.dtype)
        out = torch.mm(hidden, weight.t(), out=self._buffer[: len(hidden)])
        if self.head.bias is not None:
            out += self.head.bias
        scale, softcap = self.reading.scale, self.reading.softcap
        if scale is not None:
            out *= scale
        if softcap is not None:
            out.div_(softcap).tanh_().mul_(softcap)
        return out[:, : self.reading.width]
