"""What one of several processes hands over in a step of training, before they start."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, final

from torch import Tensor, nn

from fisherlab.analysis.cost import Probed
from fisherlab.approximators.base import facts
from fisherlab.approximators.ranks import Sent
from fisherlab.approximators.streaming import sent_in_step
from fisherlab.layers import frozen, uncompiled
from fisherlab.likelihoods import Likelihood
from fisherlab.numerics.devices import parse_budget
from fisherlab.numerics.ranks import Ranks
from fisherlab.problems.problem import Pair, Problem
from fisherlab.settings import numeric
from fisherlab.training.adaptive_kfac import AdaptiveKFAC
from fisherlab.training.curvature import Preconditioned
from fisherlab.training.moves import Parameters
from fisherlab.training.natural_gradient import NaturalGradient
from fisherlab.training.one_graph import of_first
from fisherlab.training.register import optimizer as named
from fisherlab.training.register import optimizers


@final
@dataclass(frozen=True)
class StepBytes:
    """Bytes of tensors that a rank hands over in the steps of an optimiser.

    Parameters
    ----------
    optimizer
        The optimiser.
    gradient
        Of loss and gradients, in every step.
    first, later
        Of what the matrices are made of, in the first step and in later ones that take
        statistics.
    loss
        Bytes of one loss.

    Examples
    --------
    >>> import fisherlab as fl
    >>> told = fl.training.step_bytes(fl.problems.load("digits"), "kfac-eigen", ranks=8)
    >>> told.at(0) == told.gradient + told.first, told.at(5) == told.gradient
    (True, True)
    """

    optimizer: Any
    gradient: Sent
    first: Sent
    later: Sent
    loss: int

    def at(self, step: int) -> Sent:
        """Return what a rank hands over in a step; the first one is 0."""
        own, statistics = self.optimizer, self.later if step else self.first
        if isinstance(own, AdaptiveKFAC):
            return self.gradient + statistics + Sent(self._model(own, step))
        taken = isinstance(own, NaturalGradient) and own.takes_statistics(step)
        return self.gradient + statistics if taken else self.gradient

    def _model(self, optimizer: AdaptiveKFAC, step: int) -> int:
        """Return the bytes of products with the exact Fisher, and of the loss after."""
        tried = len(optimizer.search.candidates(optimizer.gamma, step + 1))
        products = 3 if step else 1  # of the direction; of the last step, and of both
        again = (step + 1) % optimizer.damping.every == 0
        return bool(self.loss) * tried * products * 16 + again * self.loss


@numeric
def step_bytes(
    problem: Problem, optimizer: Any, *, ranks: int, batch_size: int = 64
) -> StepBytes:
    """Count the bytes that one of several processes hands over in a step of training.

    They are what `counted` of `fisherlab.numerics.ranks` measures, on the rank that hands
    over most; nothing is computed. Names and shapes, some hundred bytes a block, are left
    out.

    Parameters
    ----------
    problem
        Whose model is trained, as `take_step` does it.
    optimizer
        One of `optimizers()`, without its warm start, or an optimiser.
    ranks
        How many processes share every batch out.
    batch_size
        Examples of the batch of all ranks.

    Raises
    ------
    ValueError
        For ranks that are no whole number from 1 to the batch size, an unknown name, or
        a method that makes as many passes as its numbers ask for.

    Examples
    --------
    >>> import fisherlab as fl
    >>> problem = fl.problems.load("digits")
    >>> found = [step_bytes(problem, name, ranks=4) for name in ("adam", "k-bfgs")]
    >>> [told.at(0).gathered > 0 for told in found]
    [False, True]
    """
    if not (isinstance(ranks, int) and 1 <= ranks <= batch_size):
        raise ValueError(
            f"step_bytes: ranks={ranks!r} share a batch of {batch_size}: a whole number "
            "from 1 to the batch size is expected."
        )
    if isinstance(optimizer, str):
        known = optimizers().get(optimizer)
        warm = known is not None and "warm_start" in known.settings
        more = {"warm_start": None} if warm else {}
        optimizer = named(optimizer, problem, **more)
    parts = [Ranks(None, rank, ranks).part(batch_size) for rank in range(ranks)]
    counts = [part.stop - part.start for part in parts]
    pair = problem.train[0][:2], problem.train[1][:2]
    given = problem.model, pair, problem.likelihood, optimizer, counts
    alike = {(counts[rank], rank == 0): rank for rank in range(ranks)}
    found = [of_rank(*given, rank) for rank in alike.values()]
    return max(found, key=lambda told: told.first.total)


def of_rank(
    model: nn.Module,
    pair: Pair,
    likelihood: Likelihood,
    optimizer: Any,
    counts: Sequence[int],
    rank: int,
) -> StepBytes:
    """Return the bytes of one rank.

    Parameters
    ----------
    model, pair, likelihood
        The network, two examples with their labels, and the loss.
    optimizer
        Over parameters of the model.
    counts
        Examples of every rank.
    rank
        Which one is meant.

    Raises
    ------
    ValueError
        If the method makes as many passes as its numbers ask for.
    """
    if len(counts) == 1:
        return StepBytes(optimizer, Sent(), Sent(), Sent(), 0)
    plain = uncompiled(model)
    held = {n: p for n, p in plain.named_parameters() if p.requires_grad}
    loss = next(iter(held.values())).dtype.itemsize
    if not isinstance(optimizer, Preconditioned):
        return StepBytes(optimizer, _gradient(held, loss), Sent(), Sent(), loss)
    blocks = Parameters.of(optimizer, plain, "step_bytes").blocks
    own = {name: held[name] for block in blocks.values() for name in block.parameters}
    with frozen(plain):
        probed = Probed.of(plain, pair, likelihood, list(blocks))
    try:
        first, later = _statistics(probed, optimizer, counts, rank)
    except (RuntimeError, NotImplementedError) as error:
        raise ValueError(
            f"step_bytes: {optimizer.curvature.approximator!r} makes as many passes as "
            "its numbers ask for, so its bytes are not known before a step."
        ) from error
    return StepBytes(optimizer, _gradient(own, loss), first, later, loss)


def _gradient(parameters: Mapping[str, Tensor], loss: int) -> Sent:
    """Return the bytes of gradients, of the loss, and of which gradients there are."""
    return Sent(sum(p.nbytes for p in parameters.values()) + (1 + len(parameters)) * loss)


def _statistics(
    probed: Probed, optimizer: Preconditioned, counts: Sequence[int], rank: int
) -> tuple[Sent, Sent]:
    """Return the bytes of one rank's statistics, or of their sums: at first, and later."""
    share: float = getattr(optimizer, "statistics_fraction", 1.0)
    if isinstance(optimizer, AdaptiveKFAC):
        share = optimizer.fractions[0]
    own = of_first(counts, rank, share)
    curvature, limit = optimizer.curvature, parse_budget(None)
    plans, _ = probed.plans(optimizer.fisher, limit, examples=max(own, 1))
    pieces = {n: p.statistics if curvature.couples else p.held for n, p in plans.items()}
    of_mean = facts(curvature.approximator).takes == "mean_gradient"
    left = {} if of_mean else curvature.passed_by(pieces)
    some = {name: piece for name, piece in pieces.items() if name not in left}
    given = curvature.approximator, some, len(counts)
    found = [sent_in_step(*given, later=later) for later in (False, True)]
    first, later = (told if own else Sent(told.added) for told in found)
    return first, later
