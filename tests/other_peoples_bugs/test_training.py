"""What users of torch's optimisers do to ours, one test a symptom."""

from __future__ import annotations

import copy
import io
import itertools
import math
import pickle
import random
from functools import partial
from pathlib import Path

import pytest
import torch
from torch import nn

import fisherlab as fl
from tests.oracles import assert_close
from tests.test_full_kfac import quadratic
from tests.test_training_optimizers import RECIPES, made, tiny

OWN = [n for n, recipe in RECIPES.items() if "sgd" not in n and n != "adam"]


FAST = ("adam", "kfac", "kfac-tridiagonal", "kfac-full", "cg-fac", "shampoo", "k-bfgs-l")
ALL = [pytest.param(n, marks=() if n in FAST else pytest.mark.slow) for n in RECIPES]
ALL_OWN = [each for each in ALL if each.values[0] in OWN]


def points(examples=24, width=6, dtype=torch.float64):
    generator = torch.Generator().manual_seed(3)
    x = torch.randn(examples, width, generator=generator, dtype=dtype)
    return x, torch.randint(0, 3, (examples,), generator=generator)


def net(*widths, seed=0):
    torch.manual_seed(seed)
    parts = []
    for a, b in itertools.pairwise(widths):
        parts += [nn.Linear(a, b, dtype=torch.float64), nn.Tanh()]
    return nn.Sequential(*parts[:-1])


def natural(model, method="kfac", **settings):
    settings = {"lr": 0.1, "damping": 0.1, "fisher": fl.Exact()} | settings
    return fl.NaturalGradient(model, fl.Categorical(), method, **settings)


def step(problem, optimiser):
    fl.training.take_step(problem, optimiser, problem.train, 0)


def held(model):
    return torch.cat([p.detach().flatten() for p in model.parameters()])


@pytest.mark.parametrize("name", ALL)
def test_every_optimiser_is_copied_pickled_saved_and_scheduled_like_adamw(name):
    problem = tiny()
    optimiser = made(name, problem)
    scheduler = torch.optim.lr_scheduler.StepLR(optimiser, 1, 0.5)
    step(problem, optimiser)
    scheduler.step()
    saved = io.BytesIO()
    torch.save((problem.model.state_dict(), optimiser.state_dict()), saved)
    before = held(problem.model)
    copied = copy.deepcopy((problem, optimiser, scheduler))
    pickled = pickle.loads(pickle.dumps((problem.model, optimiser)))
    step(copied[0], copied[1])
    assert torch.equal(held(problem.model), before)
    step(problem, optimiser)
    expected = held(problem.model)
    assert not torch.equal(expected, before)
    assert torch.equal(held(copied[0].model), expected)
    again = tiny()
    again.model.load_state_dict(pickled[0].state_dict())
    pickled_problem = type(again)(
        "tiny", pickled[0], again.likelihood, again.train, again.test
    )
    step(pickled_problem, pickled[1])
    assert torch.equal(held(pickled[0]), expected)
    saved.seek(0)
    weights, state = torch.load(saved, weights_only=True)
    again.model.load_state_dict(weights)
    resumed = made(name, again)
    resumed.load_state_dict(state)
    step(again, resumed)
    assert torch.equal(held(again.model), expected)


@pytest.mark.parametrize("name", ALL_OWN)
def test_a_state_of_another_precision_is_cast_to_the_parameters(name):
    problem = tiny()
    optimiser = made(name, problem)
    step(problem, optimiser)
    x, y = problem.train
    small = copy.deepcopy(problem.model).float()
    pair = (x.float(), y)
    other = type(problem)("tiny", small, problem.likelihood, pair, pair)
    resumed = made(name, other)
    resumed.load_state_dict(optimiser.state_dict())
    for unit in resumed.units.values():
        assert unit.operator.dtype == torch.float32
    step(other, resumed)
    step(problem, optimiser)
    assert_close(held(small).double(), held(problem.model), 1e-3)


@pytest.mark.parametrize("method", ["kfac", "kfac-tridiagonal", "ekfac", "diagonal"])
def test_a_model_may_change_its_precision_between_steps(method):
    model, (x, y) = net(6, 5, 3), points()
    optimiser = natural(model, method)
    optimiser.step(batch=(x, y))
    model.float()
    optimiser.step(batch=(x.float(), y))
    assert held(model).isfinite().all()


@pytest.mark.parametrize("method", ["kfac", "kfac-tridiagonal"])
def test_a_layer_frozen_in_mid_training_is_saved_and_resumed(method):
    model, batch = net(6, 5, 3), points()
    optimiser = natural(model, method, params=model.parameters())
    optimiser.step(batch=batch)
    model[0].requires_grad_(False)
    optimiser.step(batch=batch)
    twin = copy.deepcopy(model)
    resumed = natural(twin, method, params=twin.parameters())
    resumed.load_state_dict(copy.deepcopy(optimiser.state_dict()))
    for each, one in ((model, optimiser), (twin, resumed)):
        one.step(batch=batch)
        each[0].requires_grad_(True)
        one.step(batch=batch)
    assert torch.equal(held(model), held(twin))


