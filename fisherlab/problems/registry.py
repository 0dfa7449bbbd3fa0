"""The problems by name."""

from __future__ import annotations

from pathlib import Path
from typing import Final

import torch

from fisherlab.errors import meant
from fisherlab.problems.descriptions import DESCRIPTIONS, Description
from fisherlab.problems.files import fetch
from fisherlab.problems.networks import settle
from fisherlab.problems.problem import Problem, thinned

# Training examples that give batch norm its first running statistics.
_SETTLING: Final = 64

_PROBLEMS: Final = {description.name: description for description in DESCRIPTIONS}


def names() -> tuple[str, ...]:
    """Return the names of the problems.

    Examples
    --------
    >>> import fisherlab as fl
    >>> fl.problems.names()[:4]
    ('digits', 'mnist', 'fashion-mnist', 'fashion-mnist-cnn')
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
            + meant(name, _PROBLEMS)
        )
    return _PROBLEMS[name]


def load(
    name: str,
    data_dir: str | Path | None = None,
    seed: int = 0,
    dtype: torch.dtype = torch.float64,
    examples: int | None = None,
) -> Problem:
    """Load the data of a problem and build its network.

    Batch norm starts with the statistics of 64 training examples, so that the untrained
    network can be analysed in evaluation mode.

    The largest data sets take memory: in float64, FACES 0.7 GB, CIFAR 1.5 GB and SVHN
    2.4 GB, in float32 half of it. With `examples`, that much is needed while loading
    only.

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
    examples
        At most so many training and so many test examples, spaced evenly over the
        data set; None means all.

    Raises
    ------
    ValueError
        If no problem has that name, or `examples` is not positive.
    DataError
        If a data file is missing or is not the published one.

    Examples
    --------
    >>> import fisherlab as fl
    >>> x, y = fl.problems.load("digits", examples=100).train
    >>> x.shape, y.shape
    (torch.Size([100, 256]), torch.Size([100]))
    """
    description = describe(name)
    if examples is not None and examples < 1:
        raise ValueError(f"examples={examples} is given; a positive number is expected.")
    with torch.device("cpu"):  # whatever the default device: `Problem.to` moves it
        train, test = description.data(None if data_dir is None else Path(data_dir), dtype)
        if examples is not None:
            train, test = thinned(train, examples), thinned(test, examples)
        model = description.build(seed=seed, dtype=dtype)
        settle(model, thinned(train, _SETTLING)[0])
    return Problem(name, model, description.likelihood, train, test, description.augment)


def download(name: str, data_dir: str | Path | None = None) -> tuple[Path, ...]:
    """Download the data files of a problem that are missing, and verify all of them.

    Needs pooch (`pip install 'fisherlab[data]'`). No other function of fisherlab uses
    the network.

    Parameters
    ----------
    name
        One of `names()`.
    data_dir
        Where `load` shall find them; None means the cache folder of the platform.

    Returns
    -------
    Where each file lies.

    Raises
    ------
    ValueError
        If no problem has that name.
    DataError
        If pooch is not installed, or a file has no public address, cannot be fetched or
        is not the published one.

    Examples
    --------
    >>> import fisherlab as fl
    >>> fl.problems.download("digits")  # needs no files
    ()
    """
    return tuple(fetch(describe(name).files, data_dir))
