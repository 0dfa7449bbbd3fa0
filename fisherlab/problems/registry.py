"""The problems by name."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Final

import torch
from torch import nn

from fisherlab.likelihoods import Bernoulli, Categorical, Likelihood
from fisherlab.problems.data import (
    FASHION_MNIST,
    MNIST,
    digits,
    reconstructions,
    small_images,
)
from fisherlab.problems.files import DataFile
from fisherlab.problems.networks import perceptron
from fisherlab.problems.problem import Pair, Problem


@dataclass(frozen=True)
class Description:
    """Describe a problem without loading it.

    Attributes
    ----------
    name
        The name to load it by.
    summary
        The data, in one line.
    network
        The network, in one line.
    source
        Who used or published it.
    files
        The data files it reads; empty if it needs none.
    likelihood
        What the network's output means.
    data
        Gives the training and the test pair from (data_dir, dtype).
    build
        Gives the network from the keywords seed and dtype.
    """

    name: str
    summary: str
    network: str
    source: str
    files: tuple[DataFile, ...]
    likelihood: Likelihood
    data: Callable[[Path | None, torch.dtype], tuple[Pair, Pair]]
    build: Callable[..., nn.Module]


_CLASSIFIER: Final = partial(perceptron, (256, 20, 20, 20, 20, 20, 10), "tanh")
_AUTOENCODER: Final = partial(
    perceptron, (784, 1000, 500, 250, 30, 250, 500, 1000, 784), "relu", linear=(4,)
)
_CLASSIFIER_LINE: Final = "256-20-20-20-20-20-10, tanh"

_ALL: Final = (
    Description(
        name="digits",
        summary="1,797 handwritten digits of scikit-learn, 16 x 16 (no files needed)",
        network=_CLASSIFIER_LINE,
        source="network of Martens & Grosse 2015; data of Alpaydin & Kaynak 1998",
        files=(),
        likelihood=Categorical(),
        data=digits,
        build=_CLASSIFIER,
    ),
    Description(
        name="mnist",
        summary="70,000 handwritten digits reduced to 16 x 16",
        network=_CLASSIFIER_LINE,
        source="network of Martens & Grosse 2015; data of LeCun et al. 1998",
        files=MNIST,
        likelihood=Categorical(),
        data=partial(small_images, MNIST),
        build=_CLASSIFIER,
    ),
    Description(
        name="fashion-mnist",
        summary="70,000 images of clothing reduced to 16 x 16",
        network=_CLASSIFIER_LINE,
        source="network of Martens & Grosse 2015; data of Xiao et al. 2017",
        files=FASHION_MNIST,
        likelihood=Categorical(),
        data=partial(small_images, FASHION_MNIST),
        build=_CLASSIFIER,
    ),
    Description(
        name="mnist-autoencoder",
        summary="70,000 handwritten digits of 28 x 28, reconstructed",
        network="784-1000-500-250-30-250-500-1000-784, ReLU, linear code",
        source="Hinton & Salakhutdinov 2006; ReLU form of Bahamou et al. 2022",
        files=MNIST,
        likelihood=Bernoulli(),
        data=partial(reconstructions, MNIST),
        build=_AUTOENCODER,
    ),
)
_PROBLEMS: Final = {description.name: description for description in _ALL}


def names() -> tuple[str, ...]:
    """Return the names of the problems.

    Examples
    --------
    >>> import fisherlab as fl
    >>> fl.problems.names()
    ('digits', 'mnist', 'fashion-mnist', 'mnist-autoencoder')
    """
    return tuple(_PROBLEMS)


def describe(name: str) -> Description:
    """Return the description of a problem.

    Raises
    ------
    ValueError
        If no problem has that name.

    Examples
    --------
    >>> import fisherlab as fl
    >>> fl.problems.describe("digits").network
    '256-20-20-20-20-20-10, tanh'
    """
    if name not in _PROBLEMS:
        raise ValueError(
            f"There is no problem {name!r}. The problems are {', '.join(_PROBLEMS)}."
        )
    return _PROBLEMS[name]


def load(
    name: str,
    data_dir: str | Path | None = None,
    seed: int = 0,
    dtype: torch.dtype = torch.float64,
) -> Problem:
    """Load the data of a problem and build its network.

    Parameters
    ----------
    name
        One of `names()`.
    data_dir
        The folder that holds the problem's folder (such as `mnist`), or that folder
        itself. If given, files are looked for nowhere else; without it they are looked
        for in `$FISHERLAB_DATA`, then in the cache folder of the platform.
    seed
        Decides the initial weights; the global random generator is left alone.
    dtype
        Of data and weights. Analysis is done best in float64.

    Raises
    ------
    ValueError
        If no problem has that name.
    DataError
        If a data file is missing or is not the published one.

    Examples
    --------
    >>> import fisherlab as fl
    >>> x, y = fl.problems.load("digits").train
    >>> x.shape, y.shape
    (torch.Size([1438, 256]), torch.Size([1438]))
    """
    description = describe(name)
    train, test = description.data(None if data_dir is None else Path(data_dir), dtype)
    model = description.build(seed=seed, dtype=dtype)
    return Problem(name, model, description.likelihood, train, test)
