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


def run_of(losses, seconds):
    """Return a run as `follow` gives it."""
    step = np.arange(len(losses)) * 10
    lines = {"train_loss": losses, "test_loss": losses, "seconds": seconds}
    return xr.Dataset(
        {name: ("step", list(v)) for name, v in lines.items()}, {"step": step}
    )


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


def test_runs_are_compared_at_equal_times(tmp_path):
    slow, fast = run_of([4.0, 2.0], [0.0, 0.1]), run_of([4.0, 2.0, 1.0], [0.0, 0.05, 0.1])
    settings = [{"lr": 0.1}, {"lr": 0.2, "damping": 3.0}]
    ds = figure.compared(["adam", "kfac-koroko"], [slow, fast], settings, size(tmp_path))
    half = ds.sel(seconds=0.05, method="nearest")
    np.testing.assert_allclose(half.train_loss, [3.0, 2.0])
    np.testing.assert_allclose(half.steps, [5.0, 10.0])
    np.testing.assert_array_equal(ds.damping, [np.nan, 3.0])
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
