"""Laws of labelled results: the numbers of the metrics, named, saved and read back."""

import json
import os
from collections import OrderedDict
from pathlib import Path

import numpy as np
import pytest
import torch
import xarray as xr
from torch import nn

import fisherlab as fl
from fisherlab.analysis.allowances import LONG, RATE, Allowance, cut, may_be_long
from fisherlab.approximators.register import by_name
from fisherlab.catalogue import NEEDS
from fisherlab.statistics.values import pair_samples
from tests import cases, oracles
from tests.cases import normal, refused
from tests.model_zoo import randomised
from tests.oracles import assert_close

METHODS = ["exact", "kfac", "ekfac", "kpsvd", "kpsvd-2", "mini-block", "diagonal"]


@pytest.fixture(scope="module")
def stats():
    model, x, y = cases.data(cases.LAYERS["conv strided padded"], fl.Categorical())
    return fl.collect(model, (x, y), fl.Categorical())


@pytest.fixture(scope="module")
def gradient(stats):
    return {name: normal(*layer.weight_shape) for name, layer in stats.items()}


@pytest.fixture(scope="module")
def result(stats, gradient):
    return fl.compare(stats, METHODS, damping=[0.1, 0.5], gradient=gradient)


def test_every_number_is_that_of_the_metric(stats, gradient, result):
    for name, layer in stats.items():
        exact = fl.ExactBlock()(layer)
        assert float(result["fisher_norm"].sel(layer=name)) == exact.frobenius_norm()
        mean = exact.trace() / exact.shape[0]
        assert float(result["mean_eigenvalue"].sel(layer=name)) == mean
        for method in METHODS:
            approx = fl.approximators()[method](layer)
            cell = result.sel(layer=name, approximator=method)
            for metric in ("frobenius_error", "cosine_similarity", "trace_ratio"):
                expected = getattr(fl.metrics, metric)(exact, approx)
                assert_close(float(cell[metric]), expected, 1e-12, atol=1e-12)
            for damping in (0.1, 0.5):
                at = cell.sel(damping=damping)
                error = fl.metrics.inverse_error(exact, approx, damping)
                assert_close(float(at["inverse_error"]), error, 1e-10, atol=1e-12)
                v = gradient[name]
                cosine = fl.metrics.direction_cosine(exact, approx, v, damping)
                assert_close(float(at["direction_cosine"]), cosine, 1e-10)
                assert float(at["lambda"]) == damping
            assert float(cell["stored_numbers"]) == approx.stored_numbers


def test_every_metric_can_be_asked_for_by_name(stats, gradient):
    known = fl.metrics.entries(k=2)
    found = fl.compare(
        stats, METHODS, metrics=list(known), damping=[0.5], gradient=gradient, k=2
    )
    for layer in stats:
        exact = fl.ExactBlock()(stats[layer])
        for method in METHODS:
            approx = fl.approximators()[method](stats[layer])
            cell = found.sel(layer=layer, approximator=method).squeeze()
            for name, entry in known.items():
                function = getattr(fl.metrics, name.removeprefix("reverse_"))
                rest = {
                    "matrix": {"k": 2} if name == "subspace_overlap" else {},
                    "damping": {"damping": 0.5},
                    "gradient": {"damping": 0.5, "gradient": gradient[layer]},
                }[entry.needs]
                if name.startswith("reverse_"):
                    rest = rest | {"reverse": True}
                if name == "effective_rank":
                    expected = function(approx)
                else:
                    expected = function(exact, approx, **rest)
                assert_close(float(cell[name]) ** 2, expected**2, 1e-8, atol=1e-10)
    assert set(found["status"].values.flatten()) == {"ok"}
    assert found["gaussian_kl"].attrs["units"] == "nat"


def test_a_refused_metric_leaves_the_others_and_says_why(stats):
    found = fl.compare(
        stats, ["kfac"], metrics=["subspace_overlap", "trace_ratio"], k=17
    ).sel(layer="0")
    assert np.isnan(found["subspace_overlap"]).all()
    assert np.isfinite(found["trace_ratio"]).all()
    assert "eigenvalues 17 and 18 are tied" in str(found["status"].item())


