"""The state of a preconditioner: averaged operators, their ages, their damped inverses."""

from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, replace
from typing import Any, final

from torch import Tensor, nn
from torch.linalg import LinAlgError  # type: ignore[attr-defined]

from fisherlab.approximators import average
from fisherlab.approximators.streaming import NETWORK
from fisherlab.errors import IndefiniteError, NumericalError
from fisherlab.numerics.linalg import Label
from fisherlab.operators.base import Damping, Tikhonov, parsed
from fisherlab.operators.iterative import IterativeInverse
from fisherlab.operators.kronecker import KroneckerSum
from fisherlab.training import serialise
from fisherlab.training.moves import Parameters

Owners = Mapping[str, tuple[nn.Parameter, ...]]  # parameters by block


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


def remembering(units: Units, directions: Mapping[str, Tensor]) -> dict[str, Unit]:
    """Keep the directions that the next iterations start from."""
    return {
        name: replace(unit, last=directions[name])
        if isinstance(unit.inverse, IterativeInverse) and name in directions
        else unit
        for name, unit in units.items()
    }


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


def _mixed(old: Any, new: Any, weight: float) -> Any:
    try:
        return average(old, new, weight)
    except ValueError as error:
        error.add_note(
            "For training: methods that hold samples (CGFAC) or their own averages "
            "(SINGD) need average=0."
        )
        raise


@contextmanager
def factorising(what: object, where: str) -> Iterator[None]:
    """Name method and place where a factorisation fails, as it does on what overflowed.

    Raises
    ------
    NumericalError
        In place of the one that knows the matrix alone.
    """
    try:
        yield
    except IndefiniteError:
        raise
    except (NumericalError, LinAlgError) as error:  # the latter from a method of one's own
        first = str(error).splitlines()[0]
        raise NumericalError(
            f"{what} of {where}: {first} The statistics hold numbers that are not finite "
            "or too far apart: lower the learning rate, raise the damping, or use float64. "
            "No parameter was changed."
        ) from error


def dampings(units: Units, parameters: Parameters) -> dict[str, Damping]:
    """Return the damping of every unit: that of its weight's group, or the first."""
    known, blocks = parameters.setting("damping"), parameters.blocks
    first = parameters.groups[0]["damping"]
    return {n: known[blocks[n].weight] if n in blocks else first for n in units}


def inverted(
    units: Units,
    dampings: Mapping[str, Damping],
    exceptions: Mapping[str, str],
    *,
    once: bool = False,
) -> dict[str, Unit]:
    """Renew the damped inverse of every unit.

    Parameters
    ----------
    dampings
        By unit.
    exceptions
        Units of the fallback, which take λ of a factored damping as Tikhonov's.
    once
        Whether each inverse is used for one step: products of factors stay triangles.

    Raises
    ------
    NumericalError
        If a damped matrix is not positive definite; block and damping are named.
    ValueError
        For a factored damping of a matrix without Kronecker terms.
    """
    found = {}
    for name, unit in units.items():
        with factorising(
            Label("the damped inverse of {}", unit.operator), f"block {name!r}"
        ):
            inverse = _inverse(unit.operator, dampings[name], name in exceptions, once)
        found[name] = replace(unit, inverse=inverse)
    return found


def _inverse(operator: Any, damping: Damping, fallen: bool, once: bool) -> Any:
    own = parsed(damping, operator)
    if own == Tikhonov(0.0) and not getattr(operator, "trace", lambda: 1.0)():
        own = Tikhonov(1.0)  # a dead layer: its gradient, zero as well, is left as it is
    if fallen or isinstance(own, Tikhonov):  # a user's operator may know numbers alone
        return operator.inverse(own.value)
    if once and isinstance(operator, KroneckerSum):
        return operator.cholesky_inverse(own)
    return operator.inverse(own)


def owners(parameters: Parameters) -> dict[str, tuple[nn.Parameter, ...]]:
    """Return the parameters themselves of every block that is optimised."""
    return {
        name: tuple(parameters.named[n] for n in block.parameters)
        for name, block in parameters.blocks.items()
    }


def outline(model: nn.Module) -> tuple[Any, ...]:
    """Return names, modules and parameters in order; `same_outline` compares two.

    Examples
    --------
    >>> model = nn.Sequential(nn.Linear(3, 2), nn.Tanh())
    >>> before = outline(model)
    >>> model[1] = nn.ReLU()
    >>> same_outline(before, outline(model))
    False
    """
    return tuple(
        part
        for name, module in model.named_modules()
        for part in (name, module, *module._parameters, *module._parameters.values())
    )


