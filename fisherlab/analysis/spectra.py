"""Spectra of blocks: all eigenvalues, the least error of every rank, and densities."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple, final

import numpy as np
import torch
import xarray as xr
from torch import Tensor

from fisherlab.analysis.cells import (
    Damping,
    Dampings,
    Telling,
    attribute,
    attributes,
    dampings,
    described,
    layer_coordinates,
    require_room,
    tried,
    watched,
)
from fisherlab.analysis.inverses import chosen_layers
from fisherlab.approximators import Approximator, ExactBlock
from fisherlab.approximators.base import operator_of
from fisherlab.approximators.register import Chosen, by_name
from fisherlab.metrics import effective_rank
from fisherlab.metrics.spectra import eigenvalues
from fisherlab.metrics.structure import kronecker_spectrum, tails
from fisherlab.numerics.devices import Budget, parse_budget, require
from fisherlab.numerics.krylov import gauss_nodes
from fisherlab.numerics.linalg import Label, factorised, require_finite
from fisherlab.operators import FactoredFisher, KroneckerSum, Operator
from fisherlab.operators.kronecker import DENSE_ROWS
from fisherlab.settings import is_number, numeric, require_number
from fisherlab.statistics import Layers, LayerStatistics, Statistics


def spectra(
    stats: Layers,
    approximators: Chosen = None,
    progress: Telling = False,
) -> xr.DataTree:
    """Return all eigenvalues of the exact block and of approximations, layer by layer.

    Parameters
    ----------
    stats
        Statistics of the layers.
    approximators
        Names, or a mapping of names to values; all named ones by default. The exact block
        always comes first.
    progress
        Show a bar, or call a function with a `Done` after every layer.

    Returns
    -------
    xarray.DataTree
        A node a layer with `eigenvalue(approximator, index)`, descending from index 1,
        `kronecker_value(rank)`, the singular values of the rearranged exact block, and
        `status(approximator)`; attributes `mean_eigenvalue` and `effective_rank`, with
        `effective_rank_status` where it is no number.

    Raises
    ------
    ValueError
        For unknown names.

    Examples
    --------
    >>> import torch, fisherlab as fl
    >>> data = (torch.rand(20, 3).double(), None)
    >>> stats = fl.collect(torch.nn.Linear(3, 2).double(), data, fl.Categorical())
    >>> fl.spectra(stats, ["kfac"])["weight"]["eigenvalue"].shape
    (2, 8)
    """
    stats = Statistics.of(stats, "spectra")
    chosen = {"exact": ExactBlock(), **by_name(approximators)}
    nodes = {name: _node(stats[name], chosen) for name in watched(stats, progress)}
    root = xr.Dataset(attrs=attributes(stats, chosen, analysis="spectra"))
    return xr.DataTree.from_dict({"/": root, **nodes})


def _node(layer: LayerStatistics, chosen: Mapping[str, Approximator]) -> xr.Dataset:
    o, i = layer.weight_shape

    def values(approximator: Approximator) -> np.ndarray:
        operator = operator_of(approximator, layer).to(torch.float64)
        found = eigenvalues("spectra", operator)
        require_finite(found, Label("the list of eigenvalues of {}", operator))
        return np.asarray(found.cpu().numpy())

    cells = [tried(values, approximator) for approximator in chosen.values()]
    rows = [np.full(o * i, np.nan) if row is None else row for row, _ in cells]
    status = [told for _, told in cells]
    exact = ExactBlock()(layer).to(torch.float64)
    node = xr.Dataset(
        {
            "eigenvalue": (("approximator", "index"), np.stack(rows)),
            "status": (("approximator",), np.array(status, dtype=object)),
        },
        {
            "approximator": list(chosen),
            "index": np.arange(1, o * i + 1),
            "d_out": o,
            "d_in": i,
        },
        {
            "mean_eigenvalue": exact.trace() / max(o * i, 1),
            "kind": layer.block.kind,
            **attribute("effective_rank", lambda: effective_rank(exact)),
        },
    )
    node["eigenvalue"].attrs = {"long_name": "eigenvalue", "units": "1"}
    node["status"].attrs = {"long_name": "ok, or why a value is missing", "units": "1"}
    return _with_kronecker(node, exact)


def _with_kronecker(node: xr.Dataset, exact: Operator) -> xr.Dataset:
    values, told = tried(kronecker_spectrum, exact)
    if values is None:
        return node.assign_attrs(kronecker_status=told)
    label = {"long_name": "Kronecker singular value", "units": "1"}
    found = xr.DataArray(
        values.cpu().numpy(), {"rank": np.arange(1, len(values) + 1)}, attrs=label
    )
    return node.assign(kronecker_value=found)


RANKS = (1, 2, 3, 4, 6, 8, 12, 16)
FAMILIES = ("kronecker", "eigen")
_LABELS = {
    "error": "least relative error of this rank",
    "stored_numbers": "numbers held",
    "singular_value": "value of this rank over the largest",
}


def rank_curve(
    stats: Layers, ranks: Sequence[int] = RANKS, progress: Telling = False
) -> xr.Dataset:
    """Return the least error of every rank, from one decomposition of each block.

    ``error(family="kronecker", rank=r)`` is the least error of any sum of r Kronecker
    products, reached by ``KPSVD(r)``; ``error(family="eigen", rank=r)`` that of any matrix
    of rank r.

    Parameters
    ----------
    stats
        Statistics of the layers.
    ranks
        Ranks of at least 1.
    progress
        Show a bar, or call a function with a `Done` after every layer.

    Returns
    -------
    xarray.Dataset
        `error`, `stored_numbers` and `singular_value` over (layer, family, rank),
        `status(layer, family)`; NaN where a block is too large for all of its values.

    Raises
    ------
    ValueError
        If a rank is below 1.

    Examples
    --------
    >>> import torch, fisherlab as fl
    >>> data = (torch.rand(20, 3).double(), None)
    >>> stats = fl.collect(torch.nn.Linear(3, 2).double(), data, fl.Categorical())
    >>> curve = fl.rank_curve(stats, ranks=[1, 2])
    >>> bool((curve.error.diff("rank") <= 0).all())
    True
    """
    stats = Statistics.of(stats, "rank_curve")
    if is_number(ranks):
        raise ValueError(f"rank_curve(ranks={ranks!r}): a list of ranks is expected.")
    for rank in ranks:
        require_number(f"rank_curve(ranks=[… {rank!r} …])", rank, "a whole number")
    chosen = sorted(set(ranks))
    if not chosen or chosen[0] < 1:
        raise ValueError(f"rank_curve: ranks={list(ranks)}; ranks from 1 are expected.")
    shape = len(stats), len(FAMILIES), len(chosen)
    arrays = {name: np.full(shape, np.nan) for name in _LABELS}
    status = np.full(shape[:2], "ok", dtype=object)
    for row, name in enumerate(watched(stats, progress)):
        exact = ExactBlock()(stats[name]).to(torch.float64)
        for column, family in enumerate(FAMILIES):
            values, status[row, column] = tried(_values, exact, family)
            if values is None:
                continue
            at = row, column
            arrays["error"][at] = tails(values, chosen)
            arrays["singular_value"][at] = [_share(values, rank) for rank in chosen]
            each = _numbers(exact.weight_shape, family)
            arrays["stored_numbers"][at] = [rank * each for rank in chosen]
    dims = ("layer", "family", "rank")
    variables = {name: (dims, array) for name, array in arrays.items()}
    coords = layer_coordinates(stats) | {"family": list(FAMILIES), "rank": chosen}
    made = attributes(stats, {}, analysis="rank_curve")
    ds = xr.Dataset({**variables, "status": (dims[:2], status)}, coords, made)
    return described(ds, _LABELS)


def _values(exact: FactoredFisher, family: str) -> Tensor:
    if family == "kronecker":
        return kronecker_spectrum(exact)
    return eigenvalues("rank_curve", exact).abs()


def _share(values: Tensor, rank: int) -> float:
    if rank > len(values):
        return 0.0
    return float(values[rank - 1] / values[0]) if float(values[0]) > 0 else float("nan")


def _numbers(shape: tuple[int, int], family: str) -> int:
    o, i = shape
    return (o * (o + 1) + i * (i + 1)) // 2 if family == "kronecker" else o * i + 1


NUMBER = 8  # bytes


class Measure(NamedTuple):
    """Points λ with the share of the p eigenvalues that each stands for."""

    values: Tensor
    shares: Tensor
    way: str


@final
@dataclass(frozen=True)
class _Effort:
    """What is spent on a block: probes, steps, whole spectra up to a size, bytes."""

    probes: int
    steps: int
    whole: int
    seed: int
    limit: int


@numeric
def density(
    stats: Layers,
    approximators: Chosen = None,
    *,
    probes: int = 8,
    steps: int = 64,
    seed: int = 0,
    whole: int = 20_000,
    layers: Sequence[str] | None = None,
    damping: Damping = None,
    budget: Budget = None,
    progress: Telling = False,
) -> xr.DataTree:
    r"""Return the spectral density of the exact block and of approximations, per layer.

    .. math:: μ = \frac1p \sum_j δ_{λ_j} \approx \frac{1}{n} \sum_{k \le n} \sum_j
              w_{kj} δ_{θ_{kj}}

    All eigenvalues where they are to be had: of the exact block through the smaller of its
    Gram matrix (N·V rows) and itself (p), of approximations up to p. Else stochastic
    Lanczos quadrature: θ and w are the Gauss nodes of random sign vectors, exact for
    polynomials of degree below 2·steps, and for everything where a block has no more
    distinct eigenvalues than steps.

    Parameters
    ----------
    stats
        Statistics of the layers.
    approximators
        Names, or a mapping of names to values; the exact block always comes first.
    probes, steps
        n sign vectors, and products with each.
    seed
        Of the sign vectors, which are the same for all methods of a layer.
    whole
        Rows up to which all eigenvalues are computed.
    layers
        Block names; all by default.
    damping
        One λ, or `RelativeDamping(α)`, that figures draw among the eigenvalues.
    budget
        Bytes of one matrix or Lanczos basis; half of the free memory by default.
    progress
        Show a bar, or call a function with a `Done` after every layer.

    Returns
    -------
    xarray.DataTree
        A node a layer with `eigenvalue(approximator, point)`, `share(approximator, point)`
        (adding up to 1, NaN beyond a method's points), `way(approximator)`, "whole" or
        "quadrature", and `status(approximator)`; attributes `mean_eigenvalue`, and
        `lambda` with a damping.

    Raises
    ------
    ValueError
        For unknown names, several dampings, or no probes or steps.

    Notes
    -----
    Quadrature costs probes · steps products and holds steps · p numbers. A share of n
    probes has a standard deviation of about √(2 share / (n p)).

    References
    ----------
    Ubaru, Chen & Saad 2017, SIAM J. Matrix Anal. Appl. 38(4); of networks: Ghorbani,
    Krishnan & Xiao 2019, arXiv 1901.10159.

    Examples
    --------
    >>> import torch, fisherlab as fl
    >>> data = (torch.rand(20, 3).double(), None)
    >>> stats = fl.collect(torch.nn.Linear(3, 2).double(), data, fl.Categorical())
    >>> tree = fl.density(stats, ["kfac"])
    >>> tree["weight"]["share"].sum("point").round(6).values.tolist()
    [1.0, 1.0]
    """
    stats = Statistics.of(stats, "density")
    if probes < 1 or steps < 1:
        msg = f"density: probes={probes} and steps={steps}; at least 1 each is expected."
        raise ValueError(msg)
    chosen: dict[str, Any] = {"exact": ExactBlock(), **by_name(approximators)}
    effort = _Effort(probes, steps, whole, seed, parse_budget(budget, stats.device))
    levels = dampings(damping)
    if damping is not None:
        levels.require_one("density")
    named = chosen_layers("density", stats, layers)
    nodes = {
        n: _density(stats[n], chosen, effort, levels) for n in watched(named, progress)
    }
    made = attributes(stats, chosen, analysis="density")
    sizes = {"probes": probes, "steps": steps, "probe_seed": seed}
    return xr.DataTree.from_dict({"/": xr.Dataset(attrs={**made, **sizes}), **nodes})


def _density(
    layer: LayerStatistics, chosen: Mapping[str, Any], effort: _Effort, levels: Dampings
) -> xr.Dataset:
    def measured(name: str, method: Any) -> Measure:
        require_room(layer, name, method, effort.limit)
        return measure(operator_of(method, layer).to(torch.float64), effort)

    cells = [tried(measured, *one, step=one[0]) for one in chosen.items()]
    found, status = [m for m, _ in cells], [told for _, told in cells]
    exact = ExactBlock()(layer).to(torch.float64)
    dims = ("approximator", "point")
    node = xr.Dataset(
        {
            "eigenvalue": (dims, _padded([m and m.values for m in found])),
            "share": (dims, _padded([m and m.shares for m in found])),
            "way": (dims[:1], np.array([m.way if m else "" for m in found], object)),
            "status": (dims[:1], np.array(status, dtype=object)),
        },
        {"approximator": list(chosen)},
        {
            "mean_eigenvalue": exact.trace() / max(exact.shape[0], 1),
            "kind": layer.block.kind,
        },
    )
    if levels.each:
        node.attrs |= attribute("lambda", lambda: levels.values(exact)[0])
    node["eigenvalue"].attrs = {"long_name": "eigenvalue", "units": "1"}
    node["share"].attrs = {"long_name": "share of the eigenvalues", "units": "1"}
    node["way"].attrs = {"long_name": "whole spectrum, or quadrature", "units": "1"}
    node["status"].attrs = {"long_name": "ok, or why a value is missing", "units": "1"}
    return node


def _padded(rows: Sequence[Tensor | None]) -> Any:
    longest = max((len(row) for row in rows if row is not None), default=0)
    out = np.full((len(rows), longest), np.nan)
    for at, row in enumerate(rows):
        if row is not None:
            out[at, : len(row)] = row.cpu().numpy()
    return out


def measure(operator: Operator, effort: _Effort) -> Measure:
    """Return the measure of one matrix: whole where it is small enough."""
    if isinstance(operator, FactoredFisher):
        samples = operator.samples
        rows = min(samples.total, operator.shape[0])
        if rows <= effort.whole and 2 * NUMBER * rows**2 <= effort.limit:
            return _of_samples(operator, rows)
    elif _lists(operator, effort.whole):
        values = eigenvalues("density", operator)
        return Measure(values, torch.full_like(values, 1 / len(values)), "whole")
    return _quadrature(operator, effort)


def _lists(operator: Operator, whole: int) -> bool:
    """Tell whether all eigenvalues are to be had, in closed form or of a small matrix."""
    p = operator.shape[0]
    several = isinstance(operator, KroneckerSum) and len(operator.terms) > 1
    known = not several and operator.eigenform() is not None
    return p <= (whole if known else min(whole, DENSE_ROWS))


def _of_samples(exact: FactoredFisher, rows: int) -> Measure:
    """Return the eigenvalues through the Gram matrix, and the zeros beside as one point."""
    p = exact.shape[0]
    if rows == p:
        values = eigenvalues("density", exact)
        return Measure(values, torch.full_like(values, 1 / p), "whole")
    table = exact.samples.gram() / exact.count
    values = factorised("eigvalsh", table, exact).flip(0)
    zero = values.new_zeros(1)
    shares = torch.cat([torch.full_like(values, 1 / p), zero + (p - rows) / p])
    return Measure(torch.cat([values, zero]), shares, "whole")


def _quadrature(operator: Operator, effort: _Effort) -> Measure:
    p, steps = operator.shape[0], min(effort.steps, operator.shape[0])
    remedy = "Use fewer steps, or raise the budget."
    require(NUMBER * (steps + 4) * p, effort.limit, "a Lanczos basis", remedy)
    generator = torch.Generator().manual_seed(effort.seed)
    product = _product(operator)
    values, shares = [], []
    for _ in range(effort.probes):
        signs = (
            torch.randint(0, 2, (p,), generator=generator, device="cpu").double() * 2 - 1
        )
        nodes, weights = gauss_nodes(product, signs.to(operator.device), steps)
        values.append(nodes)
        shares.append(weights / effort.probes)
    order = torch.cat(values).argsort(descending=True)
    return Measure(torch.cat(values)[order], torch.cat(shares)[order], "quadrature")


def _product(operator: Operator) -> Callable[[Tensor], Tensor]:
    shape = operator.weight_shape
    return lambda flat: (operator @ flat.view(shape)).flatten()
