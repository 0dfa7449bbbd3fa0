r"""Where the error of an approximation comes from.

Additive, by orthogonality:

- ``‖F − F̂‖² = ‖F − c*F̂‖² + (c* − 1)² ‖F̂‖²``, shape and scale of one block;
- ``‖F_net − F̂_net‖² = Σ_{i≠j} ‖F_ij‖² + Σ_i ‖F_ii − F̂_ii‖²``, the layer blocks that are
  dropped and those that are approximated.

Sampling and the source of the labels are not orthogonal to the rest: a ladder of measured
errors sets them side by side.
"""

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Final

import numpy as np
import torch
import xarray as xr
from torch import nn

from fisherlab.analysis.cells import (
    Cells,
    Telling,
    attributes,
    build,
    dampings,
    described,
    layer_coordinates,
    tried,
    watched,
)
from fisherlab.approximators import KFAC, Approximator, ExactBlock
from fisherlab.approximators.kfac import Sharing
from fisherlab.approximators.register import Chosen, by_name
from fisherlab.likelihoods import Likelihood
from fisherlab.metrics import (
    cross_squares,
    frobenius_error,
    optimal_scale,
    scale_optimal_error,
)
from fisherlab.metrics.pairs import Pair, paired
from fisherlab.metrics.structure import normalised
from fisherlab.operators import FactoredFisher
from fisherlab.settings import numeric
from fisherlab.statistics import (
    Empirical,
    Exact,
    LayerStatistics,
    MonteCarlo,
    Statistics,
    collect,
)
from fisherlab.statistics.fishers import Fisher

METHODS = ("kfac", "ekfac", "kpsvd", "kpsvd-2", "mini-block", "diagonal")
SOURCES = ("exact", "sampled", "empirical")
PARTS = ("shape", "scale")
NETWORK_PARTS = ("off_diagonal", *PARTS)
SHARINGS: Final[tuple[Sharing, ...]] = ("expand", "reduce")
NETWORK_SAMPLES = 8192  # samples whose Gram matrices set layers against each other
_LABELS = {
    "source_error": "‖F_source − F‖ / ‖F‖",
    "source_status": "ok, or why a value is missing",
    "error": "‖F − F̂(source)‖ / ‖F‖",
    "squared_part": "part of ‖F − F̂‖² / ‖F‖²",
    "sharing_error": "relative error of KFAC by how positions are treated",
    "sharing_status": "ok, or why a value is missing",
    "network_squared_part": "part of the squared relative error of the whole network",
    "network_error": "relative error of the block-diagonal network matrix",
    "coupling": "‖F_ij‖ / √(‖F_ii‖ ‖F_jj‖)",
}


