"""Laws of the grid search: every cell is a plain run, and stopping changes nothing."""

from __future__ import annotations

import json
from itertools import product

import numpy as np
import pytest
import torch
import xarray as xr

import fisherlab as fl
from fisherlab.training import best_runs
from fisherlab.training.studies import preset, settings_of
from tests.training_runs import small

GRID = {"lr": [0.5, 0.05], "momentum": [0.0, 0.9]}
OPTIONS = {"steps": 8, "every": 2, "batch_size": 8, "prune": False}


def sgd(problem, lr, momentum=0.0):
    return torch.optim.SGD(problem.model.parameters(), lr=lr, momentum=momentum)


def adam(problem, lr):
    return torch.optim.Adam(problem.model.parameters(), lr=lr)


def curves(ds):
    return ds[["train_loss", "test_loss", "batch_loss", "status", "objective", "best"]]


def test_every_cell_is_the_run_of_its_setting_and_seed():
    ds = fl.tune(small, {"sgd": sgd}, GRID, seeds=(0, 3), **OPTIONS)
    assert dict(ds.sizes) == {"optimizer": 1, "setting": 4, "seed": 2, "step": 5}
    for k, (lr, momentum) in enumerate(product(*GRID.values())):
        for seed in (0, 3):
            problem = small(seed)
            run = fl.follow(
                problem,
                sgd(problem, lr, momentum),
                steps=8,
                every=2,
                batch_size=8,
                seed=seed,
            )
            cell = ds.sel(optimizer="sgd", setting=k, seed=seed)
            np.testing.assert_array_equal(cell.train_loss, run.train_loss)
            assert (float(cell.lr), float(cell.momentum)) == (lr, momentum)
    expected = ds.train_loss.isel(step=-1).mean("seed")
    np.testing.assert_allclose(ds.objective, expected, rtol=1e-15)
    assert int(ds.best[0]) == int(expected.values[0].argmin())


def test_the_best_runs_are_curves_of_each_optimiser():
    grids = {"sgd": GRID, "adam": {"lr": [1e-6, 0.1]}}
    ds = fl.tune(small, {"sgd": sgd, "adam": adam}, grids, **OPTIONS)
    assert np.isnan(ds.momentum.sel(optimizer="adam")).all()
    assert ds.status.sel(optimizer="adam", seed=0).values.tolist() == ["ok", "ok", "", ""]
    best = best_runs(ds)
    assert best.train_loss.dims == ("optimizer", "seed", "step")
    assert float(best.lr.sel(optimizer="adam")) == 0.1
    lowest = ds.objective.min("setting")
    np.testing.assert_array_equal(best.train_loss.isel(step=-1).mean("seed"), lowest)


def test_a_model_given_as_a_problem_is_left_as_it_is():
    problem = small()
    before = torch.cat([p.flatten() for p in problem.model.parameters()]).clone()
    ds = fl.tune(problem, {"adam": adam}, {"lr": [0.1, 0.1001]}, **OPTIONS)
    after = torch.cat([p.flatten() for p in problem.model.parameters()])
    assert torch.equal(before, after)
    assert float(ds.train_loss[0, 0, 0, 0]) == float(ds.train_loss[0, 1, 0, 0])


def test_a_stopped_search_goes_on_to_the_same_end(tmp_path):
    taken = []

    def stopping(problem, lr, momentum=0.0):
        taken.append((lr, momentum))
        made = sgd(problem, lr, momentum)
        if len(taken) == 3:
            made.register_step_post_hook(_interrupt_after(5))
        return made

    whole = fl.tune(small, {"sgd": sgd}, GRID, **OPTIONS)
    with pytest.raises(KeyboardInterrupt, match="after step 5 of 8"):
        fl.tune(small, {"sgd": stopping}, GRID, store=tmp_path, **OPTIONS)
    journal = tmp_path / "study.log"
    journal.write_bytes(journal.read_bytes() + b'{"op_code": 4, "wor')  # a torn line
    again = fl.tune(small, {"sgd": stopping}, GRID, store=tmp_path, **OPTIONS)
    xr.testing.assert_identical(curves(whole), curves(again))
    settings = [tuple(s.values()) for s in settings_of(GRID)]
    assert taken == [*settings[:3], *settings[2:]]  # two are done, one goes on
    record = json.loads((tmp_path / "sgd-lr-0.05-momentum-0-seed-0/run.json").read_text())
    assert [s["from_step"] for s in record["sessions"]] == [0, 5]
    xr.testing.assert_identical(curves(fl.open(tmp_path / "results.nc")), curves(again))


def _interrupt_after(steps):
    import signal

    left = iter(range(steps - 1, -1000, -1))

    def count(*_):
        if next(left) == 0:
            signal.raise_signal(signal.SIGINT)

    return count


def test_a_finished_search_is_not_done_again_and_can_grow(tmp_path):
    made = []

    def counted(problem, lr):
        made.append(lr)
        return adam(problem, lr)

    def search(rates, seeds=(0,)):
        return fl.tune(
            small, {"adam": counted}, {"lr": rates}, seeds=seeds, store=tmp_path, **OPTIONS
        )

    first = search([0.1])
    xr.testing.assert_identical(first, search([0.1]))
    assert made == [0.1]
    grown = search([0.1, 0.2], seeds=(0, 1))
    assert made == [0.1, 0.1, 0.2, 0.2]
    np.testing.assert_array_equal(grown.train_loss[0, 0, 0], first.train_loss[0, 0, 0])


