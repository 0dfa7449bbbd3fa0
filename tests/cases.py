"""The cross product that the laws run over: layers, likelihoods, Fishers, samples."""

from __future__ import annotations

import itertools
from dataclasses import dataclass
from functools import cache, partial

import pytest
import torch
from jaxtyping import TypeCheckError
from torch import nn

import fisherlab as fl
from fisherlab.layers import Block
from fisherlab.samples import MatrixSamples, OuterSamples, SharedSamples

EXAMPLES = 5
LIKELIHOODS = {
    "categorical": fl.Categorical(),
    "bernoulli": fl.Bernoulli(),
    "gaussian": fl.Gaussian(variance=0.7),
}
FISHERS = {
    "exact": fl.Exact(),
    "monte-carlo": fl.MonteCarlo(samples=2, seed=3),
    "empirical": fl.Empirical(),
}
METHODS = fl.approximators()


class Twice(nn.Module):
    """One linear map used at two depths."""

    def __init__(self):
        super().__init__()
        self.map, self.last = nn.Linear(3, 3), nn.Linear(3, 3)

    def forward(self, x):
        return self.last(torch.tanh(self.map(torch.tanh(self.map(x)))))


@dataclass(frozen=True)
class Case:
    """A model, the block of it that is looked at, and the shape of one example."""

    model: object
    block: str
    example: tuple[int, ...]
    shared: bool = True

    def make(self):
        """Return the model in float64, its weights from a fixed seed."""
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(1)
            return self.model().double()

    def inputs(self, examples=EXAMPLES):
        return normal(examples, *self.example, seed=2)


def normal(*shape, seed=0):
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(*shape, generator=generator, dtype=torch.float64)


def _dense(*sizes, bias=True):
    layers = []
    for a, b in itertools.pairwise(sizes):
        layers += [nn.Linear(a, b, bias=bias), nn.Tanh()]
    return nn.Sequential(*layers[:-1])


def _conv(features, **options):
    conv = nn.Conv2d(2, 2, **options)
    return nn.Sequential(conv, nn.Tanh(), nn.Flatten(), nn.Linear(features, 3))


def _norm():
    return nn.Sequential(nn.Linear(4, 3), nn.LayerNorm(3), nn.Tanh(), nn.Linear(3, 3))


LAYERS = {
    "linear": Case(partial(_dense, 4, 3, 3), "0", (4,)),
    "linear without bias": Case(partial(_dense, 4, 3, 3, bias=False), "0", (4,)),
    "last": Case(partial(_dense, 4, 2, 3), "2", (4,)),
    "conv strided padded": Case(
        partial(_conv, 8, kernel_size=2, stride=(2, 3), padding=1), "0", (2, 3, 4)
    ),
    "conv dilated without bias": Case(
        partial(_conv, 8, kernel_size=2, dilation=(1, 2), bias=False), "0", (2, 3, 4)
    ),
    "tokens": Case(partial(_dense, 3, 2, 3), "0", (2, 3)),
    "norm": Case(_norm, "1", (4,), shared=False),
    "used twice": Case(Twice, "map", (3,)),
    "one by one": Case(partial(_dense, 1, 1, 3, bias=False), "0", (1,)),
    "one input": Case(partial(_dense, 1, 3, 3, bias=False), "0", (1,)),
    "one output": Case(partial(_dense, 3, 1, 3), "0", (3,)),
}
SHARED = {name: case for name, case in LAYERS.items() if case.shared}


def labels(likelihood, shape, seed=4):
    """Return labels that fit an output of the given shape."""
    generator = torch.Generator().manual_seed(seed)
    if isinstance(likelihood, fl.Categorical):
        return torch.randint(0, shape[-1], shape[:-1], generator=generator)
    if isinstance(likelihood, fl.Bernoulli):
        return torch.rand(shape, generator=generator, dtype=torch.float64)
    return normal(*shape, seed=seed)


def data(case, likelihood, examples=EXAMPLES):
    model, x = case.make(), case.inputs(examples)
    return model, x, labels(likelihood, model(x).shape)


@cache
def statistics(layer, likelihood="categorical", fisher="exact", examples=EXAMPLES):
    """Return the statistics of one case; immutable, so made once."""
    case = LAYERS[layer]
    model, x, y = data(case, LIKELIHOODS[likelihood], examples)
    found = fl.collect(
        model, (x, y), LIKELIHOODS[likelihood], FISHERS[fisher], layers=[case.block]
    )
    return found[case.block]


def outer(v, n, o, i, seed=0):
    return OuterSamples(normal(n, i, seed=seed), normal(v, n, o, seed=seed + 1))


def shared(v, n, t, o, i, seed=0):
    return SharedSamples(normal(n, t, i, seed=seed), normal(v, n, t, o, seed=seed + 1))


def matrices(v, n, o, i, seed=0):
    return MatrixSamples(normal(v, n, o, i, seed=seed))


def layer_statistics(samples):
    """Wrap samples as the statistics of a block without bias."""
    o, i = samples.weight_shape
    block = Block("layer", "layer.weight", None, (o, i), o)
    n = samples.examples
    if isinstance(samples, OuterSamples):
        held = {
            "inputs": samples.inputs[:, None],
            "gradients": samples.gradients[:, :, None],
            "positions": n,
        }
    elif isinstance(samples, SharedSamples):
        held = {
            "inputs": samples.inputs,
            "gradients": samples.gradients,
            "positions": n * samples.inputs.shape[1],
        }
    else:
        held = {"matrices": samples.stored, "positions": n}
    return fl.LayerStatistics(block, n, **held)


def refused(message):
    """Expect a refusal in this sentence, or that of the check of types where that is on."""
    kinds = ValueError, TypeError, TypeCheckError
    return pytest.raises(kinds, match=rf"{message}|^Type-check error")
