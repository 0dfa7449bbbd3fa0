"""Laws of singular triplets found through two tables of inner products."""

from dataclasses import replace

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from fisherlab.approximators.kpsvd_solvers import SampleGram
from fisherlab.approximators.rearranged import Rearranged
from fisherlab.numerics.gram_krylov import GramMap, gram_krylov, gram_power
from fisherlab.numerics.packed import HalfTable
from tests.cases import normal, outer
from tests.oracles import assert_close


def dense(left, right, count):
    """Return Σ vec(G_n) vec(A_n)ᵀ / N of vectors given as rows."""
    return left.T @ right / count


def tables(left, right, count):
    return GramMap(right @ right.T, left @ left.T, count)


def check(found, left, right, count, rank, tolerance):
    """Triplets are those of the dense map, their residual is the one reported."""
    matrix = dense(left, right, count)
    values = torch.linalg.svdvals(matrix)
    keep = min(rank, int((values > 1e-6 * values[0]).sum()))
    assert_close(found.values, values[:keep], 1e-9)
    u, v = left.T @ found.left, right.T @ found.right
    assert_close(u.T @ u, torch.eye(keep, dtype=u.dtype), 1e-6)
    assert_close(v.T @ v, torch.eye(keep, dtype=u.dtype), 1e-6)
    assert_close(matrix @ v, u * found.values, 1e-6)
    rest = (matrix.T @ u - v * found.values).norm(dim=0).max() / values[0]
    assert float(rest) <= tolerance + 1e-7
    assert found.converged


@given(
    st.integers(1, 12),
    st.integers(1, 6),
    st.integers(1, 6),
    st.integers(1, 4),
    st.integers(0, 99),
)
def test_block_krylov_finds_the_leading_triplets(n, o, i, rank, seed):
    left, right = normal(n, o, seed=seed), normal(n, i, seed=seed + 1)
    start = normal(n, min(n, rank + 2), seed=seed + 2)
    found = gram_krylov(
        tables(left, right, 7), rank, start, depth=8, tolerance=1e-8, max_products=500
    )
    check(found, left, right, 7, rank, 1e-8)


@pytest.mark.parametrize(("n", "o", "i"), [(5, 9, 8), (40, 3, 4), (1, 3, 2)])
def test_power_keeps_nonnegative_weights_and_finds_the_leading_triplet(n, o, i):
    left, right = normal(n, o).abs(), normal(n, i, seed=1).abs()
    maps = tables(left, right, n)
    found = gram_power(maps, torch.ones(n, dtype=torch.float64), 1e-10, 1000)
    check(found, left, right, n, 1, 1e-10)
    assert bool((found.left >= 0).all())
    assert bool((found.right >= 0).all())


def test_a_cap_is_visible():
    left, right = normal(30, 20), normal(30, 25, seed=1)
    maps = tables(left, right, 30)
    for found in (
        gram_power(maps, torch.ones(30, dtype=torch.float64), 1e-12, 2),
        gram_krylov(maps, 3, normal(30, 4), depth=5, tolerance=1e-12, max_products=2),
    ):
        assert not found.converged
        assert found.iterations == 2
        assert found.residual > 1e-12


@given(
    st.integers(2, 12),
    st.integers(1, 6),
    st.integers(1, 6),
    st.integers(1, 2),
    st.integers(0, 99),
)
def test_terms_known_by_their_weights_are_taken_off(n, o, i, terms, seed):
    left, right = normal(n, o, seed=seed), normal(n, i, seed=seed + 1)
    weights = normal(n, terms, seed=seed + 2), normal(n, terms, seed=seed + 3)
    maps = replace(tables(left, right, 7), removed=weights)
    rest = dense(left, right, 7) - left.T @ weights[0] @ weights[1].T @ right
    values = torch.linalg.svdvals(rest)
    start = normal(n, min(n, 4), seed=seed + 4)
    found = gram_krylov(maps, 2, start, depth=8, tolerance=1e-8, max_products=500)
    keep = len(found.values)
    assert keep >= min(2, int((values > 1e-5 * values[0]).sum()))
    assert_close(found.values, values[:keep], 1e-7)
    u, v = left.T @ found.left, right.T @ found.right
    assert_close(rest @ v, u * found.values, 1e-5)
    assert_close(rest.T @ u, v * found.values, 1e-5)


def test_power_takes_terms_off_as_well():
    left, right = normal(30, 4), normal(30, 5, seed=1)
    weights = normal(30, 1, seed=2) / 30, normal(30, 1, seed=3) / 30
    maps = replace(tables(left, right, 30), removed=weights)
    rest = dense(left, right, 30) - left.T @ weights[0] @ weights[1].T @ right
    found = gram_power(maps, normal(30, 1, seed=4)[:, 0], 1e-9, 5000)
    assert_close(found.values, torch.linalg.svdvals(rest)[:1], 1e-8)


def test_zero_tables_have_no_triplets():
    zero = GramMap(torch.zeros(4, 4), torch.zeros(4, 4), 4).double()
    one = torch.ones(4, dtype=torch.float64)
    assert len(gram_power(zero, one, 1e-8, 10).values) == 0
    found = gram_krylov(zero, 2, normal(4, 3), depth=3, tolerance=1e-8, max_products=9)
    assert len(found.values) == 0


