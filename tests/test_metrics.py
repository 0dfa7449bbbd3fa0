"""Laws of metrics: the dense definitions, their floor, and what may be compared."""

import math

import pytest
import torch

import fisherlab as fl
from fisherlab import metrics
from fisherlab.operators import Dense, Diagonal, FactoredFisher, KroneckerSum, Provenance
from tests import cases, oracles
from tests.cases import METHODS, normal, refused
from tests.oracles import assert_close

NAMES = pytest.mark.parametrize("name", METHODS)
LAYERS = pytest.mark.parametrize(
    ("layer", "form"), [("linear", "gram"), ("conv strided padded", "dense")]
)
DAMPING = 0.05


def pair(layer, name, form="auto"):
    stats = cases.statistics(layer)
    exact, approx = fl.ExactBlock(form)(stats), METHODS[name](stats)
    return exact, approx, exact.to_dense(), approx.to_dense()


def assert_square(found, expected):
    """Compare squares: below 1e-6 the root of a difference has no digits to compare."""
    assert_close(found**2, float(expected) ** 2, 1e-10, atol=1e-12)


@NAMES
@LAYERS
def test_undamped_metrics_are_their_dense_definitions(name, layer, form):
    exact, approx, f, g = pair(layer, name, form)
    assert_square(metrics.frobenius_error(exact, approx), (f - g).norm() / f.norm())
    cosine = (f * g).sum() / (f.norm() * g.norm())
    assert_close(metrics.cosine_similarity(exact, approx), cosine, 1e-10)
    assert_close(metrics.trace_ratio(exact, approx), g.trace() / f.trace(), 1e-10)


@NAMES
@LAYERS
def test_damped_metrics_are_their_dense_definitions(name, layer, form):
    exact, approx, f, g = pair(layer, name, form)
    v = normal(*exact.weight_shape)
    lowest = float(torch.linalg.eigvalsh(g)[0])
    damping = max(DAMPING, -2 * lowest)
    p, q = oracles.damped_inverse(f, damping), oracles.damped_inverse(g, damping)
    error = metrics.inverse_error(exact, approx, damping)
    assert_close(error**2, float((p - q).norm() / p.norm()) ** 2, 1e-8, atol=1e-12)
    a, b = p @ v.flatten(), q @ v.flatten()
    cosine = metrics.direction_cosine(exact, approx, v, damping)
    assert_close(cosine, (a @ b) / (a.norm() * b.norm()), 1e-8)


def test_near_the_floor_the_residual_is_measured():
    f = Dense(torch.diag(normal(6).square() + 1), (2, 3))
    for size in (1e-3, 1e-7, 1e-9, 1e-12):
        g = Dense(f.matrix + size * torch.eye(6), (2, 3))
        expected = size * 6**0.5 / f.frobenius_norm()
        assert_close(metrics.frobenius_error(f, g), expected, 1e-3)


@pytest.mark.parametrize("size", [0.5, 1e-2, 1e-4, 1e-6])
def test_divergences_of_near_matrices_are_summed_without_cancellation(size):
    x = normal(30, 6, seed=1)
    f = Dense(x.T @ x / 30, (2, 3))
    change = normal(6, 6, seed=2)
    g = Dense(f.matrix + size * (change + change.T) / 12, (2, 3))
    p, q = (m.matrix + torch.eye(6) for m in (f, g))
    half = torch.linalg.inv(torch.linalg.cholesky(q))
    found = metrics.pairs.Pair(f, g).damped(1.0).residual_divergences
    for turned, told in zip((False, True), found, strict=True):
        values = torch.linalg.eigvalsh(half @ (p - q) @ half.T)
        if turned:  # P⁻½ (Q − P) P⁻½
            values = -values / (1 + values)
        terms = [(-values) ** k / k for k in range(2, 60)]
        assert_close(told, torch.stack(terms).sum() / 2, 1e-8)
    assert metrics.pairs.Pair(g, f).damped(1.0).residual_divergences == pytest.approx(
        found[::-1], rel=1e-8
    )


