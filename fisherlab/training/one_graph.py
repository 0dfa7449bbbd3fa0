"""Gradient and statistics from one forward pass, in one graph.

The backward pass of the labels of the statistics stops at the layer outputs. With the
data's own labels it is the backward pass of the loss itself.
"""

from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from typing import Any, final

import torch
from torch import Tensor, nn
from torch.autograd.graph import GradientEdge, get_gradient_edge

from fisherlab.errors import NumericalError, UnsupportedModelError
from fisherlab.layers import Block
from fisherlab.likelihoods import Likelihood
from fisherlab.operators import Provenance
from fisherlab.statistics import Empirical, Fisher, LayerStatistics, Statistics, taps
from fisherlab.statistics.batches import Batch

Tapped = Mapping[str, taps.Tapped]
ALIKE = 1e-5  # relative difference of two ways to the same number


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
    """

    loss: Tensor
    gradients: Mapping[str, Tensor]
    statistics: Mapping[str, Any] | None


@final
@dataclass(frozen=True, eq=False)
class _Watched:
    """Inputs of the layers and the places of their outputs in the graph, call by call."""

    inputs: dict[str, list[Tensor]] = field(default_factory=dict)
    edges: dict[str, list[GradientEdge]] = field(default_factory=dict)

    shapes: dict[str, list[torch.Size]] = field(default_factory=dict)

    def fits(self, tapped: Tapped) -> bool:
        """Tell whether every layer was called as often, and on the shapes, expected."""
        return all(
            tuple(self.shapes[name]) == tuple(tap.outputs) for name, tap in tapped.items()
        )

    @property
    def outputs(self) -> list[GradientEdge]:
        """All places, layer after layer."""
        return [edge for calls in self.edges.values() for edge in calls]


def forward(
    model: nn.Module, likelihood: Likelihood, batch: Batch
) -> tuple[Tensor, Tensor]:
    """Call the model in its own mode; return its output and the loss of each example.

    Raises
    ------
    UnsupportedModelError
        If the output is not one tensor.
    ValueError
        If the labels do not fit it.
    NumericalError
        If the loss is not finite.
    """
    args, kwargs = batch.arguments()
    assert batch.y is not None
    with torch.enable_grad():
        output = model(*args, **kwargs)
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
    if not bool(loss.isfinite()):
        raise NumericalError(
            f"The loss of the batch is {float(loss)}. Look for NaN or infinity in the "
            "batch, or for weights that grew: a smaller learning rate or more damping may "
            "help. No parameter was changed."
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
    value: Tensor, model: nn.Module, names: tuple[str, ...], *, retain: bool = False
) -> dict[str, Tensor]:
    """Return the gradients of a value by parameter name, where it depends on them."""
    named = dict(model.named_parameters())
    leaves = [named[name] for name in names]
    grads = torch.autograd.grad(value, leaves, retain_graph=retain, allow_unused=True)
    pairs = zip(names, grads, strict=True)
    return {name: grad for name, grad in pairs if grad is not None}


def together(
    model: nn.Module,
    likelihood: Likelihood,
    fisher: Fisher,
    batch: Batch,
    blocks: Mapping[str, Block],
    tapped: Tapped,
) -> Passed:
    """Return loss, gradients of all blocks, and statistics of those that are tapped.

    There are no statistics where the layers were called in another way than the taps
    have it, as stochastic depth does.
    """
    watched = _Watched()
    with _watching(tapped, watched):
        output, losses = forward(model, likelihood, batch)
    names = tuple(name for block in blocks.values() for name in block.parameters)
    if not watched.fits(tapped):
        gradients = pulled(losses.mean(), model, names)
        return Passed(losses.detach().mean(), gradients, None)
    gone = _masked_positions(output, likelihood, batch, tapped, watched.outputs)
    if isinstance(fisher, Empirical):
        named = dict(model.named_parameters())
        inputs: Any = [*(named[name] for name in names), *watched.outputs]
        found = torch.autograd.grad(losses.sum(), inputs, allow_unused=True)
        pairs = zip(names, found, strict=False)
        gradients = {n: g.div_(len(batch)) for n, g in pairs if g is not None}
        columns = [found[len(names) :]]
    else:
        gradients = pulled(losses.mean(), model, names, retain=True)
        columns = list(_columns(output, likelihood, fisher, batch, watched.outputs))
    made = Provenance(
        fisher=repr(fisher),
        likelihood=repr(likelihood),
        examples=len(batch),
        seed=getattr(fisher, "seed", None),
    )
    return Passed(
        losses.detach().mean(),
        gradients,
        _statistics(blocks, tapped, watched, columns, gone, made),
    )


def _columns(
    output: Tensor,
    likelihood: Likelihood,
    fisher: Fisher,
    batch: Batch,
    edges: list[GradientEdge],
) -> Iterator[tuple[Tensor, ...]]:
    """Yield, column by column, the gradients at the layer outputs."""
    seen = output.detach()
    total = fisher.column_count(likelihood, seen)
    for at in range(total):
        part = slice(at, at + 1)
        column = fisher.columns(likelihood, seen, batch.y, batch.first, part)[0]
        yield torch.autograd.grad(output, edges, column, retain_graph=at + 1 < total)


def _masked_positions(
    output: Tensor,
    likelihood: Likelihood,
    batch: Batch,
    tapped: Tapped,
    edges: list[GradientEdge],
) -> dict[str, Tensor]:
    """Return the positions of each block that are masked from the loss."""

    def pull(column: Tensor) -> dict[str, Tensor]:
        return _by_block(
            tapped, torch.autograd.grad(output, edges, column[0], retain_graph=True)
        )

    return taps.masked_positions(
        pull, output.detach(), likelihood.mask(output, batch.y) if edges else None
    )


def _by_block(tapped: Tapped, column: tuple[Tensor, ...]) -> dict[str, Tensor]:
    """Return (1, n, t, d_out) of every block from the gradients at all its calls."""
    calls = iter(column)
    return {
        name: _rows(tap, tuple(next(calls) for _ in tap.outputs))
        for name, tap in tapped.items()
    }


def _statistics(
    blocks: Mapping[str, Block],
    tapped: Tapped,
    watched: _Watched,
    columns: list[tuple[Tensor, ...]],
    gone: Mapping[str, Tensor],
    made: Provenance,
) -> Statistics:
    layers = {}
    gradients = [_by_block(tapped, column) for column in columns]
    for name, tap in tapped.items():
        rows = [found[name] for found in gradients]
        inputs = taps.features(tap, tuple(watched.inputs[name]))
        found = taps.described(
            blocks[name],
            tap,
            taps.counting(tap, inputs, gone.get(name)),
            gone.get(name),
            rows[0] if len(rows) == 1 else torch.cat(rows),
            made.examples,
        )
        layers[name] = replace(found, provenance=replace(made, layer=name))
    return Statistics({n: layers[n] for n in blocks if n in layers}, made)


@contextmanager
def _watching(tapped: Tapped, watched: _Watched) -> Iterator[None]:
    """Note inputs and outputs of layers, for the time of a call."""
    handles = []

    def watch(name: str) -> Callable[[Any, Any, Any, Tensor], None]:
        def hook(module: Any, args: Any, kwargs: Any, output: Tensor) -> None:
            watched.inputs[name].append(taps.module_input(args, kwargs).detach())
            watched.edges[name].append(get_gradient_edge(output))
            watched.shapes[name].append(output.shape[1:])

        return hook

    try:
        for name, tap in tapped.items():
            watched.inputs[name], watched.edges[name] = [], []
            watched.shapes[name] = []
            for module in tap.modules:
                hook = watch(name)
                handles.append(module.register_forward_hook(hook, with_kwargs=True))
        yield
    finally:
        for handle in handles:
            handle.remove()


def _rows(tap: taps.Tapped, calls: tuple[Tensor, ...]) -> Tensor:
    """Return (1, n, t, d_out) of one column, the calls stacked along positions."""
    rows = [tap.form.gradients(g[None]) for g in calls]
    return rows[0] if len(rows) == 1 else torch.cat(rows, 2)


def alike(found: LayerStatistics, expected: LayerStatistics) -> bool:
    """Tell whether two ways found the same inputs and output gradients."""
    pairs = [(found.inputs, expected.inputs), (found.gradients, expected.gradients)]
    for mine, other in pairs:
        if mine is None or other is None:
            if mine is not other:
                return False
            continue
        if mine.shape != other.shape:
            return False
        limit = ALIKE * float(other.abs().max())
        if not bool(((mine - other).abs() <= limit).all()):
            return False
    return True
