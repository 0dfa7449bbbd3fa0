"""Natural-gradient descent with any approximation of the Fisher matrix."""

from collections.abc import Callable, Collection, Iterable
from functools import partial
from typing import Any, Literal, final

import torch
from torch import Tensor, nn

from fisherlab.approximators.base import facts
from fisherlab.layers.blocks import exclusive
from fisherlab.likelihoods import Likelihood
from fisherlab.numerics import devices
from fisherlab.operators.base import Damping
from fisherlab.settings import numeric
from fisherlab.showing import shown
from fisherlab.statistics import Empirical, Fisher, MonteCarlo
from fisherlab.statistics.batches import Batch
from fisherlab.statistics.model_view import buffers_kept
from fisherlab.training.curvature import (
    Fallback,
    Preconditioned,
    handler,
    warmed,
)
from fisherlab.training.moves import (
    KLClip,
    Parameters,
    check_schedule,
    clipping,
    momenta,
    move_,
    require_finite,
    zero_unless,
)
from fisherlab.training.one_graph import Passed, returned_loss
from fisherlab.training.passes import Observed
from fisherlab.training.schedules import Averaging, averaging
from fisherlab.training.units import (
    Unit,
    averaged,
    current,
    dampings,
    inverted,
    owners,
    remembering,
)

Place = Literal["direction", "gradient"]


