"""Factors are decomposed once for all methods of a layer, in the span of its samples."""

from typing import Any

import pytest
import torch
from torch import nn

import fisherlab as fl
from fisherlab.numerics.linalg import decomposed_once, spectrum
from fisherlab.statistics import Statistics

METHODS = ["kfac", "ekfac", "tkfac", "tekfac", "soap", "shampoo", "kpsvd"]
METRICS = ["frobenius_error", "direction_cosine", "inverse_error", "gaussian_kl"]


class Positions(nn.Module):
    """A linear layer at several positions, its output at the last one counted."""

    def __init__(self, o: int, i: int) -> None:
        super().__init__()
        self.fc = nn.Linear(i, o).double()

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.fc(x)


def _statistics(
    o: int, i: int, n: int, t: int, dtype: torch.dtype | None = None
) -> tuple[Statistics, Any]:
    generator = torch.Generator().manual_seed(o + i + n)
    x = torch.randn(n, t, i, generator=generator, dtype=torch.float64)
    y = torch.randint(0, o, (n, t), generator=generator)
    model, data = Positions(o, i), (x, y)
    made = fl.collect(model, data, fl.Categorical(), fl.MonteCarlo(1), dtype=dtype)
    return made, fl.mean_gradient(model, data, fl.Categorical(), dtype=dtype)


class Counted:
    """Sizes of the matrices that `torch.linalg.eigh` is given."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.sizes: list[int] = []
        eigh = torch.linalg.eigh

        def counted(matrix: torch.Tensor, *rest: Any) -> Any:
            self.sizes.append(matrix.shape[-1])
            return eigh(matrix, *rest)

        monkeypatch.setattr(torch.linalg, "eigh", counted)


def test_one_decomposition_a_factor_serves_every_method(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Three pairs of factors are behind six methods: KFAC's, the traces, their roots."""
    stats, gradient = _statistics(7, 12, 30, 3)
    counted = Counted(monkeypatch)
    fl.compare(stats, METHODS[:6], damping=0.1, gradient=gradient, metrics=METRICS[:2])
    assert sorted(counted.sizes) == [7] * 3 + [13] * 3


def test_few_rows_are_decomposed_among_themselves(monkeypatch: pytest.MonkeyPatch) -> None:
    """Six rows of 21 and 34 numbers: no factor larger than 6 is decomposed.

    KPSVD is left out: where it has not converged, it decomposes its Krylov space.
    """
    stats, gradient = _statistics(21, 33, 3, 2)
    counted = Counted(monkeypatch)
    fl.compare(stats, METHODS[:6], damping=0.1, gradient=gradient, metrics=METRICS[:2])
    assert counted.sizes
    assert max(counted.sizes) <= 6


@pytest.mark.parametrize(("o", "i"), [(21, 33), (33, 21)])
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
def test_numbers_are_those_of_whole_factors(
    o: int, i: int, dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch
) -> None:
    """All metrics within the span of six rows are those without it."""
    stats, gradient = _statistics(o, i, 3, 2, dtype)
    asked: dict[str, Any] = {"damping": fl.RelativeDamping(1.0), "gradient": gradient}
    found = fl.compare(stats, METHODS, metrics=METRICS, **asked)
    monkeypatch.setattr("fisherlab.numerics.linalg.WORTH", 0.0)
    whole = fl.compare(stats, METHODS, metrics=METRICS, **asked)
    assert (found.status == "ok").all()
    close = 1e-9 if dtype == torch.float64 else 1e-5
    for metric in METRICS:
        torch.testing.assert_close(
            torch.tensor(found[metric].values),
            torch.tensor(whole[metric].values),
            rtol=close,
            atol=close,
        )


def test_what_acts_outside_of_the_span_is_decomposed_whole() -> None:
    """A matrix with 1e-6 of the identity beside a span keeps all of its eigenpairs."""
    rows = torch.randn(3, 9, dtype=torch.float64)
    matrix = rows.T @ rows + 1e-6 * torch.eye(9, dtype=torch.float64)
    with decomposed_once(rows):
        values, vectors = spectrum(matrix, "a damped factor")
        inside, thin = spectrum(rows.T @ rows, "a factor")
    assert vectors.shape == (9, 9)
    torch.testing.assert_close((vectors * values) @ vectors.T, matrix)
    assert thin.shape == (9, 3)
    torch.testing.assert_close((thin * inside) @ thin.T, rows.T @ rows)


def test_nothing_is_kept_after_the_block_of_code() -> None:
    """Outside, every call decomposes the whole matrix anew."""
    rows = torch.randn(2, 8, dtype=torch.float64)
    with decomposed_once(rows):
        first = spectrum(rows.T @ rows, "a factor")
        assert spectrum(rows.T @ rows, "a factor")[1] is first[1]
    assert spectrum(rows.T @ rows, "a factor")[1].shape == (8, 8)
