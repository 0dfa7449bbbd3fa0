"""Controls that no paper shows: maps of validity, errors beside one another, purposes."""

from dataclasses import replace

import matplotlib.pyplot as plt
import numpy as np
import pytest
import torch
import xarray as xr
from scipy import stats

import fisherlab as fl
from fisherlab.operators import Factored
from fisherlab.problems.networks import perceptron
from fisherlab.reproduce import beyond, error_controls, purposes_along, validity_maps
from fisherlab.reproduce.experiment import Setting
from fisherlab.training.probes import Moment
from tests.cases import normal
from tests.oracles import assert_close, damped_inverse
from tests.test_reproduce_claims import verdicts

QUICK = Setting(quick=True)


def statistics(layers=("fc2", "fc3", "fc4")):
    """Return statistics and gradients of the inner layers of a small network."""
    model = perceptron((4, 3, 3, 3, 3, 2), "tanh", seed=1)
    data = normal(30, 4), torch.arange(30) % 2
    likelihood = fl.Categorical()
    stats = fl.collect(model, data, likelihood, layers=layers, compress=False)
    gradients = fl.statistics.mean_gradient(model, data, likelihood)
    return stats, {name: gradients[name] for name in layers}


def test_the_inverses_of_kfac_are_held_against_the_dense_exact_one():
    stats, gradients = statistics()
    found = validity_maps.chain_over_blocks(stats, gradients, (1e-2, 1.0))
    exact = fl.ExactNetwork()(stats).to_dense()
    for alpha in (1e-2, 1.0):
        damping = alpha * float(exact.trace()) / len(exact)
        wanted = damped_inverse(exact, damping)
        chain = fl.KFACTridiagonal()(stats).inverse(Factored(damping)).to_dense()
        inverses = [fl.KFAC()(one).inverse(Factored(damping)) for one in stats.values()]
        blocks = torch.block_diag(*(one.to_dense() for one in inverses))
        errors = [(one - wanted).norm() / wanted.norm() for one in (chain, blocks)]
        row = found.sel(damping=alpha)
        assert_close(row.isel(conclusion=0).item(), errors[0] / errors[1], 1e-8)
        assert_close(row.isel(conclusion=1).item(), errors[0], 1e-8)


@pytest.mark.parametrize(
    ("measure", "pairs"),
    [
        (validity_maps.one_term, [("inverse", fl.KPSVD(), fl.KFAC())]),
        (
            validity_maps.mini_blocks,
            [
                ("step", fl.MiniBlock(), fl.Diagonal()),
                ("step", fl.KFAC(), fl.MiniBlock()),
            ],
        ),
    ],
)
def test_a_map_holds_methods_against_dense_solves(measure, pairs):
    stats, gradients = statistics(("fc3",))
    layer, vector = stats["fc3"], gradients["fc3"].gradient.flatten()
    exact = fl.ExactBlock()(layer).to_dense()
    damping = 0.1 * float(exact.trace()) / len(exact)

    def missed(what, method):
        wanted = damped_inverse(exact, damping)
        own = damped_inverse(method(layer).to_dense(), damping)
        if what == "inverse":
            return (own - wanted).norm() / wanted.norm()
        return 1 - torch.cosine_similarity(own @ vector, wanted @ vector, 0)

    found = measure(stats, gradients, (0.1, 1.0)).sel(damping=0.1)
    for k, (what, first, second) in enumerate(pairs):
        expected = missed(what, first) / missed(what, second)
        assert_close(found.isel(conclusion=k).item(), expected, 1e-6)


def test_where_a_conclusion_holds_is_counted_along_every_axis():
    values = np.array([[[2.0, 0.5], [0.5, 0.5]]])[..., None]
    coords = {"depth": [4], "examples": [100, 1000], "damping": [0.1, 1.0]}
    ds = xr.Dataset({"value": xr.DataArray(values, coords | {"conclusion": ["a"]})})
    assert validity_maps._worst("a")(ds) == {"largest": 2.0}
    said = validity_maps._where("a")(ds)
    assert said.startswith("It holds in 75 % of the map: ")
    assert "50 % at 0.1, 100 % at 1" in said
    assert "50 % at 100, 100 % at 1000" in said
    drawing = validity_maps.draw(ds)
    assert [ax.get_title() for ax in drawing.axes] == ["4 layers"]
    plt.close(drawing)


