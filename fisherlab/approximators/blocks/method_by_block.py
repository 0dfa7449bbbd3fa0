"""Another method for some blocks."""

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, final

from fisherlab.approximators.base import Approximator, called, facts
from fisherlab.operators import Operator
from fisherlab.showing import shown
from fisherlab.statistics import LayerStatistics, MeanGradient


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
