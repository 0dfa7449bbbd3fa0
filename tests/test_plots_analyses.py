"""Figures of the analyses beside `fl.compare` show the numbers they are given."""

import traceback
from pathlib import Path

import matplotlib as mpl
import matplotlib.pyplot as plt
import numpy as np
import pandas as pd
import pytest
import xarray as xr
from hypothesis import given, settings
from hypothesis import strategies as st

from fisherlab import plots
from fisherlab.plots import saving
from fisherlab.plots.matrices import maxima
from tests import analyses
from tests.datasets import comparison, inverses


@pytest.fixture(autouse=True)
def _leaves_nothing():
    before = dict(mpl.rcParams)
    yield
    plt.close("all")
    assert dict(mpl.rcParams) == before


def lines(ax):
    return {
        line.get_label(): line for line in ax.lines if not line.get_label().startswith("_")
    }


# --- the canvas -------------------------------------------------------------------------

MANY = comparison(steps=(0, 10, 500), layers={f"l.{i}.out_proj": (20, 21) for i in (1, 2)})
MANY = MANY.assign_coords(
    approximator=[
        *MANY["approximator"].values[:-1],
        "one's own, of a very long name indeed",
    ]
)
RUNS = MANY.isel(step=[0, 0]).rename(step="run").assign_coords(run=["a long name", "b"])
BLOCKS = {name: (20 * i, 20 * i + 20) for i, name in enumerate(MANY["layer"].values)}
DRAWN = {
    "errors": lambda: plots.errors(MANY),
    "noise": lambda: plots.errors(analyses.uncertainty()),
    "direction_cosines": lambda: plots.direction_cosines(MANY),
    "trajectory": lambda: plots.trajectory(MANY),
    "damping_sweep": lambda: plots.damping_sweep(MANY, layers=["l.1.out_proj"]),
    "runs": lambda: plots.runs(RUNS),
    "losses": lambda: plots.losses(MANY),
    "cost": lambda: plots.cost(MANY),
    "pareto": lambda: plots.pareto(analyses.pareto()),
    "decomposition": lambda: plots.decomposition(analyses.decomposition()),
    "error_sources": lambda: plots.error_sources(analyses.decomposition()),
    "rank_curve": lambda: plots.rank_curve(analyses.rank_curve()),
    "spectra": lambda: plots.spectra(analyses.spectra()),
    "coverage_map": lambda: plots.coverage_map(analyses.coverage()),
    "layer_table": lambda: plots.layer_table(analyses.decomposition()["coupling"]),
    "inverse_heatmap": lambda: plots.inverse_heatmap(inverses({"l.1": (2, 4)})),
    "heatmap": lambda: plots.heatmap(
        xr.DataArray(np.eye(40), dims=("row", "col")), outlines=BLOCKS
    ),
}


DEAR = {"spectra", "rank_curve", "error_sources", "inverse_heatmap", "pareto", "noise"}


@pytest.mark.parametrize(
    "name",
    [pytest.param(n, marks=[pytest.mark.slow] if n in DEAR else []) for n in DRAWN],
)
def test_everything_drawn_lies_on_the_canvas(name):
    """So that a plain `savefig` keeps it."""
    figure = DRAWN[name]().figure
    figure.draw_without_rendering()
    drawn, (width, height) = figure.get_tightbbox(), figure.get_size_inches()
    assert min(drawn.x0, drawn.y0, width - drawn.x1, height - drawn.y1) >= 0


ELSE = [None, 3, "text", [], {}, xr.Dataset(), xr.DataTree(), xr.DataArray([1.0])]
FIGURES = [
    getattr(plots, name)
    for name in [*DRAWN, "density", "own_dampings", "purposes"]
    if hasattr(plots, name)
] + [plots.explore, plots.table]


@pytest.mark.parametrize("figure", FIGURES)
def test_what_is_no_result_of_its_own_is_refused_in_a_sentence(figure):
    for other in ELSE:
        with pytest.raises((TypeError, ValueError)) as caught:
            figure(other)
        ours = Path(traceback.extract_tb(caught.tb)[-1].filename)
        assert ours.parent.name in ("plots", "jaxtyping"), other
        assert len(str(caught.value)) > 30


# --- parts of the error -----------------------------------------------------------------