@shown
@numeric
@final
class NaturalGradient(Preconditioned):
    r"""Precondition the gradient with a damped approximation of the Fisher matrix.

    .. math:: d = (\hat F + λI)^{-1} ∇h, \qquad m \leftarrow μ m + d, \qquad
              θ \leftarrow θ - η (m + γ θ)

    h is the mean over examples of the likelihood's loss, and F̂ a moving average over
    batches, so that the first step uses its batch alone.

    Parameters
    ----------
    model
        Its trainable parameters are optimised, block by block.
    likelihood
        Owner of the loss and of the output's distribution.
    approximator
        The name or the value of a method: of single blocks (`fl.approximators()`), of
        mean gradients (Shampoo's preconditioner, `MiniBlock(statistic="mean_gradient")`)
        or of the network (`KFACTridiagonal()`).
    lr
        η. With λ, μ and γ a setting of every parameter group, so that schedulers of
        ``torch.optim.lr_scheduler`` apply.
    damping
        λ as a number or `Tikhonov(λ)`, exactly as it says; `Factored(λ)` for methods with
        Kronecker terms; `RelativeDamping(α)` for α times the mean eigenvalue of each F̂.
        A block whose F̂ and λ are both zero (a dead layer) moves by its gradient.
    momentum
        μ.
    fisher
        Labels of the statistics: `MonteCarlo(1)`, `Exact()` or `Empirical()`. If None
        `MonteCarlo(1)`, or the data's labels for mean gradients and K-BFGS. Sampled
        labels depend on (seed, step, example, draw) only.
    statistics_every, inverse_every
        T₁ and T₂: statistics are taken in steps 0, T₁, 2T₁, … and inverses renewed in
        steps 0, T₂, 2T₂, …
    burn_in
        Steps at the beginning that renew both.
    average
        ρ of `BiasCorrected(ρ)`, or a rule such as `Ramped(ρ)`; 0 for methods that hold
        samples or their own state (CGFAC, SINGD).
    statistics_fraction
        Share of the batch, from its beginning, that the statistics are taken on.
    momentum_of
        Whether momentum adds up directions (as above) or gradients,
        :math:`m \leftarrow μm + ∇h, θ \leftarrow θ - η(\hat F + λI)^{-1} m`.
    clip
        `KLClip(κ)` or None.
    weight_decay
        γ, decoupled from the gradient.
    fallback
        For blocks that the method cannot take (norm layers with KFAC), or not on this
        machine (factors above half of its memory, or minutes of a CPU): "gradient" for
        the plain gradient, or another approximator; None raises. What it took stands in
        the repr.
    params
        Parameters or groups of them, as for any torch optimiser; by default all that are
        trainable. Others of the model stay as they are.
    group
        The process group whose ranks train together, each on its part of every batch; the
        default one, if one is live. `model` is the plain one or that in DDP.

    Raises
    ------
    ValueError
        For settings out of range, parameters that are not the model's, or half precision.
    TypeError
        For what is no likelihood, Fisher, approximator or clip.

    Notes
    -----
    A step is a forward and a backward pass, and on statistics steps one more backward
    pass to the layer outputs, in the same graph where the model is the same in training
    and evaluation mode; else a forward pass in evaluation mode is added. With `Empirical`
    labels there is one backward pass in all. A step that raises leaves parameters and
    state untouched. For methods that couple layers the damping is that of the first group.

    References
    ----------
    Amari 1998; Martens & Grosse 2015, arXiv 1503.05671.

    Examples
    --------
    >>> import fisherlab as fl
    >>> model = nn.Linear(3, 2)
    >>> optimiser = fl.NaturalGradient(
    ...     model, fl.Gaussian(), "kfac", lr=1.0, damping=fl.Factored(1e-3)
    ... )
    >>> x, y = torch.eye(3), torch.zeros(3, 2)
    >>> losses = [optimiser.step(batch=(x, y)).item() for _ in range(3)]
    >>> losses[2] < 0.5 * losses[0]
    True
    """

    key = "natural_gradient"
    kept = ("steps", "exceptions")
    fixed = ("momentum_of",)

    def __init__(
        self,
        model: nn.Module,
        likelihood: Likelihood,
        approximator: Any,
        lr: float,
        damping: Damping,
        momentum: float = 0.9,
        fisher: Fisher | None = None,
        statistics_every: int = 1,
        inverse_every: int = 1,
        average: float | Averaging = 0.95,
        *,
        burn_in: int = 0,
        statistics_fraction: float = 1.0,
        momentum_of: Place = "direction",
        clip: KLClip | None = None,
        weight_decay: float = 0.0,
        fallback: Fallback = None,
        params: Iterable[Any] | None = None,
        group: Any = None,
    ) -> None:
        check_schedule(
            statistics_every, inverse_every, burn_in, statistics_fraction, momentum_of
        )
        if not (clip is None or isinstance(clip, KLClip)):
            raise TypeError(
                f"NaturalGradient: clip={clip!r}; KLClip(κ) or None is expected."
            )
        curvature = handler(approximator, fallback)
        of_mean = facts(curvature.approximator).takes == "mean_gradient"
        of_data = of_mean or curvature.learns
        self.clip, self.fallback, self.momentum_of = clip, fallback, momentum_of
        self.statistics_every, self.inverse_every = statistics_every, inverse_every
        self.burn_in, self.statistics_fraction = burn_in, statistics_fraction
        self.average = averaging(average)
        super().__init__(
            model,
            likelihood,
            curvature,
            fisher or (Empirical() if of_data else MonteCarlo(1)),
            "mean_gradient" if of_mean else "per_example",
            params,
            {"lr": lr, "damping": damping, "momentum": momentum}
            | {"weight_decay": weight_decay},
            group,
        )

    @torch.no_grad()
    def step(  # type: ignore[override]
        self,
        closure: Callable[[], Any] | None = None,
        *,
        batch: Any = None,
        statistics_batch: Any = None,
    ) -> Tensor:
        """Take one step and return the loss before it.

        Parameters
        ----------
        closure
            Computes the loss, calls ``backward`` and returns the loss, as for any torch
            optimiser. Without it loss and gradient are those of the batch.
        batch
            (x, y).
        statistics_batch
            Another batch for the statistics; y may be None for sampled labels.

        Raises
        ------
        ValueError
            If a batch is needed and there is none.
        NumericalError
            If a damped matrix is not positive definite; nothing has changed then.
        """
        self._ready()
        with exclusive(self.model), buffers_kept(self.model):
            return self._step(closure, batch, statistics_batch)

    def _step(self, closure: Any, batch: Any, statistics_batch: Any) -> Tensor:
        parameters = self._parameters()
        before, holding, known = current(self.units, self._owners, parameters)
        due = self.takes_statistics(self.steps) or not (before and known)
        ranks = self._passes.replicas.ranks
        between = not (due or self._due(self.inverse_every)) and ranks is None
        if not between:
            self.look()
        given = closure, batch, statistics_batch
        of_gradient = self.momentum_of == "gradient"
        with devices.postponed(between) as found:
            plain = ranks is None and not of_gradient and self.clip is None
            apart = self.curvature.by_factors(before) if plain else ()
            passed, observed = self._passed(*given, parameters, due, apart)
            statistics = self.curvature.whole(ranks, passed.statistics)
            units, exceptions = self._renewed(statistics, parameters, before)
            if passed.statistics is not None and observed is not None:
                exceptions |= self._passes.left(observed, parameters.blocks)
            gradients = parameters.pack(passed.gradients)
            if of_gradient:
                gradients = momenta(parameters, self.state, gradients)
            directions = self.curvature.directions(units, gradients, passed.rows)
            require_finite(self.steps, directions, gradients, parameters)
        self._unseen += found
        units = remembering(units, directions)
        if self.clip is not None:
            scale = clipping(self.clip, parameters, directions, gradients)
            directions = {name: d * scale for name, d in directions.items()}
        kept = parameters.unpack(gradients) if of_gradient else None
        seen = self.curvature.seen(statistics, parameters, exceptions)
        good = devices.all_good(found)
        moves = parameters.unpack(zero_unless(good, directions))
        move_(parameters, self.state, moves, kept, good)
        self.units, self.exceptions, self._owners = units, exceptions, holding
        if seen and observed is not None:
            own = self._passes.observe(observed, parameters.blocks, self.steps)
            after = self.curvature.whole(ranks, own)
            now = self.curvature.seen(after, parameters, exceptions)
            self.units = self.curvature.learned(units, seen, now)
        self.steps += 1
        return passed.loss

    def warm_start(self, data: Iterable[Any]) -> None:
        """Begin the average with one pass over the data, before the first step.

        Parameters
        ----------
        data
            Batches (x, y). The operators of all batches are averaged with equal weight
            for every example.

        Raises
        ------
        ValueError
            If steps were taken already, or there are no batches.
        """
        if self.steps or self.units:
            raise ValueError(f"warm_start: {self.steps} steps were taken already.")
        if self._passes.replicas.ranks is not None:
            raise ValueError(
                "warm_start takes one process: begin without it, or average more slowly "
                "(average=) in the first steps of several."
            )
        parameters = self._parameters()
        blocks, self._owners = parameters.blocks, owners(parameters)
        read = enumerate(map(self._passes.batch, data))
        seen = ((len(b), self._passes.observe(b, blocks, -1 - k)) for k, b in read)
        self.units, self.exceptions = warmed(self.curvature, seen)

    def _passed(
        self,
        closure: Callable[[], Any] | None,
        batch: Any,
        statistics_batch: Any,
        parameters: Parameters,
        due: bool,
        apart: Collection[str],
    ) -> tuple[Passed, Batch | None]:
        """Return loss, gradients and, where they are due, statistics and their batch."""
        if due and self.steps == 0:
            self._passes.warn_of_fresh_norms()
        main, own = self._batches(batch, statistics_batch)
        observed = own
        if due and own is None and main is not None:
            observed = self._passes.replicas.first_part(main, self.statistics_fraction)
        if closure is None and main is None:
            msg = "step: a batch (x, y) or a closure is expected; see NaturalGradient.step."
            raise ValueError(msg)
        known = parameters.named.items()
        late = [n for n, p in known if getattr(p, "_post_accumulate_grad_hooks", None)]
        if closure is None and late:
            msg = (
                f"step: {', '.join(late)} have hooks of a filled .grad, which a batch does "
                "not fill; give a closure as well."
            )
            raise ValueError(msg)
        if due and observed is None:
            msg = f"step {self.steps}: statistics are due, but no batch was given."
            raise ValueError(msg)
        wanted = observed if due else None
        if closure is None:
            assert main is not None
            run = partial(self._passes.run, main, parameters.blocks, self.steps)
            return run(observe=wanted, apart=apart), observed
        passed = self._passes.replicas.together(
            partial(self._closed, closure, parameters, wanted)
        )
        weight, names = 1 if main is None else len(main), parameters.setting("lr")
        return self._passes.replicas.averaged(passed, weight, names), observed

    def _batches(self, *given: Any) -> tuple[Batch | None, ...]:
        """Read the batches of a step, on all ranks or on none."""
        read = self._passes

        def own() -> list[Batch | None]:
            return [None if data is None else read.batch(data) for data in given]

        return tuple(map(read.replicas.placed, read.replicas.together(own)))

    def _closed(
        self,
        closure: Callable[[], Any],
        parameters: Parameters,
        observed: Batch | None,
    ) -> Passed:
        """Return loss and gradients of a closure, and statistics of a batch."""
        with torch.enable_grad():
            loss = returned_loss(closure())
        named = parameters.named
        known = {n: p.grad for n, p in named.items() if p.grad is not None}
        statistics = None
        if observed is not None:
            statistics = self._passes.observe(observed, parameters.blocks, self.steps)
        return Passed(loss, known, statistics)

    def takes_statistics(self, step: int) -> bool:
        """Tell whether a step takes statistics; the first one is 0."""
        return step % self.statistics_every == 0 or step < self.burn_in

    def _due(self, every: int) -> bool:
        return self.steps % every == 0 or self.steps < self.burn_in

    def _renewed(
        self,
        statistics: Observed | None,
        parameters: Parameters,
        units: dict[str, Unit],
    ) -> tuple[dict[str, Unit], dict[str, str]]:
        """Return the units and exceptions after this step's statistics and inverses."""
        exceptions = self.exceptions
        if statistics is not None:
            ranks = self._passes.replicas.ranks
            fresh, exceptions = self.curvature.fresh(statistics, units, ranks)
            units = averaged(units, fresh, self._share)
        missing = any(unit.inverse is None for unit in units.values())
        if self._due(self.inverse_every) or missing:
            known, once = dampings(units, parameters), self.inverse_every == 1
            units = inverted(units, known, exceptions, once=once)
        return units, exceptions

    def _share(self, unit: Unit) -> float:
        if unit.warm:
            return self.average.warm_share()
        return self.average.share(unit.updates)

    def __repr__(self) -> str:
        """Return the method, the fallback with what it took, and the groups."""
        lines = [f"{self.curvature.approximator!r}, {self.likelihood!r}, {self.fisher!r}"]
        if self.fallback is not None:
            taken = ", ".join(f"{n} ({why})" for n, why in self.exceptions.items())
            lines.append(f"fallback {self.fallback!r}: {taken or 'no block so far'}")
        return f"NaturalGradient of {'; '.join(lines)}\n{super().__repr__()}"
