"""Laws of one step: dense solves, momentum, clipping, decay, groups, errors."""

from __future__ import annotations

import copy
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import ClassVar

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

import fisherlab as fl
from fisherlab.operators import Diagonal
from fisherlab.operators.kronecker_congruence import KroneckerCholesky
from fisherlab.training import curvature, one_graph, passes
from fisherlab.training.curvature import Curvature
from fisherlab.training.units import Unit
from tests import cases, oracles
from tests.oracles import assert_close

N = 7
RATE, DAMPING = 0.3, 0.2


def network(*sizes, seed=1):
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        return cases._dense(*sizes).double()


def problem(likelihood="categorical", sizes=(4, 3, 3), examples=N):
    model, chosen = network(*sizes), cases.LIKELIHOODS[likelihood]
    x = cases.normal(examples, sizes[0], seed=2)
    return model, chosen, (x, cases.labels(chosen, model(x).shape))


def gradient(model, likelihood, batch):
    """Return the gradient of the mean loss by torch's own loss."""
    x, y = batch
    losses = [
        oracles.loss(likelihood, model(a[None])[0], b) for a, b in zip(x, y, strict=True)
    ]
    leaves = list(model.parameters())
    grads = torch.autograd.grad(sum(losses) / len(x), leaves)
    return dict(zip(dict(model.named_parameters()), grads, strict=True))


def weights(model):
    held = {name: p.detach().clone() for name, p in model.named_parameters()}
    return {name: block.pack(held) for name, block in fl.blocks(model).items()}


def packed(model, tensors):
    return {name: block.pack(tensors) for name, block in fl.blocks(model).items()}


def natural(model, likelihood, method="kfac", **options):
    chosen = {"lr": RATE, "damping": DAMPING, "momentum": 0.0, "fisher": fl.Exact()}
    return fl.NaturalGradient(model, likelihood, method, **(chosen | options))


def assert_dense_step(model, chosen, batch, method):
    """Take one step and compare with the dense damped solves, or expect the error."""
    grads = packed(model, gradient(model, chosen, batch))
    stats, before = fl.collect(model, batch, chosen), weights(model)
    expected, positive = {}, True
    for name, layer in stats.items():
        dense = fl.approximators()[method](layer).to_dense()
        shifted = dense + DAMPING * torch.eye(len(dense), dtype=dense.dtype)
        positive &= bool(torch.linalg.eigvalsh((shifted + shifted.T) / 2)[0] > 0)
        solved = torch.linalg.solve(shifted, grads[name].flatten())
        expected[name] = before[name] - RATE * solved.view_as(before[name])
    optimiser = natural(model, chosen, method)
    if positive:
        optimiser.step(batch=batch)
    else:
        with pytest.raises(fl.NumericalError, match="positive definite"):
            optimiser.step(batch=batch)
        expected = before
    for name, found in weights(model).items():
        assert_close(found, expected[name], 1e-8)


@pytest.mark.parametrize("method", fl.approximators())
def test_a_step_is_the_dense_damped_solve_or_the_named_error(method):
    assert_dense_step(*problem(), method)


@pytest.mark.parametrize("likelihood", ["bernoulli", "gaussian"])
@pytest.mark.parametrize("method", ["exact", "kfac", "kpsvd-2", "ekfac"])
def test_a_step_is_the_dense_solve_for_every_likelihood(method, likelihood):
    assert_dense_step(*problem(likelihood), method)


@settings(max_examples=12, deadline=None)
@given(
    sizes=st.lists(st.integers(1, 4), min_size=2, max_size=4),
    examples=st.integers(1, 5),
    method=st.sampled_from(["exact", "kfac", "tkfac", "mini-block"]),
)
def test_a_step_is_the_dense_solve_for_every_shape(sizes, examples, method):
    assert_dense_step(*problem("gaussian", sizes, examples), method)


def test_an_indefinite_matrix_stops_the_step_and_changes_nothing():
    model, chosen, batch = problem()
    optimiser = natural(model, chosen, Negative(), momentum=0.9)
    optimiser.curvature.approximator.sign[0] = 1.0
    optimiser.step(batch=batch)
    before, state = weights(model), copy.deepcopy(optimiser.state_dict())
    optimiser.curvature.approximator.sign[0] = -10.0
    with pytest.raises(fl.IndefiniteError, match="damping"):
        optimiser.step(batch=batch)
    for name, found in weights(model).items():
        assert torch.equal(found, before[name])
    after = optimiser.state_dict()
    assert after["natural_gradient"]["steps"] == state["natural_gradient"]["steps"] == 1
    for index, held in after["state"].items():
        assert torch.equal(held["momentum"], state["state"][index]["momentum"])


@dataclass(frozen=True)
class Negative:
    """A diagonal matrix whose sign the test decides."""

    sign: ClassVar[list[float]] = [1.0]

    def __call__(self, statistics, previous=None):
        return Diagonal(self.sign[0] * torch.ones(statistics.weight_shape).double())


