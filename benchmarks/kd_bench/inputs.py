"""Inputs of a benchmark, made once and shared between processes through files, and the truth.

The truth is computed in float64 by the oracle on the first rows of the same inputs. Of an
lm_head's gradient it keeps the rows of some tokens of the vocabulary; everything else is whole.
"""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

import kd
from kd_bench import pipelines
from kd_bench.shapes import PIPELINE_SUITES, Shape
from kd_bench.steps import Truth

CHECK_TOKENS = 8
CHECK_IDS = 512
DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}


def parse_divergence(text: str) -> kd.Divergence:
    """A divergence from its printed form, such as ``forward_kl`` or ``jsd(0.5)``."""
    name, _, arguments = text.partition("(")
    if not arguments:
        return kd.losses.divergences.resolve(name)
    numbers = [float(part) for part in arguments.rstrip(")").split(",")]
    return getattr(kd, name)(*numbers)


def make_inputs(suite: str, shape: Shape, dtype: torch.dtype, seed: int = 0) -> dict[str, Tensor]:
    """The tensors of one suite on the CPU. Logits have a spread of about 2, as a model's do."""
    if suite in PIPELINE_SUITES:
        return pipelines.make_inputs(suite, shape, dtype)
    g = torch.Generator().manual_seed(seed)

    def random(rows: int, columns: int, scale: float) -> Tensor:
        return (scale * torch.randn(rows, columns, generator=g)).to(dtype)

    n, v, made = shape.tokens, shape.vocab, {}
    if suite in ("linear", "linear-sparse", "cross-entropy"):
        made["hidden"] = random(n, shape.student_hidden, 1.0)
        made["weight"] = random(v, shape.student_hidden, 2 * shape.student_hidden**-0.5)
    if suite == "linear":
        made["teacher_hidden"] = random(n, shape.teacher_hidden, 1.0)
        made["teacher_weight"] = random(v, shape.teacher_hidden, 2 * shape.teacher_hidden**-0.5)
    if suite in ("dense", "sparse"):
        made["logits"] = random(n, v, 2.0)
    if suite in ("dense", "selection"):
        made["teacher_logits"] = random(n, v, 2.0)
    if suite in ("linear-sparse", "sparse"):
        step = max(1, v // shape.top_k)
        first = torch.randint(0, step, (n, shape.top_k), generator=g)
        made["ids"] = first + step * torch.arange(shape.top_k)  # distinct in a row
        masses = torch.randn(n, shape.top_k + 1, generator=g).mul_(2).log_softmax(-1)
        made["logprobs"] = masses[:, :-1].contiguous()
    if suite == "cross-entropy":
        made["labels"] = torch.randint(0, v, (n,), generator=g)
    return made


def save(inputs: dict[str, Tensor], folder: Path) -> None:
    """Write the inputs as raw files, with an index."""
    index = {}
    for name, tensor in inputs.items():
        index[name] = {"shape": list(tensor.shape), "dtype": str(tensor.dtype).split(".")[1]}
        raw = tensor.contiguous().view(-1).view(torch.uint8).numpy()
        raw.tofile(folder / name)
    (folder / "index.json").write_text(json.dumps(index))


def load(folder: Path, device: str = "cpu") -> dict[str, Tensor]:
    """Map the inputs of ``save``: processes on a CPU share one copy of them."""
    loaded = {}
    for name, entry in json.loads((folder / "index.json").read_text()).items():
        dtype, size = getattr(torch, entry["dtype"]), 1
        for extent in entry["shape"]:
            size *= extent
        flat = torch.from_file(str(folder / name), shared=False, size=size, dtype=dtype)
        loaded[name] = flat.view(entry["shape"]).to(device)
    return loaded


ROWWISE = ("hidden", "teacher_hidden", "logits", "teacher_logits", "ids", "logprobs", "labels")


def first_rows(inputs: dict[str, Tensor], rows: int = CHECK_TOKENS) -> dict[str, Tensor]:
    """The same inputs with the first tokens alone."""
    if "train_size" in inputs:  # one short sequence: its truth is a whole model in float64
        short = inputs["train_size"].clone()
        short[-2], short[-1] = 1, min(32, int(short[-1]))
        return inputs | {"train_size": short}
    return {name: t[:rows] if name in ROWWISE else t for name, t in inputs.items()}


def blocks(vocab: int, size: int = 16_384) -> list[slice]:
    return [slice(start, min(start + size, vocab)) for start in range(0, vocab, size)]


def exact_matmul(hidden: Tensor, weight: Tensor) -> Tensor:
    """hidden @ weight.T in float64, a slab of the vocabulary at a time."""
    wide = hidden.double()
    return torch.cat([wide @ weight[s].double().T for s in blocks(len(weight))], 1)


def save_truth(truth: Truth, path: Path) -> None:
    torch.save(dataclasses.asdict(truth), path)


def load_truth(path: Path) -> Truth:
    return Truth(**torch.load(path, weights_only=True))


def exact_answer(suite: str, divergence: str, inputs: dict[str, Tensor]) -> Truth:
    """The mean over ``inputs``' tokens and its gradients, by the float64 oracle."""
    if suite in PIPELINE_SUITES:
        return pipelines.exact_answer(suite, divergence, inputs)
    few = inputs
    ids = torch.randperm(_vocab(few), generator=torch.Generator().manual_seed(1))[:CHECK_IDS]
    if suite == "selection":
        return _exact_selection(few, ids)
    z = few["logits"].double() if "logits" in few else exact_matmul(few["hidden"], few["weight"])
    z.requires_grad_()
    if suite == "cross-entropy":
        loss = kd.cross_entropy(z, few["labels"], backend="reference")
        ids = torch.cat([ids, few["labels"]]).unique()
    else:
        d = parse_divergence(divergence)
        loss = d(z, _exact_teacher(few), backend="reference")
    (dz,) = torch.autograd.grad(loss, z)
    if "logits" in few:
        return Truth(float(loss.detach()), {"logits": dz}, ids)
    weight, wide = few["weight"], torch.zeros(len(dz), few["weight"].shape[1], dtype=torch.float64)
    for s in blocks(len(weight)):
        wide += dz[:, s] @ weight[s].double()
    gradients = {"hidden": wide, "weight": dz[:, ids].T @ few["hidden"].double()}
    return Truth(float(loss.detach()), gradients, ids)


def _vocab(inputs: dict[str, Tensor]) -> int:
    for name, axis in (("weight", 0), ("logits", 1), ("teacher_logits", 1)):
        if name in inputs:
            return inputs[name].shape[axis]
    raise AssertionError(sorted(inputs))


def _exact_teacher(inputs: dict[str, Tensor]) -> Any:
    if "ids" in inputs:
        return kd.TopK(inputs["ids"], inputs["logprobs"])
    if "teacher_logits" in inputs:
        return inputs["teacher_logits"].double()
    return exact_matmul(inputs["teacher_hidden"], inputs["teacher_weight"])


def _exact_selection(inputs: dict[str, Tensor], ids: Tensor) -> Truth:
    logprobs = torch.log_softmax(inputs["teacher_logits"].double(), -1)
    return Truth(float(logprobs.amax(-1).mean()), {"logprobs": logprobs}, ids)


def errors(suite: str, answer: tuple[Tensor, dict[str, Tensor]], truth: Truth) -> dict[str, float]:
    """{value_error, grad_error} of an implementation's answer, relative to the largest true one."""
    value, results = answer
    scale = max(abs(truth.value), 1e-30)
    found = {"value": float(value), "value_error": abs(float(value) - truth.value) / scale}
    if suite == "selection":
        exact = truth.gradients["logprobs"].gather(1, results["ids"].cpu())
        found["grad_error"] = float((results["logprobs"].cpu().double() - exact).abs().max())
        return found
    if suite == "capture":  # ids that are as likely as others may differ; codecs keep p, not log p
        exact = truth.gradients["logprobs"].gather(1, results["ids"].cpu()).exp()
        found["grad_error"] = float((results["logprobs"].cpu().double().exp() - exact).abs().max())
        return found
    worst = 0.0
    for name, want in truth.gradients.items():
        got = results[name].cpu()
        got = (got[truth.ids] if name == "weight" else got).double()
        worst = max(worst, float((got - want).abs().max() / want.abs().max()))
    found["grad_error"] = worst
    return found
