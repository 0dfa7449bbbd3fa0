"""Cells of a labelled table, with the dampings they stand for, and how far a table is."""

import json
import sys
import time
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from datetime import UTC, datetime
from functools import cached_property
from typing import Any, NamedTuple, TypeVar, final

import numpy as np
import xarray as xr

import fisherlab
from fisherlab.analysis.counts import room
from fisherlab.approximators import Approximator
from fisherlab.approximators.base import operator_of
from fisherlab.catalogue import QUANTITIES, Needs, quantity
from fisherlab.errors import FisherlabError, IndefiniteError, NeedsSharedForm
from fisherlab.metrics import BelowFloor
from fisherlab.numerics.devices import require
from fisherlab.operators import Operator, Provenance
from fisherlab.operators.base import Damping as One
from fisherlab.operators.base import Factored, RelativeDamping, Tikhonov, parsed
from fisherlab.statistics import LayerStatistics, Statistics

Telling = bool | Callable[["Done"], Any]
"""What `progress=` may be: no, a bar on stderr, or a function of `Done`."""


class Done(NamedTuple):
    """What a callable given as `progress` is told after every layer, seed or method."""

    layer: str
    done: int
    layers: int
    seconds: float


def teller(progress: Telling, count: int, unit: str = "layer") -> Callable[[str], None]:
    """Return what is called after each part: nothing, a bar, or a callable of `Done`."""
    began, done = time.monotonic(), 0
    bar: Any = None
    if progress is True:
        from tqdm.auto import tqdm

        bar = tqdm(total=count, desc=f"{unit}s", unit=unit)

    def tell(name: str) -> None:
        nonlocal done
        done += 1
        if bar is not None:
            bar.set_postfix_str(name)
            bar.update()
            if done == count:
                bar.close()
        elif callable(progress):
            progress(Done(name, done, count, time.monotonic() - began))

    return tell


def watched(names: Iterable[str], progress: Telling, unit: str = "layer") -> Iterator[str]:
    """Give names in turn, and tell of each when the next one is asked for.

    Examples
    --------
    >>> for name in watched(["fc1", "fc2"], lambda done: print(done[:3])):
    ...     pass
    ('fc1', 1, 2)
    ('fc2', 2, 2)
    """
    known = list(names)
    tell = teller(progress, len(known), unit)
    for name in known:
        yield name
        tell(name)


def say_complete(progress: Any, who: str, what: str) -> None:
    """Say where progress is shown that there is nothing left to do.

    Examples
    --------
    >>> say_complete(True, "sweep", "3 layers in out")
    """
    if progress is True:
        print(f"{who}: already complete, {what}.", file=sys.stderr)


Damping = One | Iterable[One] | None
Label = float | str


@final
@dataclass(frozen=True)
class Dampings:
    """The dampings of an analysis, one after the other.

    Examples
    --------
    >>> dampings([0.1, Factored(0.1)]).labels
    ('0.1', 'factored 0.1')
    >>> dampings([0.1, 1.0]).labels
    (0.1, 1.0)
    """

    each: tuple[One, ...]

    @cached_property
    def kinds(self) -> tuple[str, ...]:
        """Which kind each is: absolute (λ beside the matrix), relative or factored."""
        named = {RelativeDamping: "relative", Factored: "factored"}
        return tuple(named.get(type(one), "absolute") for one in self.each)

    @cached_property
    def kind(self) -> str:
        """The kind of all, or "mixed"."""
        kinds = set(self.kinds)
        return kinds.pop() if len(kinds) == 1 else "mixed" if kinds else "absolute"

    @cached_property
    def labels(self) -> tuple[Label, ...]:
        """The numbers where all are of one kind, else kind and number in words."""
        numbers = tuple(_size(one) for one in self.each)
        if self.kind != "mixed" and len(set(self.each)) == len(set(numbers)):
            return numbers
        pairs = zip(self.kinds, self.each, strict=True)
        return tuple(_words(kind, one) for kind, one in pairs)

    def told(self, level: int) -> str:
        """Return one label as text."""
        label = self.labels[level]
        return label if isinstance(label, str) else f"{label:g}"

    def read(self, exact: Operator) -> tuple[Tikhonov | Factored, ...]:
        """Return every damping for one exact block."""
        return tuple(parsed(one, exact) for one in self.each)

    def values(self, exact: Operator) -> tuple[float, ...]:
        """Return λ for one exact block."""
        return tuple(one.value for one in self.read(exact))

    def single(self, call: str, exact: Operator) -> Tikhonov | Factored:
        """Return the one damping of a call that takes one.

        Raises
        ------
        ValueError
            If there are several.
        """
        self.require_one(call)
        return self.read(exact)[0]

    def require_one(self, call: str) -> None:
        """Refuse several dampings.

        Raises
        ------
        ValueError
            Unless there is exactly one.
        """
        if len(self.each) != 1:
            raise ValueError(f"{call}: one damping is expected, {self.labels} was given.")


