"""Laws of the named optimisers and of the loop that drives them all."""

from __future__ import annotations

import copy
import math
import pickle
from dataclasses import replace

import pytest
import torch
from torch import nn

import fisherlab as fl
from fisherlab import problems
from fisherlab.operators import KroneckerSum
from fisherlab.problems import Problem
from fisherlab.training import take_step, trajectory
from fisherlab.training.curvature import Preconditioned
from fisherlab.training.loop import takes_batch
from tests import cases
from tests.oracles import assert_close
from tests.test_natural_gradient import weights
from tests.training_runs import small

RECIPES = fl.optimizers()


def tiny(likelihood="categorical", examples=24):
    """Return a problem of twenty-four examples."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(1)
        model = cases._dense(4, 5, 3).double()
    chosen = cases.LIKELIHOODS[likelihood]
    x = cases.normal(examples, 4, seed=2)
    pair = (x, cases.labels(chosen, (examples, 3)))
    return Problem("tiny", model, chosen, pair, pair)


def made(name, problem, **settings):
    warm = {"warm_start": 8} if RECIPES[name].settings.get("warm_start") else {}
    return fl.optimizer(name, problem, **(warm | settings))


@pytest.mark.parametrize("name", RECIPES)
def test_every_named_optimiser_trains_on_the_same_loop(name):
    problem = tiny()
    optimiser = made(name, problem)
    start = weights(problem.model)
    (last,) = trajectory(problem, optimiser, 4, (4,), batch_size=8)
    assert last[0] == 4
    for key, found in weights(problem.model).items():
        assert torch.isfinite(found).all()
        assert not torch.equal(found, start[key])


@pytest.mark.parametrize("name", ["kfac", "tnt", "kfac-full", "cg-fac", "deflation-koroko"])
def test_the_same_seed_gives_the_same_run(name):
    ends = []
    for global_seed in (1, 2):
        torch.manual_seed(global_seed)
        problem = tiny()
        list(trajectory(problem, made(name, problem), 3, (), batch_size=8, seed=5))
        ends.append(problem.model[0].weight.detach())
    assert torch.equal(*ends)


def test_recipes_say_what_they_are_and_what_may_be_set():
    for recipe in RECIPES.values():
        assert recipe.summary
        assert recipe.source
    assert sum("lr" in recipe.settings for recipe in RECIPES.values()) >= 20
    with pytest.raises(ValueError, match="known: sgd-momentum, sgd-nesterov, adam"):
        fl.optimizer("sgd", tiny())
    with pytest.raises(ValueError, match=r"'beta' cannot be set; known: lr, betas"):
        fl.optimizer("adam", tiny(), beta=0.9)


def test_first_order_methods_are_those_of_torch():
    for name, kind in {"sgd-momentum": torch.optim.SGD, "adam": torch.optim.Adam}.items():
        assert type(made(name, tiny())) is kind
    assert made("sgd-nesterov", tiny()).param_groups[0]["nesterov"]


@pytest.mark.parametrize("likelihood", ["bernoulli", "gaussian"])
@pytest.mark.parametrize(("name", "terms"), [("kpsvd-koroko", 1), ("deflation-koroko", 2)])
def test_settings_of_mean_losses_are_translated(likelihood, name, terms):
    """A step in the paper's units, with losses that are means over outputs, is ours."""
    problem = replace(tiny(likelihood), likelihood=_unit(likelihood))
    lr, lam, model = 0.2, 0.03, problem.model
    before, (x, y) = weights(model), problem.train
    s = 3.0 if likelihood == "bernoulli" else 1.5
    optimiser = fl.optimizer(
        name, problem, lr=lr, damping=lam, momentum=0.0, statistics_fraction=1.0, clip=None
    )
    stats = fl.collect(model, (x, y), problem.likelihood, fl.MonteCarlo(1))
    grads = fl.mean_gradient(model, (x, y), problem.likelihood)
    optimiser.step(batch=(x, y))
    for block, found in weights(model).items():
        op = (fl.KPSVD() if terms == 1 else fl.Deflation())(stats[block])
        theirs = [(g / s**2, a) for g, a in op.terms]  # all of 1/s² in the row factors
        shift = lam**0.5 if terms == 1 else lam
        (g, a), *more = theirs
        g = g + shift * torch.eye(len(g)).double()
        a = a + shift * torch.eye(len(a)).double()
        damped = KroneckerSum(((g, a), *more), op.weight_shape)
        gradient = grads[block].gradient / s
        if terms == 1:
            move = torch.linalg.inv(g) @ gradient @ torch.linalg.inv(a)
        else:
            move = _absolute(damped).solve(gradient.flatten()).view_as(gradient)
        assert_close(found, before[block] - lr * move, 1e-6)


def _unit(likelihood):
    return fl.Bernoulli() if likelihood == "bernoulli" else fl.Gaussian()


