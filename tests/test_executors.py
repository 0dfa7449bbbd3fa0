"""Laws of cells done by executors: the same bits, whatever happens to workers."""

from __future__ import annotations

import os
import signal
import time
from concurrent.futures import ProcessPoolExecutor, ThreadPoolExecutor
from functools import partial
from multiprocessing import get_context

import pytest
import torch
import xarray as xr
from torch import nn

import fisherlab as fl
from fisherlab.analysis.executors import Folder, filled
from fisherlab.cli.parsing import executor_of
from tests import cases
from tests.test_tune import OPTIONS, adam, curves, sgd
from tests.training_runs import small

pytestmark = pytest.mark.filterwarnings("ignore:.*fork:DeprecationWarning")
METHODS = ["kfac", "ekfac"]
pool_of_two = partial(ProcessPoolExecutor, 2, get_context("fork"))


@pytest.fixture(scope="module")
def pool():
    """Two processes for all tests of this file."""
    with pool_of_two() as executor:
        yield executor


@pytest.fixture(scope="module")
def network():
    """A network of three kinds of blocks, its data, and their statistics and gradient."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        model = nn.Sequential(
            nn.Conv2d(1, 2, 2), nn.Flatten(), nn.Linear(8, 3), nn.LayerNorm(3)
        ).double()
    data, likelihood = (cases.normal(20, 1, 3, 3), torch.arange(20) % 3), fl.Categorical()
    stats = fl.collect(model, data, likelihood)
    return model, data, likelihood, stats, fl.mean_gradient(model, data, likelihood)


def assert_same(found, expected):
    for table in (found, expected):
        for name in ("created_at", "merged_from"):
            table.attrs.pop(name, None)
    left = set(expected.variables) ^ set(found.variables)
    assert not left
    for name in expected.variables:
        xr.testing.assert_equal(found[name].variable, expected[name].variable)
    assert found.attrs == expected.attrs


def swept(network, **more):
    asked = {"gradient": network[4], "metrics": ["direction_cosine", "slope"]}
    return fl.sweep(network[3], METHODS, **asked, **more)


def compared(network, **more):
    asked = {"damping": 0.1, "gradient": network[4], "reference": network[3]}
    return fl.compare(network[3], METHODS, **asked, **more)


def compared_of_a_model(network, **more):
    return fl.compare(*network[:3], METHODS, damping=[0.1, 1.0], budget="1 GiB", **more)


def repeated(network, **more):
    asked = {"metrics": ["frobenius_error"], "seeds": 3, **more}
    return fl.uncertainty(*network[:3], METHODS, **asked)


def against_the_exact(network, **more):
    return repeated(network, reference=fl.Exact(), metrics=["cosine_similarity"], **more)


ANALYSES = [swept, compared, compared_of_a_model, repeated, against_the_exact]


@pytest.mark.parametrize("analysis", ANALYSES, ids=lambda f: f.__name__)
def test_two_processes_give_the_bits_of_one(network, pool, analysis):
    found, expected = analysis(network, executor=pool), analysis(network)
    seconds = [name for name in expected if str(name).endswith("seconds")]
    assert_same(found.drop_vars(seconds), expected.drop_vars(seconds))


def test_two_processes_tune_as_one(pool, tmp_path):
    grid = {"lr": [0.5, 0.05], "momentum": [0.0, 0.9]}
    expected = fl.tune(small, {"sgd": sgd}, grid, **OPTIONS)
    found = fl.tune(small, {"sgd": sgd}, grid, executor=pool, **OPTIONS)
    xr.testing.assert_identical(curves(found), curves(expected))
    shared = {"store": tmp_path, **OPTIONS, "prune": True}
    rates = {"lr": [0.1, 0.11, 0.12, 1e-9]}
    one = fl.tune(small, {"adam": adam}, rates, executor=pool, **shared)
    assert (one.status.values[0, :3] == "ok").all()
    again = fl.tune(small, {"adam": adam}, rates, executor=pool, **shared)
    xr.testing.assert_identical(curves(one), curves(again))
    with pytest.raises(ValueError, match="name a store=, or let all trials end"):
        fl.tune(small, {"adam": adam}, rates, executor=pool)


@pytest.mark.parametrize("analysis", [swept, repeated], ids=lambda f: f.__name__)
def test_a_folder_keeps_cells_and_none_is_done_again(network, tmp_path, analysis, spied):
    folder = tmp_path / "cells"
    expected = analysis(network)
    spied.clear()
    assert_same(analysis(network, store=folder), expected)
    assert len(spied) == 3
    cells = sorted(folder.glob("cell-*.nc"))
    assert len(cells) == 3
    cells[1].unlink()  # as if it had been stopped before
    some = fl.open(folder)
    dim = "layer" if analysis is swept else "seed"
    assert (some.sizes[dim], expected.sizes[dim]) == (2, 3)
    spied.clear()
    assert_same(analysis(network, store=folder), expected)
    assert len(spied) == 1
    name = "direction_cosine" if analysis is swept else "frobenius_error"
    xr.testing.assert_equal(fl.open(folder)[name], expected[name])


@pytest.fixture
def spied(monkeypatch):
    """What cells were done, by name."""
    from fisherlab.analysis import executors

    seen, real = [], executors.filled

    def spy(who, cells, executor):
        seen.extend(cells)
        return real(who, cells, executor)

    monkeypatch.setattr(executors, "filled", spy)
    return seen


def test_seeds_may_be_added_and_another_request_is_refused(network, tmp_path, spied):
    repeated(network, store=tmp_path / "cells", seeds=1)
    spied.clear()
    more = repeated(network, store=tmp_path / "cells", seeds=2)
    assert spied == ["seed 1"]
    assert_same(more, repeated(network, seeds=2))
    with pytest.raises(fl.StoreError, match=r"another request: damping differ"):
        repeated(network, store=tmp_path / "cells", damping=0.1)
    with torch.no_grad():
        network[0][2].bias[0] += 1
    with pytest.raises(fl.StoreError, match="model and data differ"):
        repeated(network, store=tmp_path / "cells")
    with torch.no_grad():
        network[0][2].bias[0] -= 1
    for damaged in ("{}", "{", "[]"):
        (tmp_path / "cells" / "cells.json").write_text(damaged)
        with pytest.raises(fl.DataError, match=r"cells.json is damaged"):
            repeated(network, store=tmp_path / "cells")
    (tmp_path / "notes.txt").touch()
    with pytest.raises(fl.DataError, match=r"other files \(cells, notes.txt\)"):
        repeated(network, store=tmp_path)


def marked(folder, name, kill=()):
    """A cell that writes down that it was begun; some kill their worker at first."""
    beginnings = folder / f"{name}.begun"
    with beginnings.open("a") as file:
        file.write("x")
    if name in kill and beginnings.stat().st_size <= kill[name]:
        os.kill(os.getpid(), signal.SIGKILL)
    return xr.Dataset({"value": ("layer", [float(name)])}, {"layer": [str(name)]})


def row_of_cells(folder, count, kill=()):
    return {str(k): partial(marked, folder, str(k), kill) for k in range(count)}


def begun(folder):
    return {file.stem: file.stat().st_size for file in folder.glob("*.begun")}


def test_the_cell_of_a_killed_worker_is_done_again(tmp_path):
    cells = row_of_cells(tmp_path, 6, {"2": 1})
    found = dict(filled("it", cells, pool_of_two))
    assert {name: float(row.value[0]) for name, row in found.items()} == {
        str(k): k for k in range(6)
    }
    assert begun(tmp_path)["2"] == 2


def test_a_pool_that_broke_is_told_and_what_is_done_is_kept(tmp_path):
    folder = Folder.of("it", tmp_path / "cells", dict, [str(k) for k in range(4)])
    killing = row_of_cells(tmp_path, 4, {"3": 1})
    with ThreadPoolExecutor(1) as one:  # so that the first two are done for sure
        folder.filled("it", {k: killing[k] for k in ("0", "1")}, one)
    with (
        pytest.raises(
            fl.ExecutorError, match=r"did . of . cells and failed.*BrokenProcess"
        ),
        pool_of_two() as pool,
    ):
        folder.filled("it", killing, pool)
    rows = folder.filled("it", killing, None)
    assert [float(row.value[0]) for row in rows] == [0, 1, 2, 3]
    assert begun(tmp_path)["0"] == begun(tmp_path)["1"] == 1


def failing(text):
    raise fl.NeedsSharedForm("it", text)


def test_what_a_cell_raises_is_raised_here_and_the_rest_is_cancelled(pool, tmp_path):
    cells = {"bad": partial(failing, "fc1")} | {
        str(k): partial(time.sleep, 0.01) for k in range(300)
    }
    started = time.monotonic()
    with pytest.raises(fl.NeedsSharedForm, match="it needs the shared form") as raised:
        dict(filled("it", cells, pool))
    assert time.monotonic() - started < 1.2
    assert raised.value.__notes__ == ["it: this happened in the cell 'bad', on a worker."]
    with pytest.raises(fl.ExecutorError, match="importable there"):
        dict(filled("it", {"one": lambda: 1}, pool))
    with pytest.raises(TypeError, match=r"has no submit\(\)"):
        dict(filled("it", cells, int))


def test_threads_of_one_process_take_turns(tmp_path):
    inside = []

    def alone():
        inside.append(1)
        time.sleep(0.001)
        return len(inside), inside.pop()

    with ThreadPoolExecutor(4) as threads:
        found = dict(filled("it", {str(k): alone for k in range(20)}, threads))
    assert set(found.values()) == {(1, 1)}


def options(**given):
    from argparse import Namespace

    return Namespace(**{"jobs": None, "scheduler": None, "slurm": None, **given})


def test_the_command_line_names_executors(tmp_path, monkeypatch):
    assert executor_of(options(), tmp_path) is None
    assert executor_of(options(jobs=1), tmp_path) is None
    with executor_of(options(jobs=2), tmp_path)() as made:
        assert isinstance(made, ProcessPoolExecutor)
    with pytest.raises(ValueError, match="--jobs must be at least 1"):
        executor_of(options(jobs=0), tmp_path)
    monkeypatch.setattr("fisherlab.cli.parsing.find_spec", lambda name: None)
    with pytest.raises(ValueError, match=r"--scheduler needs distributed: pip install"):
        executor_of(options(scheduler="tcp://here:1"), tmp_path)
    with pytest.raises(ValueError, match=r"--slurm needs submitit: pip install"):
        executor_of(options(slurm=["partition=cpu"]), tmp_path)
    monkeypatch.setattr("fisherlab.cli.parsing.find_spec", lambda name: name)
    with pytest.raises(ValueError, match="is no KEY=VALUE"):
        executor_of(options(slurm=["partition"]), tmp_path)


SWEEP = """
import sys
from functools import partial
from concurrent.futures import ProcessPoolExecutor
from multiprocessing import get_context
from pathlib import Path
from fisherlab.analysis.executors import Folder
from tests.test_executors import row_of_cells
if __name__ == "__main__":
    folder = Path(sys.argv[1])
    cells = row_of_cells(folder, 40, {"7": 1, "31": 2})
    kept = Folder.of("it", folder / "cells", dict, list(cells))
    kept.filled("it", cells, partial(ProcessPoolExecutor, 2, get_context("spawn")))
