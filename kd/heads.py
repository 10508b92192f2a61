"""What a causal LM does between its last hidden states and its logits, read from its own forward.

Models differ there: some multiply the hidden states, transform or norm them; some scale, divide,
softcap or cut the logits; and a config may hold an attribute of such a name that the model ignores.
So nothing is read from names. The model's own forward runs, and its lm_head

- records its input, which is the hidden state [B, L, H] whatever was done to it, and
- returns a placeholder [B, L, 1] in place of the logits [B, L, V]: in training no logits are made.

Once per model, on a few tokens, the placeholder holds known numbers; what the model makes of them
is its scale and its softcap (``HeadReading``), and the logits so described must be the model's own.
"""

from __future__ import annotations

import contextlib
import dataclasses
import inspect
import types
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.functional import cross_entropy

from kd.losses import Hidden

HeadLoss = Callable[[Hidden], Any]
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
        logits = product[..., : self.width]
        if self.scale is not None:
            logits = logits * self.scale
        return logits if self.softcap is None else self.softcap * torch.tanh(logits / self.softcap)


def causal_lm(model: Any) -> Any:
    """The transformers model inside a peft model; any other as it is."""
    return model.get_base_model() if hasattr(model, "get_base_model") else model


def lm_head(model: Any) -> Any:
    """A model's output embeddings, or None."""
    find = getattr(causal_lm(model), "get_output_embeddings", None)
    return find() if callable(find) else None


def install(model: Any) -> Any:
    """Give a causal LM's forward the ``head_loss`` argument; twice does no harm.

    ``model(..., head_loss=function)["loss"]`` is ``function(kd.Hidden(...))`` of the last hidden
    states [B, L, H], computed inside the lm_head's ``__call__``; ``["aux_loss"]`` is what the model
    itself adds to its loss (times its own coefficient), or None.
    """
    causal = causal_lm(model)
    if getattr(causal, "_kd_original_forward", None) is None:
        causal._kd_original_forward = causal.forward
        causal._kd_takes_cache = _takes(causal.forward, "use_cache")
        causal.forward = types.MethodType(_forward, causal)
    return model


def final_hidden(model: Any, **inputs: Any) -> Hidden:
    """A causal LM's last hidden states [B, L, H] with its lm_head, detached.

    Raises:
        TypeError: its logits are not the lm_head's product with them, scaled and softcapped.
    """
    install(model)
    with torch.no_grad():
        said = model(**inputs, head_loss=lambda seen: seen)["loss"]
    fixed = {
        field.name: value.detach()
        for field in dataclasses.fields(said)
        if isinstance(value := getattr(said, field.name), Tensor)
    }
    return dataclasses.replace(said, **fixed)


def _takes(function: Any, name: str) -> bool:
    parameters = inspect.signature(function).parameters
    return name in parameters or any(p.kind is p.VAR_KEYWORD for p in parameters.values())


@torch.compiler.disable(recursive=False)  # the model's own forward is compiled, the loss is not
def _forward(self: Any, *args: Any, head_loss: HeadLoss | None = None, **kwargs: Any) -> Any:
    if head_loss is None:
        return self._kd_original_forward(*args, **kwargs)
    found = reading(self)
    if found is None:  # sharded or on meta when it was prepared: now its weights can be had
        found = _keep(self, _measure(self))
    trouble = found.reason or found.weightless
    trouble = trouble or (found.untrainable if torch.is_grad_enabled() else None)
    if trouble is not None:
        raise TypeError(refusal("head_loss", self, trouble))
    head, hidden, output = _without_logits(self, args, kwargs, labels=found.takes_labels)
    loss = head(hidden, head_loss=lambda seen: head_loss(_described(seen, found)))
    return {"loss": loss, "aux_loss": output.loss if found.takes_labels else None}


def _without_logits(
    causal: Any, args: Any, kwargs: Any, *, labels: bool, probe: Tensor | None = None
) -> tuple[Any, Tensor, Any]:
    """The model's own forward with a placeholder for logits: (lm_head, its input, output)."""
    if causal._kd_takes_cache:
        kwargs.setdefault("use_cache", False)
    if labels:  # their values are never looked at: ``no_loss`` stands for the loss
        given = kwargs.get("input_ids", args[0] if args else None)
        kwargs["labels"] = kwargs["inputs_embeds"][..., 0].long() if given is None else given
    with observing(causal, probe) as seen, _loss_function(causal, _no_loss):
        output = causal._kd_original_forward(*args, **kwargs)
    return lm_head(causal), _one(seen), output