def test_dimensions_coordinates_and_attributes_follow_the_schema(stats, result):
    assert dict(result.sizes) == {"layer": 2, "approximator": 7, "damping": 2}
    assert result["layer"].values.tolist() == ["0", "3"]
    assert result["d_out"].values.tolist() == [2, 3]
    assert result["d_in"].values.tolist() == [9, 9]
    assert result["positions"].values.tolist() == [4, 1]
    assert result["frobenius_error"].dims == ("layer", "approximator")
    assert result["inverse_error"].dims == ("layer", "approximator", "damping")
    assert result["lambda"].dims == ("layer", "damping")
    assert result["converged"].dtype == np.int8
    assert set(result["status"].values.flatten()) == {"ok"}
    assert all({"long_name", "units"} <= set(v.attrs) for v in result.data_vars.values())
    attrs = result.attrs
    assert attrs["fisher"] == "Exact()"
    assert attrs["examples"] == cases.EXAMPLES
    assert attrs["damping_kind"] == "absolute"
    assert attrs["dtype"] == "float64"
    assert json.loads(attrs["approximators"])["kpsvd-2"] == "KPSVD(rank=2, solver='auto')"
    assert all(isinstance(v, (str, int, float)) for v in attrs.values())


def test_sampled_statistics_carry_their_seed():
    model, x, _ = cases.data(cases.LAYERS["linear"], fl.Categorical())
    sampled = fl.collect(model, (x, None), fl.Categorical(), fl.MonteCarlo(2, seed=9))
    assert fl.compare(sampled, ["kfac"]).attrs["seed"] == 9


def test_relative_damping_is_a_fraction_of_the_mean_eigenvalue(stats):
    found = fl.compare(stats, ["kfac"], damping=fl.RelativeDamping([0.1, 1.0]))
    expected = found["mean_eigenvalue"] * found["damping"]
    np.testing.assert_allclose(found["lambda"], expected.transpose("layer", "damping"))
    assert found.attrs["damping_kind"] == "relative"
    for name, layer in stats.items():
        damping = float(found["lambda"].sel(layer=name, damping=0.1))
        pair = fl.ExactBlock()(layer), fl.KFAC()(layer)
        error = found["inverse_error"].sel(layer=name, approximator="kfac", damping=0.1)
        expected = fl.metrics.inverse_error(*pair, damping)
        rounding = 1e-15 / expected**2  # of a difference of squares, relative
        assert_close(float(error), expected, 1e-12 + rounding)


def test_another_fisher_can_be_called_exact(stats):
    model, x, y = cases.data(cases.LAYERS["conv strided padded"], fl.Categorical())
    empirical = fl.collect(model, (x, y), fl.Categorical(), fl.Empirical())
    found = fl.compare(empirical, ["exact"], reference=stats)
    assert found.attrs["reference_fisher"] == "Exact()"
    assert found.attrs["fisher"] == "Empirical()"
    for name in stats:
        exact, other = fl.ExactBlock()(stats[name]), fl.ExactBlock()(empirical[name])
        expected = fl.metrics.frobenius_error(exact, other, mixed=True)
        assert_close(float(found["frobenius_error"].sel(layer=name)[0]), expected, 1e-12)
        assert float(found["fisher_norm"].sel(layer=name)) == exact.frobenius_norm()


def test_what_is_not_to_be_had_is_nan_with_its_reason():
    layer = {"1": cases.statistics("norm")}
    stats = fl.statistics.Statistics(layer, layer["1"].provenance)
    found = fl.compare(stats, ["kfac", "kpsvd", "diagonal"], damping=0.1)
    kfac = found.sel(layer="1", approximator="kfac")
    assert "gradients" in str(kfac["status"].values)
    assert np.isnan(kfac["frobenius_error"])
    assert np.isnan(kfac["inverse_error"]).all()
    assert int(kfac["converged"]) == -1
    assert found["status"].values[0, 1:].tolist() == ["ok", "ok"]
    assert np.isfinite(found["frobenius_error"].values[0, 1:]).all()
    alone = fl.compare(stats, ["kfac"], damping=0.1)  # every variable, all of it NaN
    assert set(alone.data_vars) == set(found.data_vars)
    assert np.isnan(alone["frobenius_error"]).all()


