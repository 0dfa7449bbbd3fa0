"""Figures show the numbers they are given and leave nothing behind."""

import matplotlib as mpl
import matplotlib.pyplot as plt
import numpy as np
import pandas as pd
import pytest
import xarray as xr

import fisherlab as fl
from fisherlab import plots
from fisherlab.catalogue import FLOOR
from fisherlab.plots.matrices import maxima, mini_blocks
from fisherlab.plots.style import KNOWN, text
from tests.datasets import NAMES, comparison, inverses


@pytest.fixture(autouse=True)
def _leaves_nothing():
    before = dict(mpl.rcParams)
    state = np.random.get_state()[1].copy()  # noqa: NPY002
    yield
    plt.close("all")
    assert dict(mpl.rcParams) == before
    np.testing.assert_array_equal(np.random.get_state()[1], state)  # noqa: NPY002


@pytest.fixture(scope="module")
def ds():
    return comparison()


def lines(ax):
    return {
        line.get_label(): line for line in ax.lines if not line.get_label().startswith("_")
    }


def test_errors_draws_the_last_step_of_every_approximation(ds):
    ax = plots.errors(ds)
    expected = ds["frobenius_error"].isel(step=-1).transpose("approximator", "layer")
    drawn = lines(ax)
    assert list(drawn) == [name for name in NAMES if name != "exact"]
    for name, line in drawn.items():
        np.testing.assert_array_equal(
            line.get_ydata(), expected.sel(approximator=name).values
        )
    assert [t.get_text().split("\n")[0] for t in ax.get_xticklabels()] == list(
        ds["layer"].values
    )


def test_errors_draws_the_step_that_is_asked_for(ds):
    line = lines(plots.errors(ds, step=20))["kfac"]
    expected = ds["frobenius_error"].sel(step=20, approximator="kfac")
    np.testing.assert_array_equal(line.get_ydata(), expected.values)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"step": 7}, r"step 7 is not in the result; it has: \[0, 20, 200, 1000\]"),
        ({"metric": "nonsense"}, "no variable 'nonsense'; it has: frobenius_error"),
    ],
)
def test_errors_names_what_is_not_there(ds, options, message):
    with pytest.raises(ValueError, match=message):
        plots.errors(ds, **options)


def test_scale_is_logarithmic_only_where_the_range_asks_for_it(ds):
    assert plots.errors(ds).get_yscale() == "linear"
    wide = ds.copy(deep=True)
    wide["frobenius_error"].loc[{"approximator": "kpsvd-2"}] = 1e-4
    assert plots.errors(wide).get_yscale() == "log"


def test_values_below_the_floor_are_drawn_on_it_not_below(ds):
    near = ds.copy(deep=True)
    near["frobenius_error"].loc[{"approximator": "kpsvd-2"}] = 1e-12
    near["frobenius_error"].loc[{"approximator": "kpsvd"}] = 1e-4
    ax = plots.errors(near)
    assert min(lines(ax)["kpsvd-2"].get_ydata()) == FLOOR


def test_given_axes_are_used_and_returned(ds):
    _, ax = plt.subplots()
    assert plots.errors(ds, ax=ax) is ax
    assert plots.direction_cosines(ds, ax=plt.subplots()[1]).get_ylim()[1] > 1
    assert len(plt.get_fignums()) == 2


def test_an_approximation_without_values_is_left_out(ds):
    partial = ds.copy(deep=True)
    partial["frobenius_error"].loc[{"approximator": "kfac"}] = np.nan
    assert "kfac" not in lines(plots.errors(partial))


def test_the_exact_block_is_not_drawn_even_if_its_error_is_the_floor_itself(ds):
    floored = ds.copy(deep=True)
    floored["frobenius_error"].loc[{"approximator": "exact"}] = FLOOR
    assert "exact" not in lines(plots.errors(floored))


def test_nothing_measured_is_said_in_words(ds):
    nothing = ds.copy(deep=True)
    nothing["frobenius_error"][:] = np.nan
    assert "no approximation" in plots.errors(nothing).texts[0].get_text()
    assert "not measured" in plots.trajectory(nothing).axes.flat[0].texts[0].get_text()


