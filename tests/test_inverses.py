"""Damped inverses of Kronecker sums, each against the dense matrix it is said to invert."""

import itertools
import subprocess
import sys
from dataclasses import replace

import matplotlib.pyplot as plt
import numpy as np
import pytest
import scipy.linalg
import scipy.sparse.linalg
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

import fisherlab as fl
from fisherlab.numerics.linalg import damped_inverse, damped_triangle
from fisherlab.operators import (
    Dense,
    Factored,
    IterativeInverse,
    KroneckerCongruence,
    KroneckerSum,
    Stopping,
    Tikhonov,
    base,
)

F64 = torch.float64


def moment(size, seed, rank=None):
    rows = normal((rank or size + 2, size), seed)
    return rows.T @ rows / len(rows)


def normal(shape, seed):
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=F64)


def symmetric(size, seed, scale=1.0):
    return scale * (normal((size, size), seed) + normal((size, size), seed).T) / 2


def skew(size, seed, scale=1.0):
    return scale * (normal((size, size), seed) - normal((size, size), seed).T) / 2


def one_term(o=3, i=4, seed=0):
    return KroneckerSum(((moment(o, seed), moment(i, seed + 1)),), (o, i))


def two_terms(o=3, i=4, seed=0, scale=0.2):
    second = symmetric(o, seed + 2, scale), symmetric(i, seed + 3, scale)
    first = moment(o, seed), moment(i, seed + 1)
    return KroneckerSum((first, second), (o, i))


def skew_terms(o=3, i=4, seed=0, scale=0.3):
    first = moment(o, seed), moment(i, seed + 1)
    second = skew(o, seed + 2, scale), skew(i, seed + 3, scale)
    return KroneckerSum((first, second), (o, i))


def three_terms(o=3, i=4, seed=0):
    two = two_terms(o, i, seed)
    third = symmetric(o, seed + 4, 0.1), symmetric(i, seed + 5, 0.1)
    return KroneckerSum((*two.terms, third), (o, i))


def eye(size):
    return torch.eye(size, dtype=F64)


def shifted_leading(op, damping):
    """The damped leading term and the rest, from the definition."""
    (rows, cols), *rest = op.terms
    pi = damping.pi or float((cols.trace() / len(cols)) / (rows.trace() / len(rows))) ** 0.5
    root = damping.value**0.5
    first = rows + root / pi * eye(len(rows)), cols + root * pi * eye(len(cols))
    return first, sum((torch.kron(g, a) for g, a in rest), torch.zeros(op.shape, dtype=F64))


SUMS = {
    "one": one_term,
    "two": two_terms,
    "skew": skew_terms,
    "three": three_terms,
}


@pytest.mark.parametrize("make", SUMS.values(), ids=SUMS)
@pytest.mark.parametrize("damping", [0.3, Tikhonov(0.3)])
def test_tikhonov_inverts_the_sum_plus_lambda(make, damping):
    op, w = make(), normal((2, 3, 4), 9)
    dense = op.to_dense() + 0.3 * torch.eye(12, dtype=F64)
    expected = torch.linalg.solve(dense, w.flatten(1).T).T.view(w.shape)
    torch.testing.assert_close(op.solve(w, damping), expected, rtol=1e-8, atol=1e-9)
    torch.testing.assert_close(op.damped(damping).to_dense(), dense)
    residual = op.damped(damping) @ op.solve(w, damping) - w
    assert float(residual.norm()) < 1e-9 * float(w.norm())


@pytest.mark.parametrize("pi", [None, 1.0, 2.5])
@pytest.mark.parametrize(
    ("make", "mode"),
    [(one_term, "clip"), (two_terms, "raw"), (skew_terms, "raw"), (three_terms, "raw")],
)
def test_raw_factored_damping_shifts_the_leading_factors_alone(make, mode, pi):
    op, w = make(), normal((3, 4), 9)
    damping = Factored(0.04, pi=pi, mode=mode)
    first, rest = shifted_leading(op, damping)
    dense = torch.kron(*first) + rest
    torch.testing.assert_close(op.damped(damping).to_dense(), dense, rtol=1e-9, atol=1e-11)
    expected = torch.linalg.solve(dense, w.flatten()).view(3, 4)
    torch.testing.assert_close(op.solve(w, damping), expected, rtol=1e-8, atol=1e-9)