@pytest.mark.parametrize("name", ["kfac-full", "kfac-full-tridiagonal", "kfac"])
def test_the_state_of_another_model_is_refused(name):
    first, other = tiny(), tiny()
    optimiser = made(name, first)
    step(first, optimiser)
    other.model[0] = nn.Linear(4, 6, dtype=torch.float64)
    other.model[2] = nn.Linear(6, 3, dtype=torch.float64)
    resumed = made(name, other)
    with pytest.raises(ValueError, match="of other parameters"):
        resumed.load_state_dict(optimiser.state_dict())
    assert not resumed.steps


def test_a_state_without_data_is_refused_when_it_is_loaded():
    model = net(6, 5, 3)
    optimiser = natural(model, "diagonal")
    optimiser.step(batch=points())
    state = copy.deepcopy(optimiser.state_dict())
    for unit in state["natural_gradient"]["units"].values():
        fields = unit["fields"]["operator"]["fields"]
        fields |= {k: v.to("meta") for k, v in fields.items() if torch.is_tensor(v)}
    with pytest.raises(ValueError, match="hold no data"):
        natural(net(6, 5, 3), "diagonal").load_state_dict(state)


@pytest.mark.parametrize("change", ["swapped", "replaced", "unfrozen"])
@pytest.mark.parametrize("method", ["kfac", "kfac-tridiagonal"])
def test_what_changed_in_a_model_is_noticed(change, method):
    model, batch = net(6, 6, 6, 3), points()
    if change == "unfrozen":
        model[0].requires_grad_(False)
    settings = {"average": 0.0, "momentum": 0.0, "statistics_every": 10}
    params = list(model[2:].parameters() if change == "unfrozen" else model.parameters())
    optimiser = natural(model, method, params=params, **settings)
    optimiser.step(batch=batch)
    if change == "swapped":
        model[0], model[2] = model[2], model[0]
    elif change == "replaced":
        model[2] = net(6, 6, seed=5)[0]
        optimiser.param_groups[0]["params"] = list(model.parameters())
    else:
        model[0].requires_grad_(True)
        optimiser.add_param_group({"params": list(model[0].parameters())})
    twin = copy.deepcopy(model)
    optimiser.inverse_every = 1
    natural(twin, method, **settings).step(batch=batch)
    optimiser.step(batch=batch)
    assert_close(held(model), held(twin), 1e-10)


def test_a_layer_that_moved_takes_its_average_along():
    model, batch = net(6, 6, 6, 3), points()
    optimiser = natural(model, statistics_every=10)
    optimiser.step(batch=batch)
    first, third = optimiser.units["0"].operator, optimiser.units["2"].operator
    model[0], model[2] = model[2], model[0]
    optimiser.statistics_every = 1
    optimiser.step(batch=batch)
    alone = fl.KFAC()(fl.collect(model, batch, fl.Categorical())["0"])
    assert optimiser.units["0"].updates == 2
    assert float(optimiser.units["0"].operator.inner(third)) > 0
    assert alone.weight_shape == first.weight_shape


def test_parameters_that_are_the_models_no_more_are_refused():
    model, batch = net(6, 5, 3), points()
    optimiser = natural(model)
    optimiser.step(batch=batch)
    model[2] = net(5, 3)[0]
    with pytest.raises(ValueError, match="the model's no more"):
        optimiser.step(batch=batch)


class Deep(nn.Module):
    """A residual layer that is left out now and then, by torch's or Python's generator."""

    def __init__(self, of_torch):
        super().__init__()
        self.a, self.b, self.c = (net(*w)[0] for w in ((6, 5), (5, 5), (5, 3)))
        self.of_torch, self.source = of_torch, random.Random(0)

    def forward(self, x):
        h = torch.tanh(self.a(x))
        if not (self.training and self.drawn() < 0.3):
            h = h + torch.tanh(self.b(h))
        return self.c(h)

    def drawn(self):
        return float(torch.rand(())) if self.of_torch else self.source.random()


@pytest.mark.draws("the model, which leaves out a layer now and then")
@pytest.mark.parametrize("of_torch", [True, False])
def test_layers_left_out_at_random_do_not_end_a_training(of_torch):
    model, batch = Deep(of_torch).train(), points()
    optimiser = natural(model, fisher=fl.MonteCarlo(1))
    losses = [float(optimiser.step(batch=batch)) for _ in range(12)]
    assert losses[-1] < losses[0]