def dampings(damping: Damping) -> Dampings:
    """Read a damping argument: None, one damping of any kind, or several.

    Raises
    ------
    ValueError
        For what is no damping, or not positive.
    """
    if damping is None:
        return Dampings(())
    single = isinstance(damping, (str, Tikhonov, Factored, RelativeDamping))
    if getattr(damping, "ndim", None) == 0 or not hasattr(damping, "__iter__"):
        single = True
    given: Any = (damping,) if single else damping
    found: list[One] = []
    for one in given:
        if isinstance(one, RelativeDamping):
            assert isinstance(one.alphas, tuple)
            found += [RelativeDamping(alpha) for alpha in one.alphas]
        else:
            found.append(parsed(one, None))
    if not found or any(not _size(one) > 0 for one in found):
        raise ValueError(f"damping={damping!r}: positive dampings are expected.")
    return Dampings(tuple(found))


def _size(damping: One) -> float:
    if isinstance(damping, RelativeDamping):
        return damping.single()
    assert isinstance(damping, (Tikhonov, Factored))
    return damping.value


def _words(kind: str, damping: One) -> str:
    if isinstance(damping, Factored) and damping != Factored(damping.value):
        return repr(damping)
    return f"{'' if kind == 'absolute' else kind + ' '}{_size(damping):g}"


T = TypeVar("T")
# What one cell may fail with without ending the table: refusals (ValueError, too), what
# factorisations, iterations and allocations of the libraries below raise, and what a metric
# of one's own does that asks a small layer for its tenth eigenvalue.
REFUSALS = (
    FisherlabError,
    ValueError,
    ArithmeticError,
    LookupError,
    RuntimeError,
    MemoryError,
)
# What a layer has at every damping, whatever the approximation.
OF_EXACT = ("lambda", "exact_slope", "gradient_curvature")