def congruent(op, damping, treat):
    """The law of clip and abs, by scipy's generalised eigenvalues."""
    (rows, cols), _ = shifted_leading(op, damping)
    second_rows, second_cols = op.terms[1]
    s_rows, k_rows = scipy.linalg.eigh(second_rows, rows)
    s_cols, k_cols = scipy.linalg.eigh(second_cols, cols)
    basis = torch.linalg.inv(torch.kron(*map(torch.as_tensor, (k_rows, k_cols)))).T
    products = torch.outer(torch.as_tensor(s_rows), torch.as_tensor(s_cols)).flatten()
    return (basis * treat(products)) @ basis.T


@pytest.mark.parametrize("seed", range(3))
@pytest.mark.parametrize(
    ("mode", "treat"),
    [
        ("clip", lambda s: (1 + s).clamp_min(0.1)),
        ("abs", lambda s: 1 + s.abs()),
    ],
)
def test_two_terms_are_diagonalised_at_once(mode, treat, seed):
    op = two_terms(seed=10 * seed, scale=1.5)  # strong enough to be clipped
    damping, w = Factored(0.01, mode=mode), normal((2, 3, 4), 5)
    law = op.damped(damping)
    assert isinstance(law, KroneckerCongruence)
    dense = congruent(op, damping, treat)
    torch.testing.assert_close(law.to_dense(), dense, rtol=1e-7, atol=1e-8)
    expected = torch.linalg.solve(dense, w.flatten(1).T).T.view(w.shape)
    torch.testing.assert_close(op.solve(w, damping), expected, rtol=1e-7, atol=1e-8)
    assert float(torch.linalg.eigvalsh(dense)[0]) > 0


def test_clip_equals_raw_where_nothing_is_clipped():
    op = two_terms(scale=0.05)
    clip, raw = Factored(0.1), Factored(0.1, mode="raw")
    torch.testing.assert_close(op.damped(clip).to_dense(), op.damped(raw).to_dense())


def test_abs_is_the_published_inverse_when_lambda_is_squared():
    op, lam = two_terms(scale=1.0), 0.05
    rows, cols = (m + lam * torch.eye(len(m), dtype=F64) for m in op.terms[0])
    roots = [torch.as_tensor(scipy.linalg.sqrtm(m.numpy())) for m in (rows, cols)]
    inner = [
        torch.linalg.inv(r) @ m @ torch.linalg.inv(r)
        for r, m in zip(roots, op.terms[1], strict=True)
    ]
    values, vectors = zip(*(torch.linalg.eigh(m) for m in inner), strict=True)
    k_rows, k_cols = (torch.linalg.inv(r) @ e for r, e in zip(roots, vectors, strict=True))
    w = normal((3, 4), 1)
    turned = (k_rows.T @ w @ k_cols) / (1 + torch.outer(*values).abs())
    damping = Factored(lam**2, pi=1, mode="abs")
    torch.testing.assert_close(op.solve(w, damping), k_rows @ turned @ k_cols.T)


@pytest.mark.parametrize("make", [two_terms, skew_terms])
def test_a_congruence_answers_like_its_dense_block(make):
    law = make().damped(Factored(0.04))
    dense = Dense(law.to_dense(), (3, 4))
    w = normal((2, 3, 4), 3)
    torch.testing.assert_close(law @ w, dense @ w)
    torch.testing.assert_close(law.diagonal(), dense.diagonal())
    torch.testing.assert_close(law.eigenvalues(), dense.eigenvalues())
    assert law.trace() == pytest.approx(dense.trace())
    assert law.frobenius_norm() == pytest.approx(dense.frobenius_norm())
    assert law.logdet() == pytest.approx(dense.logdet())
    assert law.logdet(0.5) == pytest.approx(dense.logdet(0.5))
    for other in (make(seed=4), three_terms(seed=5), dense):
        assert law.inner(other) == pytest.approx(
            dense.inner(Dense(other.to_dense(), (3, 4)))
        )
    torch.testing.assert_close(law.inverse(0.2) @ w, dense.inverse(0.2) @ w)
    single = law.to(torch.float32)
    torch.testing.assert_close(
        single.to_dense(), dense.matrix.float(), rtol=1e-4, atol=1e-5
    )


