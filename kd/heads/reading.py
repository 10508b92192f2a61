"""What a model does to its lm_head's output, measured on a few tokens with known numbers."""

from __future__ import annotations

import dataclasses
import inspect
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.functional import cross_entropy

from kd.heads.observing import (
    Unlike,
    causal_lm,
    lm_head,
    loss_replaced,
    no_loss,
    own_forward,
    takes,
    text_config,
    undisturbed,
    without_logits,
)
from kd.heads.weights import dense_logits, scaled
from kd.losses import Hidden

# What the lm_head returns for the tokens of the check: a slope, a range of sizes, a saturated cap.
PROBES = (2.0**-10, 1.0, -1.0, 7.0, -7.0, 50.0, -50.0, 1e8)
TOLERANCE = {torch.bfloat16: 3e-2, torch.float16: 4e-3}  # of the largest logit; TF32's otherwise
EXACT = 2e-3


@dataclass(frozen=True)
class HeadReading:
    """How a model's logits follow from what its lm_head sees.

    Attributes:
        scale, softcap: ``kd.Hidden``'s ``logit_scale`` and ``softcap``; None where there is none.
        width: columns of the model's logits where they are fewer than the lm_head's rows.
        takes_labels: its forward hands its loss to ``loss_function``, so that what it adds to that
            loss (router losses) can be had from it.
        reason: why its logits are not its lm_head's output so scaled and capped, or None.
        weightless: why that output is not hidden @ weight.T (a quantised lm_head), or None.
        untrainable: why it cannot be a student although its logits can be had, or None.
    """

    scale: float | None = None
    softcap: float | None = None
    width: int | None = None
    takes_labels: bool = False
    reason: str | None = None
    weightless: str | None = None
    untrainable: str | None = None

    def applied(self, product: Tensor) -> Tensor:
        """The model's logits from its lm_head's output [..., V]."""
        return scaled(product[..., : self.width], self.scale, self.softcap)

    def described(self, seen: Hidden) -> Hidden:
        """An lm_head's plain product with what the model does to it."""
        made = dataclasses.replace(seen, logit_scale=self.scale, softcap=self.softcap)
        if self.width is None:
            return made
        bias = None if made.bias is None else made.bias[: self.width]
        lora = made.lora and (made.lora[0], made.lora[1][: self.width], made.lora[2])
        return dataclasses.replace(made, weight=made.weight[: self.width], bias=bias, lora=lora)


def reading(model: Any) -> HeadReading | None:
    """What a model does to its logits, measured once and kept on the model.

    Measured again when the lm_head is another module or a number in the config has changed. Runs
    two forward passes of a few tokens in eval mode, without gradient; random state and training
    flags are as before.

    Returns:
        None where weights are sharded or on the meta device: then the first forward measures.

    Raises:
        TypeError: the model is an encoder-decoder.
    """
    causal = causal_lm(model)
    if getattr(getattr(causal, "config", None), "is_encoder_decoder", False):
        raise TypeError(
            "kd: model must be decoder-only, got the encoder-decoder "
            f"{type(causal).__name__}: a batch has no decoder_input_ids, and its encoder would "
            "read the answer. Use a causal LM."
        )
    kept = vars(causal).get("_kd_reading")
    if kept is not None and kept[0] == _identity(causal):
        return kept[1]
    if any(map(_absent, causal.parameters())):
        return None
    return measure(causal)


def _identity(causal: Any) -> tuple[Any, ...]:
    """What a reading depends on and a user may change: the lm_head, and the config's numbers."""
    config: Any = getattr(causal, "config", None)
    text = text_config(config)
    found = {} if config is None else vars(config) | vars(text)
    plain = (bool, int, float, type(None))
    numbers = tuple((k, v) for k, v in found.items() if isinstance(v, plain) and k != "use_cache")
    return (id(lm_head(causal)), numbers)


def _absent(parameter: Tensor) -> bool:
    """A parameter whose values cannot be read outside a forward: on meta, DTensor, or ZeRO-3's."""
    return parameter.is_meta or hasattr(parameter, "ds_id") or hasattr(parameter, "full_tensor")


