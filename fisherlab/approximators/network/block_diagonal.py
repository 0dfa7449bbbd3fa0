"""Every block on its own: a block-diagonal matrix of any approximators."""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import final

from fisherlab.approximators.base import Approximator
from fisherlab.approximators.network.base import NetworkStatistics, provenance
from fisherlab.approximators.register import by_name
from fisherlab.operators.network import BlockDiagonal
from fisherlab.showing import shown

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
    return BlockDiagonal({name: chosen[name](stats[name]) for name in stats}, made)


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

    takes = "network"

    approximator: Choice = "kfac"

    def __call__(self, statistics: NetworkStatistics) -> BlockDiagonal:
        """Return the blocks' operators side by side; errors as `block_diagonal`."""
        return block_diagonal(self.approximator, statistics)


def _value(choice: str | Approximator) -> Approximator:
    return by_name([choice])[choice] if isinstance(choice, str) else choice


def _per_block(choice: Choice, stats: NetworkStatistics) -> dict[str, Approximator]:
    if not isinstance(choice, Mapping):
        return dict.fromkeys(stats, _value(choice))
    missing = [name for name in stats if name not in choice]
    unknown = [name for name in choice if name not in stats]
    if missing or unknown:
        msg = (
            f"block_diagonal: the mapping names {list(choice)}; of the blocks "
            f"{list(stats)} it misses {missing}, and {unknown} are unknown."
        )
        raise ValueError(msg)
    return {name: _value(choice[name]) for name in stats}


def _label(choice: Choice) -> str:
    if isinstance(choice, Mapping):
        return ", ".join(sorted({_label(one) for one in choice.values()}))
    return choice if isinstance(choice, str) else repr(choice)
