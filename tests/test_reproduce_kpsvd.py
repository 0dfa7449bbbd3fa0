"""The figures of Koroko et al. and of Chen, and trainings, in seconds."""

from dataclasses import replace
from functools import partial
from pathlib import Path

import matplotlib.pyplot as plt
import numpy as np
import pytest
import torch
import xarray as xr

from fisherlab.reproduce import (
    beyond,
    chen2021,
    koroko2022,
    kpsvd_errors,
    training_races,
)
from fisherlab.reproduce import kpsvd_candidates as candidates
from fisherlab.reproduce import kpsvd_training as figure
from fisherlab.reproduce.experiment import Setting, judged
from fisherlab.training import ExponentialBatches
from tests.drawings import assert_texts_apart


def size(folder: Path) -> figure.Size:
    return figure.Size(partial(figure._small, Setting()), 64, 4, 0.1, 5, folder)


def run_of(*losses):
    """Return a run as `follow` gives it, a moment every ten steps."""
    step = np.arange(len(losses)) * 10
    lines = {name: ("step", list(losses)) for name in ("train_loss", "test_loss")}
    return xr.Dataset(lines, {"step": step})


def test_the_search_takes_the_best_of_its_grid_and_the_training_uses_it(
    tmp_path, monkeypatch
):
    pytest.importorskip("optuna")
    monkeypatch.setattr(
        figure, "GRIDS", {"kfac-koroko": {"lr": (1e-6, 0.1), "damping": (0.1,)}}
    )
    best = figure.searched("kfac-koroko", 0, size(tmp_path))
    assert best == {"lr": 0.1, "damping": 0.1}
    ds = figure.trained("kfac-koroko", best, 0, size(tmp_path))
    assert float(ds.seconds[-1]) >= 0.1
    assert ds.train_loss[-1] < ds.train_loss[0]
    again = figure.trained("kfac-koroko", best, 0, size(tmp_path))  # from the store
    xr.testing.assert_equal(again.train_loss.load(), ds.train_loss.load())


def test_steps_are_timed_in_turns(tmp_path):
    settings = {"sgd-momentum": {"lr": 0.1}, "kfac-koroko": {"lr": 0.1, "damping": 0.1}}
    timed = figure.step_seconds(settings, 0, size(tmp_path))
    assert list(timed) == list(settings)
    assert 0 < timed["sgd-momentum"] < timed["kfac-koroko"] < 10


def test_runs_are_compared_at_equal_times(tmp_path):
    runs = {"adam": run_of(4.0, 2.0, 1.5), "kfac-koroko": run_of(4.0, 2.0)}
    settings = {"adam": {"lr": 0.1}, "kfac-koroko": {"lr": 0.2, "damping": 3.0}}
    timed = {"adam": 0.01, "kfac-koroko": 0.004}  # 100 ms of steps are 10 and 25 steps
    ds = figure.compared(runs, settings, timed, size(tmp_path))
    half = ds.sel(seconds=0.02, method="nearest")
    np.testing.assert_allclose(half.train_loss, [3.6, 3.0])
    np.testing.assert_allclose(half.steps, [2.0, 5.0])
    assert np.isnan(ds.train_loss.sel(optimizer="kfac-koroko")[-1])  # it ended before
    assert float(ds.train_loss.sel(optimizer="adam")[-1]) == 2.0
    np.testing.assert_array_equal(ds.damping, [np.nan, 3.0])
    np.testing.assert_array_equal(ds.step_seconds, [0.01, 0.004])
    drawing = figure.draw(ds)
    left, right = drawing.axes
    assert left.get_ylabel() == "train loss / nat"
    assert right.get_legend() is None  # it would lie on the lines
    (legend,) = drawing.legends
    assert [t.get_text() for t in legend.get_texts()] == ["adam", "kfac"]
    plt.close(drawing)


def test_the_errors_along_a_training_keep_their_order():
    ds = kpsvd_errors.errors(kpsvd_errors.SMALL, Setting(quick=True))
    assert ds.step.values.tolist() == [0, 5, 10]
    error = ds.frobenius_error
    for better, worse in (
        ("kpsvd", "kfac"),
        ("deflation", "kpsvd"),
        ("deflation", "kfac-corrected"),
        ("kfac-corrected", "kfac"),
    ):
        ahead = error.sel(approximator=better), error.sel(approximator=worse)
        assert (ahead[0] <= ahead[1] * (1 + 1e-9)).all()
    assert (ds.spectrum_error <= ds.frobenius_error * (1 + 1e-9)).all()
    drawing = kpsvd_errors.draw(ds)
    titles = [ax.get_title() for ax in drawing.axes]
    assert titles == list(kpsvd_errors.LABELS.values())
    (legend,) = drawing.legends
    assert [t.get_text() for t in legend.get_texts()][-6:] == list(kpsvd_errors.METHODS)
    plt.close(drawing)