def test_below_the_floor_of_large_blocks_a_bound_is_returned(monkeypatch):
    monkeypatch.setattr(metrics.pairs, "RESIDUAL_ROWS", 5)
    f = Diagonal(normal(2, 3).square() + 1)
    close = Diagonal(f.entries * (1 + 1e-9))
    found = metrics.frobenius_error(f, close)
    assert isinstance(found, metrics.BelowFloor)
    assert found == metrics.FLOOR
    assert "BelowFloor" in repr(found)
    clear = metrics.frobenius_error(f, Diagonal(f.entries * 1.001))
    assert not isinstance(clear, metrics.BelowFloor)
    assert_close(clear, 1e-3, 1e-6)


def test_the_zero_block():
    zero, some = Diagonal(torch.zeros(2, 3)), Diagonal(torch.ones(2, 3))
    assert metrics.frobenius_error(zero, zero) == 0.0
    assert metrics.frobenius_error(zero, some) == math.inf
    assert metrics.frobenius_error(some, zero) == 1.0
    assert math.isnan(metrics.cosine_similarity(zero, some))
    assert math.isnan(metrics.trace_ratio(zero, some))
    assert math.isnan(metrics.direction_cosine(some, some, torch.zeros(2, 3), 1.0))


@NAMES
def test_metrics_are_floats_in_float64_whatever_the_statistics_are(name):
    stats = cases.statistics("conv strided padded")
    single = stats.to(torch.float32)
    exact, approx = fl.ExactBlock()(single), METHODS[name](single)
    found = metrics.frobenius_error(exact, approx)
    assert type(found) in (float, metrics.BelowFloor)
    f, g = exact.to(torch.float64).to_dense(), approx.to_dense().double()
    assert_close(found, (f - g).norm() / f.norm(), 1e-6, atol=1e-6)


def test_two_kinds_of_fisher_are_compared_only_on_request():
    def block(fisher):
        made = Provenance(fisher=fisher)
        return Diagonal(torch.ones(2, 2), made)

    v = torch.ones(2, 2)
    for metric, rest in (
        (metrics.frobenius_error, ()),
        (metrics.cosine_similarity, ()),
        (metrics.trace_ratio, ()),
        (metrics.direction_cosine, (v, 1.0)),
        (metrics.inverse_error, (1.0,)),
    ):
        with pytest.raises(ValueError, match=r"Exact\(\).*Empirical\(\).*mixed=True"):
            metric(block("Exact()"), block("Empirical()"), *rest)
        metric(block("Exact()"), block("Empirical()"), *rest, mixed=True)
        metric(block("Exact()"), block(""), *rest)  # an operator made by hand
        with pytest.raises(ValueError, match=r"\(2, 2\).*\(1, 4\)"):
            metric(block("Exact()"), Diagonal(torch.ones(1, 4)), *rest)


def test_an_indefinite_approximation_is_an_error_not_a_number():
    eye = torch.eye(2, dtype=torch.float64)
    exact = Diagonal(torch.ones(2, 2, dtype=torch.float64))
    indefinite = KroneckerSum(((eye, eye), (-3 * eye, torch.diag(eye[0]))), (2, 2))
    with pytest.raises(fl.IndefiniteError, match="above 2"):
        metrics.inverse_error(exact, indefinite, 1.0)
    with pytest.raises(fl.IndefiniteError, match="above 2"):
        metrics.direction_cosine(exact, indefinite, torch.ones(2, 2), 1.0)
    metrics.inverse_error(exact, indefinite, 2.1)


def test_scaling_both_changes_no_relative_metric():
    stats = cases.statistics("linear")
    exact, kfac = fl.ExactBlock()(stats), fl.KFAC()(stats)
    larger = FactoredFisher(exact.samples, 1)
    ((g, a),) = kfac.terms
    scaled = KroneckerSum(((g * stats.count, a),), kfac.weight_shape)
    for metric in (metrics.frobenius_error, metrics.cosine_similarity, metrics.trace_ratio):
        assert_close(metric(larger, scaled), metric(exact, kfac), 1e-10)