@contextlib.contextmanager
def observing(model: Any, probe: Tensor | None = None) -> Iterator[list[Tensor]]:
    """While open, the model's lm_head makes no logits; the list yielded receives its inputs.

    ``probe`` is what it returns, zeros [..., 1] by default.
    """
    head = _watched(lm_head(model))
    seen: list[Tensor] = []
    head._kd_seen, head._kd_probe = seen, probe
    try:
        yield seen
    finally:
        head._kd_seen = head._kd_probe = None


def _one(seen: list[Tensor]) -> Tensor:
    if len(seen) != 1:
        raise _Unlike(f"it calls its lm_head {len(seen)} times in a forward")
    return seen[0]


def _watched(head: Any) -> Any:
    """The lm_head with a forward that can be observed.

    Where accelerate has put a hook around it, inside that hook, which brings the weights.
    """
    if "_kd_head_forward" not in vars(head):
        name = "_old_forward" if hasattr(head, "_hf_hook") else "forward"
        head._kd_seen = head._kd_probe = None
        head._kd_head_forward = getattr(head, name)
        setattr(head, name, types.MethodType(_head_forward, head))
    return head


def _head_forward(
    self: Any, hidden: Tensor, *args: Any, head_loss: HeadLoss | None = None, **kwargs: Any
) -> Any:
    if head_loss is not None:
        return _loss_at(head_loss, self, hidden)
    if self._kd_seen is None:
        return self._kd_head_forward(hidden, *args, **kwargs)
    self._kd_seen.append(hidden)
    if self._kd_probe is not None:
        return self._kd_probe
    return hidden.new_zeros((*hidden.shape[:-1], 1))


@torch.compiler.disable  # kernels and their gradients in one: nothing for a compiler to do
def _loss_at(head_loss: HeadLoss, head: Any, hidden: Tensor) -> Any:
    return head_loss(as_hidden(head, hidden))


def _no_loss(logits: Any, *args: Any, **kwargs: Any) -> Tensor:
    """Stands for a model's ``loss_function``: what is left of its loss is what it adds to it."""
    return torch.zeros((), device=logits.device)


@contextlib.contextmanager
def _loss_function(causal: Any, function: Callable[..., Tensor]) -> Iterator[None]:
    before = vars(causal).get("_loss_function")
    causal._loss_function = function
    try:
        yield
    finally:
        del causal._loss_function
        if before is not None:
            causal._loss_function = before


def as_hidden(head: Any, hidden: Tensor) -> Hidden:
    """Hidden states and the lm_head that would have read them, as a ``kd.Hidden``."""
    if hasattr(head, "modules_to_save"):  # peft trains a whole copy of the head
        active = head.active_adapters[0] if head.active_adapters else None
        copies = {} if head.disable_adapters else head.modules_to_save
        base = copies[active] if active in copies else head.original_module
    else:
        base = head.get_base_layer() if hasattr(head, "get_base_layer") else head
    return Hidden(hidden, base.weight, getattr(base, "bias", None), lora=lora_pair(head))


def lora_pair(head: Any) -> tuple[Tensor, Tensor, float] | None:
    """The active LoRA pair of a peft lm_head, or None; ValueError where it is more than a pair."""
    if not hasattr(head, "lora_A") or getattr(head, "disable_adapters", False):
        return None
    if getattr(head, "merged", False):
        return None
    active = [name for name in head.active_adapters if name in head.lora_A]
    if not active:
        return None
    if len(active) > 1:
        raise ValueError(
            f"prepare_student: lm_head must have one active LoRA adapter, got {active}. "
            "Activate one with set_adapter, or leave lm_head out of target_modules."
        )
    name = active[0]
    dropout = getattr(head.lora_dropout[name], "p", 0.0) if name in head.lora_dropout else 0.0
    if dropout and head.training:
        raise ValueError(
            f"prepare_student: the LoRA of the lm_head must have lora_dropout=0, got {dropout}: "
            "its input is the loss's own. Set it to 0, or leave lm_head out of target_modules."
        )
    if name in getattr(head, "lora_magnitude_vector", {}):
        raise ValueError(
            "prepare_student: the LoRA of the lm_head must be a plain one, got DoRA. Use "
            "use_dora=False, or leave lm_head out of target_modules."
        )
    return (
        head.lora_A[name].weight,
        head.lora_B[name].weight,
        float(head.scaling[name]),
    )


def _described(seen: Hidden, found: HeadReading) -> Hidden:
    """The lm_head's product with what the model does to it."""
    made = dataclasses.replace(seen, logit_scale=found.scale, softcap=found.softcap)
    if found.width is None:
        return made
    bias = None if made.bias is None else made.bias[: found.width]
    lora = made.lora and (made.lora[0], made.lora[1][: found.width], made.lora[2])
    return dataclasses.replace(made, weight=made.weight[: found.width], bias=bias, lora=lora)


