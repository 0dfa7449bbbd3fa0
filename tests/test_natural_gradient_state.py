"""Laws of many steps: schedules, averages, saved states, and what stays untouched."""

from __future__ import annotations

import copy
import io
from dataclasses import dataclass, field

import pytest
import torch
from torch import nn

import fisherlab as fl
from fisherlab.numerics.devices import Look
from fisherlab.operators import Diagonal
from tests import cases
from tests.oracles import assert_close
from tests.test_natural_gradient import (
    DAMPING,
    RATE,
    gradient,
    natural,
    packed,
    problem,
    weights,
)


def batches(count, examples=6, seed=0):
    """Return batches of the problem's shape."""
    chosen = fl.Categorical()
    return [
        (cases.normal(examples, 4, seed=seed + k), cases.labels(chosen, (examples, 3), k))
        for k in range(count)
    ]


@dataclass(frozen=True)
class Counted:
    """The identity, noting how often it is made and inverted."""

    made: list[str] = field(default_factory=list)
    inverted: list[int] = field(default_factory=list)

    def __call__(self, statistics, previous=None):
        self.made.append(statistics.name)
        return Noting(torch.ones(statistics.weight_shape).double(), note=self.inverted)


@dataclass(frozen=True, eq=False, repr=False)
class Noting(Diagonal):
    note: list[int] = field(default_factory=list)

    def inverse(self, damping):
        self.note.append(1)
        return Diagonal(1 / (self.entries + damping))


@pytest.mark.parametrize(
    ("every", "refresh", "burn_in", "made", "inverted"),
    [(1, 1, 0, 7, 7), (3, 2, 0, 3, 4), (2, 5, 0, 4, 2), (3, 4, 3, 5, 4)],
)
def test_statistics_and_inverses_keep_their_schedules(
    every, refresh, burn_in, made, inverted
):
    model, chosen, batch = problem()
    method = Counted()
    optimiser = natural(
        model,
        chosen,
        method,
        statistics_every=every,
        inverse_every=refresh,
        burn_in=burn_in,
        average=0,
    )
    for _ in range(7):
        optimiser.step(batch=batch)
    assert len(method.made) == 2 * made  # two blocks
    assert len(method.inverted) == 2 * inverted


def test_an_old_inverse_is_used_until_it_is_renewed():
    model, chosen, _ = problem()
    data = batches(3)
    optimiser = natural(model, chosen, inverse_every=2, average=0)
    first = {n: fl.KFAC()(s) for n, s in fl.collect(model, data[0], chosen).items()}
    optimiser.step(batch=data[0])
    grads, before = packed(model, gradient(model, chosen, data[1])), weights(model)
    optimiser.step(batch=data[1])
    for name, found in weights(model).items():
        move = first[name].solve(grads[name], DAMPING)
        assert_close(found, before[name] - RATE * move, 1e-8)
    third = {n: fl.KFAC()(s) for n, s in fl.collect(model, data[2], chosen).items()}
    grads, before = packed(model, gradient(model, chosen, data[2])), weights(model)
    optimiser.step(batch=data[2])
    for name, found in weights(model).items():
        move = third[name].solve(grads[name], DAMPING)
        assert_close(found, before[name] - RATE * move, 1e-8)


RULES = {
    "corrected": (0.8, [(0.2 * 0.64), (0.2 * 0.8), 0.2], True),
    "ramped": (fl.Ramped(0.9), [1 / 3, 1 / 3, 1 / 3], False),
    "ramp ended": (fl.Ramped(0.25), [0.0625, 0.1875, 0.75], False),
    "last": (0.0, [0.0, 0.0, 1.0], False),
    "mean": (1.0, [1 / 3, 1 / 3, 1 / 3], False),
}


@pytest.mark.parametrize("rule", RULES)
def test_averages_start_with_their_first_batch_alone(rule):
    average, shares, normalised = RULES[rule]
    model, chosen, _ = problem()
    optimiser = natural(model, chosen, lr=0.0, average=average)
    factors = []
    for batch in batches(3):
        optimiser.step(batch=batch)
        stats = fl.collect(model, batch, chosen)["0"]
        factors.append(fl.KFAC()(stats).terms[0])
        if len(factors) == 1:
            assert_close(optimiser.units["0"].operator.terms[0][0], factors[0][0], 1e-12)
    total = sum(shares) if normalised else 1.0
    for side in (0, 1):
        pairs = zip(shares, factors, strict=True)
        expected = sum(share / total * pair[side] for share, pair in pairs)
        assert_close(optimiser.units["0"].operator.terms[0][side], expected, 1e-10)


