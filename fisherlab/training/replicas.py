"""One model on several processes, each of which has a part of every batch."""

from collections.abc import Callable, Iterable
from dataclasses import replace
from typing import Any, TypeVar

import torch
from torch import nn

from fisherlab.approximators.ranks import require_same_weights
from fisherlab.errors import RankError, UnsupportedModelError
from fisherlab.layers import uncompiled
from fisherlab.numerics.ranks import Ranks, live
from fisherlab.statistics.batches import Batch
from fisherlab.training.one_graph import Passed

T = TypeVar("T")
SHARDED = {"DTensor", "FullyShardedDataParallel", "FlatParameter"}


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
        _require_whole_parameters(model)
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
        counts = ranks.gathered(examples)
        share = counts[ranks.rank] / sum(counts)
        named, known, every = (
            dict(self._model.named_parameters()),
            passed.gradients,
            [*names],
        )
        own = [
            known[n] * share if n in known else torch.zeros_like(named[n]) for n in every
        ]
        has = passed.loss.new_tensor([float(n in known) for n in every])
        loss, has, *gradients = ranks.added([passed.loss * share, has, *own])
        found = zip(every, gradients, has.tolist(), strict=True)
        return replace(passed, loss=loss, gradients={n: g for n, g, some in found if some})


def _require_whole_parameters(model: nn.Module) -> None:
    """Refuse parameters of which every process holds a part: no curvature sees a row."""
    kinds = {type(part).__name__ for part in (*model.modules(), *model.parameters())}
    if sharded := sorted(kinds & SHARDED):
        raise UnsupportedModelError(
            f"The model's parameters are sharded ({', '.join(sharded)}), and curvature "
            "needs whole weights on every rank: wrap the plain model in "
            "DistributedDataParallel, or give it as it is."
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
            f"{who} takes one process, and this is one of {ranks.size}: write the loop "
            "with optimiser.step(batch=...), which several processes take together."
        )
