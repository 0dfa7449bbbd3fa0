"""Every purpose, against a dense brute force for every method."""

import copy
import gc
import itertools
import math
import weakref

import matplotlib.pyplot as plt
import numpy as np
import pytest
import torch
import xarray as xr
from scipy.stats import spearmanr
from torch import nn

import fisherlab as fl
from fisherlab import purposes
from fisherlab.analysis import counts
from fisherlab.analysis import purposes as analysis_of_purposes
from fisherlab.analysis import purposes as judging
from fisherlab.analysis.allowances import Allowance, chosen
from fisherlab.analysis.purpose_table import lead_errors
from fisherlab.analysis.purposes import judge
from fisherlab.analysis.verdicts import best_dampings
from fisherlab.numerics.linalg import decomposed_once
from fisherlab.operators import Diagonal as DiagonalMatrix
from fisherlab.operators import FactoredFisher
from fisherlab.samples import MatrixSamples, PartedSamples
from tests.cases import METHODS, normal, refused
from tests.oracles import assert_close

N, DAMPING = 12, 0.05


@pytest.fixture(scope="module")
def network():
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        layers = torch.nn.Linear(4, 3), torch.nn.Tanh(), torch.nn.Linear(3, 3)
        model = torch.nn.Sequential(*layers).double()
    data = normal(N, 4, seed=1), torch.arange(N) % 3
    stats = fl.collect(model, data, fl.Categorical())
    return model, data, stats


QUICK = ("kfac", "ekfac", "kpsvd", "kpsvd-2", "mini-block", "diagonal")
EVERY = [n if n in QUICK else pytest.param(n, marks=pytest.mark.slow) for n in METHODS]


def dense(stats, name, layer):
    """F and F̂ as formed matrices."""
    exact = fl.ExactBlock()(stats[layer]).to(torch.float64)
    approx = fl.approximators()[name](stats[layer]).to(torch.float64)
    return exact.to_dense(), approx.to_dense()


def judged(stats, name, purpose, layer):
    found = judge(stats, [name], [purpose]).sel(layer=layer).isel(approximator=0)
    values = found["value"]
    return {
        str(m).partition(".")[2]: float(v)
        for m, v in zip(found["measure"].values, values.values, strict=True)
    }, str(found["status"].values[0])


def positive(matrix, damping):
    return float(torch.linalg.eigvalsh(matrix)[0]) + damping > 1e-10


def check(found, expected):
    for name, value in expected.items():
        assert found[name] == pytest.approx(value, rel=1e-8, abs=1e-9), name


@pytest.mark.parametrize("layer", ["0", "2"])
@pytest.mark.parametrize("name", EVERY)
def test_steps_are_those_of_formed_matrices(name, layer, network):
    model, data, stats = network
    gradient = fl.mean_gradient(model, data, fl.Categorical())
    found, status = judged(stats, name, purposes.Step(gradient, DAMPING), layer)
    f, g = dense(stats, name, layer)
    eye, v = torch.eye(len(f)).double(), gradient[layer].gradient.flatten()
    p = f + DAMPING * eye
    best = torch.linalg.solve(p, v)

    def share(mu):
        if not positive(g, mu):
            return -1.0, None
        step = torch.linalg.solve(g + mu * eye, v)
        return float((v @ step) ** 2 / ((step @ p @ step) * (v @ best))), step

    common, step = share(DAMPING)
    shares = [common, *(share(ratio * DAMPING)[0] for ratio in purposes.step.GRID)]
    if step is None:  # a damping of its own may still serve it
        assert np.isnan(found["f_cosine_squared"])
        assert "positive definite" in status
        check(found, {"best_f_cosine_squared": max(shares)})
        return
    decrease = float((2 * v @ step - step @ p @ step) / (v @ best))
    check(
        found,
        {
            "f_cosine_squared": common,
            "best_f_cosine_squared": max(shares),
            "decrease": decrease,
            "direction_cosine": float(step @ best / step.norm() / best.norm()),
        },
    )


@pytest.mark.parametrize("name", ["kpsvd-2", "diagonal"])
def test_what_steps_reach_at_dampings_of_their_own(name, network):
    """And what the gradient does: for every layer and for all of them, from matrices."""
    model, data, stats = network
    gradient = fl.mean_gradient(model, data, fl.Categorical())
    purpose = purposes.Step(gradient, DAMPING, grid=[10.0, 0.01])
    table = judge(stats, ["exact", name], [purpose])
    np.testing.assert_allclose(table["own_damping"], [0.01, 1.0, 10.0])
    sums = {"exact": 0.0, "plain": 0.0, "bent": 0.0}
    slopes, bends = np.zeros(3), np.zeros(3)
    for layer in stats:
        f, g = dense(stats, name, layer)
        eye, v = torch.eye(len(f)).double(), gradient[layer].gradient.flatten()
        p = f + DAMPING * eye
        sums["exact"] += (best := float(v @ torch.linalg.solve(p, v)))
        sums["plain"] += (plain := float(v @ v))
        sums["bent"] += (bent := float(v @ p @ v))
        cells = table.sel(layer=layer, approximator=name)
        assert float(cells["gradient_decrease"]) == pytest.approx(plain**2 / bent / best)
        for at, ratio in enumerate([0.01, 1.0, 10.0]):
            mu, slope, bend = ratio * DAMPING, np.nan, np.nan
            if positive(g, mu):
                step = torch.linalg.solve(g + mu * eye, v)
                slope, bend = float(v @ step), float(step @ p @ step)
            slopes[at], bends[at] = slopes[at] + slope, bends[at] + bend
            share = slope**2 / bend / best
            share = pytest.approx(share, rel=1e-10, nan_ok=True)
            assert float(cells["decrease"][at]) == share
    shares = slopes**2 / bends / sums["exact"]
    whole = table.sel(approximator=name)["network_decrease"].values
    np.testing.assert_allclose(whole, shares, rtol=1e-10)
    level = sums["plain"] ** 2 / sums["bent"] / sums["exact"]
    assert float(table["network_gradient_decrease"]) == pytest.approx(level)
    (line,) = best_dampings(table)
    best = int(np.nanargmax(shares))
    own = ["0.01 λ", "λ", "10 λ"][best]
    assert f"`{name}` is best at μ = {own} ({shares[best]:.3g})" in line
    assert ("nowhere better" in line) == (not (shares > level + 1e-6).any())
    grid = fl.plots.own_dampings(table, ["2"])
    axes = grid.axes_dict["all layers together"]
    drawn = {one.get_label(): one.get_ydata() for one in axes.lines}
    np.testing.assert_allclose(drawn[name], shares)
    np.testing.assert_allclose(drawn["the gradient"], level)
    assert axes.collections[0].get_offsets()[0, 0] == table["own_damping"][best]
    assert grid.axes_dict["2"].get_title() == "layer 2 · Linear 3→3"
    plt.close("all")
    with pytest.raises(ValueError, match="holds no steps"):
        fl.plots.own_dampings(table.drop_vars("decrease"))


def test_methods_without_a_step_in_every_layer_share_a_line():
    table = xr.Dataset(
        {
            "network_decrease": (("approximator", "own_damping"), [[np.nan], [np.nan]]),
            "network_gradient_decrease": 0.1,
        },
        {"approximator": ["kfac", "kpsvd"], "own_damping": [1.0]},
    )
    assert best_dampings(table) == [
        "`kfac` and `kpsvd` have no μ with a step in every layer"
    ]


