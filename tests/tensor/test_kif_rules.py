import oracles
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from kifmerge.tensor.kif import kif, kif_adaptive, orthogonality_penalty

SEEDS = st.integers(0, 2**31)
ROWS = torch.tensor([[True, True], [True, False], [False, True], [False, False]])


def draw(seed, shape=(4, 6)):
    """Weights of the new and of the historical side, and two masks."""
    generator = torch.Generator().manual_seed(seed)
    new, historical = (torch.randn(shape, generator=generator) for _ in range(2))
    return new, historical, [torch.rand(shape, generator=generator) < 0.5 for _ in range(2)]


@pytest.mark.parametrize("shared", [(0.3, 0.7), (0.5, 0.5), (1.0, 0.0)])
def test_the_four_cases_by_hand(shared):
    new, historical = torch.full((4,), 10.0), torch.full((4,), -2.0)
    found = kif(new, historical, ROWS[:, 0], ROWS[:, 1], shared_weights=shared)
    both = 10.0 * shared[0] - 2.0 * shared[1]
    torch.testing.assert_close(found, torch.tensor([both, 10.0, -2.0, 4.0]))


@given(seed=SEEDS)
def test_what_matters_to_one_side_alone_is_kept_to_the_bit(seed):
    new, historical, masks = draw(seed)
    new.view(-1)[:4] = torch.tensor([-0.0, 3e38, 1e-45, -1e-3])
    historical.view(-1)[:4] = torch.tensor([0.0, -3e38, 1.0, 1e8])
    found = kif(new, historical, *masks).view(torch.int32)
    for own, other, weights in ((*masks, new), (*reversed(masks), historical)):
        assert torch.equal(found[own & ~other], weights.view(torch.int32)[own & ~other])


@pytest.mark.parametrize("shared", [(0.4, 0.7), (1.0, 1.0), (0.0, 0.0)])
def test_weights_that_change_the_size_of_a_model_are_refused(shared):
    new, historical, masks = draw(0)
    with pytest.raises(ValueError, match="add up to 1"):
        kif(new, historical, *masks, shared_weights=shared)


@given(seed=SEEDS, temperature=st.sampled_from([0.05, 0.25, 10.0]))
def test_adaptive_fusion_at_any_temperature_is_that_of_the_oracle(seed, temperature):
    new, historical, masks = draw(seed)
    scores = [torch.rand_like(new) * mask for mask in masks]
    found = kif_adaptive(new, historical, *scores, temperature=temperature)
    weights = oracles.softmax_weights(*scores, temperature)
    expected = weights[..., 0] * new + weights[..., 1] * historical
    torch.testing.assert_close(found.double(), expected, rtol=1e-5, atol=1e-5)


def test_adaptive_fusion_leans_to_the_larger_score():
    new, historical = torch.full((2,), 10.0), torch.zeros(2)
    found = kif_adaptive(new, historical, torch.tensor([1.0, 0.0]), torch.tensor([0.0, 1.0]))
    assert found.tolist() == pytest.approx([9.8201379, 0.1798621])  # 10 / (1 + exp(-+4))


@given(seed=SEEDS)
def test_penalty_equals_the_oracle(seed):
    generator = torch.Generator().manual_seed(seed)
    a_factors = [torch.randn(3, n, generator=generator) for n in (5, 2)]
    b_factors = [torch.randn(n, r, generator=generator) for n, r in ((4, 3), (7, 1))]
    rows = [*a_factors, *(factor.T for factor in b_factors)]
    expected = sum(oracles.distance_from_orthonormal(m.tolist()) for m in rows) / 4
    found = orthogonality_penalty(a_factors, b_factors)
    assert (found.dtype, found.shape) == (torch.float32, ())
    assert found.item() == pytest.approx(expected, rel=1e-5)


def test_gradient_of_the_penalty_is_the_slope():
    generator = torch.Generator().manual_seed(0)
    a, b = torch.randn(3, 5, generator=generator), torch.randn(4, 3, generator=generator)
    direction = torch.randn(3, 5, generator=generator)
    a.requires_grad_()
    orthogonality_penalty([a], [b]).backward()
    ahead, behind = (
        oracles.distance_from_orthonormal((a.detach().double() + step * direction).tolist()) / 2
        for step in (1e-4, -1e-4)
    )
    assert (a.grad * direction).sum().item() == pytest.approx((ahead - behind) / 2e-4, rel=1e-3)


def test_gradient_is_finite_where_ranks_are_orthonormal_and_where_b_starts():
    a, b = torch.eye(2, 5).requires_grad_(), torch.zeros(4, 2).requires_grad_()
    other = torch.ones(2, 5).requires_grad_()
    orthogonality_penalty([a, other], [b]).backward()
    assert torch.equal(a.grad, torch.zeros(2, 5))
    assert torch.equal(b.grad, torch.zeros(4, 2))
    assert other.grad.isfinite().all()
    assert other.grad.abs().sum() > 0


def test_descending_the_penalty_makes_ranks_orthonormal():
    generator = torch.Generator().manual_seed(0)
    a = torch.randn(3, 8, generator=generator).requires_grad_()
    b = (0.1 * torch.randn(6, 3, generator=generator)).requires_grad_()
    optimizer = torch.optim.SGD([a, b], lr=0.05)
    for _ in range(300):
        optimizer.zero_grad()
        orthogonality_penalty([a], [b]).backward()
        optimizer.step()
    assert orthogonality_penalty([a], [b]) < 0.2
    assert all(torch.isfinite(factor).all() for factor in (a, b))


def test_penalty_is_computed_in_float32_under_autocast_and_for_half_precision():
    generator = torch.Generator().manual_seed(0)
    a = torch.randn(3, 50, generator=generator)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        inside = orthogonality_penalty([a], [])
    assert torch.equal(inside, orthogonality_penalty([a], []))
    half = a.bfloat16()
    assert torch.equal(orthogonality_penalty([half], []), orthogonality_penalty([half.float()], []))


def test_penalty_of_no_matrices_is_refused():
    with pytest.raises(ValueError, match="at least one LoRA matrix"):
        orthogonality_penalty([], [])
