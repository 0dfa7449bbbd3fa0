"""Parts of data sets."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import torch

from fisherlab.problems.problem import Pair

Data = Callable[[Path | None, torch.dtype], tuple[Pair, Pair]]


def validation(
    data: Data, count: int, data_dir: Path | None, dtype: torch.dtype
) -> tuple[Pair, Pair]:
    """Keep `count` random training examples; the others take the place of the test set.

    The choice is the same at every call.
    """
    (x, y), _ = data(data_dir, dtype)
    order = torch.randperm(len(x), generator=torch.Generator().manual_seed(0))
    kept, held = order[:count].sort().values, order[count:].sort().values
    if y is x:  # an autoencoder: its targets need no memory of their own
        x, x_held = x[kept], x[held]
        return (x, x), (x_held, x_held)
    return (x[kept], y[kept]), (x[held], y[held])


def drawn(pair: Pair, examples: int | None, seed: int = 0) -> Pair:
    """Return a random part of at most so many examples, in the order of the data set.

    Data sets are ordered (FACES by person), so that the first examples say little of the
    rest. The choice depends on the seed and the sizes alone; None means all.

    Examples
    --------
    >>> x = torch.arange(7)
    >>> drawn((x, x), 3)[0].diff().min() > 0
    tensor(True)
    """
    x, y = pair
    if examples is None or examples >= len(x):
        return pair
    order = torch.randperm(len(x), generator=torch.Generator().manual_seed(seed))
    chosen = order[:examples].sort().values.to(x.device)
    part = x[chosen]
    return part, part if y is x else y[chosen.to(y.device)]


def thinned(pair: Pair, examples: int) -> Pair:
    """Return at most so many examples, evenly spaced in the order of the data set.

    Examples
    --------
    >>> x = torch.arange(7)
    >>> thinned((x, x), 3)[0]
    tensor([0, 2, 4])
    """
    x, y = pair
    if examples >= len(x):
        return pair
    chosen = torch.arange(examples) * len(x) // examples
    part = x[chosen]
    return part, part if y is x else y[chosen]
