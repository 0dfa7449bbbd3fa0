"""Laws of sums of Kronecker products: truncated decompositions of the rearrangement."""

from dataclasses import replace

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

import fisherlab as fl
from fisherlab.approximators.kpsvd import _weights
from fisherlab.approximators.kpsvd_choice import choose
from fisherlab.approximators.rearranged import Rearranged
from tests import cases, oracles
from tests.cases import METHODS
from tests.oracles import assert_close

LAYERS = pytest.mark.parametrize("layer", cases.SHARED)
FISHERS = pytest.mark.parametrize("fisher", cases.FISHERS)
SOLVERS = {
    "auto": "auto",
    "dense": fl.DenseSVD(),
    "power": fl.Power(),
    "subspace": fl.Subspace(),
    "lanczos": fl.Lanczos(),
    "sample gram": fl.SampleGram(),
}
SYNTHETIC = {
    "outer": cases.outer(2, 6, 3, 4),
    "outer few": cases.outer(3, 2, 3, 3),
    "shared": cases.shared(2, 3, 2, 3, 4),
    "shared skew": cases.shared(1, 2, 4, 3, 3),
}


def synthetic(name):
    return cases.layer_statistics(SYNTHETIC[name])


def exact(stats):
    return oracles.second_moment_block(stats.example_gradients(), stats.count)


def doubled(stats):
    return replace(
        stats,
        count=2 * stats.count,
        positions=2 * stats.positions,
        inputs=torch.cat([stats.inputs, stats.inputs]),
        gradients=torch.cat([stats.gradients, stats.gradients], 1),
    )


@pytest.mark.parametrize("solver", SOLVERS)
@pytest.mark.parametrize("name", SYNTHETIC)
def test_kpsvd_is_the_truncated_svd_of_the_rearrangement(solver, name):
    stats = synthetic(name)
    if solver == "sample gram" and name.startswith("shared"):
        pytest.skip("for one position only")
    block, shape = exact(stats), stats.weight_shape
    values = np.linalg.svd(oracles.rearranged(block, shape), compute_uv=False)
    full = int((values > 1e-7 * values[0]).sum())
    for rank in {1, 2, full, full + 1} if solver not in ("power", "subspace") else {1, 2}:
        found = fl.KPSVD(rank, SOLVERS[solver])(stats)
        kept = min(rank, full)
        assert len(found.terms) == kept, (rank, found.singular_values)
        assert_close(found.singular_values, values[:kept], 1e-7)
        assert_close(found.to_dense(), oracles.best_sum(block, shape, rank), 2e-6)
        left = float((block - found.to_dense()).norm() ** 2)
        tail = float((values[rank:] ** 2).sum())
        assert_close(left, tail, 0, 1e-7 * float(values[0] ** 2))
        assert found.converged
        assert found.residual <= 1e-10


@LAYERS
@FISHERS
def test_kpsvd_of_real_layers(layer, fisher):
    stats = cases.statistics(layer, "categorical", fisher)
    block = exact(stats)
    for rank in (1, 2):
        found = fl.KPSVD(rank)(stats)
        expected = oracles.best_sum(block, stats.weight_shape, rank)
        assert_close(found.to_dense(), expected, 1e-7)


@pytest.mark.parametrize("solver", SOLVERS)
def test_tied_singular_values_are_all_found(solver):
    eye = torch.eye(3, dtype=torch.float64)
    samples = fl.samples.OuterSamples(eye, eye[None])
    stats = cases.layer_statistics(samples)
    for rank in (1, 2, 3, 4):
        found = fl.KPSVD(rank, SOLVERS[solver])(stats)
        assert_close(found.singular_values, [1 / 3] * min(rank, 3), 1e-9)
        left = (exact(stats) - found.to_dense()).square().sum()
        assert_close(left, max(3 - rank, 0) / 9, 0, 1e-9)


