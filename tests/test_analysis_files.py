"""Results survive netCDF and zarr, whole or not at all, and can be put together."""

import json
import os
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
import xarray as xr
from torch import nn

import fisherlab as fl
from tests import cases
from tests.cases import normal


@pytest.fixture(scope="module")
def stats():
    model, x, y = cases.data(cases.LAYERS["conv strided padded"], fl.Categorical())
    return fl.collect(model, (x, y), fl.Categorical())


@pytest.fixture(scope="module")
def result(stats):
    return fl.compare(stats, ["kfac", "diagonal"], damping=[0.1, 0.5])


@pytest.mark.parametrize("name", ["result.nc", "result.zarr"])
def test_every_kind_of_result_is_the_same_after_a_round_trip(stats, result, name, tmp_path):
    results = {
        "compare": result,
        "sweep": fl.sweep(stats, ["kfac"]),
        "rank_curve": fl.rank_curve(stats, [1, 2]),
        "structure": fl.structure(stats, damping=0.1),
        "pareto": fl.pareto(stats, ["kfac"], repeats=1),
    }
    for one in results.values():
        xr.testing.assert_identical(fl.open(fl.save(one, tmp_path / name)), one)
    for tree in (fl.spectra(stats, ["kfac"]), fl.inverse_blocks(stats, ["kfac"], 0.1)):
        again = fl.open(fl.save(tree, tmp_path / name))
        assert list(again.children) == list(tree.children)
        for child in tree.children:
            xr.testing.assert_equal(again[child].to_dataset(), tree[child].to_dataset())
        assert dict(again.attrs) == dict(tree.attrs)
    assert os.listdir(tmp_path) == [name]


def test_a_failed_save_leaves_the_old_zarr_folder_and_no_other(result, tmp_path):
    folder = fl.save(result, tmp_path / "results.zarr")
    with pytest.raises((TypeError, ValueError)):
        fl.save(result.assign_attrs(bad=object()), folder)
    xr.testing.assert_identical(fl.open(folder), result)
    assert os.listdir(tmp_path) == ["results.zarr"]


def test_a_move_that_fails_puts_the_old_folder_back(result, tmp_path, monkeypatch):
    folder = fl.save(result, tmp_path / "results.zarr")
    rename = Path.rename

    def failing(self, target):
        if self.name == "new":
            raise OSError("no space")
        return rename(self, target)

    monkeypatch.setattr(Path, "rename", failing)
    with pytest.raises(OSError, match="no space"):
        fl.save(result, folder)
    monkeypatch.undo()
    xr.testing.assert_identical(fl.open(folder), result)
    assert os.listdir(tmp_path) == ["results.zarr"]


def test_without_zarr_the_remedy_is_named(result, tmp_path, monkeypatch):
    folder = fl.save(result, tmp_path / "a.zarr")
    monkeypatch.setitem(sys.modules, "zarr", None)
    with pytest.raises(fl.DataError, match=r"save.*not installed.*fisherlab\[zarr\]"):
        fl.save(result, tmp_path / "b.zarr")
    with pytest.raises(fl.DataError, match=r"open.*not installed"):
        fl.open(folder)


def test_a_folder_that_is_no_zarr_is_named(tmp_path):
    (tmp_path / "empty.zarr").mkdir()
    with pytest.raises(fl.DataError, match=r"empty\.zarr.*not a readable zarr"):
        fl.open(tmp_path / "empty.zarr")


def test_runs_complete_each_other(stats):
    names = ["kfac", "diagonal", "ekfac"]
    whole = fl.compare(stats, names, damping=[0.1, 0.5])
    parts = [
        fl.compare(stats, ["kfac", "diagonal"], damping=[0.1, 0.5]),
        fl.compare(stats, ["ekfac"], damping=[0.1, 0.5]),
    ]
    merged = fl.merge(parts)
    xr.testing.assert_equal(merged, whole)
    assert json.loads(merged.attrs["approximators"]) == json.loads(
        whole.attrs["approximators"]
    )
    dampings = [fl.compare(stats, names, damping=value) for value in (0.5, 0.1)]
    xr.testing.assert_equal(fl.merge(dampings), whole)
    metrics = [
        fl.compare(stats, names, metrics=[m]) for m in ("trace_ratio", "frobenius_error")
    ]
    assert {"trace_ratio", "frobenius_error"} <= set(fl.merge(metrics).data_vars)
    layers = [{"0": stats["0"]}, {"3": stats["3"]}]
    each = [
        fl.compare(fl.statistics.Statistics(part, stats.provenance), names)
        for part in layers
    ]
    xr.testing.assert_equal(fl.merge(each), fl.compare(stats, names))