def test_tied_values_are_found_once_each():
    left = torch.eye(4, dtype=torch.float64)
    maps = tables(left, left, 1)
    found = gram_krylov(maps, 3, normal(4, 4), depth=3, tolerance=1e-10, max_products=50)
    assert_close(found.values, torch.ones(3, dtype=torch.float64), 1e-12)


def test_tables_of_single_precision_do_not_invent_values():
    left, right = normal(50, 2), normal(50, 3, seed=1)  # rank 2 of 50 weights
    maps = GramMap((right @ right.T).float(), (left @ left.T).float(), 50).double()
    found = gram_krylov(maps, 4, normal(50, 6), depth=6, tolerance=1e-5, max_products=60)
    values = torch.linalg.svdvals(dense(left, right, 50))
    assert_close(found.values[:2], values[:2], 1e-5)
    assert bool((found.values[2:] < 1e-3 * values[0]).all())


def test_two_products_a_block_are_enough():
    left, right = normal(40, 30), normal(40, 25, seed=1)
    calls = []

    class Counted(torch.utils._python_dispatch.TorchDispatchMode):
        def __torch_dispatch__(self, func, types, args=(), kwargs=None):
            if func._schema.name == "aten::mm" and args[0].shape == (40, 40):
                calls.append(1)
            return func(*args, **(kwargs or {}))

    maps, start = tables(left, right, 40), normal(40, 4)
    with Counted():
        found = gram_krylov(maps, 2, start, depth=50, tolerance=1e-6, max_products=100)
    assert len(calls) <= 2.25 * found.iterations + 3  # some are taken anew


# --- tables held by halves ---


@given(st.integers(1, 9), st.integers(1, 4), st.integers(1, 3), st.integers(0, 99))
def test_a_half_table_multiplies_as_the_whole(n, rows, columns, seed):
    whole = normal(n, n, seed=seed)
    whole = whole + whole.T
    half = HalfTable(tuple(whole[at : at + rows, at:] for at in range(0, n, rows)))
    x = normal(n, columns, seed=seed + 1)
    assert_close(half @ x, whole @ x, 1e-12)
    assert_close(half @ x[:, 0], whole @ x[:, 0], 1e-12)
    assert_close(half.diagonal(), whole.diagonal(), 0)
    assert (HalfTable((whole.float(),)).double().dtype, half.dtype) == (torch.float64,) * 2


@pytest.mark.parametrize("columns", [1, 3])
@pytest.mark.parametrize("examples", [1, 4, 7])
def test_half_tables_are_those_that_are_kept_whole(columns, examples, monkeypatch):
    monkeypatch.setattr("fisherlab.samples.outer.GRAM_ROWS", 3)
    samples = outer(columns, examples, 2, 3)
    for half, whole in zip(samples.half_grams(), samples.kept_grams, strict=True):
        assert_close(half @ torch.eye(examples).double(), whole, 1e-12)


@pytest.mark.parametrize("rank", [1, 2])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_pairs_from_half_tables_are_those_from_whole_ones(rank, dtype, monkeypatch):
    block = Rearranged(outer(2, 30, 4, 5).to(dtype), 30)
    whole = SampleGram()(block, rank)
    monkeypatch.setattr("fisherlab.approximators.kpsvd_solvers.WHOLE_EXAMPLES", 1)
    monkeypatch.setattr("fisherlab.samples.outer.GRAM_ROWS", 8)
    fresh = Rearranged(outer(2, 30, 4, 5).to(dtype), 30)
    half = SampleGram()(fresh, rank)
    assert_close(half.values, whole.values, 1e-5 if dtype == torch.float32 else 1e-9)
    assert (half.converged, half.positive) == (True, whole.positive)
    for one, other in zip(half.pairs, whole.pairs, strict=True):
        assert_close(one[0].double(), other[0].double(), 1e-4)
        assert_close(one[1].double(), other[1].double(), 1e-4)


@pytest.mark.parametrize("rank", [1, 3])
@pytest.mark.parametrize("spread", [0.3, 0.1, 0.01])
def test_values_that_lie_close_together_are_told_apart(rank, spread):
    """Each block adds little to the last: rounding errors grow from one to the next."""
    n = 40
    left, right = (
        torch.linalg.qr(normal(80, n, seed=k)).Q.T + spread * normal(n, 80, seed=k + 2) / 9
        for k in (0, 1)
    )
    found = gram_krylov(
        tables(left, right, 1),
        rank,
        normal(n, rank + 4, seed=5),
        depth=12,
        tolerance=1e-9,
        max_products=300,
    )
    check(found, left, right, 1, rank, 1e-9)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_a_leading_pair_next_to_others_needs_no_whole_matrices(dtype):
    """Few inputs in many dims are nearly orthogonal: power steps would be thousands."""
    samples = outer(1, 12, 30, 300)
    gap = torch.linspace(1, 1.003, 12, dtype=torch.float64)[:, None]
    inputs = gap * torch.linalg.qr(samples.inputs.T).Q.T
    outputs = torch.linalg.qr(normal(30, 12)).Q.T[None]
    fixed = replace(samples, inputs=inputs, gradients=outputs).to(dtype)
    found = SampleGram()(Rearranged(fixed, 12), 1)
    assert found.converged
    assert found.iterations < 300