@pytest.mark.parametrize("solver", SOLVERS)
@given(
    seed=st.integers(0, 999),
    v=st.integers(1, 3),
    n=st.integers(1, 5),
    o=st.integers(1, 3),
    i=st.integers(1, 3),
)
def test_the_leading_pair_is_positive(solver, seed, v, n, o, i):
    stats = cases.layer_statistics(cases.outer(v, n, o, i, seed))
    ((rows, cols),) = fl.KPSVD(1, SOLVERS[solver])(stats).terms
    for factor in (rows, cols):
        values = torch.linalg.eigvalsh(factor)
        assert float(values[0]) >= -1e-12 * float(values[-1])
        assert_close(factor, factor.T, 0, 1e-14 * float(factor.norm()))


@pytest.mark.parametrize("solver", ["auto", "power", "lanczos", "dense"])
def test_the_leading_pair_is_positive_under_weight_sharing(solver):
    for seed in range(3):
        stats = cases.layer_statistics(cases.shared(1, 2, 4, 3, 3, seed))
        rows, cols = fl.KPSVD(2, SOLVERS[solver])(stats).terms[0]
        for factor in (rows, cols):
            assert float(torch.linalg.eigvalsh(factor)[0]) >= -1e-12 * float(factor.norm())
            assert float(factor.trace()) > 0


@pytest.mark.parametrize("name", SYNTHETIC)
@pytest.mark.parametrize("solver", ["auto", "lanczos", "dense"])
def test_deflation_and_kpsvd_agree(name, solver):
    stats = synthetic(name)
    for rank in (1, 2, 3):
        found = fl.Deflation(rank, SOLVERS[solver])(stats)
        assert_close(
            found.to_dense(), fl.KPSVD(rank, fl.DenseSVD())(stats).to_dense(), 1e-6
        )


@pytest.mark.parametrize("name", SYNTHETIC)
@pytest.mark.parametrize("rank", [1, 2])
def test_the_correction_is_the_best_of_what_kfac_leaves(name, rank):
    stats = synthetic(name)
    kfac = fl.KFAC()(stats).to_dense()
    best = oracles.best_sum(exact(stats) - kfac, stats.weight_shape, rank)
    found = fl.KFACCorrected(rank)(stats)
    assert_close(found.to_dense(), kfac + best, 1e-7)
    assert len(found.terms) == 1 + (1 if name == "outer few" else rank)


@pytest.mark.parametrize(
    "name", ["kpsvd-2", "kpsvd-4", "deflation", "lanczos-paper", "lanczos-2"]
)
def test_a_rank_above_the_numerical_rank_stops_at_it(name):
    stats = cases.layer_statistics(cases.outer(1, 1, 3, 4))
    for repeated in (stats, doubled(doubled(stats))):
        found = METHODS[name](repeated)
        assert len(found.terms) == 1
        assert_close(found.to_dense(), exact(stats), 1e-12)
    corrected = fl.KFACCorrected(3)(stats)
    assert len(corrected.terms) == 1  # KFAC is exact: nothing is left


def test_the_published_lanczos_says_that_it_did_not_converge():
    found = METHODS["lanczos-paper"](synthetic("outer"))
    assert not found.converged
    assert found.residual > 1e-3
    assert METHODS["lanczos-2"](synthetic("outer")).converged


@pytest.mark.parametrize("name", ["kpsvd-2", "lanczos-2", "deflation"])
def test_kpsvd_of_formed_matrices_is_the_truncated_svd(name):
    stats = cases.statistics("norm")
    expected = oracles.best_sum(exact(stats), stats.weight_shape, 2)
    assert_close(METHODS[name](stats).to_dense(), expected, 1e-8)