def test_every_depth_is_trained_and_only_inner_layers_are_looked_at(monkeypatch):
    monkeypatch.setattr(validity_maps, "EPOCHS", (1, 1))
    monkeypatch.setattr(validity_maps, "DEPTHS", ((3, 4), ()))
    monkeypatch.setattr(validity_maps, "EXAMPLES", ((10,), ()))
    seen = []

    def measure(stats, gradients, alphas):
        assert list(stats) == list(gradients)
        seen.append((list(stats), stats["fc2"].weight_shape))
        return xr.DataArray([[1.0]], {"damping": [1.0], "conclusion": ["a"]})

    ds = validity_maps.mapped(measure, QUICK)
    assert seen == [(["fc2"], (20, 21)), (["fc2", "fc3"], (20, 21))]
    assert ds.value.sizes == {"depth": 2, "examples": 1, "damping": 1, "conclusion": 1}


def test_equal_numbers_share_a_rank():
    one, other = (xr.DataArray(values) for values in ([1.0, 1.0, 2.0], [4.0, 3.0, 5.0]))
    expected = stats.spearmanr(one, other).statistic
    assert error_controls.rank_correlation(one, other) == pytest.approx(expected)


def test_orders_are_told_from_the_nearest():
    coords = {"layer": ["a", "b"], "approximator": ["kfac", "kpsvd", "diagonal"]}
    matrix = xr.DataArray([[0.2, 0.1, 0.9]] * 2, coords)
    same, other = matrix.values, np.array([[0.1, 0.2, 0.9]] * 2)
    inverse = xr.DataArray(np.stack([same, other]), {"damping": [0.1, 1.0], **coords})
    ds = xr.Dataset({"matrix_error": matrix, "inverse_error": inverse})
    assert error_controls._least_agreement(ds) == {"least over λ": 0.5}
    said = error_controls._two_orders(ds)
    assert "1.00 at λ = 0.1, 0.500 at λ = 1 " in said
    assert said.endswith(
        "by matrix kpsvd, kfac, diagonal; by inverse at 1 kfac, kpsvd, diagonal."
    )


def test_the_nearest_in_every_purpose_is_told_and_noise_counted():
    names, methods = list(purposes_along.MEASURES), ["kfac", "diagonal", "low-rank"]
    values = np.tile([0.1, 0.9, np.nan], (2, len(names), 1))
    values[1, 0] = [0.5, 0.2, 0.4]
    coords = {"step": [0, 5], "measure": names, "approximator": methods}
    noise = xr.DataArray(np.full((2, len(names)), 0.3), {"step": [0, 5], "measure": names})
    ds = xr.Dataset({"missed": xr.DataArray(values, coords), "noise": noise})
    wins = purposes_along._most_wins(ds)["share of purposes and moments"]
    assert wins == pytest.approx(11 / 12)
    assert "step 5: matrix `diagonal`, step `kfac`" in purposes_along._who_wins(ds)
    above = purposes_along._above_noise(ds)["share of numbers"]
    assert above == pytest.approx(13 / 25)  # of the numbers that there are
    assert "matrix 40 %" in purposes_along._below_by_purpose(ds)
    assert purposes_along._correlations(ds)["step"] == pytest.approx(0.0)
    drawing = purposes_along.draw(ds)
    assert [ax.get_title() for ax in drawing.axes] == list(purposes_along.MEASURES.values())
    plt.close(drawing)


