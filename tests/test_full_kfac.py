"""Laws of the full K-FAC optimiser: quadratic model, damping, batches, averages."""

from __future__ import annotations

import copy
import io
import itertools

import pytest
import torch
from torch import nn

import fisherlab as fl
from fisherlab.statistics.batches import Batch
from fisherlab.statistics.model_view import view
from fisherlab.training.adaptive_kfac import QuadraticModel
from tests import cases, oracles
from tests.oracles import assert_close
from tests.test_natural_gradient import gradient, problem

SHIFT = 0.3


def flat(model, tensors):
    """Put tensors by parameter below each other, block by block and by rows."""
    rows = [block.pack(tensors).flatten() for block in fl.blocks(model).values()]
    return torch.cat(rows)


def random_direction(model, seed):
    return {
        name: cases.normal(*p.shape, seed=seed + k)
        for k, (name, p) in enumerate(model.named_parameters())
    }


def fisher(model, batch, likelihood):
    """Return the whole Fisher from Jacobians and enumerated labels."""
    total = torch.zeros(())
    for example in batch[0]:
        parts = [oracles.jacobian(model, example, b) for b in fl.blocks(model).values()]
        jacobian = torch.cat(parts, 1)
        output = oracles.output_fisher(likelihood, model(example[None])[0].detach())
        total = total + jacobian.T @ output @ jacobian
    return total / len(batch[0])


def quadratic(model, likelihood, batch, shift=SHIFT):
    grads = gradient(model, likelihood, batch)
    return QuadraticModel(view(model, None), Batch(*batch), likelihood, grads, shift)


@pytest.mark.parametrize("likelihood", cases.LIKELIHOODS)
def test_the_best_combination_is_that_of_the_dense_model(likelihood):
    model, chosen, batch = problem(likelihood)
    found = quadratic(model, chosen, batch)
    direction, last = random_direction(model, 10), random_direction(model, 20)
    dense = fisher(model, batch, chosen)
    dense = dense + SHIFT * torch.eye(len(dense)).double()
    basis = torch.stack([flat(model, direction), flat(model, last)])
    slope = flat(model, found.gradient)
    expected = -torch.linalg.solve(basis @ dense @ basis.T, basis @ slope)
    scales = found.rescale(direction, last)
    assert_close(torch.tensor(scales[:2], dtype=torch.float64), expected, 1e-9)
    step = expected @ basis
    change = slope @ step + step @ dense @ step / 2
    assert scales.change == pytest.approx(float(change), rel=1e-9)
    assert scales.change == pytest.approx(float(slope @ step) / 2, rel=1e-9)


def test_the_best_combination_is_below_all_its_neighbours():
    model, chosen, batch = problem()
    found = quadratic(model, chosen, batch)
    direction, last = random_direction(model, 10), random_direction(model, 20)
    dense = fisher(model, batch, chosen)
    dense = dense + SHIFT * torch.eye(len(dense)).double()
    scales, slope = found.rescale(direction, last), flat(model, found.gradient)
    for a, b in itertools.product((-0.1, 0.0, 0.1), repeat=2):
        step = (scales.alpha + a) * flat(model, direction)
        step = step + (scales.mu + b) * flat(model, last)
        value = float(slope @ step + step @ dense @ step / 2)
        assert value >= scales.change - 1e-12


def test_parallel_or_missing_last_steps_leave_one_scale():
    model, chosen, batch = problem()
    found, direction = quadratic(model, chosen, batch), random_direction(model, 10)
    alone = found.rescale(direction, None)
    parallel = found.rescale(direction, {n: -2 * d for n, d in direction.items()})
    assert parallel == pytest.approx(alone, rel=1e-9)
    assert alone.mu == 0.0
    nothing = {n: torch.zeros_like(d) for n, d in direction.items()}
    assert found.rescale(nothing, None) == (0.0, 0.0, 0.0)


def in_float32(model, chosen, batch, shift=SHIFT):
    x, y = batch
    small = copy.deepcopy(model).float()
    return quadratic(small, chosen, (x.float(), y.float()), shift)