def test_cells_that_no_run_measured_say_so(stats):
    one = fl.compare(stats, ["kfac"]).isel(layer=[0])
    other = fl.compare(stats, ["diagonal"]).isel(layer=[1])
    merged = fl.merge([one, other])
    cell = merged.sel(layer="3", approximator="kfac")
    assert np.isnan(cell["frobenius_error"])
    assert str(cell["status"].values) == "not measured"
    assert int(cell["converged"]) == -1
    assert merged["converged"].dtype == np.int8
    assert str(merged["status"].sel(layer="0", approximator="kfac").values) == "ok"


def test_seeds_and_steps_are_stacked(stats, result):
    seeds = fl.merge([result, result], dim="seed", labels=[3, 7])
    assert seeds["seed"].values.tolist() == [3, 7]
    assert seeds["frobenius_error"].dims[0] == "seed"
    xr.testing.assert_equal(seeds.sel(seed=7, drop=True), result)
    runs = [result.assign_coords(step=step) for step in (0, 10)]
    assert fl.merge(runs, dim="step")["step"].values.tolist() == [0, 10]
    longer = fl.merge([fl.merge(runs, dim="step"), runs[0].expand_dims(step=[20])], "step")
    assert longer["step"].values.tolist() == [0, 10, 20]
    with pytest.raises(ValueError, match=r"share labels along 'step'"):
        fl.merge([fl.merge(runs, dim="step"), runs[0].expand_dims(step=[10])], "step")


def test_conflicts_are_refused_by_name(stats, result):
    other = result.copy(deep=True)
    other["frobenius_error"].loc[{"layer": "3", "approximator": "kfac"}] = 9.0
    expected = r"frobenius_error\[layer=3, approximator=kfac\] is .* and 9\.0"
    with pytest.raises(ValueError, match=expected):
        fl.merge([result, other])
    model, x, y = cases.data(cases.LAYERS["conv strided padded"], fl.Categorical())
    empirical = fl.collect(model, (x, y), fl.Categorical(), fl.Empirical())
    with pytest.raises(ValueError, match=r"'fisher': 'Empirical\(\)', 'Exact\(\)'"):
        fl.merge([result, fl.compare(empirical, ["kfac"], damping=0.1)])
    for name in ("likelihood", "conventions", "reference_fisher", "analysis"):
        with pytest.raises(ValueError, match=f"differ in '{name}'"):
            fl.merge([result, result.assign_attrs({name: "another"})])
    with pytest.raises(ValueError, match="damping_kind"):
        fl.merge([result, fl.compare(stats, ["kfac"], damping=fl.RelativeDamping(0.1))])
    with pytest.raises(ValueError, match="no results"):
        fl.merge([])
    with pytest.raises(ValueError, match=r"2 runs, labels \[1\]"):
        fl.merge([result, result], dim="seed", labels=[1])
    with pytest.raises(ValueError, match="labels need a dim"):
        fl.merge([result], labels=[1])


def test_attributes_that_differ_are_listed(result):
    first, second = result.assign_attrs(seed=1), result.assign_attrs(seed=2)
    merged = fl.merge([first, second], dim="seed")
    assert merged["seed"].values.tolist() == [1, 2]
    assert [told["seed"] for told in json.loads(merged.attrs["merged_from"])] == [1, 2]
    assert "seed" not in merged.attrs
    assert merged.attrs["fisher"] == "Exact()"


def test_names_and_texts_of_any_kind_survive(tmp_path):
    strange = "ümläut <script>'\""
    model = nn.Linear(2, 2).double()
    stats = fl.collect(model, (normal(3, 2), None), fl.Gaussian())
    ds = fl.compare(stats, {strange: fl.KFAC(), "other": fl.Diagonal()})
    for name in ("a.nc", "a.zarr"):
        again = fl.open(fl.save(ds, tmp_path / name))
        assert again["approximator"].values.tolist() == [strange, "other"]
    assert torch.is_tensor(stats["weight"].samples.matrices())


def test_what_is_no_file_is_never_replaced_by_one(result, tmp_path):
    pipe, folder = tmp_path / "pipe", tmp_path / "folder"
    os.mkfifo(pipe)
    folder.mkdir()
    for path in (pipe, folder, Path("")):
        with pytest.raises(fl.errors.DataError, match="is no file"):
            fl.save(result, path)
    assert pipe.is_fifo()
    assert not list(folder.iterdir())
    with pytest.raises(FileNotFoundError, match="gone is no folder that is there"):
        fl.save(result, tmp_path / "gone" / "a.nc")
