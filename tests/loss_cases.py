"""Inputs that the loss tests share: students, teachers, divergences."""

import contextlib
import functools
import tempfile

import torch

import kd
from kd.losses.divergences import DEFINITIONS

DIVERGENCES = {
    str(d): d
    for d in (
        kd.forward_kl,
        kd.reverse_kl,
        kd.jsd(0.5),
        kd.jsd(0.1),
        kd.skew_forward_kl(0.0),
        kd.skew_forward_kl(0.1),
        kd.skew_reverse_kl(0.0),
        kd.skew_reverse_kl(0.1),
        kd.skew_reverse_kl(0.1, detach_mixture=True),
        kd.total_variation,
        kd.alpha_beta(0.2, 0.7),
        kd.alpha_beta(1.0, 0.0),
        kd.alpha_beta(0.0, 1.0),
        kd.alpha_beta(0.0, 0.5),
        kd.adaptive_kl,
    )
}
# One that is not tried above, with the parameters it has by default.
for name in {*DEFINITIONS} - {d.name for d in DIVERGENCES.values()}:
    made = getattr(kd, name)
    made = made if isinstance(made, kd.Divergence) else made()
    DIVERGENCES[str(made)] = made
TEACHERS = ("logits", "hidden", "bucket", "renormalize", "drop", "uniform")
STUDENTS = ("logits", "hidden", "hidden_options")

TOKENS, VOCAB, HIDDEN, TEACHER_HIDDEN, TOP_K = 6, 19, 5, 7, 4


def normal(*shape: int, seed: int = 0, scale: float = 1.0, dtype: torch.dtype = torch.float32):
    """Normal numbers: the same for a seed in every dtype, but for their rounding."""
    made = torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)
    return (scale * made).to(dtype)


def leaf(*shape: int, seed: int = 0, dtype: torch.dtype = torch.float32) -> torch.Tensor:
    return normal(*shape, seed=seed, dtype=dtype).requires_grad_()


normal64 = functools.partial(normal, dtype=torch.float64)
leaf64 = functools.partial(leaf, dtype=torch.float64)


def gradient(loss: torch.Tensor, leaf: torch.Tensor, **options) -> torch.Tensor:
    return torch.autograd.grad(loss, leaf, **options)[0]


def close(got, want, rtol: float = 1e-9, atol: float = 1e-12) -> None:
    got, want = (torch.as_tensor(x, dtype=torch.float64) for x in (got, want))
    torch.testing.assert_close(got, want, rtol=rtol, atol=atol)


def top_k_of(teacher_logits: torch.Tensor, k: int, **options) -> kd.TopK:
    logprobs, ids = torch.log_softmax(teacher_logits, -1).topk(k)
    return kd.TopK(ids, logprobs, tail_at_temperature="spread", **options)


@contextlib.contextmanager
def group_of_one():
    """A process group of this process alone."""
    with tempfile.TemporaryDirectory() as folder:
        store = f"file://{folder}/store"
        torch.distributed.init_process_group("gloo", init_method=store, rank=0, world_size=1)
        try:
            yield
        finally:
            torch.distributed.destroy_process_group()


def make_student(form: str, dtype: torch.dtype, seed: int = 0, tokens: int = TOKENS):
    """(student, leaves): the leaves want gradients. The lm_head has two padded rows."""
    g = torch.Generator().manual_seed(seed)

    def leaf(*shape: int) -> torch.Tensor:
        made = torch.randn(*shape, generator=g, dtype=torch.float64)
        return made.to(dtype).requires_grad_()

    if form == "logits":
        logits = leaf(tokens, VOCAB + 2)
        return logits, [logits]
    hidden, weight = leaf(tokens, HIDDEN), leaf(VOCAB + 2, HIDDEN)
    if form == "hidden":
        return kd.Hidden(hidden, weight), [hidden, weight]
    bias, a, b = leaf(VOCAB + 2), leaf(2, HIDDEN), leaf(VOCAB + 2, 2)
    options = dict(bias=bias, logit_scale=1.3, softcap=6.0, lora=(a, b, 0.5))
    return kd.Hidden(hidden, weight, **options), [hidden, weight, bias, a, b]


def make_teacher(form: str, dtype: torch.dtype, seed: int = 1, tokens: int = TOKENS):
    """A teacher; sparse ones have an empty slot, a repeated id and a capture temperature of 1."""
    g = torch.Generator().manual_seed(seed)
    logits = 2 * torch.randn(tokens, VOCAB + 1, generator=g, dtype=torch.float64)
    if form == "logits":
        return logits.to(dtype)
    if form == "hidden":
        hidden = torch.randn(tokens, TEACHER_HIDDEN, generator=g, dtype=torch.float64)
        weight = torch.randn(VOCAB, TEACHER_HIDDEN, generator=g, dtype=torch.float64)
        return kd.Hidden(hidden.to(dtype), weight.to(dtype), logit_scale=0.8, softcap=5.0)
    logprobs, ids = torch.log_softmax(logits[:, :VOCAB], -1).topk(TOP_K)
    ids[0, 1] = -1
    ids[1, 0] = ids[1, 2]
    kept = logprobs if dtype == torch.float64 else logprobs.float()
    return kd.TopK(ids, kept, tail=form, tail_at_temperature="spread")


def meaningful(divergence: kd.Divergence, teacher: str, temperature: float) -> bool:
    """Whether the combination is one the library accepts."""
    if teacher == "drop":
        return divergence.name == "forward_kl" and temperature == 1
    return not (teacher == "renormalize" and divergence.needs_teacher_support)


def labels_for(tokens: int = TOKENS) -> torch.Tensor:
    labels = torch.arange(tokens) * 3 % VOCAB
    labels[2] = -100
    return labels


def relative_error(got: torch.Tensor, want: torch.Tensor) -> float:
    """Largest error over the largest true value (a true zero must be met to 1e-300)."""
    difference = (got.double() - want.double()).abs().max()
    return float(difference / want.double().abs().max().clamp(min=1e-300))
