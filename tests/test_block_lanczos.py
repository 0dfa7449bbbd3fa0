"""Leading eigenvalues by block Lanczos are those of the dense matrix."""

import pytest
import torch
from scipy.sparse.linalg import aslinearoperator

from fisherlab.errors import NumericalError
from fisherlab.numerics import krylov
from fisherlab.numerics.krylov import leading_sizes
from tests.cases import normal
from tests.oracles import assert_close

TOLERANCE = 1e-9
TURN = 400


def matrix_of(values):
    basis = torch.linalg.qr(normal(len(values), len(values))).Q
    return (basis * values) @ basis.T


SPECTRA = {
    "decays": torch.logspace(0, -8, TURN).double(),
    "both signs": torch.linspace(-1, 1, TURN).double() ** 3,
    "of low rank": torch.cat([torch.ones(3), torch.zeros(TURN - 3)]).double(),
    "tied": torch.cat([torch.full((40,), 2.0), torch.logspace(0, -6, TURN - 40)]).double(),
    "zero": torch.zeros(TURN).double(),
}


@pytest.mark.parametrize("spectrum", SPECTRA)
@pytest.mark.parametrize("k", [1, 30, 40, TURN - 1, TURN])
def test_the_sizes_are_those_of_the_dense_matrix(spectrum, k):
    matrix, known = matrix_of(SPECTRA[spectrum]), SPECTRA[spectrum].abs()
    found = leading_sizes(aslinearoperator(matrix.numpy()), k, "it", TOLERANCE)
    expected = known.sort(descending=True).values[:k]
    scale = float(expected.norm()) + 1e-12
    assert found.shape == (k,)
    assert float((found - expected).norm()) <= 10 * TOLERANCE * scale


def test_a_space_that_may_not_grow_far_enough_is_refused_by_name(monkeypatch):
    monkeypatch.setattr(krylov, "LARGEST", 1)
    monkeypatch.setattr(krylov, "SPARE", 16)
    matrix = matrix_of(torch.linspace(-1, 1, TURN).double())
    with pytest.raises(NumericalError, match=r"20 eigenvalues of this matrix: .*36 dim"):
        leading_sizes(aslinearoperator(matrix.numpy()), 20, "this matrix", 1e-12)


def test_the_bound_on_the_error_is_the_tolerance():
    values = torch.linspace(0, 1, TURN).double() ** 4
    matrix, known = matrix_of(values), values.sort(descending=True).values[:40]
    for tolerance in (1e-1, 1e-2, 1e-3):
        found = leading_sizes(aslinearoperator(matrix.numpy()), 40, "it", tolerance)
        assert_close(found, known, 2 * tolerance)
