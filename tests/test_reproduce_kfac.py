"""The K-FAC paper's figures: what they show holds in their data."""

from copy import deepcopy
from dataclasses import replace
from functools import cache

import matplotlib.pyplot as plt
import numpy as np
import pytest
import torch
import xarray as xr

import fisherlab as fl
from fisherlab.operators import Factored
from fisherlab.reproduce import kfac_iterations, martens2015, training_races
from fisherlab.reproduce import kfac_matrices as figures
from fisherlab.reproduce import kfac_rescaling as rescaling
from fisherlab.reproduce.catalogue import experiment
from fisherlab.reproduce.experiment import Setting
from fisherlab.showing import percent
from tests.cases import normal
from tests.drawings import assert_texts_apart
from tests.oracles import assert_close
from tests.test_reproduce_claims import verdicts

QUICK = Setting(quick=True)
computed = cache(lambda name: experiment(name).compute(QUICK))


def positive(size):
    root = normal(size, size)
    return root @ root.T + torch.eye(size).double()


def test_the_chain_agrees_near_the_diagonal_and_its_inverse_is_tridiagonal():
    places = [slice(0, 2), slice(2, 5), slice(5, 6), slice(6, 9)]
    matrix = positive(9)
    found = figures.chain_inverse(matrix, places)
    back = torch.linalg.inv(found)
    for k, row in enumerate(places):
        for j, column in enumerate(places):
            if abs(k - j) > 1:
                assert not found[row, column].any()
            else:
                assert_close(back[row, column], matrix[row, column], 1e-9)


def test_the_distances_are_those_of_dense_gaussians():
    places = [slice(0, 2), slice(2, 5), slice(5, 9)]
    matrix = positive(9)
    normal_ = torch.distributions.MultivariateNormal
    zero = torch.zeros(9).double()
    blocks, chain = figures._distances(matrix, places)
    own = figures.block_diagonal(matrix, places)
    hat = torch.linalg.inv(figures.chain_inverse(matrix, places))
    for (error, inverse_error, divergence), other in ((blocks, own), (chain, hat)):
        expected = torch.distributions.kl_divergence(
            normal_(zero, matrix), normal_(zero, other)
        )
        assert_close(divergence, expected, 1e-8)
        assert_close(error, (matrix - other).norm() / matrix.norm(), 1e-8)
        gap = torch.linalg.inv(matrix) - torch.linalg.inv(other)
        assert_close(inverse_error, gap.norm() / torch.linalg.inv(matrix).norm(), 1e-8)


def test_the_problem_of_a_setting_is_trained_on_and_told(monkeypatch):
    asked = []

    def load(setting, name):
        asked.append(name)
        return fl.problems.load("digits")

    monkeypatch.setattr(Setting, "load", load)
    for one in (replace(QUICK, problem="mnist"), QUICK):
        _, _, told = kfac_iterations.trained(one, 0)
        assert told.startswith(f"{asked[-1]}, 256-20-20-20-20-20-10")
    assert asked == ["mnist", "digits"]


def test_how_far_the_exact_inverse_falls_at_best_is_told():
    falls = {"F̃ Tikhonov": [[0.5, 0.1], [0.5, 0.4]], "F Tikhonov": [[0.6, 0.5], [0.8, 0.6]]}
    coords = {"of": list(falls), "damping": [1e-6, 1e-2], "apart": [1, 3]}
    distance = xr.DataArray(list(falls.values()), coords)
    ds = xr.Dataset({"distance": distance}, attrs={"settings": "mnist, 7 iterations, 2 %"})
    told = martens2015._exact_reason(ds)
    assert (
        "falls to 0.200 of its value at distance 1 (λ = 1e-06), F⁻¹ at best to 0.750"
        in told
    )
    assert martens2015._by_hand(ds) == "Here it is mnist after 7 iterations of K-FAC."


