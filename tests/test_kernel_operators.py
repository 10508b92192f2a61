"""The kernels as PyTorch operators: one graph under torch.compile, fakes that tell the truth."""

import pytest
import torch
from kernel_cases import TOKENS, VOCAB, logits

import kd
from kd_kernels.dense import dense_rows
from kd_kernels.sparse import sparse_rows

pytestmark = [
    pytest.mark.filterwarnings("ignore:.*encountered:RuntimeWarning"),  # numpy's -inf
    pytest.mark.filterwarnings("ignore::UserWarning"),  # dynamo's advice
    pytest.mark.filterwarnings("ignore::DeprecationWarning"),
]


@pytest.mark.parametrize("reduction", ["mean", "none"])
@pytest.mark.parametrize("name", ["forward_kl", "adaptive_kl"])
def test_one_graph(name, reduction):
    """The whole loss, forward and backward, without a graph break; the same numbers."""
    teacher, weights = logits(seed=1), torch.tensor([1.0, 0.0, 0.5, 2.0])
    options = dict(divergence=name, weights=weights, temperature=2.0, reduction=reduction)

    def step(z):
        return kd.distillation_loss(z * 1.0, teacher, backend="triton", **options).sum()

    found = []
    for call in (step, torch.compile(step, fullgraph=True, backend="aot_eager")):
        z = logits().requires_grad_()
        loss = call(z)
        (3 * loss).backward()
        found.append((loss.detach(), z.grad))
    torch.testing.assert_close(found[1], found[0], rtol=1e-6, atol=1e-7)


@pytest.mark.parametrize(
    ("name", "tail"), [("forward_kl", "bucket"), ("adaptive_kl", "bucket"), ("jsd", "uniform")]
)
def test_one_graph_with_a_sparse_teacher(name, tail):
    """Stored tokens, an empty slot and a repeated id: no look at values breaks the graph."""
    logprobs, ids = torch.log_softmax(logits(seed=1), -1).topk(5)
    ids[0, 1], ids[1, 0], ids[2, 4] = -1, ids[1, 2], -1
    logprobs[1, :3] -= 1
    labels = torch.tensor([1, -100, 3, 4])
    options = dict(divergence=name, labels=labels, ce_weight=0.5, backend="triton")

    def step(z, ids, logprobs):
        return kd.distillation_loss(
            z * 1.0, kd.TopK(ids, logprobs, tail=tail, tail_at_temperature="spread"), **options
        )

    found = []
    for call in (step, torch.compile(step, fullgraph=True, backend="aot_eager")):
        z = logits().requires_grad_()
        loss = call(z, ids, logprobs)
        (3 * loss).backward()
        found.append((loss.detach(), z.grad))
    torch.testing.assert_close(found[1], found[0], rtol=1e-6, atol=1e-7)


@pytest.mark.parametrize("reduction", ["mean", "none"])
def test_one_graph_of_the_fused_linear(reduction):
    """Hidden states and lm_head with a masked row: a graph packs no rows, the numbers agree."""
    generator = torch.Generator().manual_seed(4)
    hidden, weight = (torch.randn(n, 6, generator=generator) for n in (TOKENS, VOCAB))
    options = dict(labels=torch.tensor([1, -100, 3, 4]), ce_weight=0.5, backend="triton")

    def step(hidden, weight, teacher):
        source = kd.Hidden(hidden, weight, softcap=5.0)
        return kd.distillation_loss(source, teacher, reduction=reduction, **options).sum()

    found = []
    for call in (step, torch.compile(step, fullgraph=True, backend="aot_eager")):
        leaves = [t.clone().requires_grad_() for t in (hidden, weight)]
        loss = call(*leaves, logits(seed=1))
        (3 * loss).backward()
        found.append((loss.detach(), *(leaf.grad for leaf in leaves)))
    torch.testing.assert_close(found[1], found[0], rtol=2e-6, atol=1e-6)


def test_operators():
    """Schemas hold and fakes give the shapes of what runs."""
    gradient, weights = torch.empty(TOKENS, VOCAB), torch.ones(TOKENS)
    numbers = (1.0, 1.0, 0.0, 0.0, 0.5, 0.5, None, 1.0, None, 1.0, None)
    dense = (logits(), logits(seed=1), weights, None, gradient, "jsd", VOCAB, *numbers)
    checks = ("test_schema", "test_faketensor")
    torch.library.opcheck(dense_rows, dense, test_utils=checks)
    logprobs, ids = torch.log_softmax(logits(seed=1), -1).topk(6)
    tail = torch.full((TOKENS, 1), -3.0)
    numbers = (1.0, 1.0, 0.0, 0.0, 0.5, None, 1.0, None)
    sparse = (logits(), ids, logprobs, tail, weights, None, None, gradient)
    torch.library.opcheck(sparse_rows, (*sparse, "jsd", VOCAB, *numbers), test_utils=checks)