def test_a_layer_below_the_floor_does_not_squeeze_the_others(ds):
    plain = plots.trajectory(ds).axes_dict
    floored = ds.copy(deep=True)
    first, *others = (str(name) for name in ds["layer"].values)
    floored["frobenius_error"].loc[{"layer": first, "approximator": "kpsvd"}] = FLOOR
    floored["frobenius_error"].loc[{"layer": others[0], "approximator": "kfac"}] = 0.9
    floored["frobenius_error"].loc[{"layer": others[0], "approximator": "kpsvd"}] = 0.02
    axes = plots.trajectory(floored).axes_dict
    assert axes[first].get_yscale() == "log"
    assert 0.001 < axes[others[0]].get_ylim()[0] < 0.02
    assert "below 1e-06" in axes[first].texts[0].get_text()
    assert not any(ax.texts for ax in [*plain.values(), axes[others[0]]])


@pytest.mark.parametrize(("count", "told"), [(20, 20), (63, 32)])
def test_layers_of_a_deep_network_are_named_where_their_names_fit(count, told):
    deep = comparison(layers={f"block{i}.conv": (2, 3) for i in range(count)}, steps=None)
    ax = plots.errors(deep)
    seen = [t.get_text().split("\n")[0] for t in ax.get_xticklabels()]
    assert len(ax.get_xticks()) == count  # marks find the names of all
    assert len(seen) == told
    assert seen[:2] == ["block0.conv", f"block{1 if count == told else 2}.conv"]


def test_trajectory_has_a_panel_per_layer_with_its_own_values(ds):
    grid = plots.trajectory(ds)
    assert list(grid.axes_dict) == list(ds["layer"].values)
    for layer, ax in grid.axes_dict.items():
        expected = ds["frobenius_error"].sel(layer=layer, approximator="kpsvd")
        np.testing.assert_allclose(lines(ax)["kpsvd"].get_ydata(), expected.values)
        low, high = ax.get_ylim()
        assert low <= ds["frobenius_error"].min()
        assert high >= ds["frobenius_error"].sel(approximator="diagonal").max()


def test_bands_are_the_range_over_the_seeds_and_lines_the_mean(ds):
    seeds = xr.concat([ds["frobenius_error"], ds["frobenius_error"] + 0.2], "seed")
    many = xr.Dataset({"frobenius_error": seeds.sel(approximator=["kfac"])})
    ax = plots.trajectory(many, layers=["4"]).axes_dict["4"]
    expected = ds["frobenius_error"].sel(layer="4", approximator="kfac") + 0.1
    np.testing.assert_allclose(lines(ax)["kfac"].get_ydata(), expected.values)
    band = ax.collections[0].get_paths()[0].vertices[:, 1]
    np.testing.assert_allclose(band.max() - 0.2, expected.max() - 0.1)


def test_outlines_leave_the_picture_and_a_missing_inverse_says_why():
    """Kernels of a convolution would bury it: its rows are outlined, or nothing."""
    shape, size = [12, 8 * 9], 9
    entries = np.eye(12 * 72)[None].repeat(2, 0)
    entries[1] = np.nan
    node = xr.Dataset(
        {
            "inverse": (("approximator", "row", "col"), entries),
            "status": ("approximator", ["ok", "kpsvd-2 is not positive definite: ..."]),
        },
        {"approximator": ["exact", "kpsvd-2"]},
        {"weight_shape": shape, "mini_block_size": size, "lambda": 0.1},
    )
    figure = plots.inverse_heatmap(xr.DataTree.from_dict({"conv": node}))
    first, second, bar = figure.axes
    (squares,) = first.collections
    assert len(squares.get_paths()) == 12
    assert [one.get_text() for one in second.texts] == ["indefinite"]
    assert "λ = 0.1" in bar.get_ylabel()