@pytest.mark.parametrize("every", [1, 2])
@pytest.mark.parametrize("method", ["kfac", "kpsvd", "tkfac"])
def test_factored_damping_shifts_both_factors(method, every):
    """An inverse for one step is solved with, one for several is formed."""
    model, chosen, batch = problem()
    damping = fl.Factored(0.09)
    optimiser = natural(
        model, chosen, method, damping=damping, average=0, inverse_every=every
    )
    for step in range(3):
        grads, before = packed(model, gradient(model, chosen, batch)), weights(model)
        if step % every == 0:
            stats = fl.collect(model, batch, chosen)
        optimiser.step(batch=batch)
        kinds = {type(unit.inverse) for unit in optimiser.units.values()}
        assert kinds == {KroneckerCholesky if every == 1 else fl.operators.KroneckerSum}
        for name, found in weights(model).items():
            ((rows, cols),) = fl.approximators()[method](stats[name]).terms
            pi = float((cols.trace() / len(cols)) / (rows.trace() / len(rows))) ** 0.5
            rows = rows + 0.3 / pi * torch.eye(len(rows)).double()
            cols = cols + 0.3 * pi * torch.eye(len(cols)).double()
            move = torch.linalg.inv(rows) @ grads[name] @ torch.linalg.inv(cols)
            assert_close(found, before[name] - RATE * move, 1e-8)


def test_a_relative_damping_is_a_share_of_the_mean_eigenvalue():
    model, chosen, batch = problem()
    other = copy.deepcopy(model)
    op = fl.KFAC()(fl.collect(model, batch, chosen)["0"])
    natural(model, chosen, damping=fl.RelativeDamping(0.5)).step(batch=batch)
    natural(other, chosen, damping=0.5 * op.trace() / op.shape[0]).step(batch=batch)
    assert_close(weights(model)["0"], weights(other)["0"], 1e-12)


def test_block_diagonal_newton_solves_linear_least_squares_in_one_step():
    model, chosen = nn.Linear(3, 2).double(), fl.Gaussian()
    batch = (cases.normal(9, 3, seed=1), cases.normal(9, 2, seed=2))
    natural(model, chosen, "exact", lr=1.0, damping=0.0).step(batch=batch)
    design = torch.cat([batch[0], torch.ones(9, 1).double()], 1)
    expected = torch.linalg.lstsq(design, batch[1]).solution.T
    assert_close(weights(model)["weight"], expected, 1e-10)


def test_kfac_on_one_datum_is_the_exact_natural_gradient():
    model, chosen, batch = problem(examples=1)
    other = copy.deepcopy(model)
    for _ in range(2):
        natural(model, chosen, "kfac").step(batch=batch)
        natural(other, chosen, "exact").step(batch=batch)
    for found, expected in zip(model.parameters(), other.parameters(), strict=True):
        assert_close(found, expected, 1e-9)


def test_repeated_data_change_nothing():
    model, chosen, (x, y) = problem()
    other = copy.deepcopy(model)
    natural(model, chosen).step(batch=(x, y))
    natural(other, chosen).step(batch=(x.repeat(3, 1), y.repeat(3)))
    for found, expected in zip(model.parameters(), other.parameters(), strict=True):
        assert_close(found, expected, 1e-11)


@pytest.mark.parametrize("layer", cases.LAYERS)
def test_every_kind_of_layer_takes_the_dense_step(layer):
    case, chosen = cases.LAYERS[layer], fl.Categorical()
    model, x, y = cases.data(case, chosen)
    grads, before = packed(model, gradient(model, chosen, (x, y))), weights(model)
    stats = fl.collect(model, (x, y), chosen)
    natural(model, chosen, "exact").step(batch=(x, y))
    for name, found in weights(model).items():
        dense = fl.ExactBlock()(stats[name]).to_dense()
        shifted = dense + DAMPING * torch.eye(len(dense), dtype=dense.dtype)
        move = torch.linalg.solve(shifted, grads[name].flatten()).view_as(found)
        assert_close(found, before[name] - RATE * move, 1e-8)


@pytest.mark.parametrize("fisher", [fl.MonteCarlo(2, seed=5), fl.Empirical(), fl.Exact()])
def test_one_graph_gives_what_two_passes_give(fisher, monkeypatch):
    model, chosen, batch = problem()
    other = copy.deepcopy(model)
    for alone in (False, True):
        if alone:
            monkeypatch.setattr(
                "fisherlab.training.passes.Passes._shareable", lambda *_: False
            )
        optimiser = natural(other if alone else model, chosen, fisher=fisher, momentum=0.5)
        for _ in range(3):
            optimiser.step(batch=batch)
    for found, expected in zip(model.parameters(), other.parameters(), strict=True):
        assert_close(found, expected, 1e-11)