def test_the_mass_by_distance_and_the_pair_that_is_missed_most_are_told():
    entry = np.kron([[3.0, 1.0, 0.0], [1.0, 3.0, 1.0], [0.0, 1.0, 3.0]], np.ones((2, 2)))
    layers = ["a", "b", "c"]
    means = xr.DataArray(
        [np.ones((3, 3)), np.where(np.eye(3)[::-1] > 0, 0.5, 1.2)],
        {"matrix": ["F", "F̃"], "layer": layers, "with_layer": layers},
    )
    ds = xr.Dataset(
        {
            "entry": (("matrix", "row", "col"), [entry, entry]),
            "mean_entry": means,
            "start": ("layer", [0, 2, 4]),
            "stop": ("layer", [2, 4, 6]),
            "relative_error": ("structure", [0.5, 0.25]),
        },
        {"structure": list(figures.STRUCTURES)},
    )
    told = martens2015._mass(ds)
    assert "Of the squares of F lie 87 % within layers, 13 % between neighbours" in told
    assert "0.0 % farther; the errors are block diagonal 0.500" in told
    told = martens2015._coarse(ds)
    assert "is 0.500–1.20 over pairs of layers" in told
    assert told.endswith("the farthest from one is 0.500 between a and c.")


def test_a_chain_that_never_comes_as_low_needs_infinitely_many_iterations():
    names = ["kfac-full", "kfac-full-tridiagonal"]
    loss = xr.DataArray([[3.0, 2.0, 1.0]] * 2, {"optimizer": names, "step": [0, 2, 4]})
    for low, share in ((1.0, 1.0), (1.5, np.inf)):
        loss[1, 2] = low
        found = training_races.iterations_saved(xr.Dataset({"train_loss": loss}))
        assert found == {"iterations": share}


@pytest.mark.slow
def test_the_chain_is_that_of_the_factored_form():
    problem = fl.problems.load("digits")
    x, y = problem.train
    data = x[:60], y[:60]
    stats = fl.collect(
        problem.model, data, problem.likelihood, layers=figures.LAYERS, compress=False
    )
    pairs, damping = fl.KhatriRao()(stats), Factored(0.01)
    tilde = pairs.damped(damping).to_dense()
    found = figures.chain_inverse(tilde, list(pairs.offsets.values()))
    expected = fl.KFACTridiagonal()(stats).inverse(damping).to_dense()
    assert_close(found, expected, 1e-8)


def test_the_images_that_decide_the_error_are_told(monkeypatch):
    monkeypatch.setattr(kfac_iterations, "IMAGES", (40, 10**6))
    load = fl.problems.load("digits")
    few = replace(load, train=tuple(part[:80] for part in load.train))
    monkeypatch.setattr(Setting, "load", lambda *_: replace(few, model=deepcopy(few.model)))
    ds = kfac_iterations.iterations(QUICK)
    assert ds.images.values.tolist() == [40, 80]
    assert ds.training_error.dims == ("iteration",)
    xr.testing.assert_equal(
        ds.error_by_images.sel(images=80, drop=True), ds.training_error.rename(None)
    )
    assert not ds.error_by_images.sel(images=40).equals(ds.training_error)
    drawing = kfac_iterations.draw(ds.expand_dims(seed=[0]))
    drawn = [sum(len(line.get_xdata()) > 0 for line in ax.lines) for ax in drawing.axes]
    assert drawn == [1, 3, 1]  # of fewer images, and as published, the error alone
    assert_texts_apart(drawing)
    plt.close(drawing)
    told = martens2015._images_decide(ds)
    seven, last = ds.error_by_images.sel(images=40, iteration=[7, 22]).values.tolist()
    assert f"{percent(seven)} and {percent(last)} with 40, " in told


@pytest.mark.slow
def test_seven_iterations_train_as_far_as_published():
    (claim,) = verdicts("kfac-iterations")
    assert claim.verdict == "reproduced"
    assert claim.measured["after 7"][0] == pytest.approx(0.030, abs=0.003)
    assert claim.measured["after 22"][0] == 0
    one = experiment("kfac-iterations")
    plt.close(one.draw(one.compute(QUICK)))


