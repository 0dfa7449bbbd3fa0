"""Laws of the training loop."""

from __future__ import annotations

import math
from dataclasses import replace

import pytest
import torch

import fisherlab as fl
from fisherlab import problems
from fisherlab.errors import NumericalError
from fisherlab.training import accuracy, mean_loss, performance, trajectory
from tests.cases import refused


def sgd(problem, lr=0.1):
    return torch.optim.SGD(problem.model.parameters(), lr=lr, momentum=0.9)


def weights_after(steps, checkpoints, **options):
    problem = problems.load("digits")
    path = trajectory(problem, sgd(problem), steps, checkpoints, **options)
    return [(step, model.fc1.weight.detach().clone()) for step, model in path]


def test_one_full_batch_step_is_gradient_descent_by_hand():
    problem = problems.load("digits")
    x, y = problem.train
    reference = problems.load("digits").model
    loss = torch.nn.functional.cross_entropy(reference(x), y)
    (gradient,) = torch.autograd.grad(loss, reference.fc1.weight)
    expected = reference.fc1.weight - 0.1 * gradient
    list(trajectory(problem, sgd(problem), 1, (1,), batch_size=10**6))
    torch.testing.assert_close(problem.model.fc1.weight, expected)


def test_checkpoints_come_in_order_and_do_not_disturb_the_training():
    often = weights_after(6, (6, 0, 3))
    once = weights_after(6, (6,))
    assert [step for step, _ in often] == [0, 3, 6]
    assert torch.equal(often[-1][1], once[-1][1])


def test_the_seed_decides_the_path_and_the_global_generator_does_not():
    torch.manual_seed(1)
    first = weights_after(4, (4,), seed=7)[0][1]
    torch.manual_seed(2)
    assert torch.equal(first, weights_after(4, (4,), seed=7)[0][1])
    assert not torch.equal(first, weights_after(4, (4,), seed=8)[0][1])


def test_an_epoch_shows_every_example_once():
    x = torch.arange(12.0).reshape(12, 1)
    problem = problems.load("digits", dtype=torch.float32)
    seen: list[float] = []
    probe = torch.nn.Linear(1, 10)
    probe.register_forward_pre_hook(lambda _, args: seen.extend(args[0].flatten().tolist()))
    tiny = replace(problem, model=probe, train=(x, torch.zeros(12, dtype=torch.int64)))
    list(trajectory(tiny, sgd(tiny), 6, (), batch_size=4))
    assert sorted(seen[:12]) == sorted(seen[12:]) == x.flatten().tolist()
    assert seen[:12] != seen[12:]


def test_progress_counts_the_steps():
    steps: list[int] = []
    weights_after(3, (), progress=steps.append)
    assert steps == [1, 2, 3]


def test_the_model_is_looked_at_in_evaluation_mode_and_trained_in_training_mode():
    problem = problems.load("digits")
    modes: list[bool] = []
    problem.model.register_forward_hook(lambda module, *_: modes.append(module.training))
    for _, model in trajectory(problem, sgd(problem), 2, (0, 1, 2)):
        assert not model.training
    assert modes == [True, True]


def test_a_diverging_training_names_step_and_learning_rate():
    problem = problems.load("digits")
    with torch.no_grad():
        problem.model.fc6.bias[0] = math.nan
    with pytest.raises(NumericalError, match=r"nan at step 1 .* 0\.25"):
        list(trajectory(problem, sgd(problem, lr=0.25), 3, (3,)))


@pytest.mark.parametrize("checkpoints", [(-1,), (0, 4)])
def test_checkpoints_outside_of_the_training_are_refused_at_once(checkpoints):
    problem = problems.load("digits")
    with pytest.raises(ValueError, match="outside"):
        trajectory(problem, sgd(problem), 3, checkpoints)


