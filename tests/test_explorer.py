"""The explorer draws what its controls say; the live figure what was measured so far."""

import sys
from types import SimpleNamespace

import IPython
import matplotlib.pyplot as plt
import numpy as np
import pytest
import torch
import xarray as xr
from PIL import Image
from torch import nn

import fisherlab as fl
from fisherlab.plots import frames
from tests.datasets import comparison, inverses

LAYERS = {"0": (3, 5), "2": (2, 4)}
METHODS = ("exact", "kfac", "theirs", "mine", "diagonal")


@pytest.fixture
def unpainted(monkeypatch):
    """Leave out the pixels, which take the most of the time."""
    monkeypatch.setattr("fisherlab.plots.explorer.picture", lambda figure: b"PNG")
    monkeypatch.setattr("fisherlab.plots.trajectories.picture", lambda figure: b"PNG")


@pytest.fixture
def ds():
    return comparison(LAYERS, METHODS)


@pytest.fixture
def small():
    """Return a network of two layers, and eight examples for it."""
    model = nn.Sequential(nn.Linear(3, 2), nn.Linear(2, 2)).double()
    return model, (torch.randn(8, 3).double(), torch.tensor([0, 1] * 4))


@pytest.fixture
def statistics(small):
    return fl.collect(*small, fl.Categorical())


def lines(explorer, ax=0):
    """Return what is drawn by label."""
    drawn = explorer.figure.axes[ax].lines
    named = [line for line in drawn if not line.get_label().startswith("_")]
    return {line.get_label(): np.asarray(line.get_ydata()) for line in named}


def tables():
    """Results of every kind, with the figures and the controls that they leave."""
    small = comparison(LAYERS, METHODS)
    no_loss = small.drop_vars([n for n in small if n.startswith(("train_", "test_"))])
    one = no_loss.isel(step=[0], damping=[0]).drop_vars("stored_numbers")
    common = ["figure", "quantity", "layers", "methods"]
    return {
        "all": (small, ["by layer", "along training", "against damping", "cost", "losses"],
                [*common, "step", "damping"]),
        "one moment": (one, ["by layer"], common),
        "one layer": (one.isel(layer=0), ["by layer"], ["figure", "quantity", "methods"]),
        "dampings of kinds": (
            no_loss.isel(step=-1, drop=True).assign_coords(damping=["0.1", "α=1", "c"]),
            ["by layer", "cost"], [*common, "damping"],
        ),
        "inverses": (inverses(LAYERS), ["inverse"], ["figure", "layers", "methods"]),
    }  # fmt: skip


@pytest.mark.parametrize("name", tables())
@pytest.mark.usefixtures("unpainted")
def test_controls_are_there_where_a_result_leaves_a_choice(name):
    result, views, controls = tables()[name]
    explorer = fl.explore(result)
    assert list(explorer.controls["figure"].options) == views
    assert list(explorer.controls) == controls
    for view in views:
        explorer.controls["figure"].value = view
        assert explorer.figure.axes
    assert not plt.get_fignums()


@pytest.mark.usefixtures("unpainted")
def test_each_control_changes_the_numbers_that_are_drawn(ds):
    explorer = fl.explore(ds)
    controls = explorer.controls
    found = ds.frobenius_error.sel(step=1000, approximator="kfac")
    np.testing.assert_array_equal(lines(explorer)["kfac"], found)
    controls["step"].value = 20
    found = ds.frobenius_error.sel(step=20, approximator="kfac")
    np.testing.assert_array_equal(lines(explorer)["kfac"], found)
    controls["quantity"].value = "direction_cosine"
    controls["damping"].value = 1e-3
    found = ds.direction_cosine.sel(step=20, damping=1e-3, approximator="kfac")
    np.testing.assert_array_equal(lines(explorer)["kfac"], found)
    controls["layers"].value = ("2",)
    np.testing.assert_array_equal(lines(explorer)["kfac"], found.sel(layer=["2"]))
    controls["figure"].value = "against damping"  # with the same choices as before
    found = ds.direction_cosine.sel(step=20, layer="2", approximator="kfac")
    np.testing.assert_array_equal(lines(explorer)["kfac"], found)
    assert len(explorer.figure.axes) == 1
    explorer.controls["figure"].value = "losses"
    np.testing.assert_array_equal(lines(explorer)["test"], ds.test_loss)


