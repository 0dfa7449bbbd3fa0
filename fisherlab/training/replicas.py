"""One model on several processes, each of which has a part of every batch."""

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import replace
from typing import Any, TypeVar

import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm

from fisherlab.approximators.ranks import require_same_weights
from fisherlab.errors import RankError
from fisherlab.layers import uncompiled
from fisherlab.numerics.ranks import Ranks, live
from fisherlab.statistics.batches import Batch
from fisherlab.statistics.model_view import require_whole_parameters
from fisherlab.training.one_graph import Passed

T = TypeVar("T")


class Replicas:
    """What the optimisers of several processes agree on; nothing where there is one.

    Parameters
    ----------
    model
        As the optimiser is given it: plain, compiled, or in DDP.
    group
        The process group, the default one if None.

    Raises
    ------
    UnsupportedModelError
        If every process holds a part of the parameters alone.
    """

    def __init__(self, model: nn.Module, group: Any = None) -> None:
        require_whole_parameters(model)
        self._model, self._group, self._agreed = uncompiled(model), group, False
        replicated = isinstance(model, nn.parallel.DistributedDataParallel)
        # DDP would wait for backward(), which no step of ours calls
        self.called = self._model if replicated else model

    def __getstate__(self) -> dict[str, Any]:
        """Leave out the group, which no other process knows."""
        return {**self.__dict__, "_group": None}

    @property
    def ranks(self) -> Ranks | None:
        """The processes that are live now, None where there is but one."""
        return live(self._group)

    def together(self, work: Callable[[], T]) -> T:
        """Do this process's work; where one of several fails, all of them do."""
        ranks = self.ranks
        return work() if ranks is None else ranks.together(work)

    def placed(self, batch: Batch | None) -> Batch | None:
        """Return a batch that knows where it stands in that of all ranks.

        Raises
        ------
        RankError
            If the replicas have other weights.
        """
        ranks = self.ranks
        if ranks is None or batch is None:
            return batch
        if not self._agreed:
            require_same_weights(ranks, self._model)
            self._agreed = True
        return replace(batch, first=batch.first + ranks.before(len(batch)))

    def first_part(self, batch: Batch, fraction: float) -> Batch:
        """Return a rank's own of the first examples of all, a share and at least one.

        Where it has none of them, one that does not count.
        """
        if fraction == 1:
            return batch
        ranks = self.ranks
        counts = [len(batch)] if ranks is None else ranks.gathered(len(batch))
        own = of_first(counts, 0 if ranks is None else ranks.rank, fraction)
        return replace(batch.part(slice(0, max(1, own))), counted=own > 0)

    def averaged(self, passed: Passed, examples: int, names: Iterable[str]) -> Passed:
        """Return loss and gradients of the examples of all ranks; statistics stay apart.

        Parameters
        ----------
        examples
            Of this rank, which weigh its means.
        names
            Of the parameters; those that no rank has a gradient of are left out.
        """
        ranks = self.ranks
        if ranks is None:
            return passed
        named = {n: p for n, p in self._model.named_parameters() if n in {*names}}
        loss, found = averaged(ranks, passed.loss, passed.gradients, named, examples)
        return replace(passed, loss=loss, gradients=found)


def of_first(counts: Sequence[int], rank: int, fraction: float) -> int:
    """Return how many of the first examples of all, a share, are a rank's own.

    Examples
    --------
    >>> [of_first([5, 0, 6], rank, 0.6) for rank in range(3)]
    [5, 0, 2]
    """
    first = max(1, round(fraction * sum(counts)))
    return max(0, min(counts[rank], first - sum(counts[:rank])))


def averaged(
    ranks: Ranks,
    loss: Tensor,
    gradients: Mapping[str, Tensor],
    parameters: Mapping[str, Tensor],
    examples: int,
) -> tuple[Tensor, dict[str, Tensor]]:
    """Return loss and gradients of all examples; what no rank has a gradient of is out."""
    own = [gradients.get(n, torch.zeros_like(p)) for n, p in parameters.items()]
    has = loss.new_tensor([float(name in gradients) for name in parameters])
    mean, has, *means = ranks.averaged([loss, has, *own], examples)
    found = zip(parameters, means, has.tolist(), strict=True)
    return mean, {name: gradient for name, gradient, some in found if some}


def shared_gradients(ranks: Ranks, model: nn.Module, loss: Tensor, examples: int) -> Tensor:
    """Put the gradients of all examples in place of this rank's; return their loss."""
    named = {n: p for n, p in model.named_parameters() if p.requires_grad}
    own = {n: p.grad for n, p in named.items() if p.grad is not None}
    mean, found = averaged(ranks, loss, own, named, examples)
    for name, parameter in named.items():
        parameter.grad = found.get(name)
    return mean


def require_replicas(ranks: Ranks, model: nn.Module, settings: Mapping[str, Any]) -> None:
    """Refuse a training whose replicas would not be those of one process.

    Raises
    ------
    RankError
        If the ranks have other settings or weights, or norm layers see a part of a batch.
    """
    remedy = "Give all ranks the same problem, optimiser and options."
    ranks.require_same("The settings", settings, remedy)
    require_same_weights(ranks, model)
    norms = [n for n, m in model.named_modules() if isinstance(m, _BatchNorm)]
    if norms:
        raise RankError(
            f"The norm layers {', '.join(norms[:3])} take means over a batch, of which "
            f"each of {ranks.size} ranks sees a part: one process, or a network without "
            "batch norm, is expected."
        )


def require_one_process(who: str) -> None:
    """Refuse several processes, which would write into one store.

    Raises
    ------
    RankError
        Saying what works.
    """
    if (ranks := live()) is not None:
        raise RankError(
            f"{who} takes one process, and this is one of {ranks.size}: give it an "
            "executor= in one process instead."
        )
