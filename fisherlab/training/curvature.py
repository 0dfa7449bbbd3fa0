"""The state of a preconditioner: averaged operators, their ages, their damped inverses."""

import inspect
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, replace
from functools import partial
from typing import Any, Literal, final

from torch import Tensor

from fisherlab.analysis.damping import RelativeDamping
from fisherlab.approximators import average
from fisherlab.approximators.k_bfgs import Observation
from fisherlab.approximators.network import network_approximators
from fisherlab.approximators.register import by_name
from fisherlab.errors import NeedsSharedForm
from fisherlab.layers import Block
from fisherlab.operators import Operator
from fisherlab.operators.dampings import Damping, Factored, tikhonov
from fisherlab.operators.iterative import IterativeInverse
from fisherlab.operators.network import NetworkOperator
from fisherlab.training.moves import Parameters

AnyDamping = Damping | RelativeDamping
NETWORK = "network"  # the name of the one unit of a method that couples layers
Fallback = Any  # "gradient", or the name or the value of an approximator


@final
@dataclass(frozen=True, eq=False)
class Unit:
    """What is known of one block, or of all blocks where they are coupled.

    Parameters
    ----------
    operator
        The averaged matrix.
    updates
        Batches in the average.
    warm
        Whether the average began with a pass over the data.
    inverse
        The damped inverse in use, which may be older than the operator.
    last
        The last direction of an inverse that is iterated for: where it starts next.
    """

    operator: Any
    updates: int = 0
    warm: bool = False
    inverse: Any = None
    last: Tensor | None = None


Units = Mapping[str, Unit]


@final
@dataclass(frozen=True)
class Coupled:
    """Handle an approximator of the whole network: one unit for all blocks."""

    approximator: Callable[..., Any]
    learns = False

    def fresh(
        self, statistics: Mapping[str, Any], units: Units
    ) -> tuple[dict[str, Any], dict[str, str]]:
        """Return the new operator under the name "network", and no exceptions."""
        return {NETWORK: self.approximator(statistics)}, {}

    def directions(
        self, units: Units, gradients: Mapping[str, Tensor]
    ) -> dict[str, Tensor]:
        """Return the inverse times the gradients of all blocks, zero where unused."""
        inverse = units[NETWORK].inverse
        like = next(iter(gradients.values()))
        unused = inverse.weight_shapes.keys() - gradients.keys()
        filled = {n: like.new_zeros(inverse.weight_shapes[n]) for n in unused}
        found = inverse @ {**gradients, **filled}
        return {name: found[name] for name in gradients}

    def seen(self, statistics: Any, parameters: Any, exceptions: Any) -> dict[str, Any]:
        """Return nothing."""
        return {}

    def learned(self, units: Units, before: Any, after: Any) -> dict[str, Unit]:
        """Return the units as they are."""
        return dict(units)