def test_a_race_goes_on_where_it_stopped_and_tells_who_failed(tmp_path, monkeypatch):
    small = {"lr": 1e-3, "batch": 32}
    runners = {"adam": {"lr": 1e-3}, "sgd-momentum": {"lr": 1e38}, "adam, small": small}
    small = training_races.Race("digits", 2, 64, runners, (4, 8), True)
    monkeypatch.setitem(training_races.RACES, "small", small)
    setting = Setting(quick=True, runs=tmp_path)
    ds = training_races.race("small", setting)
    adam = ds.sel(optimizer="adam")
    assert adam.train_loss[-1] < adam.train_loss[0]
    assert np.isnan(ds.train_loss.sel(optimizer="sgd-momentum")[-1])
    assert "loss" in str(ds.status.sel(optimizer="sgd-momentum").values)
    assert str(adam.status.values) == "ok"
    assert 0 <= float(adam.test_accuracy[-1]) <= 1
    assert np.isnan(ds.test_accuracy.sel(optimizer="sgd-momentum")).all()
    other = ds.train_loss.sel(optimizer="adam, small")
    assert other[0] == adam.train_loss[0] != other[-1] != adam.train_loss[-1]
    told = training_races.every_loss(ds)
    assert "The run has 4 of the published 8 steps. All take " in told
    status = str(ds.status.sel(optimizer="sgd-momentum").values)
    first = status.partition(". ")[0].rstrip(".")
    assert f"`sgd-momentum` failed: {first}. Last" in told
    assert training_races.at_end(ds)["sgd-momentum"] == np.inf
    assert training_races.at_end(ds, "test_accuracy")["sgd-momentum"] == 0
    for pair, ratio in (
        (("sgd-momentum", "adam"), np.inf),
        (("adam", "sgd-momentum"), np.nan),
    ):
        claim = training_races.ends_below("", {"a": pair})
        np.testing.assert_equal(claim.measure(ds)["a"], ratio)
    assert f"`adam` {float(adam.train_loss[-1]):.4g}" in told
    claim = training_races.ends_below("", {"a": ("adam, small", "adam")})
    assert claim.measure(ds)["a"] == pytest.approx(float(other[-1] / adam.train_loss[-1]))
    again = training_races.race("small", setting)  # from the store
    xr.testing.assert_equal(again.train_loss.load(), ds.train_loss.load())
    drawing = training_races.draw(ds)
    labels = [ax.get_ylabel() for ax in drawing.axes]
    assert labels == ["training loss / nat", "", "validation accuracy", ""]
    names = [text.get_text() for text in drawing.legends[0].get_texts()]
    assert names[-3:] == ["adam", "sgd-momentum (failed)", "adam, small"]
    ticks = drawing.axes[2].get_xticks()  # of steps, between which there is nothing
    np.testing.assert_array_equal(ticks, np.round(ticks))
    assert_texts_apart(drawing)
    plt.close(drawing)
    elsewhere = training_races.race("small", replace(setting, problem="digits"))
    assert len(list(tmp_path.glob("small-digits/4/*/seed-0"))) == 3
    xr.testing.assert_equal(elsewhere.train_loss.load(), ds.train_loss.load())


def test_of_several_rates_the_one_that_ends_lowest_is_kept_and_told(tmp_path, monkeypatch):
    runners = {
        "sgd-momentum": {"lr": (1e38, 1e-6, 1e-2)},
        "kfac-full": {"damping": 1.0},
    }
    grown = ExponentialBatches(32, 64, 3)
    small = training_races.Race("digits", 1, grown, runners, (4, 8))
    monkeypatch.setitem(training_races.RACES, "small", small)
    setting = Setting(quick=True, runs=tmp_path)
    ds = training_races.race("small", setting)
    sgd = ds.sel(optimizer="sgd-momentum")
    assert float(sgd.lr) == 1e-2
    assert str(sgd.status.values) == "ok"
    alone = replace(small, runners={"sgd-momentum": {"lr": 1e-2}})
    again = training_races.raced(alone, 4, replace(setting, runs=None))
    np.testing.assert_array_equal(again.train_loss[0], sgd.train_loss)
    assert np.isnan(ds.lr.sel(optimizer="kfac-full"))
    told = ds.attrs["settings"]
    assert "batch 32 growing to 64 at step 3" in told
    assert "sgd-momentum lr 0.01 of 1e+38–0.01; kfac-full damping 1" in told
    assert len(list(tmp_path.glob("small/lr*/4/sgd-momentum/seed-0"))) == 3


