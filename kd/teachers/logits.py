"""A local model's logits, a chunk of rows at a time: [B, L, V] never exists."""

from __future__ import annotations

import inspect
from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor

CHECKED = 8  # rows on which decoder and head are compared with the model itself
CHUNK_ROWS = 256


class LogitSource:
    """Calls a causal LM's decoder once a batch and its lm_head once a chunk of rows.

    Where the logits so made differ from the model's own (a head that does more than multiply,
    scale and softcap), or the model has no separate decoder and head, the model's own forward is
    used instead, with the whole batch's logits in memory.

    Args:
        model: a transformers causal LM on its device, in any dtype, quantised or not.
        live_vocab: tokens that exist; columns past it are dropped.
        chunk_rows: rows of a chunk: enough that reading the head's weight for each is no cost.
    """

    def __init__(self, model: Any, live_vocab: int, chunk_rows: int | None = None) -> None:
        self.model, self.live_vocab = model, live_vocab
        self.head = model.get_output_embeddings()
        self.decoder = _decoder(model)
        config = getattr(model.config, "get_text_config", lambda: model.config)()
        scale, divisor = getattr(config, "logit_scale", None), getattr(config, "logits_scaling", 1)
        self.scale = (1.0 if scale is None else float(scale)) / float(divisor or 1)
        self.softcap = getattr(config, "final_logit_softcapping", None)
        self.chunk_rows = chunk_rows or CHUNK_ROWS
        self._buffer: Tensor | None = None
        self._agrees: bool | None = None if self.head is not None and self.decoder else False

    @property
    def device(self) -> torch.device:
        return self.model.get_input_embeddings().weight.device

    @torch.inference_mode()
    def chunks(self, input_ids: Tensor, lengths: list[int]) -> Iterator[Tensor]:
        """Logits of every real row, in order, as chunks [<= chunk_rows, live_vocab]; a chunk is
        overwritten by the next.

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
            yield self._chunk(hidden[start : start + self.chunk_rows])[:, : self.live_vocab]

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

    def _chunk(self, hidden: Tensor) -> Tensor:
        """``_head`` into one buffer where that is the same: on a CPU, pages of memory that are new
        for every chunk cost a sixth of the product itself."""
        weight = getattr(self.head, "weight", None)
        if type(self.head) is not torch.nn.Linear or weight is None or _hooked(self.head):
            return self._head(hidden)
        if (
            hidden.device.type != "cpu"
            or weight.device.type != "cpu"
            or weight.dtype != hidden.dtype
        ):
            return self._head(hidden)
        if self._buffer is None or self._buffer.shape[0] < len(hidden):
            self._buffer = torch.empty(len(hidden), len(weight), dtype=weight.dtype)
        out = torch.mm(hidden, weight.t(), out=self._buffer[: len(hidden)])
        if self.head.bias is not None:
            out += self.head.bias
        if self.scale != 1:
            out *= self.scale
        if self.softcap is not None:
            out.div_(self.softcap).tanh_().mul_(self.softcap)
        return out

    def _checked_hidden(self, input_ids: Tensor, lengths: list[int]) -> Tensor | None:
        """Final hidden states [B, L, H]; None when the head does not make the model's logits."""
        if self._agrees is False:
            return None
        if self._agrees is None:
            hidden, whole = self._both(input_ids, lengths)
            self._agrees = self._same(self._head(hidden[..., -whole.shape[-2] :, :]), whole)
            if hidden.shape[:2] == input_ids.shape:
                return hidden if self._agrees else None
        return self._hidden(input_ids) if self._agrees else None

    def _both(self, input_ids: Tensor, lengths: list[int]) -> tuple[Tensor, Tensor]:
        """Final hidden states, and the model's own logits of the last few tokens among them.

        Of the batch itself in one forward pass where the model can be asked for some logits only,
        else of the start of a sequence.
        """
        if "logits_to_keep" not in inspect.signature(self.model.forward).parameters:
            start = input_ids[:1, : min(lengths[0], CHECKED)]
            return self._hidden(start), self.model(input_ids=start, use_cache=False).logits
        seen: list[Any] = []
        handle = self.decoder.register_forward_hook(lambda *call: seen.append(call[2]))
        try:
            few = min(CHECKED, input_ids.shape[1])
            out = self.model(input_ids=input_ids, use_cache=False, logits_to_keep=few)
        finally:
            handle.remove()
        hidden = seen[0].last_hidden_state if len(seen) == 1 else self._hidden(input_ids)
        return hidden, out.logits

    def _same(self, ours: Tensor, whole: Tensor) -> bool:
        """Whether decoder and head give the model's own logits."""
        ours, whole = ours.float().to(whole.device), whole.float()
        if ours.shape != whole.shape:
            return False
        scale = whole.abs().max().clamp(min=1)
        return bool(((ours - whole).abs().nan_to_num() <= 2e-2 * scale).all())


def _hooked(module: torch.nn.Module) -> bool:
    return bool(module._forward_hooks or module._forward_pre_hooks)


def _decoder(model: Any) -> Any:
    find = getattr(model, "get_decoder", None)
    found = find() if callable(find) else None
    if found is None or found is model:
        found = getattr(model, "base_model", None)
    return None if found is model else found