@final
@dataclass(frozen=True)
class Blockwise:
    """Handle an approximator of single blocks: one unit each, with a fallback.

    Parameters
    ----------
    approximator
        Called with a block's statistics and its last operator.
    fallback
        What takes the blocks that the approximator cannot: "gradient", an approximator,
        or None to raise.
    """

    approximator: Callable[..., Operator]
    fallback: Callable[..., Operator] | Literal["gradient"] | None = None

    @property
    def learns(self) -> bool:
        """Whether the method is shown the batch before and after a step (K-BFGS)."""
        return hasattr(self.approximator, "observe")

    def seen(
        self,
        statistics: Mapping[str, Any] | None,
        parameters: Parameters,
        exceptions: Mapping[str, str],
    ) -> dict[str, Observation]:
        """Return what a method that learns from steps sees of a batch, else nothing."""
        if statistics is None or not self.learns:
            return {}
        held = {name: p.detach() for name, p in parameters.named.items()}
        weights = parameters.pack(held)
        own = {n: layer for n, layer in statistics.items() if n not in exceptions}
        return {name: Observation.of(layer, weights[name]) for name, layer in own.items()}

    def learned(
        self, units: Units, before: Mapping[str, Any], after: Mapping[str, Any]
    ) -> dict[str, Unit]:
        """Return the units after showing the method what a step changed."""
        show: Callable[..., Operator] = getattr(self.approximator, "observe")  # noqa: B009
        found = dict(units)
        for name, seen in before.items():
            operator = show(units[name].operator, seen, after[name])
            found[name] = replace(units[name], operator=operator)
        return found

    def fresh(
        self, statistics: Mapping[str, Any], units: Units
    ) -> tuple[dict[str, Any], dict[str, str]]:
        """Return new operators, and the blocks left to the fallback with the reason.

        Raises
        ------
        NeedsSharedForm
            If there is no fallback for a block without inputs and output gradients.
        """
        made: dict[str, Any] = {}
        exceptions: dict[str, str] = {}
        for name, layer in statistics.items():
            previous = units[name].operator if name in units else None
            try:
                made[name] = self.approximator(layer, previous=previous)
            except NeedsSharedForm as error:
                if self.fallback is None:
                    error.add_note(
                        "For training: fallback='gradient' takes the plain gradient of "
                        "such blocks, fallback='diagonal' (or any approximator) another "
                        "matrix."
                    )
                    raise
                exceptions[name] = f"{error.method} needs the shared form"
                if self.fallback != "gradient":
                    made[name] = self.fallback(layer, previous=previous)
        return made, exceptions

    def directions(
        self, units: Units, gradients: Mapping[str, Tensor]
    ) -> dict[str, Tensor]:
        """Return the inverses times the gradients; gradients of blocks without unit."""
        return {
            name: _direction(units[name], gradient) if name in units else gradient
            for name, gradient in gradients.items()
        }


def _direction(unit: Unit, gradient: Tensor) -> Tensor:
    """Return the inverse times a gradient, from the last direction if it is iterated."""
    inverse = unit.inverse
    if not isinstance(inverse, IterativeInverse):
        found: Tensor = inverse @ gradient
        return found
    start = None if unit.last is None else unit.last[None]
    return inverse.checked(inverse.solution(gradient[None], start)).value[0]


def remembering(units: Units, directions: Mapping[str, Tensor]) -> dict[str, Unit]:
    """Keep the directions that the next iterations start from."""
    return {
        name: replace(unit, last=directions[name])
        if isinstance(unit.inverse, IterativeInverse) and name in directions
        else unit
        for name, unit in units.items()
    }


def handler(chosen: Any, fallback: Fallback) -> Blockwise | Coupled:
    """Read an approximator and a fallback, given by name or as values.

    Raises
    ------
    ValueError
        If a name is unknown.
    """
    approximator = named(chosen)
    if couples(approximator):
        return Coupled(approximator)
    if fallback is None or fallback == "gradient":
        return Blockwise(approximator, fallback)
    return Blockwise(approximator, named(fallback))


def named(chosen: Any) -> Any:
    """Return the approximator of a name, of blocks or of the network, or the value itself.

    Raises
    ------
    ValueError
        If the name is unknown.
    """
    if not isinstance(chosen, str):
        return chosen
    of_networks = network_approximators()
    return of_networks[chosen] if chosen in of_networks else by_name([chosen])[chosen]


def couples(approximator: Any) -> bool:
    """Tell whether an approximator takes the statistics of all blocks at once.

    Those of single blocks are called with ``previous``, see `Approximator`.
    """
    return "previous" not in inspect.signature(approximator).parameters


def averaged(
    units: Units,
    fresh: Mapping[str, Any],
    share: Callable[[Unit], float],
    *,
    warm: bool = False,
) -> dict[str, Unit]:
    """Average new operators into the units; inverses stay as they are.

    Parameters
    ----------
    share
        From a unit to the weight of its old operator.
    warm
        Whether this is part of a pass over the data before training.

    Raises
    ------
    ValueError
        If the operators of the method have no average.
    """
    found = dict(units)
    for name, new in fresh.items():
        old = units.get(name)
        if old is None:
            found[name] = Unit(new, 1, warm)
            continue
        weight = share(old)
        operator = _mixed(old.operator, new, weight) if weight else new
        found[name] = replace(
            old, operator=operator, updates=old.updates + 1, warm=old.warm or warm
        )
    return found


