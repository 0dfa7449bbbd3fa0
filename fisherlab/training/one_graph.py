"""Gradient and statistics from one forward pass, in one graph.

The backward pass of the labels of the statistics stops at the layer outputs. With the
data's own labels it is the backward pass of the loss itself.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, final

import torch
from torch import Tensor, nn

from fisherlab.errors import NumericalError, UnsupportedModelError
from fisherlab.layers import Block
from fisherlab.likelihoods import Likelihood
from fisherlab.numerics import devices
from fisherlab.operators import Provenance
from fisherlab.statistics import Empirical, Fisher, Statistics, taps
from fisherlab.statistics.batches import Batch
from fisherlab.statistics.recorder import Pass, Recorder, by_call


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
    args, kwargs = batch.arguments(model)
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
    devices.require(
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


def together(
    model: nn.Module,
    likelihood: Likelihood,
    fisher: Fisher,
    batch: Batch,
    blocks: Mapping[str, Block],
    trained: Mapping[str, nn.Parameter],
    tapped: Mapping[str, taps.Tapped],
) -> Passed:
    """Return loss, gradients of all blocks, and statistics of those that are tapped.

    There are no statistics where the weights were used in another way than the taps have
    it, as stochastic depth does.
    """
    watched = {name: blocks[name] for name in blocks if name in tapped}
    every = dict(model.named_parameters())
    with Recorder(watched, every, apart=False) as recorder:
        output, losses = forward(model, likelihood, batch)
    done, loss = Pass(output, recorder.calls), losses.detach().mean()
    fits = (t.fits(done.calls[n], len(output)) for n, t in tapped.items())
    if recorder.unseen or not all(fits):
        return Passed(loss, pulled(losses.mean(), trained), None)
    made = Provenance.of(fisher, likelihood, len(batch))
    mask = likelihood.mask(output, batch.y) if tapped else None
    layers = taps.described(watched, tapped, [done], batch, mask, made)
    if isinstance(fisher, Empirical):
        inputs: Any = [*trained.values(), *done.edges]
        found = torch.autograd.grad(losses.sum(), inputs, allow_unused=True)
        pairs = zip(trained, found, strict=False)
        gradients = {n: g.div_(len(batch)) for n, g in pairs if g is not None}
        ends = [g if g is None else g[None] for g in found[len(trained) :]]
        pulled_ = by_call(done, ends)
        rows = {
            n: taps.rows_of(t, done.calls[n], pulled_[n], len(batch))
            for n, t in tapped.items()
        }
    else:
        gradients = pulled(losses.mean(), trained, retain=True)
        seen = output.detach()
        count = fisher.column_count(likelihood, seen)
        columns = fisher.columns(likelihood, seen, batch.y, batch.first, slice(0, count))
        rows = taps.pull([done], tapped, columns, keep=False)
    statistics = {name: layers[name](rows[name], len(batch)) for name in watched}
    return Passed(loss, gradients, Statistics(statistics, made))