def test_the_exact_fisher_misses_nothing_and_that_of_other_examples_something():
    problem = fl.problems.load("digits")
    problem = replace(problem, test=tuple(part[:4] for part in problem.test))
    optimizer = torch.optim.SGD(problem.model.parameters())
    moment = Moment(problem, optimizer, 0, problem.train, 0)
    ds = purposes_along._judged(moment, ["exact", "kfac"], 12)
    assert float(ds.missed.sel(approximator="exact").max()) < 1e-6
    assert (ds.noise > 1e-3).all()
    assert (ds.missed.sel(approximator="kfac") > 1e-6).sum() >= 5


def test_the_best_time_of_cg_fac_is_told():
    shape, dims = (1, 2, 1, 1), ("width", "batch", "alpha", "residual")
    coords = {"width": [50], "batch": [16, 64], "alpha": [1.0], "residual": [0.01]}
    ratio = xr.DataArray(np.array([0.5, 2.0]).reshape(shape), coords, dims)
    ds = xr.Dataset({"time_ratio": ratio})
    assert beyond.share(ds, "time_ratio", 1.0) == {"share of settings": 0.5}
    assert "0.500 of K-FAC's time, with d = 50, m = 16, λ = 1 of" in beyond._quickest(ds)


# --- verdicts, with their numbers ---


@pytest.mark.slow
def test_the_chain_is_the_nearer_inverse_of_kfac_and_far_from_the_exact_one():
    nearer, near = verdicts("validity-kfac")
    assert nearer.verdict == near.verdict == "reproduced"
    assert nearer.measured["largest"][0] == pytest.approx(0.998, abs=0.002)
    assert near.measured["largest"][0] == pytest.approx(0.970, abs=0.02)


@pytest.mark.slow
def test_the_inverse_of_kpsvd_is_nearer_than_that_of_kfac_and_its_step_is_not():
    inverse, step = verdicts("validity-kpsvd")
    assert inverse.verdict == "reproduced"
    assert inverse.measured["largest"][0] == pytest.approx(0.997, abs=0.005)
    assert step.verdict == "not"
    assert step.measured["largest"][0] == pytest.approx(1.147, abs=0.02)
    assert "It holds in 58 % of the map" in step.reason


@pytest.mark.slow
def test_mini_blocks_are_nearer_than_the_diagonal_and_kfac_not_always_than_they():
    diagonal, kfac = verdicts("validity-mbf")
    assert diagonal.verdict == "reproduced"
    assert diagonal.measured["largest"][0] == pytest.approx(0.944, abs=0.02)
    assert kfac.verdict == "not"
    assert kfac.measured["largest"][0] == pytest.approx(1.193, abs=0.02)
    assert "100 % at 0.0001, 75 % at 0.01, 0.0 % at 1" in kfac.reason


@pytest.mark.slow
def test_matrix_and_inverse_do_not_rank_methods_alike():
    (order,) = verdicts("inverse-beside-matrix")
    assert order.verdict == "not"
    assert order.measured["least over λ"][0] == pytest.approx(0.871, abs=0.06)


@pytest.mark.slow
def test_one_sampled_label_costs_kpsvd_a_quarter_and_the_diagonal_nothing():
    own, one_label, of_data = verdicts("exact-beside-sampled")
    assert [claim.verdict for claim in (own, one_label, of_data)] == ["not"] * 3
    assert own.measured["kfac"][0] == pytest.approx(1.157, abs=0.02)
    assert one_label.measured["kpsvd"][0] == pytest.approx(1.258, abs=0.03)
    assert one_label.measured["diagonal"][0] == pytest.approx(1.002, abs=0.005)
    assert of_data.measured["kpsvd"][0] == pytest.approx(1.326, abs=0.03)
    assert "53 % of ‖F‖ with 1 label" in own.reason


@pytest.mark.slow
def test_no_method_is_the_nearest_in_all_purposes():
    nearest, order, above = verdicts("purposes-along")
    assert [one.verdict for one in (nearest, order, above)] == ["not"] * 3
    assert nearest.measured["share of purposes and moments"][0] < 0.5
    assert order.measured["least over purposes"][0] < 0.75
    assert above.measured["share of numbers"][0] == pytest.approx(0.564, abs=0.05)
