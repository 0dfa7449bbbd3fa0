"""Laws of comparisons straight from a model, layer by layer within a budget."""

from __future__ import annotations

import re
import sys
from collections import OrderedDict

import numpy as np
import pytest
import torch
import xarray as xr
from torch import nn

import fisherlab as fl
from fisherlab.analysis import cost, layerwise
from tests import cases

METHODS = ["kfac", "ekfac", "kpsvd-2", "mini-block"]


def deep():
    """Return a network of four blocks, one of them without the shared form."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        first, last = nn.Linear(6, 5), nn.Linear(4, 3)
        middle = nn.Linear(5, 4)
        model = nn.Sequential(first, nn.Tanh(), nn.LayerNorm(5), middle, nn.Tanh(), last)
    return model.double(), (cases.normal(20, 6), torch.arange(20) % 3), fl.Categorical()


def wide():
    """Return a convolutional network on several positions."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        conv = nn.Conv2d(2, 3, 2)
        model = nn.Sequential(conv, nn.ReLU(), nn.Flatten(), nn.Linear(18, 3))
    return model.double(), (cases.normal(6, 2, 3, 4), torch.arange(6) % 3), fl.Categorical()


def assert_same(found, expected):
    assert list(found.layer.values) == list(expected.layer.values)
    for name in expected:
        a, b = found[name].transpose(*expected[name].dims).values, expected[name].values
        if b.dtype.kind in "fi":
            np.testing.assert_allclose(a, b, rtol=1e-8, atol=1e-12, err_msg=str(name))
        else:
            assert (a == b).all(), name


def foretold(*given, **options):
    return fl.compare(*given, **options).attrs["foretold_bytes"]


@pytest.fixture
def passes(monkeypatch):
    """Write down which layers are collected together."""
    seen, real = [], layerwise.collect

    def spy(*given, layers, **options):
        seen.append(tuple(layers))
        return real(*given, layers=layers, **options)

    monkeypatch.setattr(layerwise, "collect", spy)
    return seen


@pytest.mark.parametrize("network", [deep, wide])
@pytest.mark.parametrize("kind", [fl.Exact(), fl.MonteCarlo(2, seed=3)], ids=repr)
def test_it_is_the_comparison_of_collected_statistics(network, kind):
    model, data, likelihood = network()
    stats = fl.collect(model, data, likelihood, kind)
    gradient = fl.mean_gradient(model, data, likelihood)
    asked = {"damping": [0.1, 1.0]}
    expected = fl.compare(stats, METHODS, gradient=gradient, **asked)
    assert_same(
        fl.compare(model, data, likelihood, METHODS, fisher=kind, **asked), expected
    )


def test_batches_and_a_tight_budget_change_nothing_but_the_passes(passes):
    model, (x, y), likelihood = deep()
    batches = [(x[:8], y[:8]), (x[8:], y[8:])]
    kind = fl.MonteCarlo(1, seed=2)
    whole = fl.compare(model, (x, y), likelihood, METHODS, fisher=kind)
    assert passes == [("0", "2", "3", "5")]
    passes.clear()
    tight = int(foretold(model, (x, y), likelihood, METHODS, fisher=kind, layers=["0"]))
    passes.clear()
    found = fl.compare(
        model, batches, likelihood, METHODS, fisher=kind, budget=tight + 4000
    )
    assert len(passes) > 1
    assert [name for group in passes for name in group] == ["0", "2", "3", "5"]
    assert_same(found, whole)
    assert found.attrs["foretold_bytes"] <= found.attrs["budget_bytes"] == tight + 4000


def test_the_model_is_looked_into_once_however_many_passes_there_are(passes, monkeypatch):
    model, data, likelihood = deep()
    tight = foretold(model, data, likelihood, ["kfac"], layers=["0"])
    passes.clear()
    counted, real = [], cost.probe

    def spy(*given):
        counted.append(given)
        return real(*given)

    for module in (cost, sys.modules["fisherlab.statistics.collect"]):
        monkeypatch.setattr(module, "probe", spy)
    fl.compare(model, data, likelihood, ["kfac"], budget=tight + 4000)
    assert len(passes) > 1
    assert len(counted) == 1


