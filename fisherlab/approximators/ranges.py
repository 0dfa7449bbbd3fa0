"""Solvers that square their matrices twice, in the range of the numbers at hand."""

from collections.abc import Callable
from functools import wraps
from typing import Any

import torch

from fisherlab.errors import NumericalError
from fisherlab.operators import KroneckerSum, Operator
from fisherlab.statistics.values import LayerStatistics

Call = Callable[..., Operator]
# Sizes of F, or their inverses, whose squares are numbers; of its small parts in float32.
WIDTH = {torch.float32: 1e13, torch.float64: 1e153}


def in_range(call: Call) -> Call:
    """Let a method of float32 samples solve in float64 where squares of F are no numbers.

    Raises
    ------
    NumericalError
        If they are none in float64, either.

    Examples
    --------
    >>> import fisherlab as fl
    >>> data = torch.full((5, 3), 1e-12), None
    >>> layer = fl.collect(torch.nn.Linear(3, 2, bias=False), data, fl.Gaussian())["weight"]
    >>> round(fl.KPSVD()(layer).trace() / fl.ExactBlock()(layer).trace(), 3)
    1.0
    """

    @wraps(call)
    def wrapped(
        self: Any, statistics: LayerStatistics, previous: Operator | None = None
    ) -> Operator:
        single = statistics.dtype != torch.float64
        try:
            found = call(self, statistics, previous)
            if _known(found) or (_empty(found) and _within(_trace(statistics), found)):
                return found
        except NumericalError:
            if not single:
                raise
        if single:
            fine = wrapped(self, statistics.to(torch.float64), previous)
            return fine.to(statistics.dtype)
        trace = _trace(statistics)
        if not trace:
            return found
        raise NumericalError(
            f"{self!r}: the block of {statistics.name!r} has a trace of {trace:.3g}, whose "
            "squares are no numbers of float64. Scale the data or the outputs, or leave "
            "the layer out."
        )

    return wrapped


def _trace(statistics: LayerStatistics) -> float:
    return float(statistics.samples.squared_norms().sum()) / statistics.count


def _known(found: Operator) -> bool:
    return not isinstance(found, KroneckerSum) or _within(found.terms_norm, found)


def _empty(found: Operator) -> bool:
    return isinstance(found, KroneckerSum) and not found.terms_norm


def _within(size: float, like: Operator) -> bool:
    width = WIDTH.get(like.dtype, WIDTH[torch.float32])
    return 1 / width < size < width


def passed(found: Operator, by: object) -> Operator:
    """Return what passes have found, which cannot be looked for again.

    Raises
    ------
    NumericalError
        If squares of F are no numbers of its precision.
    """
    if _known(found) or _empty(found):
        return found
    raise NumericalError(
        f"{by!r}: the squares of a block of size {getattr(found, 'terms_norm', 0.0):.3g} "
        f"are no numbers of {found.dtype} in passes. Give dtype=torch.float64, or a solver "
        "that holds the samples."
    )
