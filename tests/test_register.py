"""One register: an approximator says everything of itself in the place that defines it."""

import re
from dataclasses import dataclass
from typing import ClassVar

import pytest
import torch

import fisherlab as fl
from fisherlab.approximators import Cost, OfSums, register
from fisherlab.approximators.base import Sums, add, facts
from fisherlab.operators import Dense
from tests.oracles import assert_close


@dataclass(frozen=True)
class Scaled(OfSums):
    """The diagonal times a share: all that somebody who adds a method writes."""

    share: float = 0.5
    entrywise: ClassVar[bool] = True

    def accumulate(self, state, statistics):
        return add(state, Sums.of(statistics, statistics.samples.squares()))

    def finish(self, state):
        entries = self.share * state.tensors[0] / state.count
        return fl.operators.Diagonal(entries, state.provenance.by(repr(self)))

    def cost(self, samples):
        o, i = samples.weight_shape
        return Cost(samples.examples * o * i, o * i)


@pytest.fixture
def mine(monkeypatch):
    """Register the method for one test."""
    monkeypatch.setattr(register, "_ENTRIES", dict(register._ENTRIES))
    register.add({"scaled": Scaled()})
    return "scaled"


def whole(statistics):
    """Return the block itself, as a plain function of the statistics does."""
    exact = fl.ExactBlock()(statistics).to_dense()
    return Dense(exact, statistics.weight_shape, statistics.provenance)


def joint(statistics):
    """Return a matrix of all blocks."""
    return fl.block_diagonal(whole, statistics)


joint.takes = "network"


def problem():
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(9, 3, generator=generator).double()
    model = torch.nn.Sequential(torch.nn.Linear(3, 4), torch.nn.Linear(4, 2)).double()
    with torch.no_grad():
        for p in model.parameters():
            p.copy_(torch.randn(p.shape, generator=generator) / 2)
    return model, (x, torch.zeros(9, 2).double()), fl.Gaussian()


def test_a_method_that_is_added_is_known_everywhere(mine):
    model, data, likelihood = problem()
    assert list(fl.approximators())[-1] == mine
    stats = fl.collect(model, data, likelihood)
    for table in (fl.compare(stats, [mine, "diagonal"]), fl.sweep(stats, [mine])):
        assert set(table.status.values.ravel()) == {"ok"}
    assert mine in fl.compare(stats).approximator
    bill = fl.estimate(model, data, likelihood, [mine])
    assert [(row.flops, row.result_bytes) for row in bill.rows] == [(144, 128), (90, 80)]
    streamed = fl.approximate(model, [data, data], likelihood, [mine])[mine]
    expected = fl.Diagonal()(stats["0"])
    assert_close(streamed["0"].to_dense(), expected.to_dense() / 2)
    assert fl.block_diagonal(mine, stats).blocks.keys() == stats.keys()


def train(model, data, likelihood, method):
    optimiser = fl.NaturalGradient(model, likelihood, method, lr=0.02, damping=0.1)
    losses = [float(optimiser.step(batch=data)) for _ in range(3)]
    assert losses[-1] < losses[0]


TRAINED = {"name": "scaled", "value": Scaled(0.3), "block": whole, "network": joint}


@pytest.mark.parametrize("method", TRAINED.values(), ids=TRAINED)
def test_names_values_and_functions_train(mine, method):
    train(*problem(), method)


def test_functions_are_taken_wherever_a_name_is():
    model, data, likelihood = problem()
    stats = fl.collect(model, data, likelihood)
    error = fl.compare(stats, ["kfac", whole]).frobenius_error.sel(approximator="whole")
    assert float(abs(error).max()) < 1e-7
    found = fl.approximate(model, [data], likelihood, {"mine": whole, "joint": joint})
    assert_close(found["mine"]["0"].to_dense(), whole(stats["0"]).to_dense())
    assert_close(found["joint"].to_dense(), joint(stats).to_dense())
    assert fl.approximate_network(model, data, likelihood, joint).keys() == {"joint"}
    assert fl.estimate(model, data, likelihood, whole).rows[0].note == "not counted"
    probe = fl.probes.Errors({"mine": whole}, examples=9, layers=["fc6"])
    ds = fl.follow(fl.problems.load("digits"), steps=1, probes=[probe])
    assert float(ds.frobenius_error.max()) < 1e-6


def test_what_is_said_is_read_and_a_name_is_given_once():
    assert facts(whole) == facts(lambda s: None)
    assert facts(joint).couples
    assert facts(fl.MiniBlock("mean_gradient")).takes == "mean_gradient"
    assert facts(fl.KPSVD()).holds_samples
    register.add({"kfac": fl.KFAC()})
    with pytest.raises(ValueError, match="'kfac' are names already"):
        register.add({"kfac": fl.EKFAC()})
    with pytest.raises(ValueError, match="two are called '<lambda>'"):
        register.by_name([lambda s: s, lambda s: None])
    with pytest.raises(ValueError, match="unknown; known"):
        fl.block_diagonal("kfac-tridiagonal", {})


def test_a_layer_may_be_called_as_methods_of_networks_call_their_unit():
    model = torch.nn.Sequential()
    for name, (i, o) in {"network": (3, 4), "last": (4, 2)}.items():
        model.add_module(name, torch.nn.Linear(i, o).double())
    data = torch.rand(6, 3).double(), torch.arange(6) % 2
    chosen = {**fl.approximators(), **fl.network_approximators()}
    found = fl.approximate(model, data, fl.Categorical(), chosen)
    for name in fl.approximators():
        assert set(found[name]) == {"network", "last"}, name
    for name in fl.network_approximators():
        assert isinstance(found[name], fl.operators.network.NetworkOperator), name


def _entries(layer):
    return fl.ExactBlock()(layer).to_dense() / 2


@pytest.mark.parametrize(
    ("given", "said"),
    [
        (torch.ones(3, 3), r"returned a tensor of shape \(3, 3\); an operator, or a"),
        (torch.arange(64.0).view(8, 8), "that is not symmetric"),
        (torch.full((8, 8), torch.nan), "holds NaN or infinity"),
        ("words", "returned a str"),
    ],
)
def test_a_matrix_stands_for_a_dense_block_and_other_things_are_refused(given, said):
    data = torch.rand(9, 3).double(), torch.arange(9) % 2
    stats = fl.collect(torch.nn.Linear(3, 2).double(), data, fl.Categorical())
    methods = {"mine": _entries, "other": lambda _: given, "kfac": fl.KFAC()}
    by_metric = fl.compare(stats, methods)
    by_purpose = fl.compare(stats, methods, purpose=fl.Matrix())
    error = by_metric["frobenius_error"].sel(approximator="mine")
    assert float(error.squeeze()) == pytest.approx(0.5)
    assert float(by_purpose["value"].sel(approximator="mine")[0, 0]) == pytest.approx(0.5)
    for found in (by_metric, by_purpose):
        assert re.search(said, str(found["status"].sel(approximator="other").values.item()))
        assert found["status"].sel(approximator="kfac").values.item() == "ok"