@pytest.mark.parametrize("layer", [None, "4"])
def test_stacked_parts_end_at_the_squared_error_and_tell_its_root(layer):
    ds = analyses.decomposition()
    ax = plots.decomposition(ds, layer=layer)
    whole = (
        ds["network_squared_part"].sum("network_part")
        if layer is None
        else ds["squared_part"].sel(layer=layer).sum("part")
    )
    tops = [bar.get_y() + bar.get_height() for bar in ax.containers[-1]]
    np.testing.assert_allclose(tops, whole)
    assert [t.get_text() for t in ax.texts] == [f"{v**0.5:.3f}" for v in whole.values]
    assert ax.get_ylim()[1] > max(tops)
    assert ax.get_ylim()[0] == 0


def test_an_approximation_without_parts_is_left_out_not_drawn_as_zero():
    ds = analyses.decomposition()
    ds["network_squared_part"].loc[{"approximator": "kpsvd"}] = np.nan
    ax = plots.decomposition(ds)
    assert [t.get_text() for t in ax.get_xticklabels()] == [
        *("kfac", "kpsvd-2", "mini-block", "diagonal")
    ]
    ds["network_squared_part"][:] = np.nan
    assert "no approximation" in plots.decomposition(ds).texts[0].get_text()


def test_the_ladder_of_sources_has_a_bar_per_source_and_what_labels_cost_alone():
    ds = analyses.decomposition()
    grid = plots.error_sources(ds, layers=["0", "8"])
    assert list(grid.axes_dict) == ["0", "8"]
    ax = grid.axes_dict["8"]
    for bars, source in zip(ax.containers, ds["source"].values, strict=True):
        expected = ds["error"].sel(layer="8", source=source)
        np.testing.assert_allclose([bar.get_height() for bar in bars], expected)
    levels = [line.get_ydata()[0] for line in ax.lines]
    np.testing.assert_allclose(levels, [0.12, 0.5])


# --- curves -----------------------------------------------------------------------------


def test_spectra_are_relative_to_the_mean_and_end_at_the_numerical_rank():
    tree = analyses.spectra()
    grid = plots.spectra(tree, layers=["2"])
    drawn = lines(grid.axes_dict["2"])
    node = tree["2"]
    for name, line in drawn.items():
        values = node["eigenvalue"].sel(approximator=name).values
        values = values[values > 1e-14 * values.max()]
        expected = values / node.attrs["mean_eigenvalue"]
        np.testing.assert_allclose(line.get_ydata(), expected)
    assert len(drawn["exact"].get_ydata()) == 210
    assert len(drawn["kfac"].get_ydata()) == 420


def test_words_in_a_panel_of_a_density_lie_above_its_curves():
    names = ["exact", "kfac", "kpsvd", "kpsvd-2", "mini-block", "diagonal"]
    dims = ("approximator", "point")
    values, shares = np.tile([4.0, 0.0], (6, 1)), np.tile([0.25, 0.75], (6, 1))
    node = xr.Dataset(
        {"eigenvalue": (dims, values), "share": (dims, shares)},
        {"approximator": names},
        {"mean_eigenvalue": 1.0, "lambda": 0.1},
    )
    for layers in (["fc"], ["a", "b", "c", "d"]):
        tree = xr.DataTree.from_dict(dict.fromkeys(layers, node))
        grid = plots.density(tree)
        grid.figure.canvas.draw()
        for ax in grid.axes_dict.values():
            words = ax.texts[0].get_window_extent()
            top = max(
                np.max(line.get_ydata()) for line in ax.lines if len(line.get_ydata()) > 2
            )
            assert words.y0 >= ax.transData.transform((1.0, top))[1]
        plt.close("all")


def test_a_method_without_eigenvalues_is_left_out_of_the_spectra():
    tree = analyses.spectra()
    for node in tree.children.values():
        node["eigenvalue"].loc[{"approximator": "kfac"}] = np.nan
    for ax in plots.spectra(tree).axes_dict.values():
        assert list(lines(ax)) == ["exact", "mini-block"]
    with pytest.raises(ValueError, match=r"no layer \['9'\] in the tree"):
        plots.spectra(tree, layers=["9"])
    with pytest.raises(ValueError, match="make it by"):
        plots.spectra(inverses({"2": (2, 3)}))


@pytest.mark.parametrize("x", ["rank", "stored_numbers"])
def test_rank_curves_show_the_best_errors(x):
    ds = analyses.rank_curve()
    line = lines(plots.rank_curve(ds, x=x).axes_dict["4"])["Kronecker products"]
    cell = {"layer": "4", "family": "kronecker"}
    np.testing.assert_allclose(line.get_ydata(), ds["error"].sel(cell))
    at = ds["rank"] if x == "rank" else ds["stored_numbers"].sel(cell)
    np.testing.assert_allclose(line.get_xdata(), at)