@pytest.mark.parametrize("name", ["kfac", "kpsvd-2", "diagonal"])
def test_a_factored_damping_is_that_of_the_factors(name, network):
    """Beside F + λI; what has no Kronecker factors is damped beside the matrix."""
    model, data, stats = network
    gradient = fl.mean_gradient(model, data, fl.Categorical())
    found, status = judged(
        stats, name, purposes.Step(gradient, fl.Factored(DAMPING), grid=()), "0"
    )
    assert status == "ok"
    v = gradient["0"].gradient.flatten()
    eye = torch.eye(len(v)).double()
    exact = fl.ExactBlock()(stats["0"]).to_dense() + DAMPING * eye
    approx = fl.approximators()[name](stats["0"])
    damped = approx.to_dense() + DAMPING * eye
    if name != "diagonal":
        inverse = approx.inverse(fl.Factored(DAMPING))
        damped = torch.linalg.inv(inverse.to_dense())
    step, best = torch.linalg.solve(damped, v), torch.linalg.solve(exact, v)
    share = float((v @ step) ** 2 / ((step @ exact @ step) * (v @ best)))
    check(found, {"f_cosine_squared": share})


def test_a_relative_damping_is_that_of_each_block(network):
    model, data, stats = network
    gradient = fl.mean_gradient(model, data, fl.Categorical())
    found = judge(
        stats, ["kfac"], [purposes.Step(gradient, fl.RelativeDamping(0.5), grid=())]
    )
    for name in stats:
        mean = fl.ExactBlock()(stats[name]).trace() / gradient[name].gradient.numel()
        one = judge(stats, ["kfac"], [purposes.Step(gradient, 0.5 * mean, grid=())])
        np.testing.assert_allclose(
            found["value"].sel(layer=name), one["value"].sel(layer=name), rtol=1e-10
        )


@pytest.mark.parametrize(
    ("name", "holder", "asked"),
    [
        ("mini-block", fl.operators.MiniBlocks, "__init__"),
        ("kpsvd-2", torch.linalg, "svdvals"),
    ],
)
def test_what_dampings_share_is_done_and_counted_once(name, holder, asked, monkeypatch):
    data = normal(40, 5, seed=1), None
    stats = fl.collect(torch.nn.Linear(5, 4).double(), data, fl.Categorical())
    method, gradient = fl.approximators()[name], {"weight": torch.ones(4, 6).double()}
    calls, real = [], getattr(holder, asked)
    monkeypatch.setattr(holder, asked, lambda *a, **k: (real(*a, **k), calls.append(1))[0])
    made = []
    for grid in [(1.0,), purposes.step.GRID]:
        judge(stats, {name: method}, [purposes.Step(gradient, 1.0, grid)])
        made.append(len(calls))
        calls.clear()
    assert made[0] == made[1] > 0

    samples = fl.ExactBlock()(stats["weight"]).samples
    few, many = (
        judging._method(samples, method, purposes.base.Demand(k, products=0)).flops
        for k in (1, 101)
    )
    assert (many - few) / 100 == pytest.approx(counts.counted(samples, method).one_more())
    assert few > counts.counted(samples, method).prepared().flops > 0


@pytest.mark.parametrize("shape", [(12,), (3, 3, 2)])
@pytest.mark.parametrize("examples", [2, 40])
def test_eigenvectors_are_counted_as_they_are_made(shape, examples):
    net = torch.nn.Linear(12, 9) if len(shape) == 1 else torch.nn.Conv2d(3, 9, 2)
    model = torch.nn.Sequential(net, torch.nn.Flatten()).double()
    data = normal(examples, *shape, seed=1), None
    stats = fl.collect(model, data, fl.Gaussian(), fl.MonteCarlo(1))["0"]
    with decomposed_once(*stats.rows):
        bases = fl.KFAC()(stats).eigenform().basis.pair
        found = tuple(basis.shape[1] for basis in bases)
    assert found == counts.widths(fl.ExactBlock()(stats).samples)
    assert (found < stats.block.weight_shape) == (examples == 2)


@pytest.mark.parametrize("name", ["mini-block", "low-rank", "kfac"])
def test_only_products_of_factors_have_divergences_by_tables(name):
    """A mini-block's were counted as K-FAC's, and a report of 1 s took minutes."""
    o, i, n = 30, 40, 8
    layer = torch.nn.Linear(i, o, bias=False).double()
    stats = fl.collect(layer, (normal(n, i, seed=1), None), fl.Gaussian(), fl.MonteCarlo(1))
    cell = counts.counted(
        fl.ExactBlock()(stats["weight"]).samples, fl.approximators()[name]
    )
    found, inverse = cell.divergences().flops, cell.against_inverse().flops
    assert (found < inverse) == (name == "kfac")
    if name == "mini-block":  # in the examples, which are fewer than the inputs
        assert counts.BATCHED * o * n**3 < found < o * i**3


def test_what_fits_in_every_layer_is_taken_before_scattered_cells():
    flops = {"wide": (2.0, 8.0), "narrow": (1.0, 90.0)}
    cells = {
        (layer, method, "step"): counts.Work(of[row])
        for method, of in flops.items()
        for row, layer in enumerate("ab")
    }
    shared = {(layer, "step"): counts.Work(0) for layer in "ab"}
    found = chosen(cells, shared, 2, Allowance(10.0, 1e9))
    assert set(found.reasons) == {("a", "narrow", "step"), ("b", "narrow", "step")}
    assert found.flops == 10
    assert set(chosen(cells, shared, 2, Allowance(11.0, 1e9)).reasons) == {
        ("b", "narrow", "step")
    }


def test_the_exact_block_alone_takes_no_time_from_methods():
    own = {"step": 8, "laplace": 100}
    cells = {("a", "kfac", part): counts.Work(flops) for part, flops in own.items()}
    cells |= {("a", "exact", part): counts.Work(0) for part in own}
    shared = {("a", "step"): counts.Work(1), ("a", "laplace"): counts.Work(5)}
    left = chosen(cells, shared, 2, Allowance(10.0, 1e9)).reasons
    assert set(left) == {("a", "kfac", "laplace"), ("a", "exact", "laplace")}


def test_a_method_is_built_once_for_all_purposes():
    keys = [("a", "kfac", "step"), ("a", "kfac", "laplace")]
    shared = {("a", part): counts.Work(0) for _, _, part in keys}
    cells, built = dict.fromkeys(keys, counts.Work(1)), {("a", "kfac"): counts.Work(7)}
    assert chosen(cells, shared, 1, Allowance(9.0, 1e9), built).reasons == {}
    assert len(chosen(cells, shared, 1, Allowance(8.5, 1e9), built).reasons) == 1


def test_what_exceeds_the_time_is_left_out_and_named(network):
    _, _, stats = network
    whole = fl.compare(stats, ["kfac", "diagonal"], purpose=fl.Matrix())
    assert (whole["status"] == "ok").all()
    found = fl.compare(stats, ["kfac", "diagonal"], purpose=fl.Matrix(), time=1e-9)
    assert found["value"].isnull().all()
    told = str(found["status"].values[0, 0, 0])
    assert told.startswith("left out for size: the approximation and its errors")
    assert told.endswith("ask with --time")


def test_why_a_measure_is_missing_is_its_own_reason():
    def refuse():
        raise ValueError("no such form")

    found = purposes.base.numbers(one=lambda: 1.0, two=refuse, three=refuse)
    assert float(found["one"]) == 1
    assert torch.isnan(found["two"])
    assert str(found["why"]) == "no such form"