@pytest.mark.parametrize(
    ("fisher", "forwards", "backwards"),
    [(fl.MonteCarlo(1), 1, 2), (fl.Empirical(), 1, 1), (fl.Exact(), 2, 1 + 2)],
)
def test_passes_are_shared_where_the_fisher_allows(
    fisher, forwards, backwards, monkeypatch
):
    model, chosen, batch = problem()
    optimiser = natural(model, chosen, fisher=fisher)
    optimiser.step(batch=batch)  # looks at the model once
    seen, pulled, grad = [], [], torch.autograd.grad
    model.register_forward_hook(lambda *_: seen.append(1))

    def counted(*args, **kwargs):
        pulled.append(1)
        return grad(*args, **kwargs)

    monkeypatch.setattr(torch.autograd, "grad", counted)
    optimiser.step(batch=batch)
    assert (len(seen), len(pulled)) == (forwards, backwards)


def test_momentum_adds_up_directions_or_gradients():
    model, chosen, batch = problem()
    stats = fl.collect(model, batch, chosen)
    inverse = {n: fl.KFAC()(s).inverse(DAMPING) for n, s in stats.items()}
    for place in ("direction", "gradient"):
        here = copy.deepcopy(model)
        optimiser = natural(here, chosen, momentum=0.6, momentum_of=place, inverse_every=9)
        expected, held = weights(here), None
        for _ in range(3):
            grads = packed(here, gradient(here, chosen, batch))
            add = grads if place == "gradient" else _times(inverse, grads)
            held = add if held is None else {n: 0.6 * held[n] + add[n] for n in add}
            move = held if place == "direction" else _times(inverse, held)
            expected = {n: w - RATE * move[n] for n, w in expected.items()}
            optimiser.step(batch=batch)
            for name, found in weights(here).items():
                assert_close(found, expected[name], 1e-9)


def _times(inverse, grads):
    return {name: inverse[name] @ grads[name] for name in grads}


def test_weight_decay_is_apart_from_the_gradient():
    model, chosen, batch = problem()
    before, other = weights(model), copy.deepcopy(model)
    natural(other, chosen).step(batch=batch)
    natural(model, chosen, weight_decay=0.1).step(batch=batch)
    for name, found in weights(model).items():
        assert_close(found, weights(other)[name] - RATE * 0.1 * before[name], 1e-11)


@pytest.mark.parametrize("form", ["step", "direction"])
def test_clipping_holds_the_estimated_divergence_at_its_bound(form):
    model, chosen, batch = problem()
    grads, before = packed(model, gradient(model, chosen, batch)), weights(model)
    other = copy.deepcopy(model)
    natural(other, chosen).step(batch=batch)
    free = {n: (before[n] - w) / RATE for n, w in weights(other).items()}
    rate = RATE if form == "step" else 1.0
    size = rate**2 * sum(float((free[n] * grads[n]).sum()) for n in free)
    for factor in (0.25, 4.0):
        here = copy.deepcopy(model)
        clip = fl.KLClip(factor * size, form)
        natural(here, chosen, clip=clip).step(batch=batch)
        expected = min(1.0, factor**0.5)
        for name, found in weights(here).items():
            assert_close((before[name] - found) / RATE, expected * free[name], 1e-6)


def test_products_of_both_signs_do_not_cancel_in_a_clip():
    pairs = [(0.1, torch.tensor(3.0).double()), (0.1, torch.tensor(-1.0).double())]
    assert_close(fl.KLClip(1.0, "direction").scale(pairs), 0.5, 1e-8)  # √(1 / (3 + 1))
    assert_close(fl.KLClip(0.005).scale(pairs), 0.5, 1e-12)  # √(.005 / .1²(3 − 1))
    assert float(fl.KLClip(0.005).scale(pairs[1:])) == 1.0


def test_groups_have_their_own_settings():
    model, chosen, batch = problem()
    before, other = weights(model), copy.deepcopy(model)
    groups = [
        {"params": model[0].parameters(), "lr": 0.5, "damping": 0.7},
        {"params": model[2].parameters(), "weight_decay": 0.25},
    ]
    natural(model, chosen, params=groups).step(batch=batch)
    natural(other, chosen, lr=0.5, damping=0.7).step(batch=batch)
    assert_close(weights(model)["0"], weights(other)["0"], 1e-11)
    third = copy.deepcopy(other)
    with torch.no_grad():
        for p, name in zip(third.parameters(), dict(third.named_parameters()), strict=True):
            block = fl.blocks(third)[name.partition(".")[0]]
            p.copy_(block.unpack(before[block.name])[name])
    natural(third, chosen, weight_decay=0.25).step(batch=batch)
    assert_close(weights(model)["2"], weights(third)["2"], 1e-11)


def test_parameters_left_out_or_frozen_stay_as_they_are():
    model, chosen, batch = problem()
    before = weights(model)
    natural(model, chosen, params=model[2].parameters()).step(batch=batch)
    assert torch.equal(weights(model)["0"], before["0"])
    assert not torch.equal(weights(model)["2"], before["2"])
    model[0].bias.requires_grad_(False)
    held = model[0].bias.clone()
    natural(model, chosen).step(batch=batch)
    assert torch.equal(model[0].bias, held)
    assert not torch.equal(model[0].weight, before["0"][:, :-1])