def test_candidates_share_runs_of_equal_settings_and_change_one_thing(
    tmp_path, monkeypatch
):
    runners = {name: {"lr": 0.1, "damping": 0.01} for name in candidates.TERMS}
    small = training_races.Race("digits", 1, 64, runners, (2, 2), looks=2)
    monkeypatch.setattr(candidates, "PUBLISHED", small)
    every = candidates.races()
    kept = ("each at its own", candidates.CORRECTED, "labels of the data")
    monkeypatch.setattr(candidates, "races", lambda: {name: every[name] for name in kept})
    monkeypatch.setattr(candidates, "STEPS", (2, 2))
    ds = candidates.candidates(Setting(quick=True, runs=tmp_path))
    loss, own = ds.train_loss, {"candidate": kept[0]}
    two = {"optimizer": ["deflation-koroko", "kfac-corrected-koroko"]}
    alike = loss.sel({**two, "candidate": kept[1]})
    np.testing.assert_array_equal(loss.sel({**two, **own}), alike)
    kfac = loss.sel(optimizer="kfac-koroko", step=2)  # √λ of one term: another damping
    assert len(set(kfac.values.tolist())) == 3
    assert np.isnan(loss.sel(candidate=kept[2], optimizer="kpsvd-koroko")).all()
    np.testing.assert_array_equal(ds.relative.sel(optimizer="kfac-koroko"), 1.0)
    assert len(list(tmp_path.glob("kpsvd-candidates/lr*/2/*/seed-0"))) == 6
    plt.close(candidates.draw(ds.expand_dims(seed=[0])))
    told = beyond._candidates(ds)
    assert "all at KFAC-CORRECTED's: " in told


def test_a_race_begins_with_the_weights_of_torch():
    problem = Setting(seed=3).load("digits")
    training_races.begin_as_torch(problem, 3)
    for layer in problem.model.modules():
        if isinstance(layer, torch.nn.Linear):
            bound = layer.in_features**-0.5
            assert bound / 2 < float(layer.weight.detach().abs().max()) <= bound
            assert float(layer.bias.detach().abs().max()) <= bound
    first = problem.model.fc1.weight.detach().clone()
    training_races.begin_as_torch(problem, 3)
    assert torch.equal(first, problem.model.fc1.weight)


def row(**values):
    """Return a result of two moments after the first, equal at both."""
    names = list(values)
    errors = [[1.0] * len(names)] + [list(values.values())] * 2
    data = {
        name: (("step", "approximator"), np.array(errors))
        for name in ("frobenius_error", "spectrum_error", *kpsvd_errors.CONTROLS)
    }
    return xr.Dataset(data, {"step": [0, 1, 2], "approximator": names})


def test_the_verdict_on_errors_needs_their_numbers_or_their_order():
    (one,) = [r for r in koroko2022.ROWS if r.experiment == "kpsvd-errors-mnist"]
    first, _, always = one.claims
    late = {"kfac": 0.21, "kpsvd": 0.13, "kfac-corrected": 0.13, "deflation": 0.11}
    ds = row(**late, tkfac=0.135).isel(step=slice(1, None))
    assert judged(first, [ds]).verdict == "reproduced"
    wide = row(**{**late, "kfac": 4.0}, tkfac=0.2).isel(step=slice(1, None))
    assert judged(first, [wide]).verdict == "ordering only"
    crossed = row(**{**late, "kpsvd": 0.5}, tkfac=0.2)
    assert judged(first, [crossed.isel(step=slice(1, None))]).verdict == "not"
    assert judged(always, [crossed]).verdict == "not"
    assert judged(always, [row(**late, tkfac=0.2)]).verdict == "reproduced"