@dataclass(eq=False)
class Cells:
    """Numbers, reasons and bounds of every (layer, approximator[, damping])."""

    layers: list[str]
    methods: list[str]
    dampings: Dampings
    arrays: dict[str, Any] = field(default_factory=dict)
    reasons: dict[tuple[str, str], list[str]] = field(default_factory=dict)
    bounds: dict[tuple[str, str], list[str]] = field(default_factory=dict)
    left_out: Mapping[tuple[str, str, str], str] = field(default_factory=dict)

    def begin(self, name: str, *rest: str | int) -> None:
        """Make an array of NaN, unless it is there."""
        if name not in self.arrays:
            count = len(self.dampings.labels)
            sizes = [len(self.methods) if isinstance(r, str) else count for r in rest]
            self.arrays[name] = np.full([len(self.layers), *sizes], np.nan)

    def put(self, name: str, value: float, layer: str, *rest: str | int) -> None:
        """Store one number of (layer[, approximator][, damping]); remember a bound."""
        place = [self.layers.index(layer)]
        place += [self.methods.index(r) if isinstance(r, str) else r for r in rest]
        self.begin(name, *rest)
        self.arrays[name][tuple(place)] = value
        if isinstance(value, BelowFloor):
            method, *level = rest
            at = f"[damping={self.dampings.told(int(level[0]))}]" if level else ""
            self.bounds.setdefault((layer, str(method)), []).append(f"{name}{at}")

    def lacks(self, name: str, layer: str, method: str) -> bool:
        """Tell whether one number of (layer, approximator) is not stored yet."""
        place = self.layers.index(layer), self.methods.index(method)
        return bool(np.isnan(self.arrays[name][place]))

    def blame(self, layer: str, method: str, reason: str) -> None:
        """Say why something of a cell is missing, once."""
        known = self.reasons.setdefault((layer, method), [])
        if reason not in known:
            known.append(reason)

    def blame_undefined(self, layer: str, method: str) -> None:
        """Name the metrics of a cell that are no numbers although nothing failed."""
        if (layer, method) in self.reasons:
            return
        place = self.layers.index(layer), self.methods.index(method)
        several = {name: a for name, a in self.arrays.items() if name not in OF_EXACT}
        undefined = [
            name
            for name, array in several.items()
            if array.ndim > 1 and np.isnan(array[place]).any()
        ]
        if undefined:
            told = f"undefined (zero, constant or too large): {', '.join(undefined)}"
            self.blame(layer, method, told)

    def leaves_out(self, layer: str, method: str, part: Needs) -> bool:
        """Say whether a part of a cell is left out for its size, and note it."""
        why = self.left_out.get((layer, method, part))
        if why is not None:
            self.blame(layer, method, why)
        return why is not None

    def blame_damping(
        self, layer: str, method: str, level: int, error: Exception, step: str = ""
    ) -> None:
        """Say why something is missing at one damping."""
        label = self.dampings.told(level)
        self.blame(layer, method, f"damping {label}: {reason(error, step)}")

    def read(self, layer: str, exact: Operator) -> tuple[Tikhonov | Factored, ...]:
        """Return the dampings of a layer, or none and why in its cells."""
        found, told = tried(self.dampings.read, exact)
        for method in self.methods if found is None else ():
            self.blame(layer, method, told)
        return found or ()

    def told(self, texts: Mapping[tuple[str, str], Sequence[str]], empty: str) -> Any:
        """Return what is said of every cell as an array of text."""
        rows = [
            ["; ".join(texts.get((layer, m), [])) or empty for m in self.methods]
            for layer in self.layers
        ]
        return np.array(rows, dtype=object).reshape(len(self.layers), len(self.methods))

    def dataset(
        self, layers: Mapping[str, Any], made: Mapping[str, str | int]
    ) -> xr.Dataset:
        """Return everything, labelled; `layers` are the coordinates of the rows."""
        dims = ("layer", "approximator", "damping")
        order = {name: place for place, name in enumerate(QUANTITIES)}
        variables = {
            name: (
                ("layer", "damping") if name in OF_EXACT else dims[: array.ndim],
                array,
            )
            for name, array in sorted(
                self.arrays.items(), key=lambda i: order.get(i[0], len(order))
            )
        }
        variables["floored"] = dims[:2], self.told(self.bounds, "")
        variables["status"] = dims[:2], self.told(self.reasons, "ok")
        coords = {**layers, "approximator": self.methods}
        if self.dampings.labels:
            coords["damping"] = list(self.dampings.labels)
        if self.dampings.kind == "mixed":
            coords["damping_kind"] = "damping", list(self.dampings.kinds)
        ds = xr.Dataset(variables, coords, dict(made))
        if "converged" in ds:
            ds["converged"] = ds["converged"].fillna(-1).astype("int8")
        return described(ds)


def described(ds: xr.Dataset, labels: Mapping[str, str] | None = None) -> xr.Dataset:
    """Give every variable its `long_name` and `units`."""
    own = labels or {}
    for name in map(str, ds.data_vars):
        attrs = quantity(name).attrs
        if name in own:
            attrs["long_name"] = own[name]
        ds[name].attrs = attrs | ds[name].attrs
    return ds


def layer_coordinates(stats: Statistics) -> dict[str, Any]:
    """Return the layers with their shapes, positions and kinds."""
    return located(
        {
            name: (*s.weight_shape, round(s.positions / max(s.count, 1)), s.block.kind)
            for name, s in stats.items()
        }
    )


def located(layers: Mapping[str, tuple[int, int, int, str]]) -> dict[str, Any]:
    """Return names, d_out, d_in, positions and kinds of layers as coordinates."""
    names = "d_out", "d_in", "positions", "kind"
    return {"layer": list(layers)} | {
        name: ("layer", [sizes[place] for sizes in layers.values()])
        for place, name in enumerate(names)
    }


