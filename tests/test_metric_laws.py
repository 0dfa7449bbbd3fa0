"""Every matrix-free metric is its dense definition, for all approximations of any layer."""

import math
from functools import partial

import pytest
import torch
from hypothesis import Phase, example, given, settings
from hypothesis import strategies as st

import fisherlab as fl
from fisherlab import metrics
from fisherlab.metrics import BelowFloor
from fisherlab.metrics.register import entries
from tests import cases, oracles
from tests.cases import METHODS, normal
from tests.oracles import assert_close

NAMES = pytest.mark.parametrize("name", METHODS)
SPACES = st.sampled_from(["gram", "dense"])


few = partial(settings, phases=[Phase.generate])  # thousands of numbers need no shrinking
LAYERS = st.tuples(
    st.sampled_from(["outer", "shared", "matrices"]),
    *(st.integers(1, high) for high in (3, 5, 3, 4, 4)),
    st.integers(0, 99),
)


def layer(form, v, n, t, o, i, seed):
    """Return statistics of a layer of a few parameters."""
    made = {
        "outer": partial(cases.outer, v, n, o, i),
        "shared": partial(cases.shared, v, n, t, o, i),
        "matrices": partial(cases.matrices, v, n, o, i),
    }
    return cases.layer_statistics(made[form](seed=seed))


def svals(m):
    return torch.linalg.svdvals(m)


def root(m):
    values, vectors = torch.linalg.eigh(m)
    return (vectors * values.clamp_min(0).sqrt()) @ vectors.T


def cosine(a, b):
    return float((a * b).sum() / (a.norm() * b.norm()))


def kl(p, q):
    inside = torch.linalg.solve(q, p)
    return 0.5 * float(inside.trace() - len(p) + q.logdet() - p.logdet())


def log_distance(p, q):
    logs = [torch.linalg.eigvalsh(m).log() for m in (p, q)]
    return float((logs[0] - logs[1]).square().mean().sqrt())


def correlation(f, g):
    if len(f) == 1:
        return math.nan
    return float(torch.corrcoef(torch.stack([f.diagonal(), g.diagonal()]))[0, 1])


# Each metric from its definition, by formed matrices and torch.linalg alone.
OF_PAIRS = {
    "frobenius_error": lambda f, g: (f - g).norm() / f.norm(),
    "scale_optimal_error": lambda f, g: (
        (f - (f * g).sum() / g.norm() ** 2 * g).norm() / f.norm()
    ),
    "optimal_scale": lambda f, g: (f * g).sum() / g.norm() ** 2,
    "cosine_similarity": cosine,
    "trace_ratio": lambda f, g: g.trace() / f.trace(),
    "diagonal_correlation": correlation,
    "spectral_error": lambda f, g: svals(f - g)[0] / svals(f)[0],
    "spectrum_error": lambda f, g: (svals(f) - svals(g)).norm() / svals(f).norm(),
    "effective_rank": lambda f, g: g.trace() ** 2 / g.norm() ** 2,
}
OF_DAMPED = {
    "inverse_error": lambda p, q: (p.inverse() - q.inverse()).norm() / p.inverse().norm(),
    "inverse_cosine": lambda p, q: cosine(p.inverse(), q.inverse()),
    "whitened_error": lambda p, q: (
        (root(p) @ q.inverse() @ root(p) - torch.eye(len(p))).norm() / len(p) ** 0.5
    ),
    "gaussian_kl": kl,
    "reverse_gaussian_kl": lambda p, q: kl(q, p),
    "stein_divergence": lambda p, q: 2 * kl(p, q),
    "log_spectrum_distance": log_distance,
}


def model(p, v, step):
    return float(v @ step - 0.5 * step @ p @ step)


def gamma(p, v, step):
    return float((step @ p @ step).sqrt() / (step @ v).abs())


OF_STEPS = {
    "direction_cosine": lambda p, q, v: cosine(p.inverse() @ v, q.inverse() @ v),
    "f_cosine_squared": lambda p, q, v: (
        (gamma(p, v, p.inverse() @ v) / gamma(p, v, q.inverse() @ v)) ** 2
    ),
    "model_decrease_ratio": lambda p, q, v: (
        model(p, v, q.inverse() @ v) / model(p, v, p.inverse() @ v)
    ),
    "gamma_ratio": lambda p, q, v: gamma(p, v, q.inverse() @ v) / gamma(p, v, v),
}
DIFFERENCES = {  # roots of differences: their squares have digits, they themselves do not
    "frobenius_error",
    "scale_optimal_error",
    "inverse_error",
    "whitened_error",
}