def test_a_group_added_later_is_trained_from_then_on():
    model, chosen, batch = problem()
    optimiser = natural(model, chosen, params=model[2].parameters())
    optimiser.step(batch=batch)
    before = weights(model)["0"]
    optimiser.add_param_group({"params": model[0].parameters(), "lr": 0.01})
    optimiser.step(batch=batch)
    assert not torch.equal(weights(model)["0"], before)
    assert [group["lr"] for group in optimiser.param_groups] == [RATE, 0.01]


def test_a_closure_gives_the_gradient_and_the_batch_the_statistics():
    model, chosen, batch = problem()
    other = copy.deepcopy(model)
    optimiser, plain = natural(model, chosen), natural(other, chosen)

    def closure():
        optimiser.zero_grad()
        loss = chosen.loss(model(batch[0]), batch[1]).mean()
        loss.backward()
        return loss

    for _ in range(2):
        first = optimiser.step(closure, batch=batch)
        assert_close(first, plain.step(batch=batch), 1e-12)
    for found, expected in zip(model.parameters(), other.parameters(), strict=True):
        assert_close(found, expected, 1e-11)


def test_the_loss_returned_is_that_before_the_step_without_a_graph():
    model, chosen, batch = problem()
    expected = chosen.loss(model(batch[0]), batch[1]).mean().item()
    loss = natural(model, chosen).step(batch=batch)
    assert loss.item() == pytest.approx(expected, rel=1e-12)
    assert not loss.requires_grad


def test_layers_without_the_form_need_a_named_fallback():
    case, chosen = cases.LAYERS["norm"], fl.Categorical()
    model, x, y = cases.data(case, chosen)
    with pytest.raises(fl.NeedsSharedForm, match="'1'") as caught:
        natural(model, chosen).step(batch=(x, y))
    assert "fallback='gradient'" in caught.value.__notes__[0]
    grads, before = packed(model, gradient(model, chosen, (x, y))), weights(model)
    plain, other = copy.deepcopy(model), copy.deepcopy(model)
    optimiser = natural(plain, chosen, fallback="gradient")
    optimiser.step(batch=(x, y))
    assert_close(weights(plain)["1"], before["1"] - RATE * grads["1"], 1e-11)
    assert "fallback 'gradient': 1 (KFAC needs the shared form)" in repr(optimiser)
    damping = fl.Factored(DAMPING)
    natural(other, chosen, fallback="diagonal", damping=damping).step(batch=(x, y))
    entries = fl.Diagonal()(fl.collect(model, (x, y), chosen)["1"]).entries
    expected = before["1"] - RATE * grads["1"] / (entries + DAMPING)
    assert_close(weights(other)["1"], expected, 1e-10)


@dataclass(frozen=True)
class OuterOfMean:
    """The squared mean gradient, as a diagonal."""

    takes: ClassVar[str] = "mean_gradient"

    def __call__(self, statistics, previous=None):
        assert isinstance(statistics, fl.MeanGradient)
        return Diagonal(statistics.gradient.square())


def test_methods_of_mean_gradients_get_them_from_the_loss_of_the_batch():
    model, chosen, batch = problem()
    grads, before = packed(model, gradient(model, chosen, batch)), weights(model)
    natural(model, chosen, OuterOfMean(), fisher=None).step(batch=batch)
    for name, found in weights(model).items():
        g = grads[name]
        assert_close(found, before[name] - RATE * g / (g.square() + DAMPING), 1e-9)


def test_mean_gradients_at_sampled_labels_are_those_of_the_fisher():
    model, chosen, batch = problem()
    fisher = fl.MonteCarlo(2, seed=4)
    optimiser = natural(model, chosen, OuterOfMean(), fisher=fisher)
    optimiser.step(batch=batch)
    model, chosen, batch = problem()
    stats = fl.collect(model, batch, chosen, fisher)
    for name, layer in stats.items():
        mean = layer.example_gradients().sum((0, 1)) / N / 2**0.5
        assert_close(optimiser.units[name].operator.entries, mean.square(), 1e-11)


def test_exact_columns_have_no_mean_gradient():
    model, chosen, batch = problem()
    with pytest.raises(ValueError, match="Exact"):
        natural(model, chosen, OuterOfMean(), fisher=fl.Exact()).step(batch=batch)


MISTAKES = {
    "lr=-1": {"lr": -1.0},
    "momentum=1": {"momentum": 1.0},
    "damping=-1": {"damping": -1.0},
    "statistics_every=0": {"statistics_every": 0},
    "statistics_fraction": {"statistics_fraction": 0.0},
    "momentum_of": {"momentum_of": "weights"},
    "unknown": {"approximator": "kfca"},
    "share of the old": {"average": 1.5},
    "not the model's": {"params": [nn.Parameter(torch.zeros(1).double())]},
}


@pytest.mark.parametrize("message", MISTAKES)
def test_settings_out_of_range_are_refused_at_once(message):
    model, chosen, _ = problem()
    options = {"approximator": "kfac", "lr": 1.0, "damping": 1.0} | MISTAKES[message]
    with pytest.raises((ValueError, TypeError), match=message):
        fl.NaturalGradient(model, chosen, **options)