@torch.compiler.disable
def measure(causal: Any) -> HeadReading:
    """The reading of a model whose weights a forward can use, kept on it."""
    found = _measured(causal)
    causal._kd_reading = (_identity(causal), found)
    return found


def _measured(causal: Any) -> HeadReading:
    head = lm_head(causal)
    if not isinstance(head, nn.Module) or isinstance(head, nn.ModuleList):
        return HeadReading(reason=f"its output embeddings are {type(head).__name__}, not a layer")
    sharded = any(map(_absent, causal.parameters()))
    device = causal.get_input_embeddings().weight.device
    ids = _few_tokens(causal).to("cpu" if device.type == "meta" else device)
    with torch.no_grad(), undisturbed(causal):
        try:
            return _compared(causal, ids, sharded)
        except torch.OutOfMemoryError:
            raise
        except Unlike as error:
            return HeadReading(reason=str(error))
        except (AttributeError, IndexError, KeyError, RuntimeError, TypeError, ValueError) as error:
            said = " ".join(str(error).split())[:200]
            return HeadReading(reason=f"a forward of tokens alone failed: {said}")


def _compared(causal: Any, ids: Tensor, sharded: bool) -> HeadReading:
    """The reading, after it has made the model's own logits of a few tokens [1, n]."""
    own, used, added = _own(causal, ids)
    values = torch.tensor(PROBES[: ids.shape[1]], dtype=torch.float64, device="cpu")
    if ids.device.type == "mps":
        values = values.float()
    torch.manual_seed(0)
    with torch.set_grad_enabled(not sharded):  # does a parameter take part after the lm_head?
        head, hidden, output = without_logits(
            causal, (), {"input_ids": ids}, labels=used, probe=values.to(own.device).view(1, -1, 1)
        )
    made = output.logits
    if made.shape != (*ids.shape, 1) or hidden.shape[:-1] != ids.shape:
        return HeadReading(reason="its logits are not those of its lm_head, token by token")
    fitted = _fit(values.double(), made.detach().flatten().cpu())
    if fitted is None:
        return HeadReading(
            reason=f"it does more to its lm_head's product than scale and softcap: "
            f"{values.tolist()} become {[round(v, 6) for v in made.flatten().tolist()]}"
        )
    untrainable = None
    if made.requires_grad:
        untrainable = "it trains a parameter that follows its lm_head"
    elif not _same_terms(added, output.loss if used else None):
        untrainable = (
            f"it adds {added} to its loss, which depends on its logits (a z-loss) or is of another "
            "kind than a router's: set that term's coefficient to 0 in its config"
        )
    product = head(hidden.detach())
    width = own.shape[-1] if own.shape[-1] < product.shape[-1] else None
    found = HeadReading(*fitted, width, takes_labels=used, untrainable=untrainable)
    differs = _difference(found.applied(product), own)
    if differs is not None:
        return dataclasses.replace(found, reason=differs)
    return dataclasses.replace(found, weightless=_weightless(head, hidden.detach(), found, own))


def _weightless(head: Any, hidden: Tensor, found: HeadReading, own: Tensor) -> str | None:
    """None where hidden @ weight.T, described by the reading, is the model's own logits."""

    def dense(seen: Hidden) -> Tensor | None:
        weight = seen.weight
        numbers = weight.is_floating_point() and weight.element_size() > 1  # float8 has a scale
        if not numbers or weight.shape[1:] != hidden.shape[-1:]:
            return None
        return dense_logits(found.described(seen))

    if not hasattr(getattr(head, "get_base_layer", lambda: head)(), "weight"):
        return f"its lm_head, a {type(head).__name__}, has no weight"
    try:
        ours = head(hidden, head_loss=dense)
    except ValueError as error:  # an adapter that is more than a pair of matrices
        return str(error)
    if ours is None:
        return f"its lm_head, a {type(head).__name__}, is no matrix of floating-point numbers"
    return _difference(ours, own)


