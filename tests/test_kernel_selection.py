"""Teacher-side selection in Triton's interpreter, against torch.topk and the distribution itself.

Ties, saturated rows and rows with fewer live tokens than k have tests of their own.
"""

import pytest
import torch
from kernel_cases import TOKENS, VOCAB, logits

from kd_kernels.selection import sample, select_top

pytestmark = pytest.mark.filterwarnings("ignore:.*encountered:RuntimeWarning")  # numpy's -inf


@pytest.mark.parametrize("k", [1, 2, 16, 64, VOCAB])
@pytest.mark.parametrize("temperature", [1.0, 2.0])
def test_top_k(k, temperature):
    z = logits(176)
    z[:, VOCAB:] = torch.nan
    ids, log_p, log_tail = select_top(z, k, vocab=VOCAB, temperature=temperature)
    want = torch.log_softmax(z[:, :VOCAB].double() / temperature, -1)
    want_p, want_ids = want.topk(k)
    assert torch.equal(ids, want_ids)
    torch.testing.assert_close(log_p.double(), want_p, rtol=1e-6, atol=1e-6)
    rest = want.scatter(1, want_ids, -torch.inf).logsumexp(-1)
    torch.testing.assert_close(log_tail.double(), rest, rtol=1e-5, atol=1e-5)


def test_ties():
    """Rounded logits: as many as k are kept, none larger is missed, ties go to the lowest ids."""
    z = logits().round()
    z[3] = 1.0
    ids, log_p, log_tail = select_top(z, 10)
    for row in range(TOKENS):
        order = z[row].sort(descending=True, stable=True)
        assert sorted(ids[row].tolist()) == sorted(order.indices[:10].tolist())
    total = log_p.double().exp().sum(-1) + log_tail.double().exp()
    torch.testing.assert_close(total, torch.ones(TOKENS, dtype=torch.float64), rtol=0, atol=2e-6)


def test_few_tokens_and_saturation():
    """-inf logits are never kept; a tail of 1e-20 is a number, not a rounding of 1."""
    z = torch.full((2, VOCAB), -torch.inf)
    z[0, [5, 90]] = torch.tensor([1.0, 2.0])
    z[1] = -46.0
    z[1, 7] = 0.0
    ids, log_p, log_tail = select_top(z, 4)
    assert ids[0].tolist() == [90, 5, -1, -1] and log_p[0, 2] == -torch.inf
    assert log_tail[0] == -torch.inf
    kept = torch.log_softmax(z[1].double(), -1)
    want = kept[sorted(set(range(VOCAB)) - {i for i in ids[1].tolist() if i >= 0})].logsumexp(0)
    torch.testing.assert_close(log_tail[1].double(), want, rtol=1e-5, atol=0)


def test_sampling():
    """Draws follow the distribution, repeat with their seed, and never leave its support."""
    z = logits(tokens=2, scale=1.5)
    z[:, ::4] = -torch.inf
    draws = 2048
    ids = sample(z, draws, 11, temperature=1.3)
    assert torch.equal(ids, sample(z, draws, 11, temperature=1.3))
    assert not torch.equal(ids, sample(z, draws, 12, temperature=1.3))
    p = torch.softmax(z.double() / 1.3, -1)
    counts = torch.zeros_like(p).scatter_add(1, ids, torch.ones_like(ids, dtype=torch.float64))
    assert (counts[p == 0] == 0).all()
    likely = draws * p >= 5
    chi = ((counts - draws * p) ** 2 / (draws * p))[likely].sum()
    assert float(chi) < 1.6 * int(likely.sum())


def test_refusals():
    with pytest.raises(ValueError, match=r"select_top: k must lie in \[1, 150\], got 151"):
        select_top(logits(), 151)
    with pytest.raises(ValueError, match="sample: draws must be at least 1, got 0"):
        sample(logits(), 0, 1)
    assert select_top(logits(tokens=0), 3)[0].shape == (0, 3)