OF_MATRICES = [name for name, one in metrics.entries().items() if one.needs == "matrix"]
OF_INVERSES = [name for name, one in metrics.entries().items() if one.needs == "damping"]
OF_STEPS = [name for name, one in metrics.entries().items() if one.needs == "gradient"]


def symmetric(seed):
    root = normal(6, 6, seed=seed)
    return root @ root.T


def measured(name, exact, approx, scale):
    """A metric of two matrices, a damping and a gradient that are scaled alike."""
    if name == "effective_rank":
        return metrics.effective_rank(approx)
    if name == "reverse_gaussian_kl":
        return metrics.gaussian_kl(exact, approx, 0.1 * scale, reverse=True)
    rest = [normal(2, 3, seed=7)] if name in OF_STEPS else []
    rest += [] if name in OF_MATRICES else [0.1 * scale]
    return getattr(metrics, name)(exact, approx, *rest)


@pytest.mark.parametrize("name", [*OF_MATRICES, *OF_INVERSES, *OF_STEPS])
def test_a_scale_whose_squares_are_no_numbers_is_refused_or_changes_nothing(name):
    """An error of 0 was told where squares vanish, a cosine of 0 where they overflow."""
    first, second = symmetric(1), symmetric(2)
    plain = measured(name, Dense(first, (2, 3)), Dense(second, (2, 3)), 1.0)
    for scale in (1e-200, 1e-90, 1e90, 1e200):
        exact, approx = Dense(scale * first, (2, 3)), Dense(scale * second, (2, 3))
        try:
            found = measured(name, exact, approx, scale)
        except fl.NumericalError as error:
            assert "no numbers of float64" in str(error)  # noqa: PT017 - either will do
            assert scale in (1e-200, 1e200)
        else:
            assert found == pytest.approx(plain, rel=1e-6) or math.isnan(found)


@pytest.mark.parametrize("name", [*OF_MATRICES, *OF_INVERSES, *OF_STEPS])
@pytest.mark.parametrize("wrong", [torch.eye(6), torch.eye(6).numpy(), None, "kfac"])
def test_what_is_no_operator_is_refused_in_a_sentence(name, wrong):
    block = Dense(torch.eye(6), (2, 3))
    for exact, approx in ((wrong, block), (block, wrong)):
        if name == "effective_rank" and approx is block:
            continue
        with refused("an operator is expected"):
            measured(name, exact, approx, 1.0)
    with refused("an operator is expected"):
        metrics.kronecker_ratio(wrong)


@pytest.mark.parametrize("name", [*OF_STEPS, "gamma_ratio"])
@pytest.mark.parametrize(
    "wrong",
    [
        torch.ones(6),
        torch.ones(3, 2),
        torch.ones(4, 2, 3),  # a cosine over all of them, before
        torch.ones(2, 3, dtype=torch.complex64),  # its imaginary part was dropped
        torch.ones(2, 3).tolist(),
        torch.ones(2, 3).numpy(),
        None,
    ],
)
def test_what_is_no_gradient_is_refused_in_a_sentence(name, wrong):
    block = Dense(torch.eye(6), (2, 3))
    with refused("given as gradient or direction"):
        getattr(metrics, name)(block, block, wrong, 0.1)
    with refused("given as gradient or direction"):
        metrics.gamma(block, torch.ones(2, 3), wrong, 0.1)


@pytest.mark.parametrize("wrong", [1.5, True, "2", None])
def test_counts_of_metrics_are_whole_numbers(wrong):
    block = Dense(torch.eye(6), (2, 3))
    with refused("a whole number is expected"):
        metrics.subspace_overlap(block, block, wrong)
    with refused("a whole number is expected"):
        metrics.entries(wrong)
    with refused("at least 0"):
        metrics.kronecker_tail(block, -1)