def test_few_lengths_of_sequences_are_remembered():
    model = nn.Sequential(nn.Embedding(7, 4), nn.Linear(4, 20))
    optimiser = natural(model, "diagonal")
    for length in range(2, 12):
        x = torch.zeros(2, length, dtype=torch.long)
        optimiser.step(batch=(x, x))
    assert len(optimiser._passes._plans) <= 8


@pytest.mark.parametrize("method", ["kfac", "mini-block-mean", "shampoo-mean", "tnt-mean"])
def test_labels_of_another_shape_are_refused_by_every_method(method):
    x, _ = points()
    y = x.sum(1)
    model = net(6, 1)
    optimiser = fl.NaturalGradient(model, fl.Gaussian(), method, lr=0.1, damping=0.1)
    with pytest.raises(ValueError, match="labels of shape"):
        optimiser.step(batch=(x, y))
    optimiser.step(batch=(x, y[:, None]))
    with pytest.raises(ValueError, match="labels of shape"):
        optimiser.step(batch=(x, y))
    problem = fl.problems.Problem("own", model, fl.Gaussian(), (x, y), (x, y))
    adam = torch.optim.Adam(model.parameters())
    with pytest.raises(ValueError, match="labels of shape"):
        fl.training.take_step(problem, adam, (x, y), 1)


def normed():
    torch.manual_seed(0)
    parts = [nn.Linear(6, 5), nn.BatchNorm1d(5), nn.Linear(5, 3)]
    return nn.Sequential(*parts).double().train()


def test_fresh_running_averages_are_told_of_once_with_a_remedy():
    model, (x, y) = normed(), points()
    optimiser = natural(model, fallback="gradient")
    with pytest.warns(UserWarning, match="running averages of 1") as told:
        optimiser.step(batch=(x, y))
    assert not Path(told[0].filename).is_relative_to(Path(fl.__file__).parent)
    optimiser.step(batch=(x, y))  # a second warning would be an error
    ready = normed()
    with torch.no_grad():
        ready(x)
    natural(ready, fallback="gradient").step(batch=(x, y))


@pytest.mark.parametrize("of_closure", [False, True])
def test_a_loss_that_is_not_finite_stops_by_name_and_poisons_nothing(of_closure):
    model, (x, y) = normed(), points()
    model(x)
    optimiser = natural(model, fallback="gradient")
    optimiser.step(batch=(x, y))
    before = copy.deepcopy(model.state_dict())
    bad = x.clone()
    bad[0, 0] = torch.nan

    def closure():
        optimiser.zero_grad()
        loss = fl.Categorical().loss(model(bad), y).mean()
        loss.backward()
        return loss

    with pytest.raises(fl.NumericalError, match="loss of the batch is nan"):
        optimiser.step(closure if of_closure else None, batch=(bad, y))
    after = model.state_dict()
    assert all(torch.equal(after[name], tensor) for name, tensor in before.items())
    assert optimiser.step(batch=(x, y)).isfinite()


def test_statistics_that_nobody_uses_are_not_collected(monkeypatch):
    class Tied(nn.Module):
        def __init__(self):
            super().__init__()
            self.inner, self.outer = nn.Linear(6, 6).double(), nn.Linear(6, 3).double()
            self.scale = nn.Parameter(torch.ones(6, dtype=torch.float64))

        def forward(self, x):
            return self.outer(torch.tanh(self.inner(x)) * self.scale)

    asked = []
    collect = fl.training.passes.collect

    def watched(model, data, *args, **kwargs):
        asked.append((len(data[0]), tuple(kwargs["layers"])))
        return collect(model, data, *args, **kwargs)

    monkeypatch.setattr(fl.training.passes, "collect", watched)
    torch.manual_seed(0)
    optimiser = natural(Tied(), fallback="gradient")
    for _ in range(2):
        optimiser.step(batch=points())
    assert "scale" in optimiser.exceptions
    assert all("scale" not in names for count, names in asked if count > 2)


def test_a_factorisation_that_fails_names_method_and_block():
    def hopeless(statistics):
        return torch.linalg.cholesky(-torch.eye(2))

    model = net(6, 5, 3)
    before = held(model)
    with pytest.raises(fl.NumericalError, match=r"hopeless.*block '0'.*learning rate"):
        natural(model, hopeless).step(batch=points())
    assert torch.equal(held(model), before)


def test_a_function_from_statistics_to_an_operator_trains():
    ends = []

    def own(statistics):
        return fl.KFAC()(statistics)

    for method in (fl.KFAC(), own):
        model = net(6, 5, 3)
        optimiser = natural(model, method)
        for _ in range(2):
            optimiser.step(batch=points())
        ends.append(held(model))
    assert torch.equal(*ends)
    chosen = fl.MethodByBlock(own)
    stats = fl.collect(net(6, 3), points(), fl.Categorical())
    assert chosen(stats["0"]).trace() > 0