@pytest.mark.usefixtures("unpainted")
def test_methods_come_and_go_in_their_colours(ds):
    explorer = fl.explore(ds)
    before = {line.get_label(): line.get_color() for line in explorer.figure.axes[0].lines}
    explorer.controls["methods"].value = ("mine", "diagonal")
    after = {line.get_label(): line.get_color() for line in explorer.figure.axes[0].lines}
    assert set(after) == {"mine", "diagonal"}
    assert after == {name: before[name] for name in after}


@pytest.mark.usefixtures("unpainted")
def test_a_quantity_without_dampings_holds_their_slider(ds):
    explorer = fl.explore(ds)
    assert explorer.controls["damping"].disabled
    explorer.controls["quantity"].value = "inverse_error"
    assert not explorer.controls["damping"].disabled


@pytest.mark.usefixtures("unpainted")
def test_what_cannot_be_drawn_is_said_in_place_of_the_figure(ds):
    explorer = fl.explore(ds)
    explorer.controls["layers"].value = ()
    assert explorer.figure is None
    assert "Choose at least one of the layers." in explorer.widget.children[1].value
    assert "image/png" not in explorer._repr_mimebundle_()
    explorer.controls["layers"].value = ("0",)
    assert "<img" in explorer.widget.children[1].value
    assert lines(explorer)["kfac"].shape == (1,)


@pytest.mark.usefixtures("unpainted")
def test_trees_are_drawn_by_the_chosen_layers_and_methods():
    explorer = fl.explore(inverses(LAYERS))
    explorer.controls["layers"].value = ("2",)
    methods = explorer.controls["methods"].options[:2]
    explorer.controls["methods"].value = methods
    titles = [ax.get_title() for ax in explorer.figure.axes if ax.get_title()]
    assert titles == list(methods)


@pytest.mark.usefixtures("unpainted")
@pytest.mark.parametrize("view", ["spectra", "density"])
def test_spectra_and_densities_are_told_apart(view):
    dim = "index" if view == "spectra" else "point"
    values = xr.DataArray([[2.0, 1.0]], {"approximator": ["kfac"], dim: [1, 2]})
    node = xr.Dataset({"eigenvalue": values}, attrs={"mean_eigenvalue": 1.0})
    node = node if view == "spectra" else node.assign(share=values / 3)
    explorer = fl.explore(xr.DataTree.from_dict({"0": node, "1": node}))
    assert list(explorer.controls["figure"].options) == [view]
    explorer.controls["layers"].value = ("1",)
    assert [ax.get_title() for ax in explorer.figure.axes] == ["layer 1"]


@pytest.mark.usefixtures("unpainted")
def test_purposes_are_drawn_one_by_one(statistics):
    purposes = [fl.Matrix(), fl.Sharpness()]
    found = fl.compare(statistics, ["kfac", "diagonal"], purpose=purposes)
    explorer = fl.explore(found)
    assert list(explorer.controls) == ["figure", "purpose", "methods"]
    titles = [ax.get_title(loc="left") for ax in explorer.figure.axes]
    assert "relative Frobenius error" in " ".join(titles)
    explorer.controls["purpose"].value = "sharpness"
    explorer.controls["methods"].value = ("kfac",)
    shown = [t.get_text() for ax in explorer.figure.axes for t in ax.get_yticklabels()]
    assert "trace over the exact one" in [
        ax.get_title(loc="left") for ax in explorer.figure.axes
    ]
    assert set(shown) - {""} == {"kfac"}


def test_a_notebook_gets_the_controls_and_a_reader_of_the_file_the_picture(ds):
    bundle = fl.explore(ds)._repr_mimebundle_()
    assert set(bundle) == {
        "application/vnd.jupyter.widget-view+json",
        "image/png",
        "text/plain",
    }
    assert bundle["text/plain"].startswith("Explorer(figure='by layer', quantity=")