@numeric
def decompose(
    model: nn.Module,
    data: Any,
    likelihood: Likelihood,
    approximators: Chosen = METHODS,
    *,
    samples: int = 1,
    seed: int = 0,
    layers: Sequence[str] | None = None,
    progress: Telling = False,
) -> xr.Dataset:
    r"""Tell sampling, labels, factorisation, scale and dropped blocks apart.

    Parameters
    ----------
    model, data, likelihood
        As for `collect`, but read three times, so no iterator; data without labels leave
        the empirical Fisher out.
    approximators
        Names, or a mapping of names to values.
    samples, seed
        Of the sampled Fisher.
    layers
        Block names or module prefixes; all by default.
    progress
        Show a bar, or call a function with a `Done` after every layer.

    Returns
    -------
    xarray.Dataset
        `source_error(layer, source)`: distance of the sampled and of the empirical Fisher
        from the exact one. `error(layer, approximator, source)`: the ladder, each method
        made from each source against the exact block. `squared_part(layer, approximator,
        part)`: shape and scale, which add up to ``error(source="exact")²``.
        `sharing_error(layer, sharing)`: KFAC with positions expanded and reduced.
        `network_squared_part(approximator, network_part)`, which add up to
        `network_error²`, and `coupling(layer, other_layer)`. `status`, `source_status` and
        `sharing_status` say why a number is missing.

    Raises
    ------
    ValueError
        For unknown names.
    TypeError
        For data that can be read only once.

    Notes
    -----
    Three passes over the data and one comparison of each source. Layers are set against
    each other through Gram matrices of the exact Fisher's samples, or of the sampled
    one's where those are above 8192 (`network_fisher` tells).

    Examples
    --------
    >>> import torch, fisherlab as fl
    >>> data = torch.rand(20, 3).double(), torch.arange(20) % 2
    >>> ds = fl.decompose(torch.nn.Linear(3, 2).double(), data, fl.Categorical(), ["kfac"])
    >>> total = float(ds.squared_part.sel(approximator="kfac").sum())
    >>> abs(total - float(ds.error.sel(source="exact").squeeze()) ** 2) < 1e-9
    True
    """
    sources = _sources(model, data, likelihood, samples, seed, layers)
    exact, chosen = sources["exact"], by_name(approximators)
    count, methods = len(exact), len(chosen)
    tables = _Tables(
        Cells(list(exact), list(chosen), dampings(None)),
        np.full((count, methods, len(SOURCES)), np.nan),
        np.full((count, methods, len(PARTS)), np.nan),
    )
    distances, sharing = [], []
    for name in watched(exact, progress):
        whole = ExactBlock()(exact[name]).to(torch.float64)
        sharing.append([tried(_shared, exact[name], how, whole) for how in SHARINGS])
        distances.append([tried(_between, sources, at, name, whole) for at in SOURCES])
        for source, stats in sources.items():
            tables.fill(stats[name], source, chosen, whole)
    network, notes = _network(sources, tables.parts)
    told = tables.cells.told(tables.cells.reasons, "ok")
    ds = xr.Dataset(
        {
            **_told("source", SOURCES, distances),
            "error": (("layer", "approximator", "source"), tables.errors),
            "squared_part": (("layer", "approximator", "part"), tables.parts),
            **_told("sharing", SHARINGS, sharing),
            "network_squared_part": (
                ("approximator", "network_part"),
                network["network_squared_part"],
            ),
            "coupling": (("layer", "other_layer"), network["coupling"]),
            "status": (("layer", "approximator"), told),
        },
        layer_coordinates(exact)
        | {
            "approximator": list(chosen),
            "source": list(SOURCES),
            "part": list(PARTS),
            "sharing": list(SHARINGS),
            "network_part": list(NETWORK_PARTS),
            "other_layer": list(exact),
        },
        attributes(exact, chosen, analysis="decompose", **notes)
        | {"seed": seed, "samples": samples},
    )
    total = ds["network_squared_part"].sum("network_part", skipna=False)
    ds["network_error"] = total**0.5
    return described(ds, _LABELS)


def _sources(
    model: nn.Module,
    data: Any,
    likelihood: Likelihood,
    samples: int,
    seed: int,
    layers: Sequence[str] | None,
) -> dict[str, Statistics]:
    """Collect every source that the data allow."""
    if isinstance(data, Iterator):
        msg = "decompose: the data are read three times; give a tuple, list or DataLoader."
        raise TypeError(msg)
    kinds: dict[str, Fisher] = {"exact": Exact(), "sampled": MonteCarlo(samples, seed)}
    if _labelled(data):
        kinds["empirical"] = Empirical()
    return {
        source: collect(model, data, likelihood, fisher, layers=layers)
        for source, fisher in kinds.items()
    }


def _labelled(data: Any) -> bool:
    _, labels = data if isinstance(data, tuple) else next(iter(data), (None, None))
    return labels is not None


def _between(
    sources: Mapping[str, Statistics], source: str, name: str, whole: FactoredFisher
) -> float:
    """Return the distance of a source's block from the exact one."""
    if source not in sources:
        raise ValueError("the data have no labels")
    if source == "exact":
        return 0.0
    block = ExactBlock()(sources[source][name])
    return frobenius_error.of(paired("decompose", whole, block, mixed=True))