def test_float32_makes_no_step_of_what_two_directions_differ_by_rounding():
    model, chosen, batch = problem("gaussian")
    direction = random_direction(model, 10)
    other = random_direction(model, 20)
    near = {n: d + 1e-3 * other[n] for n, d in direction.items()}
    alone = quadratic(model, chosen, batch).rescale(direction, None)
    single = in_float32(model, chosen, batch).rescale(
        {n: d.float() for n, d in direction.items()},
        {n: d.float() for n, d in near.items()},
    )
    assert single == pytest.approx(alone, rel=1e-4)
    assert quadratic(model, chosen, batch).rescale(direction, near).mu != 0


def test_float32_rescales_directions_whose_squares_overflow_there():
    model, chosen, batch = problem("gaussian")
    direction = {n: 1e21 * d for n, d in random_direction(model, 10).items()}
    expected = quadratic(model, chosen, batch).rescale(direction, None)
    large = {n: d.float() for n, d in direction.items()}
    found = in_float32(model, chosen, batch).rescale(large, None)
    assert found == pytest.approx(expected, rel=1e-4)


def test_masked_labels_leave_the_model():
    model, chosen, (x, y) = problem()
    kept = y.clone()
    kept[2:] = chosen.ignore_index
    part, whole = (
        quadratic(model, chosen, (x, kept)),
        quadratic(model, chosen, (x[:2], y[:2])),
    )
    direction = random_direction(model, 3)
    square = part._form(part.pushed(direction), part.pushed(direction)) * len(x)
    expected = whole._form(whole.pushed(direction), whole.pushed(direction)) * 2
    assert square == pytest.approx(expected, rel=1e-10)


def adaptive(model, likelihood, **options):
    settings = {
        "damping": fl.LevenbergMarquardt(0.1, every=1),
        "search": fl.GreedySearch(every=2),
        "statistics_fraction": 1.0,
        "curvature_fraction": 1.0,
        "fisher": fl.Exact(),
    }
    return fl.AdaptiveKFAC(model, likelihood, **(settings | options))


def test_linear_least_squares_with_exact_blocks_is_solved_in_one_step():
    model, chosen = nn.Linear(3, 2).double(), fl.Gaussian()
    batch = (cases.normal(9, 3, seed=1), cases.normal(9, 2, seed=2))
    options = {"approximator": "exact", "damping": fl.LevenbergMarquardt(0.0), "l2": 0.0}
    adaptive(model, chosen, **options).step(batch=batch)
    design = torch.cat([batch[0], torch.ones(9, 1).double()], 1)
    expected = torch.linalg.lstsq(design, batch[1]).solution.T
    found = torch.cat([model.weight, model.bias[:, None]], 1)
    assert_close(found, expected, 1e-9)


@pytest.mark.parametrize("method", ["kfac", fl.KFACTridiagonal()])
def test_it_converges_on_linear_least_squares(method):
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        model = nn.Sequential(nn.Linear(3, 4), nn.Linear(4, 2)).double()
    chosen = fl.Gaussian()
    batch = (cases.normal(12, 3, seed=1), cases.normal(12, 2, seed=2))
    design = torch.cat([batch[0], torch.ones(12, 1).double()], 1)
    fitted = design @ torch.linalg.lstsq(design, batch[1]).solution
    best = float((batch[1] - fitted).square().sum() / 24)
    optimiser = adaptive(model, chosen, approximator=method, l2=0.0)
    losses = [float(optimiser.step(batch=batch)) for _ in range(10)]
    assert losses[-1] - best < 1e-6 * (losses[0] - best)


def test_the_predicted_change_is_the_change_of_a_quadratic_loss():
    model, chosen = nn.Linear(3, 2).double(), fl.Gaussian()
    batch = (cases.normal(9, 3, seed=1), cases.normal(9, 2, seed=2))
    rule = fl.LevenbergMarquardt(0.0, every=1)
    optimiser = adaptive(model, chosen, damping=rule, l2=1e-3)
    for _ in range(3):
        optimiser.step(batch=batch)
        assert optimiser.ratio == pytest.approx(1.0, abs=1e-6)


