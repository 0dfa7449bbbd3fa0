"""The loss of a model with other weights in the place of its own."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import ExitStack
from dataclasses import dataclass, field
from functools import cached_property
from typing import Any, final

import torch
from torch import Tensor, nn
from torch.utils.flop_counter import FlopCounterMode

from fisherlab.errors import DataError
from fisherlab.layers import frozen
from fisherlab.likelihoods import Likelihood
from fisherlab.statistics.batches import Batch, batches
from fisherlab.statistics.model_view import plain_attributes_kept, swapped


@final
@dataclass(frozen=True, eq=False)
class Trial:
    """Mean loss over examples, in nats, of a model of which some parameters are replaced.

    The model is run in evaluation mode and left as it was found.

    Parameters
    ----------
    model, likelihood
        As in `fl.collect`.
    data
        (x, y), or an iterable of such pairs that can be gone through again.

    Raises
    ------
    DataError
        If labels are missing.

    Examples
    --------
    >>> import fisherlab as fl
    >>> model, data = torch.nn.Linear(3, 2), (torch.ones(5, 3), torch.ones(5, 2))
    >>> loss = Trial(model, data, fl.Gaussian())
    >>> loss({"weight": torch.zeros(2, 3), "bias": torch.ones(2)})
    0.0
    """

    model: nn.Module = field(repr=False)
    data: Any = field(repr=False)
    likelihood: Likelihood

    def __call__(self, weights: Mapping[str, Tensor]) -> float:
        """Return (1/N) Σ loss with some parameters, by name, in the place of the own."""
        own = dict(self.model.named_parameters())
        given = {name: value.to(own[name]) for name, value in weights.items()}
        total, count = 0.0, 0
        with self._at_rest(), swapped(self.model, given):
            for batch in self._batches():
                if batch.y is None:
                    raise DataError(
                        "Trial: data without labels were given; (x, y) expected."
                    )
                losses = self.likelihood.loss(self._output(batch), batch.y)
                total += float(losses.sum(dtype=torch.float64))
                count += len(batch)
        return total / count

    @cached_property
    def flops(self) -> float:
        """Multiply-adds of one call, counted on one example."""
        count, one = 0, None
        for batch in self._batches():
            one = batch.part(slice(0, 1)) if one is None else one
            count += len(batch)
        assert one is not None, "data without examples are refused"
        with self._at_rest(), FlopCounterMode(display=False) as counter:
            self._output(one)
        return counter.get_total_flops() / 2 * count

    def _at_rest(self) -> ExitStack:
        stack = ExitStack()
        stack.enter_context(torch.no_grad())
        stack.enter_context(frozen(self.model))
        stack.enter_context(plain_attributes_kept(self.model))
        return stack

    def _batches(self) -> Iterator[Batch]:
        first = next(self.model.parameters())
        return batches(self.data, first.device, first.dtype, model=self.model)

    def _output(self, batch: Batch) -> Tensor:
        positional, named = batch.arguments(self.model)
        output: Tensor = self.model(*positional, **named)
        return output
