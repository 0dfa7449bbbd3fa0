"""Second moments between layers, and one Kronecker product for every pair of them."""

from collections.abc import Sequence
from dataclasses import dataclass, replace
from itertools import combinations_with_replacement
from typing import ClassVar, final

import torch
from torch import Tensor

from fisherlab.approximators import register
from fisherlab.approximators.base import NetworkStatistics, OfSums
from fisherlab.approximators.network.block_diagonal import provenance
from fisherlab.operators import Provenance
from fisherlab.operators.network import KroneckerBlocks
from fisherlab.showing import shown
from fisherlab.statistics import LayerStatistics
from fisherlab.statistics.network import require_matching


@final
@dataclass(frozen=True, eq=False)
class Moments:
    """Sums Σ g_i g_jᵀ and Σ a_i a_jᵀ over examples and columns, for pairs of layers.

    Parameters
    ----------
    rows, columns
        The sums by pair of names.
    count
        Examples.
    """

    rows: dict[tuple[str, str], Tensor]
    columns: dict[tuple[str, str], Tensor]
    count: int
    provenance: Provenance

    def __add__(self, other: "Moments") -> "Moments":
        """Add up two parts of the data."""
        count = self.count + other.count
        return replace(
            self,
            rows={pair: value + other.rows[pair] for pair, value in self.rows.items()},
            columns={p: value + other.columns[p] for p, value in self.columns.items()},
            count=count,
            provenance=replace(self.provenance, examples=count),
        )

    def factors(self, row: str, column: str) -> tuple[Tensor, Tensor]:
        """Return G_ij = E[g_i g_jᵀ] and A_ij = E[a_i a_jᵀ]."""
        split = max(self.count, 1)
        return self.rows[row, column] / split, self.columns[row, column] / split


def moments(
    statistics: NetworkStatistics, pairs: Sequence[tuple[str, str]], method: str
) -> Moments:
    """Sum over a chunk; further columns of counted examples add to the gradients only.

    Raises
    ------
    NeedsSharedForm
        If a layer has no inputs and output gradients.
    ValueError
        If a layer is used at several positions, or columns do not match.
    """
    made = provenance(statistics, method)
    names = dict.fromkeys(name for pair in pairs for name in pair)
    held = {name: _at_one_position(statistics[name], method) for name in names}
    for row, column in pairs:
        require_matching(method, statistics[row], statistics[column])
    count = statistics[pairs[0][0]].count
    rows, columns = {}, {}
    for row, column in pairs:
        (a, g), (b, h) = held[row], held[column]
        rows[row, column] = g.flatten(0, 1).T @ h.flatten(0, 1)
        columns[row, column] = a.T @ b if count else a.new_zeros(a.shape[1], b.shape[1])
    return Moments(rows, columns, count, made)


def refusal(layer: LayerStatistics) -> str:
    """Say why a layer has no cross moments with others, or return nothing."""
    if layer.tokens is not None:
        return "it is an embedding, described by tokens"
    if layer.uses or layer.turned:
        return "its weight is used in several ways, or stored (in, out)"
    if (groups := len(layer.by_group())) > 1:
        return f"its rows are in {groups} groups with inputs of their own"
    if layer.inputs is None:
        return "it is described by per-example gradient matrices only"
    positions = layer.inputs.shape[1]
    if positions != 1:
        return f"its weight is shared by {positions} positions"
    return ""


def _at_one_position(layer: LayerStatistics, method: str) -> tuple[Tensor, Tensor]:
    inputs, gradients = layer.shared(method)
    reason = refusal(layer)
    if reason:
        msg = (
            f"{method}: layer {layer.name!r} cannot be joined to others, because {reason}; "
            "layers used at one position are expected. Leave it out."
        )
        raise ValueError(msg)
    return inputs[:, 0], gradients[:, :, 0]


@shown
@final
@dataclass(frozen=True)
class KhatriRao(OfSums[Moments, KroneckerBlocks]):
    r"""The Kronecker approximation of all pairs of layers, which KFAC takes blocks of.

    .. math:: \tilde F_{ij} = G_{ij} \otimes A_{ij}, \quad
              G_{ij} = E[g_i g_j^T], \; A_{ij} = E[a_i a_j^T]

    Notes
    -----
    Costs N·(Σ d_in)² + V·N·(Σ d_out)² multiply-adds, holds (Σ d_in)² + (Σ d_out)²
    numbers. Positive semi-definite: a principal submatrix of G ⊗ A over all layers. Exact
    for one example, and for deep linear networks with a Gaussian likelihood. Layers must
    be used at one position and have matching columns (``collect(compress=False)``).

    References
    ----------
    Martens & Grosse 2015, arXiv 1503.05671, section 3.

    Examples
    --------
    >>> import fisherlab as fl
    >>> model = torch.nn.Sequential(torch.nn.Linear(3, 2), torch.nn.Linear(2, 4))
    >>> stats = fl.collect(
    ...     model, (torch.ones(5, 3), None), fl.Gaussian(), compress=False
    ... )
    >>> KhatriRao()(stats).stored_numbers
    49
    """

    takes: ClassVar[str] = "network"

    def accumulate(self, state: Moments | None, statistics: NetworkStatistics) -> Moments:
        """Add the moments of a chunk.

        Raises
        ------
        NeedsSharedForm
            If a layer has no inputs and output gradients.
        ValueError
            If a layer is used at several positions, or columns do not match.
        """
        pairs = list(combinations_with_replacement(statistics, 2))
        found = moments(statistics, pairs, "KhatriRao")
        return found if state is None else state + found

    def finish(self, state: Moments) -> KroneckerBlocks:
        """Divide by the examples and put the moments together."""
        names = list(dict.fromkeys(row for row, _ in state.rows))
        own = [state.factors(name, name) for name in names]
        shapes = {n: (len(g), len(a)) for n, (g, a) in zip(names, own, strict=True)}
        split = max(state.count, 1)
        rows, columns = (
            _table(names, sums) / split for sums in (state.rows, state.columns)
        )
        return KroneckerBlocks(rows, columns, shapes, state.provenance)


def _table(names: list[str], sums: dict[tuple[str, str], Tensor]) -> Tensor:
    """Put the blocks of the upper triangle, and their mirror images, together."""
    rows = [
        torch.cat([sums[i, j] if (i, j) in sums else sums[j, i].T for j in names], 1)
        for i in names
    ]
    return torch.cat(rows)


register.add({"khatri-rao": KhatriRao()})