@pytest.mark.parametrize(("count", "drawn"), [(8, 1), (200, 0)])
def test_a_heatmap_drops_outlines_too_small_to_see_through(count, drawn):
    matrix = xr.DataArray(np.eye(2 * count), dims=("row", "col"))
    squares = [(2 * k, 2 * k + 2) for k in range(count)]
    assert len(plots.heatmap(matrix, outlines=squares).collections) == drawn
    named = plots.heatmap(matrix, outlines={"fc": (0, 2), "out": (2, 2 * count)})
    assert len(named.collections) == 1


@pytest.mark.parametrize("pool", ["rms", "norm"])
def test_a_pixel_is_a_pair_of_kernels_and_a_bias_its_own(pool):
    """A window of them keeps the colours of the whole."""
    spans = plots.kernels((3, 5), 2)
    entries = np.random.default_rng(0).normal(size=(15, 15))
    image = xr.DataArray(entries, dims=("row", "col"))
    ax = plots.heatmap(image, kernels=spans, pool=pool, outlines=[(0, 5), (5, 10)])
    groups = [[0, 1], [2, 3], [4], [5, 6], [7, 8], [9], [10, 11], [12, 13], [14]]
    parts = [[entries[np.ix_(a, b)] for b in groups] for a in groups]
    expected = np.array(
        [
            [np.sqrt((p**2).mean() if pool == "rms" else (p**2).sum()) for p in line]
            for line in parts
        ]
    )
    np.testing.assert_allclose(ax.images[0].get_array(), expected)
    boxes = [
        path.get_extents().intervalx.tolist() for path in ax.collections[0].get_paths()
    ]
    assert boxes == [[0, 3], [3, 6]], "a row of the weight: two kernels and a bias"
    part = plots.heatmap(image, kernels=spans, pool=pool, rows=(3, 7), columns=(2, 9))
    np.testing.assert_allclose(part.images[0].get_array(), expected[3:7, 2:9])
    assert part.images[0].get_extent() == [2, 9, 7, 3]
    assert part.images[0].get_clim() == ax.images[0].get_clim()


def test_a_window_shows_the_entries_that_it_names():
    entries = np.arange(36.0).reshape(6, 6)
    blocks = {"a": (0, 2), "b": (2, 5), "c": (5, 6)}
    image = xr.DataArray(entries, dims=("row", "col"))
    ax = plots.heatmap(image, outlines=blocks, rows=(1, 4), columns=(4, 6))
    np.testing.assert_array_equal(ax.images[0].get_array(), entries[1:4, 4:6])
    assert [t.get_text() for t in ax.get_yticklabels()] == ["a", "b"]
    assert [t.get_text() for t in ax.get_xticklabels()] == ["b", "c"]
    assert (ax.get_xlim(), ax.get_ylim()) == ((4, 6), (4, 1))
    for options in ({"rows": (4, 4)}, {"columns": (0, 7)}, {"kernels": [(0, 2), (1, 3)]}):
        with pytest.raises(ValueError, match="heatmap"):
            plots.heatmap(image, **options)
    with pytest.raises(ValueError, match="1 to 4 entries are expected"):
        plots.kernels((2, 4), 5)


def test_inverses_are_drawn_by_mini_blocks():
    tree = inverses({"fc": (3, 4)})
    names = [str(n) for n in tree["fc"]["approximator"].values]
    figure = plots.inverse_heatmap(tree, pool="norm", rows=(0, 2))
    entries = tree["fc"]["inverse"].values.reshape(len(names), 3, 4, 3, 4)
    norms = np.sqrt((entries**2).sum((2, 4)))
    np.testing.assert_allclose(figure.axes[0].images[0].get_array(), norms[0, :2])
    assert figure.axes[0].images[0].get_clim()[1] == pytest.approx(
        np.percentile(norms[0], 99.5)
    )


