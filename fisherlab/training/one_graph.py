"""Gradient and statistics from one forward pass, in one graph, on one process or several.

The backward pass of the labels of the statistics stops at the layer outputs. With the
data's own labels it is the backward pass of the loss itself.
"""

from collections.abc import Callable, Collection, Iterable, Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, field, replace
from typing import Any, TypeVar, final

import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm

from fisherlab.approximators.ranks import require_same_weights
from fisherlab.errors import NumericalError, RankError, UnsupportedModelError
from fisherlab.layers import Block, uncompiled
from fisherlab.likelihoods import Likelihood
from fisherlab.numerics import devices
from fisherlab.numerics.ranks import Ranks, live
from fisherlab.operators import Provenance
from fisherlab.statistics import Empirical, Fisher, Statistics, taps
from fisherlab.statistics.batches import Batch
from fisherlab.statistics.model_view import require_whole_parameters
from fisherlab.statistics.recorder import Pass, Recorder, by_call

Rows = tuple[Tensor, Tensor]


@final
@dataclass(frozen=True, eq=False)
class Passed:
    """What the passes of one step found.

    Parameters
    ----------
    loss
        Mean over the examples, without a graph.
    gradients
        By parameter name; parameters that the loss does not depend on are left out.
    statistics
        By block name, or None where none were asked for.
    rows
        Output gradients g (m, d_out) and inputs a (m, d_in) of blocks whose gradient
        gᵀ a was not formed, by name.
    """

    loss: Tensor
    gradients: Mapping[str, Tensor]
    statistics: Mapping[str, Any] | None
    rows: Mapping[str, Rows] = field(default_factory=dict)


def forward(
    model: nn.Module,
    likelihood: Likelihood,
    batch: Batch,
    watching: AbstractContextManager[Any] | None = None,
) -> tuple[Tensor, Tensor]:
    """Call the model in its own mode; return its output and the loss of each example.

    Parameters
    ----------
    watching
        A context for the call of the model alone.

    Raises
    ------
    UnsupportedModelError
        If the output is not one tensor.
    ValueError
        If the labels do not fit it.
    NumericalError
        If the loss is not finite.
    """
    assert batch.y is not None
    with torch.enable_grad():
        with watching or nullcontext():
            output = batch.through(model)
        if not isinstance(output, Tensor):
            raise UnsupportedModelError(
                f"The model returns {type(output).__name__}; one tensor is expected."
            )
        likelihood.check(output, batch.y)
        losses = likelihood.loss(output, batch.y)
        require_finite_loss(losses.detach().mean())
        return output, losses


def require_finite_loss(loss: Tensor) -> None:
    """Stop before a loss that is no number becomes a step.

    Raises
    ------
    NumericalError
        With the loss and what to look for.
    """
    devices.require_good(
        loss.isfinite(),
        lambda: NumericalError(
            f"The loss of the batch is {float(loss)}. Look for NaN or infinity in the "
            "batch, or for weights that grew: a smaller learning rate or more damping may "
            "help. No parameter was changed."
        ),
    )


def returned_loss(returned: Any) -> Tensor:
    """Return what a closure returned as a loss.

    Raises
    ------
    ValueError
        If it returned nothing.
    NumericalError
        If it is not finite.
    """
    if returned is None:
        msg = "step: the closure returned None; it must return the loss it computed."
        raise ValueError(msg)
    loss = torch.as_tensor(returned).detach()
    require_finite_loss(loss)
    return loss


def pulled(
    value: Tensor, named: Mapping[str, nn.Parameter], *, retain: bool = False
) -> dict[str, Tensor]:
    """Return the gradients of a value by parameter name, where it depends on them."""
    leaves = list(named.values())
    grads = torch.autograd.grad(value, leaves, retain_graph=retain, allow_unused=True)
    pairs = zip(named, grads, strict=True)
    return {name: grad for name, grad in pairs if grad is not None}


def in_rows(
    model: nn.Module,
    likelihood: Likelihood,
    batch: Batch,
    blocks: Mapping[str, Block],
    trained: Mapping[str, nn.Parameter],
    thin: Mapping[str, taps.Tapped],
) -> Passed:
    """Return the loss and gradients, those of blocks of one plain part as rows.

    Where the weights were used in another way than the taps have it, no gradient is left
    out.
    """
    done, losses, fit = _watched(model, likelihood, batch, blocks, thin)
    loss = losses.mean()
    if not fit:
        return Passed(loss.detach(), pulled(loss, trained), None)
    leaves = _others(trained, blocks, thin)
    gradients, outputs = _pulled_apart(done, loss, leaves, thin)
    rows = {}
    for name, tap in thin.items():
        (inputs,) = taps.features(tap, done.calls[name], len(batch))
        rows[name] = outputs[name][0].flatten(0, 2), inputs.flatten(0, 1)
    return Passed(loss.detach(), gradients, None, rows)


