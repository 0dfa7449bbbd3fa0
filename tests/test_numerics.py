"""Laws of the numerical kernels, against plain products and decompositions."""

import ast
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch.utils.flop_counter import FlopCounterMode

from fisherlab.errors import BudgetError, IndefiniteError, NumericalError
from fisherlab.numerics import devices, krylov, linalg, packed
from fisherlab.numerics.krylov import LinearMap, block_krylov, conjugate_gradients
from fisherlab.operators.bases import Modes
from fisherlab.operators.eigenform import Eigenform
from tests.cases import normal
from tests.oracles import assert_close

SIZES = st.integers(1, 5)
SEEDS = st.integers(0, 2**20)


def symmetric(size, seed=0, lead=()):
    matrix = normal(*lead, size, size, seed=seed)
    return matrix + matrix.transpose(-1, -2)


@given(SIZES, SEEDS)
def test_packing_is_an_isometry_with_an_inverse(size, seed):
    a, b = symmetric(size, seed, (2,)), symmetric(size, seed + 1, (2,))
    inner = (packed.pack(a) * packed.pack(b)).sum(-1)
    assert_close(inner, (a * b).sum((1, 2)), 1e-13)
    assert_close(packed.unpack(packed.pack(a), size), a, 1e-14)
    assert packed.pack(a).shape[-1] == packed.pair_count(size)


@given(SIZES)
def test_pair_positions_agree(size):
    table = packed.pair_index(size)
    diagonal = [packed.pair_offset(size, row) for row in range(size)]
    assert table.diagonal().tolist() == diagonal
    assert sorted(set(table.flatten().tolist())) == list(range(packed.pair_count(size)))
    assert torch.equal(table, table.T)


@given(st.integers(1, 9), st.integers(1, 60))
def test_triangle_chunks_cover_every_row_once(size, pairs):
    pieces = packed.triangle_chunks(size, pairs)
    rows = [row for start, stop in pieces for row in range(start, stop)]
    assert rows == list(range(size))


@pytest.mark.parametrize("buffers", [None, 3])
@given(v=st.integers(1, 3), n=st.integers(1, 8), o=SIZES, m=SIZES, seed=SEEDS)
def test_kronecker_sums_through_packed_factors(buffers, v, n, o, m, seed):
    g, a = normal(v, n, o, seed=seed), normal(n, m, seed=seed + 1)
    with pytest.MonkeyPatch.context() as patch:
        if buffers:
            for name in ("PAIR_ROWS", "EXAMPLES", "INPUT_ROWS", "SQUARE_ROWS"):
                patch.setattr(packed, name, buffers)
        out = torch.full((o, m, o, m), float("nan"), dtype=torch.float64)
        packed.kronecker_sum_(out, g, a, 0.5)
        whole = packed.rearranged(g, a)
    assert_close(out, 0.5 * torch.einsum("vna,ni,vnb,nj->aibj", g, a, g, a), 1e-12)
    outputs = torch.einsum("vna,vnb->nab", g, g)
    inputs = torch.einsum("ni,nj->nij", a, a)
    assert_close(whole, packed.pack(outputs).T @ packed.pack(inputs), 1e-12)


@pytest.mark.parametrize("size", [1, 5, 127, 128, 129, 500, packed.LEAF + 3])
def test_moments_are_products_and_symmetric_to_the_last_bit(size):
    rows, weights = normal(7, size), normal(7, seed=1)
    moment, weighted = packed.second_moment(rows), packed.weighted_moment(rows, weights)
    assert_close(moment, rows.T @ rows, 1e-13)
    assert_close(weighted, rows.T @ torch.diag(weights) @ rows, 1e-13)
    assert torch.equal(moment, moment.T)
    assert torch.equal(weighted, weighted.T)


def linear_map(matrix):
    return LinearMap(lambda x: matrix @ x, lambda y: matrix.T @ y)


@given(st.integers(2, 7), st.integers(2, 7), st.integers(1, 3), SEEDS, st.booleans())
def test_krylov_triplets_are_the_singular_ones(rows, cols, rank, seed, long):
    matrix = normal(rows, cols, seed=seed)
    start = normal(cols, rank + 1, seed=seed + 1)
    with pytest.MonkeyPatch.context() as patch:
        if long:
            patch.setattr(krylov, "GRAM_ROWS", 2)
        found = block_krylov(linear_map(matrix), rank, start)
    assert found.converged
    assert_close(found.values, torch.linalg.svdvals(matrix)[:rank], 1e-9)
    size = len(found.values)
    assert_close(matrix @ found.right, found.left * found.values, 1e-8)
    assert_close(found.left.T @ found.left, torch.eye(size), 1e-8)
    assert_close(found.right.T @ found.right, torch.eye(size), 1e-8)


def test_a_long_side_in_float32_keeps_its_small_values(monkeypatch):
    monkeypatch.setattr(krylov, "GRAM_ROWS", 50)
    rows, cols = (torch.linalg.qr(normal(n, 3, seed=n)).Q for n in (200, 30))
    values = torch.tensor([1.0, 1e-1, 1e-2]).double()
    matrix = ((rows * values) @ cols.T).float()
    found = block_krylov(linear_map(matrix), 3, normal(30, 4).float(), tolerance=2e-6)
    assert found.converged
    assert_close(found.values, values, 1e-6)
    assert float((found.left.T @ rows.float()).abs().diagonal().min()) > 1 - 1e-5


