"""The figures of Koroko et al. at a size that runs in seconds."""

from pathlib import Path

import matplotlib.pyplot as plt
import numpy as np
import pytest
import xarray as xr

from fisherlab.reproduce import kpsvd_errors
from fisherlab.reproduce import kpsvd_training as figure


def size(folder: Path) -> figure.Size:
    return figure.Size(figure._small, 64, 4, 0.1, 5, folder)


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
    assert [t.get_text() for t in right.get_legend().get_texts()] == ["adam", "kfac"]
    plt.close(drawing)


def test_the_errors_along_a_training_keep_their_order():
    ds = kpsvd_errors.errors(0, quick=True)
    assert ds.step.values.tolist() == [0, 5, 10]
    error = ds.frobenius_error.isel(layer=0)
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
    legend = drawing.axes[1].get_legend()
    assert [t.get_text() for t in legend.get_texts()] == list(kpsvd_errors.METHODS)
    plt.close(drawing)