@pytest.mark.parametrize("layer", ["0", "2"])
@pytest.mark.parametrize("name", EVERY)
def test_posteriors_are_those_of_formed_matrices(name, layer, network):
    model, _, stats = network
    held_out = normal(5, 4, seed=7), torch.arange(5) % 3
    given = purposes.HeldOut.of(model, held_out)
    prior, size = 0.6, N
    purpose = purposes.Laplace(prior, size, given)
    found, status = judged(stats, name, purpose, layer)
    f, g = dense(stats, name, layer)
    eye = torch.eye(len(f)).double()
    if not positive(g, prior / size):
        assert np.isnan(found["kl"])
        assert "positive definite" in status
        return
    exact, own = (torch.linalg.inv(size * m + prior * eye) for m in (f, g))

    def kl(a, b):
        trace = torch.trace(torch.linalg.solve(b, a))
        return float(trace - len(a) + b.logdet() - a.logdet()) / 2

    rows = given.jacobians[layer].samples.matrices().flatten(2)
    jacobian = output_jacobian(model, held_out[0], layer)
    assert_close(rows.transpose(0, 1), jacobian, 1e-10)
    before, after = (torch.einsum("vni,ij,vnj->vn", rows, s, rows) for s in (exact, own))
    errors = (after - before).abs() / before
    check(
        found,
        {
            "kl": kl(exact, own),
            "reverse_kl": kl(own, exact),
            "log_evidence": float(own.logdet() - exact.logdet()) / 2,
            "variance_error": float(errors.mean()),
            "worst_variance_error": float(errors.max()),
            "nll": predictive_loss(given, after) - predictive_loss(given, before),
        },
    )


def test_answers_are_the_same_however_few_weights_are_solved_for_at_once(
    network, monkeypatch
):
    model, data, stats = network
    held = purposes.HeldOut.of(model, (normal(5, 4, seed=7), torch.arange(5) % 3))
    losses = fl.collect(model, data, fl.Categorical(), fl.Empirical())
    asked = [purposes.Laplace(0.6, N, held), purposes.Influence(DAMPING, losses, losses)]
    whole = judge(stats, ["kfac", "ekfac"], asked)["value"]
    solved, most = FactoredFisher.solve, []

    def noted(self, w, damping=0.0):
        most.append(w.shape[:-2].numel())
        return solved(self, w, damping)

    monkeypatch.setattr(FactoredFisher, "solve", noted)
    monkeypatch.setattr("fisherlab.purposes.base.SOLVED_BYTES", 2 * 8 * 3 * 5)
    again = judge(stats, ["kfac", "ekfac"], asked)["value"]
    assert max(most) == 2  # of three outputs and five examples
    xr.testing.assert_allclose(again, whole, rtol=1e-9)


@pytest.mark.parametrize("name", ["kpsvd-2", "kfac-corrected"])
def test_posteriors_of_sums_too_large_to_diagonalise(name, network, monkeypatch):
    """They go through a Cholesky factor, which also solves for the variances."""
    for where in ("fisherlab.operators.kronecker", "fisherlab.metrics.pairs"):
        monkeypatch.setattr(f"{where}.DENSE_ROWS", 0)
    assert positive(dense(network[2], name, "2")[1], 0.6 / N)
    diagonalised = fl.operators.KroneckerSum.eigenvalues
    monkeypatch.setattr(
        fl.operators.KroneckerSum,
        "eigenvalues",
        lambda s: pytest.fail("diagonalised") if len(s.terms) > 1 else diagonalised(s),
    )
    test_posteriors_are_those_of_formed_matrices(name, "2", network)


@pytest.mark.parametrize("prior", [0.6, 1e-4])
def test_what_is_left_out_for_size_is_called_indefinite_if_it_is(
    prior, network, monkeypatch
):
    _, data, stats = network
    skipped = {("0", "kpsvd-2", "laplace"): "left out for size"}
    monkeypatch.setattr(analysis_of_purposes, "left_out", lambda *_: skipped)
    asked = [
        purposes.Step(fl.mean_gradient(network[0], data, fl.Categorical()), DAMPING),
        purposes.Laplace(prior, N),
    ]
    found = judge(stats, ["kpsvd-2"], asked, Allowance(1.0, 1.0))
    status = str(found["status"].sel(layer="0", purpose="laplace").item())
    usable = positive(dense(stats, "kpsvd-2", "0")[1], prior / N)
    assert usable == (prior == 0.6)
    assert status.startswith("left out" if usable else "not positive definite")


def output_jacobian(model, x, layer):
    """J of (N, K, p) by autograd, the bias in the last column of the weight."""
    rows = []
    for one in x:
        linear = model.get_submodule(layer)
        for output in model(one):
            grads = torch.autograd.grad(
                output, [linear.weight, linear.bias], retain_graph=True
            )
            rows.append(torch.cat([grads[0], grads[1][:, None]], 1).flatten())
    return torch.stack(rows).view(len(x), 3, -1)


def predictive_loss(given, variances):
    scale = (1 + torch.pi / 8 * variances.T).rsqrt()
    chosen = (given.outputs * scale).log_softmax(1)[range(5), given.labels]
    return -float(chosen.mean())


@pytest.mark.parametrize("name", EVERY)
def test_influences_are_those_of_formed_matrices(name, network):
    model, data, stats = network
    losses = fl.collect(model, data, fl.Categorical(), fl.Empirical())
    queries = fl.collect(
        model, (normal(4, 4, seed=5), torch.arange(4) % 3), fl.Categorical(), fl.Empirical()
    )
    purpose = purposes.Influence(DAMPING, queries, losses, top=3)
    found, status = judged(stats, name, purpose, "0")
    f, g = dense(stats, name, "0")
    if not positive(g, DAMPING):
        assert "positive definite" in status
        return
    eye = torch.eye(len(f)).double()
    rows, asked = (s["0"].samples.matrices()[0].flatten(1) for s in (losses, queries))
    scores = [asked @ torch.linalg.solve(m + DAMPING * eye, rows.T) for m in (f, g)]
    own = [(rows * torch.linalg.solve(m + DAMPING * eye, rows.T).T).sum(1) for m in (f, g)]
    ranks = [spearmanr(a, b).statistic for a, b in zip(*scores, strict=True)]
    tops = [[set(np.argsort(-row.numpy())[:3]) for row in s] for s in scores]
    shared = [len(a & b) / 3 for a, b in zip(*tops, strict=True)]
    check(
        found,
        {
            "rank_correlation": np.median(ranks),
            "top_overlap": np.median(shared),
            "self_rank_correlation": spearmanr(*own).statistic,
        },
    )


@pytest.mark.parametrize("damping", [DAMPING, 1e-5])
@pytest.mark.parametrize("name", EVERY)
def test_saliencies_are_those_of_formed_matrices(name, damping, network):
    model, _, stats = network
    weights = dict(model.named_parameters())
    found, status = judged(stats, name, purposes.Pruning(weights, damping, 0.4), "0")
    f, g = dense(stats, name, "0")
    linear = model[0]
    w = torch.cat([linear.weight, linear.bias[:, None]], 1).detach().flatten()
    eye, count = torch.eye(len(f)).double(), round(0.4 * len(f))
    expected = {}
    saliencies = {
        "obd": [w**2 / 2 * m.diagonal() for m in (f, g)],
        "obs": [w**2 / 2 / torch.linalg.inv(m + damping * eye).diagonal() for m in (f, g)],
    }
    if not positive(g, damping):  # keeps its own diagonal from no one
        assert "positive definite" in status
        del saliencies["obs"]
        assert all(np.isnan(v) == n.startswith("obs") for n, v in found.items())
    for kind, both in saliencies.items():
        gone = [s.argsort()[:count] for s in both]
        costs = []
        for index in gone:
            delta = torch.zeros_like(w)
            delta[index] = w[index]
            costs.append(float(delta @ f @ delta) / 2)
        common = set(gone[0].tolist()) & set(gone[1].tolist())
        expected |= {
            f"{kind}_overlap": len(common) / count,
            f"{kind}_rank_correlation": spearmanr(*both).statistic,
            f"{kind}_increase": costs[1] / costs[0],
        }
    check(found, expected)


