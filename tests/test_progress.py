"""Long calls tell how far they are, and a finished run that there is nothing to do."""

import inspect
from functools import partial

import pytest
import torch

import fisherlab as fl

QUICK = {
    "blocks": "looks at modules",
    "coverage": "two examples",
    "estimate": "two examples",
    "frozen": "a context",
    "full_matrix": "a view of samples",
    "hf": "wraps",
    "mean_loss": "one pass forward",
    "accuracy": "one pass forward",
    "performance": "one pass forward",
    "unrolled": "copies",
}
MODEL = torch.nn.Sequential(torch.nn.Linear(3, 4), torch.nn.Linear(4, 2)).double()
DATA = torch.linspace(0, 1, 36).double().view(12, 3), torch.arange(12) % 2
CASES = {
    "compare": partial(fl.compare, approximators=["kfac"]),
    "purposes": partial(fl.compare, approximators=["kfac"], purpose=fl.Sharpness()),
    "sweep": partial(fl.sweep, approximators=["kfac"], damping=[0.1]),
    "pareto": partial(fl.pareto, approximators=["kfac"], repeats=1),
    "spectra": partial(fl.spectra, approximators=["kfac"]),
    "density": partial(fl.density, approximators=["kfac"]),
    "inverse_blocks": partial(fl.inverse_blocks, approximators=["kfac"], damping=0.1),
    "structure": fl.structure,
    "rank_curve": fl.rank_curve,
}


def statistics():
    return fl.collect(MODEL, DATA, fl.Categorical(), compress=False)


def takes(function):
    return inspect.signature(function).parameters


def test_every_public_call_on_statistics_or_a_model_takes_progress():
    homes = (fl, fl.analysis, fl.training, fl.report)
    every = {n: getattr(home, n) for home in homes for n in dir(home) if n[0] != "_"}
    public = {n: f for n, f in every.items() if inspect.isfunction(f)}
    first = {n: next(iter(takes(f)), "") for n, f in public.items()}
    asked = {n for n, name in first.items() if name in ("stats", "model")}
    asked |= {"follow", "tune"}
    assert {*CASES} - {"purposes"} <= asked
    silent = {n for n in asked if not {"progress", "how"} & takes(public[n]).keys()}
    assert silent == QUICK.keys()


@pytest.mark.parametrize("name", CASES)
def test_every_layer_is_told_once_in_order(name):
    told = []
    CASES[name](statistics(), progress=told.append)
    assert [one[:3] for one in told] == [("0", 1, 2), ("1", 2, 2)]
    assert all(one.seconds >= 0 for one in told)


def test_methods_seeds_and_examples_are_told():
    told, one = [], (MODEL, DATA, fl.Categorical())
    fl.compare_networks(statistics(), ["exact-network"], progress=told.append)
    fl.uncertainty(*one, ["kfac"], seeds=2, splits=2, progress=told.append)
    assert [each[1:3] for each in told] == [(1, 1), (1, 2), (2, 2)]
    fl.decompose(*one, ["kfac"], progress=told.append)
    assert [each.layer for each in told[3:]] == ["0", "1"]
    counts = []
    fl.mean_gradient(*one, progress=counts.append)
    assert sum(counts) == 12


RATES = {"lr": [0.1]}
FINISHED = {
    "compare": lambda: partial(fl.compare, MODEL, DATA, fl.Categorical(), ["kfac"]),
    "sweep": lambda: partial(fl.sweep, statistics(), ["kfac"], damping=[0.1]),
    "uncertainty": lambda: partial(
        fl.uncertainty, MODEL, DATA, fl.Categorical(), ["kfac"], seeds=1, splits=2
    ),
    "follow": lambda: partial(
        fl.follow,
        fl.problems.Problem("mine", MODEL, fl.Categorical(), DATA, DATA),
        torch.optim.SGD(MODEL.parameters(), lr=0.0),
        steps=2,
        every=1,
    ),
    "tune": lambda: partial(fl.tune, "digits", "sgd-momentum", RATES, steps=1, every=1),
}


@pytest.mark.parametrize(
    "name",
    [
        pytest.param(
            name, marks=[pytest.mark.slow] if name in ("tune", "uncertainty") else []
        )
        for name in FINISHED
    ],
)
def test_a_finished_run_says_that_it_is_complete(name, tmp_path, capsys):
    call, store = FINISHED[name](), tmp_path / "kept"
    call(store=store)
    capsys.readouterr()
    call(store=store)
    assert "already complete" not in capsys.readouterr().err
    call(store=store, progress=True)
    said = f"{name}: already complete, "
    line = capsys.readouterr().err.partition(said)[2].partition("\n")[0]
    assert line.endswith(f"in {store}.")