def test_a_layer_beyond_the_budget_has_the_bytes_in_its_status(passes):
    model, data, likelihood = deep()
    small = int(foretold(model, data, likelihood, ["kfac"], layers=["3", "5"]))
    passes.clear()
    found = fl.compare(model, data, likelihood, ["kfac"], budget=small)
    said = str(found.status.sel(layer="0").item())
    match = re.search(r"not served: needs .* \((\d+) bytes: statistics", said)
    assert match is not None
    assert int(match[1]) > small
    assert str(small) in said
    assert np.isnan(found.frobenius_error.sel(layer="0").values).all()
    assert str(found.status.sel(layer="5").item()) == "ok"
    assert all("0" not in group for group in passes)
    nothing = fl.compare(model, data, likelihood, ["kfac"], budget=100)
    assert all(str(s).startswith("not served") for s in nothing.status.values.ravel())
    assert list(nothing.layer.values) == ["0", "2", "3", "5"]


def test_what_fails_while_it_is_collected_is_a_status_too(monkeypatch):
    model, data, likelihood = deep()
    real = layerwise.collect

    def failing(*given, layers, **options):
        if "3" in layers:
            raise fl.BudgetError("collect needs more.")
        return real(*given, layers=layers, **options)

    monkeypatch.setattr(layerwise, "collect", failing)
    found = fl.compare(model, data, likelihood, ["kfac"]).status
    assert str(found.sel(layer="3").item()) == "not served: collect needs more."
    assert str(found.sel(layer="5").item()) == "ok"


class StoppedError(Exception):
    """What ends a comparison in the middle."""


def test_it_goes_on_where_it_was_stopped(tmp_path, passes):
    model, data, likelihood = deep()
    file, seen = tmp_path / "errors.nc", []

    def stop(done):
        seen.append(done)
        if done.done == 2:
            raise StoppedError

    given = (model, data, likelihood, METHODS)
    with pytest.raises(StoppedError):
        fl.compare(*given, damping=0.1, store=file, progress=stop)
    assert [(d.layer, d.done, d.layers) for d in seen] == [("0", 1, 4), ("2", 2, 4)]
    assert 0 <= seen[0].seconds <= seen[1].seconds
    assert list(fl.open(file).layer.values) == ["0", "2"]
    passes.clear()
    found = fl.compare(*given, damping=0.1, store=file)
    assert passes == [("3", "5")]
    assert_same(found, fl.compare(*given, damping=0.1))
    assert_same(fl.open(file), found)
    passes.clear()
    assert_same(fl.compare(*given, damping=0.1, store=file), found)
    assert passes == []


def test_a_store_of_another_comparison_is_refused(tmp_path):
    model, data, likelihood = deep()
    file = tmp_path / "errors.nc"
    fl.compare(model, data, likelihood, ["kfac"], store=file)
    with pytest.raises(fl.StoreError, match=r"methods.* differ"):
        fl.compare(model, data, likelihood, ["ekfac"], store=file)
    with pytest.raises(fl.StoreError, match="fisher differ"):
        fl.compare(model, data, likelihood, ["kfac"], store=file, fisher=fl.Empirical())
    with torch.no_grad():
        model[0].weight[0, 0] += 1e-9
    with pytest.raises(fl.StoreError, match="model and data differ"):
        fl.compare(model, data, likelihood, ["kfac"], store=file)


def through(method):
    def mine(statistics):
        return method(statistics)

    return mine


def with_entry(gradient, value):
    own = {name: one.clone() for name, one in gradient.items()}
    own["in"][20, 20] = value
    return own


def test_a_store_knows_functions_gradients_and_code_not_their_names(tmp_path):
    """Rows of a function, gradient or activation are not taken for those of another."""

    def net(activation):
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(0)
            layers = {"in": nn.Linear(60, 40), "act": activation, "out": nn.Linear(40, 3)}
            return nn.Sequential(OrderedDict(layers)).double()

    data = cases.normal(9, 60), torch.arange(9) % 3
    gradient = {"in": cases.normal(40, 61), "out": cases.normal(3, 41)}
    given = {
        "model": net(nn.Tanh()),
        "approximators": {"mine": through(fl.KFAC())},
        "metrics": {"own": lambda exact, approx: exact.trace()},
        "gradient": gradient,
    }
    other = {
        "model": net(nn.ReLU()),
        "approximators": {"mine": through(fl.KPSVD())},
        "metrics": {"own": lambda exact, approx: approx.trace()},
        "gradient": with_entry(gradient, 7.0),
    }

    def compared(settings):
        rest = {name: one for name, one in settings.items() if name != "model"}
        rest |= {"damping": 0.1, "store": tmp_path / "errors.nc"}
        return fl.compare(settings["model"], data, fl.Categorical(), **rest)

    first = compared(given)
    assert_same(compared({**given, "model": net(nn.Tanh())}), first)
    for name, value in other.items():
        with pytest.raises(fl.StoreError, match="differ"):
            compared({**given, name: value})