def test_an_indefinite_approximation_has_errors_but_no_inverse():
    def negative(statistics, previous=None):
        entries = -fl.approximators.Diagonal()(statistics).entries
        return fl.operators.Diagonal(entries, statistics.provenance)

    stats = {"0": cases.statistics("linear")}
    stats = fl.statistics.Statistics(stats, stats["0"].provenance)
    found = fl.compare(stats, {"negative": negative}, damping=[1e-6, 1e3])
    assert np.isfinite(found["frobenius_error"]).all()
    assert np.isnan(found["inverse_error"].values[0, 0]).tolist() == [True, False]
    assert "damping 1e-06: not positive definite" in str(found["status"].values[0, 0])


def test_a_zero_block_is_reported_not_raised():
    model, x, _ = cases.data(cases.LAYERS["linear"], fl.Categorical())
    ignored = torch.full((len(x),), -100)
    stats = fl.collect(model, (x, ignored), fl.Categorical())
    found = fl.compare(stats, METHODS, damping=fl.RelativeDamping(0.1))
    assert (found["fisher_norm"] == 0).all()
    assert (found["frobenius_error"] == 0).all()
    assert "not positive definite" in str(found["status"].values[0, 0])


def test_blocks_above_the_budget_have_no_inverse(stats):
    found = fl.compare(stats, ["kfac"], damping=0.1, budget=1200)
    assert np.isnan(found["inverse_error"]).all()
    assert "budget" in str(found["status"].values[0, 0])
    assert np.isfinite(found["frobenius_error"]).all()


def test_only_the_metrics_asked_for_are_computed(stats):
    found = fl.compare(stats, ["kfac"], metrics=["trace_ratio"], damping=0.1)
    assert "trace_ratio" in found
    assert not {"frobenius_error", "inverse_error"} & set(found.data_vars)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"approximators": ["kfac", "nothing"]}, "'nothing'.*known: exact"),
        ({"metrics": ["beauty"]}, "beauty.*frobenius_error"),
        ({"metrics": ["inverse_error"]}, "needs `damping`"),
        ({"metrics": ["direction_cosine"], "damping": 1.0}, "`gradient`"),
        ({"damping": 0.0}, "positive"),
        ({"damping": [0.1, -1.0]}, "positive"),
        ({"damping": []}, "positive"),
        ({"gradient": {}}, r"lacks.*\['0', '3'\].*mean_gradient"),
        ({"gradient": {"0": torch.ones(3, 3), "3": torch.ones(1, 1)}}, r"'0'.*\(2, 9\)"),
    ],
)
def test_questions_that_cannot_be_answered_are_refused(stats, arguments, message):
    with pytest.raises(ValueError, match=message):
        fl.compare(stats, **{"approximators": ["kfac"]} | arguments)


ASKED_OF_STATISTICS = {
    "compare": lambda stats: fl.compare(stats, ["kfac"]),
    "compare_networks": lambda stats: fl.compare_networks(stats, ["khatri-rao"]),
    "purposes": lambda stats: fl.compare(stats, ["kfac"], purpose=fl.Matrix()),
    "sweep": lambda stats: fl.sweep(stats, ["kfac"]),
    "density": lambda stats: fl.density(stats, ["kfac"]),
    "spectra": lambda stats: fl.spectra(stats, ["kfac"]),
    "structure": fl.structure,
    "rank_curve": fl.rank_curve,
    "pareto": lambda stats: fl.pareto(stats, ["kfac"]),
    "inverse_blocks": lambda stats: fl.inverse_blocks(stats, ["kfac"], damping=0.1),
    "full_matrix": fl.full_matrix,
    "block_diagonal": lambda stats: fl.block_diagonal("kfac", stats),
    "coupling": fl.metrics.coupling,
    "cross_block": lambda stats: fl.cross_block(stats, "0", "0"),
}