class Negative:
    """A matrix with penalties below zero, as an indefinite sum may have."""

    def __call__(self, statistics, previous=None):
        return fl.operators.Dense(-fl.ExactBlock()(statistics).to_dense(), (3, 5))


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_a_drift_that_the_exact_matrix_does_not_see_has_no_ratio(dtype):
    """The same number added to every logit: 1e16 or 1e31, whatever rounding left."""
    torch.manual_seed(0)
    model, x = nn.Linear(4, 3, dtype=dtype), torch.randn(9, 4, dtype=dtype)
    stats = fl.collect(model, (x, None), fl.Categorical())
    here = {n: p.detach() for n, p in model.named_parameters()}
    shifted = {n: p + 0.1 for n, p in here.items()}
    seen = {"weight": here["weight"] + torch.eye(3, 4, dtype=dtype), "bias": here["bias"]}

    def ratio(*others):
        judged = fl.compare(stats, ["kfac"], purpose=fl.EWC(here, others))
        return float(judged["value"].sel(measure="ewc.penalty_ratio").squeeze())

    assert math.isnan(ratio(shifted))
    against = fl.compare(
        stats, {"minus": Negative()}, purpose=fl.EWC(here, [seen], random=4)
    )["value"].squeeze()
    assert float(against.sel(measure="ewc.penalty_ratio")) == pytest.approx(-1, rel=1e-5)
    assert float(against.sel(measure="ewc.random_ratio")) == pytest.approx(-1, rel=1e-5)
    assert ratio(shifted, seen) == pytest.approx(ratio(seen), rel=1e-5)


@pytest.mark.parametrize("name", EVERY)
def test_penalties_and_sharpness_are_those_of_formed_matrices(name, network):
    model, _, stats = network
    here = dict(model.named_parameters())
    there = {key: value + 0.1 * value.square() for key, value in here.items()}
    found, _ = judged(stats, name, purposes.EWC(here, [there], random=4), "2")
    f, g = dense(stats, name, "2")
    delta = torch.cat(
        [
            (there[f"2.{n}"] - here[f"2.{n}"]).detach().view(3, -1)
            for n in ("weight", "bias")
        ],
        1,
    ).flatten()
    check(found, {"penalty_ratio": float((delta @ g @ delta) / (delta @ f @ delta))})
    sharp, _ = judged(stats, name, purposes.Sharpness(), "2")
    values = [torch.linalg.eigvalsh(m) for m in (f, g)]
    ranks = [float(v.sum() ** 2 / v.square().sum()) for v in values]
    check(
        sharp,
        {
            "top_ratio": float(values[1][-1] / values[0][-1]),
            "trace_ratio": float(values[1].sum() / values[0].sum()),
            "rank_ratio": ranks[1] / ranks[0],
        },
    )
    matrix, _ = judged(stats, name, purposes.Matrix(), "2")
    error = float((f - g).norm() / f.norm())
    assert matrix["frobenius_error"] == pytest.approx(error, rel=1e-8, abs=2e-6)


@pytest.mark.parametrize("name", ["kfac", "mini-block", "diagonal"])
def test_losses_without_pruned_weights_are_those_of_a_pruned_copy(name, network):
    model, data, stats = network
    batch_norm = torch.nn.BatchNorm1d(4).double()
    whole = torch.nn.Sequential(batch_norm, *model).train()
    stats = fl.collect(whole.eval(), data, fl.Categorical(), layers=["1", "3"])
    whole.train()
    before = {key: value.clone() for key, value in whole.state_dict().items()}
    purpose = purposes.Pruning.of(whole, data, fl.Categorical(), DAMPING, 0.4, [0.7])
    found = judge(stats, [name], [purpose]).isel(approximator=0)
    assert set(found["status"].values.ravel()) == {"ok"}
    assert all(torch.equal(value, before[key]) for key, value in whole.state_dict().items())
    assert whole.training
    assert all(p.grad is None for p in whole.parameters())

    def without(layers, kind, share, which):
        """Zero the smallest saliencies in a copy: loss, and what the exact block says."""
        copied, predicted = copy.deepcopy(whole).eval(), 0.0
        for layer in layers:
            matrices = dense(stats, name, layer)
            f, own = matrices[0], matrices[which]
            linear = copied.get_submodule(layer)
            w = torch.cat([linear.weight, linear.bias[:, None]], 1).detach()
            diagonal = own.diagonal()
            if kind == "obs":
                shifted = own + DAMPING * torch.eye(len(own)).double()
                diagonal = 1 / torch.linalg.inv(shifted).diagonal()
            gone = (w.flatten().square() * diagonal).argsort()[: round(share * w.numel())]
            left = w.flatten().clone()
            left[gone] = 0
            delta = w.flatten() - left
            predicted += float(delta @ f @ delta) / 2
            with torch.no_grad():
                linear.weight.copy_(left.view_as(w)[:, :-1])
                linear.bias.copy_(left.view_as(w)[:, -1])
        with torch.no_grad():
            return float(
                torch.nn.functional.cross_entropy(copied(data[0]), data[1])
            ), predicted

    for share, end in [(0.4, ""), (0.7, "_0.7")]:
        for kind in ("obd", "obs"):
            for layers in (["1"], ["3"], ["1", "3"]):
                table = (
                    found["value"].sel(layer=layers[0])
                    if len(layers) < 2
                    else found["network"]
                )
                exact, own = (without(layers, kind, share, which) for which in (0, 1))
                for place, what in enumerate(("realised", "predicted")):
                    told = float(table.sel(measure=f"pruning.{kind}_{what}{end}"))
                    assert told == pytest.approx(own[place] - exact[place], abs=1e-12)


def test_pruning_refuses_what_it_cannot_measure(network):
    model, data, stats = network
    with pytest.raises(ValueError, match="different shares between 0 and 1"):
        purposes.Pruning.of(model, data, fl.Categorical(), share=0.4, shares=[0.4])
    with pytest.raises(ValueError, match="different shares between 0 and 1"):
        purposes.Pruning.of(model, data, fl.Categorical(), share=0.4, shares=[0.40001])
    unlabelled = purposes.Pruning.of(model, (data[0], None), fl.Categorical())
    found = judge(stats, ["kfac"], [unlabelled, purposes.Sharpness()])
    status = found["status"].isel(approximator=0)
    assert all("without labels" in str(one) for one in status.sel(purpose="pruning").values)
    assert (status.sel(purpose="sharpness") == "ok").all()


def all_purposes(network):
    model, data, _ = network
    weights = dict(model.named_parameters())
    losses = fl.collect(model, data, fl.Categorical(), fl.Empirical())
    there = {key: value + 0.1 * value.square() for key, value in weights.items()}
    return [
        purposes.Step(fl.mean_gradient(model, data, fl.Categorical()), DAMPING),
        purposes.Laplace(0.5, N, purposes.HeldOut.of(model, data)),
        purposes.Influence(DAMPING, losses, losses, top=3),
        purposes.Pruning.of(model, data, fl.Categorical(), DAMPING),
        purposes.EWC(weights, [there], random=4),
        purposes.Sharpness(),
        purposes.Matrix(),
    ]


