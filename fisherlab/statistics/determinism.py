"""A model must give the same output twice: by its draws, or layer by layer."""

from collections.abc import Iterator, Mapping

import torch
from torch import Tensor

from fisherlab.errors import NumericalError, UnsupportedModelError
from fisherlab.numerics.devices import generator_states, generators_kept
from fisherlab.statistics.batches import Batch
from fisherlab.statistics.model_view import ModelView
from fisherlab.statistics.values import LayerStatistics

Run = Mapping[str, LayerStatistics]


def require_repeatable(view: ModelView, batch: Batch) -> None:
    """Refuse a model whose forward pass draws from torch's generator.

    It is refused even if two outputs are equal: a layer that is seldom dropped would
    pass by chance. The generator is put back.

    Raises
    ------
    UnsupportedModelError
        Saying what to do.
    """
    with torch.no_grad(), generators_kept(view.device):
        before = generator_states(view.device)
        view(batch.part(slice(0, 2)))
        draws = not all(map(torch.equal, before, generator_states(view.device)))
    if draws:
        raise UnsupportedModelError(
            "The model's forward pass draws random numbers (functional or attention "
            "dropout, noise, stochastic depth), so its Fisher would be random. Use `with "
            "fisherlab.frozen(model):` (eval mode), or switch the randomness off."
        )


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
    for what, fields in (("the input", _INPUTS), ("the gradient", _GRADIENTS)):
        for name, one in first.items():
            other = second[name]
            parts = zip(one.parts or (one,), other.parts or (other,), strict=True)
            for mine, its in parts:
                for field in fields:
                    a, b = getattr(mine, field), getattr(its, field)
                    if a is not None and b is not None:
                        yield name, what, a, b


_INPUTS, _GRADIENTS = ("inputs",), ("gradients", "matrices")