@pytest.mark.usefixtures("unpainted")
def test_what_is_no_result_is_refused(ds, monkeypatch):
    with pytest.raises(TypeError, match="Dataset"):
        fl.explore({"kfac": 0.3})
    odd = (
        (
            xr.Dataset({"train_loss": 0.5}),
            "only train_loss. Give one of fl.compare, fl.sweep",
        ),
        (xr.Dataset(), "only no variables"),
        (xr.DataTree(), "only no variables"),
        (ds[["lambda"]], "only lambda"),
        (ds[["inverse_error"]].isel(layer=[]), "only inverse_error"),
    )
    for given, told in odd:
        with pytest.raises(
            ValueError, match=f"nothing to draw by layer and method, {told}"
        ):
            fl.explore(given)
    monkeypatch.setitem(sys.modules, "ipywidgets", None)
    with pytest.raises(ImportError, match="pip install 'fisherlab\\[lab\\]'"):
        fl.explore(ds)


@pytest.mark.parametrize("values", [[1e-10, 1e-9, 0.0], [10**7, 10**7 + 1, 0]])
def test_close_steps_and_small_dampings_are_told_apart(values):
    table = xr.DataArray(range(3), {"at": values})
    assert [int(frames.pick(table, "at", value)) for value in values] == [0, 1, 2]
    with pytest.raises(ValueError, match="is not in the result"):
        frames.pick(table, "at", 2e-10)


# --- the live figure ----------------------------------------------------------------------


def test_a_file_holds_all_that_was_measured_so_far(ds, tmp_path):
    live = fl.plots.Live(file=tmp_path / "training.png")
    for moments in (2, 4):
        live(ds.isel(step=range(moments)))
        assert live.figure.axes[0].lines[0].get_xdata().size == moments
        with Image.open(live.file) as drawn:
            assert drawn.size[0] > 2 * drawn.size[1]
    assert not plt.get_fignums()
    left, right = live.figure.axes
    np.testing.assert_array_equal(left.lines[1].get_ydata(), ds.test_loss)
    kfac = ds.frobenius_error.sel(approximator="kfac")
    whole = ((kfac * ds.fisher_norm) ** 2).sum("layer") / (ds.fisher_norm**2).sum("layer")
    np.testing.assert_allclose(right.lines[0].get_ydata(), whole**0.5, rtol=1e-12)


@pytest.mark.usefixtures("unpainted")
def test_follow_draws_at_every_moment(small, tmp_path):
    model, data = small
    problem = fl.problems.Problem("small", model, fl.Categorical(), data, data)
    live, seen = fl.plots.Live(file=tmp_path / "training.png"), []

    def callback(results):
        live(results)
        seen.append(live.figure.axes[0].lines[0].get_xdata().tolist())

    fl.follow(problem, steps=2, every=1, callback=callback)
    assert seen == [[0], [0, 1], [0, 1, 2]]


@pytest.mark.usefixtures("unpainted")
def test_one_layer_and_another_metric_are_drawn_when_asked_for(ds, tmp_path):
    live = fl.plots.Live("direction_cosine", layer="2", file=tmp_path / "a.png")
    live(ds)
    cosine = ds.direction_cosine.sel(layer="2", approximator="mine").isel(damping=1)
    shown = {line.get_label(): line.get_ydata() for line in live.figure.axes[1].lines}
    np.testing.assert_array_equal(shown["mine"], cosine)
    for live, told in (
        (fl.plots.Live("gain", file=tmp_path / "a.png"), "no variable 'gain'"),
        (fl.plots.Live(layer="9", file=tmp_path / "a.png"), "no layer"),
        (fl.plots.Live("train_loss", file=tmp_path / "a.png"), "no methods or no steps"),
    ):
        with pytest.raises(ValueError, match=told):
            live(ds)
    with pytest.raises(ValueError, match="neither losses nor errors"):
        fl.plots.Live(file=tmp_path / "a.png")(ds[["lambda"]])
    assert not plt.get_fignums()


def test_a_cell_of_a_notebook_shows_one_figure_that_is_replaced(ds, monkeypatch):
    with pytest.raises(ValueError, match=r"Live\(file='training.png'\)"):
        fl.plots.Live()
    monkeypatch.setattr(IPython, "get_ipython", lambda: SimpleNamespace(kernel=None))
    shown = []
    handle = SimpleNamespace(update=shown.append)

    def display(picture, display_id):
        shown.append(picture)
        return handle

    monkeypatch.setattr("IPython.display.display", display)
    live = fl.plots.Live()
    live(ds[["train_loss"]].isel(step=[0, 1]))
    live(ds[["train_loss"]])
    assert len(shown) == 2
    assert shown[0].data[1:4] == b"PNG"
    assert shown[0].data != shown[1].data
