"""What says that it takes a number refuses what is none, in a sentence that names it."""

import inspect

import numpy as np
import pytest
import torch
from jaxtyping import TypeCheckError
from torch import nn

import fisherlab as fl
from fisherlab.numerics.devices import parse_budget
from fisherlab.report.config import ReportConfig
from fisherlab.settings import is_number
from fisherlab.training.schedules import Order, averaging, moments

NO_NUMBERS = (True, np.True_, torch.tensor(False), "1", float("nan"), None)
NUMBERS = (1, np.int32(1), np.float32(0.5), torch.tensor(2.0), torch.tensor(3))
PLACES = (fl, fl.approximators, fl.training, fl.training.probes, fl.purposes)
PLACES = (*PLACES, fl.statistics, fl.analysis, fl.problems)
RESULTS = {"LayerStatistics", "MeanGradient", "Estimate", "Coverage", "Cost", "Demand"}
RESULTS |= {"Measure", "StepBytes", "Provenance", "Moment"}


def _is_ours(value):
    return inspect.isfunction(value) or inspect.isclass(value)


def takers():
    """Name everything public that is called with settings, classes and functions."""
    found = {n: getattr(p, n) for p in PLACES for n in dir(p) if n[0] != "_"}
    left = RESULTS | set(dir(fl.errors))
    called = {n: v for n, v in found.items() if _is_ours(v) and n not in left}
    return {**called, "ReportConfig": ReportConfig}


def numbers():
    """Return every parameter that is said to be a number, whether whole, whether None."""
    for name, called in takers().items():
        for parameter, said in inspect.signature(called).parameters.items():
            text = said.annotation
            text = text if isinstance(text, str) else inspect.formatannotation(text)
            kinds = set(text.split(" | "))
            if kinds - {"None"} in ({"int"}, {"float"}) and parameter != "damping":
                given = called, parameter, "int" in kinds, "None" in kinds
                yield pytest.param(*given, id=f"{name}-{parameter}")


@pytest.mark.parametrize(("called", "parameter", "whole", "empty"), [*numbers()])
def test_what_is_no_number_is_refused_by_name(called, parameter, whole, empty):
    for given in (*NO_NUMBERS, *([0.5] if whole else [])):
        if empty and given is None:
            continue
        with pytest.raises(ValueError, match=rf"{parameter}=.*number.* expected"):
            called(**{parameter: given})


def test_numbers_of_python_numpy_and_torch_are_numbers():
    assert all(map(is_number, NUMBERS))
    whole = [is_number(given, "a whole number") for given in NUMBERS]
    assert whole == [True, True, False, False, True]


MODEL, CLASSES = nn.Linear(4, 3), fl.Categorical()
DATA = torch.ones(2, 4), None
DOORS = {
    "optimiser": lambda d: fl.NaturalGradient(MODEL, CLASSES, "kfac", lr=0.1, damping=d),
    "adaptive": lambda d: fl.AdaptiveKFAC(MODEL, CLASSES, damping=d),
    "KBFGS": lambda d: fl.KBFGS(damping=d),
    "SINGD": lambda d: fl.SINGD(damping=d),
    "pruning": lambda d: fl.Pruning({}, damping=d),
    "step": lambda d: fl.Step({}, damping=d),
    "average": averaging,
    "every": lambda every: moments(every, 10),
    "batch size": lambda size: Order(10, size, 0),
    "rank": lambda rank: fl.rank_curve(fl.collect(MODEL, DATA, CLASSES), ranks=[rank]),
    "eigenvalues": fl.operators.Diagonal(torch.ones(2, 2)).top_eigenvalues,
    "seeds": lambda seeds: fl.uncertainty(MODEL, DATA, CLASSES, seeds=seeds),
    "budget": parse_budget,
}


@pytest.mark.parametrize("door", DOORS)
def test_what_takes_more_than_numbers_refuses_the_same(door):
    for given in (True, np.True_, torch.tensor(False), float("nan"), "words"):
        with pytest.raises((ValueError, TypeCheckError), match=r"number|understood|Type"):
            DOORS[door](given)


@pytest.mark.parametrize("setting", ["lr", "momentum", "weight_decay", "damping"])
def test_a_group_of_an_optimiser_refuses_the_same(setting):
    model = nn.Sequential(nn.Linear(4, 3), nn.Linear(3, 3))
    first = [*model[0].parameters()]
    optimiser = fl.NaturalGradient(model, CLASSES, "kfac", 0.1, 0.1, params=first)
    for given in (True, "1", float("nan"), -1.0):
        with pytest.raises((ValueError, TypeCheckError), match=setting):
            optimiser.add_param_group({"params": [*model[1].parameters()], setting: given})