def warmed(
    curvature: Blockwise | Coupled, observed: Iterable[tuple[int, Mapping[str, Any]]]
) -> tuple[dict[str, Unit], dict[str, str]]:
    """Return units and exceptions after one pass over the data.

    Parameters
    ----------
    observed
        Examples and statistics of every batch.

    Raises
    ------
    ValueError
        If there is no batch, or the operators of the method have no average.
    """
    units: dict[str, Unit] = {}
    exceptions: dict[str, str] = {}
    seen = 0
    for examples, statistics in observed:
        fresh, exceptions = curvature.fresh(statistics, units)
        seen += examples
        share = partial(_constant, 1 - examples / seen)
        units = averaged(units, fresh, share, warm=True)
    if not seen:
        msg = "warm_start: no batch was given."
        raise ValueError(msg)
    return units, exceptions


def _constant(value: float, unit: Unit) -> float:
    return value


def _mixed(old: Any, new: Any, weight: float) -> Any:
    try:
        return average(old, new, weight)
    except ValueError as error:
        error.add_note(
            "For training: methods that hold samples (CGFAC) or their own averages "
            "(SINGD) need average=0."
        )
        raise


def dampings(units: Units, parameters: Parameters) -> dict[str, AnyDamping]:
    """Return the damping of every unit: that of its weight's group, or the first."""
    known, blocks = parameters.setting("damping"), parameters.blocks
    first = parameters.groups[0]["damping"]
    return {n: known[blocks[n].weight] if n in blocks else first for n in units}


def inverted(
    units: Units, dampings: Mapping[str, AnyDamping], exceptions: Mapping[str, str]
) -> dict[str, Unit]:
    """Renew the damped inverse of every unit.

    Parameters
    ----------
    dampings
        By unit.
    exceptions
        Units of the fallback, which take λ of a factored damping as Tikhonov's.

    Raises
    ------
    NumericalError
        If a damped matrix is not positive definite; block and damping are named.
    ValueError
        For a factored damping of a matrix without Kronecker terms.
    """
    return {
        name: replace(
            unit, inverse=_inverse(unit.operator, dampings[name], name in exceptions)
        )
        for name, unit in units.items()
    }


def _inverse(operator: Any, damping: AnyDamping, fallen: bool) -> Any:
    if isinstance(damping, RelativeDamping):
        alpha = _single(damping)
        return operator.inverse(alpha * operator.trace() / max(operator.shape[0], 1))
    if isinstance(damping, Factored):
        if fallen:
            return operator.inverse(damping.value)
        if hasattr(operator, "damped") or isinstance(operator, NetworkOperator):
            return operator.inverse(damping)
    return operator.inverse(tikhonov(damping, repr(operator)))


def _single(damping: RelativeDamping) -> float:
    assert isinstance(damping.alphas, tuple)
    if len(damping.alphas) != 1:
        msg = f"{damping!r}: an optimiser takes one fraction."
        raise ValueError(msg)
    return damping.alphas[0]


def require_fit(units: Mapping[str, Unit], blocks: Mapping[str, Block]) -> None:
    """Refuse units that were made of other blocks.

    Raises
    ------
    ValueError
        Naming the blocks that are unknown or have another shape.
    """
    wrong = [
        name
        for name, unit in units.items()
        if name != NETWORK
        and (name not in blocks or not _fits(unit.operator, blocks[name]))
    ]
    if wrong:
        msg = (
            f"load_state_dict: the state is of other parameters: {', '.join(wrong)} do not "
            f"fit the blocks {', '.join(blocks)}. Nothing was changed."
        )
        raise ValueError(msg)


def _fits(operator: Any, block: Block) -> bool:
    return getattr(operator, "weight_shape", block.weight_shape) == block.weight_shape