def test_a_warm_start_is_the_mean_over_the_data():
    model, chosen, batch = problem()
    data = [*batches(2), *batches(1, examples=3, seed=9)]
    optimiser = natural(model, chosen, lr=0.0, average=0.75)
    optimiser.warm_start(data)
    x, y = (torch.cat(parts) for parts in zip(*data, strict=True))
    start = fl.KFAC()(fl.collect(model, (x, y), chosen)["0"]).terms[0]
    found = optimiser.units["0"].operator.terms[0]
    assert_close(found[0], start[0], 1e-10)
    assert_close(found[1], start[1], 1e-10)
    expected = start[1]
    for later in (batch, data[0]):
        optimiser.step(batch=later)
        own = fl.KFAC()(fl.collect(model, later, chosen)["0"]).terms[0]
        expected = 0.75 * expected + 0.25 * own[1]
        found = optimiser.units["0"].operator.terms[0]
        assert_close(found[1], expected, 1e-10)
    with pytest.raises(ValueError, match="2 steps"):
        optimiser.warm_start(data)


def test_a_warm_start_without_data_is_refused():
    model, chosen, _ = problem()
    with pytest.raises(ValueError, match="no batch"):
        natural(model, chosen).warm_start([])


METHODS = ["kfac", "ekfac", "kpsvd-2", "deflation", "exact", "mini-block", "diagonal"]
METHODS += ["kfac-tridiagonal", "two-level-kfac", "mini-block-mean", "shampoo-mean"]
METHODS += ["tnt-mean", "adam", "soap-mean", "kl-shampoo-mean", "muon-mean"]


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("place", ["direction", "gradient"])
def test_a_saved_state_continues_bit_for_bit(method, place):
    data = batches(9)

    def made():
        model, chosen, _ = problem()
        fisher = None if "mean" in method or method == "adam" else fl.MonteCarlo(1, seed=3)
        optimiser = natural(
            model,
            chosen,
            method,
            momentum=0.7,
            momentum_of=place,
            fisher=fisher,
            statistics_every=2,
            inverse_every=3,
            damping=1.0,
        )
        return model, optimiser

    model, optimiser = made()
    for batch in data[:4]:
        optimiser.step(batch=batch)
    file = io.BytesIO()
    torch.save({"model": model.state_dict(), "optimiser": optimiser.state_dict()}, file)
    file.seek(0)
    held = torch.load(file, weights_only=True)
    other, again = made()
    other.load_state_dict(held["model"])
    again.load_state_dict(held["optimiser"])
    for batch in data[4:]:
        assert torch.equal(optimiser.step(batch=batch), again.step(batch=batch))
    for found, expected in zip(other.parameters(), model.parameters(), strict=True):
        assert torch.equal(found, expected)


def test_a_saved_state_holds_the_dampings_of_the_groups():
    model, chosen, batch = problem()
    optimiser = natural(model, chosen, damping=fl.Factored(0.5, pi=2.0))
    optimiser.step(batch=batch)
    file = io.BytesIO()
    torch.save(optimiser.state_dict(), file)
    file.seek(0)
    again = natural(copy.deepcopy(model), chosen)
    again.load_state_dict(torch.load(file, weights_only=True))
    assert again.param_groups[0]["damping"] == fl.Factored(0.5, pi=2.0)
    with pytest.raises(ValueError, match="another kind"):
        again.load_state_dict(torch.optim.SGD(model.parameters(), lr=1.0).state_dict())


def test_a_state_from_before_a_bad_step_forgets_that_step():
    model, chosen, batch = problem()
    optimiser = natural(model, chosen)
    optimiser.step(batch=batch)
    before = copy.deepcopy(optimiser.state_dict())
    optimiser._unseen = [Look(torch.tensor(False), lambda: ValueError("a bad step"))]
    with pytest.raises(ValueError, match="a bad step"):
        optimiser.state_dict()
    optimiser._unseen = [Look(torch.tensor(False), lambda: ValueError("a bad step"))]
    optimiser.load_state_dict(before)
    optimiser.look()
    optimiser.step(batch=batch)


def test_the_state_of_another_model_is_refused_and_changes_nothing():
    model, chosen, batch = problem()
    optimiser = natural(model, chosen)
    optimiser.step(batch=batch)
    other = natural(
        nn.Sequential(nn.Linear(5, 3), nn.Tanh(), nn.Linear(3, 3)), chosen, lr=7.0
    )
    with pytest.raises(ValueError, match="state is of other parameters: 0"):
        other.load_state_dict(optimiser.state_dict())
    assert (other.steps, dict(other.units), other.param_groups[0]["lr"]) == (0, {}, 7.0)