def _pulled_apart(
    done: Pass,
    value: Tensor,
    named: Mapping[str, nn.Parameter],
    tapped: Mapping[str, taps.Tapped],
    *,
    retain: bool = False,
) -> tuple[dict[str, Tensor], dict[str, list[Tensor]]]:
    """Return gradients of a value by parameter, and at the outputs of tapped blocks."""
    edges = done.edges if tapped else []
    inputs: Any = [*named.values(), *edges]
    found = torch.autograd.grad(value, inputs, retain_graph=retain, allow_unused=True)
    pairs = zip(named, found, strict=False)
    gradients = {name: grad for name, grad in pairs if grad is not None}
    if not tapped:
        return gradients, {}
    ends = by_call(done, [g if g is None else g[None] for g in found[len(named) :]])
    examples = len(done.output)
    return gradients, {
        name: taps.rows_of(tap, done.calls[name], ends[name], examples)
        for name, tap in tapped.items()
    }


def _others(
    trained: Mapping[str, nn.Parameter], blocks: Mapping[str, Block], thin: Collection[str]
) -> dict[str, nn.Parameter]:
    """Return the parameters of all blocks but the thin ones."""
    held = {name for block in thin for name in blocks[block].parameters}
    return {name: p for name, p in trained.items() if name not in held}


def _watched(
    model: nn.Module,
    likelihood: Likelihood,
    batch: Batch,
    blocks: Mapping[str, Block],
    tapped: Mapping[str, taps.Tapped],
) -> tuple[Pass, Tensor, bool]:
    """Call the model; return calls, losses, and whether the weights were used as known."""
    watched = {name: blocks[name] for name in blocks if name in tapped}
    recorder = Recorder(watched, dict(model.named_parameters()), apart=False)
    output, losses = forward(model, likelihood, batch, recorder)
    done = Pass(output, recorder.calls)
    fits = (t.fits(done.calls[n], len(output)) for n, t in tapped.items())
    return done, losses, not recorder.unseen and all(fits)


def together(
    model: nn.Module,
    likelihood: Likelihood,
    fisher: Fisher,
    batch: Batch,
    blocks: Mapping[str, Block],
    trained: Mapping[str, nn.Parameter],
    tapped: Mapping[str, taps.Tapped],
    thin: Mapping[str, taps.Tapped],
) -> Passed:
    """Return loss, gradients, those of thin blocks as rows, and statistics of tapped ones.

    There are no statistics where the weights were used in another way than the taps have
    it, as stochastic depth does.
    """
    done, losses, fit = _watched(model, likelihood, batch, blocks, tapped)
    output, loss, count = done.output, losses.detach().mean(), len(batch)
    if not fit:
        return Passed(loss, pulled(losses.mean(), trained), None)
    watched = {name: blocks[name] for name in blocks if name in tapped}
    made = Provenance.of(fisher, likelihood, count)
    mask = likelihood.mask(output, batch.y) if tapped else None
    layers = taps.described(watched, tapped, [done], batch, mask, made)
    leaves = _others(trained, blocks, thin)
    if isinstance(fisher, Empirical):  # rows of the statistics are those of the loss
        gradients, rows = _pulled_apart(done, losses.sum(), leaves, tapped)
        gradients = {name: gradient.div_(count) for name, gradient in gradients.items()}
        outputs = {name: rows[name][0] / count for name in thin}
    else:
        mean = losses.mean()
        gradients, ends = _pulled_apart(done, mean, leaves, thin, retain=True)
        outputs = {name: ends[name][0] for name in thin}
        seen = output.detach()
        width = fisher.column_count(likelihood, seen)
        columns = fisher.columns(likelihood, seen, batch.y, batch.first, slice(0, width))
        rows = taps.pull([done], tapped, columns, keep=False)
    statistics = {name: layers[name](rows[name], count) for name in watched}
    apart = {}
    for name, each in outputs.items():
        inputs = statistics[name].inputs
        assert inputs is not None  # one plain part has them
        apart[name] = each.flatten(0, 2), inputs.flatten(0, 1)
    return Passed(loss, gradients, Statistics(statistics, made), apart)


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
