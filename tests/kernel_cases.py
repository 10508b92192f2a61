"""Shared by the kernel tests: Triton's interpreter (see conftest.py), inputs, and the comparison
with the oracle."""

import pytest
import torch
import triton.language as tl
from triton.runtime import interpreter

import kd

_patch_language = interpreter._patch_lang
_patched = []


def _patch_once(function):
    """Triton's patch of its language, once a launch and set of modules: repeating it in every
    device function called is two thirds of the interpreter's time."""
    modules = {id(v) for v in function.__globals__.values() if v is tl or v is tl.core}
    if modules in _patched:
        return None
    scope = _patch_language(function)
    restore = scope.restore
    _patched.append(modules)
    scope.restore = lambda: (_patched.clear(), restore())
    return scope


interpreter._patch_lang = _patch_once

TOKENS, VOCAB = 4, 150  # three tiles of 64 columns, the last one ragged


def some(points, kept):
    """Parameters of a test, slow but for those that ``kept(*point)`` names."""
    points = [point if isinstance(point, tuple) else (point,) for point in points]
    slow = pytest.mark.slow
    return [pytest.param(*p, marks=() if kept(*p) else slow) for p in points]


def logits(width: int = VOCAB, seed: int = 0, tokens: int = TOKENS, scale: float = 2.0):
    generator = torch.Generator().manual_seed(seed)
    return scale * torch.randn(tokens, width, generator=generator)


def compare(student, teacher, *, upstream=None, leaves=None, slack=1e-6, **options) -> None:
    """Per-token losses and gradients of the kernels against the float64 oracle.

    leaves: the tensors that want gradients; by default the student's logits. The error allowed is
    twice the torch backend's own in the same dtype, plus ``slack`` of the largest result.
    """
    leaves = [student] if leaves is None else leaves
    upstream = torch.linspace(0.5, 1.5, TOKENS) if upstream is None else upstream
    found = {}
    for backend in ("reference", "torch", "triton"):
        for leaf in leaves:
            leaf.requires_grad_(True)
            leaf.grad = None
        losses = kd.distillation_loss(
            student, teacher, reduction="none", backend=backend, **options
        )
        (losses.double() * upstream[: len(losses)]).sum().backward()
        found[backend] = [losses.detach().double()] + [leaf.grad.double() for leaf in leaves]
    for i, want in enumerate(found["reference"]):
        got, plain = found["triton"][i], found["torch"][i]
        finite = want.isfinite()
        assert torch.equal(got[~finite].nan_to_num(), want[~finite].nan_to_num())
        scale = want[finite].abs().max() if finite.any() else torch.tensor(0.0)
        bound = 2 * (plain - want)[finite].abs().max() + slack * scale + 2e-7 if finite.any() else 0
        assert ((got - want)[finite].abs() <= bound).all(), (
            f"output {i}: {(got - want)[finite].abs().max():.2e} against {float(bound):.2e}"
        )
