"""Every block on its own: one method for all of them, or another for some."""

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, ClassVar, final

from fisherlab.approximators import register
from fisherlab.approximators.base import Approximator, NetworkStatistics, called, facts
from fisherlab.approximators.blocks.exact import ExactBlock
from fisherlab.approximators.kronecker.kfac import KFAC
from fisherlab.operators import Operator, Provenance
from fisherlab.operators.network import BlockDiagonal
from fisherlab.showing import shown
from fisherlab.statistics import LayerStatistics, MeanGradient

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
    r"""`block_diagonal` with its approximator chosen: a network approximator.

    .. math:: \hat F = \mathrm{diag}(\hat F_1, \ldots, \hat F_L)

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


@shown
@final
@dataclass(frozen=True)
class MethodByBlock:
    """One method for most blocks, others for those that are named.

    As the mini-block optimiser uses it: one shared block for the large fully connected
    layers, Adam's direction for norm layers, mini-blocks for the rest.

    Parameters
    ----------
    default
        The method of all blocks that are not named.
    choices
        Methods by block name or by a prefix of it that ends at a dot; the longest wins.

    Raises
    ------
    ValueError
        If the methods do not take the same kind of statistics.

    Notes
    -----
    Averages are taken block by block, so every block keeps its method's own. Costs
    nothing beside the methods.

    Examples
    --------
    >>> import torch, fisherlab as fl
    >>> model = torch.nn.Sequential(torch.nn.Linear(3, 2), torch.nn.Linear(2, 2))
    >>> stats = fl.collect(model, (torch.ones(4, 3), None), fl.Gaussian())
    >>> method = fl.MethodByBlock(fl.KFAC(), {"1": fl.MiniBlock()})
    >>> [type(method(layer)).__name__ for layer in stats.values()]
    ['KroneckerSum', 'FactoredMiniBlocks']
    """

    default: Approximator
    choices: Mapping[str, Approximator] = field(default_factory=dict)

    def __post_init__(self) -> None:
        """Check that all methods take the same statistics."""
        kinds = {facts(m).takes for m in (self.default, *self.choices.values())}
        if len(kinds) != 1:
            named = " and ".join(sorted(kinds))
            msg = f"MethodByBlock: the methods take {named}, not the same statistics."
            raise ValueError(msg)

    @property
    def takes(self) -> str:
        """Which statistics an optimiser gives it."""
        return facts(self.default).takes

    def __call__(
        self,
        statistics: LayerStatistics | MeanGradient,
        previous: Operator | None = None,
    ) -> Operator:
        """Return what the block's own method makes of the statistics."""
        method: Any = self.method(statistics.block.name)
        made: Operator = called(method, statistics, previous)
        return made

    def method(self, block: str) -> Approximator:
        """Return the method of a block."""
        named = [n for n in self.choices if block == n or block.startswith(f"{n}.")]
        return self.choices[max(named, key=len)] if named else self.default