def test_another_search_is_refused_by_the_name_of_what_differs(tmp_path):
    fl.tune(small, {"adam": adam}, {"lr": [0.1]}, store=tmp_path, **OPTIONS)
    changed = OPTIONS | {"batch_size": 9}
    with pytest.raises(ValueError, match="batch_size is 8 there and 9 here"):
        fl.tune(small, {"adam": adam}, {"lr": [0.1]}, store=tmp_path, **changed)


def test_bad_settings_are_given_up_and_failures_are_told(tmp_path):
    def wild(problem, lr):
        made = adam(problem, min(lr, 1.0))
        if lr > 1:
            with torch.no_grad():
                problem.model.fc1.weight.fill_(float("nan"))
        return made

    rates = [0.1, 0.11, 0.12, 1e-9, 1e-10, 9.0]
    options = OPTIONS | {"prune": True, "store": tmp_path}
    ds = fl.tune(small, {"wild": wild}, {"lr": rates}, **options)
    status = ds.status.values[0, :, 0].tolist()
    assert status[:3] == ["ok"] * 3
    assert status[3].startswith("given up after step")
    assert status[5].startswith("failed: The training loss is nan at step 1")
    assert np.isnan(ds.train_loss.values[0, 3, 0, -1])
    assert np.isnan(ds.objective.values[0, 3:]).all()
    assert int(ds.best[0]) < 3
    xr.testing.assert_identical(
        curves(ds), curves(fl.tune(small, {"wild": wild}, {"lr": rates}, **options))
    )


def test_an_objective_that_is_no_number_is_never_the_best():
    """Features that only the test set has, and weights that make them ∞ − ∞."""

    def linear(seed):
        model = torch.nn.utils.skip_init(torch.nn.Linear, 3, 1).double()
        for parameter in model.parameters():
            torch.nn.init.zeros_(parameter)
        x = torch.zeros(8, 3).double()
        x[:, 2] = torch.arange(8)
        test = x.clone()
        test[:, :2] = 1e200
        y = x[:, 2:] * 0.5
        return fl.problems.Problem("linear", model, fl.Gaussian(), (x, y), (test, y))

    def weighted(problem, start):
        with torch.no_grad():
            problem.model.weight[0, 0] = start * 1e200
            problem.model.weight[0, 1] = start * -1e200
        return torch.optim.SGD(problem.model.parameters(), lr=1e-3)

    grid = {"start": [1.0, 0.0]}
    ds = fl.tune(linear, {"sgd": weighted}, grid, **OPTIONS | {"objective": "test_loss"})
    assert ds.status.values.flatten().tolist() == ["ok", "ok"]
    assert np.isfinite(ds.objective.values[0]).tolist() == [False, True]
    assert int(ds.best[0]) == 1


def test_trials_are_drawn_from_the_grid_by_the_seed():
    options = OPTIONS | {"steps": 1, "trials": 2}
    rates = {"lr": [10.0**-k for k in range(9)]}
    first, again, other = (
        fl.tune(small, {"adam": adam}, rates, seed=s, **options).lr.values[0].tolist()
        for s in (0, 0, 1)
    )
    assert first == again != other
    assert set(first) < set(rates["lr"])


def test_named_optimisers_and_presets(tmp_path):
    ds = fl.tune(
        small, ["sgd-momentum", "kfac"], "coarse", trials=1, steps=1, batch_size=40
    )
    assert ds.optimizer.values.tolist() == ["sgd-momentum", "kfac"]
    assert np.isnan(ds.damping.sel(optimizer="sgd-momentum")).all()
    assert float(ds.damping.sel(optimizer="kfac")[0]) in preset("coarse", "kfac")["damping"]


@pytest.mark.parametrize("name", ["koroko", "bahamou"])
def test_the_presets_hold_the_tuned_values_of_the_papers(name):
    tuned = {
        "koroko": {(0.1, 0.003), (0.01, 1e-4), (0.003, 0.001), (0.1, 0.01), (0.1, 0.03)},
        "bahamou": {(1e-5, 3e-4), (1e-6, 3e-3), (3e-3, 0.3), (0.1, 10.0), (1e-2, 1.0)},
    }
    grid = preset(name, "kfac")
    assert tuned[name] <= set(product(grid["lr"], grid["damping"]))
    assert list(preset(name, "adam")) == ["lr"]


@pytest.mark.parametrize(
    ("change", "named"),
    [
        ({"grid": "fine"}, "there is no grid 'fine'"),
        ({"grid": {"lr": []}}, "no values for .'lr'"),
        ({"grid": {"sgd": {"lr": [0.1]}}}, "no grid for 'adam'"),
        ({"objective": "accuracy"}, "objective='accuracy'"),
        ({"seeds": ()}, "at least one seed"),
        ({"optimizer": "adagrad"}, "'adagrad'"),
    ],
)
def test_mistakes_are_named(change, named):
    given = {"optimizer": {"adam": adam}, "grid": {"lr": [0.1]}} | change
    with pytest.raises(ValueError, match=named):
        fl.tune(small, **given, **(OPTIONS | {"steps": 1}))


def test_optuna_keeps_its_voice():
    import optuna

    before = optuna.logging.get_verbosity()
    fl.tune(small, {"adam": adam}, {"lr": [0.1]}, **(OPTIONS | {"steps": 1}))
    assert optuna.logging.get_verbosity() == before