def test_the_zero_sum_is_damped_to_a_multiple_of_the_identity():
    zero = KroneckerSum((), (2, 3), precision=F64)
    for damping in (0.25, Factored(0.25)):
        torch.testing.assert_close(zero.damped(damping).to_dense(), 0.25 * eye(6))
        torch.testing.assert_close(zero.solve(eye(3)[:2], damping), 4 * eye(3)[:2])


def test_pi_is_one_where_a_trace_vanishes():
    assert Factored(0.1).ratio(torch.zeros(2, 2), torch.eye(3)) == 1.0
    assert Factored(0.1, pi=3.0).ratio(torch.zeros(2, 2), torch.eye(3)) == 3.0


@settings(max_examples=20, deadline=None)
@given(o=st.integers(1, 4), i=st.integers(1, 4), seed=st.integers(0, 10**6))
def test_pi_minimises_the_trace_norm_of_the_error_it_makes(o, i, seed):
    rows, cols = moment(o, seed), moment(i, seed + 1)
    pi = Factored(0.1).ratio(rows, cols)

    def cross(p):
        return p * i * float(rows.trace()) + o * float(cols.trace()) / p

    assert cross(pi) <= min(cross(0.9 * pi), cross(1.1 * pi)) + 1e-12


@pytest.mark.parametrize("make", SUMS.values(), ids=SUMS)
def test_roots_square_to_the_damped_sum_and_its_inverse(make):
    op = make()
    dense = op.to_dense() + 0.5 * torch.eye(12, dtype=F64)
    root, inverse_root = op.sqrt(0.5).to_dense(), op.inverse_sqrt(0.5).to_dense()
    torch.testing.assert_close(root @ root, dense)
    torch.testing.assert_close(inverse_root @ dense @ inverse_root, eye(12))


def test_a_singular_semidefinite_product_has_a_root():
    op = KroneckerSum(((moment(3, 0, rank=1), moment(4, 1, rank=2)),), (3, 4))
    root = op.sqrt().to_dense()
    torch.testing.assert_close(root @ root, op.to_dense(), rtol=1e-6, atol=1e-8)


def test_an_indefinite_sum_names_its_smallest_eigenvalue_and_the_remedy():
    op = two_terms(scale=3.0)
    smallest = float(torch.linalg.eigvalsh(op.to_dense())[0])
    with pytest.raises(fl.IndefiniteError) as caught:
        op.solve(eye(4)[:3], 1e-3)
    assert caught.value.smallest == pytest.approx(smallest)
    enough = caught.value.sufficient * 1.01
    assert torch.isfinite(op.solve(eye(4)[:3], enough)).all()
    with pytest.raises(fl.IndefiniteError):
        op.sqrt()
    with pytest.raises(fl.NumericalError, match="mode='clip'"):
        op.solve(eye(4)[:3], Factored(1e-6, mode="raw"))
    assert torch.isfinite(op.solve(eye(4)[:3], Factored(1e-6))).all()


@pytest.mark.parametrize(
    ("kind", "share", "dtype"),
    [
        ("symmetric", 1e-1, torch.float64),
        ("symmetric", 1e-3, torch.float32),
        ("skew", 1e-1, torch.float32),
        ("leading last", 1e-1, torch.float64),
    ],
)
def test_a_large_sum_is_refused_below_its_smallest_eigenvalue_alone(
    kind, share, dtype, monkeypatch
):
    monkeypatch.setattr("fisherlab.operators.kronecker.DENSE_ROWS", 0)
    monkeypatch.setattr("fisherlab.operators.kronecker.FORMED_ROWS", 0)
    first = moment(12, 0, rank=5), moment(14, 1, rank=5)
    other = skew if kind == "skew" else symmetric
    second = other(12, 2, share), other(14, 4)
    terms = (second, first) if kind == "leading last" else (first, second)
    op = KroneckerSum(terms, (12, 14))
    values = torch.linalg.eigvalsh(op.to_dense())
    lower, upper = op._bounds
    assert lower <= values[0] < 0 < values[-1] <= upper
    smallest, op = float(values[0]), op.to(dtype)
    near = 1e-6 if dtype == torch.float64 else 1e-3
    assert op.smallest_eigenvalue == pytest.approx(smallest, rel=near)
    for times in (1.01, 3.0, 1e3):
        op.require_positive(-times * smallest)
    for times in (0.99, 0.3, 1e-2, 1e-4):
        with pytest.raises(fl.IndefiniteError) as caught:
            op.require_positive(-times * smallest)
        assert caught.value.smallest == pytest.approx(smallest, rel=near)