def test_small_things_are_served_or_refused_in_a_sentence():
    batch, model = points(), net(6, 5, 3)
    clipped = natural(model, clip=fl.KLClip(1e-3))
    before = held(model)
    clipped.step(lambda: torch.tensor(1.0), batch=batch)  # no gradient: no step, as AdamW
    assert torch.equal(held(model), before)
    with pytest.raises(ValueError, match="closure returned None"):
        natural(model).step(lambda: None, batch=batch)
    with pytest.raises(ValueError, match="sparse=False"):
        natural(nn.Sequential(nn.Embedding(5, 3, sparse=True)))
    full = fl.AdaptiveKFAC(model, fl.Categorical(), damping=torch.tensor(1e-2))
    assert full.lam == pytest.approx(1e-2)
    with pytest.raises(ValueError, match=r"Tikhonov\(λ\)"):
        fl.AdaptiveKFAC(model, fl.Categorical(), damping=fl.Factored(1e-2))
    with pytest.raises(ValueError, match="autocast"), torch.autocast("cpu"):
        full.step(batch=batch)
    plateau = torch.optim.lr_scheduler.ReduceLROnPlateau
    with pytest.raises(TypeError, match="ReduceLROnPlateau"):
        fl.follow(tiny(), "adam", steps=2, scheduler=plateau)


def test_the_full_optimiser_promises_what_a_scheduled_step_gives():
    x, _ = points()
    y = x[:, :3] ** 2
    model = net(6, 3)
    start, rate = held(model), 0.3
    optimiser = fl.AdaptiveKFAC(
        model,
        fl.Gaussian(),
        "exact",
        damping=fl.LevenbergMarquardt(1e-9, every=1),
        statistics_fraction=1.0,
        curvature_fraction=1.0,
        fisher=fl.Exact(),
        l2=0.0,
        lr=rate,
    )
    optimiser.step(batch=(x, y))
    assert optimiser.ratio == pytest.approx(1, abs=1e-4)  # a quadratic loss
    assert not torch.equal(held(model), start)


class Odd(nn.Module):
    """A scalar without dimensions, and a layer that nothing reaches."""

    def __init__(self):
        super().__init__()
        self.body, self.dead = nn.Linear(6, 3), nn.Linear(3, 2)
        self.scale = nn.Parameter(torch.tensor(1.5))

    def forward(self, x):
        return self.scale * self.body(x)


@pytest.mark.parametrize("name", ["exact", "diagonal", "kl-shampoo", "muon", "kfac-full"])
def test_a_scalar_and_a_dead_layer_do_not_end_a_training(name):
    model = Odd().double()
    if name in ("exact", "diagonal"):
        optimiser = natural(model, name, damping=fl.RelativeDamping(0.1))
    else:
        data = points()
        problem = fl.problems.Problem("odd", model, fl.Categorical(), data, data)
        optimiser = fl.optimizer(name, problem)
    dead, scale = held(model.dead), model.scale.item()
    for _ in range(2):
        optimiser.step(batch=points())
    assert torch.equal(held(model.dead), dead)
    assert model.scale.item() != scale


def test_steps_that_overflow_when_squared_twice_are_no_traceback():
    model = net(6, 3)
    far = {name: torch.full_like(p, 1e80) for name, p in model.named_parameters()}
    scales = quadratic(model, fl.Categorical(), points()).rescale(
        far, {name: 2 * t for name, t in far.items()}
    )
    assert all(map(math.isfinite, scales))


@pytest.mark.parametrize("gone", ["units", "steps", "exceptions", "param_groups", "state"])
def test_a_state_without_a_part_is_refused_by_name(gone):
    optimiser = fl.NaturalGradient(nn.Linear(4, 3), fl.Categorical(), "kfac", 0.1, 0.1)
    state = optimiser.state_dict()
    del (state if gone in state else state["natural_gradient"])[gone]
    with pytest.raises(ValueError, match=f"the state lacks {gone}; nothing was changed"):
        optimiser.load_state_dict(state)


@pytest.mark.parametrize("full", [False, True])
def test_an_optimiser_whose_parameters_were_all_frozen_says_so(full):
    model, data = nn.Linear(4, 3), (torch.randn(5, 4), torch.tensor([0, 1, 2, 0, 1]))
    make = fl.AdaptiveKFAC if full else partial(fl.NaturalGradient, lr=0.1)
    optimiser = make(model, fl.Categorical(), "kfac", damping=0.1)
    optimiser.step(batch=data)
    model.requires_grad_(False)
    with pytest.raises(ValueError, match="none of its parameters is trainable"):
        optimiser.step(batch=data)