@pytest.mark.parametrize("method", ["kfac", fl.KFACTridiagonal(), "kpsvd-2", "exact"])
def test_the_model_promises_a_decrease_in_every_step(method):
    model, chosen, batch = problem(examples=30)
    optimiser, changes = adaptive(model, chosen, approximator=method), []
    best = optimiser._best

    def noted(*args):
        found = best(*args)
        changes.append(found[2][0].change)
        return found

    optimiser._best = noted
    losses = [float(optimiser.step(batch=batch)) for _ in range(12)]
    assert max(changes) < 0
    assert losses[-1] < 0.7 * losses[0]


def test_the_search_takes_the_best_gamma():
    model, chosen, batch = problem(examples=30)
    best = {}
    for factor in (1.0, 0.5, 2.0):
        here = copy.deepcopy(model)
        optimiser = adaptive(here, chosen, search=fl.GreedySearch(every=9))
        optimiser.gamma *= factor
        found = optimiser._best

        def noted(*args, factor=factor, found=found):
            out = found(*args)
            best[factor] = out[2][0].change
            return out

        optimiser._best = noted
        optimiser.step(batch=batch)
    optimiser = adaptive(model, chosen, search=fl.GreedySearch(every=1, factor=0.25))
    start = optimiser.gamma
    optimiser.step(batch=batch)
    assert optimiser.gamma / start == pytest.approx(min(best, key=best.__getitem__))


@pytest.mark.parametrize("method", ["kfac", fl.KFACTridiagonal(), "kpsvd-2"])
def test_no_damping_below_the_rounding_of_float32_ends_it(method):
    model, chosen, (x, y) = problem(examples=30)
    wide = torch.cat([x, x @ cases.normal(x.shape[1], 12, seed=5)], 1)  # A of low rank
    first = next(m for m in model if isinstance(m, nn.Linear))
    model[0] = nn.utils.skip_init(nn.Linear, wide.shape[1], first.out_features)
    with torch.no_grad():
        model[0].weight.copy_(0.3 * cases.normal(*model[0].weight.shape, seed=6))
        model[0].bias.zero_()
    model, batch = model.float(), (wide.float(), y)
    options = {"approximator": method, "inverse_every": 1, "l2": 0.0}
    optimiser = adaptive(model, chosen, **options)
    losses = []
    for _ in range(12):
        losses.append(float(optimiser.step(batch=batch)))
        optimiser.gamma *= 1e-2
    assert losses[-1] < losses[0]


def test_without_momentum_the_step_is_along_the_direction():
    model, chosen, batch = problem(examples=30)
    optimiser = adaptive(model, chosen, momentum=False)
    best, seen = optimiser._best, []

    def noted(*args):
        found = best(*args)
        seen.append(found[2][0].mu)
        return found

    optimiser._best = noted
    losses = [float(optimiser.step(batch=batch)) for _ in range(4)]
    assert seen == [0.0] * 4
    assert losses[-1] < losses[0]


def test_lambda_follows_the_reduction_ratio():
    rule = fl.LevenbergMarquardt(8.0, every=2, factor=0.5, floor=1.0)
    assert rule.adapted(8.0, 0.8) == 2.0
    assert rule.adapted(8.0, 0.5) == 8.0
    assert rule.adapted(8.0, 0.1) == 32.0
    assert rule.adapted(8.0, -0.9) == 32.0  # the loss rose where a fall was promised
    assert rule.adapted(8.0, 0.25) == rule.adapted(8.0, 0.75) == 8.0
    assert rule.adapted(8.0, float("nan")) == 32.0
    assert rule.adapted(2.0, 0.8) == 1.0
    model, chosen, batch = problem(examples=30)
    optimiser = adaptive(model, chosen, damping=fl.LevenbergMarquardt(5.0, every=2))
    seen = []
    for _ in range(4):
        optimiser.step(batch=batch)
        seen.append(optimiser.lam)
    assert seen[0] == 5.0
    assert seen[1] == seen[2] != 5.0
    assert seen[1] == pytest.approx(5.0 * 0.95**2)  # far too much damping to begin with


