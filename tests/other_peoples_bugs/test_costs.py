"""What other people waited for: work that grew with the precision, the form or the size."""

from dataclasses import replace

import pytest
import torch
from torch import nn

import fisherlab as fl

KRYLOV = ["kpsvd", "kpsvd-2", "deflation", "kfac-corrected"]


def convolution():
    return nn.Sequential(
        nn.Conv2d(3, 20, 3, padding=1),
        nn.ReLU(),
        nn.Conv2d(20, 32, 3, padding=1),
        nn.ReLU(),
        nn.AdaptiveAvgPool2d(1),
        nn.Flatten(),
        nn.Linear(32, 10),
    )


def sequence():
    return nn.Sequential(nn.Linear(20, 32), nn.Tanh(), nn.Linear(32, 30))


SHARED = {"convolution": (convolution, (16, 3, 8, 8)), "sequence": (sequence, (16, 9, 20))}


def shared_layer(kind):
    """Statistics of a shared layer in float32, and the same numbers in float64."""
    torch.manual_seed(0)
    net, shape = SHARED[kind][0](), SHARED[kind][1]
    data = (torch.randn(shape), None)
    single = fl.collect(net, data, fl.Categorical(), fl.MonteCarlo(1), layers=["2"])["2"]
    wide = replace(
        single, inputs=single.inputs.double(), gradients=single.gradients.double()
    )
    return single, wide


@pytest.mark.parametrize("kind", SHARED)
@pytest.mark.parametrize("name", KRYLOV)
def test_shared_layers_converge_in_float32(kind, name):
    """In float32 it took 1,000 products and did not converge where float64 took 8."""
    single, wide = (fl.approximators()[name](s) for s in shared_layer(kind))
    assert single.converged
    assert wide.converged
    assert single.iterations <= wide.iterations + 8
    torch.testing.assert_close(
        single.singular_values.double(),
        wide.singular_values,
        rtol=0,
        atol=1e-5 * float(wide.singular_values[0]),
    )