def test_a_layer_that_was_refused_is_tried_again_with_more(tmp_path):
    model, data, likelihood = deep()
    file = tmp_path / "errors.nc"
    small = int(foretold(model, data, likelihood, ["tkfac"], layers=["3", "5"]))
    first = fl.compare(model, data, likelihood, ["tkfac"], budget=small, store=file)
    assert str(fl.open(file).status.values[0, 0]).startswith("not served")
    again = fl.compare(model, data, likelihood, ["tkfac"], store=file)
    assert set(again.status.values.ravel()) == {"ok"}
    assert_same(again.sel(layer=["3", "5"]), first.sel(layer=["3", "5"]))


def test_gradients_are_those_given_or_of_the_labels_where_there_are_any():
    model, (x, y), likelihood = deep()
    own = fl.mean_gradient(model, (x, y), likelihood, fisher=fl.MonteCarlo(1, seed=1))
    stats = fl.collect(model, (x, y), likelihood)
    found = fl.compare(model, (x, y), likelihood, ["kfac"], damping=0.1, gradient=own)
    assert_same(found, fl.compare(stats, ["kfac"], damping=0.1, gradient=own))
    without = fl.compare(model, (x, None), likelihood, ["kfac"], damping=0.1)
    assert "direction_cosine" not in without


def test_the_model_is_left_as_it_was_and_layers_are_chosen():
    model, data, likelihood = deep()
    before = {name: p.clone() for name, p in model.named_parameters()}
    ds = fl.compare(
        model, data, likelihood, approximators=["kfac"], layers=["3"], dtype=torch.float32
    )
    assert list(ds.layer.values) == ["3"]
    assert ds.attrs["dtype"] == "float32"
    for name, p in model.named_parameters():
        assert torch.equal(p, before[name])
        assert p.grad is None


def test_arguments_that_do_not_belong_together_are_refused():
    model, data, likelihood = deep()
    stats = fl.collect(model, data, likelihood)
    with pytest.raises(TypeError, match="beside statistics"):
        fl.compare(stats, ["kfac"], layers=["0"])
    with pytest.raises(TypeError, match="twice"):
        fl.compare(stats, ["kfac"], approximators=["kfac"])
    with pytest.raises(TypeError, match="positional arguments"):
        fl.compare(model, data)
    with pytest.raises(TypeError, match="colour"):
        fl.compare(model, data, likelihood, colour="red")
    with pytest.raises(ValueError, match="store= was given beside purpose="):
        fl.compare(model, data, likelihood, purpose=fl.Sharpness(), store="x.nc")


@pytest.mark.parametrize("budget", [None, "1 MiB", 40_000])
def test_purposes_of_a_model_are_those_of_its_statistics(budget):
    """Also group by group, and where a layer does not fit at all."""
    model, data, likelihood = deep()
    before = {name: held.clone() for name, held in model.state_dict().items()}
    stats = fl.collect(model, data, likelihood)
    gradient = fl.mean_gradient(model, data, likelihood)
    asked = [fl.Step(gradient, 0.1), fl.Laplace(1.0, 50), fl.Matrix()]
    methods = ["exact", "kfac", "kpsvd-2", "diagonal"]
    whole = fl.compare(stats, methods, purpose=asked)
    found = fl.compare(model, data, likelihood, methods, purpose=asked, budget=budget)
    served = ~found.status.str.startswith("not served").any(["approximator", "purpose"])
    assert served.all() == (budget != 40_000)
    for name in ("value", "stored_numbers", "solve_flops", "status"):
        left, right = (one[name].isel(layer=served.values) for one in (found, whole))
        xr.testing.assert_identical(left.drop_attrs(), right.drop_attrs())
    if served.all():
        xr.testing.assert_identical(found.network, whole.network)
        assert fl.analysis.verdict(found) == fl.analysis.verdict(whole)
        assert found.attrs["examples"] == whole.attrs["examples"]
    else:
        assert served.any(), "those that fit are served"
        assert found.network.isnull().all()
    for name, held in model.state_dict().items():
        assert torch.equal(held, before[name])
