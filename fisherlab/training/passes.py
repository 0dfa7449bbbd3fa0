"""The forward and backward passes of an optimiser's steps.

Where a model behaves alike in training and evaluation mode, one forward pass serves the
gradient and the statistics; where not, the statistics take one of their own.
"""

from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from typing import Any, Literal, final

import torch
from torch import Tensor, nn

from fisherlab.errors import UnsupportedModelError
from fisherlab.layers import (
    Block,
    frozen,
    require_independent_examples,
    select,
    uncompiled,
)
from fisherlab.layers import blocks as blocks_of
from fisherlab.likelihoods import Likelihood
from fisherlab.operators import Provenance
from fisherlab.statistics import (
    Empirical,
    Fisher,
    LayerStatistics,
    MeanGradient,
    MonteCarlo,
    Statistics,
    collect,
    mean_gradient,
)
from fisherlab.statistics.batches import Batch, batches, map_inputs
from fisherlab.statistics.probe import Probe
from fisherlab.training.one_graph import Passed, alike, forward, pulled, together

Takes = Literal["per_example", "mean_gradient"]
Observed = Mapping[str, LayerStatistics] | Mapping[str, MeanGradient]
Gradients = Mapping[str, Tensor]
FEW_COLUMNS = 4  # pulled back through the graph of the loss; more go through `collect`


@final
@dataclass(frozen=True, eq=False)
class _Plan:
    """What stays the same while the model and the shape of an example do."""

    blocks: Mapping[str, Block]
    probes: dict[Any, Probe]
    shared: bool = False

    @property
    def trainable(self) -> tuple[str, ...]:
        """Names of the parameters."""
        return tuple(n for block in self.blocks.values() for n in block.parameters)


