"""Every block on its own: a block-diagonal matrix of any approximators."""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import ClassVar, final

from fisherlab.approximators import register
from fisherlab.approximators.base import Approximator, NetworkStatistics, called
from fisherlab.approximators.blocks.exact import ExactBlock
from fisherlab.approximators.kronecker.kfac import KFAC
from fisherlab.operators import Provenance
from fisherlab.operators.network import BlockDiagonal
from fisherlab.showing import shown
from fisherlab.statistics import LayerStatistics

Choice = str | Approximator | Mapping[str, str | Approximator]


def block_diagonal(approximator: Choice, stats: NetworkStatistics) -> BlockDiagonal:
    """Approximate every block of a network on its own.

    Parameters
    ----------
    approximator
        A name, a value, or a mapping of block names to either, which must name every
        block.
    stats
        Statistics of the blocks.

    Returns
    -------
    BlockDiagonal
        The blocks' operators in the order of the statistics.

    Raises
    ------
    ValueError
        For unknown names, or blocks that are missing or unknown in a mapping.
    NeedsSharedForm
        If a method needs inputs and output gradients that a block does not have; give
        that block another method by a mapping.

    Examples
    --------
    >>> import torch, fisherlab as fl
    >>> model = torch.nn.Sequential(torch.nn.Linear(3, 2), torch.nn.Linear(2, 4))
    >>> stats = fl.collect(model, (torch.ones(5, 3), None), fl.Gaussian())
    >>> block_diagonal("kfac", stats).weight_shapes
    {'0': (2, 4), '1': (4, 3)}
    """
    chosen = _per_block(approximator, stats)
    made = provenance(stats, f"block-diagonal {_label(approximator)}")
    blocks = {name: called(chosen[name], stats[name], None) for name in stats}
    return BlockDiagonal(blocks, made)


@shown
@final
@dataclass(frozen=True)
class PerBlock:
    """`block_diagonal` with its approximator chosen: a network approximator.

    Parameters
    ----------
    approximator
        A name, a value, or a mapping of block names to either.

    Examples
    --------
    >>> PerBlock("diagonal")
    PerBlock(approximator='diagonal')
    """

    takes: ClassVar[str] = "network"

    approximator: Choice = "kfac"

    def __call__(self, statistics: NetworkStatistics) -> BlockDiagonal:
        """Return the blocks' operators side by side; errors as `block_diagonal`."""
        return block_diagonal(self.approximator, statistics)


def _per_block(choice: Choice, stats: NetworkStatistics) -> dict[str, Approximator]:
    if not isinstance(choice, Mapping):
        return dict.fromkeys(stats, register.named(choice, "block"))
    missing = [name for name in stats if name not in choice]
    unknown = [name for name in choice if name not in stats]
    if missing or unknown:
        msg = (
            f"block_diagonal: the mapping names {list(choice)}; of the blocks "
            f"{list(stats)} it misses {missing}, and {unknown} are unknown."
        )
        raise ValueError(msg)
    return {name: register.named(choice[name], "block") for name in stats}


def _label(choice: Choice) -> str:
    if isinstance(choice, Mapping):
        return ", ".join(sorted({_label(one) for one in choice.values()}))
    return choice if isinstance(choice, str) else repr(choice)


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


register.add({"kfac-block-diagonal": PerBlock("kfac")})