def test_the_exact_block_is_the_best_in_every_purpose(network):
    found = judge(network[2], {"exact": fl.ExactBlock()}, all_purposes(network))
    assert (found["status"] == "ok").all()
    for values in (
        found["value"].isel(approximator=0),
        found["network"].isel(approximator=0),
    ):
        best = found["best"].broadcast_like(values)
        np.testing.assert_allclose(values.values, best.values, atol=1e-9)


def by_example(stats, layer):
    """What every example adds to F, (n, p, p), from formed matrices."""
    d = stats[layer].samples.matrices().flatten(2)
    return torch.einsum("vnp,vnq->npq", d, d) / stats[layer].count


def moved(measure, blocks):
    """Derivatives of a measure of F by the weight of every example, centred."""
    step, found = 1e-4, []
    for n in range(len(blocks[0])):
        ends = []
        for sign in (1, -1):
            turned = [f.sum(0) + sign * step * (f[n] - f.mean(0)) for f in blocks]
            ends.append(measure(turned))
        found.append((ends[0] - ends[1]) / (2 * step))
    return torch.tensor(found).double()


def share_reached(vectors, steps, damping):
    """The share of the exact decrease along given steps, by F."""

    def measure(blocks):
        slope = curvature = goal = 0.0
        for f, v, taken in zip(blocks, vectors, steps, strict=True):
            p = f + damping * torch.eye(len(f)).double()
            slope += float(v @ taken)
            curvature += float(taken @ p @ taken)
            goal += float(v @ torch.linalg.solve(p, v))
        return slope**2 / (curvature * goal)

    return measure


def posterior_divergence(matrices, damping):
    """KL(exact ‖ own) of given F̂, by F."""

    def measure(blocks):
        total = 0.0
        for f, g in zip(blocks, matrices, strict=True):
            eye = damping * torch.eye(len(f)).double()
            p, q = f + eye, g + eye
            inside = torch.linalg.solve(p, q).trace() - len(f) + p.logdet() - q.logdet()
            total += float(inside) / 2
        return total

    return measure


def frobenius(matrices):
    """The relative error of given F̂, by F."""

    def measure(blocks):
        pairs = list(zip(blocks, matrices, strict=True))
        rest = sum(float((f - g).square().sum()) for f, g in pairs)
        return (rest / sum(float(f.square().sum()) for f in blocks)) ** 0.5

    return measure


def top_ratio(matrices):
    """The largest eigenvalue of given F̂ over that of F, by F."""

    def measure(blocks):
        mine, own = (
            max(float(torch.linalg.eigvalsh(m)[-1]) for m in some)
            for some in (blocks, matrices)
        )
        return own / mine

    return measure


def penalty_ratio(matrices, drifts):
    """The mean ratio of the penalties of given F̂ and F, by F."""

    def measure(blocks):
        ratios = []
        for deltas in drifts:
            own, mine = (
                sum(float(d @ m @ d) for d, m in zip(deltas, some, strict=True))
                for some in (matrices, blocks)
            )
            ratios.append(own / mine)
        return sum(ratios) / len(ratios)

    return measure


def spread_of_leads(moved, values):
    """Of differences of distances from 1, where every example has a normal weight."""
    weights = np.random.default_rng(1).standard_normal((50_000, moved.shape[1]))
    away = abs(values - 1 + weights @ moved.numpy().T)
    return (away[:, :, None] - away[:, None]).std(0)


CONVOLUTION = (
    lambda: nn.Sequential(nn.Conv2d(2, 3, 2), nn.Tanh(), nn.Flatten(), nn.Linear(12, 3)),
    (2, 3, 3),
)
DENSE = lambda: nn.Sequential(nn.Linear(4, 3), nn.Tanh(), nn.Linear(3, 3)), (4,)


@pytest.mark.parametrize("build", [DENSE, CONVOLUTION], ids=["dense", "convolution"])
def test_errors_of_leads_are_those_of_examples_weighted_anew(build):
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        model = build[0]().double()
    data = normal(N, *build[1], seed=1), torch.arange(N) % 3
    stats = fl.collect(model, data, fl.Categorical())
    gradient = fl.mean_gradient(model, data, fl.Categorical())
    methods = ["kfac", "kpsvd-2", "diagonal"]
    step, laplace = purposes.Step(gradient, DAMPING), purposes.Laplace(DAMPING * 20, 20)
    weights = dict(model.named_parameters())
    others = [
        {name: w + 0.1 * w.square() + k for name, w in weights.items()} for k in (0.0, 0.1)
    ]
    ewc = purposes.EWC(weights, others, random=1)
    found = judge(stats, methods, [step, laplace, ewc, purposes.Matrix()])
    rows = {name: [name] for name in stats} | {None: list(stats)}
    for row, layers in rows.items():
        blocks = [by_example(stats, name) for name in layers]
        vectors = [gradient[name].gradient.flatten() for name in layers]
        drifts = [
            [(stats[n].pack(o) - stats[n].pack(weights)).detach().flatten() for n in layers]
            for o in others
        ]
        influences = {"step": [], "laplace": [], "ewc": [], "matrix": []}
        for method in methods:
            own = [dense(stats, method, name)[1] for name in layers]
            shares = []
            for ratio in (1.0, *step.grid):
                eyes = [ratio * DAMPING * torch.eye(len(g)).double() for g in own]
                steps = [
                    torch.linalg.solve(g + e, v)
                    for g, e, v in zip(own, eyes, vectors, strict=True)
                ]
                at = share_reached(vectors, steps, DAMPING)
                shares.append((at([f.sum(0) for f in blocks]), at))
            best = max(shares, key=lambda one: one[0])[1]
            influences["step"].append(moved(best, blocks))
            influences["laplace"].append(moved(posterior_divergence(own, DAMPING), blocks))
            influences["ewc"].append(moved(penalty_ratio(own, drifts), blocks))
            influences["matrix"].append(moved(frobenius(own), blocks))
        for purpose, each in influences.items():
            table = torch.stack(each)
            expected = (table[:, None] - table).norm(dim=2)
            error = found["network_lead_error"]
            if row is not None:
                error = found["lead_error"].sel(layer=row)
            error = error.sel(purpose=purpose).transpose("approximator", "rival").values
            if purpose == "ewc":
                values = found["network"] if row is None else found["value"].sel(layer=row)
                values = values.sel(measure="ewc.penalty_ratio").values
                expected = spread_of_leads(table, values)
                np.testing.assert_allclose(error, expected, rtol=0.05, atol=1e-7)
                continue
            np.testing.assert_allclose(error, expected, rtol=1e-5, atol=1e-8)
            assert (expected + torch.eye(3) > 1e-4).all(), "there is something to see"