def same_outline(before: tuple[Any, ...], now: tuple[Any, ...]) -> bool:
    """Tell whether a model has the same modules and parameters under the same names.

    Examples
    --------
    >>> model = nn.Linear(3, 2)
    >>> same_outline(outline(model), outline(model))
    True
    """
    pairs = zip(before, now, strict=False)
    return len(before) == len(now) and all(
        a is b or (isinstance(a, str) and isinstance(b, str) and a == b) for a, b in pairs
    )


def alike(before: Owners, now: Owners) -> bool:
    """Tell whether all blocks of now were there before, of the same parameters."""
    return all(n in before and _key(before[n]) == _key(p) for n, p in now.items())


def followed(units: Units, before: Owners, now: Owners) -> dict[str, Unit]:
    """Return the units that are of today's parameters, under today's names.

    A layer that moved takes its unit with it, one that was replaced leaves it; those of
    blocks that are not optimised now are kept for later.
    """
    if NETWORK in units:
        same = before.keys() == now.keys() and alike(before, now)
        return dict(units) if same else {}
    if alike(before, now):
        return dict(units)
    known = {_key(held): units[n] for n, held in before.items() if n in units}
    found = {n: known[_key(p)] for n, p in now.items() if _key(p) in known}
    taken = {id(p) for held in now.values() for p in held}
    rest = {n for n in before.keys() - now.keys() if taken.isdisjoint(map(id, before[n]))}
    return {n: unit for n, unit in units.items() if n in rest} | found


def current(
    units: Units, before: Owners, parameters: Parameters
) -> tuple[dict[str, Unit], Owners, bool]:
    """Return units and owners as they are now, and whether no block is new."""
    now = owners(parameters)
    found = followed(units, before, now)
    kept = now | {n: before[n] for n in found if n in before and n not in now}
    return matched(found, kept), kept, alike(before, now)


def _key(held: tuple[nn.Parameter, ...]) -> tuple[int, ...]:
    return tuple(map(id, held))


def matched(units: Units, before: Owners) -> dict[str, Unit]:
    """Return the units on the device and in the precision of their parameters.

    Where the precision is another one, the inverse is left to be made again.
    """
    if not before:
        return dict(units)
    first = next(iter(before.values()))
    return {n: _matched(unit, before.get(n, first)[0]) for n, unit in units.items()}


def _matched(unit: Unit, like: nn.Parameter) -> Unit:
    if unit.operator.device != like.device:
        unit = serialise.moved(unit, like.device)
    if unit.operator.dtype == like.dtype:
        return unit
    last = None if unit.last is None else unit.last.to(like.dtype)
    return replace(unit, operator=unit.operator.to(like.dtype), inverse=None, last=last)


def packed(units: Units, before: Owners, named: Mapping[str, Tensor]) -> dict[str, Any]:
    """Return units and the names of their parameters as plain containers."""
    names = {id(p): name for name, p in named.items()}
    known = {
        unit: tuple(names[id(p)] for p in held)
        for unit, held in before.items()
        if all(id(p) in names for p in held)
    }
    return {"units": serialise.pack(units), "owners": known}


def unpacked(
    state: Mapping[str, Any], parameters: Parameters
) -> tuple[dict[str, Unit], dict[str, tuple[nn.Parameter, ...]]]:
    """Return units and owners from plain containers, matched with a model's parameters.

    Raises
    ------
    ValueError
        If they were made of other parameters; names and shapes are compared.
    """
    units: dict[str, Unit] = serialise.unpack(state["units"])
    names = state.get("owners")  # older states have none
    if names is None:
        names = {name: block.parameters for name, block in parameters.blocks.items()}
    named = parameters.named
    wrong = [n for n, unit in units.items() if not _fits(n, unit, names, parameters)]
    if wrong:
        raise ValueError(
            f"load_state_dict: the state is of other parameters: {', '.join(wrong)} do not "
            f"fit the blocks {', '.join(parameters.blocks)}. Nothing was changed."
        )
    known = {
        unit: tuple(named[n] for n in held)
        for unit, held in names.items()
        if all(n in named for n in held)
    }
    return matched(units, known), known


def _fits(name: str, unit: Unit, names: Mapping[str, Any], parameters: Parameters) -> bool:
    """Tell whether a unit can be of a model's parameters."""
    shapes = getattr(unit.operator, "weight_shapes", None)
    if shapes is None:
        shapes = {name: unit.operator.weight_shape}
    for block, (rows, columns) in shapes.items():
        held = names.get(block, ())
        if not held or any(n not in parameters.named for n in held):
            return False
        if sum(parameters.named[n].numel() for n in held) != rows * columns:
            return False
        today = parameters.blocks.get(block)
        same = today is not None and today.parameters == tuple(held)
        if today is not None and same and today.weight_shape != (rows, columns):
            return False
    return True
