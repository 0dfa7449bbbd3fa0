"""Laws of what keeps low-rank averages of KFAC's factors close to the averages."""

import pytest
import torch

import fisherlab as fl
from tests import cases
from tests.cases import normal
from tests.oracles import assert_close

F64 = torch.float64


def spectrum(n=20, decay=0.5, seed=0):
    """Return a matrix whose eigenvalues fall geometrically, and its eigenvectors."""
    basis = torch.linalg.qr(normal(n, n, seed=seed))[0]
    values = decay ** torch.arange(n, dtype=F64)
    return (basis * values) @ basis.T, basis, values


def low_rank(n=20, r=6, seed=1):
    return torch.linalg.qr(normal(n, r, seed=seed))[0], normal(r, seed=seed + 1).square()


def distance(low, moment):
    basis, values = low
    return float((moment - (basis * values) @ basis.T).norm())


def sequence(length=8):
    return [
        cases.layer_statistics(cases.outer(2, 6, 9, 11, seed=4 * s)) for s in range(length)
    ]


def averaged(parts, decay):
    rows, cols = fl.KFAC()(parts[0]).terms[0]
    for part in parts[1:]:
        g, a = fl.KFAC()(part).terms[0]
        rows, cols = decay * rows + (1 - decay) * g, decay * cols + (1 - decay) * a
    return rows, cols


def run(method, parts):
    op = None
    for part in parts:
        op = method(part, previous=op)
    return op


@pytest.mark.parametrize("columns", [1, 3, None, 99])
def test_a_correction_never_increases_the_error(columns):
    moment, _, _ = spectrum()
    low = low_rank()
    for step in range(5):
        new = fl.Correction(columns)(low, moment, 6, step)
        assert distance(new, moment) <= distance(low, moment) + 1e-12
        assert_close(new[0].T @ new[0], torch.eye(6, dtype=F64), 1e-12)
        assert_close(new[0] @ new[0].T, low[0] @ low[0].T, 1e-12)  # the span stays
        assert torch.equal(new[1], new[1].sort(descending=True).values)
        low = new


def test_a_correction_of_all_columns_is_the_best_in_their_span():
    moment, _, _ = spectrum()
    low = low_rank()
    basis, values = fl.Correction()(low, moment, 6, 0)
    inside = low[0].T @ moment @ low[0]
    assert_close((basis * values) @ basis.T, low[0] @ inside @ low[0].T, 1e-12)


def test_a_correction_leaves_its_argument_alone():
    moment, _, _ = spectrum()
    low = low_rank()
    kept = [part.clone() for part in low]
    fl.Correction(2)(low, moment, 6, 0)
    assert all(torch.equal(a, b) for a, b in zip(low, kept, strict=True))


@pytest.mark.parametrize("rank", [1, 5])
def test_a_randomised_svd_finds_the_leading_eigenvectors(rank):
    moment, basis, values = spectrum()
    found = fl.RandomisedSVD(oversample=8, iterations=4)(low_rank(), moment, rank, 1)
    assert_close(found[1], values[:rank], 1e-6)
    best = basis[:, :rank] @ basis[:, :rank].T
    assert_close(found[0] @ found[0].T, best, 1e-5)


def test_a_randomised_svd_of_enough_columns_is_exact():
    moment, _, _ = spectrum(n=5)
    low = fl.RandomisedSVD(oversample=0)(low_rank(5, 2), moment, 7, 1)
    assert distance(low, moment) < 1e-12


def test_rs_kfac_of_full_rank_is_kfac_of_the_averaged_factors():
    parts = sequence()
    found = run(fl.BKFAC(11, 0.8, fl.RandomisedSVD()), parts)
    rows, cols = averaged(parts, 0.8)
    assert_close(found.moments[0], rows, 1e-12)
    assert_close(found.moments[1], cols, 1e-12)
    assert_close(found.to_dense(), torch.kron(rows, cols), 1e-9)


@pytest.mark.parametrize("refresh", [fl.Correction(), fl.RandomisedSVD()])
def test_a_refresh_brings_low_rank_averages_closer(refresh):
    parts = sequence()
    exact = torch.kron(*averaged(parts, 0.8))
    drifted = run(fl.BKFAC(4, 0.8), parts).to_dense()
    refreshed = run(fl.BKFAC(4, 0.8, refresh), parts).to_dense()
    assert float((refreshed - exact).norm()) < float((drifted - exact).norm())


@pytest.mark.parametrize("make", [fl.Correction, fl.RandomisedSVD])
def test_a_refresh_comes_at_its_steps_alone(make):
    parts, plain, method = sequence(6), fl.BKFAC(3), fl.BKFAC(3, refresh=make(every=4))
    for length in (1, 3):
        expected = run(plain, parts[:length]).to_dense()
        assert_close(run(method, parts[:length]).to_dense(), expected, 1e-12)
    for length in (4, 5):
        difference = (
            run(method, parts[:length]).to_dense() - run(plain, parts[:length]).to_dense()
        )
        assert float(difference.norm()) > 1e-6
    assert run(method, parts).steps == 6


def test_a_refresh_is_the_same_at_every_run_and_leaves_the_global_generator():
    parts, state = sequence(3), torch.random.get_rng_state()
    method = fl.BKFAC(3, refresh=fl.RandomisedSVD(seed=5))
    first, second = run(method, parts), run(method, parts)
    assert torch.equal(first.to_dense(), second.to_dense())
    assert torch.equal(torch.random.get_rng_state(), state)


def test_moments_are_kept_only_for_a_refresh():
    (part,) = sequence(1)
    plain, kept = fl.BKFAC(3)(part), fl.BKFAC(3, refresh=fl.Correction())(part)
    assert plain.moments is None
    assert kept.stored_numbers - plain.stored_numbers == 9 * 9 + 11 * 11
    single = kept.to(torch.float32)
    assert single.moments[0].dtype == torch.float32
    assert kept.inverse(0.1).stored_numbers == plain.stored_numbers


@pytest.mark.parametrize(
    "make",
    [
        lambda: fl.Correction(0),
        lambda: fl.Correction(every=0),
        lambda: fl.RandomisedSVD(-1),
        lambda: fl.RandomisedSVD(iterations=0),
        lambda: fl.RandomisedSVD(every=0),
    ],
)
def test_numbers_are_checked(make):
    with pytest.raises(ValueError, match="expected"):
        make()