@pytest.mark.parametrize("limit", [512, 0], ids=["formed", "iterated"])
@pytest.mark.parametrize(("shift", "rows_held"), [(2.0, 3), (0.0, 2)])
def test_errors_of_leads_in_sharpness_need_an_eigenvalue_that_stands_alone(
    shift, rows_held, limit, monkeypatch
):
    """Inputs with a mean have one large eigenvalue in every layer, others not."""
    monkeypatch.setattr(purposes.matrix, "DENSE_ROWS", limit)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        model = nn.Sequential(nn.Linear(4, 3), nn.Tanh(), nn.Linear(3, 2)).double()
    data = normal(N, 4, seed=1) + shift, torch.arange(N) % 2
    stats = fl.collect(model, data, fl.Categorical())
    methods = ["kfac", "foof", "diagonal"]
    found = judge(stats, methods, [purposes.Sharpness()]).isel(purpose=0)
    rows = {name: [name] for name in stats} | {None: list(stats)}
    for row, layers in rows.items():
        blocks = [by_example(stats, name) for name in layers]
        tops = [torch.linalg.eigvalsh(f.sum(0)) for f in blocks]
        first, second = torch.cat(tops).sort(descending=True).values[:2].tolist()
        alone = moved(lambda some: max(torch.linalg.eigvalsh(f)[-1] for f in some), blocks)
        own = [[dense(stats, method, name)[1] for name in layers] for method in methods]
        table = torch.stack([moved(top_ratio(one), blocks) for one in own])
        held = first - second > 2 * float(alone.norm())
        rows_held -= held
        error, values = found["network_lead_error"], found["network"]
        if row is not None:
            error, values = (found[n].sel(layer=row) for n in ("lead_error", "value"))
        if held:
            values = values.sel(measure="sharpness.top_ratio").values
            expected = spread_of_leads(table, values)
            np.testing.assert_allclose(error, expected, rtol=0.05, atol=1e-7)
        else:
            assert error.isnull().all()
    assert rows_held == 0


def test_leads_of_posteriors_add_up_over_layers_of_every_size():
    """Layers that drew as many examples as each could afford had none in common."""
    model = nn.Sequential(nn.Linear(40, 30), nn.Tanh(), nn.Linear(30, 3)).double()
    data = normal(200, 40, seed=1), torch.arange(200) % 3
    stats = fl.collect(model, data, fl.Categorical())
    found = judge(stats, ["kfac", "diagonal"], [purposes.Laplace(1.0, 200)])
    assert (found["lead_error"] >= 0).all()
    assert (found["network_lead_error"] >= 0).all()
    assert float(found["network_lead_error"][0, 1, 0]) > 0


def test_what_is_kept_of_all_layers_grows_with_examples_and_not_with_weights():
    """Of GPT-2 every direction is a gigabyte, and there is one a method."""
    model = nn.Linear(40, 20).double()
    data = normal(N, 40, seed=1), torch.arange(N) % 3
    stats = fl.collect(model, data, fl.Categorical())
    gradient = fl.mean_gradient(model, data, fl.Categorical())
    asked = [purposes.Step(gradient, DAMPING), purposes.Laplace(1.0, 20)]
    by_name = analysis_of_purposes.each_once(asked)
    methods = {"kfac": fl.KFAC(), "diagonal": fl.Diagonal()}
    told = analysis_of_purposes.answered(stats, methods, by_name, None)
    assert len(told.answers) == 6
    for answer in told.answers.values():
        assert all(part.numel() <= (1 + len(asked[0].grid)) * N for part in answer.values())


@pytest.mark.parametrize(
    ("kinds", "shift"),
    [
        (["step", "laplace"], 0.0),
        pytest.param(["matrix", "ewc", "sharpness"], 2.0, marks=pytest.mark.slow),
    ],
)
def test_errors_of_leads_foretell_how_leads_differ_between_samples(kinds, shift):
    """Fixed methods against exact blocks of many samples of one population."""
    rng = torch.Generator().manual_seed(3)
    weights = torch.randn(3, 4, generator=rng).double()
    pool = torch.randn(6000, 4, generator=rng).double() + shift
    model = nn.Linear(4, 3).double()
    with torch.no_grad():
        model.weight.copy_(weights)
        model.bias.zero_()
    size = 120
    first = (pool[:size], torch.zeros(size).long())
    stats = fl.collect(model, first, fl.Categorical())
    gradient = fl.mean_gradient(model, first, fl.Categorical())
    weights = dict(model.named_parameters())
    there = {name: w + w.square() for name, w in weights.items()}
    every = {
        "step": purposes.Step(gradient, DAMPING, grid=(1.0,)),
        "laplace": purposes.Laplace(1.0, 20),
        "matrix": purposes.Matrix(),
        "ewc": purposes.EWC(weights, [there], random=1),
        "sharpness": purposes.Sharpness(),
    }
    asked, leads = [every[kind] for kind in kinds], {kind: [] for kind in kinds}
    methods = {n: fl.approximators()[n](stats["weight"]) for n in ("kfac", "diagonal")}
    fixed = {name: (lambda _, made=made: made) for name, made in methods.items()}
    for k in range(50):
        part = pool[size * k : size * (k + 1)], first[1]
        found = judge(fl.collect(model, part, fl.Categorical()), fixed, asked)
        for kind, each in leads.items():
            at = int(np.flatnonzero(found["of_purpose"] == kind)[0])
            gaps = abs(found["network"] - found["best"]).isel(measure=at).values
            error = found["network_lead_error"].sel(purpose=kind).values[0, 1]
            each.append((gaps[0] - gaps[1], error))
    for each in leads.values():
        differences, told = np.array(each).T
        assert np.median(told) == pytest.approx(differences.std(), rel=0.3)


def test_groups_of_examples_move_matrices_as_much_as_examples_do():
    """By every example the sum of squares is exact, by groups it is an estimate."""
    n, groups = 2000, purposes.matrix.GROUPS
    rows = normal(1, n, 3, 2, seed=1)
    block = FactoredFisher(MatrixSamples(rows), n)
    other = DiagonalMatrix(torch.ones(3, 2).double())
    alone = (rows.square().sum((0, 2, 3)) - rows.square().sum((0, 2, 3)).mean()) / n
    moved = purposes.matrix.inner_by_groups(block, other)
    assert moved.shape == (groups,)
    assert abs(float(moved.sum())) < 1e-12
    assert float(moved.norm()) == pytest.approx(float(alone.norm()), rel=0.3)
    parted = FactoredFisher(PartedSamples((block.samples,) * 2, block.samples), n)
    assert purposes.matrix.inner_by_groups(parted, other).shape == (0,)


def test_errors_of_leads_of_influence_foretell_how_they_differ_between_queries(network):
    """Fifty times twenty queries, of a population of which all answers are known."""
    model, data, stats = network
    x = normal(1000, 4, seed=7)
    with torch.no_grad():
        y = torch.distributions.Categorical(logits=model(x)).sample()
    queries, examples = (
        fl.collect(model, some, fl.Categorical(), fl.Empirical()) for some in ((x, y), data)
    )
    purpose = purposes.Influence(DAMPING, queries, examples, top=3)
    methods = {"": fl.ExactBlock(), "kfac": fl.KFAC(), "diagonal": fl.Diagonal()}
    by_name = analysis_of_purposes.each_once([purpose])
    told = analysis_of_purposes.answered(stats, methods, by_name, None)
    answers = {
        m: purpose.joined([told.answers[n, m, "influence"] for n in stats]) for m in methods
    }
    leads = []
    for part in range(50):
        rows = slice(20 * part, 20 * part + 20)
        some = {m: {**a, "influence": a["influence"][rows]} for m, a in answers.items()}
        pairs = {m: {None: (some[""], some[m])} for m in ("kfac", "diagonal")}
        values = np.array(
            [purpose.measure(*p[None])["rank_correlation"] for p in pairs.values()]
        )
        error = lead_errors(purpose, pairs, None, values)[0, 1]
        leads.append((values[0] - values[1], error))
    differences, errors = np.array(leads).T
    assert np.median(errors) == pytest.approx(differences.std(), rel=0.3)
    few = {m: {**a, "influence": a["influence"][:5]} for m, a in answers.items()}
    assert purpose.influences(few[""], few["kfac"]).shape == (0,)


