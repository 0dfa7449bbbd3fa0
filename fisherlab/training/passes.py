"""The forward and backward passes of an optimiser's steps.

Where a model behaves alike in training and evaluation mode, one forward pass serves the
gradient and the statistics; where not, the statistics take one of their own.
"""

from collections.abc import Callable, Collection, Mapping
from dataclasses import dataclass, field, replace
from functools import partial
from typing import Any, Literal, cast, final

import torch
from torch import Tensor, nn

from fisherlab.errors import NumericalError, UnsupportedModelError, warn
from fisherlab.layers import (
    Block,
    frozen,
    require_independent_examples,
    uncompiled,
)
from fisherlab.likelihoods import Likelihood
from fisherlab.numerics.devices import drawing
from fisherlab.operators import Provenance
from fisherlab.settings import numeric
from fisherlab.statistics import (
    Empirical,
    Fisher,
    LayerStatistics,
    MeanGradient,
    MonteCarlo,
    collect,
    mean_gradient,
)
from fisherlab.statistics.batches import Batch, batches, moved
from fisherlab.statistics.model_view import buffers_kept, require_gradients
from fisherlab.statistics.network import require_equal
from fisherlab.statistics.probe import Probe
from fisherlab.statistics.taps import Tapped
from fisherlab.training.one_graph import (
    Passed,
    Replicas,
    forward,
    in_rows,
    pulled,
    together,
)

Takes = Literal["per_example", "mean_gradient"]
Observed = Mapping[str, LayerStatistics] | Mapping[str, MeanGradient]
Gradients = Mapping[str, Tensor]
PLANS = 8  # kinds of batches that are remembered; sequences may have any length
WATCHING = 2**24  # multiply-adds in the time that watching a model's calls takes
FEW_COLUMNS = 4  # pulled back through the graph of the loss; more go through `collect`


@final
@dataclass(frozen=True, eq=False)
class _Plan:
    """What stays the same while the model and the shape of an example do.

    Parameters
    ----------
    blocks
        Those that are optimised.
    named
        Their parameters.
    probes
        What `collect` has found out about the blocks that are observed.
    left
        Blocks whose statistics nobody wants, and why.
    shared
        Whether one pass in the model's own mode gives loss and statistics.
    """

    blocks: Mapping[str, Block]
    named: Mapping[str, nn.Parameter]
    probes: dict[Any, Probe]
    left: Mapping[str, str] = field(default_factory=dict)
    shared: bool = False

    @property
    def observed(self) -> list[str]:
        """Names of the blocks whose statistics are taken."""
        return [name for name in self.blocks if name not in self.left]


