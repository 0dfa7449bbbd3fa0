"""Fully connected networks of the papers, and initial weights from a seed."""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Callable, Sequence
from functools import partial
from itertools import pairwise
from typing import Final, Literal, TypeVar

import torch
from torch import Generator, Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm

Network = TypeVar("Network", bound=nn.Module)
Draw = Callable[[Tensor, Generator], object]


def built(
    make: Callable[[], Network],
    draw: Draw,
    *,
    seed: int,
    dtype: torch.dtype,
    bias: float = 0.0,
) -> Network:
    """Build a network whose weights are drawn from a generator of their own.

    Weights are drawn in the order of `modules()`; norm layers begin as the identity.
    The network comes in evaluation mode. The global random generator is neither read
    nor changed: the constructors of torch would draw from it, so the network is made
    without memory first and filled afterwards.

    Parameters
    ----------
    make
        Makes the network. Only norm layers may hold buffers.
    draw
        Fills a weight in place, given the generator.
    seed
        Decides the weights.
    dtype
        Of weights and buffers.
    bias
        The value of every bias.

    Examples
    --------
    >>> make = lambda: nn.Sequential(nn.Linear(2, 3), nn.BatchNorm1d(3))
    >>> model = built(make, glorot_uniform(), seed=0, dtype=torch.float64)
    >>> model[0].bias.tolist(), model[1].weight.tolist()
    ([0.0, 0.0, 0.0], [1.0, 1.0, 1.0])
    """
    with torch.device("meta"):
        model = make()
    model = model.to_empty(device="cpu").to(dtype)
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for module in model.modules():
            _fill(module, draw, generator, bias)
    return model.eval()


def _fill(module: nn.Module, draw: Draw, generator: Generator, bias: float) -> None:
    if isinstance(module, _BatchNorm | nn.LayerNorm):
        module.reset_parameters()
        return
    assert not list(module.buffers(recurse=False)), "there is no rule to fill a buffer"
    for name, parameter in module.named_parameters(recurse=False):
        if name == "bias":
            parameter.fill_(bias)
        else:
            draw(parameter, generator)


def glorot_uniform(gain: float = 1.0) -> Draw:
    """Return a draw from U(±gain·√(6 / (fan_in + fan_out))).

    References
    ----------
    Glorot & Bengio, "Understanding the difficulty of training deep feedforward neural
    networks", 2010, eq. 16.
    """
    return partial(_draw, partial(nn.init.xavier_uniform_, gain=gain))


def he_normal() -> Draw:
    """Return a draw from N(0, 2 / fan_in).

    References
    ----------
    He et al., "Delving deep into rectifiers", 2015, eq. 10.
    """
    return partial(_draw, partial(nn.init.kaiming_normal_, nonlinearity="relu"))


def normal(deviation: float) -> Draw:
    """Return a draw from N(0, deviation²)."""
    return partial(_draw, partial(nn.init.normal_, std=deviation))


def _draw(rule: Callable[..., Tensor], weight: Tensor, generator: Generator) -> None:
    rule(weight, generator=generator)


@torch.no_grad()
def settle(model: nn.Module, x: Tensor) -> None:
    """Give batch norm the statistics of a batch, in evaluation mode too.

    Fresh running statistics (mean 0, variance 1) are those of no data: without this, an
    untrained network in evaluation mode is another one than in training. A model
    without batch norm is left alone.

    Parameters
    ----------
    model
        Changed in place; left in evaluation mode.
    x
        Inputs of the model.

    Examples
    --------
    >>> model = nn.Sequential(nn.BatchNorm1d(1))
    >>> settle(model, torch.tensor([[2.0], [4.0]]))
    >>> model[0].running_mean, model.training
    (tensor([3.]), False)
    """
    norms = [module for module in model.modules() if isinstance(module, _BatchNorm)]
    if not norms:
        return
    momenta = [norm.momentum for norm in norms]
    for norm in norms:
        norm.reset_running_stats()
        norm.momentum = None  # average all batches, of which there is one
    model.train()(x)
    for norm, momentum in zip(norms, momenta, strict=True):
        norm.momentum = momentum
    model.eval()


Activation = Literal["tanh", "relu"]

_ACTIVATIONS: Final[dict[str, type[nn.Module]]] = {"tanh": nn.Tanh, "relu": nn.ReLU}
# A ReLU passes half of the variance of its input, so its weights carry twice as much.
_GAINS: Final[dict[str, float]] = {"tanh": 1.0, "relu": 2.0**0.5}


def perceptron(
    widths: Sequence[int],
    activation: Activation,
    *,
    linear: Sequence[int] = (),
    gain: float | None = None,
    bias: float = 0.0,
    seed: int = 0,
    dtype: torch.dtype = torch.float64,
) -> nn.Sequential:
    """Build a fully connected network with named layers `fc1`, `fc2`, ….

    Weights are uniform in ±gain·√(6 / (d_in + d_out)). The last layer has no
    activation. The global random generator is neither read nor changed.

    Parameters
    ----------
    widths
        Sizes of the input, of every layer in turn, and of the output.
    activation
        The function after every layer but the last.
    linear
        Numbers of further layers without an activation, counted from 1.
    gain
        Scales the weights; None means 1 for tanh and √2 for ReLU.
    bias
        The initial value of every bias.
    seed
        Decides the weights.
    dtype
        Of the weights.

    References
    ----------
    Glorot & Bengio, "Understanding the difficulty of training deep feedforward neural
    networks", 2010, eq. 16.

    Examples
    --------
    >>> perceptron([4, 3, 2], "tanh")
    Sequential(
      (fc1): Linear(in_features=4, out_features=3, bias=True)
      (tanh1): Tanh()
      (fc2): Linear(in_features=3, out_features=2, bias=True)
    )
    """

    def make() -> nn.Sequential:
        return _layers(widths, activation, {*linear, len(widths) - 1})

    draw = glorot_uniform(_GAINS[activation] if gain is None else gain)
    return built(make, draw, seed=seed, dtype=dtype, bias=bias)


def _layers(widths: Sequence[int], activation: Activation, bare: set[int]) -> nn.Sequential:
    modules: OrderedDict[str, nn.Module] = OrderedDict()
    for k, (d_in, d_out) in enumerate(pairwise(widths), start=1):
        modules[f"fc{k}"] = nn.Linear(d_in, d_out)
        if k not in bare:
            modules[f"{activation}{k}"] = _ACTIVATIONS[activation]()
    return nn.Sequential(modules)