def test_a_network_is_its_blocks_side_by_side(network):
    """The table's network is that of one dense block-diagonal matrix."""
    model, data, stats = network
    found = judge(stats, ["kfac"], all_purposes(network)).isel(approximator=0)
    numbers = dict(zip(found["measure"].values, found["network"].values, strict=True))
    blocks = [dense(stats, "kfac", name) for name in stats]
    f, g = (torch.block_diag(*parts) for parts in zip(*blocks, strict=True))
    eye = torch.eye(len(f)).double()
    gradient = fl.mean_gradient(model, data, fl.Categorical())
    v = torch.cat([one.gradient.flatten() for one in gradient.values()])
    p = f + DAMPING * eye
    best, step = torch.linalg.solve(p, v), torch.linalg.solve(g + DAMPING * eye, v)
    share = float((v @ step) ** 2 / ((step @ p @ step) * (v @ best)))
    a, b = f + 0.5 / N * eye, g + 0.5 / N * eye
    expected = {
        "step.f_cosine_squared": share,
        "step.direction_cosine": float(step @ best / step.norm() / best.norm()),
        "laplace.log_evidence": float(a.logdet() - b.logdet()) / 2,
        "matrix.frobenius_error": float((f - g).norm() / f.norm()),
        "sharpness.top_ratio": float(
            torch.linalg.eigvalsh(g)[-1] / torch.linalg.eigvalsh(f)[-1]
        ),
    }
    check(numbers, expected)


def test_methods_that_lack_a_small_layer_are_held_together_over_the_others():
    """K-FAC has no block of a layer norm: the rest is as if that layer were not asked."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        layers = nn.Linear(8, 3), nn.LayerNorm(3), nn.Linear(3, 20)
        model = nn.Sequential(*layers).double()
    data, likelihood = (normal(N, 8, seed=1), torch.arange(N) % 20), fl.Categorical()
    gradient = fl.mean_gradient(model, data, likelihood)
    asked = [
        fl.Step(gradient, DAMPING),
        fl.Laplace(1.0, N),
        fl.Pruning.of(model, data, likelihood, DAMPING),
        fl.Matrix(),
    ]
    methods = ["kfac", "kpsvd", "diagonal"]
    found, rest = (
        judge(fl.collect(model, data, likelihood, layers=names), methods, asked)
        for names in (None, ["0", "2"])
    )
    assert found["common_layers"].values.tolist() == [[1] * 4, [0] * 4, [1] * 4]
    np.testing.assert_allclose(found["common"], rest["network"], rtol=1e-12, atol=1e-14)
    assert rest["network"].notnull().all()
    assert found["network"].sel(approximator="kfac").isnull().all()
    line = fl.analysis.verdict(found)[0]
    assert line.startswith("step: Over 2 of 3 layers (95 % of the parameters) `")


def test_what_a_purpose_was_not_given_is_a_status(network):
    _, _, stats = network
    found = judge(stats, ["kfac"], [purposes.Step({}, DAMPING), purposes.Sharpness()])
    assert "no gradient of block" in str(found["status"].sel(purpose="step").values[0, 0])
    assert (found["status"].sel(purpose="sharpness") == "ok").all()
    with pytest.raises(ValueError, match="each once"):
        judge(stats, ["kfac"], [purposes.Matrix(), purposes.Matrix()])
    with pytest.raises(ValueError, match="damping= was given beside purpose="):
        fl.compare(stats, ["kfac"], purpose=fl.Matrix(), damping=0.1)
    assert fl.compare(stats, ["kfac"], purpose=fl.Matrix()).sizes["measure"] == 3


class Diagonal:
    """A purpose of a user's own."""

    name = "mine"
    measures = (purposes.Measure("gap", "largest gap of the diagonals", 0.0),)

    def answers(self, layer, pair):
        return {"diagonal": pair.approx.diagonal().flatten()}

    def joined(self, blocks):
        return {"diagonal": torch.cat([one["diagonal"] for one in blocks])}

    def measure(self, exact, approx):
        return {"gap": float((exact["diagonal"] - approx["diagonal"]).abs().max())}


def test_a_measure_that_fails_is_a_status_and_not_the_end_of_the_table(network):
    class Broken(Diagonal):
        name = "broken"

        def measure(self, exact, approx):
            raise ZeroDivisionError("nothing to divide by")

    found = fl.compare(network[2], ["kfac"], purpose=[Broken(), fl.Matrix()])
    assert found["value"].sel(measure="broken.gap").isnull().all()
    assert (found["status"].sel(purpose="broken") == "nothing to divide by").all()
    assert found["network"].sel(measure="matrix.frobenius_error").notnull().all()


def test_every_measure_without_a_number_is_named(network):
    class Numberless(Diagonal):
        name = "numberless"
        measures = tuple(purposes.Measure(name, name, 0.0) for name in ("gap", "lag"))

        def measure(self, exact, approx):
            return {"gap": float("nan"), "lag": float("nan")}

    found = fl.compare(network[2], ["kfac"], purpose=Numberless())
    assert found["status"].str.endswith("size or scale: gap lag").all()


def test_influences_that_fail_leave_leads_without_an_error(network):
    class Broken(Diagonal):
        def influences(self, exact, approx):
            return exact["nothing of this name"]

    found = fl.compare(network[2], ["kfac", "diagonal"], purpose=[Broken(), fl.Matrix()])
    assert found["value"].sel(measure="mine.gap").notnull().all()
    assert found["lead_error"].sel(purpose="mine").isnull().all()
    assert found["lead_error"].sel(purpose="matrix").notnull().all()


def test_what_a_dead_layer_and_a_huge_one_have_is_a_status(network):
    model, (x, y), _ = network
    twin = copy.deepcopy(model)
    twin[2].weight.data.zero_()
    for scale in (1.0, 1e150):
        stats = fl.collect(twin, (scale * x, y), fl.Categorical())
        gradient = fl.mean_gradient(twin, (scale * x, y), fl.Categorical())
        asked = [
            fl.Step(gradient, DAMPING),
            fl.Laplace(1.0, N),
            fl.Sharpness(),
            fl.Matrix(),
        ]
        found = fl.compare(stats, ["kfac", "diagonal"], purpose=asked)
        missing = found["value"].isnull().groupby("of_purpose").any().to_numpy()
        assert missing.any()
        assert not found["status"].str.contains("by zero|out of range").any()


def labelled(outputs, labels):
    none = fl.statistics.Statistics({}, fl.operators.Provenance())
    return purposes.HeldOut(none, torch.zeros(*outputs), labels)


@pytest.mark.parametrize(
    ("outputs", "labels"),
    [
        ((3, 1), torch.tensor([0, 1, 0])),
        ((3, 1), torch.zeros(3, 1)),
        ((3, 2), torch.zeros(3, 2)),
        ((3, 2), torch.tensor([0, 1, 2])),
        ((3, 2), torch.tensor([0, 1, -100])),
        ((3, 2), torch.tensor([0, 1])),
        ((3, 2), torch.tensor([True, False, True])),
        ((3, 5, 2), torch.zeros(3, 5, dtype=torch.long)),
    ],
)
def test_labels_without_a_probability_under_the_probit_predictive_are_refused(
    outputs, labels
):
    """-100 counted as a mistake of the calibration, numbers as probabilities."""
    with refused("HeldOut: labels .*one class an example"):
        labelled(outputs, labels)
    assert labelled(outputs, None).labels is None


