"""The model, the global generator and the default dtype are left as they were found."""

import pytest
import torch
from torch import nn

import fisherlab as fl
from tests import cases
from tests.oracles import assert_close

FISHERS = pytest.mark.parametrize("fisher", cases.FISHERS)


def dense(model, data, likelihood, fisher=None, **options):
    found = fl.collect(model, data, likelihood, fisher, **options)
    return {name: fl.ExactBlock()(layer).to_dense() for name, layer in found.items()}


def assert_same(actual, expected):
    assert list(actual) == list(expected)
    for name in expected:
        assert_close(actual[name], expected[name], 1e-12)


class Watched(nn.Module):
    """Everything that a careless collector would change."""

    def __init__(self):
        super().__init__()
        self.body = nn.Sequential(nn.Conv1d(1, 2, 2), nn.BatchNorm1d(2), nn.Dropout(0.5))
        self.head, self.drop = nn.Linear(4, 2), nn.Dropout(0.2)
        self.fails = False

    def forward(self, x):
        if self.fails and x.shape[0] > 2:
            raise RuntimeError("in the middle")
        return self.head(self.drop(self.body(x).flatten(1)))


def watched():
    model = Watched()
    model.train()
    model.body.eval()
    model.drop.eval()
    model.head.bias.requires_grad_(False)
    model.register_forward_hook(lambda *_: None)
    for parameter in model.parameters():
        parameter.grad = torch.ones_like(parameter)
    return model


def snapshot(model):
    modules = list(model.modules())
    return {
        "hooks": [(len(m._forward_hooks), len(m._forward_pre_hooks)) for m in modules],
        "modes": [m.training for m in modules],
        "tensors": [(id(p), p.dtype, p.requires_grad) for p in model.parameters()],
        "buffers": [(id(b), b.dtype) for b in model.buffers()],
        "attributes": [sorted(m.__dict__) for m in modules],
    }


def values(model):
    grads = [p.grad.clone() for p in model.parameters()]
    return [t.clone() for t in model.state_dict().values()] + grads


@FISHERS
@pytest.mark.parametrize("dtype", [None, torch.float64])
def test_the_model_is_left_as_it_was_found(fisher, dtype):
    model = watched()
    before, held = snapshot(model), values(model)
    x, y = cases.normal(4, 1, 3).float(), torch.tensor([0, 1, 0, 1])
    fl.collect(model, (x, y), fl.Categorical(), cases.FISHERS[fisher], dtype=dtype)
    fl.mean_gradient(model, (x, y), fl.Categorical(), dtype=dtype)
    assert snapshot(model) == before
    assert all(torch.equal(a, b) for a, b in zip(values(model), held, strict=True))


@pytest.mark.parametrize("wrong", ["label", "forward", "budget"])
def test_the_model_is_left_as_it_was_found_after_an_error(wrong):
    model = watched()
    before, held = snapshot(model), values(model)
    x, y = (
        cases.normal(4, 1, 3).float(),
        torch.tensor([0, 1, 0, 9 if wrong == "label" else 1]),
    )
    model.fails = wrong == "forward"
    with pytest.raises((ValueError, RuntimeError, fl.BudgetError)):
        fl.collect(
            model, (x, y), fl.Categorical(), budget=50 if wrong == "budget" else None
        )
    model.fails = False
    assert snapshot(model) == before
    assert all(torch.equal(a, b) for a, b in zip(values(model), held, strict=True))


def test_the_global_generator_is_neither_read_nor_changed():
    model, x, y = cases.data(cases.LAYERS["linear"], fl.Categorical())

    def run(seed):
        torch.manual_seed(seed)
        before = torch.get_rng_state()
        found = fl.collect(model, (x, y), fl.Categorical(), fl.MonteCarlo(2))
        for method in cases.METHODS.values():
            method(found["0"])
        assert torch.equal(torch.get_rng_state(), before)
        return found["0"].gradients

    with torch.random.fork_rng(devices=[]):
        assert torch.equal(run(0), run(1))


@pytest.mark.parametrize("default", [torch.float32, torch.float64])
def test_the_default_dtype_is_not_used(default):
    model, x, y = cases.data(cases.LAYERS["conv strided padded"], fl.Bernoulli())
    expected = dense(model, (x, y), fl.Bernoulli(), fl.MonteCarlo(2))
    before = torch.get_default_dtype()
    torch.set_default_dtype(default)
    try:
        found = dense(model, (x, y), fl.Bernoulli(), fl.MonteCarlo(2))
        single = fl.collect(model.float(), (x, y), fl.Bernoulli())
    finally:
        torch.set_default_dtype(before)
    assert_same(found, expected)
    assert {s.dtype for s in single.values()} == {torch.float32}


def test_a_float32_model_can_be_analysed_in_float64():
    model, x, y = cases.data(cases.LAYERS["conv strided padded"], fl.Categorical())
    single = model.float()
    found = dense(single, (x, y), fl.Categorical(), dtype=torch.float64)
    assert {p.dtype for p in single.parameters()} == {torch.float32}
    assert_same(found, dense(model.double(), (x, y), fl.Categorical()))