def test_methods_with_their_own_state_are_not_averaged():
    model, chosen, batch = problem()
    optimiser = natural(model, chosen, fl.SINGD(rate=0.05), damping=0.0, average=0)
    operator = None
    for _ in range(3):
        stats = fl.collect(model, batch, chosen)
        operator = fl.SINGD(rate=0.05)(stats["0"], previous=operator)
        optimiser.step(batch=batch)
        assert_close(optimiser.units["0"].operator.row_root, operator.row_root, 1e-9)
    optimiser = natural(model, chosen, "cg-fac")
    optimiser.step(batch=batch)
    with pytest.raises(ValueError, match="average") as caught:
        optimiser.step(batch=batch)
    assert "average=0" in caught.value.__notes__[0]


@pytest.mark.parametrize("method", [fl.KFACTridiagonal(), fl.TwoLevelKFAC()])
def test_methods_of_the_network_take_the_steps_of_their_operators(method):
    model, chosen, batch = problem(sizes=(4, 1, 3))  # fewer outputs than columns
    fisher = fl.Exact()
    for damping in (DAMPING, fl.Factored(DAMPING)):
        if isinstance(damping, fl.Factored) and isinstance(method, fl.TwoLevelKFAC):
            continue
        here = copy.deepcopy(model)
        grads, before = packed(here, gradient(here, chosen, batch)), weights(here)
        stats = fl.collect(here, batch, chosen, fisher, compress=False)
        move = method(stats).solve(grads, damping)
        natural(here, chosen, method, fisher=fisher, damping=damping).step(batch=batch)
        for name, found in weights(here).items():
            assert_close(found, before[name] - RATE * move[name], 1e-8)


def test_k_bfgs_is_shown_the_batch_before_and_after_the_step():
    from fisherlab.approximators.online import KBFGS, Observation

    model, chosen, batch = problem()
    method = KBFGS(damping=0.3)
    optimiser = natural(model, chosen, method, fisher=None, damping=0.0, average=0)
    assert optimiser.fisher == fl.Empirical()
    operator = None
    for _ in range(3):
        before = fl.collect(model, batch, chosen, fl.Empirical())["2"]
        operator = method(before, previous=operator)
        seen = Observation.of(before, weights(model)["2"])
        grads, start = packed(model, gradient(model, chosen, batch)), weights(model)
        optimiser.step(batch=batch)
        move = operator.solve(grads["2"], 0.0)
        assert_close(weights(model)["2"], start["2"] - RATE * move, 1e-9)
        after = fl.collect(model, batch, chosen, fl.Empirical())["2"]
        now = Observation.of(after, weights(model)["2"])
        operator = method.observe(operator, seen, now)
        found = optimiser.units["2"].operator.rows.dense()
        assert_close(found, operator.rows.dense(), 1e-9)


def test_the_statistics_may_have_a_part_of_the_batch_or_their_own():
    model, chosen, _ = problem()
    batch, own = batches(2, examples=8)
    grads, before = packed(model, gradient(model, chosen, batch)), weights(model)
    part, other = copy.deepcopy(model), copy.deepcopy(model)
    quarter = (batch[0][:2], batch[1][:2])
    natural(part, chosen, statistics_fraction=0.25).step(batch=batch)
    natural(other, chosen).step(batch=batch, statistics_batch=(own[0], None))
    for here, data in ((part, quarter), (other, own)):
        stats = fl.collect(model, data, chosen)
        for name, found in weights(here).items():
            move = fl.KFAC()(stats[name]).solve(grads[name], DAMPING)
            assert_close(found, before[name] - RATE * move, 1e-8)


def test_labels_are_drawn_by_seed_step_and_example():
    model, chosen, batch = problem()
    optimiser = natural(model, chosen, lr=0.0, average=0, fisher=fl.MonteCarlo(1, seed=7))
    seen = []
    for step in range(3):
        optimiser.step(batch=batch)
        seen.append(optimiser.units["2"].operator.terms[0][0])
        fisher = fl.MonteCarlo(1, seed=7, step=step)
        expected = fl.KFAC()(fl.collect(model, batch, chosen, fisher)["2"]).terms[0][0]
        assert_close(seen[-1], expected, 1e-12)
    assert not torch.equal(seen[0], seen[1])