def test_a_long_side_is_held_once(monkeypatch):
    """The right vectors of a layer with 4,609 inputs were held six times: 12 GB."""
    monkeypatch.setattr(krylov, "GRAM_ROWS", 100)
    extended, lengths = krylov.Space.extended, set()

    def watched(space, basis, image, back):
        lengths.add((len(basis), len(image), len(back)))
        return extended(space, basis, image, back)

    monkeypatch.setattr(krylov.Space, "extended", watched)
    found = block_krylov(linear_map(normal(20, 400)), 2, normal(400, 3))
    assert lengths == {(20, 400, 20)}
    assert (len(found.left), len(found.right)) == (20, 400)


def test_a_block_finds_tied_singular_values_and_stops_at_the_rank():
    u, v = (torch.linalg.qr(normal(6, 6, seed=s))[0] for s in (1, 2))
    values = torch.tensor([3.0, 3.0, 3.0, 1.0, 0.0, 0.0], dtype=torch.float64)
    matrix = (u * values) @ v.T
    found = block_krylov(linear_map(matrix), 6, normal(6, 3))
    assert_close(found.values, values[:4], 1e-9)
    zero = block_krylov(linear_map(0 * matrix), 2, normal(6, 3))
    assert (len(zero.values), zero.converged, zero.residual) == (0, True, 0.0)


@given(st.integers(1, 6), st.integers(1, 3), SEEDS)
def test_conjugate_gradients_solve_each_system(size, systems, seed):
    root = normal(size, size, seed=seed)
    matrix = root @ root.T + torch.eye(size)
    right = normal(systems, size, seed=seed + 1)
    scale = 1 / matrix.diagonal()
    found = conjugate_gradients(
        lambda x: x @ matrix, right, precondition=lambda x: x * scale, tolerance=1e-12
    )
    assert found.converged
    assert_close(found.value @ matrix, right, 1e-10)
    again = conjugate_gradients(lambda x: x @ matrix, right, start=found.value)
    assert again.iterations == 0


def test_conjugate_gradients_notice_negative_curvature():
    signs = torch.tensor([1.0, -1.0], dtype=torch.float64)
    found = conjugate_gradients(lambda x: x * signs, normal(1, 2))
    assert not found.positive
    assert not found.converged


FACTORISATIONS = (
    {"cholesky", "cholesky_ex", "det", "eig", "eigh", "eigvals", "eigvalsh", "inv"}
    | {"inv_ex", "inverse", "lstsq", "lu", "lu_factor", "matrix_rank", "pinv", "qr"}
    | {"slogdet", "solve", "svd", "svdvals", "LinAlgError", "kron"}
)


def test_one_door_leads_to_the_factorisations_of_torch():
    """No raw LinAlgError reaches a user: no other module calls what raises it."""
    package = Path(linalg.__file__).parents[1]
    found = []
    for file in sorted(package.rglob("*.py")):
        for node in ast.walk(ast.parse(file.read_text())):
            taken = isinstance(node, ast.Attribute) and node.attr in FACTORISATIONS
            if taken and ast.unparse(node.value) in ("torch", "torch.linalg"):
                found.append(f"{file.relative_to(package)}: {ast.unparse(node)}")
    elsewhere = [each for each in found if not each.startswith("numerics/linalg.py")]
    assert found
    assert elsewhere == []


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32])
def test_a_factorisation_says_what_failed_and_serves_half_precision(dtype):
    moment = torch.tensor([[2.0, 1.0], [1.0, 2.0]], dtype=dtype)
    values = linalg.factorised("eigvalsh", moment, "a moment")
    assert values.dtype == torch.float32
    assert_close(values, [1.0, 3.0], 1e-5)
    with pytest.raises(NumericalError, match=r"inv of a moment failed .*singular.*damping"):
        linalg.factorised("inv", torch.zeros_like(moment), "a moment")
    moment[1, 0] = float("nan")
    with pytest.raises(NumericalError, match="a moment holds 1 of 4 values"):
        linalg.factorised("svd", moment, "a moment")


def test_factorisations_name_what_failed():
    matrix = torch.diag(torch.tensor([2.0, -1.0], dtype=torch.float64))
    factor = linalg.damped_cholesky(matrix, 1.5, "it")
    assert_close(factor @ factor.T, matrix + 1.5 * torch.eye(2), 1e-15)
    with pytest.raises(IndefiniteError, match=r"it with damping 0.5.*smallest.*-1") as info:
        linalg.damped_cholesky(matrix, 0.5, "it")
    linalg.damped_cholesky(matrix, info.value.sufficient, "the remedy works")
    broken = torch.full((2, 2), float("nan"), dtype=torch.float64)
    for attempt in (linalg.damped_cholesky, lambda m, _, w: linalg.eigh(m, w)):
        with pytest.raises(NumericalError, match=r"it.*4 of 4"):
            attempt(broken, 1.0, "it")