@pytest.mark.parametrize("name", ASKED_OF_STATISTICS)
def test_what_is_no_statistics_is_refused_in_a_sentence(stats, name):
    ask = ASKED_OF_STATISTICS[name]
    with refused("at least one block are expected, none given"):
        ask({})
    for wrong in (None, "kfac", [stats["0"]], {"0": 1}, torch.ones(2)):
        with refused("statistics are expected, as collect returns"):
            ask(wrong)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"approximators": [1]}, "int was given; a name, a value such as fl.KFAC"),
        ({"approximators": {"mine": None}}, "NoneType was given; a name"),
        ({"metrics": [1]}, "names, functions of F and F̂"),
        ({"metrics": {"mine": 1}}, "names, functions of F and F̂"),
        ({"metrics": {"status": lambda f, g: 1.0}}, "cannot be called 'status'"),
        ({"metrics": {"layer": lambda f, g: 1.0}}, "cannot be called 'layer'"),
        ({"metrics": {"a/b": lambda f, g: 1.0}}, "cannot be called 'a/b'"),
    ],
)
def test_methods_and_metrics_that_are_none_are_refused(stats, arguments, message):
    """A metric called "status" was lost behind the table's own, before."""
    with refused(message):
        fl.compare(stats, **{"approximators": ["kfac"]} | arguments)


def test_no_name_in_a_table_is_left_for_a_metric_of_ones_own(stats, result):
    mixed = fl.compare(stats, ["kfac"], damping=[0.1, fl.Factored(0.1)])
    names = {str(name) for ds in (result, mixed) for name in ds.variables}
    for name in sorted(names - fl.metrics.entries().keys()):
        with pytest.raises(ValueError, match="cannot be called"):
            fl.compare(stats, ["kfac"], metrics={name: lambda f, g: 1.0})


def test_one_metric_and_one_rank(stats):
    found = fl.compare(stats, ["kfac"], metrics="trace_ratio")
    assert found["trace_ratio"].notnull().all()
    with refused("a list of ranks is expected"):
        fl.rank_curve(stats, 3)


def test_inverse_blocks_are_the_inverses_of_the_damped_blocks(stats):
    tree = fl.inverse_blocks(stats, ["kfac", "mini-block"], damping=0.2)
    assert list(tree.children) == ["0", "3"]
    for name, layer in stats.items():
        node = tree[name].to_dataset()
        assert node["approximator"].values.tolist() == ["exact", "kfac", "mini-block"]
        assert node.attrs["weight_shape"] == list(layer.weight_shape)
        assert node.attrs["mini_block_size"] == {"0": 4, "3": 9}[name]
        assert node.attrs["lambda"] == 0.2
        block = oracles.second_moment_block(layer.example_gradients(), layer.count)
        for k, method in enumerate((fl.ExactBlock(), fl.KFAC(), fl.MiniBlock())):
            dense = method(layer).to_dense() if k else block
            inverse = torch.from_numpy(node["inverse"].values[k])
            assert_close(inverse, oracles.damped_inverse(dense, 0.2), 1e-9)


def test_inverse_blocks_take_one_damping_and_known_layers(stats):
    with pytest.raises(ValueError, match="one damping"):
        fl.inverse_blocks(stats, ["kfac"], damping=[0.1, 0.2])
    with pytest.raises(ValueError, match=r"'9'.*known: 0, 3"):
        fl.inverse_blocks(stats, ["kfac"], damping=0.1, layers=["9"])
    tree = fl.inverse_blocks(stats, [], fl.RelativeDamping(0.5), layers=["3"])
    assert list(tree.children) == ["3"]
    exact = fl.ExactBlock()(stats["3"])
    assert_close(tree["3"].attrs["lambda"], 0.5 * exact.trace() / exact.shape[0], 1e-12)


def test_results_are_the_same_after_netcdf(stats, result, tmp_path):
    again = fl.open(fl.save(result, tmp_path / "results.nc"))
    xr.testing.assert_identical(again, result)
    tree = fl.inverse_blocks(stats, ["kfac", "kpsvd-2"], damping=0.2)
    same = fl.open(fl.save(tree, tmp_path / "inverses.nc"))
    for name in tree.children:
        xr.testing.assert_equal(same[name].to_dataset(), tree[name].to_dataset())
        assert same[name].attrs["lambda"] == 0.2
        assert list(same[name].attrs["weight_shape"]) == list(stats[name].weight_shape)
    assert same.attrs == tree.attrs
    assert sorted(os.listdir(tmp_path)) == ["inverses.nc", "results.nc"]