def test_the_same_seed_gives_the_same_run_and_the_global_generator_no_part_of_it():
    ends = []
    for global_seed in (1, 2):
        torch.manual_seed(global_seed)
        model, chosen, batch = problem()
        before = torch.get_rng_state()
        optimiser = natural(model, chosen, fisher=fl.MonteCarlo(1, seed=3))
        for _ in range(3):
            optimiser.step(batch=batch)
        assert torch.equal(torch.get_rng_state(), before)
        ends.append(model[0].weight.detach())
    assert torch.equal(*ends)


class Noisy(nn.Module):
    """Batch norm, dropout and a head whose bias is frozen."""

    def __init__(self):
        super().__init__()
        self.first, self.norm = nn.Linear(4, 5), nn.BatchNorm1d(5)
        self.drop, self.head = nn.Dropout(0.5), nn.Linear(5, 3)
        self.head.bias.requires_grad_(False)

    def forward(self, x):
        return self.head(self.drop(torch.tanh(self.norm(self.first(x)))))


@pytest.mark.draws("dropout of the model, in training mode")
@pytest.mark.filterwarnings("ignore:.*running averages")
def test_the_model_is_left_as_an_ordinary_training_step_leaves_it():
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        model = Noisy().double().train()
    other, chosen, (batch,) = copy.deepcopy(model), fl.Categorical(), batches(1)
    model.register_forward_hook(lambda *_: None)
    for parameter in model.parameters():
        parameter.grad = torch.ones_like(parameter)
    optimiser = natural(model, chosen, fallback="diagonal")
    optimiser.step(batch=batch)  # finds out about the model
    held = {n: b.clone() for n, b in model.named_buffers()}
    other.load_state_dict(model.state_dict())
    with torch.random.fork_rng(devices=[]):
        optimiser.step(batch=batch)
        chosen.loss(other(batch[0]), batch[1]).mean().backward()
    for name, buffer in model.named_buffers():
        assert_close(buffer, dict(other.named_buffers())[name], 1e-12)
    assert not torch.equal(model.norm.running_mean, held["norm.running_mean"])
    assert all(module.training for module in model.modules())
    assert all(bool((p.grad == 1).all()) for p in model.parameters())
    assert [len(m._forward_hooks) for m in model.modules()] == [1, 0, 0, 0, 0]
    assert set(optimiser.units) == {"first", "norm", "head"}


@pytest.mark.draws("dropout of the model, in training mode")
@pytest.mark.filterwarnings("ignore:.*running averages")
def test_statistics_are_taken_in_evaluation_mode():
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        model = Noisy().double().train()
    chosen, (batch,) = fl.Categorical(), batches(1)
    optimiser = natural(model, chosen, "exact", lr=0.0)
    optimiser.step(batch=batch)
    with fl.frozen(model):
        model.norm.reset_running_stats()
    model.norm.train()
    again = natural(model, chosen, "exact", lr=0.0)
    stats = []
    passes, found = again._passes, again._passes.observe

    def observe(*args, **kwargs):
        stats.append(found(*args, **kwargs))
        return stats[-1]

    passes.observe = observe
    again.step(batch=batch)
    with fl.frozen(model):
        expected = fl.collect(model, batch, chosen)
    assert_close(stats[0]["head"].inputs, expected["head"].inputs, 1e-12)


def test_schedulers_of_torch_change_the_rate():
    model, chosen, batch = problem()
    optimiser = natural(model, chosen, "exact")
    scheduler = torch.optim.lr_scheduler.StepLR(optimiser, step_size=2, gamma=0.1)
    moves = []
    for _ in range(4):
        before = weights(model)["0"]
        optimiser.step(batch=batch)
        scheduler.step()
        moves.append(float((weights(model)["0"] - before).norm()))
    assert optimiser.param_groups[0]["lr"] == pytest.approx(RATE / 100)
    assert moves[2] < 0.2 * moves[1]


def test_hooks_of_torch_are_called():
    model, chosen, batch = problem()
    optimiser, seen = natural(model, chosen), []
    optimiser.register_step_pre_hook(lambda *_: seen.append("before"))
    optimiser.register_step_post_hook(lambda *_: seen.append("after"))
    optimiser.step(batch=batch)
    assert seen == ["before", "after"]
    model[0].weight.grad = torch.ones_like(model[0].weight)
    optimiser.zero_grad()
    assert model[0].weight.grad is None


def test_batches_come_as_loaders_give_them():
    model, chosen, (x, y) = problem()
    other = copy.deepcopy(model)
    loader = torch.utils.data.DataLoader(
        torch.utils.data.TensorDataset(x, y), batch_size=len(x)
    )
    optimiser, plain = natural(model, chosen), natural(other, chosen)
    for _ in range(2):
        for batch in loader:
            optimiser.step(batch=batch)
        plain.step(batch=(x.float().double(), y))
    assert_close(model[0].weight, other[0].weight, 1e-5)


