"""Modules under two names, forward passes that draw, labels that fit by chance."""

import pytest
import torch
import torch.nn.functional as F
from torch import nn

import fisherlab as fl
from tests.oracles import assert_close


class Aliased(nn.Module):
    """One module of a network, reachable under a second name."""

    def __init__(self, body, place):
        super().__init__()
        self.body = body
        self.also = body[place]

    def forward(self, x):
        return self.body(x)


class Shared(nn.Module):
    """One layer used under two names."""

    def __init__(self):
        super().__init__()
        self.a = nn.Linear(4, 4)
        self.b, self.o = self.a, nn.Linear(4, 3)

    def forward(self, x):
        return self.o(torch.tanh(self.b(torch.tanh(self.a(x)))))


def perceptron():
    return nn.Sequential(nn.Linear(4, 5), nn.BatchNorm1d(5), nn.Tanh(), nn.Linear(5, 3))


def thrice():
    layer = nn.Linear(4, 4)
    layers = nn.ModuleList([layer] * 3)
    return nn.Sequential(*layers, nn.Linear(4, 3))


ALIASED = {
    "a layer": lambda: Aliased(perceptron(), 3),
    "batch norm": lambda: Aliased(perceptron(), 1),
    "used twice": Shared,
    "a list of one": thrice,
}


def slots(model):
    return [
        (name, held_name, id(tensor), type(tensor), getattr(tensor, "requires_grad", None))
        for name, module in model.named_modules(remove_duplicate=False)
        for held in (module._parameters, module._buffers)
        for held_name, tensor in held.items()
    ]


CALLS = {
    "collect": lambda m, d: fl.collect(m, d, fl.Categorical()),
    "collect in float32": lambda m, d: fl.collect(
        m, d, fl.Categorical(), dtype=torch.float32
    ),
    "mean gradient": lambda m, d: fl.mean_gradient(m, d, fl.Categorical()),
    "coverage": lambda m, d: fl.coverage(m, d[0]),
    "estimate": lambda m, d: fl.estimate(m, d, fl.Categorical(), ["kfac"]),
    "approximate": lambda m, d: fl.approximate(m, d, fl.Categorical(), ["diagonal"]),
    "an exception": lambda m, d: fl.collect(m, (d[0], d[1] + 9), fl.Categorical()),
}


@pytest.mark.parametrize("call", CALLS)
@pytest.mark.parametrize("name", ALIASED)
def test_a_module_under_two_names_keeps_its_parameters(name, call):
    torch.manual_seed(0)
    model = ALIASED[name]().double().eval()
    data = torch.randn(6, 4).double(), torch.randint(0, 3, (6,))
    before = slots(model)
    try:
        CALLS[call](model, data)
    except ValueError:
        assert call == "an exception"
    assert slots(model) == before


@pytest.mark.parametrize("name", ["a layer", "batch norm"])
def test_a_module_under_two_names_has_the_fisher_of_one(name):
    torch.manual_seed(0)
    model = ALIASED[name]().double().eval()
    data = torch.randn(6, 4).double(), None
    found = fl.collect(model, data, fl.Categorical())
    plain = fl.collect(model.body, data, fl.Categorical())
    for layer in plain.values():
        other = fl.ExactBlock()(found[f"body.{layer.name}"])
        assert_close(other.to_dense(), fl.ExactBlock()(layer).to_dense(), 1e-12)


class Drawing(nn.Module):
    def __init__(self, draw):
        super().__init__()
        self.first, self.last, self.draw = nn.Linear(4, 4), nn.Linear(4, 3), draw

    def forward(self, x):
        return self.last(self.draw(torch.tanh(self.first(x)), self.training))


def seldom(h, training):
    """Drop the whole layer once in a thousand times: two outputs tell nothing."""
    return h * (torch.rand(()) < 0.999) if training else h


DRAWS = {
    "functional dropout": lambda h, training: F.dropout(h, 0.5, training),
    "noise": lambda h, training: h + training * torch.randn_like(h) if training else h,
    "stochastic depth": seldom,
}


@pytest.mark.draws("the model, before it is refused")
@pytest.mark.parametrize("draw", DRAWS)
@pytest.mark.parametrize("call", ["collect", "mean gradient", "approximate"])
def test_a_forward_pass_that_draws_is_refused_and_the_generator_put_back(draw, call):
    torch.manual_seed(0)
    model = Drawing(DRAWS[draw]).double().train()
    data = torch.randn(6, 4).double(), torch.randint(0, 3, (6,))
    before = torch.get_rng_state()
    with pytest.raises(fl.UnsupportedModelError, match=r"draws random numbers.*frozen"):
        CALLS[call](model, data)
    assert torch.equal(torch.get_rng_state(), before)
    with fl.frozen(model):
        CALLS[call](model, data)


@pytest.mark.parametrize("method", ["kfac", "mini-block-mean", "shampoo-mean", "adam"])
@pytest.mark.parametrize("steps_before", [0, 1])
def test_labels_that_would_broadcast_are_refused_in_every_step(method, steps_before):
    torch.manual_seed(0)
    x, y = torch.randn(8, 4), torch.randn(8, 1)
    optimiser = fl.NaturalGradient(
        nn.Linear(4, 1), fl.Gaussian(), method, lr=0.01, damping=0.1
    )
    for _ in range(steps_before):
        optimiser.step(batch=(x, y))
    with pytest.raises(ValueError, match="labels of shape"):
        optimiser.step(batch=(x, y[:, 0]))
