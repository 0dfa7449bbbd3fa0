"""Every damping at every operator: one type, read at one door, against dense solves."""

import numpy as np
import pytest
import torch
from torch import nn

import fisherlab as fl
from fisherlab.operators.dampings import parsed, tikhonov

METHODS = {**fl.approximators(), **fl.preconditioners()}
LAMBDA = 0.5  # exact in every precision
SCALARS = {
    "float": LAMBDA,
    "numpy float32": np.float32(LAMBDA),
    "numpy float64": np.float64(LAMBDA),
    "numpy without dimensions": np.array(LAMBDA),
    "tensor float32": torch.tensor(LAMBDA),
    "tensor float64": torch.tensor(LAMBDA, dtype=torch.float64),
    "Tikhonov": fl.Tikhonov(LAMBDA),
}
REFUSED = {
    "negative": -1.0,
    "infinite": float("inf"),
    "not a number": float("nan"),
    "two numbers": torch.ones(2),
}


@pytest.fixture(scope="module")
def layer():
    generator = torch.Generator().manual_seed(3)
    model = nn.Linear(4, 3).double()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.copy_(torch.randn(parameter.shape, generator=generator))
    x = torch.randn(30, 4, generator=generator).double()
    y = torch.randint(0, 3, (30,), generator=generator)
    return fl.collect(model, (x, y), fl.Categorical(), fl.Empirical())["weight"]


@pytest.fixture(scope="module")
def weight():
    generator = torch.Generator().manual_seed(4)
    return torch.randn(3, 5, generator=generator).double()


BUILT = {}


def built(method, layer):
    if method not in BUILT:
        try:
            BUILT[method] = METHODS[method](layer)
        except fl.FisherlabError as error:
            pytest.skip(str(error))
    return BUILT[method]


@pytest.mark.parametrize("method", METHODS)
def test_every_scalar_is_the_same_damping_at_every_operator(method, layer, weight):
    op = built(method, layer)
    dense = op.to_dense()
    expected = op.solve(weight, LAMBDA)
    inverse = op.inverse(LAMBDA).to_dense()
    logdet = op.logdet(LAMBDA)
    if not getattr(op, "solver", None):  # matrices that are inverses solve as themselves
        eye = torch.eye(len(dense)).double()
        oracle = torch.linalg.solve(dense + LAMBDA * eye, weight.flatten())
        torch.testing.assert_close(expected.flatten(), oracle, rtol=1e-7, atol=1e-9)
    for name, scalar in SCALARS.items():
        solved = op.solve(weight, scalar)
        assert solved.dtype == weight.dtype, name
        assert torch.equal(solved, expected), name
        assert torch.equal(op.inverse(scalar).to_dense(), inverse), name
        found = op.logdet(scalar)
        assert (type(found), found) == (float, logdet), name


@pytest.mark.parametrize("method", METHODS)
def test_a_relative_damping_is_a_share_of_the_mean_eigenvalue(method, layer, weight):
    op = built(method, layer)
    mean = op.trace() / op.shape[0]
    if mean <= 0:
        pytest.skip("no positive trace")
    found = op.solve(weight, fl.RelativeDamping(0.1))
    torch.testing.assert_close(found, op.solve(weight, 0.1 * mean))


@pytest.mark.parametrize("what", REFUSED)
@pytest.mark.parametrize("method", ["exact", "kfac", "diagonal", "mini-block", "low-rank"])
def test_what_is_no_damping_is_refused_in_a_sentence(method, what, layer, weight):
    op = METHODS[method](layer)
    for call in (op.inverse, op.logdet, lambda d: op.solve(weight, d)):
        with pytest.raises(ValueError, match="finite number of at least 0"):
            call(REFUSED[what])


@pytest.mark.parametrize("method", METHODS)
def test_a_factored_damping_shifts_factors_or_is_refused(method, layer, weight):
    op, damping = built(method, layer), fl.Factored(LAMBDA)
    if not hasattr(op, "damped"):
        with pytest.raises(ValueError, match="Kronecker"):
            op.solve(weight, damping)
        return
    if len(getattr(op, "terms", ())) > 2:
        with pytest.raises(ValueError, match="terms"):
            op.damped(damping)
        return
    law = op.damped(damping).to_dense()
    oracle = torch.linalg.solve(law, weight.flatten())
    torch.testing.assert_close(op.solve(weight, damping).flatten(), oracle)


def test_a_tensor_changed_in_place_is_a_new_damping(layer):
    block, damping = METHODS["exact"](layer), torch.tensor(0.5).double()
    first = block.inverse(damping).trace()
    damping.mul_(2)
    assert block.inverse(damping).trace() == METHODS["exact"](layer).inverse(1.0).trace()
    assert block.inverse(0.5).trace() == first


def test_the_door_reads_one_type():
    assert parsed(np.float32(0.5), None) == fl.Tikhonov(0.5)
    assert type(tikhonov(np.float64(0.5), None)) is float
    with pytest.raises(ValueError, match="one fraction"):
        tikhonov(fl.RelativeDamping([0.1, 0.2]), None)