def test_half_precision_and_autocast_are_refused():
    model, chosen, batch = problem()
    with pytest.raises(ValueError, match="bfloat16"):
        natural(copy.deepcopy(model).bfloat16(), chosen)
    with pytest.raises(ValueError, match="autocast"), torch.autocast("cpu"):
        natural(model, chosen).step(batch=batch)


def test_a_block_is_not_optimised_by_half():
    model, chosen, batch = problem()
    optimiser = natural(model, chosen, params=[model[0].weight])
    with pytest.raises(ValueError, match=r"'0' \(0\.weight, 0\.bias\)"):
        optimiser.step(batch=batch)


def test_a_step_says_what_it_is_missing():
    model, chosen, (x, y) = problem()
    optimiser = natural(model, chosen)
    with pytest.raises(ValueError, match="closure is expected"):
        optimiser.step()
    with pytest.raises(ValueError, match="labels"):
        optimiser.step(batch=(x, None))
    with pytest.raises(ValueError, match="statistics are due"):
        optimiser.step(lambda: torch.zeros(()))
    with pytest.raises(ValueError, match="one batch"):
        optimiser.step(batch=iter([(x, y), (x, y)]))


def test_infinite_gradients_name_the_block_and_change_nothing():
    model, chosen, batch = problem()
    optimiser = natural(model, chosen, statistics_every=5, inverse_every=5)
    optimiser.step(batch=batch)
    before = weights(model)

    def closure():
        for p in model.parameters():
            p.grad = torch.full_like(p, float("inf"))
        return torch.zeros(())

    with pytest.raises(fl.NumericalError, match=r"step 1: .* block '0'"):
        optimiser.step(closure)
    assert all(torch.equal(w, before[name]) for name, w in weights(model).items())


def test_a_compiled_model_is_optimised_as_the_plain_one():
    """Statistics watch the plain module; steps without them run the compiled one."""
    calls = []

    def backend(graph, inputs):
        calls.append(len(inputs))
        return graph.forward

    runs = []
    for compiled in (False, True):
        problem = fl.problems.load("digits")
        model = problem.model
        given = torch.compile(model, backend=backend) if compiled else model
        optimiser = fl.NaturalGradient(
            given,
            problem.likelihood,
            "kfac",
            lr=0.1,
            damping=fl.Factored(0.1),
            statistics_every=2,
        )
        x, y = problem.train
        runs.append([float(optimiser.step(batch=(x[:64], y[:64]))) for _ in range(4)])
        assert list(fl.blocks(given)) == list(fl.blocks(model))
        assert str(fl.coverage(given)) == str(fl.coverage(model))
    assert calls
    assert runs[1] == pytest.approx(runs[0], rel=1e-12)


def test_the_full_kfac_takes_a_compiled_model():
    losses = []
    for compiled in (False, True):
        problem = fl.problems.load("digits")
        model = problem.model
        given = torch.compile(model, backend="eager") if compiled else model
        optimiser = fl.AdaptiveKFAC(given, problem.likelihood, "kfac")
        x, y = problem.train
        losses.append([float(optimiser.step(batch=(x[:64], y[:64]))) for _ in range(2)])
    assert losses[1] == pytest.approx(losses[0], rel=1e-12)


def test_statistics_of_a_compiled_model_are_those_of_the_plain_one():
    problem = fl.problems.load("digits")
    given = torch.compile(problem.model, backend="eager")
    for layer, expected in zip(
        fl.collect(given, problem.test, problem.likelihood).values(),
        fl.collect(problem.model, problem.test, problem.likelihood).values(),
        strict=True,
    ):
        assert torch.equal(layer.gradients, expected.gradients)
        assert layer.provenance.layer == expected.provenance.layer


class Wide(nn.Module):
    """Layers that are wider than a batch: plain, over positions, bare and turned."""

    def __init__(self):
        super().__init__()
        self.first, self.over = nn.Linear(40, 30), nn.Linear(10, 25, bias=False)
        self.turned = nn.Parameter(0.2 * torch.randn(25, 20))
        self.last, self.twice = nn.Linear(60, 3), False

    def forward(self, x):
        hidden = torch.tanh(self.first(x))
        hidden = (
            torch.tanh(self.first(torch.cat([hidden, x[:, :10]], 1)))
            if self.twice
            else hidden
        )
        over = torch.tanh(self.over(hidden.unflatten(1, (3, 10))))
        return self.last(torch.tanh(over @ self.turned).flatten(1))


def steps_of_a_wide_network(monkeypatch, watching, change=None, called=None, **settings):
    """Return the weights after eight steps, and how many passes left gradients as rows."""
    seen = []

    def counted(one):
        def call(*given):
            passed = one(*given)
            seen.append(sorted(passed.rows))
            return passed

        return call

    monkeypatch.setattr(passes, "WATCHING", watching)
    monkeypatch.setattr(passes, "in_rows", counted(one_graph.in_rows))
    monkeypatch.setattr(passes, "together", counted(one_graph.together))
    torch.manual_seed(3)
    model, x, y = Wide().double(), torch.randn(4, 40).double(), torch.tensor([0, 1, 2, 1])
    chosen = {"lr": 0.02, "damping": fl.Factored(0.1), "statistics_every": 4} | settings
    optimiser = fl.NaturalGradient(
        called(model) if called else model,
        fl.Categorical(),
        chosen.pop("method", "kfac"),
        inverse_every=4,
        **chosen,
    )
    for number in range(8):
        if change is not None:
            change(model, number)
        optimiser.step(batch=(x, y))
    return torch.nn.utils.parameters_to_vector(model.parameters()).detach(), seen


