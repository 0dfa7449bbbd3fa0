"""Every damping at every operator: one type, read at one door, against dense solves."""

import numpy as np
import pytest
import torch
from torch import nn

import fisherlab as fl
from fisherlab.operators.base import parsed, tikhonov

METHODS = {**fl.approximators(), **fl.preconditioners()}
LAMBDA = 0.5  # exact in every precision
SCALARS = {
    "float": LAMBDA,
    "numpy float32": np.float32(LAMBDA),
    "numpy float64": np.float64(LAMBDA),
    "numpy without dimensions": np.array(LAMBDA),
    "tensor float32": torch.tensor(LAMBDA),
    "tensor float64": torch.tensor(LAMBDA, dtype=torch.float64),
    "Tikhonov": fl.Tikhonov(LAMBDA),
}
REFUSED = {
    "negative": -1.0,
    "infinite": float("inf"),
    "not a number": float("nan"),
    "two numbers": torch.ones(2),
}


@pytest.fixture(scope="module")
def layer():
    generator = torch.Generator().manual_seed(3)
    model = nn.Linear(4, 3).double()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.copy_(torch.randn(parameter.shape, generator=generator))
    x = torch.randn(30, 4, generator=generator).double()
    y = torch.randint(0, 3, (30,), generator=generator)
    return fl.collect(model, (x, y), fl.Categorical(), fl.Empirical())["weight"]


@pytest.fixture(scope="module")
def weight():
    generator = torch.Generator().manual_seed(4)
    return torch.randn(3, 5, generator=generator).double()


BUILT = {}


def built(method, layer):
    if method not in BUILT:
        try:
            BUILT[method] = METHODS[method](layer)
        except fl.FisherlabError as error:
            pytest.skip(str(error))
    return BUILT[method]


@pytest.mark.parametrize("method", METHODS)
def test_every_scalar_is_the_same_damping_at_every_operator(method, layer, weight):
    op = built(method, layer)
    dense = op.to_dense()
    expected = op.solve(weight, LAMBDA)
    inverse = op.inverse(LAMBDA).to_dense()
    logdet = op.logdet(LAMBDA)
    if not getattr(op, "solver", None):  # matrices that are inverses solve as themselves
        eye = torch.eye(len(dense)).double()
        oracle = torch.linalg.solve(dense + LAMBDA * eye, weight.flatten())
        torch.testing.assert_close(expected.flatten(), oracle, rtol=1e-7, atol=1e-9)
    for name, scalar in SCALARS.items():
        solved = op.solve(weight, scalar)
        assert solved.dtype == weight.dtype, name
        assert torch.equal(solved, expected), name
        assert torch.equal(op.inverse(scalar).to_dense(), inverse), name
        found = op.logdet(scalar)
        assert (type(found), found) == (float, logdet), name


@pytest.mark.parametrize("method", METHODS)
def test_a_relative_damping_is_a_share_of_the_mean_eigenvalue(method, layer, weight):
    op = built(method, layer)
    mean = op.trace() / op.shape[0]
    if mean <= 0:
        pytest.skip("no positive trace")
    found = op.solve(weight, fl.RelativeDamping(0.1))
    torch.testing.assert_close(found, op.solve(weight, 0.1 * mean))


@pytest.mark.parametrize("what", REFUSED)
@pytest.mark.parametrize("method", ["exact", "kfac", "diagonal", "mini-block", "low-rank"])
def test_what_is_no_damping_is_refused_in_a_sentence(method, what, layer, weight):
    op = METHODS[method](layer)
    for call in (op.inverse, op.logdet, lambda d: op.solve(weight, d)):
        with pytest.raises(ValueError, match="finite number of at least 0"):
            call(REFUSED[what])


@pytest.mark.parametrize("method", METHODS)
def test_a_factored_damping_shifts_factors_or_is_refused(method, layer, weight):
    op, damping = built(method, layer), fl.Factored(LAMBDA)
    if not hasattr(op, "damped"):
        with pytest.raises(ValueError, match="Kronecker"):
            op.solve(weight, damping)
        return
    if len(getattr(op, "terms", ())) > 2:
        with pytest.raises(ValueError, match="terms"):
            op.damped(damping)
        return
    law = op.damped(damping).to_dense()
    oracle = torch.linalg.solve(law, weight.flatten())
    torch.testing.assert_close(op.solve(weight, damping).flatten(), oracle)


def test_a_tensor_changed_in_place_is_a_new_damping(layer):
    block, damping = METHODS["exact"](layer), torch.tensor(0.5).double()
    first = block.inverse(damping).trace()
    damping.mul_(2)
    assert block.inverse(damping).trace() == METHODS["exact"](layer).inverse(1.0).trace()
    assert block.inverse(0.5).trace() == first


def test_the_door_reads_one_type():
    assert parsed(np.float32(0.5), None) == fl.Tikhonov(0.5)
    assert type(tikhonov(np.float64(0.5), None)) is float
    with pytest.raises(ValueError, match="one fraction"):
        tikhonov(fl.RelativeDamping([0.1, 0.2]), None)