@given(st.integers(0, 30), st.integers(-1, 9))
def test_chunks_cover_a_range_in_order(total, size):
    pieces = list(devices.chunks(total, size))
    assert [i for piece in pieces for i in range(total)[piece]] == list(range(total))
    assert all(p.stop - p.start <= max(size, 1) for p in pieces)


@pytest.mark.parametrize(
    ("text", "count"),
    [("4 GiB", 2**32), ("1.5kB", 1500), ("7", 7), ("2e3 b", 2000), (12.0, 12)],
)
def test_budgets_are_read(text, count):
    assert devices.parse_budget(text) == count


@pytest.mark.parametrize("text", ["lots", "4 GiBs", "-1", 0, -3, "0 B", float("nan")])
def test_budgets_that_mean_nothing_are_refused(text):
    with pytest.raises(ValueError, match="budget"):
        devices.parse_budget(text)


def test_a_request_above_the_budget_names_both():
    devices.require(10, 10, "this", "")
    with pytest.raises(BudgetError, match=r"this needs 2.0 KiB \(2048.*100 B. Do less"):
        devices.require(2048, 100, "this", "Do less.")
    assert devices.parse_budget(None) > np.float64(2**20)


def test_narrowed_bases_are_right_to_a_rounding_error_and_hold_no_negligible_numbers():
    basis = torch.linalg.qr(normal(50, 50))[0]
    basis[:25, 25:] *= 1e-14  # two parts that are separate but for rounding errors
    basis[25:, :25] *= 1e-14
    found = linalg.narrowed(basis, torch.float32)
    assert found.dtype == torch.float32
    assert bool((found[:25, 25:] == 0).all())
    vector = normal(50)
    assert_close(found.double() @ vector, basis @ vector, 1e-6)
    assert linalg.narrowed(basis, torch.float64) is basis


def test_narrowing_goes_row_by_row():
    basis = torch.diag(torch.logspace(0, -20, 5, dtype=torch.float64))
    assert bool((linalg.narrowed(basis, torch.float32).diagonal() > 0).all())


@pytest.mark.parametrize("size", [1, 127, 129, packed.LEAF + 3])
def test_symmetric_products_add_to_what_is_there(size):
    rows = normal(9, size)
    added = packed.symmetric_product_(packed.second_moment(rows), rows, 2.0)
    assert_close(packed.mirror_(added), 3 * rows.T @ rows, 1e-13)


def test_damped_cholesky_leaves_the_matrix_as_it_was():
    matrix = torch.eye(3, dtype=torch.float64)
    factor = linalg.damped_cholesky(matrix, 3.0, "the identity")
    assert_close(factor, 2 * torch.eye(3, dtype=torch.float64), 1e-15)
    assert_close(matrix, torch.eye(3, dtype=torch.float64), 0.0)


def test_factors_laid_out_unlike_have_a_kronecker_product():
    first, second = normal(3, 2), normal(4, 5, seed=1)
    expected = torch.einsum("ab,cd->acbd", first.T, second).reshape(8, 15)
    assert_close(linalg.kron(first.T, second), expected, 1e-14)


@pytest.mark.parametrize("size", [1, 97, packed.LEAF, packed.LEAF + 1, 2 * packed.LEAF + 3])
def test_the_count_of_a_symmetric_product_is_what_it_multiplies(size):
    def multiplied(out, a, b, *, out_shape=None, **kwargs):
        return a[0] * a[1] * b[1]

    products = {torch.ops.aten.addmm_: multiplied}
    with FlopCounterMode(display=False, custom_mapping=products) as counter:
        packed.symmetric_product_(torch.zeros(size, size), torch.zeros(3, size))
    assert counter.get_total_flops() == packed.symmetric_flops(size, 3)


@pytest.mark.parametrize("bad", [torch.nan, torch.inf, -torch.inf])
@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16, torch.complex64])
def test_one_value_that_is_not_finite_is_found_wherever_it_is(bad, dtype):
    """Extremes of the values say as much as a look at each, and count them all."""
    values = torch.linspace(-1, 1, 30, dtype=torch.float64).to(dtype).reshape(5, 6)
    linalg.require_finite(values, "a factor")
    linalg.require_finite(values[:0], "a factor")
    for place in range(0, 30, 7):
        broken = values.clone()
        broken.view(-1)[place] = bad
        with pytest.raises(NumericalError, match="a factor holds 1 of 30 values"):
            linalg.require_finite(broken.T, "a factor")


def test_eigenvalues_of_one_table_are_not_copied_and_stay_as_they_are():
    """A table may be a gigabyte: it is held once, and its inverse is another one."""
    table = torch.arange(1.0, 7.0).double()[None]
    known = table.clone()
    form = Eigenform(Modes((None, torch.eye(3).double()), (2, 3), (2, 3)), (table,), (2, 3))
    assert form.values.data_ptr() == table.data_ptr()
    for exponent in (-1.0, -0.5, 0.5):
        made = form.power(exponent, 0.5).values
        assert torch.allclose(made, (known[0] + 0.5) ** exponent)
    assert torch.equal(table, known)