@pytest.mark.parametrize(
    "settings",
    [
        {},
        {"momentum": 0.0, "fisher": fl.Empirical()},
        {"weight_decay": 0.1, "fisher": fl.Exact()},
        {"method": "kpsvd"},
        {"method": "foof"},
    ],
    ids=str,
)
def test_rows_in_place_of_a_gradient_give_the_same_steps(monkeypatch, settings):
    plain, none = steps_of_a_wide_network(monkeypatch, float("inf"), **settings)
    found, seen = steps_of_a_wide_network(monkeypatch, 0, **settings)
    assert not any(none)
    rows = ["first", "over"]
    shared = "fisher" not in settings or settings["fisher"] == fl.Empirical()
    first = 1 + shared  # the plan's own pass, and that of the first step
    assert seen == [*[[]] * first, *[rows] * 7]
    assert_close(found, plain, 1e-12)


@pytest.mark.parametrize(
    "settings",
    [
        {"clip": fl.training.KLClip(1e-3)},
        {"momentum_of": "gradient"},
        {"damping": 1e-2},
        {"method": "kpsvd-2"},
    ],
    ids=str,
)
def test_a_gradient_that_is_asked_for_or_turned_is_formed(monkeypatch, settings):
    plain, _ = steps_of_a_wide_network(monkeypatch, float("inf"), **settings)
    found, seen = steps_of_a_wide_network(monkeypatch, 0, **settings)
    assert not any(seen)
    assert torch.equal(found, plain)


def test_weights_that_are_used_in_another_way_have_their_gradient_formed(monkeypatch):
    def change(model, number):
        model.twice = number in (2, 5)

    plain, _ = steps_of_a_wide_network(monkeypatch, float("inf"), change)
    found, seen = steps_of_a_wide_network(monkeypatch, 0, change)
    assert [len(names) for names in seen[2:]] == [2, 0, 2, 2, 0, 2, 2]
    assert_close(found, plain, 1e-12)


def test_a_compiled_model_is_called_as_it_is_between_renewals(monkeypatch):
    calls = []

    def compiled(model):
        model = torch.compile(model, backend="eager")
        model.register_forward_hook(lambda *_: calls.append(1))
        return model

    plain, _ = steps_of_a_wide_network(monkeypatch, float("inf"))
    found, seen = steps_of_a_wide_network(monkeypatch, 0, called=compiled)
    assert len(calls) == 6  # of eight steps two are renewals
    assert not any(seen[2:])
    assert_close(found, plain, 1e-12)


def test_a_hook_of_a_weight_sees_its_gradient(monkeypatch):
    def change(model, number):
        if number == 2:
            model.first.weight.register_hook(lambda gradient: 0 * gradient)

    plain, _ = steps_of_a_wide_network(monkeypatch, float("inf"), change)
    found, seen = steps_of_a_wide_network(monkeypatch, 0, change)
    assert seen[2:] == [["first", "over"], *[["over"]] * 6]
    assert_close(found, plain, 1e-12)


def test_a_hook_of_a_filled_grad_is_called_or_the_step_refused():
    def forget(parameter):
        parameter.grad.zero_()

    model, likelihood, (x, y) = problem()
    before = weights(model)
    optimiser = natural(model, likelihood)
    for parameter in model[0].parameters():
        parameter.register_post_accumulate_grad_hook(forget)
    with pytest.raises(ValueError, match=r"step: 0.weight, 0.bias have hooks"):
        optimiser.step(batch=(x, y))
    assert optimiser.steps == 0

    def closure():
        optimiser.zero_grad()
        loss = nn.functional.cross_entropy(model(x), y)
        loss.backward()
        return loss

    optimiser.step(closure, batch=(x, y))
    after = weights(model)
    assert torch.equal(after["0"], before["0"])
    assert not torch.equal(after["2"], before["2"])


def test_rows_that_are_not_finite_move_nothing(monkeypatch):
    monkeypatch.setattr(passes, "WATCHING", 0)
    torch.manual_seed(3)
    model, x, y = Wide().double(), torch.randn(4, 40).double(), torch.tensor([0, 1, 2, 1])
    settings = 0.1, fl.Factored(1e-2)
    optimiser = fl.NaturalGradient(
        model, fl.Categorical(), "kfac", *settings, statistics_every=9, inverse_every=9
    )
    optimiser.step(batch=(x, y))
    before = torch.nn.utils.parameters_to_vector(model.parameters()).detach().clone()
    model.over.register_full_backward_hook(lambda _, given, __: (given[0] * float("nan"),))
    with pytest.raises(fl.NumericalError, match="block 'first'"):
        optimiser.step(batch=(x, y))
    assert torch.equal(torch.nn.utils.parameters_to_vector(model.parameters()), before)