def _own(causal: Any, ids: Tensor) -> tuple[Tensor, bool, float | None]:
    """The model's own logits [1, n, V]; whether it calls its ``loss_function``; what it adds to it.

    The last is None for a model that computes its loss itself and adds nothing.
    """
    used: list[int] = []

    def counted(logits: Any, *args: Any, **kwargs: Any) -> Tensor:
        used.append(1)
        return no_loss(logits)

    forward = own_forward(causal)
    given: dict[str, Any] = {"use_cache": False} if takes(forward, "use_cache") else {}
    if "labels" in inspect.signature(forward).parameters:
        given["labels"] = ids
    torch.manual_seed(0)
    with loss_replaced(causal, counted):
        output = forward(input_ids=ids, **given)
    logits, loss = output.logits, output.loss if given.get("labels") is not None else None
    if logits.shape[:2] != ids.shape or logits.dim() != 3:
        raise Unlike(f"its logits of [1, {ids.shape[1]}] tokens are {list(logits.shape)}")
    if loss is None:
        return logits, False, None
    if used:
        return logits, True, float(loss)
    shifted = cross_entropy(logits[0, :-1].float(), ids[0, 1:])
    aligned = cross_entropy(logits[0].float(), ids[0])
    left = min(float((loss - plain).abs()) for plain in (shifted, aligned))
    return logits, False, left if left > 1e-2 * float(loss) else None


def _same_terms(own: float | None, observed: Any) -> bool:
    if own is None or observed is None:
        return own is None
    return abs(own - float(observed)) <= 1e-3 * abs(own) + 1e-6


def _fit(given: Tensor, made: Tensor) -> tuple[float | None, float | None] | None:
    """(scale, softcap) with made = softcap * tanh(scale * given / softcap), or None."""
    exact = made.dtype == torch.float64  # a model that casts to float32 leaves seven digits
    made = made.double()

    def holds(expected: Tensor) -> bool:
        return bool(torch.isclose(made, expected, rtol=1e-5, atol=1e-7).all())

    def plain(value: float, exact: bool) -> float | None:
        value = value if exact else float(f"{value:.7g}")
        return None if abs(value - 1) < 1e-6 else value

    scale, cap = float(made[1] / given[1]), float(made[-1])
    if scale > 0 and holds(scale * given):
        return plain(scale, exact), None
    if not (0 < cap < given[-1] and 0 < float(made[0]) < cap):
        return None
    scale = cap * float(torch.atanh(made[0] / cap) / given[0])
    if not holds(cap * torch.tanh(scale * given / cap)):
        return None
    return plain(scale, False), cap if exact else float(f"{cap:.7g}")


def _difference(ours: Tensor, own: Tensor) -> str | None:
    """None where two logits [1, n, V] agree to their dtype's rounding, else both numbers."""
    ours, own_values = ours.float().to(own.device), own.float()
    if ours.shape != own.shape:
        return f"its logits are {list(own.shape)} where its lm_head makes {list(ours.shape)}"
    finite = own_values.isfinite()
    error = torch.where(finite, (ours - own_values).abs(), 0.0).nan_to_num(nan=torch.inf)
    largest = float(torch.where(finite, own_values.abs(), 0.0).max())
    worst = int(error.argmax())
    if float(error.max()) <= TOLERANCE.get(own.dtype, EXACT) * max(largest, 1e-6):
        return None
    return (
        f"its own logit of a token is {float(own_values.flatten()[worst]):.6g} where its lm_head "
        f"makes {float(ours.flatten()[worst]):.6g}"
    )


def _few_tokens(causal: Any) -> Tensor:
    """[1, n] different tokens from the middle of the vocabulary, away from special ones."""
    text = text_config(causal.config)
    longest = getattr(text, "max_position_embeddings", None) or 0
    count = min(len(PROBES), longest) if longest > 0 else len(PROBES)  # XLNet says -1
    embeddings = causal.get_input_embeddings()
    size = getattr(embeddings, "num_embeddings", None) or embeddings.weight.shape[0]
    size = min(size, getattr(text, "vocab_size", None) or size)
    return ((torch.arange(count) * 3 + size // 2) % size)[None]