def dense_logits(student: Hidden) -> Tensor:
    """The logits a ``kd.Hidden`` stands for."""
    logits = student.hidden @ student.weight.T
    if student.lora is not None:
        first, second, scaling = student.lora
        logits = logits + scaling * (student.hidden @ first.T @ second.T)
    if student.bias is not None:
        logits = logits + student.bias
    if student.logit_scale is not None:
        logits = logits * student.logit_scale
    if student.softcap is not None:
        logits = student.softcap * torch.tanh(logits / student.softcap)
    return logits


# --- the reading ----------------------------------------------------------------------------------


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
    return _keep(causal, _measure(causal))


def _keep(causal: Any, found: HeadReading) -> HeadReading:
    causal._kd_reading = (_identity(causal), found)
    return found


def _identity(causal: Any) -> tuple[Any, ...]:
    """What a reading depends on and a user may change: the lm_head, and the config's numbers."""
    config: Any = getattr(causal, "config", None)
    text = config.get_text_config() if hasattr(config, "get_text_config") else config
    plain = (bool, int, float, type(None))
    numbers = tuple((k, v) for k, v in vars(text).items() if isinstance(v, plain)) if text else ()
    return (id(lm_head(causal)), numbers)


def _absent(parameter: Tensor) -> bool:
    """A parameter whose values cannot be read outside a forward: on meta, DTensor, or ZeRO-3's."""
    return parameter.is_meta or hasattr(parameter, "ds_id") or hasattr(parameter, "full_tensor")


class _Unlike(Exception):
    """Why a model is not a decoder with one lm_head."""


@torch.compiler.disable
def _measure(causal: Any) -> HeadReading:
    install(causal)
    head = lm_head(causal)
    if not isinstance(head, nn.Module) or isinstance(head, nn.ModuleList):
        return HeadReading(reason=f"its output embeddings are {type(head).__name__}, not a layer")
    sharded = any(map(_absent, causal.parameters()))
    device = causal.get_input_embeddings().weight.device
    ids = _few_tokens(causal).to("cpu" if device.type == "meta" else device)
    with _undisturbed(causal, device):
        try:
            return _compared(causal, ids, sharded)
        except torch.OutOfMemoryError:
            raise
        except _Unlike as error:
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
        head, hidden, output = _without_logits(
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
        if not weight.is_floating_point() or weight.shape[1:] != hidden.shape[-1:]:
            return None
        return dense_logits(_described(seen, found))

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
        return _no_loss(logits)

    names = inspect.signature(causal._kd_original_forward).parameters
    given: dict[str, Any] = {"labels": ids} if "labels" in names else {}
    given |= {"use_cache": False} if causal._kd_takes_cache else {}
    torch.manual_seed(0)
    with _loss_function(causal, counted):
        output = causal._kd_original_forward(input_ids=ids, **given)
    logits, loss = output.logits, output.loss if given.get("labels") is not None else None
    if logits.shape[:2] != ids.shape or logits.dim() != 3:
        raise _Unlike(f"its logits of [1, {ids.shape[1]}] tokens are {list(logits.shape)}")
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
    config = causal.config
    text = config.get_text_config() if hasattr(config, "get_text_config") else config
    longest = getattr(text, "max_position_embeddings", None) or len(PROBES)
    count = min(len(PROBES), longest)
    embeddings = causal.get_input_embeddings()
    size = getattr(embeddings, "num_embeddings", None) or embeddings.weight.shape[0]
    size = min(size, getattr(text, "vocab_size", None) or size)
    return ((torch.arange(count) * 3 + size // 2) % size)[None]


@contextlib.contextmanager
def _undisturbed(causal: Any, device: torch.device) -> Iterator[None]:
    """Eval mode without gradient; random state and training flags as before."""
    flags = [(module, module.training) for module in causal.modules()]
    devices = [device] if device.type == "cuda" else []
    causal.eval()
    try:
        with torch.no_grad(), torch.random.fork_rng(devices):
            yield
    finally:
        for module, flag in flags:
            module.training = flag


def refusal(where: str, model: Any, reason: str) -> str:
    """The words of a refusal, with the way out."""
    return (
        f"{where}: model must make its logits by its lm_head from hidden states, scaled and "
        f"softcapped at most, got {type(causal_lm(model)).__name__}: {reason}. Give its logits to "
        "kd.distillation_loss or kd.cross_entropy in a loop of your own."
    )


__all__ = [
    "HeadReading",
    "as_hidden",
    "dense_logits",
    "final_hidden",
    "install",
    "reading",
    "refusal",
]