@pytest.mark.parametrize("damping", [fl.Factored(0.1), 0.1], ids=str)
def test_rows_suit_an_inverse_of_any_form(damping):
    """A renewal may find another one after the pass that left a gradient as rows."""
    model, likelihood, batch = problem()
    stats = fl.collect(model, batch, likelihood)
    inverse = fl.KFAC()(stats["0"]).inverse(damping)
    outputs, inputs = cases.normal(N, 3, seed=4), cases.normal(N, 5, seed=5)
    found = Curvature(fl.KFAC()).directions(
        {"0": Unit(None, inverse=inverse)}, {}, {"0": (outputs, inputs)}
    )
    assert_close(found["0"], inverse @ (outputs.T @ inputs), 1e-12)


def step_with_a_fallback(fallback, likelihood="categorical"):
    model, chosen, batch = problem(likelihood)
    optimiser = natural(model, chosen, fallback=fallback)
    before = weights(model)
    optimiser.step(batch=batch)
    after = weights(model)
    moves = {name: (before[name] - after[name]) / RATE for name in before}
    return moves, optimiser, packed(model, gradient(problem()[0], chosen, batch))


@pytest.mark.parametrize("limit", ["LONG", "memory"])
def test_a_fallback_takes_what_is_too_large_to_train_with(monkeypatch, limit):
    if limit == "LONG":
        monkeypatch.setattr(curvature, "LONG", 100)  # 5³ + 3³ and 4³ + 3³
    else:
        monkeypatch.setattr(curvature.devices, "total_bytes", lambda _: 2 * 33 * 40)
    moves, optimiser, gradients = step_with_a_fallback("gradient")
    assert list(optimiser.exceptions) == ["0"]
    said = (
        "a factor of 5 rows takes minutes" if limit == "LONG" else "half of the memory is"
    )
    assert said in optimiser.exceptions["0"]
    assert_close(moves["0"], gradients["0"], 1e-12)
    monkeypatch.undo()
    usual, _, _ = step_with_a_fallback(None)
    assert_close(moves["2"], usual["2"], 1e-12)


def test_what_inverts_no_factor_takes_no_minutes(monkeypatch):
    monkeypatch.setattr(curvature, "LONG", 100)
    for method in ("diagonal", "mini-block", "low-rank", "cg-fac"):
        model, likelihood, batch = problem()
        optimiser = natural(model, likelihood, method=method, fallback="gradient")
        optimiser.step(batch=batch)
        assert not optimiser.exceptions, method


@pytest.mark.parametrize("method", ["kfac", "kpsvd", "kpsvd-2"])
def test_a_table_is_too_large_where_its_whole_factor_is_formed(monkeypatch, method):
    """KFAC keeps the rows of a table apart, KPSVD has a factor of all of them."""
    monkeypatch.setattr(curvature.devices, "total_bytes", lambda _: 2 * 40 * 1000)
    torch.manual_seed(0)
    model = nn.Sequential(nn.Embedding(60, 3), nn.Flatten(), nn.Linear(6, 2)).double()
    batch = torch.randint(60, (4, 2)), torch.tensor([0, 1, 1, 0])
    optimiser = natural(model, fl.Categorical(), method=method, fallback="gradient")
    optimiser.step(batch=batch)
    assert list(optimiser.exceptions) == ([] if method == "kfac" else ["0"])


def test_an_optimiser_of_nothing_is_refused_in_a_sentence():
    frozen = nn.Linear(3, 2).requires_grad_(False)
    for kind in (fl.AdaptiveKFAC, partial(fl.NaturalGradient, approximator="kfac", lr=1)):
        with pytest.raises(ValueError, match="no trainable parameter; at least one"):
            kind(frozen, fl.Gaussian(), damping=1.0)
    for params in ([], iter(()), [{"params": []}]):
        with pytest.raises(ValueError, match=r"params=\[\]; at least one"):
            natural(nn.Linear(3, 2), fl.Gaussian(), params=params)


MOMENTS = {"shampoo-mean": 1, "tnt-mean": 1, "kl-shampoo-mean": 1, "soap-mean": 2}


@pytest.mark.parametrize("method", [*MOMENTS, "adam", "muon-mean"])
def test_moments_of_mean_gradients_are_counted_before_they_are_formed(monkeypatch, method):
    """60² and 3² numbers for a table, which the gradient's own 180 do not foretell."""
    model = nn.Sequential(nn.Embedding(60, 3), nn.Flatten(), nn.Linear(6, 2)).double()
    batch = torch.randint(60, (4, 2)), torch.tensor([0, 1, 1, 0])
    settings = {"method": fl.preconditioners()[method], "fallback": "gradient"}
    held = MOMENTS.get(method, 0) * (60**2 + 3**2)

    def left():
        optimiser = natural(model, fl.Categorical(), fisher=fl.Empirical(), **settings)
        optimiser.step(batch=batch)
        return list(optimiser.exceptions)

    for room, expected in ((held, []), (max(held - 1, 0), ["0"] if held else [])):
        size = 2 * 40 * room
        monkeypatch.setattr(curvature.devices, "total_bytes", lambda _, size=size: size)
        assert left() == expected
    monkeypatch.undo()
    monkeypatch.setattr(curvature, "LONG", 1000)
    assert left() == (["0"] if held else [])


