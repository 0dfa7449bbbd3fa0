"""What turns statistics into matrices and gradients into directions, and its optimisers."""

from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, replace
from functools import partial
from typing import Any, ClassVar, Literal, cast, final

import torch
from torch import Tensor, nn

from fisherlab.approximators.base import adds, called, facts, held_numbers, learns
from fisherlab.approximators.online import Observation
from fisherlab.approximators.ranks import begun, called_by_all, whole
from fisherlab.approximators.register import named
from fisherlab.approximators.streaming import NETWORK
from fisherlab.codes import described
from fisherlab.errors import BudgetError, FisherlabError, NeedsSharedForm, warn
from fisherlab.layers import uncompiled
from fisherlab.likelihoods import Likelihood
from fisherlab.numerics import devices
from fisherlab.numerics.devices import readable
from fisherlab.numerics.ranks import Ranks, live
from fisherlab.operators import KroneckerSum, Operator
from fisherlab.operators.iterative import IterativeInverse
from fisherlab.operators.kronecker_congruence import KroneckerCholesky, solved
from fisherlab.samples import Samples
from fisherlab.statistics import Fisher
from fisherlab.statistics.fishers import require_kinds
from fisherlab.training import serialise
from fisherlab.training.moves import Parameters, check_group, match_
from fisherlab.training.one_graph import Rows
from fisherlab.training.passes import PLANS, Passes, Takes
from fisherlab.training.units import (
    Owners,
    Unit,
    Units,
    averaged,
    outline,
    packed,
    same_outline,
    unpacked,
)
from fisherlab.training.units import factorising as _named

LONG = 10**12  # multiply-adds, about a minute of two plain cores
Side = Callable[[Tensor], Tensor]  # the product with one factor
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
        What takes the blocks that the approximator cannot, or not on this machine:
        "gradient", an approximator, or None to raise. A block is too large where its
        matrices exceed half of the memory, or take minutes to factorise on a CPU.
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
        return learns(self.approximator)

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
        return adds(self.approximator)

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
                self._require_affordable(layer, previous)
                if len(layer.by_group()) > 1:  # each group has a warm start of its own
                    rest[name] = layer
                else:
                    states[name] = begun(method, layer, previous)
            except (NeedsSharedForm, BudgetError):
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
                self._require_affordable(layer, previous)
                made[name] = self._made(self.approximator, layer, previous)
            except (NeedsSharedForm, BudgetError) as error:
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

    def _require_affordable(self, layer: Any, previous: Any = None) -> None:
        """Refuse, or with a fallback leave to it, what cannot be trained with; or warn.

        A block that the method had before is not asked about again: only another
        approximator's operator may be in its place.

        Raises
        ------
        BudgetError
            Naming the bytes, or with a fallback what a renewal takes.
        """
        if previous is not None and self.fallback in (None, "gradient"):
            return
        need, long = _needs(self.approximator, layer)
        if need is None and long is None:
            return
        block = f"{self.approximator!r} of block {layer.block.name!r}"
        advice = (
            "Give fallback='gradient' (or any approximator) for such blocks, or leave "
            "their parameters out with `params=`."
        )
        if need is not None or self.fallback is not None:
            raise BudgetError(f"{block}: {need or long}. {advice}")
        warn(f"{block}: {long}. {advice}")

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
                self._require_affordable(layer)
                if not layer.is_shared:
                    called(self.approximator, layer, None)
            except (NeedsSharedForm, BudgetError) as error:
                found[name] = _reason(error)
            except (FisherlabError, RuntimeError):  # too few examples: it takes the block
                continue
        return found

    def directions(
        self,
        units: Units,
        gradients: Mapping[str, Tensor],
        rows: Mapping[str, Rows] | None = None,
    ) -> dict[str, Tensor]:
        """Return the inverses times the gradients; gradients of blocks without unit.

        Parameters
        ----------
        rows
            In place of the gradient gᵀ a of a block of `by_factors`, g and a.
        """
        if self.couples:
            return _joint_directions(units[NETWORK].inverse, gradients)
        found = {
            name: _direction(units[name], gradient) if name in units else gradient
            for name, gradient in gradients.items()
        }
        for name, (outputs, inputs) in (rows or {}).items():
            sides = _sides(units[name].inverse)
            if sides is None:  # a renewal found another form
                found[name] = _direction(units[name], outputs.T @ inputs)
            else:
                found[name] = sides[0](outputs.T) @ sides[1](inputs.T).T
        return found

    def by_factors(self, units: Units) -> list[str]:
        """Name the blocks whose inverse is one product of factors."""
        if self.couples:
            return []
        return [name for name, unit in units.items() if _sides(unit.inverse)]