def test_the_share_of_the_gain_is_that_of_the_worst_moment():
    ds = row(kfac=0.5, kpsvd=0.1, tkfac=0.14)
    assert beyond._share(ds)["least share"] == pytest.approx(0.9)
    assert beyond._near(ds)["largest TKFAC / KPSVD"] == pytest.approx(1.4)


def test_what_noise_leaves_of_an_error_is_fitted_over_the_examples():
    counts = np.array([128, 512, 2048])
    errors = np.sqrt(0.3**2 + 4.0 / counts)
    bias, share, miss = beyond._limit(counts, errors)
    assert bias == pytest.approx(0.3)
    assert share == pytest.approx(0.3 / errors[0])
    assert miss < 1e-12
    assert beyond._limit(counts, errors * [1, 1.1, 1])[2] > 0.02
    data = {
        name: (("approximator", "examples"), np.array([errors, scale * errors]))
        for name, scale in (("by_examples", 0.1), ("scaled_by_examples", 0.1))
    }
    coords = {"approximator": ["kfac", "kpsvd"], "examples": counts}
    ds = xr.Dataset(data, coords)
    told = beyond._bias(ds)
    assert "KFAC's to 0.300" in told
    assert "KPSVD's to 0.0300" in told
    ds["by_layer"] = ("approximator", "layer"), errors[None, :2] * [[1.0], [0.5]]
    drawing = kpsvd_errors.draw_controls(ds.assign_coords(layer=["fc1", "fc2"]))
    assert [ax.get_xlabel() for ax in drawing.axes] == ["examples", "layer"]
    plt.close(drawing)


def test_where_tkfac_lacks_most_the_scale_and_the_second_term_are_told():
    ds = row(kfac=0.5, kpsvd=0.3, deflation=0.1, tkfac=0.34)
    ds["scale_optimal_error"] = ds["frobenius_error"].where(ds.approximator != "kfac", 0.49)
    second = ((0.3**2 - 0.1**2) / (1 - 0.3**2)) ** 0.5
    told = beyond._shape(ds)
    assert "At step 1 KFAC's best scale has 5.0 % of the gain" in told
    assert f"{second:.3f} of the first" in told


def test_cg_fac_takes_half_where_examples_are_few_and_more_where_they_are_many(
    monkeypatch,
):
    monkeypatch.setattr(chen2021, "WIDTHS", ((20, 40),))
    monkeypatch.setattr(chen2021, "BATCHES", ((8, 64),))
    ds = chen2021.costs(Setting(quick=True))
    assert (ds.error.sel(residual=1e-6) < 1e-4).all()
    m, d = ds.batch, ds.width + 1
    expected = m * (d + d - 1) / (2 * (d**2 + (d - 1) ** 2))
    xr.testing.assert_allclose(ds.memory_ratio, expected.transpose("width", "batch"))
    time, memory, same = (judged(claim, [ds]) for claim in chen2021.ROWS[0].claims)
    assert memory.verdict == "not"
    assert same.verdict == "reproduced"
    assert time.verdict in ("not", "reproduced")  # a matter of the machine
    plt.close(chen2021.draw(ds.expand_dims(seed=[0])))


def test_where_a_method_is_worse_than_the_one_below_is_told():
    names = ["kfac", "kpsvd", "kfac-corrected", "deflation"]
    errors = xr.DataArray(
        [[0.9, 0.9, 0.9, 0.9], [0.4, 0.3, 0.25, 0.2], [0.4, 0.5, 0.3, 0.2]],
        {"step": [0, 30, 60], "approximator": names},
    )
    ds = xr.Dataset({"frobenius_error": errors, "spectrum_error": errors[::1] ** 2})
    told = koroko2022._where_worse(ds)
    assert told == "kpsvd is above kfac at 50 % of the moments, by up to 1.25 at step 60."
    assert koroko2022._steps(ds) == (
        "Step 60 of 2,500: the order holds for errors 1 at 1 of 2 moments and errors 2 at "
        "1 of 2 moments."
    )


def test_where_two_solutions_are_the_farthest_apart_is_told():
    sizes = {"width": [50, 200], "batch": [16], "alpha": [1.0], "residual": [0.01]}
    error = xr.DataArray(np.reshape([0.1, 0.3], (2, 1, 1, 1)), sizes)
    told = chen2021._farthest(xr.Dataset({"error": error}))
    assert "at tolerance 0.01 0.300 with d = 200, m = 16, λ = 1 of" in told
    assert "the median 0.200" in told
