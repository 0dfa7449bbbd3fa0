"""What a network approximator is, and what one block is given where layers do not join."""

from collections.abc import Mapping
from typing import Any, Protocol, runtime_checkable

from fisherlab.approximators.blocks.exact import ExactBlock
from fisherlab.approximators.kronecker.kfac import KFAC
from fisherlab.operators import Provenance
from fisherlab.operators.network import NetworkOperator
from fisherlab.statistics import LayerStatistics

NetworkStatistics = Mapping[str, LayerStatistics]


@runtime_checkable
class NetworkApproximator(Protocol):
    """Statistics of all blocks in, one operator over all of them out.

    An attribute ``takes = "network"`` tells optimisers so.
    """

    def __call__(self, statistics: NetworkStatistics) -> NetworkOperator:
        """Approximate the Fisher of the network."""


@runtime_checkable
class NetworkStreaming(Protocol):
    """A network approximator that can be fed chunk by chunk of all blocks."""

    def accumulate(self, state: Any | None, statistics: NetworkStatistics) -> Any:
        """Add a chunk of examples or columns to the state (None to begin)."""

    def merge(self, first: Any, second: Any) -> Any:
        """Add up the states of two parts of the data."""

    def finish(self, state: Any) -> NetworkOperator:
        """Turn the state into the operator."""


def own_method(statistics: LayerStatistics) -> KFAC | ExactBlock:
    """Return what a block is approximated by on its own: KFAC, or exactly if it cannot.

    Norm layers, bare parameters and tied weights have no inputs and output gradients.
    """
    return KFAC() if statistics.is_shared else ExactBlock()


def provenance(statistics: NetworkStatistics, method: str) -> Provenance:
    """Return how the statistics of all blocks were made, without a layer.

    Raises
    ------
    ValueError
        If there are no blocks.
    """
    made = next((layer.provenance for layer in statistics.values()), None)
    if made is None:
        msg = f"{method}: statistics of at least one block are expected, none given."
        raise ValueError(msg)
    return Provenance(
        fisher=made.fisher,
        likelihood=made.likelihood,
        examples=made.examples,
        seed=made.seed,
        method=method,
    )