def _shared(layer: LayerStatistics, sharing: Sharing, whole: FactoredFisher) -> float:
    """Return the error of KFAC with positions expanded or reduced."""
    approx = KFAC(sharing=sharing)(layer)
    return frobenius_error.of(paired("decompose", whole, approx, mixed=False))


def _told(
    dim: str, names: Sequence[str], rows: Sequence[Sequence[tuple[float | None, str]]]
) -> dict[str, Any]:
    """Return the errors along a dimension, and why some are missing."""
    shape = len(rows), len(names)
    flat = [cell for row in rows for cell in row]
    values = [np.nan if value is None else value for value, _ in flat]
    status = np.array([told for _, told in flat], dtype=object)
    return {
        f"{dim}_error": (("layer", dim), np.reshape(values, shape)),
        f"{dim}_status": (("layer", dim), status.reshape(shape)),
    }


@dataclass(frozen=True, eq=False)
class _Tables:
    """What is filled layer by layer."""

    cells: Cells
    errors: np.ndarray
    parts: np.ndarray

    def fill(
        self,
        layer: LayerStatistics,
        source: str,
        chosen: Mapping[str, Approximator],
        whole: FactoredFisher,
    ) -> None:
        """Set every method made from one source against the exact block."""
        row, at = self.cells.layers.index(layer.name), SOURCES.index(source)
        for column, (method, approximator) in enumerate(chosen.items()):
            approx = build(self.cells, layer, method, approximator)
            if approx is None:
                continue
            pair = paired("decompose", whole, approx, mixed=source != "exact")
            error, told = tried(frobenius_error.of, pair)
            self.errors[row, column, at] = np.nan if error is None else error
            if error is None:
                self.cells.blame(layer.name, method, f"{source}: {told}")
            if source == "exact":
                parts, told = tried(_parts, pair)
                self.parts[row, column] = (np.nan, np.nan) if parts is None else parts
                if parts is None:
                    self.cells.blame(layer.name, method, f"{source}: {told}")


def _parts(pair: Pair) -> tuple[float, float]:
    """Return the squared errors of shape and of scale, which add up to the whole."""
    if pair.same or pair.exact_norm == 0:
        return 0.0, 0.0
    share = (pair.approx_norm / pair.exact_norm) ** 2
    scale = optimal_scale.of(pair) if pair.approx_norm > 0 else 0.0
    return scale_optimal_error.of(pair) ** 2, (scale - 1) ** 2 * share


def _network(
    sources: Mapping[str, Statistics], parts: np.ndarray
) -> tuple[dict[str, np.ndarray], dict[str, str]]:
    """Return the parts of the network's squared error, the couplings, and notes on them."""
    exact = sources["exact"]
    first = next(iter(exact.values())).samples
    small = first.total <= NETWORK_SAMPLES
    matched = small and not any(layer.compressed for layer in exact.values())
    chosen = exact if matched else sources["sampled"]
    squares = cross_squares(chosen)
    whole, own = float(squares.sum()), squares.diagonal().numpy()
    notes = {"network_fisher": chosen.provenance.fisher}
    shares = own / whole if 0 < whole < np.inf else np.full_like(own, np.nan)
    if not 0 < whole < np.inf:
        notes["network_status"] = f"the squared norm of the network is {whole:.3g}"
    dropped = 1 - float(shares.sum()) if len(own) > 1 else 0.0
    inside = np.einsum("lmp,l->mp", parts, shares)
    off = np.where(np.isfinite(inside[:, :1]), max(dropped, 0.0), np.nan)
    tables = {
        "network_squared_part": np.concatenate([off, inside], axis=1),
        "coupling": normalised(squares).numpy(),
    }
    return tables, notes