class _absolute:
    """Two terms of which the second one's eigenvalues relative to the first are |s|."""

    def __init__(self, op):
        first, second = (torch.kron(*term) for term in op.terms)
        factor = torch.linalg.cholesky(first)
        middle = torch.linalg.solve_triangular(factor, second, upper=False)
        middle = torch.linalg.solve_triangular(factor, middle.T, upper=False).T
        values, vectors = torch.linalg.eigh((middle + middle.T) / 2)
        basis = factor @ vectors
        self.dense = (basis * (1 + values.abs())) @ basis.T

    def solve(self, vector):
        return torch.linalg.solve(self.dense, vector)


def test_settings_of_mean_losses_need_a_unit_variance():
    with pytest.raises(ValueError, match="Koroko"):
        fl.optimizer("kfac-koroko", tiny("gaussian"))


def test_mini_blocks_from_the_mean_gradient_follow_algorithm_two():
    problem = tiny()
    model, chosen = problem.model, problem.likelihood
    data = [tuple(part[k : k + 8] for part in problem.train) for k in (0, 8, 16)]
    start = [fl.mean_gradient(model, batch, chosen)["0"].gradient for batch in data]
    optimiser = fl.optimizer(
        "mbf", problem, lr=0.1, damping=0.05, inverse_every=2, burn_in=0, warm_start=None
    )
    optimiser.warm_start(data)
    moments = sum(g[:, :, None] * g[:, None, :] for g in start) / 3
    held, kept = torch.zeros_like(start[0]), None
    for k, batch in enumerate(data):
        g, before = fl.mean_gradient(model, batch, chosen)["0"].gradient, weights(model)
        held = 0.9 * held + g
        moments = 0.9 * moments + 0.1 * g[:, :, None] * g[:, None, :]
        if k % 2 == 0:
            kept = torch.linalg.inv(moments + 0.05 * torch.eye(g.shape[1]).double())
        optimiser.step(batch=batch)
        move = (kept @ held[:, :, None])[:, :, 0]
        assert_close(weights(model)["0"], before["0"] - 0.1 * move, 1e-8)


def test_adam_as_a_preconditioner_is_the_adam_of_torch():
    ours, theirs = tiny(), tiny()
    natural = fl.NaturalGradient(
        ours.model,
        ours.likelihood,
        "adam",
        lr=0.01,
        damping=1e-8,
        average=0.999,
        momentum=0.0,
    )
    adam = torch.optim.Adam(theirs.model.parameters(), lr=0.01, betas=(0.0, 0.999))
    for step in range(5):
        take_step(ours, natural, ours.train, step)
        take_step(theirs, adam, theirs.train, step)
    for found, expected in zip(
        ours.model.parameters(), theirs.model.parameters(), strict=True
    ):
        assert_close(found, expected, 1e-6)


def test_the_loop_tells_who_takes_batches():
    problem = tiny()
    natural = made("kfac", problem)
    assert takes_batch(natural)
    scheduler = torch.optim.lr_scheduler.ExponentialLR(natural, 0.9)
    assert takes_batch(natural)
    assert takes_batch(made("kfac-full", problem))
    assert not takes_batch(made("adam", problem))
    list(trajectory(problem, natural, 3, (), batch_size=8, scheduler=scheduler))
    expected = RECIPES["kfac"].settings["lr"] * 0.9**3
    assert natural.param_groups[0]["lr"] == pytest.approx(expected)


def test_batches_may_grow_with_the_step():
    problem, sizes = tiny(), []
    problem.model.register_forward_pre_hook(lambda _, args: sizes.append(len(args[0])))
    schedule = fl.ExponentialBatches(3, 24, until=4)
    list(trajectory(problem, made("adam", problem), 5, (), batch_size=schedule))
    assert sizes == [3, 6, 12, 24, 24]


@pytest.mark.parametrize("name", ["kfac", "adam", "kfac-full"])
def test_a_loss_that_is_no_number_names_step_and_optimiser(name):
    problem = tiny()
    optimiser = made(name, problem)
    with torch.no_grad():
        problem.model[0].bias[0] = math.nan
    with pytest.raises((fl.NumericalError, ValueError)) as caught:
        list(trajectory(problem, optimiser, 2, (), batch_size=8))
    told = " ".join([str(caught.value), *getattr(caught.value, "__notes__", [])])
    assert "step 1" in told
    assert type(optimiser).__name__ in told


def test_augmented_inputs_reach_the_model_by_seed_and_step():
    def shifted(x, generator):
        return x + torch.rand((), generator=generator, dtype=x.dtype)

    seen = []
    problem = replace(tiny(), augment=shifted)
    problem.model.register_forward_pre_hook(lambda _, args: seen.append(args[0].clone()))
    for _ in range(2):
        adam = torch.optim.Adam(problem.model.parameters(), lr=0.0)
        list(trajectory(problem, adam, 2, (), batch_size=24))
    assert torch.equal(seen[0], seen[2])
    added = [inputs.mean() - problem.train[0].mean() for inputs in seen[:2]]
    assert float(added[0]) != pytest.approx(float(added[1]), abs=1e-6)


