import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from lightning_plasticity.functional import effective_rank, feature_rank, stable_rank
from lightning_plasticity.functional.activity import gram_matrix
from lightning_plasticity.functional.rank import singular_values_from_gram


def reference(features: Tensor, delta: float = 0.01) -> tuple[float, float, int]:
    """The definitions, by NumPy."""
    s = np.linalg.svd(features.double().numpy(), compute_uv=False)
    p = s[s > 0] / s.sum()
    least = next(k for k in range(1, len(s) + 1) if s[:k].sum() >= (1 - delta) * s.sum())
    return np.exp(-(p * np.log(p)).sum()), np.linalg.norm(features.double()) ** 2 / s[0] ** 2, least


def with_singular_values(s: Tensor, samples: int = 90) -> Tensor:
    torch.manual_seed(1)
    left = torch.linalg.qr(torch.randn(samples, len(s), dtype=torch.float64)).Q
    right = torch.linalg.qr(torch.randn(len(s), len(s), dtype=torch.float64)).Q
    return left * s @ right


def matrices() -> dict[str, Tensor]:
    torch.manual_seed(0)
    random = torch.randn(80, 30, dtype=torch.float64)
    return {
        "random": random,
        "wide": random.T.contiguous(),
        "rank deficient": random[:, :4] @ torch.randn(4, 50, dtype=torch.float64),
        "constant": torch.full((70, 20), 3.7, dtype=torch.float64),
        "tiny": random * 1e-30,
        "large": random * 1e30,
        "ill-conditioned": with_singular_values(torch.logspace(0, -12, 40, dtype=torch.float64)),
        "one sample": random[:1],
        "one unit": random[:, :1],
        "single precision": random.float(),
        "half precision": random.half(),
    }


@pytest.mark.parametrize("name", matrices())
def test_values_are_those_of_numpy(name):
    a = matrices()[name]
    effective, stable, least = reference(a)
    assert effective_rank(a).item() == pytest.approx(effective, rel=1e-9)
    assert stable_rank(a).item() == pytest.approx(stable, rel=1e-9)
    assert feature_rank(a).item() == least


@pytest.mark.parametrize("n", [1, 2, 17, 100])
def test_identity_has_full_rank(n):
    for scale in (1.0, 1e-20, 1e20):
        identity = scale * torch.eye(n, dtype=torch.float64)
        assert effective_rank(identity).item() == pytest.approx(n, rel=1e-12)
        assert stable_rank(identity).item() == pytest.approx(n, rel=1e-12)
        assert feature_rank(identity).item() == max(1, int(np.ceil(0.99 * n)))


def test_a_tie_is_decided_the_same_way_for_any_orthogonal_matrix():
    torch.manual_seed(0)
    for _ in range(20):
        orthogonal = torch.linalg.qr(torch.randn(100, 100, dtype=torch.float64)).Q
        assert feature_rank(orthogonal).item() == 99


def test_rank_one():
    torch.manual_seed(0)
    outer = torch.outer(torch.randn(40), torch.randn(10)).double()
    assert effective_rank(outer).item() == pytest.approx(1, abs=1e-5)  # formed in single precision
    exact = torch.outer(torch.randn(40).double(), torch.randn(10).double())
    for rank in (effective_rank, stable_rank, feature_rank):
        assert rank(exact).item() == pytest.approx(1, abs=1e-12)


def test_zeros_have_rank_0_and_one_sample_rank_1():
    for rank in (effective_rank, stable_rank, feature_rank):
        assert rank(torch.zeros(5, 3)).item() == 0
        assert rank(torch.zeros(5, 1)).item() == 0
        assert rank(torch.tensor([[1.0, 2.0, 3.0]])).item() == pytest.approx(1, abs=1e-12)


@given(
    samples=st.integers(1, 30),
    units=st.integers(1, 12),
    rank=st.integers(1, 12),
    exponent=st.integers(-20, 20),
    seed=st.integers(0, 1000),
)
def test_ranks_are_bounded_and_in_order(samples, units, rank, exponent, seed):
    g = torch.Generator().manual_seed(seed)
    a = torch.randn(samples, rank, generator=g, dtype=torch.float64)
    a = a @ torch.randn(rank, units, generator=g, dtype=torch.float64) * 10.0**exponent
    true_rank = min(samples, units, rank)
    stable, effective, least = stable_rank(a).item(), effective_rank(a).item(), feature_rank(a).item()
    assert 1 - 1e-9 <= stable <= effective + 1e-9 <= true_rank + 1e-8
    assert 1 <= least <= true_rank
    assert effective == pytest.approx(reference(a)[0], rel=1e-9)