def test_evaluation_in_chunks_equals_evaluation_at_once():
    problem = problems.load("digits")
    x, y = problem.train
    output = problem.model(x)
    expected_loss = torch.nn.functional.cross_entropy(output, y).item()
    expected_accuracy = (output.argmax(1) == y).double().mean().item()
    loss = mean_loss(problem.model, problem.likelihood, problem.train)
    assert loss == pytest.approx(expected_loss, rel=1e-12)
    assert accuracy(problem.model, problem.train) == expected_accuracy
    both = performance(problem.model, problem.likelihood, problem.train, at_once=100)
    assert both.accuracy == expected_accuracy
    assert both.loss == pytest.approx(expected_loss, rel=1e-12)


def test_masked_positions_count_in_no_accuracy():
    outputs, labels = torch.eye(3).expand(4, 3, 3), torch.arange(3).expand(4, 3).clone()
    labels[:, 2] = -100
    said = fl.Categorical(class_axis=-1)
    found = performance(torch.nn.Identity(), said, (outputs, labels))
    assert found.accuracy == 1.0
    labels[:] = -100
    none = performance(torch.nn.Identity(), said, (outputs, labels))
    assert math.isnan(none.accuracy)


@pytest.mark.parametrize("given", ["digits", None, 3, torch.nn.Linear(2, 2)])
def test_what_is_no_problem_is_refused_in_a_sentence(given):
    with refused(r"follow: .*a problem is expected.*fl.problems"):
        fl.follow(given, steps=1)
    with refused(r"optimizer: .*a problem is expected"):
        fl.optimizer("kfac", given)
    if not (isinstance(given, str) or callable(given)):  # which it loads, or calls
        with refused(r"tune: .*a problem is expected"):
            fl.tune(given, "adam", {"lr": [0.1]}, steps=1)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"optimizer": None}, "optimizer=None was given; a name of fl.optimizers"),
        ({"optimizer": torch.optim.SGD}, "a function that makes one of a problem"),
        ({"probes": ["losses"]}, "'losses' is no probe"),
        ({"probes": [fl.probes.Losses]}, "is no probe; values of fl.probes"),
    ],
)
def test_what_a_training_cannot_be_made_of_is_refused(arguments, message):
    with refused(message):
        fl.follow(problems.load("digits"), steps=1, **arguments)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"optimizer": []}, "no optimizer was given"),
        ({"optimizer": {}}, "no optimizer was given"),
        ({"seeds": 3}, "a list of seeds is expected"),
    ],
)
def test_what_a_search_cannot_be_made_of_is_refused(arguments, message):
    with refused(message):
        fl.tune("digits", **{"optimizer": "adam", "steps": 1} | arguments)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"likelihood": "categorical"}, "likelihood='categorical': a value is expected"),
        ({"approximator": None}, "approximator=None: a name or a value"),
        ({"approximator": fl.KFAC}, "the class KFAC was given; a value is expected"),
        ({"approximator": 3}, "int was given; a name, a value"),
        ({"fallback": 1}, "int was given; a name, a value"),
        ({"fisher": "exact"}, "fisher='exact': a value"),
        ({"clip": 1.0}, "clip=1.0; KLClip"),
    ],
)
def test_what_an_optimiser_cannot_be_made_of_is_refused_when_it_is_made(arguments, message):
    """It was taken, and the first step ended in an error of Python's."""
    usual = {"likelihood": fl.Gaussian(), "approximator": "kfac", "lr": 0.1, "damping": 0.1}
    with refused(message):
        fl.NaturalGradient(torch.nn.Linear(2, 2), **usual | arguments)
    if "clip" not in arguments:
        usual = {"likelihood": fl.Gaussian()}
        with refused(message):
            fl.AdaptiveKFAC(torch.nn.Linear(2, 2), **usual | arguments)


@pytest.mark.parametrize("arguments", [{"search": "greedy"}, {"momentum": 0.9}])
def test_adaptive_kfac_refuses_what_is_no_search_and_no_truth_value(arguments):
    with refused(r"GreedySearch\(\) or None"):
        fl.AdaptiveKFAC(torch.nn.Linear(2, 2), fl.Gaussian(), **arguments)