def sum_of(kind, seed):
    """Return a sum whose first term is of random low rank, and others beside it."""
    shape = torch.randint(5, 26, (2,), generator=torch.Generator().manual_seed(seed))
    o, i = (int(n) for n in shape)
    size = 10.0 ** (seed % 7 - 4)
    first = moment(o, seed, rank=1 + seed % o), moment(i, seed + 1, rank=1 + seed % i)
    other = symmetric(o, seed + 2, size), symmetric(i, seed + 3)
    terms = {
        "symmetric": (first, other),
        "leading last": (other, first),
        "taken off": (first, (-size * moment(o, seed + 4, 3), moment(i, seed + 5, 2))),
        "three": (first, other, (symmetric(o, seed + 6, size / 2), symmetric(i, seed + 7))),
        "shifted": (first, (-size * eye(o), eye(i))),
        "skew": (first, (skew(o, seed + 8, size), skew(i, seed + 9))),
    }
    return KroneckerSum(terms[kind], (o, i))


@pytest.mark.parametrize(
    "kind", ["symmetric", "leading last", "taken off", "three", "shifted", "skew"]
)
@pytest.mark.parametrize("seed", range(7))
def test_products_find_the_smallest_eigenvalue_of_every_kind_of_sum(
    kind, seed, monkeypatch
):
    monkeypatch.setattr("fisherlab.operators.kronecker.DENSE_ROWS", 0)
    monkeypatch.setattr("fisherlab.operators.kronecker.FORMED_ROWS", 0)
    monkeypatch.setattr("fisherlab.operators.kronecker.FEW", 1 + 14 * (seed % 2))
    op = sum_of(kind, seed)
    values = torch.linalg.eigvalsh(op.to_dense())
    smallest = float(values[0])
    assert smallest < -1e-8 * float(values[-1])
    assert op.smallest_eigenvalue == pytest.approx(smallest, rel=1e-5)
    replace(op).require_positive(-1.001 * smallest)  # decided anew
    with pytest.raises(fl.IndefiniteError):
        replace(op).require_positive(-0.999 * smallest)


def test_a_direction_that_is_none_of_negative_curvature_misleads_nobody():
    """As rounding of float32 may show one."""
    op = KroneckerSum(((moment(6, 0), moment(7, 1)), (moment(6, 2), moment(7, 3))), (6, 7))
    smallest = float(torch.linalg.eigvalsh(op.to_dense())[0])
    assert smallest > 0
    assert op._lowest(np.eye(42)[0]) == pytest.approx(smallest, rel=1e-5)


def test_the_smallest_eigenvalue_is_found_far_from_the_first_direction():
    x = normal((4, 256, 96), 0) * torch.arange(1, 97).rsqrt()
    model = nn.Linear(96, 96, bias=False).double()
    stats = fl.collect(model, (x, None), fl.Gaussian(), fl.MonteCarlo(1, seed=0))
    op = fl.KPSVD(2)(stats["weight"])
    (value,) = scipy.sparse.linalg.eigsh(
        op.to_scipy(), 1, which="SA", ncv=60, v0=np.ones(96**2), return_eigenvectors=False
    )
    assert op.smallest_eigenvalue == pytest.approx(float(value), rel=1e-6)


@pytest.mark.parametrize("damping", [1e-6])
def test_lanczos_decides_in_single_precision_as_near_as_that_goes(damping):
    model = nn.Sequential(nn.Linear(100, 80), nn.ReLU(), nn.Linear(80, 10))
    data = normal((64, 100), 0).float(), None
    samples = fl.collect(model, data, fl.Categorical(), fl.MonteCarlo(1, seed=0))["0"]
    with pytest.raises(fl.IndefiniteError, match=r"A damping above 0\.\d+ is needed"):
        fl.KPSVD(2, fl.Lanczos(2, reorthogonalise=False))(samples).inverse(damping)


