"""How a model is sampled, with every setting stated that changes what is drawn.

A model brings a ``generation_config`` of its own (penalties, top-k, suppressed tokens, ...), which
transformers and vLLM apply wherever a request does not say otherwise. Here a request says it all.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

# transformers' fields that change what is drawn, and the value at which they do not.
NEUTRAL: dict[str, Any] = {
    "top_k": 0,
    "top_p": 1.0,
    "min_p": None,
    "top_h": None,
    "typical_p": 1.0,
    "epsilon_cutoff": 0.0,
    "eta_cutoff": 0.0,
    "temperature": 1.0,
    "repetition_penalty": 1.0,
    "encoder_repetition_penalty": 1.0,
    "no_repeat_ngram_size": 0,
    "encoder_no_repeat_ngram_size": 0,
    "bad_words_ids": None,
    "force_words_ids": None,
    "constraints": None,
    "suppress_tokens": None,
    "begin_suppress_tokens": None,
    "forced_bos_token_id": None,
    "forced_eos_token_id": None,
    "sequence_bias": None,
    "guidance_scale": None,
    "watermarking_config": None,
    "exponential_decay_length_penalty": None,
    "remove_invalid_values": False,
    "renormalize_logits": False,
    "num_beams": 1,
    "num_beam_groups": 1,
    "diversity_penalty": 0.0,
    "length_penalty": 1.0,
    "early_stopping": False,
    "penalty_alpha": None,
    "dola_layers": None,
    "token_healing": False,
    "min_length": 0,
    "min_new_tokens": None,
    "max_time": None,
    "stop_strings": None,
    "num_return_sequences": 1,
}
# Set for each call, or left to the model: its own end tokens end a turn here too.
STATED = frozenset(
    ("do_sample", "max_new_tokens", "max_length", "use_cache")
    + ("pad_token_id", "bos_token_id", "eos_token_id", "decoder_start_token_id")
)
# Fields that change speed, memory or what is returned, and not what is drawn: speculative decoding
# is exact, and takes an assistant or a look-up that is never given here.
INERT = frozenset(
    ("cache_implementation", "cache_config", "max_cache_len", "prefill_chunk_size", "low_memory")
    + ("compile_config", "disable_compile", "continuous_batching_config", "use_mtp")
    + ("output_attentions", "output_hidden_states", "output_scores", "output_logits")
    + ("return_dict_in_generate", "transformers_version", "_from_model_config")
    + ("is_assistant", "num_assistant_tokens", "num_assistant_tokens_schedule")
    + ("assistant_confidence_threshold", "assistant_early_exit", "assistant_lookbehind")
    + ("target_lookbehind", "assistant_ensemble_weight", "speculation_type")
    + ("prompt_lookup_num_tokens", "max_matching_ngram_size")
)
# What servers beyond OpenAI's know, where ``Sampling`` is off.
_OFF = {"top_k": 0, "min_p": 0.0, "repetition_penalty": 1.0}


@dataclass(frozen=True)
class Sampling:
    """How a teacher is sampled; the defaults are those of the R1 reports.

    What is not named here is off, whatever the model's own ``generation_config`` says: penalties,
    beams, suppressed or forced tokens.

    Attributes:
        temperature: 0 is greedy decoding, the likeliest token always.
        top_p: nucleus sampling; 1 is off.
        max_new_tokens: a longer completion is cut and marked ``finish="length"``.
        seed: of the sampling.
        top_k: only the k likeliest; 0 is off.
        min_p: only tokens at least so likely as a share of the likeliest; 0 is off.
        repetition_penalty: divides the logits of tokens that are there already; 1 is off.
    """

    temperature: float = 0.6
    top_p: float = 0.95
    max_new_tokens: int = 32_768
    seed: int = 0
    top_k: int = 0
    min_p: float = 0.0
    repetition_penalty: float = 1.0

    def __post_init__(self) -> None:
        rules = {
            "temperature": (self.temperature >= 0, "be at least 0 (0 is greedy decoding)"),
            "top_p": (0 < self.top_p <= 1, "lie in (0, 1] (1 switches it off)"),
            "max_new_tokens": (self.max_new_tokens >= 1, "be at least 1"),
            "top_k": (self.top_k >= 0, "be at least 0 (0 switches it off)"),
            "min_p": (0 <= self.min_p <= 1, "lie in [0, 1] (0 switches it off)"),
            "repetition_penalty": (self.repetition_penalty > 0, "be above 0 (1 switches it off)"),
        }
        for name, (right, rule) in rules.items():
            if not right:
                raise ValueError(f"Sampling: {name} must {rule}, got {getattr(self, name)}.")

    def stated(self) -> dict[str, Any]:
        """Everything that this says, for the record of a run."""
        return dataclasses.asdict(self)

    def local(self, ends: Iterable[int], pad: int) -> Any:
        """The whole ``GenerationConfig`` of a call, no field left to a model's own.

        Args:
            ends: ids that end a completion.
            pad: id that fills a batch.
        """
        from transformers import GenerationConfig

        drawn: dict[str, Any] = {}
        if self.temperature > 0:
            drawn = {"temperature": float(self.temperature), "top_p": float(self.top_p)}
            drawn |= {"top_k": self.top_k, "min_p": float(self.min_p) or None}
        known = vars(GenerationConfig())
        neutral = {k: v for k, v in NEUTRAL.items() if k in known and k != "top_k"}
        return GenerationConfig(
            **{
                **neutral,
                **drawn,
                "repetition_penalty": float(self.repetition_penalty),
                "do_sample": self.temperature > 0,
                "max_new_tokens": self.max_new_tokens,
                "pad_token_id": pad,
                "eos_token_id": sorted(ends) or None,
                "use_cache": True,
            }
        )

    def served(self) -> dict[str, Any]:
        """The fields of a request to a chat server; ``Server`` states the others as off."""
        return {
            "temperature": self.temperature,
            "top_p": self.top_p,
            "max_tokens": self.max_new_tokens,
            "seed": self.seed,
            **{name: getattr(self, name) for name in _OFF if getattr(self, name) != _OFF[name]},
        }


def overridden(model: Any, sampling: Sampling | None = None) -> dict[str, str]:
    """What a model's own ``generation_config`` asks for and a ``Sampling`` does not.

    Args:
        model: a transformers model.
        sampling: the R1 defaults when None.

    Returns:
        Field to value, as text: those that would change what is drawn, and those that this
        library does not know. None of them is applied.
    """
    found: dict[str, str] = {}
    stated = (sampling or Sampling()).stated()
    own = getattr(model, "generation_config", None)
    for name, value in ({} if own is None else vars(own)).items():
        if value is None or name in STATED or name in INERT:
            continue
        if value != stated.get(name, NEUTRAL.get(name, not value)):
            found[name] = str(value)[:80]
    return found


@contextmanager
def only(model: Any, config: Any) -> Iterator[None]:
    """While inside, ``config`` is all that a model generates by: transformers fills fields that
    are None from the model's own. Wrappers (adapters) hold a copy, so that each is replaced."""
    holders = [module for module in model.modules() if hasattr(module, "generation_config")]
    own = [module.generation_config for module in holders]
    try:
        for module in holders:
            module.generation_config = config
        yield
    finally:
        for module, before in zip(holders, own, strict=True):
            module.generation_config = before