def test_names_of_nested_modules_survive(tmp_path):
    inside = nn.Sequential(OrderedDict(fc1=nn.Linear(2, 2).double()))
    model = nn.Sequential(OrderedDict(enc=inside))
    stats = fl.collect(model, (normal(3, 2), None), fl.Gaussian())
    tree = fl.inverse_blocks(stats, ["kfac"], damping=0.1)
    assert list(fl.open(fl.save(tree, tmp_path / "t.nc")).children) == ["enc.fc1"]


def test_a_failed_save_leaves_the_old_file_and_no_other(result, tmp_path):
    file = fl.save(result, tmp_path / "results.nc")
    before = file.read_bytes()
    broken = result.assign_attrs(bad=object())
    with pytest.raises((TypeError, ValueError)):
        fl.save(broken, file)
    assert file.read_bytes() == before
    assert os.listdir(tmp_path) == ["results.nc"]


@pytest.mark.parametrize(
    "sizes", [(1, 600, 1, 300, 300), (500, 1, 10, 20, 300), (40, 50, 10, 200, 1)]
)
def test_a_long_comparison_is_large_by_its_sizes_alone(sizes):
    o, i, v, n, t = sizes
    held = [torch.empty(*s, device="meta") for s in ((n, t, i), (v, n, t, o))]
    layers, methods = {"a": pair_samples(*held)}, by_name(None)
    counted = cut(layers, methods, list(NEEDS), Allowance(np.inf, np.inf)).flops
    assert counted > LONG * RATE
    assert may_be_long(layers, len(methods))


def test_a_missing_or_foreign_file_is_named(tmp_path):
    with pytest.raises(fl.DataError, match=r"nothing\.nc"):
        fl.open(tmp_path / "nothing.nc")
    (tmp_path / "text.nc").write_text("no netCDF")
    with pytest.raises(fl.DataError, match=r"text\.nc.*not a readable netCDF"):
        fl.open(tmp_path / "text.nc")


def test_a_comparison_that_takes_long_says_so_beforehand(stats, monkeypatch, recwarn):
    fl.compare(stats, ["kfac"])
    assert not recwarn
    for place in ("allowances", "comparison"):
        monkeypatch.setattr(f"fisherlab.analysis.{place}.LONG", 0.0)
    with pytest.warns(UserWarning, match=r"minutes are counted.*MonteCarlo") as told:
        fl.compare(stats, ["kfac"])
    assert not Path(told[0].filename).is_relative_to(Path(fl.__file__).parent)
    fl.compare(stats, ["kfac"], time="1 min")
    fl.compare(stats, ["kfac"], progress=lambda *_: None)
    assert not recwarn


def test_what_is_undefined_for_a_zero_block_is_named_in_its_status():
    """A dead layer had NaN for cosines, with the status "ok"."""
    net = nn.Sequential(nn.Linear(4, 3), nn.ReLU(), nn.Linear(3, 2)).double()
    nn.init.constant_(net[0].bias, -100.0)
    stats = fl.collect(net, (torch.randn(9, 4).double(), None), fl.Categorical())
    ds = fl.compare(stats, ["exact", "kfac", "diagonal"], damping=1e-2)
    named = "undefined (zero, constant or too large): cosine_similarity, trace_ratio"
    assert all(str(s).startswith(named) for s in ds.status.sel(layer="0").values)
    assert (ds.status.sel(layer="2") == "ok").all()


class Beside(nn.Module):
    """A layer of ordinary size beside one that sees its inputs many times larger."""

    def __init__(self, scale):
        super().__init__()
        self.ordinary, self.scale = nn.Linear(3, 2), scale
        self.extreme = nn.Linear(3, 2, bias=False)

    def forward(self, x):
        return self.ordinary(x) + self.extreme(x * self.scale)