class Difference(torch.nn.Module):
    """A model of two inputs."""

    def __init__(self):
        super().__init__()
        self.part = torch.nn.Linear(4, 3)

    def forward(self, one, other):
        return self.part(one) - 2 * self.part(other).tanh()


def test_held_out_data_are_taken_as_statistics_take_data():
    model, (one, other) = Difference(), (normal(5, 4, seed=1), normal(5, 4, seed=2))
    labels = torch.tensor([0, 2, 1, 1, 0])
    positional = fl.HeldOut.of(model, ((one, other), labels))
    named = fl.HeldOut.of(model, ({"one": one, "other": other}, labels))
    loader = [((one[part], other[part]), labels[part]) for part in (slice(2), slice(2, 5))]
    for given in (positional, named, fl.HeldOut.of(model, loader)):
        torch.testing.assert_close(
            given.outputs, model(one.float(), other.float()).detach()
        )
        assert torch.equal(given.labels, labels)
        assert given.jacobians["part"].count == 5


def test_a_purpose_of_ones_own_is_a_column(network, tmp_path):
    found = fl.compare(network[2], ["diagonal", "kfac"], purpose=[Diagonal(), fl.Matrix()])
    gaps = found["value"].sel(measure="mine.gap")
    assert (gaps.sel(approximator="diagonal") == 0).all()
    assert (gaps.sel(approximator="kfac") > 0).all()
    assert fl.open(fl.save(found, tmp_path / "a.nc")).identical(found)


def test_influence_is_leave_one_out_of_a_linear_model():
    """For least squares the influence is the change of a prediction without an example."""
    x, w = normal(30, 3, seed=1), normal(1, 3, seed=2)
    y = x @ w.T + 0.1 * normal(30, 1, seed=3)
    ridge = 0.4
    eye = torch.eye(3).double()

    def fitted(keep):
        a, b = x[keep], y[keep]
        return torch.linalg.solve(a.T @ a + ridge * eye, a.T @ b).T

    model = torch.nn.Linear(3, 1, bias=False).double()
    with torch.no_grad():
        model.weight.copy_(fitted(torch.arange(30)))
    stats = fl.collect(model, (x, y), fl.Gaussian())
    rows = fl.collect(model, (x, y), fl.Gaussian(), fl.Empirical())
    purpose = purposes.Influence(ridge / 30, rows, rows)
    exact = fl.ExactBlock()(stats["weight"])
    pair = fl.metrics.pairs.Pair(exact, exact)
    own = purpose.answers(stats["weight"], pair)["own"] / 30
    for n in range(30):
        keep = torch.arange(30) != n
        change = fitted(keep) - model.weight.detach()
        gradient = rows["weight"].samples.matrices()[0, n]
        leverage = float(x[n] @ torch.linalg.solve(x.T @ x + ridge * eye, x[n]))
        # Sherman and Morrison: without n the change is the influence over 1 − leverage.
        assert float((change * gradient).sum()) * (1 - leverage) == pytest.approx(
            float(own[n]), rel=1e-8
        )


def test_a_posterior_says_on_how_many_examples_it_predicts(network):
    model, (x, y), _ = network
    held = purposes.HeldOut.of(model, (x[:7], y[:7]))
    assert purposes.Laplace(1.0, N, held).setting.endswith(
        "variances on 7 held-out examples"
    )
    assert "variances" not in purposes.Laplace(1.0, N).setting


def test_posterior_variances_are_those_of_samples(network):
    model, data, stats = network
    given = purposes.HeldOut.of(model, data)
    purpose = purposes.Laplace(2.0, N, given)
    exact = fl.ExactBlock()(stats["2"]).to(torch.float64)
    answers = purpose.answers(stats["2"], fl.metrics.pairs.Pair(exact, exact))
    covariance = torch.linalg.inv(N * exact.to_dense() + 2.0 * torch.eye(12).double())
    root = torch.linalg.cholesky(covariance)
    drawn = normal(20_000, 12, seed=4) @ root.T
    rows = given.jacobians["2"].samples.matrices().flatten(2)
    spread = torch.einsum("vni,si->svn", rows, drawn).var(0)
    torch.testing.assert_close(answers["variances"], spread, rtol=0.06, atol=0)


def test_every_measure_of_a_purpose_is_drawn(network):
    found = fl.compare(network[2], ["kfac", "kpsvd-2"], purpose=all_purposes(network))
    figure = fl.plots.purposes(found)
    titles = [ax.get_title(loc="left").replace("\n", " ") for ax in figure.axes]
    units = found["unit"].values
    assert titles == [
        str(title) + (f" [{unit}]" if unit != "1" else "")
        for title, unit in zip(found["title"].values, units, strict=True)
    ]
    ticks = [[t.get_text() for t in ax.get_xticklabels()] for ax in figure.axes]
    assert all(2 <= len(set(t)) == len(t) <= 6 for t in ticks), ticks
    named = [[t.get_text() for t in ax.get_yticklabels()] for ax in figure.axes]
    assert named[0] == ["kfac", "kpsvd-2"]
    assert [] in named, "names stand at the left of a row, not under every panel"
    plt.close(figure)
    with pytest.raises(ValueError, match="the table holds step, laplace"):
        fl.plots.purposes(found, "nothing")


def test_words_of_ticks_do_not_run_into_each_other(network):
    found = fl.compare(network[2], ["kfac", "diagonal"], purpose=fl.Sharpness())
    found["value"][:] = np.array([[-5e-4, 5e-4], [-0.02, 0.02]])[:, :, None]
    found["network"][:], found["best"][:] = 0.0, 0.0
    figure = fl.plots.purposes(found)
    figure.draw_without_rendering()
    for ax in figure.axes:
        boxes = [label.get_window_extent() for label in ax.get_xticklabels()]
        assert len(boxes) > 2
        assert all(a.x1 < b.x0 for a, b in itertools.pairwise(boxes))
    plt.close(figure)


def test_the_figure_says_why_a_layer_has_no_number(network):
    found = fl.compare(network[2], ["kfac", "diagonal"], purpose=fl.Sharpness())
    at = {"layer": "2", "approximator": "diagonal"}
    found["value"].loc[at] = np.nan
    found["status"].loc[at] = "not positive definite (smallest eigenvalue -1, λ above 1)"
    figure = fl.plots.purposes(found)
    told = [t.get_text() for ax in figure.axes for t in ax.texts]
    assert told == ["× indefinite (1)"]
    crosses = [len(ax.collections[-1].get_offsets()) for ax in figure.axes]
    assert crosses == [1] * found.sizes["measure"]
    plt.close(figure)


def test_one_matrix_is_held_at_a_time(network):
    """Eigenbases of all methods together took 12 GiB on a network of 34 million weights."""
    held, alive = [], []

    def watched(method):
        def build(layer):
            gc.collect()
            alive.append(sum(one() is not None for one in held))
            made = method(layer)
            held.append(weakref.ref(made))
            return made

        return build

    names = ("kfac", "ekfac", "diagonal")
    methods = {name: watched(fl.approximators()[name]) for name in names}
    found = fl.compare(
        network[2], methods, purpose=[purposes.Sharpness(), purposes.Matrix()]
    )
    assert bool((found.status == "ok").all())
    assert len(alive) == len(held) == 2 * len(names)
    assert max(alive) <= 1  # the last one is let go when the next one has come