"""


@pytest.mark.slow
def test_a_killed_sweep_of_forty_cells_goes_on_and_does_no_cell_twice(tmp_path):
    """Workers are killed at two cells, and the sweep itself in the middle."""
    import subprocess
    import sys

    script = tmp_path / "sweep.py"
    script.write_text(SWEEP)
    running = subprocess.Popen([sys.executable, script, tmp_path], start_new_session=True)
    folder = tmp_path / "cells"
    while len(list(folder.glob("cell-*.nc"))) < 15:
        assert running.poll() is None
        time.sleep(0.01)
    os.killpg(running.pid, signal.SIGKILL)
    running.wait()
    there = {str(fl.open(file).layer.values[0]) for file in folder.glob("cell-*.nc")}
    before = begun(tmp_path)
    assert 15 <= len(there) < 40
    subprocess.run([sys.executable, script, tmp_path], check=True)
    assert [float(v) for v in fl.open(folder).value] == list(range(40))
    after = begun(tmp_path)
    assert all(after[name] == before[name] for name in there)


@pytest.mark.slow
def test_a_dask_cluster_fills_forty_cells_though_a_worker_is_killed(tmp_path):
    distributed = pytest.importorskip("distributed")
    cluster = distributed.LocalCluster(n_workers=2, threads_per_worker=1)
    cells = row_of_cells(tmp_path, 40, {"7": 1})
    with cluster, distributed.Client(cluster) as client:
        found = dict(filled("it", cells, client))
    assert [float(found[str(k)].value[0]) for k in range(40)] == list(range(40))


@pytest.mark.slow
def test_submitit_fills_cells(tmp_path):
    submitit = pytest.importorskip("submitit")
    executor = submitit.AutoExecutor(tmp_path / "logs", cluster="local")
    found = dict(filled("it", row_of_cells(tmp_path, 3), executor))
    assert [float(found[str(k)].value[0]) for k in range(3)] == [0, 1, 2]