def tried(action: Callable[..., T], *given: Any, step: str = "") -> tuple[T | None, str]:
    """Return what fills a cell and "ok", or None and why there is nothing.

    Examples
    --------
    >>> tried(int, "3"), tried(int, "three", step="reading")[0]
    ((3, 'ok'), None)
    """
    try:
        return action(*given), "ok"
    except REFUSALS as error:
        return None, reason(error, step)


def attribute(name: str, number: Callable[[], float]) -> dict[str, float | str]:
    """Return a number as an attribute, or NaN and why as `name_status`.

    Examples
    --------
    >>> attribute("rank", lambda: 2.0)
    {'rank': 2.0}
    """
    found, told = tried(number)
    return {name: np.nan, f"{name}_status": told} if found is None else {name: found}


SHARED = "needs the inputs and output gradients of the layer"


def reason(error: Exception, step: str = "") -> str:
    """Say an error in one line, which names the step that failed.

    Examples
    --------
    >>> reason(RuntimeError("no memory"), "frobenius_error")
    'frobenius_error: no memory'
    """
    if isinstance(error, NeedsSharedForm):
        return SHARED
    if isinstance(error, IndefiniteError):
        return (
            f"not positive definite (smallest eigenvalue {error.smallest:.3g}, λ above "
            f"{error.sufficient:.3g} needed)"
        )
    lines = str(error).splitlines()
    told = lines[0] if lines else type(error).__name__
    return told if step in told else f"{step}: {told}"


CONVENTIONS = (
    "row-major vec, bias in the last column; F = (1/N) sum over examples of the outer "
    "products of gradients of the summed loss"
)


def attributes(
    stats: Statistics, approximators: Mapping[str, object], **more: str
) -> dict[str, str | int]:
    """Return netCDF attributes: who made it, from what, with which methods."""
    dtype = next(iter(stats.values())).dtype
    return made_of(stats.provenance, dtype, stats.device, approximators, **more)


def made_of(
    provenance: Provenance,
    dtype: object,
    device: object,
    approximators: Mapping[str, object],
    **more: str,
) -> dict[str, str | int]:
    """Return the attributes of a table whose statistics need not be there."""
    import torch

    made: dict[str, str | int] = {
        "creation_library": "fisherlab",
        "creation_library_version": fisherlab.__version__,
        "creation_library_language": "Python",
        "created_at": datetime.now(UTC).isoformat(timespec="seconds"),
        "torch_version": str(torch.__version__),
        "fisher": provenance.fisher,
        "likelihood": provenance.likelihood,
        "examples": provenance.examples,
        "dtype": str(dtype).removeprefix("torch."),
        "device": str(device),
        "approximators": json.dumps({n: repr(a) for n, a in approximators.items()}),
        "conventions": CONVENTIONS,
    }
    if provenance.seed is not None:
        made["seed"] = provenance.seed
    return made | more


def build(
    cells: Cells,
    layer: LayerStatistics,
    method: str,
    approximator: Approximator,
    limit: int | None = None,
) -> Operator | None:
    """Return the approximation of a layer, or None with the reason noted.

    One that would hold more than `limit` bytes, in the float64 of the metrics, is not
    made at all.
    """
    if cells.leaves_out(layer.name, method, "matrix"):
        return None
    try:
        if limit is not None:
            require_room(layer, method, approximator, limit)
        return operator_of(approximator, layer)
    except NeedsSharedForm:
        why = f": {layer.why}" if layer.why else ""
        cells.blame(layer.name, method, f"{SHARED}{why}")
    except REFUSALS as error:
        cells.blame(layer.name, method, f"{method} of {layer.name!r}: {reason(error)}")
    return None


def require_room(
    layer: LayerStatistics, method: str, approximator: Approximator, limit: int
) -> None:
    """Refuse an approximation whose numbers, or whose making, alone exceed a budget.

    Raises
    ------
    BudgetError
        Naming the bytes, the budget and the remedy.
    """
    require(
        room(layer.samples, approximator),
        limit,
        f"{method} of block {layer.name!r}",
        "Raise the budget, or leave the method or the layer out.",
    )