def operators(stats, name, space):
    """Return both operators and both matrices, or None where a method needs more."""
    exact = fl.ExactBlock(space)(stats)
    try:
        approx = METHODS[name](stats)
    except fl.NeedsSharedForm:
        return None
    f = oracles.second_moment_block(stats.example_gradients(), stats.count)
    return exact, approx, f, approx.to_dense()


def check(name, found, expected):
    """Compare 1e-10; roots of differences as squares; below the floor bounds only."""
    expected = float(expected)
    if name in DIFFERENCES:
        found, expected = found**2, expected**2
        assert_close(found, expected, 1e-10, atol=1e-12)
    elif isinstance(found, BelowFloor):
        assert abs(expected) <= 2 * found
    elif math.isnan(found):
        assert math.isnan(expected) or name == "diagonal_correlation"
    else:
        assert_close(found, expected, 1e-10, atol=1e-11)


@NAMES
@few(max_examples=4)
@given(LAYERS, SPACES)
def test_metrics_of_matrices_are_their_definitions(name, drawn, space):
    found = operators(layer(*drawn), name, space)
    if found is None:
        return
    exact, approx, f, g = found
    for metric, definition in OF_PAIRS.items():
        if metric == "effective_rank":
            value = metrics.effective_rank(approx)
        else:
            value = getattr(metrics, metric)(exact, approx)
        check(metric, value, definition(f, g))


@NAMES
@few(max_examples=4)
@given(LAYERS, SPACES, st.sampled_from([0.3, 1.0, 10.0]))
def test_metrics_of_damped_matrices_are_their_definitions(name, drawn, space, alpha):
    found = operators(layer(*drawn), name, space)
    if found is None:
        return
    exact, approx, f, g = found
    eye = torch.eye(len(f), dtype=f.dtype)
    damping = alpha * float(f.trace()) / len(f) - min(0.0, 2 * float(least_eigenvalue(g)))
    p, q = f + damping * eye, g + damping * eye
    v = normal(*exact.weight_shape, seed=5)
    for metric, definition in OF_DAMPED.items():
        if metric == "reverse_gaussian_kl":
            value = metrics.gaussian_kl(exact, approx, damping, reverse=True)
        else:
            value = getattr(metrics, metric)(exact, approx, damping)
        check(metric, value, definition(p, q))
    for metric, definition in OF_STEPS.items():
        value = getattr(metrics, metric)(exact, approx, v, damping)
        check(metric, value, definition(p, q, v.flatten()))


def least_eigenvalue(g):
    return torch.linalg.eigvalsh((g + g.T) / 2)[0]


@NAMES
@few(max_examples=3, phases=[Phase.explicit, Phase.generate])
@example(("shared", 2, 2, 2, 1, 4, 57), "gram")  # of full rank, one eigenvalue 1e-8
@given(LAYERS, SPACES)
def test_a_sweep_is_the_metric_at_every_damping(name, drawn, space):
    found = operators(layer(*drawn), name, space)
    if found is None:
        return
    exact, approx, f, g = found
    mean = float(f.trace()) / len(f)
    raised = -min(0.0, 2 * float(least_eigenvalue(g)))
    dampings = [alpha * mean + raised for alpha in (0.1, 1.0, 30.0)]
    v = normal(*exact.weight_shape, seed=5)
    swept = metrics.damping_curve(exact, approx, dampings, gradient=v)
    known = entries()
    for metric, values in swept.items():
        for damping, value in zip(dampings, values, strict=True):
            damped = metrics.pairs.paired(metric, exact, approx, False).damped(damping)
            if metric in ("slope", "curvature"):
                taken = approx.solve(v, damping)
                one = v if metric == "slope" else exact @ taken + damping * taken
                assert_close(value, float((one * taken).sum()), 1e-8, atol=1e-9)
                continue
            asked = damped.along(v) if known[metric].needs == "gradient" else damped
            expected = known[metric].of(asked)
            if metric in DIFFERENCES:
                assert_close(value**2, expected**2, 1e-8, atol=1.1e-10)
            elif isinstance(value, BelowFloor):
                assert abs(expected) <= 2 * value
            else:
                assert_close(value, expected, 1e-8, atol=1e-9)


def test_every_metric_of_the_register_has_a_definition_here():
    tested = {*OF_PAIRS, *OF_DAMPED, *OF_STEPS, "subspace_overlap"}
    assert set(entries()) == tested