def _needs(method: Any, layer: Any) -> tuple[str | None, str | None]:
    """Say which memory a block's matrices lack, and which renewal takes minutes."""
    samples: Samples | None = getattr(layer, "samples", None)  # a mean gradient has none
    like = layer.gradient if samples is None else samples
    held = 0 if samples is None else held_numbers(method, samples)
    if facts(method).takes == "mean_gradient" and hasattr(method, "holds"):
        held = method.holds(layer.block)
    # new, averaged and inverted, and two copies in float64 while that is made
    need = held * (3 * like.dtype.itemsize + 2 * 8)
    limit = devices.total_bytes(like.device) // 2
    if need > limit and live() is None:  # ranks on unlike machines must choose alike
        half = f"half of the memory is {readable(limit)}"
        return f"its matrices take {readable(need)}, {half}", None
    shape = layer.weight_shape
    rows, cubes = max(shape), sum(size**3 for size in shape)
    inverts = facts(method).result in ("factors", "terms") and held >= rows**2
    if inverts and not devices.is_accelerator(like.device) and cubes > LONG:
        return None, f"a factor of {rows:,} rows takes minutes to invert on a CPU"
    return None, None


def _reason(error: NeedsSharedForm | BudgetError) -> str:
    if isinstance(error, NeedsSharedForm):
        return f"{error.method} needs the shared form"
    return str(error).partition(": ")[2].partition(". ")[0]


def _sides(inverse: Any) -> tuple[Side, Side] | None:
    """Return products with the factors of an inverse that is one product of them."""
    if isinstance(inverse, KroneckerSum) and len(inverse.terms) == 1:
        rows, cols = inverse.terms[0]
        return rows.__matmul__, cols.__matmul__
    if isinstance(inverse, KroneckerCholesky):
        rows, cols = inverse.triangles
        return partial(solved, rows), partial(solved, cols)
    return None


