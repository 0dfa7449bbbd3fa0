"""Gradient and statistics from one forward pass, in one graph.

The backward pass of the labels of the statistics stops at the layer outputs. With the
data's own labels it is the backward pass of the loss itself.
"""

from collections.abc import Mapping
from dataclasses import dataclass, field
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


def in_rows(
    model: nn.Module,
    likelihood: Likelihood,
    batch: Batch,
    blocks: Mapping[str, Block],
    trained: Mapping[str, nn.Parameter],
    tapped: Mapping[str, taps.Tapped],
) -> Passed:
    """Return the loss and gradients, those of tapped blocks of one plain part as rows.

    Where the weights were used in another way than the taps have it, no gradient is left
    out.
    """
    done, losses, fit = _watched(model, likelihood, batch, blocks, tapped)
    loss = losses.mean()
    if not fit:
        return Passed(loss.detach(), pulled(loss, trained), None)
    held = {name for block in tapped for name in blocks[block].parameters}
    leaves = {name: p for name, p in trained.items() if name not in held}
    inputs: Any = [*leaves.values(), *done.edges]
    found = torch.autograd.grad(loss, inputs, allow_unused=True)
    pairs = zip(leaves, found, strict=False)
    gradients = {name: grad for name, grad in pairs if grad is not None}
    ends = by_call(done, [g if g is None else g[None] for g in found[len(leaves) :]])
    rows = {}
    for name, tap in tapped.items():
        (outputs,) = taps.rows_of(tap, done.calls[name], ends[name], len(batch))
        (features,) = taps.features(tap, done.calls[name], len(batch))
        rows[name] = outputs.flatten(0, 2), features.flatten(0, 1)
    return Passed(loss.detach(), gradients, None, rows)


def _watched(
    model: nn.Module,
    likelihood: Likelihood,
    batch: Batch,
    blocks: Mapping[str, Block],
    tapped: Mapping[str, taps.Tapped],
) -> tuple[Pass, Tensor, bool]:
    """Call the model; return calls, losses, and whether the weights were used as known."""
    watched = {name: blocks[name] for name in blocks if name in tapped}
    with Recorder(watched, dict(model.named_parameters()), apart=False) as recorder:
        output, losses = forward(model, likelihood, batch)
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
) -> Passed:
    """Return loss, gradients of all blocks, and statistics of those that are tapped.

    There are no statistics where the weights were used in another way than the taps have
    it, as stochastic depth does.
    """
    done, losses, fit = _watched(model, likelihood, batch, blocks, tapped)
    output, loss = done.output, losses.detach().mean()
    if not fit:
        return Passed(loss, pulled(losses.mean(), trained), None)
    watched = {name: blocks[name] for name in blocks if name in tapped}
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