# --- costs ------------------------------------------------------------------------------


def test_the_front_joins_what_none_other_beats():
    ds = analyses.pareto()
    ax = plots.pareto(ds, cost="solve_flops")
    mark = lines(ax)["kpsvd"]
    price = ds["cost_value"].sel(cost="solve_flops", approximator="kpsvd").sum()
    error = ds["error"].sel(approximator="kpsvd")
    np.testing.assert_allclose(mark.get_xdata(), price)
    np.testing.assert_allclose(mark.get_ydata(), error.median())
    (front,) = [line for line in ax.lines if line.get_label() == "_front"]
    marks = [
        tuple(map(float, (m.get_xdata()[0], m.get_ydata()[0]))) for m in lines(ax).values()
    ]
    joined = set(zip(*map(tuple, front.get_data()), strict=True))
    for x, y in marks:
        beaten = any(a <= x and b <= y and (a, b) != (x, y) for a, b in marks)
        assert ((x, y) in joined) == (not beaten)


def test_an_unknown_cost_names_those_there_are():
    with pytest.raises(ValueError, match=r"no errors at cost 'joules'.*stored_bytes"):
        plots.pareto(analyses.pareto(), cost="joules")


# --- noise ------------------------------------------------------------------------------


def test_confidence_intervals_take_the_place_of_the_range():
    ds = analyses.uncertainty()
    ax = plots.errors(ds)
    segments = ax.containers[0].lines[2][0].get_segments()
    np.testing.assert_allclose(
        [(s[0, 1], s[1, 1]) for s in segments],
        np.stack(
            [ds[f"frobenius_error_{e}"].sel(approximator="kfac") for e in ("low", "high")],
            -1,
        ),
    )
    without = ds.drop_vars(["frobenius_error_low", "frobenius_error_high"])
    segments = plots.errors(without).containers[0].lines[2][0].get_segments()
    errors = ds["frobenius_error"].sel(approximator="kfac")
    np.testing.assert_allclose([s[0, 1] for s in segments], errors.min("seed"))


def test_what_lies_within_the_noise_of_the_reference_is_shaded():
    ds = analyses.uncertainty()
    ax = plots.errors(ds)
    (shade,) = [p for p in ax.patches if p.get_label() == "within noise"]
    np.testing.assert_allclose(shade.get_data().values, ds["noise_floor"])
    assert "within noise" in [t.get_text() for t in ax.get_legend().get_texts()]


# --- tables -----------------------------------------------------------------------------


def test_a_layer_table_writes_its_numbers_until_they_are_too_many():
    ds = analyses.decomposition()
    ax = plots.layer_table(ds["coupling"])
    np.testing.assert_array_equal(ax.images[0].get_array(), ds["coupling"])
    assert len(ax.texts) == 36
    names = [f"l{i}" for i in range(20)]
    many = xr.DataArray(np.eye(20), {"layer": names, "other_layer": names})
    assert not plots.layer_table(many).texts
    with pytest.raises(ValueError, match="layer × layer"):
        plots.layer_table(ds["source_error"])


def test_a_coverage_map_has_a_bar_per_parameter_and_totals_per_form():
    rows = analyses.coverage()
    ax = plots.coverage_map(rows)
    widths = [bar.get_width() for bar in ax.patches]
    np.testing.assert_allclose(widths, np.maximum(rows["numbers"], 0.7))
    words = " ".join(t.get_text() for t in ax.get_legend().get_texts())
    assert all(told in words for told in ("5,140", "64,000", "not covered: 300"))
    assert "no parameters" in plots.coverage_map(rows[:0]).texts[0].get_text()


# --- matrices ---------------------------------------------------------------------------