def test_losses_of_runs_are_drawn_together(ds):
    """A colour a run, none of a method's for a single one; the test set dashed."""
    one = xr.Dataset(
        {"train_loss": ("step", [2.0, 1.0]), "test_loss": ("step", [2.1, 1.5])},
        {"step": [0, 5]},
    )
    ax = plots.losses({"sgd": one, "kfac": one - 0.5})
    assert [line.get_label() for line in ax.lines] == [
        "sgd, training", "sgd, test", "kfac, training", "kfac, test",
    ]  # fmt: skip
    colours = [line.get_color() for line in ax.lines]
    assert colours[0] == colours[1] != colours[2] == colours[3]
    np.testing.assert_array_equal(ax.lines[3].get_ydata(), [1.6, 1.0])
    methods = {
        style.color for style in plots.style.styles(list(fl.approximators())).values()
    }
    assert not {line.get_color() for line in plots.losses(one).lines} & methods
    with pytest.raises(ValueError, match="the run 'none' has neither"):
        plots.losses({"sgd": one, "none": one[["step"]]})


def test_an_empty_panel_says_why():
    error = xr.DataArray(
        [[[0.5, 0.1]], [[np.nan, np.nan]]],
        {"layer": ["0", "1"], "approximator": ["kfac"], "damping": [1e-3, 1e-1]},
        name="inverse_error",
    )
    status = xr.DataArray(
        [["ok"], ["too large"]], error[..., 0].drop_vars("damping").coords
    )
    grid = plots.damping_sweep(xr.Dataset({"inverse_error": error, "status": status}))
    assert [one.get_text() for one in grid.axes_dict["1"].texts] == ["too large"]
    assert not grid.axes_dict["0"].texts


def test_damping_sweep_needs_several_dampings(ds):
    grid = plots.damping_sweep(ds)
    x = lines(grid.axes_dict["0"])["kfac"].get_xdata()
    np.testing.assert_array_equal(x, ds["damping"].values)
    with pytest.raises(ValueError, match="nothing to sweep"):
        plots.damping_sweep(ds.isel(damping=0))


def test_cost_marks_all_layers_together(ds):
    ax = plots.cost(ds)
    last = ds.isel(step=-1).sel(approximator="kfac")
    p = last["d_out"] * last["d_in"]
    share = last["stored_numbers"].sum() / (p * (p + 1) / 2).sum()
    mark = lines(ax)["kfac"]
    np.testing.assert_allclose(mark.get_xdata(), share)
    left = (last["frobenius_error"] * last["fisher_norm"]) ** 2
    error = np.sqrt(left.sum() / (last["fisher_norm"] ** 2).sum())
    np.testing.assert_allclose(mark.get_ydata(), error)
    bare = lines(plots.cost(ds.drop_vars("fisher_norm")))["kfac"]
    np.testing.assert_allclose(bare.get_ydata(), last["frobenius_error"].median())


def test_cost_sets_apart_who_lacks_layers_and_who_costs_the_same(ds):
    here = ds["layer"] == ds["layer"][0]
    ax = plots.cost(ds.where(~here | (ds["approximator"] != "kpsvd-2")))
    marks = lines(ax)
    hollow = [n for n, mark in marks.items() if mark.get_markerfacecolor() == "white"]
    assert hollow == ["kpsvd-2"]
    (front,) = (line for line in ax.lines if line.get_label() == "_front")
    assert marks["kpsvd-2"].get_xdata()[0] not in front.get_xdata()
    kfac, kpsvd = (
        line.get_transform().transform((line.get_xdata()[0], 0.5))[0]
        for line in (marks["kfac"], marks["kpsvd"])
    )
    assert marks["kfac"].get_xdata() == marks["kpsvd"].get_xdata()
    assert kpsvd - kfac > 5  # dots


def test_each_approximator_keeps_its_colour_marker_and_dash(ds):
    looks = []
    for ax in (plots.errors(ds), plots.trajectory(ds).axes.flat[0]):
        line = lines(ax)["kfac-corrected"]
        looks.append((line.get_color(), line.get_marker(), line.get_linestyle()))
    assert looks[0] == looks[1]


def test_known_looks_differ_in_colour_and_in_grey():
    looks = list(KNOWN.values())
    assert len({look.color for look in looks}) == len(looks)
    assert len({(look.marker, look.dash) for look in looks}) == len(looks)