def _direction(unit: Unit, gradient: Tensor) -> Tensor:
    """Return the inverse times a gradient, from the last direction if it is iterated."""
    inverse = unit.inverse
    if not isinstance(inverse, IterativeInverse):
        sides = _sides(inverse)
        if sides is None:
            return cast(Tensor, inverse @ gradient)
        return sides[1](sides[0](gradient).T).T
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
        If a name is unknown, or the fallback takes other statistics.
    TypeError
        For what is no approximator.
    """
    method = named(chosen)
    if method is None:
        raise TypeError(
            "approximator=None: a name or a value such as fl.KFAC() is expected."
        )
    other = fallback if fallback == "gradient" else named(fallback, "block")
    if callable(other) and "mean_gradient" == facts(method).takes != facts(other).takes:
        raise ValueError(
            f"fallback={fallback!r}: {method!r} is given mean gradients, which this one "
            "does not take; 'gradient' or 'adam' do."
        )
    return Curvature(method, other)


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
        raise ValueError("warm_start: no batch was given.")
    return units, exceptions


def _constant(value: float, unit: Unit) -> float:
    return value


class Preconditioned(torch.optim.Optimizer):
    """An optimiser over the blocks of a model, whose units hold matrices and inverses."""

    key: ClassVar[str]  # of its part of a state dict
    kept: ClassVar[tuple[str, ...]]  # what stands there beside the units
    fixed: ClassVar[tuple[str, ...]]  # settings that say what the state stands for

    def __init__(
        self,
        model: nn.Module,
        likelihood: Likelihood,
        curvature: Curvature,
        fisher: Fisher,
        takes: Takes,
        params: Iterable[Any] | None,
        settings: dict[str, Any],
        group: Any = None,
    ) -> None:
        require_kinds(likelihood, fisher)
        self.curvature, self.fisher = curvature, fisher
        self.model, self.likelihood = uncompiled(model), likelihood
        compress, left = not curvature.couples, curvature.passed_by
        self._passes = Passes(model, likelihood, fisher, takes, compress, left, group)
        self.steps = 0
        self.units: dict[str, Unit] = {}
        self.exceptions: dict[str, str] = {}
        self._owners: Owners = {}
        self._unseen: list[devices.Look] = []
        self._outline: tuple[Any, ...] = ()
        self._known: dict[Any, Parameters] = {}  # of this outline
        trainable = [p for p in self.model.parameters() if p.requires_grad]
        moved = trainable if params is None else list(params)
        super().__init__(moved or [{"params": []}], settings)
        if not any(group["params"] for group in self.param_groups):
            given = (
                "the model has no trainable parameter" if params is None else "params=[]"
            )
            msg = f"{type(self).__name__}: {given}; at least one to optimise is expected."
            raise ValueError(msg)

    def add_param_group(self, param_group: dict[str, Any]) -> None:
        """Add a group of the model's parameters with its own settings.

        Raises
        ------
        ValueError
            For settings out of range, foreign parameters or half precision.
        """
        super().add_param_group(param_group)
        try:
            check_group(self.param_groups[-1], self.model, type(self).__name__)
        except Exception:
            self.param_groups.pop()
            raise

    def _ready(self) -> None:
        """Refuse autocast; bring the state to the parameters' precision and device."""
        moved = [p for group in self.param_groups for p in group["params"]]
        if not any(p.requires_grad for p in moved):
            msg = f"{type(self).__name__}: none of its parameters is trainable any more."
            raise ValueError(msg)
        device = moved[0].device
        if torch.is_autocast_enabled(device.type):
            name = type(self).__name__
            raise ValueError(f"{name}: factorisations need full precision; leave autocast.")
        match_(self.state)

    def look(self) -> None:
        """Look at the steps since the last renewal, and raise what was wrong with one.

        On an accelerator a step that renews nothing does not wait: what is not finite
        there, or has wrong labels, moves no parameter, and the next renewal,
        `state_dict` or this tells of it.
        """
        unseen, self._unseen = self._unseen, []
        devices.look(unseen)

    def _parameters(self) -> Parameters:
        """Return what is optimised now, found again where the model is another one."""
        now = outline(self.model)
        if not same_outline(self._outline, now):
            self._outline, self._known = now, {}
        parts = (p for p in now if isinstance(p, nn.Parameter))
        wanted = tuple((p.requires_grad, p.shape) for p in parts)
        held = tuple(id(p) for group in self.param_groups for p in group["params"])
        found = self._known.pop((wanted, held), None)
        if found is None:
            found = Parameters.of(self, self.model, type(self).__name__)
        self._known[wanted, held] = found  # the newest is the last
        if len(self._known) > PLANS:
            del self._known[next(iter(self._known))]
        return replace(found, groups=self.param_groups)

    def __getstate__(self) -> dict[str, Any]:
        """Copy and pickle with the model and all state; torch's own leaves them out."""
        self.look()
        return {**serialise.lasting(self), "_outline": (), "_known": {}}

    def state_dict(self) -> dict[str, Any]:
        """Return all state as plain containers of tensors, safe for ``weights_only``."""
        self.look()
        found = super().state_dict()
        found["param_groups"] = serialise.pack(found["param_groups"])
        own = serialise.pack({name: getattr(self, name) for name in self.kept})
        own["of"] = self._of()
        named = dict(self.model.named_parameters())
        found[self.key] = own | packed(self.units, self._owners, named)
        return found

    def _of(self) -> dict[str, str]:
        """Describe what gives the state its meaning, and may not be another one."""
        own = [
            (name, getattr(self.curvature, name)) for name in ("approximator", "fallback")
        ]
        own += [(name, getattr(self, name)) for name in self.fixed]
        return {name: described(part) for name, part in own}

    def load_state_dict(self, state_dict: Mapping[str, Any]) -> None:
        """Continue from a state: bit for bit, or in the precision of the parameters.

        Raises
        ------
        ValueError
            If the state is not of this kind of optimiser, or of another method or other
            parameters.
        """
        if self.key not in state_dict:
            msg = "load_state_dict: the state of another kind of optimiser was given."
            raise ValueError(msg)
        own = state_dict[self.key]
        lost = [name for name in ("state", "param_groups") if name not in state_dict]
        lost += [name for name in ("units", *self.kept) if name not in own]
        if lost:
            gone = ", ".join(lost)
            msg = f"load_state_dict: the state lacks {gone}; nothing was changed."
            raise ValueError(msg)
        now = self._of()
        before = own.get("of", now)  # older states have none
        unlike = [name for name in now if now[name] != before.get(name)]
        if unlike:
            theirs, ours = (
                ", ".join(f"{n}={of.get(n)}" for n in unlike) for of in (before, now)
            )
            raise ValueError(
                f"load_state_dict: the state has {theirs}, this optimiser {ours}; make it "
                "with the same. Nothing was changed."
            )
        groups = serialise.unpack(state_dict["param_groups"])
        units, known = unpacked(own, self._parameters())
        super().load_state_dict({**state_dict, "param_groups": groups})
        self.units, self._owners, self._unseen = units, known, []
        for name in self.kept:
            setattr(self, name, serialise.unpack(own[name]))
