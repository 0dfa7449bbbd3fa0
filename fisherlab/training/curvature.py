"""What turns statistics into matrices, and gradients into directions."""

from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, replace
from functools import partial
from typing import Any, Literal, final

from torch import Tensor

from fisherlab.approximators.base import OfSums, called, facts
from fisherlab.approximators.online.k_bfgs import Observation
from fisherlab.approximators.ranks import begun, called_by_all, whole
from fisherlab.approximators.register import named
from fisherlab.approximators.streaming import NETWORK
from fisherlab.errors import FisherlabError, NeedsSharedForm
from fisherlab.numerics.ranks import Ranks
from fisherlab.operators import Operator
from fisherlab.operators.iterative import IterativeInverse
from fisherlab.training.moves import Parameters
from fisherlab.training.units import Unit, Units, averaged
from fisherlab.training.units import factorising as _named

Fallback = Any  # "gradient", or the name or the value of an approximator


@final
@dataclass(frozen=True)
class Curvature:
    """Handle an approximator: a unit for each block, or one where it couples them.

    Parameters
    ----------
    approximator
        Called with a block's statistics and its last operator, or with those of all.
    fallback
        What takes the blocks that the approximator cannot: "gradient", an approximator,
        or None to raise.
    """

    approximator: Callable[..., Operator]
    fallback: Callable[..., Operator] | Literal["gradient"] | None = None

    @property
    def couples(self) -> bool:
        """Whether the approximator takes the statistics of all blocks at once."""
        return facts(self.approximator).couples

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

    @property
    def adds(self) -> bool:
        """Whether several processes add up the sums of the method, not its samples."""
        kept = self.couples or self.learns
        return isinstance(self.approximator, OfSums) and not kept

    def whole(
        self, ranks: Ranks | None, statistics: Mapping[str, Any] | None
    ) -> Mapping[str, Any] | None:
        """Return statistics of all ranks, where the method does not add up sums."""
        if ranks is None or statistics is None or self.adds:
            return statistics
        return whole(ranks, statistics)

    def _fresh_by_all(
        self, ranks: Ranks, statistics: Mapping[str, Any], units: Units
    ) -> tuple[dict[str, Any], dict[str, str]]:
        """Return what `fresh` does, from the sums of all ranks."""
        method: Any = self.approximator
        states: dict[str, Any] = {}
        rest: dict[str, Any] = {}
        for name, layer in statistics.items():
            previous = units[name].operator if name in units else None
            try:
                if len(layer.by_group()) > 1:  # each group has a warm start of its own
                    rest[name] = layer
                else:
                    states[name] = begun(method, layer, previous)
            except NeedsSharedForm:
                rest[name] = layer
        with _named(repr(method), "the blocks of all ranks"):
            made = called_by_all(ranks, method, states, statistics)
        more, exceptions = self.fresh(whole(ranks, rest), units) if rest else ({}, {})
        both = {**made, **more}
        return {name: both[name] for name in statistics if name in both}, exceptions

    def fresh(
        self, statistics: Mapping[str, Any], units: Units, ranks: Ranks | None = None
    ) -> tuple[dict[str, Any], dict[str, str]]:
        """Return new operators, and the blocks left to the fallback with the reason.

        Parameters
        ----------
        statistics
            Of `whole`: with several ranks of this one's examples where the method adds.

        Raises
        ------
        NeedsSharedForm
            If there is no fallback for a block without inputs and output gradients.
        """
        if ranks is not None and self.adds:
            return self._fresh_by_all(ranks, statistics, units)
        if self.couples:
            with _named(repr(self.approximator), "the network"):
                return {NETWORK: self.approximator(statistics)}, {}
        made: dict[str, Any] = {}
        exceptions: dict[str, str] = {}
        for name, layer in statistics.items():
            previous = units[name].operator if name in units else None
            try:
                made[name] = self._made(self.approximator, layer, previous)
            except NeedsSharedForm as error:
                if self.fallback is None:
                    error.add_note(
                        "For training: fallback='gradient' takes the plain gradient of "
                        "such blocks, fallback='diagonal' (or any approximator) another "
                        "matrix."
                    )
                    raise
                exceptions[name] = _reason(error)
                if self.fallback != "gradient":
                    made[name] = self._made(self.fallback, layer, previous)
        return made, exceptions

    def _made(self, method: Any, layer: Any, previous: Any) -> Any:
        with _named(repr(method), f"block {layer.block.name!r}"):
            return called(method, layer, previous)

    def passed_by(self, statistics: Mapping[str, Any]) -> dict[str, str]:
        """Return the blocks whose statistics would not be used, with the reason.

        Parameters
        ----------
        statistics
            Of a few examples: enough to see the form of every block.
        """
        found: dict[str, str] = {}
        if self.couples or self.fallback != "gradient":
            return found
        for name, layer in statistics.items():
            try:
                if not layer.is_shared:
                    called(self.approximator, layer, None)
            except NeedsSharedForm as error:
                found[name] = _reason(error)
            except (FisherlabError, RuntimeError):  # too few examples: it takes the block
                continue
        return found

    def directions(
        self, units: Units, gradients: Mapping[str, Tensor]
    ) -> dict[str, Tensor]:
        """Return the inverses times the gradients; gradients of blocks without unit."""
        if self.couples:
            return _joint_directions(units[NETWORK].inverse, gradients)
        return {
            name: _direction(units[name], gradient) if name in units else gradient
            for name, gradient in gradients.items()
        }


def _reason(error: NeedsSharedForm) -> str:
    return f"{error.method} needs the shared form"


def _direction(unit: Unit, gradient: Tensor) -> Tensor:
    """Return the inverse times a gradient, from the last direction if it is iterated."""
    inverse = unit.inverse
    if not isinstance(inverse, IterativeInverse):
        found: Tensor = inverse @ gradient
        return found
    start = None if unit.last is None else unit.last[None]
    return inverse.checked(inverse.solution(gradient[None], start)).value[0]


def _joint_directions(inverse: Any, gradients: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Return the inverse times the gradients of all blocks, zero where unused."""
    like = next(iter(gradients.values()))
    unused = inverse.weight_shapes.keys() - gradients.keys()
    filled = {n: like.new_zeros(inverse.weight_shapes[n]) for n in unused}
    found = inverse @ {**gradients, **filled}
    return {name: found[name] for name in gradients}


def handler(chosen: Any, fallback: Fallback) -> Curvature:
    """Read an approximator and a fallback, given by name or as values.

    Raises
    ------
    ValueError
        If a name is unknown.
    """
    other = fallback if fallback == "gradient" else named(fallback, "block")
    return Curvature(named(chosen), other)


def warmed(
    curvature: Curvature, observed: Iterable[tuple[int, Mapping[str, Any]]]
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