DAMPED = {
    "inverse_error": fl.metrics.inverse_error,
    "inverse_cosine": fl.metrics.inverse_cosine,
    "whitened_error": fl.metrics.whitened_error,
    "gaussian_kl": fl.metrics.gaussian_kl,
    "stein_divergence": fl.metrics.stein_divergence,
    "log_spectrum_distance": fl.metrics.log_spectrum_distance,
}
ALONG = {
    "direction_cosine": fl.metrics.direction_cosine,
    "f_cosine_squared": fl.metrics.f_cosine_squared,
    "gamma_ratio": fl.metrics.gamma_ratio,
    "model_decrease_ratio": fl.metrics.model_decrease_ratio,
}


@pytest.mark.parametrize("metric", [*DAMPED, *ALONG])
def test_metrics_are_python_floats_whatever_the_scalar(metric, layer, weight):
    exact, approx = built("exact", layer), built("kfac", layer)
    given = (exact, approx) if metric in DAMPED else (exact, approx, weight)
    function = (DAMPED | ALONG)[metric]
    expected = function(*given, LAMBDA)
    for name, scalar in SCALARS.items():
        found = function(*given, scalar)
        assert (type(found), found) == (float, expected), name


def dense_pair(layer, method):
    exact, approx = built("exact", layer), built(method, layer)
    law = approx.damped(fl.Factored(LAMBDA)).to_dense()
    damped = exact.to_dense() + LAMBDA * torch.eye(len(law)).double()
    return (exact, approx), (damped, law)


@pytest.mark.parametrize("method", ["kfac", "tkfac", "kpsvd", "kpsvd-2"])
def test_factored_damps_the_approximation_and_lambda_the_exact_block(method, layer, weight):
    (exact, approx), (p, q) = dense_pair(layer, method)
    inverse, other = torch.linalg.inv(p), torch.linalg.inv(q)
    product, v = other @ p, weight.flatten()
    best, taken = inverse @ v, other @ v
    logs = torch.linalg.eigvalsh(p).log() - torch.linalg.eigvalsh(q).log()
    kl = (product.trace() - len(p) + torch.logdet(q) - torch.logdet(p)) / 2
    oracles = {
        "inverse_error": (inverse - other).norm() / inverse.norm(),
        "inverse_cosine": (inverse * other).sum() / (inverse.norm() * other.norm()),
        "whitened_error": (torch.linalg.eigvals(product).real - 1).norm() / len(p) ** 0.5,
        "gaussian_kl": kl,
        "stein_divergence": 2 * kl,
        "log_spectrum_distance": logs.square().mean().sqrt(),
        "direction_cosine": best @ taken / (best.norm() * taken.norm()),
        "f_cosine_squared": (v @ taken) ** 2 / ((taken @ p @ taken) * (v @ best)),
    }
    for name, oracle in oracles.items():
        given = (exact, approx) if name in DAMPED else (exact, approx, weight)
        found = (DAMPED | ALONG)[name](*given, fl.Factored(LAMBDA))
        assert found == pytest.approx(float(oracle), rel=1e-8), name


def test_three_kinds_are_three_labelled_columns(layer, weight):
    stats = fl.collect(
        nn.Linear(4, 3).double(),
        (weight.T[:4].repeat(3, 2)[:, :4].contiguous(), None),
        fl.Categorical(),
    )
    kinds = [1e-2, fl.Factored(1e-2), fl.RelativeDamping(0.1)]
    gradient = {"weight": weight}
    methods = ["exact", "kfac", "diagonal"]
    found = fl.compare(stats, methods, damping=kinds, gradient=gradient)
    swept = fl.sweep(stats, methods, damping=kinds, gradient=gradient)
    assert found.damping.values.tolist() == ["0.01", "factored 0.01", "relative 0.1"]
    assert found.damping_kind.values.tolist() == ["absolute", "factored", "relative"]
    for one in (found, swept):
        errors = one.inverse_error.sel(layer="weight")
        assert np.isfinite(errors.sel(approximator="kfac")).all()
        assert np.isnan(errors.sel(approximator="diagonal").values[1])
        assert "Kronecker" in str(one.status.sel(approximator="diagonal").item())
        for level, kind in enumerate(kinds):
            alone = fl.compare(stats, methods, damping=kind, gradient=gradient)
            np.testing.assert_allclose(
                one.direction_cosine[..., level], alone.direction_cosine[..., 0], rtol=1e-9
            )
    with pytest.raises(ValueError, match="several kinds"):
        fl.plots.damping_sweep(found)


def test_one_kind_keeps_numbers_as_labels(layer):
    assert fl.SINGD(damping=np.float64(0.5)).damping == 0.5
    with pytest.raises(ValueError, match="relative to"):
        tikhonov(fl.RelativeDamping(0.1), "SINGD")
    stats = fl.collect(
        nn.Linear(4, 3).double(), (torch.ones(2, 4).double(), None), fl.Categorical()
    )
    for kind in (fl.Tikhonov, fl.Factored, fl.RelativeDamping):
        found = fl.compare(stats, ["kfac"], damping=[kind(0.1), kind(1.0)])
        assert found.damping.values.tolist() == [0.1, 1.0]
