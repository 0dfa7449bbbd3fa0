"""Two runs of the same batch, compared layer by layer."""

from collections.abc import Iterator, Mapping

import torch
from torch import Tensor

from fisherlab.errors import NumericalError
from fisherlab.statistics.values import LayerStatistics

Run = Mapping[str, LayerStatistics]


def require_equal(first: Run, second: Run) -> None:
    """Name the first layer that differs between two runs, its input before its gradient.

    Summation in another order is let through: the bound is eps^¾ of the largest entry.

    Raises
    ------
    NumericalError
        Naming the layer.

    Examples
    --------
    >>> from fisherlab.layers import Block
    >>> block = Block("0", "0.weight", None, (1, 1), 1)
    >>> one = {"0": LayerStatistics(block, 1, matrices=torch.ones(1, 1, 1, 1))}
    >>> require_equal(one, one)
    """
    for name, what, a, b in _pairs(first, second):
        allowed = torch.finfo(a.dtype).eps ** 0.75 * float(a.abs().max())
        difference = float((a - b).abs().max())
        if difference > allowed:
            raise NumericalError(
                f"Two runs of the same batch differ in {what} of layer {name!r} by "
                f"{difference:.3g}. Look for randomness between it and the layer before: "
                "functional dropout, noise, or a sum in random order."
            )


def _pairs(first: Run, second: Run) -> Iterator[tuple[str, str, Tensor, Tensor]]:
    for name, one in first.items():
        other = second[name]
        if one.inputs is not None and other.inputs is not None:
            yield name, "the input", one.inputs, other.inputs
    for name, one in first.items():
        other = second[name]
        if one.gradients is not None and other.gradients is not None:
            yield name, "the gradient", one.gradients, other.gradients
        elif one.matrices is not None and other.matrices is not None:
            yield name, "the gradient", one.matrices, other.matrices