@numeric
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
    left
        From statistics of two examples to the blocks, with a reason, whose statistics
        are not wanted: none are collected for them.
    group
        As for `Replicas`.
    """

    def __init__(
        self,
        model: nn.Module,
        likelihood: Likelihood,
        fisher: Fisher,
        takes: Takes,
        compress: bool,
        left: Callable[[Mapping[str, Any]], Mapping[str, str]],
        group: Any,
    ) -> None:
        self.model, self.likelihood = uncompiled(model), likelihood
        self.replicas = Replicas(model, group)
        self.called = self.replicas.called  # gives the loss of steps without statistics
        self.fisher, self.takes = fisher, takes
        self._compress = compress
        self._left = left
        self._plans: dict[Any, _Plan] = {}
        self._blocks: Mapping[str, Block] = {}
        self._modules: tuple[nn.Module, ...] = ()  # as long as the blocks are those

    def __getstate__(self) -> dict[str, Any]:
        """Leave out what is found out again."""
        return {**self.__dict__, "_plans": {}, "_blocks": {}, "_modules": ()}

    def batch(self, data: Any) -> Batch:
        """Move one batch to the model; its first of a kind is checked as in `collect`.

        Raises
        ------
        ValueError
            If it is not one batch (x, y), or as `collect`.
        """
        require_gradients()
        parameter = next(p for p in self.model.parameters() if p.is_floating_point())
        if isinstance(data, list):  # as a DataLoader gives it
            data = tuple(data)
        plain = [isinstance(d, Tensor) for d in data] if isinstance(data, tuple) else []
        known = {signature for signature, *_ in self._plans}
        if plain != [True, True] or Batch(data[0], None).signature not in known:
            found = list(batches(data, parameter.device, parameter.dtype, model=self.model))
            if len(found) != 1:
                msg = f"step: one batch (x, y) is expected; {len(found)} were given."
                raise ValueError(msg)
            return found[0]
        return moved(Batch(*data), parameter.device, parameter.dtype)

    def warn_of_fresh_norms(self) -> None:
        """Say that running averages have seen no batch, while the statistics use them."""
        if self.takes == "mean_gradient" and isinstance(self.fisher, Empirical):
            return
        fresh = _fresh_norms(self.model)
        if fresh:
            warn(
                f"NaturalGradient: the running averages of {', '.join(fresh[:5])} have "
                "seen no batch, but the statistics of a step use them, so the first steps "
                "may go uphill. Before the first step, call the model on some fifty "
                "batches in training mode under torch.no_grad()."
            )

    def left(self, batch: Batch, blocks: Mapping[str, Block]) -> Mapping[str, str]:
        """Return the blocks that statistics of a batch leave out, with the reason."""
        return self._plan(batch, blocks).left

    @torch.enable_grad()
    def run(
        self,
        batch: Batch,
        blocks: Mapping[str, Block],
        step: int,
        *,
        observe: Batch | None,
        apart: Collection[str] = (),
    ) -> Passed:
        """Return loss, gradient and, on the batch `observe`, statistics of some blocks.

        Of several processes the loss is that of all examples, statistics are of its own.

        Parameters
        ----------
        apart
            Blocks whose gradient may be left as rows, where a product of factors with
            those is cheaper.

        Raises
        ------
        ValueError
            If there are no labels, or as `collect`.
        """
        given = batch, blocks, step, observe, apart
        passed = self.replicas.together(partial(self._run, *given))
        names = [n for block in blocks.values() for n in block.parameters]
        return self.replicas.averaged(passed, len(batch), names)

    def _run(
        self,
        batch: Batch,
        blocks: Mapping[str, Block],
        step: int,
        observe: Batch | None,
        apart: Collection[str],
    ) -> Passed:
        if batch.y is None:
            msg = "step: the loss needs labels, but y is None; give batch=(x, y)."
            raise ValueError(msg)
        plan = self._plan(batch, blocks)
        thin = self._thin(plan, apart, len(batch)) if apart else {}
        if observe is batch and plan.shared and self._few:
            passed = self._together(plan, batch, self._drawn(step), thin)
            if passed.statistics is None:  # a training pass that differs from the last
                self._plans[self._key(batch, blocks)] = replace(plan, shared=False)
        elif thin:
            passed = in_rows(self.model, self.likelihood, batch, blocks, plan.named, thin)
        else:
            _, losses = forward(self.called, self.likelihood, batch)
            gradients = pulled(losses.mean(), plan.named)
            passed = Passed(losses.detach().mean(), gradients, None)
        if observe is None or passed.statistics is not None:
            return passed
        known = passed.gradients if observe is batch else None
        return replace(passed, statistics=self.observe(observe, blocks, step, known))

    @torch.enable_grad()
    def observe(
        self,
        batch: Batch,
        blocks: Mapping[str, Block],
        step: int,
        known: Gradients | None = None,
    ) -> Observed:
        """Return the statistics of a batch, in evaluation mode: none of it if not counted.

        Parameters
        ----------
        known
            The gradient of this batch at its own labels, where it was computed already;
            methods of mean gradients take it for `Empirical`.
        """
        found: Any = self._observed(batch, blocks, step, known)
        if not batch.counted:
            found = {name: layer.without_examples() for name, layer in found.items()}
        return cast("Observed", found)

    def _observed(
        self,
        batch: Batch,
        blocks: Mapping[str, Block],
        step: int,
        known: Gradients | None,
    ) -> Observed:
        fisher, data = self._drawn(step), (batch.x, batch.y)
        if self.takes == "mean_gradient" and known and isinstance(fisher, Empirical):
            return self._means(blocks, known, len(batch))
        plan = self._plan(batch, blocks)
        if not plan.observed:
            return {}
        with frozen(self.model):
            if self.takes == "mean_gradient":
                return mean_gradient(
                    self.model,
                    data,
                    self.likelihood,
                    fisher=fisher,
                    layers=plan.observed,
                    first=batch.first,
                )
            return collect(
                self.model,
                data,
                self.likelihood,
                fisher,
                layers=plan.observed,
                compress=self._compress,
                first=batch.first,
                probes=plan.probes,
            )

    @torch.no_grad()
    def loss_at(self, batch: Batch) -> Tensor:
        """Return the mean loss of all ranks without a graph, in the model's own mode."""
        assert batch.y is not None
        output = batch.through(self.model, self.called)
        self.likelihood.check(output, batch.y)
        loss = self.likelihood.loss(output, batch.y).mean()
        return self.replicas.averaged(Passed(loss, {}, None), len(batch), ()).loss

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

    def _together(
        self, plan: _Plan, batch: Batch, fisher: Fisher, thin: Mapping[str, Tapped]
    ) -> Passed:
        (found,) = plan.probes.values()
        parts = plan.blocks, plan.named, found.tapped, thin
        return together(self.model, self.likelihood, fisher, batch, *parts)

    def _thin(
        self, plan: _Plan, apart: Collection[str], examples: int
    ) -> dict[str, Tapped]:
        """Return the blocks whose direction costs less from rows than from the gradient.

        For G and A of sizes o and i, m rows take m (o² + i² + o i) multiply-adds, the
        gradient m o i and its direction o i (o + i).
        """
        if not plan.shared or self.called is not self.model:
            return {}
        (found,) = plan.probes.values()
        thin, spared = {}, 0
        for name in (name for name in apart if name in plan.blocks):  # others are frozen
            tap, block = found.tapped.get(name), plan.blocks[name]
            if tap is None or tap.parts != (tap.parts[0].of_whole(block),):
                continue
            if any(plan.named[n]._backward_hooks for n in block.parameters):
                continue  # a hook wants the gradient
            (o, i), rows = block.weight_shape, examples * tap.parts[0].positions
            less = o * i * (o + i) - rows * (o * o + i * i)
            if less > 0:
                thin[name], spared = tap, spared + less
        return thin if spared > WATCHING else {}

    def _key(self, batch: Batch, blocks: Mapping[str, Block]) -> tuple[Any, ...]:
        if blocks is not self._blocks:
            self._blocks, self._modules = blocks, tuple(self.model.modules())
        return batch.signature, tuple(m.training for m in self._modules), tuple(blocks)

    def _plan(self, batch: Batch, blocks: Mapping[str, Block]) -> _Plan:
        """Return the plan for batches like this one; the last few kinds are kept.

        The optimiser gives the same mapping as long as the model is what it was.
        """
        key = self._key(batch, blocks)
        plan = self._plans.pop(key, None)
        if plan is None or plan.blocks is not blocks:
            plan = self._planned(batch, blocks)
        self._plans[key] = plan  # the newest is the last
        while len(self._plans) > PLANS:
            del self._plans[next(iter(self._plans))]
        return plan

    def _planned(self, batch: Batch, blocks: Mapping[str, Block]) -> _Plan:
        named = dict(self.model.named_parameters())
        trained = [name for block in blocks.values() for name in block.parameters]
        plan = _Plan(blocks, {name: named[name] for name in trained}, {})
        if self.takes == "mean_gradient":
            return plan
        pair = batch.part([0, min(1, len(batch) - 1)])
        fisher = self.fisher if self._few and batch.y is not None else MonteCarlo(1)
        expected = self._pair(plan, pair, fisher)
        left = self._left(expected)
        if left:
            plan = replace(plan, probes={}, left=left)
            expected = self._pair(plan, pair, fisher)
        return replace(plan, shared=self._shareable(plan, pair, fisher, expected))

    def _pair(self, plan: _Plan, pair: Batch, fisher: Fisher) -> Mapping[str, Any]:
        """Return statistics of two examples, and fill the plan's probes."""
        if not plan.observed:
            return {}
        with frozen(self.model):
            return collect(
                self.model,
                (pair.x, pair.y),
                self.likelihood,
                fisher,
                layers=plan.observed,
                compress=False,
                probes=plan.probes,
            )

    def _shareable(
        self, plan: _Plan, pair: Batch, fisher: Fisher, expected: Mapping[str, Any]
    ) -> bool:
        """Tell whether one forward pass in this mode gives the statistics of `collect`."""
        if not expected or pair.y is None:
            return False
        (found,) = plan.probes.values()
        if found.general or found.overwrites_data:
            return False
        try:
            require_independent_examples(self.model)
            with buffers_kept(self.model, always=True), drawing(self.model) as drawn:
                passed = self._together(plan, pair, fisher, {})
        except (UnsupportedModelError, RuntimeError, ValueError):
            return False
        if drawn() or passed.statistics is None:
            return False
        try:
            require_equal(passed.statistics, expected)
        except NumericalError:
            return False
        return True

    def _means(
        self, blocks: Mapping[str, Block], gradients: Gradients, count: int
    ) -> dict[str, MeanGradient]:
        """Return the gradient that is known as the statistic of every block."""
        named = dict(self.model.named_parameters())
        made = Provenance.of(self.fisher, self.likelihood, count).by("mean gradient")
        found = {}
        for name, block in blocks.items():
            parts = {
                n: gradients[n] if n in gradients else torch.zeros_like(named[n])
                for n in block.parameters
            }
            about = replace(made, layer=name)
            found[name] = MeanGradient(block, block.pack(parts), count, about)
        return found


def _fresh_norms(model: nn.Module) -> list[str]:
    """Name the norm layers in training mode whose running averages are as made."""
    return [
        name
        for name, module in model.named_modules()
        if module.training
        and isinstance(module, nn.modules.batchnorm._NormBase)
        and module.running_mean is not None
        and module.running_var is not None
        and not bool(module.running_mean.any())
        and bool((module.running_var == 1).all())
    ]