def test_what_cannot_be_factored_says_so():
    with pytest.raises(ValueError, match="mode='raw'"):
        three_terms().inverse(Factored(0.1))
    with pytest.raises(ValueError, match="Kronecker terms"):
        one_term().inverse(0.1).inverse(Factored(0.1))
    mixed = KroneckerSum((one_term().terms[0], (normal((3, 3), 1), eye(4))), (3, 4))
    with pytest.raises(fl.NumericalError, match="neither symmetric"):
        mixed.inverse(Factored(0.1))


@pytest.mark.parametrize("wrong", [-1.0, float("nan"), float("inf")])
def test_dampings_are_checked(wrong):
    for kind in (Tikhonov, Factored):
        with pytest.raises(ValueError, match=r"at least 0|a number is expected"):
            kind(wrong)
    with pytest.raises(ValueError, match="positive"):
        Factored(0.1, pi=0.0)


def test_conjugate_gradients_start_where_they_are_told():
    inverse, w = two_terms().inverse(0.3), normal((1, 3, 4), 2)
    assert isinstance(inverse, IterativeInverse)
    first = inverse.solution(w)
    again = inverse.solution(w, start=first.value)
    assert first.converged
    assert first.iterations > 2
    assert again.iterations == 0


def test_a_cap_is_an_error_unless_the_iteration_is_meant_to_be_cut():
    op, w = Dense(moment(12, 0), (3, 4)), normal((3, 4), 2)
    with pytest.raises(fl.NumericalError, match="2 iterations"):
        IterativeInverse(op, 1e-6, stopping=Stopping(max_iterations=2)) @ w
    cut = IterativeInverse(op, 1e-6, stopping=Stopping(max_iterations=2, truncated=True))
    before, after = w.norm(), (op @ (cut @ w) - w).norm()
    assert float(after) < float(before)


def test_negative_curvature_is_reported():
    op = Dense(-eye(6), (2, 3))
    with pytest.raises(fl.NumericalError, match="negative curvature"):
        IterativeInverse(op, 0.1) @ eye(3)[:2]


@pytest.mark.parametrize("pixels", [1, 7, 12, 60])
def test_pixels_hold_the_largest_entries_of_inverses_that_are_not_formed(
    monkeypatch, pixels
):
    model, data = nn.Linear(9, 6).double(), (torch.randn(11, 9).double(), None)
    stats = fl.collect(model, data, fl.Categorical(), fl.MonteCarlo())
    whole = fl.inverse_blocks(stats, ["kfac", "diagonal"], 0.1)["weight"]["inverse"]
    monkeypatch.setattr(base, "PANEL_BYTES", 8 * 60 * 7)  # seven rows a panel
    found = fl.inverse_blocks(stats, ["kfac", "diagonal"], 0.1, pixels=pixels)
    found = found["weight"]["inverse"]
    starts = [*found["row"].values, 60]
    assert len(starts) - 1 <= pixels
    assert found.attrs["entries"] == whole.attrs["entries"] == 60
    for one, full in zip(found.values, np.abs(whole.values), strict=True):
        for r, c in itertools.product(range(len(one)), repeat=2):
            part = full[starts[r] : starts[r + 1], starts[c] : starts[c + 1]]
            np.testing.assert_allclose(abs(one[r, c]), part.max(), 1e-12, 1e-15)


def test_a_picture_of_pixels_has_the_axes_of_the_matrix():
    stats = fl.collect(nn.Linear(9, 6), (torch.randn(11, 9), None), fl.Categorical())
    tree = fl.inverse_blocks(stats, ["kfac"], 0.1, pixels=12)
    figure = fl.plots.inverse_heatmap(tree)
    assert figure.axes[0].images[0].get_extent() == [0, 60, 60, 0]
    plt.close(figure)
    with pytest.raises(ValueError, match="pixels=0"):
        fl.inverse_blocks(stats, ["kfac"], 0.1, pixels=0)


LARGE = """
import resource, torch, fisherlab as fl
model = torch.nn.Linear(239, 100).double()
data = torch.randn(30, 239, dtype=torch.float64), None
stats = fl.collect(model, data, fl.Categorical(), fl.MonteCarlo())
fl.inverse_blocks(stats, ["kfac"], 0.1, pixels=20, layers=[])
peak = lambda: resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
before = peak()
tree = fl.inverse_blocks(stats, ["kfac"], 0.1, pixels=2000, budget="1 GiB")
fl.plots.inverse_heatmap(tree)
print(tree["weight"]["inverse"].shape, (peak() - before) * 1024)
"""