def test_a_fallback_takes_the_same_statistics():
    make = partial(natural, nn.Linear(3, 2), fl.Gaussian(), "shampoo-mean")
    for fallback in ("diagonal", fl.KFAC()):
        with pytest.raises(ValueError, match=r"fallback=.* mean gradients.* 'adam'"):
            make(fallback=fallback)
    assert make(fallback="adam").curvature.fallback == fl.AdamPreconditioner()


def test_a_block_that_was_made_before_is_not_refused_later(monkeypatch):
    model, likelihood, batch = problem()
    optimiser = natural(model, likelihood)
    optimiser.step(batch=batch)
    before = weights(model)
    monkeypatch.setattr(curvature.devices, "total_bytes", lambda _: 2)
    optimiser.step(batch=batch)
    assert not optimiser.exceptions
    assert not any(torch.equal(old, weights(model)[name]) for name, old in before.items())


def test_a_block_that_is_too_large_is_refused_or_told_of(monkeypatch):
    usual, _, _ = step_with_a_fallback(None)
    monkeypatch.setattr(curvature, "LONG", 100)
    said = r"block '0': a factor of 5 rows .* fallback="
    with pytest.warns(UserWarning, match=said) as told:
        moves, _, _ = step_with_a_fallback(None)
    assert not Path(told[0].filename).is_relative_to(Path(fl.__file__).parent)
    assert_close(moves["0"], usual["0"], 1e-12)
    monkeypatch.setattr(curvature.devices, "total_bytes", lambda _: 2 * 33 * 40)
    with pytest.raises(fl.BudgetError, match=r"block '0': its matrices take .* fallback="):
        step_with_a_fallback(None)


def test_memory_of_one_machine_leaves_no_block_out_where_several_train(monkeypatch):
    """Ranks on unlike machines would disagree on what is left to the fallback."""
    monkeypatch.setattr(curvature.devices, "total_bytes", lambda _: 2)
    monkeypatch.setattr(curvature, "live", object)
    _, optimiser, _ = step_with_a_fallback("gradient")
    assert not optimiser.exceptions


SUMMED = 4  # parts of a batch whose gradients are added up


def accumulated(model, likelihood, batch, scaler):
    """Leave the gradient of a batch in .grad, part by part, in units of a scaler."""
    model.zero_grad()
    for x, y in zip(*(side.tensor_split(SUMMED) for side in batch), strict=True):
        loss = likelihood.loss(model(x), y).sum() / len(batch[0])
        scaler.scale(loss).backward()
    return likelihood.loss(model(batch[0]), batch[1]).mean().detach()


@pytest.mark.parametrize("bound", [float("inf"), 1e-2])
def test_scaled_and_accumulated_and_clipped_gradients_make_the_step_they_stand_for(bound):
    """Torch's own: GradScaler, parts of a batch, and a clip before the step."""
    model, likelihood, batch = problem()
    before, grads = weights(model), packed(model, gradient(model, likelihood, batch))
    stats = fl.collect(model, batch, likelihood)
    norm = float(sum(g.square().sum() for g in grads.values())) ** 0.5
    optimiser = fl.NaturalGradient(model, likelihood, "kfac", 0.1, 0.1, fisher=fl.Exact())
    scaler = torch.amp.GradScaler("cpu")
    loss = accumulated(model, likelihood, batch, scaler)
    scaler.unscale_(optimiser)
    nn.utils.clip_grad_norm_(model.parameters(), bound)
    scaler.step(optimiser, lambda: loss, batch=batch)
    for name, found in weights(model).items():
        clipped = grads[name] * min(1.0, bound / (norm + 1e-6))
        direction = torch.linalg.solve(
            fl.KFAC()(stats[name]).to_dense() + 0.1 * torch.eye(found.numel()).double(),
            clipped.flatten(),
        )
        assert_close(found, before[name] - 0.1 * direction.view_as(found), 1e-9)


def test_a_scaler_takes_no_step_where_a_gradient_is_infinite():
    model, likelihood, batch = problem()
    optimiser = fl.NaturalGradient(model, likelihood, "kfac", 0.1, 0.1)
    before, scaler = weights(model), torch.amp.GradScaler("cpu")
    loss = accumulated(model, likelihood, batch, scaler)
    next(model.parameters()).grad[0] = torch.inf
    scaler.step(optimiser, lambda: loss, batch=batch)
    assert optimiser.steps == 0
    assert all(torch.equal(w, before[name]) for name, w in weights(model).items())
    with pytest.raises(ValueError, match=r"a batch \(x, y\) or a closure is expected"):
        optimiser.step()