class Passes:
    """Run a model forward and backward for an optimiser.

    Parameters
    ----------
    model
        Left as it was found: mode, ``.grad``, hooks. The pass of the loss is an ordinary
        call in the model's own mode, so batch norm sees its batches. One that is compiled
        is called as such only where nothing watches its layers.
    likelihood
        Owner of the loss.
    fisher
        Which labels and columns the statistics have.
    takes
        "per_example" for layer statistics, "mean_gradient" for the gradient of the mean
        loss at the labels that `fisher` names.
    compress
        As in `collect`.
    """

    def __init__(
        self,
        model: nn.Module,
        likelihood: Likelihood,
        fisher: Fisher,
        takes: Takes,
        compress: bool = True,
    ) -> None:
        self.model, self.likelihood = uncompiled(model), likelihood
        self.called = model  # gives the loss of steps without statistics
        self.fisher, self.takes = fisher, takes
        self._compress = compress
        self._plans: dict[Any, _Plan] = {}

    def batch(self, data: Any) -> Batch:
        """Move one batch to the model; its first of a kind is checked as in `collect`.

        Raises
        ------
        ValueError
            If it is not one batch (x, y), or as `collect`.
        """
        parameter = next(p for p in self.model.parameters() if p.is_floating_point())
        if isinstance(data, list):  # as a DataLoader gives it
            data = tuple(data)
        if not _plain_pair(data) or self._key(Batch(data[0], None)) not in self._plans:
            found = list(batches(data, parameter.device, parameter.dtype))
            if len(found) != 1:
                msg = f"step: one batch (x, y) is expected; {len(found)} were given."
                raise ValueError(msg)
            return found[0]

        def move(tensor: Tensor) -> Tensor:
            floats = tensor.is_floating_point()
            return tensor.to(parameter.device, parameter.dtype if floats else None)

        x, y = data
        return Batch(map_inputs(x, move), y.to(parameter.device))

    def blocks(self) -> dict[str, Block]:
        """Return the blocks of the parameters that are trained now."""
        return blocks_of(self.model)

    @torch.enable_grad()
    def run(
        self,
        batch: Batch,
        blocks: Mapping[str, Block],
        step: int,
        *,
        observe: Batch | None,
    ) -> Passed:
        """Return loss, gradient and, on the batch `observe`, statistics of some blocks.

        Raises
        ------
        ValueError
            If there are no labels, or as `collect`.
        """
        if batch.y is None:
            msg = "step: the loss needs labels, but y is None; give batch=(x, y)."
            raise ValueError(msg)
        plan = self._plan(batch, blocks)
        if observe is batch and plan.shared and self._few:
            return self._together(plan, batch, self._drawn(step))
        _, losses = forward(self.called, self.likelihood, batch)
        gradients = pulled(losses.mean(), self.model, plan.trainable)
        statistics = None
        if observe is not None:
            known = gradients if observe is batch else None
            statistics = self.observe(observe, blocks, step, known)
        return Passed(losses.detach().mean(), gradients, statistics)

    @torch.enable_grad()
    def observe(
        self,
        batch: Batch,
        blocks: Mapping[str, Block],
        step: int,
        known: Gradients | None = None,
    ) -> Observed:
        """Return the statistics of a batch, in evaluation mode.

        Parameters
        ----------
        known
            The gradient of this batch at its own labels, where it was computed already;
            methods of mean gradients take it for `Empirical`.
        """
        fisher, data = self._drawn(step), (batch.x, batch.y)
        if self.takes == "mean_gradient" and known and isinstance(fisher, Empirical):
            return self._means(blocks, known, len(batch))
        names = list(blocks)
        with frozen(self.model):
            if self.takes == "mean_gradient":
                return mean_gradient(
                    self.model, data, self.likelihood, fisher=fisher, layers=names
                )
            return collect(
                self.model,
                data,
                self.likelihood,
                fisher,
                layers=names,
                compress=self._compress,
                probes=self._plan(batch, blocks).probes,
            )

    @torch.no_grad()
    def loss_at(self, batch: Batch) -> Tensor:
        """Return the mean loss without a graph, in the model's own mode."""
        args, kwargs = batch.arguments()
        assert batch.y is not None
        return self.likelihood.loss(self.called(*args, **kwargs), batch.y).mean()

    def _drawn(self, step: int) -> Fisher:
        """Return the Fisher with the draws of this step."""
        at: Callable[[int], Fisher] | None = getattr(self.fisher, "at", None)
        return self.fisher if at is None else at(step)

    @property
    def _few(self) -> bool:
        """Whether the columns are so few that they go through the graph of the loss."""
        if isinstance(self.fisher, MonteCarlo):
            return self.fisher.samples <= FEW_COLUMNS
        return isinstance(self.fisher, Empirical)

    def _together(self, plan: _Plan, batch: Batch, fisher: Fisher) -> Passed:
        (found,) = plan.probes.values()
        return together(
            self.model, self.likelihood, fisher, batch, plan.blocks, found.tapped
        )

    def _key(self, batch: Batch) -> tuple[Any, ...]:
        modes = tuple(m.training for m in self.model.modules())
        wanted = tuple(p.requires_grad for p in self.model.parameters())
        return batch.signature, modes, wanted

    def _plan(self, batch: Batch, blocks: Mapping[str, Block]) -> _Plan:
        key = self._key(batch)
        if key not in self._plans or tuple(self._plans[key].blocks) != tuple(blocks):
            self._plans[key] = self._planned(batch, blocks)
        return self._plans[key]

    def _planned(self, batch: Batch, blocks: Mapping[str, Block]) -> _Plan:
        plan = _Plan(dict(blocks), {})
        if self.takes == "mean_gradient":
            return plan
        pair = batch.part([0, min(1, len(batch) - 1)])
        fisher = self.fisher if self._few and batch.y is not None else MonteCarlo(1)
        with frozen(self.model):  # fills `probes`, and is what the shared way must equal
            expected = collect(
                self.model,
                (pair.x, pair.y),
                self.likelihood,
                fisher,
                layers=list(blocks),
                compress=False,
                probes=plan.probes,
            )
        return replace(plan, shared=self._shareable(plan, pair, fisher, expected))

    def _shareable(
        self, plan: _Plan, pair: Batch, fisher: Fisher, expected: Statistics
    ) -> bool:
        """Tell whether one forward pass in this mode gives the statistics of `collect`."""
        (found,) = plan.probes.values()
        if found.general or found.overwrites_data or pair.y is None:
            return False
        try:
            require_independent_examples(self.model)
            passed = self._together(plan, pair, fisher)
        except (UnsupportedModelError, RuntimeError):
            return False
        assert passed.statistics is not None
        return all(alike(passed.statistics[name], expected[name]) for name in expected)

    def _means(
        self, blocks: Mapping[str, Block], gradients: Gradients, count: int
    ) -> dict[str, MeanGradient]:
        """Return the gradient that is known as the statistic of every block."""
        named = dict(self.model.named_parameters())
        made = Provenance(
            fisher=repr(self.fisher),
            likelihood=repr(self.likelihood),
            examples=count,
            method="mean gradient",
        )
        found = {}
        for name, block in blocks.items():
            parts = {
                n: gradients[n] if n in gradients else torch.zeros_like(named[n])
                for n in block.parameters
            }
            about = replace(made, layer=name)
            found[name] = MeanGradient(block, block.pack(parts), count, about)
        return found


def _plain_pair(data: Any) -> bool:
    """Tell whether data is a pair of tensors, which needs no further reading."""
    return (
        isinstance(data, tuple)
        and len(data) == 2
        and all(isinstance(part, Tensor) for part in data)
    )


def chosen(found: Mapping[str, Block], parameters: set[str]) -> dict[str, Block]:
    """Return the blocks of some parameters.

    Raises
    ------
    ValueError
        If a block has one parameter among them and another one not.
    """
    names = [name for name, b in found.items() if parameters.intersection(b.parameters)]
    split = [n for n in names if not parameters.issuperset(found[n].parameters)]
    if split:
        parts = ", ".join(
            f"{name!r} ({', '.join(found[name].parameters)})" for name in split
        )
        msg = (
            f"The parameters of the blocks {parts} share one curvature, but only some of "
            "them are optimised. Give all of them, or freeze the others."
        )
        raise ValueError(msg)
    return select(found, names) if names else {}