def test_the_l2_term_makes_it_a_ridge_regression():
    model, chosen = nn.Linear(3, 2).double(), fl.Gaussian()
    batch = (cases.normal(9, 3, seed=1), cases.normal(9, 2, seed=2))
    options = {"approximator": "exact", "damping": fl.LevenbergMarquardt(0.0), "l2": 0.3}
    adaptive(model, chosen, **options).step(batch=batch)
    design = torch.cat([batch[0], torch.ones(9, 1).double()], 1)
    normal = design.T @ design / 9 + 0.3 * torch.eye(4).double()
    expected = torch.linalg.solve(normal, design.T @ batch[1] / 9).T
    found = torch.cat([model.weight, model.bias[:, None]], 1)
    assert_close(found, expected, 1e-9)


def test_averaged_parameters_are_given_for_a_while():
    model, chosen, batch = problem(examples=30)
    optimiser = adaptive(model, chosen, parameter_average=fl.Ramped(0.9))
    with pytest.raises(ValueError, match="no step"), optimiser.averaged_parameters():
        pass
    seen = []
    for _ in range(3):
        optimiser.step(batch=batch)
        seen.append(model[0].weight.detach().clone())
    with optimiser.averaged_parameters() as averaged:
        assert_close(averaged[0].weight, torch.stack(seen).mean(0), 1e-12)
    assert torch.equal(model[0].weight, seen[-1])


@pytest.mark.parametrize("method", ["kfac", fl.KFACTridiagonal(), "exact"])
def test_a_saved_state_continues_bit_for_bit(method):
    model, chosen, batch = problem(examples=12)
    optimiser = adaptive(model, chosen, approximator=method, fisher=fl.MonteCarlo(1))
    for _ in range(3):
        optimiser.step(batch=batch)
    file = io.BytesIO()
    torch.save({"model": model.state_dict(), "opt": optimiser.state_dict()}, file)
    file.seek(0)
    held = torch.load(file, weights_only=True)
    other, *_ = problem(examples=12)
    other.load_state_dict(held["model"])
    again = adaptive(other, chosen, approximator=method, fisher=fl.MonteCarlo(1))
    again.load_state_dict(held["opt"])
    for _ in range(5):
        assert torch.equal(optimiser.step(batch=batch), again.step(batch=batch))
    for found, expected in zip(other.parameters(), model.parameters(), strict=True):
        assert torch.equal(found, expected)
    assert (again.lam, again.gamma) == (optimiser.lam, optimiser.gamma)


def test_the_model_is_left_as_it_was_found():
    model, chosen, batch = problem()
    model = nn.Sequential(*model, nn.Dropout(0.5)).train()
    torch.manual_seed(3)
    before = torch.get_rng_state()
    optimiser = adaptive(model, chosen)
    for _ in range(3):
        optimiser.step(batch=batch)
    assert torch.equal(torch.get_rng_state(), before)
    assert all(module.training for module in model.modules())
    assert all(p.grad is None for p in model.parameters())
    assert not any(m._forward_hooks for m in model.modules())


def test_what_is_not_a_batch_or_a_number_is_refused():
    model, chosen, batch = problem()
    with pytest.raises(ValueError, match="no closure"):
        adaptive(model, chosen).step(lambda: 0.0, batch=batch)
    with pytest.raises(ValueError, match="fractions"):
        adaptive(model, chosen, statistics_fraction=0.0)
    with pytest.raises(ValueError, match="l2"):
        adaptive(model, chosen, l2=-1.0)
    with pytest.raises(ValueError, match="factor"):
        fl.LevenbergMarquardt(factor=1.5)
    with pytest.raises(ValueError, match="factor"):
        fl.GreedySearch(factor=0.0)
    with pytest.raises(ValueError, match="until"):
        fl.ExponentialBatches(until=1)
    with pytest.raises(ValueError, match="another kind"):
        adaptive(model, chosen).load_state_dict({})


def test_batches_grow_exponentially_to_the_whole_set():
    sizes = fl.ExponentialBatches(1000, 60_000, 500)
    assert sizes(1) == 1000
    assert sizes(500) == sizes(10_000) == 60_000
    logs = torch.tensor([sizes(k) for k in range(1, 501)]).double().log()
    assert_close(logs.diff(), logs.diff().mean().expand(499), rtol=0.15)