def test_effective_rank_is_of_the_singular_values_not_of_the_eigenvalues():
    a = torch.diag(torch.tensor([3.0, 1.0, 1.0, 1.0], dtype=torch.float64))
    s = np.array([3.0, 1.0, 1.0, 1.0])

    def entropy_rank(weights: np.ndarray) -> float:
        p = weights / weights.sum()
        return float(np.exp(-(p * np.log(p)).sum()))

    assert effective_rank(a).item() == pytest.approx(entropy_rank(s), rel=1e-12)
    assert entropy_rank(s) > entropy_rank(s**2) + 1  # 3.46 against 2.26
    assert effective_rank(a).item() > 3


def test_stable_rank_is_not_the_number_of_values_that_make_up_99_percent():
    a = with_singular_values(torch.logspace(0, -1.5, 50, dtype=torch.float64))
    assert stable_rank(a).item() < 10
    assert feature_rank(a).item() > 40
    assert feature_rank(a).item() == reference(a)[2]


def test_feature_rank_follows_delta():
    a = torch.diag(torch.tensor([6.0, 3.0, 1.0]))
    assert [feature_rank(a, delta).item() for delta in (0.0, 0.05, 0.1, 0.39, 0.41, 0.99)] == [3, 3, 2, 2, 1, 1]


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_what_is_not_finite_gives_nan(value):
    a = torch.randn(6, 4)
    a[2, 3] = value
    for rank in (effective_rank, stable_rank, feature_rank):
        assert rank(a).isnan()


@pytest.mark.parametrize("delta", [-0.1, 1.0, float("nan")])
def test_delta_is_checked(delta):
    with pytest.raises(ValueError, match="delta must be a finite number, at least 0 and below 1,"):
        feature_rank(torch.eye(2), delta)


# ---- the Gram matrix, for features that arrive in pieces ------------------------------------------------------------


@pytest.mark.parametrize("name", matrices())
def test_the_gram_matrix_gives_the_singular_values(name):
    a = matrices()[name].double()
    exact = np.linalg.svd(a.numpy(), compute_uv=False)
    s = singular_values_from_gram(gram_matrix(a), len(a)).numpy()
    assert len(s) == a.shape[1]
    eps = np.finfo(np.float64).eps
    cutoff = np.sqrt((a.shape[1] + np.sqrt(len(a))) * eps) * exact[0]
    above = exact > 2 * cutoff
    # An eigenvalue is off by some eps * s_max^2, hence a singular value by some eps * s_max^2 / s.
    assert np.all(np.abs(s[: above.sum()] - exact[above]) <= 50 * eps * exact[0] ** 2 / exact[above])
    assert np.all(s[(exact > cutoff / 2).sum() :] == 0)


def test_rounding_in_the_gram_matrix_is_not_taken_for_rank():
    """Without the threshold, the square roots of rounding errors add up."""
    torch.manual_seed(0)
    a = torch.randn(3000, 1, dtype=torch.float64) @ torch.randn(1, 300, dtype=torch.float64)
    gram = gram_matrix(a)
    raw = torch.linalg.eigvalsh(gram).clamp(min=0).sqrt()
    assert raw.sum() / raw.max() - 1 > 1e-7
    s = singular_values_from_gram(gram, len(a))
    assert (s > 0).sum() == 1


def test_values_below_the_threshold_change_effective_rank_by_little():
    a = matrices()["ill-conditioned"]
    s = singular_values_from_gram(gram_matrix(a), len(a))
    assert 0 < (s > 0).sum() < 40  # some were lost, as documented
    p = (s / s.sum())[s > 0]
    assert torch.exp(-(p * p.log()).sum()).item() == pytest.approx(reference(a)[0], rel=1e-5)


def test_the_gram_matrix_of_many_rows_is_taken_in_parts(monkeypatch):
    a = torch.randn(100, 5)
    whole = gram_matrix(a)
    monkeypatch.setattr("lightning_plasticity.functional.activity._ROWS_AT_ONCE", 7)
    torch.testing.assert_close(gram_matrix(a), whole, rtol=1e-12, atol=1e-12)
    torch.testing.assert_close(whole, a.double().T @ a.double(), rtol=1e-12, atol=1e-12)