@pytest.mark.parametrize(
    ("method", "damping"),
    [
        ("kfac", DAMPING),
        ("kfac", fl.Factored(DAMPING)),
        ("kpsvd", fl.Factored(DAMPING)),
        ("kfac-tridiagonal", fl.Factored(DAMPING)),
        ("mini-block", DAMPING),
    ],
)
def test_layers_frozen_later_are_left_out_from_then_on(method, damping):
    model, chosen, batch = problem()
    optimiser = natural(model, chosen, method, damping=damping, momentum=0.5)
    optimiser.step(batch=batch)
    model[0].requires_grad_(False)
    before = weights_of_all(model)
    optimiser.step(batch=batch)
    after = weights_of_all(model)
    assert torch.equal(after["0.weight"], before["0.weight"])
    assert not torch.equal(after["2.weight"], before["2.weight"])


def weights_of_all(model):
    return {name: p.detach().clone() for name, p in model.named_parameters()}


def test_iterated_solves_start_from_the_last_direction():
    model, chosen, batch = problem()
    method = fl.CGFAC(max_iterations=2)
    optimiser = natural(model, chosen, method, average=0)
    last = None
    for _ in range(3):
        grads, before = packed(model, gradient(model, chosen, batch)), weights(model)
        op = method(fl.collect(model, batch, chosen)["0"])
        last = op.solve(grads["0"], DAMPING, start=last)
        optimiser.step(batch=batch)
        assert_close(weights(model)["0"], before["0"] - RATE * last, 1e-9)


def test_a_copy_goes_its_own_way():
    model, chosen, batch = problem()
    optimiser = natural(model, chosen, momentum=0.5)
    optimiser.step(batch=batch)
    copied = copy.deepcopy(optimiser)
    assert copied.model is not model
    held = weights(model)
    copied.step(batch=batch)
    assert torch.equal(weights(model)["0"], held["0"])
    optimiser.step(batch=batch)
    assert torch.equal(weights(model)["0"], weights(copied.model)["0"])


@pytest.mark.parametrize("method", ["kfac", "exact", "kfac-tridiagonal"])
def test_a_layer_that_the_loss_does_not_use_is_left_alone(method):
    class Spare(nn.Module):
        def __init__(self):
            super().__init__()
            self.body, _, self.head = problem()[0]
            self.spare = nn.Linear(2, 2).double()

        def forward(self, x):
            return self.head(torch.tanh(self.body(x)))

    model, (_, chosen, batch) = Spare(), problem()
    before, spare = model.body.weight.clone(), model.spare.weight.clone()
    options = {"fallback": None} if "tri" in method else {"fallback": "gradient"}
    optimiser = natural(model, chosen, method, **options)
    for _ in range(2):
        optimiser.step(batch=batch)
    assert torch.equal(model.spare.weight, spare)
    assert not torch.equal(model.body.weight, before)


def test_a_layer_that_grows_in_place_is_seen_as_it_is_now():
    """The parameters are the same objects, of another shape."""
    model, x = nn.Linear(4, 3), torch.randn(8, 4)
    settings = {"lr": 0.1, "damping": 0.1, "average": 0.0, "momentum": 0.0}
    optimiser = fl.NaturalGradient(model, fl.Categorical(), "kfac", **settings)
    optimiser.step(batch=(x, torch.arange(8) % 3))
    model.weight.data, model.bias.data = torch.randn(5, 4), torch.zeros(5)
    fresh = copy.deepcopy(model)
    begun = fl.NaturalGradient(fresh, fl.Categorical(), "kfac", **settings)
    for each in (optimiser, begun):
        each.steps = 1
        each.step(batch=(x, torch.arange(8) % 5))
    assert torch.equal(model.weight, fresh.weight)


def test_what_is_known_of_a_model_is_bounded_when_layers_freeze_in_turn():
    model, x = nn.Sequential(*(nn.Linear(3, 3) for _ in range(12))), torch.randn(4, 3)
    batch = x, torch.arange(4) % 3
    optimiser = fl.NaturalGradient(model, fl.Categorical(), "kfac", lr=0.1, damping=0.1)
    for layer in model:
        layer.requires_grad_(False)
        optimiser.step(batch=batch)
        layer.requires_grad_(True)
    assert 1 < len(optimiser._known) <= 8
    assert len(optimiser._passes._plans) <= 8