@pytest.mark.slow
def test_figure_3_the_approximation_falls_with_distance_and_the_exact_fisher_does_not():
    in_use, falls, exact = verdicts("kfac-figure-3")
    assert in_use.measured["1 apart"][0] < 0.1
    assert falls.verdict == "reproduced"
    found = [falls.measured[f"{k} apart"][0] for k in (1, 2, 3)]
    np.testing.assert_allclose(found, [0.286, 0.128, 0.089], rtol=0.05)
    assert exact.verdict == "not"
    assert "F̃⁻¹ falls" in exact.reason


@pytest.mark.slow
@pytest.mark.parametrize("name", [one.name for one in figures.EXPERIMENTS])
def test_figures_are_drawn_with_their_settings(name, tmp_path):
    ds = computed(name)
    assert "7 iterations" in ds.attrs["settings"]
    drawing = experiment(name).draw(ds.expand_dims(seed=[0]))
    drawing.savefig(tmp_path / "figure.png", dpi=40)
    plt.close(drawing)


@pytest.mark.slow
def test_figure_2_is_a_difference():
    ds = computed("kfac-figure-2")
    exact, pairs, gap = (ds["entry"].isel(matrix=k).values for k in range(3))
    np.testing.assert_allclose(gap, exact - pairs, atol=1e-6 * np.abs(exact).max())
    error = np.linalg.norm(gap) / np.linalg.norm(exact)
    assert float(ds["relative_error"]) == pytest.approx(error, rel=1e-4)
    assert ds["entry"].shape == (3, 1680, 1680)


@pytest.mark.slow
def test_the_damping_of_factors_makes_the_inverse_near_a_chain():
    factored, tikhonov, exact, divergence = verdicts("kfac-tridiagonal-damping")
    assert divergence.verdict == "reproduced"
    assert tikhonov.measured["largest"][0] > 1.3 * factored.measured["largest"][0]
    assert exact.verdict == "not"


def test_a_step_is_measured_and_taken_back():
    problem = fl.problems.load("digits")
    data = tuple(part[:50] for part in problem.train)
    before = rescaling._point(problem)
    step = 0.01 * normal(len(before))
    found = rescaling._after(problem, data, step)
    assert torch.equal(rescaling._point(problem), before)
    start = 0
    with torch.no_grad():
        for block in fl.blocks(problem.model).values():
            layer = problem.model.get_submodule(block.name)
            rows, columns = layer.weight.shape
            change = step[start : start + rows * (columns + 1)].view(rows, columns + 1)
            start += rows * (columns + 1)
            layer.weight += change[:, :-1]
            layer.bias += change[:, -1]
        expected = torch.nn.functional.cross_entropy(problem.model(data[0]), data[1])
    assert found == pytest.approx(float(expected), rel=1e-12)


def test_gains_of_raw_and_rescaled_steps_are_told():
    gain = xr.DataArray(
        [[-3.0, 0.5], [0.2, 0.9], [0.4, 0.3]],
        {"gamma": [0.01, 0.1, 1.0], "step": list(rescaling.STEPS)},
    )
    ds = xr.Dataset({"gain": gain})
    found = [claim.measure(ds) for claim in rescaling.CLAIMS]
    assert found == [
        {"raw / rescaled": pytest.approx(0.4 / 0.9)},
        {"rescaled / raw": pytest.approx(0.1)},
        {"raw": -3.0, "rescaled": 0.5},
    ]
    told = rescaling._told(ds)
    assert "raw 0.400 nat at γ = 1.00 and rescaled 0.900 nat at γ = 0.100; at" in told
    drawing = rescaling.draw(ds.expand_dims(seed=[0]))
    assert drawing.axes[0].get_ylim() == pytest.approx((-0.45, 0.99))
    plt.close(drawing)


@pytest.mark.slow
def test_a_rescaled_step_gains_more_with_less_damping():
    gains, dampings, weak = verdicts("kfac-rescaling")
    assert gains.verdict == dampings.verdict == weak.verdict == "reproduced"
    assert gains.measured["raw / rescaled"][0] == pytest.approx(0.33, abs=0.05)
    assert weak.measured["raw"][0] < -5