@pytest.mark.parametrize("name", ["outer", "outer many", "outer columns"])
@pytest.mark.parametrize("method", [fl.Deflation, fl.KFACCorrected])
def test_remainders_through_gram_tables_are_those_of_the_dense_block(name, method):
    samples = {
        "outer": cases.outer(1, 9, 4, 5),
        "outer many": cases.outer(1, 60, 3, 4),
        "outer columns": cases.outer(3, 9, 4, 3),
    }[name]
    stats = cases.layer_statistics(samples)
    by_tables = method(2, fl.SampleGram())(stats)
    by_svd = method(2, fl.DenseSVD())(stats)
    assert by_tables.converged
    assert_close(by_tables.to_dense(), by_svd.to_dense(), 1e-8)


def test_remainders_of_a_layer_go_through_gram_tables():
    stats = cases.layer_statistics(cases.outer(1, 300, 40, 60))
    whole = Rearranged(stats.samples, stats.count)
    kfac = fl.KFAC()(stats).terms
    assert isinstance(choose(whole.less(kfac, _weights(stats)), 1), fl.SampleGram)
    assert not isinstance(choose(whole.less(kfac), 1), fl.SampleGram)


@pytest.mark.parametrize("size", [1e-2, 1e-3, 1e-4])
@pytest.mark.parametrize("method", [fl.KPSVD(2), fl.Deflation(), fl.KFACCorrected()])
def test_float32_does_not_lose_a_small_second_pair(method, size):
    """Two kinds of examples: F = G ⊗ A + size · P ⊗ Q, above the rounding of float32."""
    torch.manual_seed(0)
    inputs = torch.cat([torch.randn(150, 1), size**0.5 * torch.randn(150, 1)])
    inputs = inputs * torch.cat([torch.ones(150, 40), torch.randn(1, 40).expand(150, -1)])
    gradients = torch.cat([torch.ones(150, 30), torch.randn(1, 30).expand(150, -1)])
    made = cases.layer_statistics(
        cases.OuterSamples(inputs.double(), gradients.double()[None])
    )
    expected = method(made)
    found = method(made.to(torch.float32))
    assert len(found.terms) == len(expected.terms)
    assert_close(found.to_dense().double(), expected.to_dense(), 1e-5)


def test_the_sample_gram_solver_refuses_what_it_cannot_solve():
    with pytest.raises(ValueError, match="Lanczos"):
        fl.KPSVD(1, fl.SampleGram())(synthetic("shared"))
    stats = synthetic("outer")
    unknown = Rearranged(stats.samples, stats.count).less(tuple(fl.KFAC()(stats).terms))
    with pytest.raises(ValueError, match="Lanczos"):
        fl.SampleGram()(unknown, 1)


def test_small_numbers_in_float32_have_their_leading_product():
    samples = cases.outer(1, 40, 6, 8)
    tiny = cases.OuterSamples(samples.inputs * 1e-7, samples.gradients * 1e-7)
    expected = fl.KPSVD()(cases.layer_statistics(tiny))
    found = fl.KPSVD(1, fl.SampleGram())(cases.layer_statistics(tiny.to(torch.float32)))
    (rows, cols), (exact_rows, exact_cols) = found.terms[0], expected.terms[0]
    assert_close((rows / rows.norm()).double(), exact_rows / exact_rows.norm(), 1e-4)
    assert_close((cols / cols.norm()).double(), exact_cols / exact_cols.norm(), 1e-4)


def test_a_small_correction_above_rounding_is_kept():
    """Inputs and gradients of nearly one datum: KFAC is right to 1e-6 of its norm."""
    inputs = 1 + 1e-3 * cases.normal(6, 4, seed=1)
    gradients = 1 + 1e-3 * cases.normal(1, 6, 3, seed=2)
    stats = cases.layer_statistics(cases.OuterSamples(inputs, gradients))
    exact = fl.ExactBlock()(stats)
    kfac, corrected = fl.KFAC()(stats), fl.KFACCorrected()(stats)
    assert len(corrected.terms) == 2
    dense = exact.to_dense()
    before, after = (float((op.to_dense() - dense).norm()) for op in (kfac, corrected))
    assert 1e-9 * kfac.frobenius_norm() < before < 1e-4 * kfac.frobenius_norm()
    assert after < before / 2