@settings(max_examples=60, deadline=None)
@given(
    sizes=st.lists(st.integers(1, 60), min_size=1, max_size=6),
    limit=st.integers(1, 50),
    seed=st.integers(0, 9),
)
def test_downsampling_loses_no_entry_and_mixes_no_blocks(sizes, limit, seed):
    p = sum(sizes)
    borders = np.cumsum(sizes).tolist()
    labels = np.repeat(np.arange(len(sizes)), sizes)
    same = labels[:, None] == labels[None, :]
    matrix = np.where(same, np.random.default_rng(seed).normal(size=(p, p)), 0.0)
    shown = maxima(matrix, limit, borders)
    assert max(shown.shape) <= limit
    assert shown.max() == np.abs(matrix).max()
    factor = -(-p // limit)
    if min(sizes) >= 2 * factor and factor > 1:
        # Every pixel lies in one block: between blocks there is nothing to see.
        blocks = maxima(np.where(same, labels[:, None] + 1.0, 0.0), limit, borders)
        counted = [np.unique(row[row > 0]) for row in blocks]
        assert all(len(found) == 1 for found in counted)


def test_a_network_heatmap_names_its_layers_and_keeps_them_apart():
    n = 2400
    matrix = np.zeros((n, n), dtype=np.float32)
    matrix[:1001, :1001] = 1.0
    matrix[1001:, 1001:] = 2.0
    blocks = {"fc1": (0, 1001), "fc2": (1001, n)}
    ax = plots.heatmap(xr.DataArray(matrix, dims=("r", "c")), outlines=blocks, vmax=2.0)
    shown = ax.images[0].get_array()
    assert max(shown.shape) <= 2000
    rows = {tuple(np.unique(row)) for row in shown}
    assert rows == {(0.0, 1.0), (0.0, 2.0)}
    assert [t.get_text() for t in ax.get_xticklabels()] == ["fc1", "fc2"]
    np.testing.assert_allclose(ax.get_yticks(), [500.5, 1700.5])


def test_logarithmic_inverses_share_the_limits_of_the_exact_one():
    tree = inverses({"2": (4, 5)})
    figure = plots.inverse_heatmap(tree, scale="log")
    limits = {ax.images[0].get_clim() for ax in figure.axes if ax.get_images()}
    (only,) = limits
    exact = np.abs(tree["2"]["inverse"].sel(approximator="exact").values)
    assert only[1] == pytest.approx(np.percentile(exact, 99.5))
    assert 0 < only[0] < only[1] / 9


# --- values under the pointer -----------------------------------------------------------


def test_marks_lie_where_their_points_are_drawn(tmp_path):
    ds = comparison(layers={"fc1": (3, 4), "fc2": (2, 4)}, approximators=("exact", "kfac"))
    ax = plots.errors(ds)
    (file,), kept = saving.write(ax, tmp_path / "errors", formats=("png",), dpi=100)
    found = saving.marks(ax.figure, kept)
    with saving.Image.open(file) as picture:
        pixels = np.asarray(picture.convert("RGB")).astype(int)
    blue = np.array([0, 114, 178])
    for mark in found:
        row, column = round(mark.y * pixels.shape[0]), round(mark.x * pixels.shape[1])
        assert np.abs(pixels[row, column] - blue).max() < 30
    error = ds["frobenius_error"].isel(step=-1).sel(approximator="kfac").values
    assert [mark.text for mark in found] == [
        f"kfac · fc1 3×4 · {error[0]:.4g}",
        f"kfac · fc2 2×4 · {error[1]:.4g}",
    ]


def test_a_limited_palette_keeps_the_picture(tmp_path):
    ax = plots.heatmap(xr.DataArray(np.arange(64.0).reshape(8, 8), dims=("r", "c")))
    saving.write(ax, tmp_path / "all", formats=("png",))
    saving._reduce(tmp_path / "all.png", 128, tmp_path / "few.png")
    full, few = (
        np.asarray(saving.Image.open(tmp_path / f"{n}.png").convert("L")).astype(float)
        for n in ("all", "few")
    )
    assert np.abs(full - few).max() <= 16
    assert np.abs(full - few).mean() < 1


def test_the_numbers_of_every_result_can_be_laid_out(tmp_path):
    for ds in (analyses.rank_curve(), analyses.pareto(), analyses.decomposition()):
        rows = plots.table(ds)
        assert len(rows) >= 6
        assert not rows.columns.duplicated().any()
    file = plots.save(plots.spectra(analyses.spectra()), tmp_path / "s", analyses.spectra())
    rows = pd.read_csv(file[-1], dtype={"layer": str})
    assert set(rows["layer"]) == {"2", "4", "6", "8", "10"}


def test_the_accessor_draws_every_analysis():
    assert analyses.decomposition().fisherlab.decomposition().containers
    assert analyses.decomposition().fisherlab.error_sources().axes.size
    assert analyses.decomposition().fisherlab.layer_table().images
    assert analyses.rank_curve().fisherlab.rank_curve().axes.size
    assert analyses.pareto().fisherlab.pareto(cost="build_seconds").lines
    assert analyses.spectra().fisherlab.spectra().axes.size