@pytest.mark.parametrize("name", ["a$b", "層", "x" * 300, "<script>", "a\nb", "$\\frac{"])
def test_any_layer_name_can_be_drawn(name, tmp_path):
    odd = comparison(layers={name: (4, 5), "other": (4, 5)}, steps=(0, 1))
    figure = plots.errors(odd)
    plots.save(figure, tmp_path / "odd", formats=("png",))
    plots.save(plots.trajectory(odd), tmp_path / "facets", formats=("png",))
    assert len(text(name).replace("\\$", "$")) <= 18


# --- matrices ------------------------------------------------------------------------


def test_heatmap_shows_absolute_values_and_the_limit_it_is_given():
    matrix = xr.DataArray([[1.0, -2.0], [0.0, 3.0]], dims=("row", "col"))
    image = plots.heatmap(matrix, vmax=2.5).images[0]
    np.testing.assert_array_equal(image.get_array(), [[1, 2], [0, 3]])
    assert image.get_clim() == (0.0, 2.5)


@pytest.mark.parametrize("limit", [1, 3, 4, 10])
def test_downsampling_keeps_the_largest_entry_of_each_pixel(limit):
    matrix = np.random.default_rng(0).normal(size=(10, 7))
    factors = [-(-size // limit) for size in matrix.shape]
    expected = [
        [
            np.abs(matrix[i : i + factors[0], j : j + factors[1]]).max()
            for j in range(0, 7, factors[1])
        ]
        for i in range(0, 10, factors[0])
    ]
    np.testing.assert_array_equal(maxima(matrix, limit), expected)


def test_heatmap_of_a_large_matrix_keeps_a_single_large_entry():
    matrix = np.zeros((4001, 4001), dtype=np.float32)
    matrix[4000, 17] = -7.0
    ax = plots.heatmap(xr.DataArray(matrix, dims=("row", "col")), vmax=7.0)
    shown = ax.images[0].get_array()
    assert max(shown.shape) <= 2000
    assert shown.max() == 7.0
    assert ax.get_xlim() == (0, 4001)


def test_logarithmic_heatmap_ends_at_the_same_limit():
    ax = plots.heatmap(xr.DataArray(np.eye(3), dims=("a", "b")), vmax=1.0, scale="log")
    assert ax.images[0].get_clim()[1] == 1.0


def test_mini_blocks_leave_the_bias_of_a_convolution_out():
    blocks = mini_blocks({"weight_shape": [2, 2 * 9 + 1], "mini_block_size": 9})
    assert blocks == [(0, 9), (9, 18), (19, 28), (28, 37)]


def test_inverse_heatmap_shares_the_scale_of_the_exact_inverse():
    tree = inverses({"2": (4, 5), "10": (3, 5)})
    figure = plots.inverse_heatmap(tree, approximators=["exact", "kfac", "diagonal"])
    images = [ax.images[0] for ax in figure.axes if ax.get_images()]
    for row, layer in enumerate(("2", "10")):
        exact = np.abs(tree[layer]["inverse"].sel(approximator="exact").values)
        for image in images[3 * row : 3 * row + 3]:
            assert image.get_clim() == (0.0, pytest.approx(np.percentile(exact, 99.5)))
    labels = [ax.get_ylabel() for ax in figure.axes]
    told = f"λ = {tree['2'].attrs['lambda']:.3g}"
    assert any(label.endswith(told) for label in labels)


def test_inverse_heatmap_scale_does_not_depend_on_the_columns_chosen():
    tree = inverses({"2": (4, 5)})
    both = plots.inverse_heatmap(tree).axes[1].images[0].get_clim()
    alone = plots.inverse_heatmap(tree, approximators=["kfac"]).axes[0]
    assert alone.images[0].get_clim() == both


def test_inverse_heatmap_says_where_there_is_no_inverse():
    tree = inverses({"2": (4, 5)}, approximators=("exact", "kfac"))
    tree["2"]["inverse"].loc[{"approximator": "kfac"}] = np.nan
    exact, kfac = plots.inverse_heatmap(tree).axes[:2]
    assert exact.images
    assert not kfac.images
    assert kfac.texts[0].get_text() == "not\navailable"


def test_inverse_heatmap_names_an_unknown_layer():
    with pytest.raises(ValueError, match=r"no layer \['9'\] in the tree"):
        plots.inverse_heatmap(inverses({"2": (4, 5)}), layers=["9"])


# --- files and accessor --------------------------------------------------------------


def test_saved_files_are_whole_and_the_table_reads_back(ds, tmp_path):
    written = plots.save(plots.errors(ds), tmp_path / "new" / "errors.v1", ds)
    assert [path.name for path in written] == [
        "errors.v1.png",
        "errors.v1.pdf",
        "errors.v1.csv",
    ]
    assert sorted(tmp_path.glob("new/*")) == sorted(written)
    rows = pd.read_csv(written[-1], dtype={"layer": str})
    row = rows.query("layer=='4' and approximator=='kfac' and step==200 and damping==0.1")
    cell = {"layer": "4", "approximator": "kfac", "step": 200, "damping": 0.1}
    assert row["inverse_error"].item() == pytest.approx(ds["inverse_error"].sel(cell))


def test_the_same_figure_is_the_same_file(ds, tmp_path):
    for name in ("a", "b"):
        plots.save(plots.errors(ds), tmp_path / name, formats=("png", "pdf", "svg"))
    for kind in ("png", "pdf", "svg"):
        first, second = (tmp_path / f"{name}.{kind}" for name in "ab")
        assert first.read_bytes() == second.read_bytes()


def test_a_failed_save_leaves_the_old_file(ds, tmp_path):
    (path,) = plots.save(plots.errors(ds), tmp_path / "errors", formats=("png",))
    before = path.read_bytes()

    class Broken:
        @property
        def figure(self):
            raise RuntimeError("no figure")

    with pytest.raises((RuntimeError, TypeError)):
        plots.save(Broken(), tmp_path / "errors", formats=("png",))
    assert path.read_bytes() == before
    assert list(tmp_path.iterdir()) == [path]


def test_accessor_draws_and_lays_out(ds):
    assert ds.fisherlab.errors().lines
    assert ds.fisherlab.cost().lines
    assert len(ds.fisherlab.table()) == 4 * 6 * 7 * 3
    assert inverses({"2": (3, 4)}).fisherlab.inverse_heatmap().axes
    one = ds.sel(layer="4", approximator=["kfac"])
    assert len(lines(one.fisherlab.errors())["kfac"].get_ydata()) == 1


def test_what_a_backend_sets_while_drawing_stays_set():
    assert not mpl.is_interactive()
    try:
        with plots.publication():
            plt.ion()
        assert mpl.is_interactive()
    finally:
        plt.ioff()


def test_a_figure_that_a_notebook_has_shown_and_closed_can_still_be_saved(ds, tmp_path):
    ax = plots.errors(ds)
    plt.close(ax.figure)
    mpl.backend_bases.FigureCanvasBase(ax.figure)  # what an inline backend leaves
    (file,) = plots.save(ax, tmp_path / "closed", formats=("png",))
    assert file.stat().st_size > 1000


def test_a_step_or_damping_that_the_result_has_not_is_refused():
    """Whether the metric depends on it or not; one was drawn that was not asked for."""
    dims = ("layer", "approximator", "damping")
    ds = xr.Dataset(
        {"frobenius_error": (dims[:2], [[0.5]]), "inverse_error": (dims, [[[0.5, 0.1]]])},
        {"layer": ["0"], "approximator": ["kfac"], "damping": [0.1, 1.0]},
    )
    alone = ds.sel(damping=0.1)
    for result, metric, asked in (
        (ds, "frobenius_error", {"step": 3}),
        (ds, "frobenius_error", {"damping": 0.2}),
        (ds.drop_dims("damping"), "frobenius_error", {"damping": 0.1}),
        (alone, "inverse_error", {"damping": 1.0}),
    ):
        with pytest.raises(ValueError, match="is not in the result"):
            fl.plots.errors(result, metric, **asked)
    for metric in ("frobenius_error", "inverse_error"):
        fl.plots.errors(ds, metric, damping=1.0)
        fl.plots.errors(alone, metric, damping=0.1)