@pytest.mark.slow
def test_the_inverse_of_24000_rows_is_drawn_within_a_gibibyte():
    done = subprocess.run([sys.executable, "-c", LARGE], capture_output=True, check=True)
    shape, grown = done.stdout.decode().rsplit(" ", 1)
    assert shape == "(2, 2000, 2000)"
    assert int(grown) < 2**30


N = 40
FORMS = {
    "sum": lambda v: fl.operators.KroneckerSum([(v.diag(), torch.eye(N))], (N, N)),
    "two terms": lambda v: fl.operators.KroneckerSum(
        [(v.diag() / 2, torch.eye(N))] * 2, (N, N)
    ),
    "basis": lambda v: fl.operators.KroneckerEigen(
        torch.eye(N), torch.eye(N), v[:, None].expand(N, N)
    ),
    "rows": lambda v: fl.operators.RowwiseEigen(torch.eye(N), v[:, None].expand(N, N)),
    "diagonal": lambda v: fl.operators.Diagonal(v[:, None].expand(N, N)),
    "dense": lambda v: fl.operators.Dense(v.repeat_interleave(N).diag(), (N, N)),
}  # fmt: skip


@pytest.mark.parametrize("smallest", [0.0, 1e-9, 5e-5, 1e-2])
@pytest.mark.parametrize("form", FORMS)
def test_every_question_draws_the_line_of_rounding_alike(form, smallest):
    """In float32: what the inverse accepts without damping, `logdet` and `solve` do."""
    values = torch.ones(N)
    values[0] = smallest
    op, answers = FORMS[form](values), []
    for ask in (
        lambda: op.inverse(0.0).trace(),
        lambda: op.logdet(0.0),
        lambda: op.solve(torch.ones(N, N), 0.0),
    ):
        try:
            ask()
            answers.append("given")
        except fl.NumericalError:
            answers.append("refused")
    assert len(set(answers)) == 1, answers
    assert answers[0] == "refused" or smallest
    assert answers[0] == "given" or smallest < 1e-2


def by_triangle(factor, damping):
    return torch.cholesky_inverse(damped_triangle(factor, damping).double())


INVERTED = pytest.mark.parametrize("inverted", [damped_inverse, by_triangle])


@INVERTED
@pytest.mark.parametrize("condition", [2, 50, 2e3, 4e3, 1e5, 1e6])
@pytest.mark.parametrize("size", [1, 9, 120])
def test_single_precision_inverts_as_well_as_its_numbers_allow(size, condition, inverted):
    """Where κ is small the factor's own precision serves, else float64 is needed."""
    rows = normal((2 * size, size), 5) * torch.logspace(0, -4, size, dtype=F64)
    factor = (rows.T @ rows).float()
    damping = float(factor.trace()) / condition
    shifted = factor.double() + damping * torch.eye(size, dtype=F64)
    exact = torch.linalg.inv(shifted)
    error = float((inverted(factor, damping).double() - exact).norm() / exact.norm())
    eps = torch.finfo(torch.float32).eps
    single = condition < eps**-0.5
    assert error <= (2 * eps * condition if single else eps)
    assert damped_inverse(factor.bfloat16(), damping).dtype == torch.bfloat16


@INVERTED
@pytest.mark.parametrize("gap", [1e-2, 1e-4, 1e-6])
def test_a_factor_that_is_hardly_positive_is_inverted_in_double_precision(gap, inverted):
    """A negative eigenvalue near -λ is one over little, whatever the trace says."""
    basis = torch.linalg.qr(normal((6, 6), 3))[0]
    values = torch.tensor([-1 + gap, 0.0, 1.0, 2.0, 3.0, 4.0], dtype=F64)
    factor = ((basis * values) @ basis.T).float()
    exact = torch.linalg.inv(factor.double() + torch.eye(6, dtype=F64))
    error = float((inverted(factor, 1.0).double() - exact).norm() / exact.norm())
    assert error <= 4 * torch.finfo(torch.float32).eps