FEW = ["kfac", "tkfac", "kpsvd-2", "diagonal"]
ALPHA = fl.RelativeDamping(0.1)
TABLES = {
    "relative": lambda stats, v: fl.compare(stats, FEW, damping=ALPHA, gradient=v),
    "inverse_blocks": lambda stats, v: fl.inverse_blocks(stats, FEW, ALPHA),
    "pareto": lambda stats, v: fl.pareto(stats, FEW, damping=ALPHA, repeats=1)[["error"]],
    "compare": lambda stats, v: fl.compare(stats, FEW, damping=[1e-3, 0.1], gradient=v),
    "sweep": lambda stats, v: fl.sweep(stats, FEW, gradient=v),
    "spectra": lambda stats, v: fl.spectra(stats, FEW),
    "density": lambda stats, v: fl.density(stats, FEW, damping=ALPHA),
    "structure": lambda stats, v: fl.structure(stats, damping=ALPHA),
    "rank_curve": lambda stats, v: fl.rank_curve(stats),
}


@pytest.mark.parametrize("scale", [1e-90, 1e78, 1e120, 1e200])
@pytest.mark.parametrize("table", [*TABLES, "decompose"])
def test_a_layer_whose_squares_are_no_numbers_leaves_those_of_others(table, scale):
    model = randomised(Beside(scale))
    data, chosen = (normal(6, 3), None), fl.Gaussian()
    if table == "decompose":
        found = fl.decompose(model, data, chosen, FEW)
        alone = fl.decompose(model, data, chosen, FEW, layers=["ordinary"])
    else:
        stats = fl.collect(model, data, chosen)
        along = {n: torch.ones(layer.weight_shape).double() for n, layer in stats.items()}
        found = TABLES[table](stats, along)
        alone = TABLES[table]({"ordinary": stats["ordinary"]}, along)
    if isinstance(found, xr.DataTree):
        found, alone = (tree["ordinary"].to_dataset() for tree in (found, alone))
    own = (name for name in alone if alone[name].dims and "network" not in name)
    for name in own:
        whole, values = found[name], alone[name]
        for axis in {"layer", "other_layer"}.intersection(values.dims):
            whole = whole.sel({axis: ["ordinary"]})
        if values.dtype.kind == "f":
            xr.testing.assert_allclose(whole, values)


@pytest.mark.parametrize("scale", [1e120, 1e200])
def test_what_is_no_number_is_so_for_a_reason(scale):
    model, data = randomised(Beside(scale)), (normal(6, 3), normal(6, 2))
    nn.init.zeros_(model.extreme.weight)
    stats = fl.collect(model, data, fl.Gaussian())
    along = {n: torch.ones(layer.weight_shape).double() for n, layer in stats.items()}
    tables = {name: TABLES[name](stats, along) for name in ("relative", "sweep")}
    ds = fl.decompose(model, data, fl.Gaussian(), FEW)
    tables["decompose"] = ds[["error", "squared_part", "status"]]
    for dim in ("source", "sharing"):
        tables[dim] = ds[[f"{dim}_error", f"{dim}_status"]].rename(
            {f"{dim}_status": "status"}
        )
    for found in tables.values():
        for values in found.data_vars.values():
            if values.dtype.kind == "f" and set(found.status.dims) <= set(values.dims):
                rest = set(values.dims) - set(found.status.dims)
                assert (values.notnull().all(rest) | (found.status != "ok")).all()
    for source in ds.source.values:
        lacks = ds.error.sel(source=source, approximator="kfac").isnull()
        told = ds.status.sel(approximator="kfac").str.contains(f"{source}: ")
        assert (lacks == told).all()
    assert (ds.source_status.sel(layer="ordinary") == "ok").all()
    assert "squared norm" in ds.network_status
    extreme = fl.spectra(stats, FEW)["extreme"]
    known = np.isfinite(extreme.eigenvalue).all("index")
    assert ((extreme.status == "ok") == known).all()
    assert known.any() == (scale < 1e150)
    axes = fl.plots.spectra(fl.spectra(stats, FEW)).axes
    texts = {text.get_text() for ax in np.ravel(axes) for text in ax.texts}
    assert ("no numbers" in texts) == (not known.any())
    assert np.isnan(extreme.effective_rank)
    assert "whose squares are no numbers" in extreme.effective_rank_status
