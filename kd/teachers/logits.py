"""A local model's logits, a chunk of rows at a time: [B, L, V] never exists."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor

CHUNK_BYTES = 32 * 1024 * 1024  # of float32 logits in a chunk


class LogitSource:
    """Calls a causal LM's decoder once a batch and its lm_head once a chunk of rows.

    Where the logits so made differ from the model's own (a head that does more than multiply,
    scale and softcap), or the model has no separate decoder and head, the model's own forward is
    used instead, with the whole batch's logits in memory.

    Args:
        model: a transformers causal LM on its device, in any dtype, quantised or not.
        live_vocab: tokens that exist; columns past it are dropped.
        chunk_rows: rows of a chunk; chosen so that float32 logits take 32 MB when None.
    """

    def __init__(self, model: Any, live_vocab: int, chunk_rows: int | None = None) -> None:
        self.model, self.live_vocab = model, live_vocab
        self.head = model.get_output_embeddings()
        self.decoder = _decoder(model)
        config = getattr(model.config, "get_text_config", lambda: model.config)()
        scale, divisor = getattr(config, "logit_scale", None), getattr(config, "logits_scaling", 1)
        self.scale = (1.0 if scale is None else float(scale)) / float(divisor or 1)
        self.softcap = getattr(config, "final_logit_softcapping", None)
        self.chunk_rows = chunk_rows or max(1, CHUNK_BYTES // (4 * live_vocab))
        self._agrees: bool | None = None if self.head is not None and self.decoder else False

    @property
    def device(self) -> torch.device:
        return self.model.get_input_embeddings().weight.device

    @torch.inference_mode()
    def chunks(self, input_ids: Tensor, lengths: list[int]) -> Iterator[Tensor]:
        """Logits of every real row, in order, as chunks [<= chunk_rows, live_vocab].

        Args:
            input_ids: [B, L] padded on the right; causal attention makes a mask needless.
            lengths: B numbers of real tokens.
        """
        input_ids = input_ids.to(self.device)
        real = torch.arange(input_ids.shape[1]) < torch.tensor(lengths)[:, None]
        hidden = self._checked_hidden(input_ids, lengths)
        if hidden is None:
            logits = self.model(input_ids=input_ids, use_cache=False).logits
            rows = logits[real.to(logits.device)]
            for start in range(0, len(rows), self.chunk_rows):
                yield rows[start : start + self.chunk_rows, : self.live_vocab]
            return
        hidden = hidden[real.to(hidden.device)]  # [N, H]
        for start in range(0, len(hidden), self.chunk_rows):
            yield self._head(hidden[start : start + self.chunk_rows])[:, : self.live_vocab]

    @torch.inference_mode()
    def hidden_rows(self, input_ids: Tensor, lengths: list[int]) -> Tensor:
        """Final hidden states of every real row, in order, [N, H].

        Raises:
            ValueError: when the model's logits are not its head's product with them.
        """
        input_ids = input_ids.to(self.device)
        hidden = self._checked_hidden(input_ids, lengths)
        if hidden is None:
            raise ValueError(
                "build_hidden_cache: model must be a decoder and an lm_head, whose product (scaled "
                f"and softcapped) is its logits, got {type(self.model).__name__}, which does "
                "something else. Use build_cache."
            )
        real = torch.arange(input_ids.shape[1]) < torch.tensor(lengths)[:, None]
        return hidden[real.to(hidden.device)]

    def _hidden(self, input_ids: Tensor) -> Tensor:
        return self.decoder(input_ids=input_ids, use_cache=False).last_hidden_state

    def _head(self, hidden: Tensor) -> Tensor:
        weight = getattr(self.head, "weight", hidden)
        logits = self.head(hidden.to(weight.device))
        if self.scale != 1:
            logits = logits * self.scale
        if self.softcap is not None:
            logits = self.softcap * torch.tanh(logits / self.softcap)
        return logits

    def _checked_hidden(self, input_ids: Tensor, lengths: list[int]) -> Tensor | None:
        """Final hidden states [B, L, H]; None when the head does not make the model's logits."""
        if self._agrees is False:
            return None
        hidden = self._hidden(input_ids)
        if self._agrees is None:
            some = min(lengths[0], 8)
            self._agrees = self._compare(input_ids[:1, :some], hidden[0, :some])
        return hidden if self._agrees else None

    def _compare(self, input_ids: Tensor, hidden: Tensor) -> bool:
        """Whether decoder and head give the model's own logits, on the start of a sequence."""
        whole = self.model(input_ids=input_ids, use_cache=False).logits[0].float()
        ours = self._head(hidden).float().to(whole.device)
        if ours.shape != whole.shape:
            return False
        scale = whole.abs().max().clamp(min=1)
        return bool(((ours - whole).abs().nan_to_num() <= 2e-2 * scale).all())


def _decoder(model: Any) -> Any:
    find = getattr(model, "get_decoder", None)
    found = find() if callable(find) else None
    if found is None or found is model:
        found = getattr(model, "base_model", None)
    return None if found is model else found