@pytest.mark.slow
@pytest.mark.parametrize("name", ["kfac-eigen", "ekfac", "kfac-full", "bdf", "tkfac"])
def test_curvature_trains_digits_faster_than_steps_of_gradients(name):
    losses = {}
    for chosen in (name, "sgd-momentum"):
        problem = problems.load("digits")
        settings = {"bdf": {"warm_start": 200}, "kfac-full": {"damping": 1.0}}
        settings = settings.get(chosen, {})
        optimiser = fl.optimizer(chosen, problem, **settings)
        (last,) = trajectory(problem, optimiser, 60, (60,), batch_size=200)
        losses[chosen] = fl.training.mean_loss(last[1], problem.likelihood, problem.train)
    assert losses[name] < losses["sgd-momentum"]


def test_nothing_is_trained_that_is_frozen():
    problem = tiny()
    problem.model[0].requires_grad_(False)
    before = weights_of(problem.model)
    for name in ("kfac", "mbf", "kfac-full", "kpsvd-koroko", "two-level-kfac"):
        list(trajectory(problem, made(name, problem), 2, (), batch_size=8))
    after = weights_of(problem.model)
    assert torch.equal(after["0.weight"], before["0.weight"])
    assert not torch.equal(after["2.weight"], before["2.weight"])


def weights_of(model: nn.Module):
    return {name: p.detach().clone() for name, p in model.named_parameters()}


def small_convolution():
    """A plain convolutional classifier of sixteen pixels by sixteen, on digits."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        body = [nn.Conv2d(1, 8, 3, padding=1), nn.ReLU(), nn.MaxPool2d(4), nn.Flatten()]
        model = nn.Sequential(*body, nn.Linear(128, 32), nn.ReLU(), nn.Linear(32, 10))
    loaded = problems.load("digits")
    x, y = loaded.train
    pair = x.float().reshape(-1, 1, 16, 16), y
    return Problem("convolution", model, fl.Categorical(), pair, pair)


SLOW = [
    pytest.param(name, marks=pytest.mark.slow)
    for name in ("ekfac", "cg-fac", "singd", "ikfac")
]


@pytest.mark.parametrize("name", ["kfac", "kfac-full", *SLOW])
def test_recipes_train_an_ordinary_convolutional_network(name):
    problem = small_convolution()
    optimiser = fl.optimizer(name, problem)
    x, y = problem.train
    steps, size = (10, 256) if name == "kfac-full" else (60, 64)
    order = torch.randperm(len(x), generator=torch.Generator().manual_seed(0))
    seen = []
    for step in range(steps):
        at = order[torch.arange(step * size, (step + 1) * size) % len(x)]
        seen.append(float(optimiser.step(batch=(x[at], y[at]))))
    assert seen[0] == pytest.approx(math.log(10), abs=0.2)
    assert max(seen) < 1.2 * seen[0], "no step explodes"
    assert sum(seen[-5:]) / 5 < 0.8, "and it learns"


def test_the_first_damping_scales_with_the_loss():
    small, large = (
        replace(tiny("gaussian"), likelihood=fl.Gaussian(variance))
        for variance in (1.0, 1e-2)
    )
    x, y = small.train
    lams = []
    for problem in (small, large):
        optimiser = fl.optimizer("kfac-full", problem)
        loss = float(optimiser.step(batch=(x, y)))
        assert optimiser.lam == pytest.approx(loss / 100)
        lams.append(optimiser.lam)
    assert lams[1] == pytest.approx(100 * lams[0])


def test_recipes_read_without_addresses():
    assert " at 0x" not in repr(RECIPES)


@pytest.mark.parametrize("name", RECIPES)
def test_recipes_are_the_same_in_other_processes(name):
    recipe = RECIPES[name]
    for found in (pickle.loads(pickle.dumps(recipe)), copy.deepcopy(recipe)):
        assert repr(found) == repr(recipe)
        made = repr(found(small())), repr(recipe(small()))
        assert made[0] == made[1]


def meaning(optimiser):
    curvature = optimiser.curvature
    place = getattr(optimiser, "momentum_of", None)
    return type(optimiser), curvature.approximator, curvature.fallback, place


def held(optimiser):
    rate = [group["lr"] for group in optimiser.param_groups]
    return optimiser.steps, rate, dict(optimiser.units)


def test_the_state_of_another_recipe_is_taken_as_meant_or_refused_untouched():
    problem, other = tiny(), tiny()

    def cold(name, problem):
        warm = "warm_start" in RECIPES[name].settings
        return fl.optimizer(name, problem, **({"warm_start": None} if warm else {}))

    every = {name: cold(name, problem) for name in RECIPES}
    sources = {n: o for n, o in every.items() if isinstance(o, Preconditioned)}
    for optimiser in sources.values():
        take_step(problem, optimiser, problem.train, 1)
    states = {name: optimiser.state_dict() for name, optimiser in sources.items()}
    for target in sources:
        optimiser = cold(target, other)
        for source, state in states.items():
            if meaning(sources[source]) == meaning(optimiser):
                optimiser.load_state_dict(state)
            else:
                before = held(optimiser)
                with pytest.raises(ValueError, match=r"^load_state_dict: the state .*\.$"):
                    optimiser.load_state_dict(state)
                assert held(optimiser) == before
